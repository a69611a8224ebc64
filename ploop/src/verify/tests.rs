//! The extension of one image, sound and damaged.

use std::path::Path;
use std::sync::Arc;

use md5::{Digest, Md5};

use super::*;
use crate::format::ploop::header::{IN_USE_CLOSED, IN_USE_EXTENSION, Version};
use crate::format::ploop::{Header, PloopDelta};
use crate::store::memory::MemoryStore;
use crate::store::{Store, StoreFile};

const CLUSTER: usize = 32 * 1024;
const SECTORS: u64 = 4096;
/// Clusters of the file: the guest's, the bitmap's, the extension's.
const DATA: usize = CLUSTER;
const BITMAP: usize = 2 * CLUSTER;
const EXTENSION: usize = 3 * CLUSTER;
/// The bitmap section's data.
const HEAD: usize = EXTENSION + 48;

fn image() -> Vec<u8> {
    let mut bytes = vec![0; 4 * CLUSTER];
    let header = Header::new(Version::V2, 64, SECTORS).unwrap();
    bytes[..64].copy_from_slice(header.bytes());
    put(&mut bytes, 44, &IN_USE_EXTENSION.to_le_bytes());
    put(&mut bytes, 56, &(EXTENSION as u64 / 512).to_le_bytes());
    put(&mut bytes, 64, &1u32.to_le_bytes());
    bytes[DATA..BITMAP].fill(7);
    let e = EXTENSION;
    put(&mut bytes, e, &0xAB23_4CEF_23DC_EA87u64.to_le_bytes());
    put(&mut bytes, e + 24, &0x2038_5FAE_252C_B34Au64.to_le_bytes());
    put(&mut bytes, e + 40, &40u32.to_le_bytes());
    put(&mut bytes, HEAD, &SECTORS.to_le_bytes());
    put(&mut bytes, HEAD + 24, &8u32.to_le_bytes());
    put(&mut bytes, HEAD + 28, &1u32.to_le_bytes());
    put(&mut bytes, HEAD + 32, &(BITMAP as u64 / 512).to_le_bytes());
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn sum(bytes: &mut [u8]) {
    let md5 = Md5::digest(&bytes[EXTENSION + 24..EXTENSION + CLUSTER]);
    put(bytes, EXTENSION + 8, &md5);
}

fn file(bytes: &[u8]) -> Arc<dyn StoreFile> {
    let store = MemoryStore::new();
    let file = store.create(Path::new("/a"), 0o600).unwrap();
    file.write_at(bytes, 0).unwrap();
    file
}

/// The kinds in the whole image, and in what an open looks at.
fn kinds(bytes: &[u8]) -> (Vec<&'static str>, Vec<&'static str>) {
    let file = file(bytes);
    // Whatever is wrong with it, the disk can be read.
    PloopDelta::open(file.clone()).unwrap();
    let names = |scan: ImageScan| scan.findings.iter().map(|f| f.kind.name()).collect();
    (
        names(check_image(file.as_ref()).unwrap()),
        names(scan_image(file.as_ref()).unwrap()),
    )
}

#[test]
fn a_sound_extension_is_no_finding_and_no_leak() {
    let mut bytes = image();
    sum(&mut bytes);
    assert_eq!(kinds(&bytes), (vec![], vec![]));
    // Its clusters count as used, and only its own.
    bytes.resize(5 * CLUSTER, 0);
    assert_eq!(kinds(&bytes), (vec!["leaked-tail"], vec![]));
}

#[test]
fn damage_inside_is_found_by_a_check_and_minded_by_no_open() {
    let u32s = |v: u32| v.to_le_bytes().to_vec();
    let u64s = |v: u64| v.to_le_bytes().to_vec();
    let huge = u64::MAX / 512 - 3;
    let cases: Vec<(usize, Vec<u8>, Vec<&str>)> = vec![
        (
            EXTENSION + 40,
            u32s(u32::MAX),
            vec!["extension-section-length"],
        ),
        (EXTENSION + 40, u32s(31), vec!["extension-section-length"]),
        (HEAD, u64s(SECTORS + 1), vec!["extension-size-mismatch"]),
        (HEAD + 24, u32s(0), vec!["extension-granularity"]),
        (HEAD + 24, u32s(12), vec!["extension-granularity"]),
        (HEAD + 28, u32s(2), vec!["extension-bitmap-count"]),
        (HEAD + 28, u32s(u32::MAX), vec!["extension-bitmap-count"]),
        // The bitmap's cluster is nobody's then.
        (
            HEAD + 28,
            u32s(0),
            vec!["extension-bitmap-empty", "unreferenced-clusters"],
        ),
        (HEAD + 32, u64s(0), vec!["unreferenced-clusters"]),
        (HEAD + 32, u64s(1), vec!["unreferenced-clusters"]),
        (
            HEAD + 32,
            u64s(4 * 64),
            vec!["extension-bitmap-out-of-bounds"],
        ),
        (HEAD + 32, u64s(2), vec!["extension-bitmap-out-of-bounds"]),
        (
            HEAD + 32,
            u64s(2 * 64 + 1),
            vec!["extension-bitmap-out-of-bounds"],
        ),
        (
            HEAD + 32,
            u64s(huge),
            vec!["extension-bitmap-out-of-bounds"],
        ),
        (HEAD + 32, u64s(64), vec!["extension-overlaps-data"]),
        (HEAD + 32, u64s(3 * 64), vec!["extension-overlaps-data"]),
        (HEAD + 40, u64s(5), vec!["droppable-feature"]),
    ];
    for (at, value, wanted) in cases {
        let mut bytes = image();
        put(&mut bytes, at, &value);
        sum(&mut bytes);
        assert_eq!(kinds(&bytes), (wanted, vec![]), "{value:?} at {at}");
    }
    let mut bytes = image();
    assert_eq!(kinds(&bytes), (vec!["extension-checksum"], vec![]));
    put(&mut bytes, 44, &IN_USE_CLOSED.to_le_bytes());
    let tail = vec!["extension-stale", "leaked-tail"];
    assert_eq!(kinds(&bytes), (tail, vec!["leaked-tail"]));
}

#[test]
fn an_extension_off_the_grid_owns_all_that_it_touches() {
    let mut bytes = image();
    sum(&mut bytes);
    // Half a cluster further back: half of it is the bitmap's.
    let moved = EXTENSION - CLUSTER / 2;
    bytes.copy_within(EXTENSION..EXTENSION + CLUSTER, moved);
    put(&mut bytes, 56, &(moved as u64 / 512).to_le_bytes());
    assert_eq!(kinds(&bytes).0, ["extension-overlaps-data"]);
    // The end of the file cuts it.
    bytes.truncate(EXTENSION + 512);
    let (all, open) = kinds(&bytes);
    assert!(all.contains(&"extension-dangling"), "{all:?}");
    assert!(!open.contains(&"extension-dangling"), "{open:?}");
}

#[test]
fn entries_in_disorder_are_judged_like_those_in_order() {
    // Enough of them that bits are kept and not runs.
    let (entries, cluster) = (40_000u32, CLUSTER as u64);
    let header = Header::new(Version::V2, 64, u64::from(entries) * 64).unwrap();
    let first = (header.data_start / cluster) as u32;
    let mut bytes = header.bytes().to_vec();
    for slot in 0..entries {
        let entry = first + slot.wrapping_mul(7_919) % entries;
        bytes.extend(entry.to_le_bytes());
    }
    let file = file(&bytes);
    file.set_len(header.data_start + u64::from(entries) * cluster)
        .unwrap();
    let scan = check_image(file.as_ref()).unwrap();
    assert_eq!(
        (scan.findings, scan.used.count()),
        (vec![], u64::from(entries))
    );
    // Slot 30,000 gets what slot 5 has.
    let stolen = first + 5 * 7_919 % entries;
    file.write_at(&stolen.to_le_bytes(), Header::slot_offset(30_000))
        .unwrap();
    let scan = check_image(file.as_ref()).unwrap();
    let f = &scan.findings[0];
    assert_eq!(f.kind, FindingKind::DuplicateEntry);
    assert_eq!(
        (f.cluster, f.offset),
        (Some(u64::from(stolen)), 64 + 120_000)
    );
    assert_eq!(f.guest, Some(30_000 * cluster..30_001 * cluster));
    assert!(f.what.starts_with("BAT entries 5 and 30000 "), "{}", f.what);
}
