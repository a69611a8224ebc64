//! Rearranging a disk under its writers: snapshots, deletions, merges, growing, compacting and quotas
//! against a plain copy of what each node must read.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ploop::Kind;
use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, OpenOptions, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{RealStore, Store};
use snapshots::compact;
use snapshots::delete::{self, Deleted, Watch};
use snapshots::enlarge::enlarge;
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::quota;
use snapshots::snapshot::{Live, NewSnapshot, take};

const SECTORS: u32 = 64;
const CLUSTER: u64 = 64 * 512;
const CLUSTERS: u64 = 20;
const SIZE: u64 = CLUSTER * CLUSTERS;
/// Bytes of a disk that are compared; a larger one has nothing behind them.
const SHOWN: u64 = CLUSTER * 40;
/// Bytes of a disk whose table needs a second cluster.
const SECOND: u64 = (CLUSTER - 64) / 4 * CLUSTER + 1;

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
    let mut bytes = vec![0; disk.size().min(SHOWN) as usize];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

/// How many writes a quota refused, and how many bytes compacting freed.
fn run(
    store: Arc<dyn Store>,
    dir: &Path,
    version: Version,
    seed: u64,
    operations: u32,
) -> (u64, u64) {
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
    let mut nodes: BTreeMap<String, (Guid, Vec<u8>, u64)> = BTreeMap::new();
    let (mut refused, mut freed) = (0, 0);
    for op in 0..operations {
        let shown = top.len() as u64;
        match rng.next(16) {
            0..=5 => {
                let at = rng.next(shown - 1);
                let len = 1 + rng.next((shown - at).min(3 * CLUSTER));
                let byte = rng.next(255) as u8 + 1;
                let range = at as usize..(at + len) as usize;
                let before = top[range.clone()].to_vec();
                top[range.clone()].fill(byte);
                match disk.write(at, &top[range.clone()]) {
                    Ok(()) => {}
                    // Over the quota: what was written before it was met stays, to the byte.
                    Err(e) if e.kind() == Kind::NoSpace => {
                        refused += 1;
                        let mut now = vec![0; range.len()];
                        disk.read(at, &mut now).unwrap();
                        let either = now.iter().zip(&before).all(|(n, b)| n == b || *n == byte);
                        assert!(either, "seed {seed}, operation {op}");
                        top[range].copy_from_slice(&now);
                    }
                    Err(e) => panic!("seed {seed}, operation {op}: {e}"),
                }
            }
            6 => {
                let at = rng.next(shown - 1);
                let len = 1 + rng.next(shown - at);
                top[at as usize..(at + len) as usize].fill(0);
                match disk.zero(at..at + len, Default::default()) {
                    Ok(()) => {}
                    Err(e) if e.kind() == Kind::NoSpace => {
                        refused += 1;
                        quota::set_limit(&place, Some(&disk), None).unwrap();
                        disk.zero(at..at + len, Default::default()).unwrap();
                    }
                    Err(e) => panic!("seed {seed}, operation {op}: {e}"),
                }
            }
            7 => disk.flush().unwrap(),
            8 | 9 => {
                let live = Live {
                    place: &place,
                    disk: &disk,
                };
                let taken = take(live, &NewSnapshot::default()).unwrap();
                let guid = Guid::parse(&taken.guid).unwrap();
                nodes.insert(taken.guid, (guid, top.clone(), disk.size()));
            }
            10 if !nodes.is_empty() => {
                let nth = rng.next(nodes.len() as u64) as usize;
                let key = nodes.keys().nth(nth).unwrap().clone();
                let (guid, ..) = nodes.remove(&key).unwrap();
                let live = Live {
                    place: &place,
                    disk: &disk,
                };
                assert_eq!(delete::delete(live, guid).unwrap(), Deleted::Merging);
                let ran = delete::run(live, &Quiet).unwrap();
                assert_eq!((ran.removed, ran.paused, ran.hidden), (1, false, 0));
            }
            11 => {
                let size = match rng.next(8) {
                    0 if disk.size() < SECOND => SECOND,
                    0 => disk.size() * 2,
                    1..=5 if disk.size() < SHOWN => disk.size() + rng.next(3 * CLUSTER),
                    _ => disk.size(),
                };
                let live = Live {
                    place: &place,
                    disk: &disk,
                };
                let growth = enlarge(live, size).unwrap();
                assert_eq!(growth.to, size.next_multiple_of(CLUSTER));
                assert_eq!(disk.size(), growth.to);
                let sectors = place.descriptor().unwrap().disk_sectors;
                assert_eq!(sectors, Some(growth.to / 512));
                top.resize(growth.to.min(SHOWN) as usize, 0);
            }
            12 => {
                // As it was, or zeros: which, is seen.
                let at = rng.next(shown - 1);
                let len = 1 + rng.next(shown - at);
                disk.discard(at..at + len).unwrap();
                let now = content(&disk);
                let same = now.iter().zip(&top).all(|(n, b)| n == b || *n == 0);
                assert!(same, "seed {seed}, operation {op}: discard");
                top[at as usize..(at + len) as usize]
                    .copy_from_slice(&now[at as usize..(at + len) as usize]);
            }
            13 => {
                let live = Live {
                    place: &place,
                    disk: &disk,
                };
                let foretold = compact::foretell(live).unwrap().freed;
                let done = compact::top(live, &Quiet).unwrap();
                // A host counts what it has cached of room taken ahead for data, now and then.
                let (same, zeros) = (done.freed.same, done.freed.zeros);
                assert!(same >= foretold.same && zeros >= foretold.zeros, "{done:?}");
                freed += done.freed.total();
            }
            14 => {
                let limit = match rng.next(3) {
                    0 => None,
                    _ => Some(disk.account().unwrap().used() + rng.next(8 * CLUSTER)),
                };
                let _arranging = disk.arrange();
                quota::set_limit(&place, Some(&disk), limit).unwrap();
            }
            15 => {
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
            for (guid, bytes, size) in nodes.values() {
                let node = opener.open(&source(dir, Some(*guid)), &options).unwrap();
                assert_eq!(node.size(), *size);
                assert!(
                    content(&node) == *bytes,
                    "seed {seed}, operation {op}: {guid}"
                );
            }
        }
    }
    {
        let _arranging = disk.arrange();
        quota::set_limit(&place, Some(&disk), Some(1 << 50)).unwrap();
    }
    disk.close().unwrap();
    let charged = disk.account().unwrap().used();
    assert_eq!(
        charged,
        quota::of_closed(&place).unwrap().used,
        "seed {seed}"
    );
    drop(disk);
    let names = store.list(dir).unwrap();
    let d = place.descriptor().unwrap();
    let files = names
        .iter()
        .filter(|n| n.to_string_lossy().starts_with("root.hds"));
    assert_eq!(files.count(), d.images.len(), "{names:?}");
    assert_eq!(d.images.len(), nodes.len() + 1);
    (refused, freed)
}

#[test]
fn every_node_reads_what_it_was_whatever_is_deleted_under_the_writers() {
    let (mut refused, mut freed) = (0, 0);
    for seed in 1..=20 {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let version = if seed % 4 == 0 {
            Version::V1
        } else {
            Version::V2
        };
        let (r, f) = run(store, Path::new("/ct"), version, seed, 300);
        (refused, freed) = (refused + r, freed + f);
    }
    assert!(refused > 0 && freed > 0, "{refused} {freed}");
}

#[test]
fn the_same_on_files_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 101..=103 {
        let dir = dir.path().join(seed.to_string());
        run(RealStore::shared(), &dir, Version::V2, seed, 150);
    }
}
