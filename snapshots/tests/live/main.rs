//! Rearranging a disk under its writers: snapshots, deletions and merges against a plain copy of
//! what each node must read.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, OpenOptions, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{RealStore, Store};
use snapshots::delete::{self, Deleted, Watch};
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::snapshot::{Live, NewSnapshot, take};

const SECTORS: u32 = 64;
const CLUSTER: u64 = 64 * 512;
const CLUSTERS: u64 = 20;
const SIZE: u64 = CLUSTER * CLUSTERS;

struct Rng(u64);

impl Rng {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

struct Quiet;

impl Watch for Quiet {
    fn go_on(&self, _: u64) -> bool {
        true
    }
    fn progress(&self, _: Progress) {}
}

fn new_disk(store: &dyn Store, dir: &Path, version: Version) {
    store.create_dir(dir).unwrap();
    let header = Header::new(version, SECTORS, SIZE / 512).unwrap();
    drop(create(store, &dir.join("root.hds"), &header, 0o600).unwrap());
    let d = Descriptor::new_single(SIZE / 512, SECTORS, false, Guid::TOP, "root.hds").unwrap();
    let file = store.create(&dir.join(DESCRIPTOR), 0o600).unwrap();
    file.write_at(&d.to_xml(), 0).unwrap();
}

fn source(dir: &Path, node: Option<Guid>) -> Source {
    Source {
        path: dir.join(DESCRIPTOR),
        descriptor: true,
        snapshot: node.map(|g| g.to_string()),
    }
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

fn run(store: Arc<dyn Store>, dir: &Path, version: Version, seed: u64, operations: u32) {
    new_disk(store.as_ref(), dir, version);
    let opener = Opener::on(store.clone());
    let place = Place::disk(&opener, &source(dir, None), &[], false).unwrap();
    let options = OpenOptions::default();
    let write = OpenOptions {
        write: true,
        ..OpenOptions::default()
    };
    let mut disk = opener.open(&source(dir, None), &write).unwrap();
    let mut rng = Rng(seed);
    let mut top = vec![0u8; SIZE as usize];
    let mut nodes: BTreeMap<String, (Guid, Vec<u8>)> = BTreeMap::new();
    for op in 0..operations {
        match rng.next(12) {
            0..=5 => {
                let at = rng.next(SIZE - 1);
                let len = 1 + rng.next((SIZE - at).min(3 * CLUSTER));
                let byte = rng.next(255) as u8 + 1;
                let range = at as usize..(at + len) as usize;
                top[range.clone()].fill(byte);
                disk.write(at, &top[range]).unwrap();
            }
            6 => {
                let at = rng.next(SIZE - 1);
                let len = 1 + rng.next(SIZE - at);
                top[at as usize..(at + len) as usize].fill(0);
                disk.zero(at..at + len, Default::default()).unwrap();
            }
            7 => disk.flush().unwrap(),
            8 | 9 => {
                let live = Live {
                    place: &place,
                    disk: &disk,
                };
                let taken = take(live, &NewSnapshot::default()).unwrap();
                let guid = Guid::parse(&taken.guid).unwrap();
                nodes.insert(taken.guid, (guid, top.clone()));
            }
            10 if !nodes.is_empty() => {
                let nth = rng.next(nodes.len() as u64) as usize;
                let key = nodes.keys().nth(nth).unwrap().clone();
                let (guid, _) = nodes.remove(&key).unwrap();
                let live = Live {
                    place: &place,
                    disk: &disk,
                };
                assert_eq!(delete::delete(live, guid).unwrap(), Deleted::Merging);
                let ran = delete::run(live, &Quiet).unwrap();
                assert_eq!((ran.removed, ran.paused, ran.hidden), (1, false, 0));
            }
            11 => {
                disk.close().unwrap();
                drop(disk);
                disk = opener.open(&source(dir, None), &write).unwrap();
            }
            _ => {}
        }
        assert!(
            content(&disk) == top,
            "seed {seed}, operation {op}: the live disk"
        );
        if op % 10 == 0 {
            for (guid, bytes) in nodes.values() {
                let node = opener.open(&source(dir, Some(*guid)), &options).unwrap();
                assert!(
                    content(&node) == *bytes,
                    "seed {seed}, operation {op}: {guid}"
                );
            }
        }
    }
    disk.close().unwrap();
    drop(disk);
    let names = store.list(dir).unwrap();
    let d = place.descriptor().unwrap();
    let files = names
        .iter()
        .filter(|n| n.to_string_lossy().starts_with("root.hds"));
    assert_eq!(files.count(), d.images.len(), "{names:?}");
    assert_eq!(d.images.len(), nodes.len() + 1);
}

#[test]
fn every_node_reads_what_it_was_whatever_is_deleted_under_the_writers() {
    for seed in 1..=20 {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let version = if seed % 4 == 0 {
            Version::V1
        } else {
            Version::V2
        };
        run(store, Path::new("/ct"), version, seed, 300);
    }
}

#[test]
fn the_same_on_files_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 101..=103 {
        let dir = dir.path().join(seed.to_string());
        run(RealStore::shared(), &dir, Version::V2, seed, 150);
    }
}
