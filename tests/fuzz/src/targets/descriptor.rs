//! DiskDescriptor.xml, alone and with its images. Input: the file.

use std::path::Path;
use std::sync::OnceLock;

use ploop::Kind;
use ploop::descriptor::{Descriptor, Guid, ImageKind, parse};
use ploop::disk::open::Source;
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};

use super::{LOOK, store};
use crate::base::{Base, CLUSTER, image};
use crate::trial::Trial;

/// Images that are made for a descriptor; the others are missing.
const IMAGES: usize = 6;
const XML: &str = "/d/DiskDescriptor.xml";

/// Parses, writes, parses again; edits; then all of a disk.
pub fn run(input: &[u8]) {
    let parsed = parse(input);
    match &parsed {
        Ok(d) => alone(d),
        // What contradicts the format has a name.
        Err(e) => assert_eq!(e.defect().is_some(), e.kind() == Kind::Corrupt, "{e}"),
    }
    let parsed = parsed.ok();
    let store = disk(input, parsed.as_ref());
    let source = Source {
        path: XML.into(),
        descriptor: true,
        snapshot: None,
    };
    let trial = Trial {
        store: &store,
        source: &source,
        look: LOOK,
        about: "a disk",
    };
    trial.check();
    trial.repair();
}

fn same(d: &Descriptor) {
    let xml = d.to_xml();
    let again = parse(&xml).unwrap_or_else(|e| panic!("what was written is refused: {e}"));
    assert_eq!(&again, d);
    assert_eq!(again.to_xml(), xml);
}

fn alone(d: &Descriptor) {
    assert!(d.check().is_ok(), "{:?}", d.check());
    same(d);
    for shot in &d.shots {
        let chain = d.chain(shot.guid).unwrap();
        assert_eq!(chain.last().map(|i| i.guid), Some(shot.guid));
        d.outer_parent(shot.guid).unwrap();
    }
    let new = Guid::from_bytes([0x11; 16]);
    let mut edited = d.clone();
    if edited.push_overlay(new, "new").is_ok() {
        edited.check().unwrap();
        same(&edited);
        let mut back = edited.clone();
        if back.replace_top(new, "newer").is_ok() {
            back.check().unwrap();
            same(&back);
        }
        if edited.remove(new).is_ok() {
            edited.check().unwrap();
            same(&edited);
        }
    }
}

/// An image that every ploop image of a disk is a copy of.
fn template() -> &'static Base {
    static IMAGE: OnceLock<Base> = OnceLock::new();
    IMAGE.get_or_init(|| image("template", Version::V2, CLUSTER, 3))
}

fn disk(xml: &[u8], d: Option<&Descriptor>) -> MemoryStore {
    let store = store();
    let put = |path: &Path, bytes: &[u8]| {
        if let Ok(file) = store.create(path, 0o600) {
            file.write_at(bytes, 0).unwrap();
        }
    };
    put(Path::new(XML), xml);
    let Some(d) = d else { return store };
    let from = template();
    let file = from.store.open(&from.source.path, Access::Read).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    for image in d.images.iter().take(IMAGES) {
        // Names that leave the directory lead to nothing.
        if image.file.contains('/') {
            continue;
        }
        let path = Path::new("/d").join(&image.file);
        match image.kind {
            ImageKind::Plain => put(&path, &[7; 4096]),
            ImageKind::Compressed => put(&path, &bytes),
        }
    }
    store
}
