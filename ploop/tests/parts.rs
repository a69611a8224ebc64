//! First writes to clusters that lie below: what they cost, and that nobody can see the seams.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ploop::chain::Chain;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::ploop::parts::PARTS_MAX;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as fmt, Header, PloopDelta, Version};
use ploop::store::recording::RecordingStore;
use ploop::store::{Access, Store};
use ploop::verify::{Class, class_of, scan_image};

const CLUSTER: u64 = 64 * 1024;

/// A disk of `clusters` over a base that holds 0xBB in the first `filled` bytes of each.
fn over_a_base(store: &Arc<dyn Store>, clusters: u64, filled: u64) -> Disk {
    let header = Header::new(Version::V2, 128, clusters * 128).unwrap();
    for name in ["/base", "/top"] {
        fmt::create(store.as_ref(), Path::new(name), &header, 0o600).unwrap();
    }
    let base = open(store, "/base", None);
    for cluster in 0..clusters {
        let bytes = vec![0xBB; filled as usize];
        base.write(cluster * CLUSTER, &bytes).unwrap();
    }
    base.close().unwrap();
    let file = store.open(Path::new("/base"), Access::Read).unwrap();
    let delta = Arc::new(PloopDelta::open(file).unwrap());
    open(
        store,
        "/top",
        Some(Arc::new(Chain::new(vec![delta]).unwrap())),
    )
}

fn open(store: &Arc<dyn Store>, path: &str, below: Option<Arc<Chain>>) -> Disk {
    let file = store.open(Path::new(path), Access::Write).unwrap();
    Disk::writable(below, Top::open(file).unwrap(), None).unwrap()
}

/// Bytes written to the data area of the top.
fn data_written(record: &RecordingStore) -> u64 {
    let of = |line: &String| {
        let range = line.strip_prefix("write /top ")?.split_once('+')?;
        let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        (hex(range.0) >= CLUSTER).then(|| hex(range.1))
    };
    record.log().iter().filter_map(of).sum()
}

/// Goal: a first write is not slower for the cluster around it. Method: the bytes that reach the
/// store, before and after the flush that needs the whole cluster.
#[test]
fn a_first_write_copies_nothing_of_the_rest() {
    let record = RecordingStore::new();
    let disk = over_a_base(&record.store(), 8, CLUSTER);
    disk.write(CLUSTER + 4096, &[1; 4096]).unwrap();
    disk.write(3 * CLUSTER + 512, &[2; 512]).unwrap();
    assert_eq!(data_written(&record), 4096 + 4096, "a granule each");
    assert_eq!(disk.parts().0, 2);
    let mut got = vec![0; 2 * CLUSTER as usize];
    disk.read(CLUSTER, &mut got).unwrap();
    assert!(got[4096..8192].iter().all(|b| *b == 1));
    assert!(got[..4096].iter().chain(&got[8192..]).all(|b| *b == 0xBB));
    disk.flush().unwrap();
    assert_eq!(
        data_written(&record),
        2 * CLUSTER,
        "complete, each byte once"
    );
    assert_eq!(disk.parts().0, 0);
    disk.close().unwrap();
}

/// Goal: a stream of small writes over a template copies nothing at all.
#[test]
fn a_cluster_that_is_written_throughout_is_complete_without_a_copy() {
    let record = RecordingStore::new();
    let disk = over_a_base(&record.store(), 4, CLUSTER);
    for at in (0..2 * CLUSTER).step_by(8192) {
        disk.write(at, &[3; 8192]).unwrap();
    }
    assert_eq!(disk.parts().0, 0);
    disk.close().unwrap();
    assert_eq!(data_written(&record), 2 * CLUSTER);
}

/// Goal: what a flush has to copy, and memory, are bounded.
#[test]
fn parts_are_bounded() {
    let record = RecordingStore::new();
    let clusters = PARTS_MAX as u64 + 10;
    let disk = over_a_base(&record.store(), clusters, 4096);
    for cluster in 0..clusters {
        disk.write(cluster * CLUSTER + 8192, &[1; 512]).unwrap();
    }
    assert_eq!(disk.parts().0, PARTS_MAX);
    disk.close().unwrap();
    let file = record
        .store()
        .open(Path::new("/top"), Access::Read)
        .unwrap();
    let scan = scan_image(file.as_ref()).unwrap();
    assert_eq!(
        class_of(&scan.findings),
        Class::Clean,
        "{:?}",
        scan.findings
    );
    assert_eq!(scan.used.count(), clusters);
}

/// Goal: neither readers nor writers of a cluster notice that it is being completed, erased and
/// flushed. Method: each of 4 threads owns every 4th sector, a fifth completes, a sixth reads.
#[test]
fn clusters_are_completed_under_their_readers_and_writers() {
    let record = RecordingStore::new();
    let disk = over_a_base(&record.store(), 24, CLUSTER);
    let done = AtomicBool::new(false);
    let sectors = 24 * CLUSTER / 512;
    std::thread::scope(|scope| {
        let (disk, done) = (&disk, &done);
        scope.spawn(move || {
            while !done.load(Ordering::Acquire) {
                disk.complete(u64::MAX, 1).unwrap();
                std::thread::yield_now();
            }
        });
        scope.spawn(move || {
            let mut got = vec![0; 2 * CLUSTER as usize];
            for k in (0..23).cycle() {
                if done.load(Ordering::Acquire) {
                    break;
                }
                disk.read(k * CLUSTER, &mut got).unwrap();
                let legal = |(s, b): (usize, &[u8])| {
                    let mine = (s % 4) as u8 + 1;
                    b == [0xBB; 512] || b == [mine; 512]
                };
                assert!(got.chunks(512).enumerate().all(legal));
            }
        });
        let writers: Vec<_> = (0..4u64)
            .map(|t| {
                scope.spawn(move || {
                    for k in 0..sectors / 4 {
                        // Each in an order of its own.
                        let s = (k * (t * 2 + 5) * 37 % (sectors / 4)) * 4 + t;
                        disk.write(s * 512, &[t as u8 + 1; 512]).unwrap();
                        if k % 200 == t {
                            disk.flush().unwrap();
                        }
                        let mut got = [0; 512];
                        disk.read(s * 512, &mut got).unwrap();
                        assert_eq!(got, [t as u8 + 1; 512]);
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Release);
    });
    disk.close().unwrap();
}
