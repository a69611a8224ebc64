//! Growing an open disk, with clients on it.
//!
//! What a user would lose: a write that came while its cluster was moved, a charge that is not what
//! the files hold, a disk that stops because it could not be made larger.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ploop::Kind;
use ploop::account::Account;
use ploop::device::{Device, Extent, ZeroMode};
use ploop::disk::Disk;
use ploop::format::ploop::{Header, Version};
use ploop::store::recording::{Calls, Fault, RecordingStore};
use ploop::store::{Access, Store};
use ploop::verify::scan_image;

use common::{TOP, held, made, make, open, sealed};

const CLUSTER: u64 = 32 * 1024;
/// Clusters that one cluster of the table has entries for, but for the first, which has 16 less.
const PER: u64 = CLUSTER / 4;

fn disk_of(version: Version, clusters: u64, base: bool) -> Arc<dyn Store> {
    let header = Header::new(version, 64, clusters * 64).unwrap();
    let write = |base: &Disk| {
        base.write(0, &vec![0xBB; (clusters * CLUSTER) as usize])
            .unwrap();
    };
    made(&header, base.then_some(&write))
}

fn grow(disk: &Disk, clusters: u64) -> ploop::disk::grow::Growth {
    let _arranging = disk.arrange();
    disk.grow(clusters * CLUSTER).unwrap()
}

fn read(disk: &Disk, at: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xEE; len];
    disk.read(at, &mut buf).unwrap();
    buf
}

/// Goal: clients notice nothing: what they wrote before, while and after a cluster was moved is
/// there; what was charged is what is held; what is new is a hole. Method: writers with a place each
/// (whole clusters, parts over data, zeros, discards, flushes) that read back all the time, while
/// the disk grows through four sizes of its table.
#[test]
fn writers_and_readers_notice_nothing() {
    for (version, base) in [
        (Version::V2, false),
        (Version::V2, true),
        (Version::V1, true),
    ] {
        let clusters = 24;
        let store = disk_of(version, clusters, base);
        let account = Arc::new(Account::default());
        let disk = open(&store, &account);
        disk.top().unwrap().count().unwrap();
        // In the way of the table, and nobody writes to it again.
        for k in 0..4 {
            disk.write(k * CLUSTER + 512, &[k as u8 + 1; 7000]).unwrap();
        }
        let (done, rounds, writers) = (AtomicBool::new(false), AtomicU64::new(0), 4);
        std::thread::scope(|s| {
            for w in 0..writers {
                let (disk, done, rounds) = (&disk, &done, &rounds);
                s.spawn(move || {
                    let mut round = 0u64;
                    while !done.load(Ordering::Relaxed) {
                        let k = 4 + (round % 5) * writers + w;
                        let (at, byte) = (k * CLUSTER, (round % 251) as u8 + 1);
                        let (start, len) = match round % 3 {
                            0 => (at, CLUSTER as usize),
                            1 => (at + 700, 5000),
                            _ => (at + 4096, 8192),
                        };
                        disk.write(start, &vec![byte; len]).unwrap();
                        assert!(read(disk, start, len).iter().all(|&b| b == byte));
                        match round % 7 {
                            0 => disk.flush().unwrap(),
                            1 => {
                                let range = start..start + len as u64;
                                disk.zero(range, ZeroMode::default()).unwrap();
                                assert!(read(disk, start, len).iter().all(|&b| b == 0));
                            }
                            2 => disk.discard(at..at + CLUSTER).unwrap(),
                            3 => disk.complete(u64::MAX, 2).unwrap(),
                            _ => {}
                        }
                        round += 1;
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let mut moved = 0;
            for to in [clusters + 1, PER, 2 * PER, 3 * PER + 7, 4 * PER] {
                let seen = rounds.load(Ordering::Relaxed);
                while rounds.load(Ordering::Relaxed) < seen + 40 {
                    std::thread::yield_now();
                }
                moved += grow(&disk, to).moved;
                assert_eq!(disk.size(), to * CLUSTER);
            }
            done.store(true, Ordering::Relaxed);
            assert!(moved >= 4, "{moved}");
        });
        for k in 0..4 {
            let (got, byte) = (read(&disk, k * CLUSTER, CLUSTER as usize), k as u8 + 1);
            assert!(got[512..7512].iter().all(|&b| b == byte), "cluster {k}");
            let rest = if base { 0xBB } else { 0 };
            assert!(got[7512..].iter().all(|&b| b == rest), "cluster {k}");
        }
        let mut extents: Vec<Extent> = Vec::new();
        let new = clusters * CLUSTER..4 * PER * CLUSTER;
        disk.allocation(new.clone(), 2, &mut extents).unwrap();
        assert!(extents.len() == 1 && extents[0].hole && extents[0].len == new.end - new.start);
        disk.write(new.end - 512, &[9; 512]).unwrap();
        disk.flush().unwrap();
        disk.close().unwrap();
        assert_eq!(account.used(), held(&store));
        let file = store.open(Path::new(TOP), Access::Read).unwrap();
        let findings = scan_image(file.as_ref()).unwrap().findings;
        assert!(findings.is_empty(), "{findings:?}");
    }
}

/// Goal: exact charges, with and without writes between. Method: a quiet disk, grown step by step.
#[test]
fn the_charge_is_what_the_files_hold_after_every_step() {
    let store = disk_of(Version::V2, 40, false);
    let account = Arc::new(Account::default());
    let disk = open(&store, &account);
    for (i, to) in [PER - 16, PER - 15, 3 * PER, 6 * PER, 20 * PER]
        .into_iter()
        .enumerate()
    {
        disk.write((i as u64 * 7) * CLUSTER, &vec![1; 3 * CLUSTER as usize])
            .unwrap();
        disk.discard(CLUSTER..CLUSTER + 8192).unwrap();
        let growth = grow(&disk, to);
        assert_eq!((growth.to, disk.size()), (to * CLUSTER, to * CLUSTER));
        disk.top().unwrap().count().unwrap();
        assert_eq!(account.used(), held(&store), "{to} clusters");
    }
    // A limit that is used up refuses none of it.
    account.set_limit(Some(0));
    grow(&disk, 40 * PER);
    assert_eq!(account.used(), held(&store));
    let refused = disk.write(30 * PER * CLUSTER, &[1; 512]).unwrap_err();
    assert_eq!(refused.kind(), Kind::NoSpace);
    disk.close().unwrap();
}

/// Goal: what cannot be done is refused with its reason, and changes nothing. Method: each, and the
/// file's bytes before and after.
#[test]
fn what_cannot_be_grown_is_refused() {
    let store = disk_of(Version::V1, 10, false);
    let disk = open(&store, &Arc::default());
    let bytes = || {
        let file = store.open(Path::new(TOP), Access::Read).unwrap();
        let mut all = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut all, 0).unwrap();
        all
    };
    let before = bytes();
    assert_eq!(grow(&disk, 10).moved, 0);
    for (size, says) in [
        (9 * CLUSTER, "no less"),
        (1 << 41, "v1"),
        (u64::MAX, "sectors"),
    ] {
        let _arranging = disk.arrange();
        let refused = disk.grow(size).unwrap_err();
        assert_eq!(refused.kind(), Kind::Invalid, "{size}: {refused}");
        assert!(refused.to_string().contains(says), "{size}: {refused}");
    }
    assert!(before == bytes());
    // A size between two clusters is rounded up.
    let arranging = disk.arrange();
    assert_eq!(disk.grow(10 * CLUSTER + 1).unwrap().to, 11 * CLUSTER);
    drop(arranging);
    // A disk that ends within its last cluster.
    let store = disk_of(Version::V2, 10, false);
    let file = store.open(Path::new(TOP), Access::Write).unwrap();
    file.write_at(&(10 * 64 - 10u64).to_le_bytes(), 36).unwrap();
    let disk = open(&store, &Arc::default());
    let refused = disk.grow(disk.size() - 512).unwrap_err();
    assert_eq!(refused.kind(), Kind::Invalid);
    let base = sealed(&disk_of(Version::V2, 10, true));
    let refused = Disk::sealed(base).grow(1 << 30).unwrap_err();
    assert_eq!(refused.kind(), Kind::ReadOnly);
}

/// Goal: growing that the host refuses leaves no place that is lost, and no charge for what is not
/// there. Method: each change of it fails once; then the disk is closed.
#[test]
fn what_failed_half_way_is_neither_lost_nor_charged() {
    for written in [0, 3] {
        for n in 0.. {
            let recording = RecordingStore::new();
            let store = recording.store();
            make(
                store.as_ref(),
                &Header::new(Version::V2, 64, 40 * 64).unwrap(),
                None,
            );
            let account = Arc::new(Account::default());
            let disk = open(&store, &account);
            disk.top().unwrap().before_change().unwrap();
            let data = vec![1; (written * CLUSTER) as usize];
            if written > 0 {
                disk.write(0, &data).unwrap();
            }
            recording.count(Calls::Changes);
            recording.fail_at(n, Fault::Enospc);
            let arranging = disk.arrange();
            let grown = disk.grow(3 * PER * CLUSTER);
            drop(arranging);
            if recording.calls() <= n {
                assert!(n > 3, "{n}");
                break;
            }
            if let Err(e) = disk.close() {
                assert_eq!(e.kind(), Kind::Latched, "call {n}: {e}, after {grown:?}");
                continue;
            }
            assert_eq!(account.used(), held(&store), "call {n}: {grown:?}");
            assert!(read(&disk, 0, data.len()) == data);
            let file = store.open(Path::new(TOP), Access::Read).unwrap();
            let scan = scan_image(file.as_ref()).unwrap();
            let spare = scan.findings.len() as u64;
            // What was moved before it failed leaves a hole.
            assert!(spare <= written.min(1), "call {n}: {:?}", scan.findings);
        }
    }
}

/// Goal: what is new reads as zeros, whatever another program left there. Method: junk in the last
/// cluster, behind the disk's end.
#[test]
fn junk_behind_the_end_does_not_become_data() {
    let store = disk_of(Version::V2, 10, false);
    let disk = open(&store, &Arc::default());
    disk.write(9 * CLUSTER, &vec![7; CLUSTER as usize]).unwrap();
    disk.close().unwrap();
    drop(disk);
    let size = 10 * CLUSTER - 5 * 512;
    let file = store.open(Path::new(TOP), Access::Write).unwrap();
    file.write_at(&(size / 512).to_le_bytes(), 36).unwrap();
    let disk = open(&store, &Arc::default());
    assert_eq!(grow(&disk, 30).from, size);
    let got = read(&disk, 9 * CLUSTER, 21 * CLUSTER as usize);
    let old = (size - 9 * CLUSTER) as usize;
    assert!(got[..old].iter().all(|&b| b == 7) && got[old..].iter().all(|&b| b == 0));
    disk.close().unwrap();
    assert!(scan_image(file.as_ref()).unwrap().findings.is_empty());
}
