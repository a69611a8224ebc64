//! Disks and images of ours, as they lie there when they were closed, or cut off.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::descriptor::{Descriptor, Guid, Image, ImageKind, Shot, Temporary};
use ploop::device::Device;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::Store;
use ploop::store::memory::MemoryStore;

use crate::rng::Rng;

/// Sectors of a cluster in most of them.
pub const CLUSTER: u32 = 64;

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

/// An image of `clusters` clusters, a few of them written.
pub fn image(name: &str, version: Version, cluster: u32, clusters: u64) -> Base {
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

/// The base of a disk that has one below its top.
const BASE: Guid = Guid::from_bytes([
    0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0x44, 0x44, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55,
]);

/// The descriptor of a disk whose top is `root.hds`, or `root.hds.top` over that.
pub fn descriptor(sectors: u64, cluster: u32, overlay: bool) -> Descriptor {
    let first = if overlay { BASE } else { Guid::TOP };
    let mut d = Descriptor::new_single(sectors, cluster, false, first, "root.hds").unwrap();
    if overlay {
        d.images.push(Image {
            guid: Guid::TOP,
            kind: ImageKind::Compressed,
            file: "root.hds.top".into(),
        });
        d.shots.push(Shot {
            guid: Guid::TOP,
            parent: BASE,
            temporary: Temporary::No,
        });
        d.top = Guid::TOP;
    }
    d.check().unwrap();
    d
}

/// A disk: a base and a top over it; `cut`: the top's program was killed after a flush.
pub fn disk(name: &str, cut: bool) -> Base {
    let clusters = 30;
    let sectors = u64::from(CLUSTER) * clusters;
    let store = MemoryStore::new();
    store.create_dir(Path::new("/d")).unwrap();
    let header = Header::new(Version::V2, CLUSTER, sectors).unwrap();
    let mut d = Descriptor::new_single(sectors, CLUSTER, false, BASE, "root.hds").unwrap();
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
    d = descriptor(sectors, CLUSTER, true);
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
