//! Compacting an open disk, with clients on it.
//!
//! What a user would lose: bytes that were taken for zeros or for the parent's while they were being
//! written, space that is said to come back and does not, a charge that is not what the files hold.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ploop::account::Account;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::compact::{Compacted, Spare};
use ploop::format::ploop::header::IN_USE_DIRTY;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as fmt, Header, Version};
use ploop::store::{Access, Store};
use ploop::verify::scan_image;

use common::{TOP, held, made, open};

const CLUSTER: u64 = 32 * 1024;
const CLUSTERS: u64 = 64;

/// A disk; with a base, that one has bytes of its own in clusters 0 to 31.
fn new(base: bool) -> Arc<dyn Store> {
    let header = Header::new(Version::V2, 64, CLUSTERS * 64).unwrap();
    let write = |base: &Disk| {
        for k in 0..32 {
            base.write(k * CLUSTER, &vec![k as u8 + 1; CLUSTER as usize])
                .unwrap();
        }
    };
    made(&header, base.then_some(&write))
}

fn compact(disk: &Disk) -> Compacted {
    let _arranging = disk.arrange();
    disk.compact().unwrap()
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut buf = vec![0xEE; disk.size() as usize];
    disk.read(0, &mut buf).unwrap();
    buf
}

/// Goal: what was foretold is what comes back, to the granule, and the disk reads as before, here
/// and when it is opened again. Method: each kind of what is not needed, with and without a base.
#[test]
fn what_is_foretold_is_freed_and_nothing_else_changes() {
    for base in [false, true] {
        let store = new(base);
        let account = Arc::new(Account::default());
        let disk = open(&store, &account);
        let fill = |k: u64, byte: u8| {
            disk.write(k * CLUSTER, &vec![byte; CLUSTER as usize])
                .unwrap();
        };
        // Needed: its own bytes, some of them zeros.
        for k in [2, 5, 33, 40, 63] {
            fill(k, 0xA0 + k as u8 % 16);
            disk.write(k * CLUSTER + 8192, &[0; 8192]).unwrap();
        }
        // Zeros that were written out; what the base has anyway; discarded.
        for k in [0, 6, 35, 36] {
            fill(k, 0);
        }
        for k in 10..20 {
            fill(k, k as u8 + 1);
        }
        for k in [21, 41, 42] {
            fill(k, 9);
            disk.discard(k * CLUSTER..(k + 1) * CLUSTER).unwrap();
        }
        disk.flush().unwrap();
        let before = content(&disk);
        let (charged, there) = (account.used(), held(&store));
        let foretold: Spare = disk.spare().unwrap();
        let done = compact(&disk);
        assert_eq!(done.freed, foretold, "base: {base}");
        let same = if base { 2 + 10 } else { 4 };
        assert_eq!(foretold.same, same * CLUSTER, "base: {base}");
        let zeros = if base { 2 } else { 0 };
        assert_eq!(foretold.zeros, zeros * CLUSTER, "base: {base}");
        assert!(content(&disk) == before, "base: {base}");
        assert_eq!(charged - account.used(), foretold.total());
        assert_eq!(there - held(&store), foretold.total());
        assert!(done.moved > 0, "{done:?}");
        let file = store.open(Path::new(TOP), Access::Read).unwrap();
        assert_eq!((done.to, file.len().unwrap()), (done.to, done.to));
        // A second time there is nothing to do.
        assert_eq!(disk.spare().unwrap(), Spare::default());
        let again = compact(&disk);
        assert_eq!((again.freed, again.moved), (Spare::default(), 0));
        disk.close().unwrap();
        assert_eq!(account.used(), held(&store));
        let scan = scan_image(file.as_ref()).unwrap();
        assert!(scan.findings.is_empty(), "{:?}", scan.findings);
        // As short as can be: what is left has its place, and no place is left over.
        let left = if base { 5 + 2 + 10 + 1 - 10 } else { 5 + 10 };
        assert_eq!(scan.used.count(), left, "base: {base}");
        assert_eq!(file.len().unwrap(), scan.header.data_start + left * CLUSTER);
        assert!(content(&open(&store, &Arc::default())) == before);
    }
}

/// Goal: clients notice nothing. Method: writers with a place each, who write what looks
/// unnecessary (zeros, the base's bytes) and what is not, and read back all the time.
#[test]
fn writers_and_readers_notice_nothing() {
    for base in [false, true] {
        let store = new(base);
        let account = Arc::new(Account::default());
        let disk = open(&store, &account);
        let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut tally = Compacted::default();
        std::thread::scope(|s| {
            for w in 0..4u64 {
                let (disk, done, rounds) = (&disk, &done, &rounds);
                s.spawn(move || {
                    let mut round = 0u64;
                    while !done.load(Ordering::Relaxed) {
                        let k = (round * 7) % 16 * 4 + w;
                        let byte = match round % 4 {
                            0 => 0,
                            1 if k < 32 => k as u8 + 1,
                            _ => (round % 250) as u8 + 1,
                        };
                        let (start, len) = match round % 3 {
                            0 => (k * CLUSTER + 700, 5000),
                            _ => (k * CLUSTER, CLUSTER as usize),
                        };
                        disk.write(start, &vec![byte; len]).unwrap();
                        let mut got = vec![0xEE; len];
                        disk.read(start, &mut got).unwrap();
                        assert!(got.iter().all(|&b| b == byte), "cluster {k}");
                        match round % 9 {
                            0 => disk.flush().unwrap(),
                            1 => disk.discard(start..start + len as u64).unwrap(),
                            _ => {}
                        }
                        round += 1;
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..60 {
                let seen = rounds.load(Ordering::Relaxed);
                while rounds.load(Ordering::Relaxed) < seen + 40 {
                    std::thread::yield_now();
                }
                let did = compact(&disk);
                tally.moved += did.moved;
                tally.freed.same += did.freed.same;
                tally.freed.zeros += did.freed.zeros;
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(tally.moved > 0 && tally.freed.same > 0, "{tally:?}");
        let before = content(&disk);
        disk.close().unwrap();
        drop(disk);
        // Never charged less than it holds; to the granule once it is opened again.
        assert!(account.used() >= held(&store));
        let account = Arc::new(Account::default());
        let disk = open(&store, &account);
        disk.top().unwrap().before_change().unwrap();
        assert_eq!(account.used(), held(&store));
        assert!(content(&disk) == before);
        disk.close().unwrap();
        let file = store.open(Path::new(TOP), Access::Read).unwrap();
        let worst = scan_image(file.as_ref()).unwrap().findings;
        let holes = ploop::verify::FindingKind::UnreferencedClusters;
        assert!(worst.iter().all(|f| f.kind == holes), "{worst:?}");
    }
}

/// Goal: stopped at any step, it loses nothing and goes on next time. Method: stopped after every
/// number of steps.
#[test]
fn stopped_at_any_step_it_goes_on_next_time() {
    for steps in 0..6 {
        let store = new(true);
        let disk = open(&store, &Arc::default());
        for k in 0..40 {
            disk.write(k * CLUSTER, &vec![k as u8 + 1; CLUSTER as usize])
                .unwrap();
        }
        let before = content(&disk);
        let mut compaction = disk.compaction().unwrap();
        let went_on = (0..steps).all(|_| {
            let _arranging = disk.arrange();
            disk.compact_step(&mut compaction).unwrap()
        });
        let done = *compaction.done();
        assert!(content(&disk) == before);
        let rest = compact(&disk);
        assert_eq!(done.freed.total() + rest.freed.total(), 32 * CLUSTER);
        assert!(went_on || steps > 1, "{steps}: {done:?}");
        assert!(content(&disk) == before);
        disk.close().unwrap();
        assert!(content(&open(&store, &Arc::default())) == before);
    }
}

/// Goal: nothing is said to be shorter that is not. Method: a snapshot between two steps, whose new
/// top is a far smaller file.
#[test]
fn a_file_that_became_a_snapshots_is_not_told_to_be_shorter() {
    let store = new(false);
    let disk = open(&store, &Arc::default());
    for k in 0..40 {
        disk.write(k * CLUSTER, &vec![7; CLUSTER as usize]).unwrap();
    }
    let mut compaction = disk.compaction().unwrap();
    let header = Header::new(Version::V2, 64, CLUSTERS * 64).unwrap();
    let marked = header.marked(IN_USE_DIRTY);
    let file = fmt::create(store.as_ref(), Path::new("/disk/next"), &marked, 0o600).unwrap();
    let next = Arc::new(Top::fresh(file, &marked, None));
    let sealing = disk.barrier().push_top(next).unwrap();
    sealing.seal().unwrap();
    sealing.committed();
    while disk.compact_step(&mut compaction).unwrap() {}
    let done = compaction.done();
    assert_eq!((done.from, done.freed.total()), (done.to, 0));
}
