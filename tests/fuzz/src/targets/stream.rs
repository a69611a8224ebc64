//! What `ploop receive` reads. Input: bit 0 of the first byte: what follows are frames (type, two
//! bytes of length, payload), which get their right numbers, checksums and hashes; else it is the
//! stream. Bit 1: it is received into a container that is there. Bit 2: what came of a stream that
//! was cut is kept. Bit 3: the stream says that it goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::open::{DESCRIPTOR, Opener};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, EntryKind, Store};
use sha2::{Digest, Sha256};
use snapshots::Root;
use snapshots::place::Place;
use snapshots::snapshot::{NewSnapshot, take_offline};
use snapshots::stream::frame::{CONTINUES, HEADER_BYTES, PREAMBLE_BYTES, Type, Writer};
use snapshots::stream::{
    Disk, Image, Manifest, ReceiveOptions, SendOptions, forget, partials, receive, send,
};

use super::LOOK;

const DIR: &str = "/store";
/// The container that is there.
const THERE: &str = "there";
/// Bytes of a file that are compared.
const COMPARE: u64 = 1 << 20;

fn on(store: &MemoryStore) -> Root {
    let opener = Opener::on(Arc::new(store.clone()));
    Root::on(opener, Path::new(DIR), true, false).unwrap()
}

/// A store with a container that has the snapshots `a`, and on that `b` where `both`; the GUIDs are
/// always the same.
fn host(both: bool) -> MemoryStore {
    let store = MemoryStore::new();
    store.create_dir(Path::new(DIR)).unwrap();
    let root = on(&store);
    let dir = root.container(THERE);
    store.create_dir(&dir).unwrap();
    let header = Header::new(Version::V2, 64, 256).unwrap();
    drop(create(&store, &dir.join("root.hds"), &header, 0o600).unwrap());
    let d = Descriptor::new_single(256, 64, false, Guid::TOP, "root.hds").unwrap();
    let xml = store.create(&dir.join(DESCRIPTOR), 0o600).unwrap();
    xml.write_at(&d.to_xml(), 0).unwrap();
    let place = Place::container(&root, THERE).unwrap();
    let write = |offset: u64, bytes: &[u8]| {
        let disk = place.open().unwrap();
        disk.write(offset, bytes).unwrap();
        disk.close().unwrap();
    };
    let snapshot = |name: &str, number: u8| {
        let new = NewSnapshot {
            name: Some(name.into()),
            description: "text".into(),
            guid: Some(Guid::from_bytes([number; 16])),
            ..NewSnapshot::default()
        };
        take_offline(&place, &new).unwrap();
    };
    write(4096, &[1; 512]);
    snapshot("a", 1);
    if both {
        write(0, &vec![0; 32_768]);
        write(40_000, &[2; 100]);
        snapshot("b", 2);
        write(100_000, &[3; 100]);
    }
    // What is left for whoever comes next is no part of what is compared.
    place.sweep().unwrap();
    store
}

fn base() -> &'static MemoryStore {
    static BASE: OnceLock<MemoryStore> = OnceLock::new();
    BASE.get_or_init(|| host(false))
}

/// Names and the beginning of each file.
fn listing(store: &MemoryStore) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut todo = vec![PathBuf::from(DIR)];
    while let Some(path) = todo.pop() {
        let mut bytes = Vec::new();
        if store.kind(&path).unwrap() == Some(EntryKind::Dir) {
            todo.extend(store.list(&path).unwrap().iter().map(|n| path.join(n)));
        } else {
            let file = store.open(&path, Access::Read).unwrap();
            let len = file.len().unwrap();
            bytes.resize(len.min(COMPARE) as usize, 0);
            file.read_at(&mut bytes, 0).unwrap();
            bytes.extend(len.to_le_bytes());
        }
        all.insert(path, bytes);
    }
    all
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The frames of an input.
fn frames(mut input: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut all = Vec::new();
    while let [kind, a, b, rest @ ..] = input {
        let len = usize::from(u16::from_le_bytes([*a, *b])).min(rest.len());
        all.push((*kind, rest[..len].to_vec()));
        input = &rest[len..];
    }
    all
}

/// The stream of these frames, every sum right that follows from what comes before.
fn made(frames: &[(u8, Vec<u8>)], features: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::begin(&mut bytes, features).unwrap();
    let (mut disk, mut images): (Option<Disk>, Vec<Image>) = (None, Vec::new());
    let (mut image, mut whole) = (Sha256::new(), None);
    for (kind, payload) in frames {
        let mut payload = payload.clone();
        match *kind {
            k if k == Type::Disk as u8 => disk = serde_json::from_slice(&payload).ok(),
            k if k == Type::Image as u8 => images.extend(serde_json::from_slice(&payload).ok()),
            k if k == Type::Begin as u8 => {
                image = Sha256::new();
                if whole.is_none()
                    && let Some(disk) = disk.clone()
                {
                    let images = images.clone();
                    let records = Manifest { disk, images }.hash().unwrap();
                    whole = Some(Sha256::new_with_prefix(records));
                }
            }
            k if k == Type::Data as u8 && payload.len() >= 8 => hash(&mut image, &payload),
            k if k == Type::Done as u8 => {
                let text = format!("sha256-blocks:{}", hex(&image.clone().finalize()));
                if let Some(whole) = &mut whole {
                    whole.update(&text);
                }
                payload = serde_json::json!({ "hash": text }).to_string().into_bytes();
            }
            k if k == Type::End as u8 => {
                let hash = whole.clone().map_or(String::new(), |w| hex(&w.finalize()));
                let frames = writer.frames();
                let end = serde_json::json!({ "frames": frames, "hash": hash });
                payload = end.to_string().into_bytes();
            }
            _ => {}
        }
        writer.raw(*kind, &payload).unwrap();
    }
    bytes
}

fn hash(image: &mut Sha256, payload: &[u8]) {
    let (offset, bytes) = payload.split_first_chunk::<8>().unwrap();
    let mut at = u64::from_le_bytes(*offset);
    if bytes.is_empty() {
        image.update((at | 1 << 63).to_le_bytes());
    }
    for block in bytes.chunks(4096) {
        image.update(at.to_le_bytes());
        image.update(block);
        image.update(&[0; 4096][block.len()..]);
        at = at.wrapping_add(4096);
    }
}

/// Receives, and takes it back.
pub fn run(input: &[u8]) {
    let Some((&flags, rest)) = input.split_first() else {
        return;
    };
    let stream = match flags & 1 {
        0 => rest.to_vec(),
        _ => made(&frames(rest), if flags & 8 == 0 { 0 } else { CONTINUES }),
    };
    let store = base().snapshot();
    let before = listing(&store);
    let root = on(&store);
    let name = if flags & 2 == 0 { "new" } else { THERE };
    let options = ReceiveOptions {
        arriving: None,
        resumable: flags & 4 != 0,
    };
    let done = receive(
        &root,
        name,
        options.clone(),
        &mut stream.as_slice(),
        &|_, _| (),
    );
    match done {
        Err(e) => {
            for cut in partials(&root).unwrap() {
                assert!(options.resumable, "{e}: kept, and nobody asked for it");
                forget(&root, &cut.name).unwrap();
            }
            assert!(listing(&store) == before, "something is left: {e}");
        }
        Ok(_) => {
            read(&root, name);
            if name == THERE {
                return;
            }
            snapshots::remove_container(&root, name).unwrap();
            assert!(listing(&store) == before, "something of it is left");
        }
    }
}

/// Every node of a container can be read.
fn read(root: &Root, name: &str) {
    let place = Place::container(root, name).unwrap();
    let d = place.descriptor().unwrap();
    for image in &d.images {
        let source = place.source(Some(image.guid));
        let disk = root.opener().open(&source, &root.open_options(false));
        let disk = disk.unwrap_or_else(|e| panic!("{name} was received: {e}"));
        let mut bytes = vec![0; disk.size().min(LOOK) as usize];
        disk.read(0, &mut bytes)
            .unwrap_or_else(|e| panic!("{name} was received: {e}"));
    }
    let disk = place.open().unwrap_or_else(|e| panic!("write {name}: {e}"));
    disk.write(0, &[7; 512]).unwrap_or_else(|e| panic!("{e}"));
    disk.close().unwrap_or_else(|e| panic!("{e}"));
}

/// Streams of each sort, as they are and as frames with less data.
pub fn seeds() -> BTreeSet<Vec<u8>> {
    let store = host(true);
    let root = on(&store);
    let place = Place::container(&root, THERE).unwrap();
    let state = |name: &str, from: Option<&str>| SendOptions {
        snapshot: Some(name.into()),
        from: from.map(str::to_owned),
        ..SendOptions::default()
    };
    let mut all = BTreeSet::new();
    for (flags, options) in [
        (0, SendOptions::default()),
        (0, state("a", None)),
        (2, state("b", Some("a"))),
    ] {
        let mut stream = Vec::new();
        send(&place, &options, &mut stream, &|_, _| ()).unwrap();
        let mut short = Vec::new();
        let mut at = PREAMBLE_BYTES;
        while at < stream.len() {
            let len: [u8; 4] = stream[at + 4..at + 8].try_into().unwrap();
            let (start, len) = (at + HEADER_BYTES, u32::from_le_bytes(len) as usize);
            let mut payload = &stream[start..start + len];
            if stream[at] == Type::Data as u8 {
                payload = &payload[..payload.len().min(24)];
            }
            short.push(stream[at]);
            short.extend((payload.len() as u16).to_le_bytes());
            short.extend(payload);
            at = start + len;
        }
        for more in [1, 5] {
            all.insert([&[flags | more], short.as_slice()].concat());
        }
        all.insert([&[flags], &stream[..stream.len().min(4000)]].concat());
    }
    all
}
