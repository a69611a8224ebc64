//! Random operations on a disk against a trivially right oracle: the bytes in a vector.
//!
//! A failing run prints its seed; `PLOOP_SEED=n PLOOP_OPS=m cargo test -p ploop --test model`
//! repeats it.

#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::device::{Device, ZeroMode};
use ploop::disk::Disk;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as fmt, Header, PloopDelta, Version};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};
use ploop::verify::{Class, class_of, scan_image};

/// SplitMix64: enough randomness for choosing operations, and the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

const CLUSTER: u64 = 32 * 1024;

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// A file that holds `size` bytes of which about half are not zero, as a closed ploop image.
fn base(store: &MemoryStore, rng: &mut Rng, version: Version, clusters: u64, oracle: &mut [u8]) {
    let header = Header::new(version, 64, clusters * 64).unwrap();
    fmt::create(store, Path::new("/base"), &header, 0o600).unwrap();
    let disk = open(store, Path::new("/base"), None);
    for _ in 0..clusters {
        let at = rng.below(oracle.len() as u64) / 512 * 512;
        let len = (rng.below(2 * CLUSTER) / 512 * 512).min(oracle.len() as u64 - at);
        let fill = rng.next() as u8;
        oracle[at as usize..(at + len) as usize].fill(fill);
        disk.write(at, &vec![fill; len as usize]).unwrap();
    }
    disk.close().unwrap();
}

fn open(store: &MemoryStore, path: &Path, below: Option<Arc<Chain>>) -> Disk {
    let file = store.open(path, Access::Write).unwrap();
    Disk::writable(below, Top::open(file).unwrap(), None).unwrap()
}

fn sealed(store: &MemoryStore, path: &Path) -> Arc<Chain> {
    let file = store.open(path, Access::Read).unwrap();
    Arc::new(Chain::new(vec![Arc::new(PloopDelta::open(file).unwrap())]).unwrap())
}

/// One random operation on both.
fn step(rng: &mut Rng, disk: &Disk, oracle: &mut [u8]) {
    let size = oracle.len() as u64;
    let at = rng.below(size);
    let len = match rng.below(4) {
        0 => rng.below(512) + 1,
        1 => (rng.below(16) + 1) * 512,
        2 => rng.below(CLUSTER) + 1,
        _ => rng.below(5 * CLUSTER) + 1,
    };
    // Half of the operations fall on the grid: whole clusters take other paths.
    let (at, len) = match rng.below(2) {
        0 => (at, len),
        _ => (at / CLUSTER * CLUSTER, len.next_multiple_of(CLUSTER)),
    };
    let len = len.min(size - at);
    let range = at as usize..(at + len) as usize;
    match rng.below(10) {
        0..=3 => {
            let bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
            disk.write(at, &bytes).unwrap();
            oracle[range].copy_from_slice(&bytes);
        }
        4..=6 => {
            let mut got = vec![1; len as usize];
            disk.read(at, &mut got).unwrap();
            assert!(got == oracle[range], "read of {len} bytes at {at} differs");
        }
        7 => {
            let mode = ZeroMode {
                keep_space: rng.below(2) == 0,
                only_if_fast: rng.below(2) == 0,
            };
            match disk.zero(at..at + len, mode) {
                Ok(()) => oracle[range].fill(0),
                Err(e) => assert!(
                    mode.only_if_fast && e.kind() == ploop::Kind::Unsupported,
                    "{e}"
                ),
            }
        }
        8 => {
            disk.discard(at..at + len).unwrap();
            let mut got = vec![1; len as usize];
            disk.read(at, &mut got).unwrap();
            for (i, (g, o)) in got.iter().zip(&mut oracle[range]).enumerate() {
                assert!(
                    g == o || *g == 0,
                    "discard changed byte {} to {g}",
                    at + i as u64
                );
                *o = *g;
            }
        }
        _ => match rng.below(4) {
            0 => disk.flush().unwrap(),
            1 => disk.complete(u64::MAX, 3).unwrap(),
            2 => disk.complete(rng.below(disk.parts().1 + 1), 9).unwrap(),
            _ => give_up(rng, disk, at..at + len, oracle),
        },
    }
}

/// A write whose client vanishes after some of its bytes: each byte is the old one, or one of it.
fn give_up(rng: &mut Rng, disk: &Disk, range: Range<u64>, oracle: &mut [u8]) {
    let mut segments = Vec::new();
    let lease = disk.prepare(range.clone(), &mut segments).unwrap();
    for s in &segments {
        let some = vec![0xEE; (rng.below(s.len) + 1) as usize];
        lease.file().write_at(&some, s.file_offset).unwrap();
    }
    drop(lease);
    let oracle = &mut oracle[range.start as usize..range.end as usize];
    let mut got = vec![1; oracle.len()];
    disk.read(range.start, &mut got).unwrap();
    for (got, old) in got.iter().zip(oracle) {
        assert!(got == old || *got == 0xEE, "neither old nor new: {got:#x}");
        *old = *got;
    }
}

fn check_all(disk: &Disk, oracle: &[u8]) {
    let mut got = vec![1; oracle.len()];
    disk.read(0, &mut got).unwrap();
    let differs = got.iter().zip(oracle).position(|(a, b)| a != b);
    assert_eq!(differs, None, "first differing byte");
}

fn run(seed: u64, ops: u64, version: Version, with_base: bool) {
    println!("seed {seed}, {version:?}, base {with_base}");
    let mut rng = Rng(seed);
    let store = MemoryStore::new();
    let clusters = 40;
    let mut oracle = vec![0; (clusters * CLUSTER) as usize];
    let mut base_bytes = oracle.clone();
    if with_base {
        // A base that is smaller than the overlay: its end reads as zeros.
        let smaller = clusters - rng.below(6);
        let part = (smaller * CLUSTER) as usize;
        base(&store, &mut rng, version, smaller, &mut base_bytes[..part]);
        oracle.copy_from_slice(&base_bytes);
    }
    let header = Header::new(version, 64, clusters * 64).unwrap();
    fmt::create(&store, Path::new("/top"), &header, 0o600).unwrap();
    let below = || with_base.then(|| sealed(&store, Path::new("/base")));
    let mut disk = open(&store, Path::new("/top"), below());
    for i in 0..ops {
        step(&mut rng, &disk, &mut oracle);
        if rng.below(ops / 8 + 1) == 0 {
            disk.close().unwrap();
            let file = store.open(Path::new("/top"), Access::Read).unwrap();
            let scan = scan_image(file.as_ref()).unwrap();
            let worst = class_of(&scan.findings);
            assert!(
                worst == Class::Clean,
                "after close at op {i}: {:?}",
                scan.findings
            );
            assert!(scan.used.count() <= clusters);
            disk = open(&store, Path::new("/top"), below());
            check_all(&disk, &oracle);
        }
    }
    check_all(&disk, &oracle);
    disk.close().unwrap();
    if with_base {
        let lower = Disk::sealed(sealed(&store, Path::new("/base")));
        let size = lower.size() as usize;
        check_all(&lower, &base_bytes[..size]);
    }
}

#[test]
fn a_disk_is_its_bytes_after_any_operations() {
    let ops = env("PLOOP_OPS", 4000);
    let first = env("PLOOP_SEED", 1);
    for seed in first..first + env("PLOOP_SEEDS", 4) {
        for version in [Version::V1, Version::V2] {
            run(seed, ops, version, false);
            run(seed, ops, version, true);
        }
    }
}

#[test]
fn writers_of_one_cluster_and_of_many_lose_nothing() {
    let store = MemoryStore::new();
    let mut rng = Rng(7);
    let mut bytes = vec![0; (16 * CLUSTER) as usize];
    base(&store, &mut rng, Version::V2, 16, &mut bytes);
    let header = Header::new(Version::V2, 64, 16 * 64).unwrap();
    fmt::create(&store, Path::new("/top"), &header, 0o600).unwrap();
    let below = sealed(&store, Path::new("/base"));
    let disk = open(&store, Path::new("/top"), Some(below));
    // Eight threads share every cluster: thread t owns each sector s with s % 8 == t.
    std::thread::scope(|scope| {
        for t in 0..8u64 {
            let disk = &disk;
            scope.spawn(move || {
                for s in (t..16 * CLUSTER / 512).step_by(8) {
                    disk.write(s * 512, &[t as u8 + 1; 512]).unwrap();
                    let mut got = [0; 512];
                    disk.read(s * 512, &mut got).unwrap();
                    assert_eq!(got, [t as u8 + 1; 512]);
                    if s % 64 == t {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    for (s, sector) in bytes.chunks_mut(512).enumerate() {
        sector.fill((s % 8) as u8 + 1);
    }
    check_all(&disk, &bytes);
    disk.close().unwrap();
}
