//! Damaged images, by base and seed: the same seed makes the same damage everywhere.
//!
//! ```text
//!  base: images of ours, and some of the corpus ── seed ─► one to three wounds ─► a store
//! ```
//!
//! * [`wound`]: the kinds of damage.
//! * [`guest`]: what can be read of a disk, and whether two readings agree.
//! * [`state`]: every file of a directory, byte for byte.

pub mod guest;
pub mod state;
pub mod wound;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::descriptor::{Descriptor, Guid, Image, ImageKind, Shot, Temporary};
use ploop::device::Device;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};

use crate::corpus;
use crate::crash::Rng;

/// Sectors of a cluster in most bases.
const CLUSTER: u32 = 64;

/// An undamaged disk or image.
#[derive(Debug)]
pub struct Base {
    /// For messages.
    pub name: String,
    /// Its files.
    pub store: MemoryStore,
    /// What is opened.
    pub source: Source,
    /// Files that damage is done to.
    pub targets: Vec<PathBuf>,
}

/// Cases of the corpus that are small enough and worth damaging.
const CASES: &[&str] = &[
    "003-v2-1m",
    "005-v1-small-cluster",
    "006-v1-data-off-0",
    "007-preallocated",
    "011-odd-size",
    "012-odd-cluster",
    "013-small-cluster",
    "014-bat-cluster-border",
    "024-shuffled",
    "029-data-off-gap",
    "201-cbt-valid",
    "210-ext-unknown-transit",
    "211-ext-unknown-necessary",
    "213-ext-on-dirty-image",
    "307-conversion-bat-rewritten",
    "401-duplicate-entry",
    "411-v1-misaligned-entry",
    "440-two-defects",
    "102-chain-8",
    "310-conversion-of-chain",
    "324-dirty-everywhere",
];

/// All bases. Panics without the corpus.
pub fn bases() -> Vec<Base> {
    let mut all = vec![
        image("v2", Version::V2, 128, 64),
        image("v1", Version::V1, 64, 40),
        image("v2 with a long table", Version::V2, CLUSTER, 9000),
        disk("disk", false),
        disk("disk with a journal", true),
    ];
    let cases = corpus::cases().into_iter();
    all.extend(
        cases
            .filter(|c| CASES.contains(&c.name.as_str()))
            .map(|c| case(&c)),
    );
    assert_eq!(all.len(), 5 + CASES.len());
    all
}

fn open(store: &MemoryStore, source: &Source, write: bool) -> ploop::disk::Disk {
    let options = OpenOptions {
        write,
        ..OpenOptions::default()
    };
    let opener = Opener::on(Arc::new(store.clone()));
    opener.open(source, &options).unwrap()
}

/// Writes a few clusters, each of other bytes; some in part.
fn fill(disk: &dyn Device, seed: u64) {
    let cluster = disk.cluster_bytes();
    let clusters = disk.size() / cluster;
    let mut rng = Rng(seed);
    for n in 0..7 {
        let at = match n {
            0 => 0,
            1 => clusters - 1,
            _ => rng.below(clusters),
        } * cluster;
        let len = if n % 2 == 0 { cluster } else { cluster / 2 };
        let words = (0..len / 8).map(|i| (rng.0 ^ (i / 64) << 32 | n << 56 | 1).to_le_bytes());
        let bytes: Vec<u8> = words.flatten().collect();
        disk.write(at, &bytes).unwrap();
    }
}

fn image(name: &str, version: Version, cluster: u32, clusters: u64) -> Base {
    let store = MemoryStore::new();
    store.create_dir(Path::new("/d")).unwrap();
    let path = PathBuf::from("/d/image.hds");
    let header = Header::new(version, cluster, u64::from(cluster) * clusters).unwrap();
    drop(create(&store, &path, &header, 0o600).unwrap());
    let source = Source {
        path: path.clone(),
        descriptor: false,
        snapshot: None,
    };
    let disk = open(&store, &source, true);
    fill(&disk, clusters);
    disk.close().unwrap();
    drop(disk);
    Base {
        name: name.into(),
        store,
        source,
        targets: vec![path],
    }
}

/// A base and a top over it; `cut`: the top's program was killed after a flush.
fn disk(name: &str, cut: bool) -> Base {
    let clusters = 30;
    let sectors = u64::from(CLUSTER) * clusters;
    let store = MemoryStore::new();
    store.create_dir(Path::new("/d")).unwrap();
    let base = Guid::parse("{11111111-2222-3333-4444-555555555555}").unwrap();
    let header = Header::new(Version::V2, CLUSTER, sectors).unwrap();
    let mut d = Descriptor::new_single(sectors, CLUSTER, false, base, "root.hds").unwrap();
    d.top = base;
    let source = Source {
        path: "/d/DiskDescriptor.xml".into(),
        descriptor: true,
        snapshot: None,
    };
    let write = |d: &Descriptor| {
        drop(store.remove_file(&source.path));
        let xml = store.create(&source.path, 0o600).unwrap();
        xml.write_at(&d.to_xml(), 0).unwrap();
    };
    drop(create(&store, Path::new("/d/root.hds"), &header, 0o600).unwrap());
    write(&d);
    let below = open(&store, &source, true);
    fill(&below, 5);
    below.close().unwrap();
    drop(below);
    drop(create(&store, Path::new("/d/root.hds.top"), &header, 0o600).unwrap());
    d.images.push(Image {
        guid: Guid::TOP,
        kind: ImageKind::Compressed,
        file: "root.hds.top".into(),
    });
    d.shots.push(Shot {
        guid: Guid::TOP,
        parent: base,
        temporary: Temporary::No,
    });
    d.top = Guid::TOP;
    write(&d);
    let top = open(&store, &source, true);
    fill(&top, 6);
    top.flush().unwrap();
    let killed = store.snapshot();
    top.close().unwrap();
    drop(top);
    let store = if cut { killed } else { store.snapshot() };
    let mut targets = vec![
        PathBuf::from("/d/root.hds"),
        "/d/root.hds.top".into(),
        "/d/DiskDescriptor.xml".into(),
    ];
    if cut {
        let journal = PathBuf::from("/d/.ploop/journal.root.hds.top");
        assert!(store.kind(&journal).unwrap().is_some(), "it has a journal");
        targets.push(journal);
    }
    Base {
        name: name.into(),
        store,
        source,
        targets,
    }
}

/// A case of the corpus; its files lie in one directory.
fn case(case: &corpus::Case) -> Base {
    let tmp = case.unpack();
    let store = MemoryStore::new();
    store.create_dir(Path::new("/d")).unwrap();
    let mut targets = Vec::new();
    let mut names: Vec<_> = std::fs::read_dir(tmp.path()).unwrap().flatten().collect();
    names.sort_by_key(|e| e.file_name());
    for entry in names {
        let to = Path::new("/d").join(entry.file_name());
        let bytes = std::fs::read(entry.path()).unwrap();
        store
            .create(&to, 0o600)
            .unwrap()
            .write_at(&bytes, 0)
            .unwrap();
        if to.extension().is_none_or(|e| e != "xml") {
            targets.push(to);
        }
    }
    let path = Path::new("/d").join(case.text("entry"));
    let source = Source {
        descriptor: path.extension().is_some_and(|e| e == "xml"),
        path,
        snapshot: None,
    };
    if !source.descriptor {
        targets = vec![source.path.clone()];
    }
    Base {
        name: case.name.clone(),
        store,
        source,
        targets,
    }
}

/// A damaged copy of one of `bases`, and what was done to it.
pub fn damaged(bases: &[Base], seed: u64) -> (&Base, MemoryStore, Vec<String>) {
    let mut rng = Rng(seed);
    let base = &bases[rng.below(bases.len() as u64) as usize];
    let store = base.store.snapshot();
    let mut what = Vec::new();
    for _ in 0..=rng.below(3) {
        let target = &base.targets[rng.below(base.targets.len() as u64) as usize];
        let file = store.open(target, Access::Write).unwrap();
        let wound = wound::wound(file.as_ref(), &mut rng);
        what.push(format!("{}: {wound}", target.display()));
    }
    (base, store, what)
}
