//! A stream that is damaged, cut, put together otherwise or made up is refused, and leaves nothing.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use ploop::Kind;
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use ploop_fuzz::rng::Rng;
use ploop_fuzz::targets::stream as stream_target;
use ploop_tests::stream::{container, everything, frames, host, received, sent, snapshot, write};
use serde_json::{Value, json};
use snapshots::Root;
use snapshots::stream::SendOptions;
use snapshots::stream::frame::{Type, Writer};

/// A disk of two images with a block of data each, and a cluster of zeros.
fn small(root: &Root) {
    container(root, "src", Version::V2, 64, 4 * 64 * 512);
    write(root, "src", 4096, &[0x11; 512]);
    write(root, "src", 3 * 32768, &[0x22; 100]);
    snapshot(root, "src", "a");
    write(root, "src", 8192, &[0x33; 512]);
    write(root, "src", 3 * 32768, &vec![0; 32768]);
}

/// A host with an empty store, which must stay that.
struct Empty {
    store: MemoryStore,
    root: Root,
    before: BTreeMap<PathBuf, Option<Vec<u8>>>,
}

impl Empty {
    fn new() -> Empty {
        let (store, root) = host();
        Empty {
            before: everything(&store),
            store,
            root,
        }
    }

    fn refuses(&self, stream: &[u8], why: &str) -> ploop::Error {
        match received(&self.root, "dst", stream, false) {
            Ok(_) => panic!("{why}: taken for whole"),
            Err(e) => {
                assert!(
                    everything(&self.store) == self.before,
                    "{why}: {e}: something is left"
                );
                e
            }
        }
    }
}

fn stream() -> Vec<u8> {
    let (_, from) = host();
    small(&from);
    sent(&from, "src", &SendOptions::default()).unwrap()
}

/// What becomes of a byte.
type Damage = fn(u8) -> u8;

#[test]
fn every_damaged_byte_is_noticed() {
    let (stream, to) = (stream(), Empty::new());
    let kinds: [(&str, Damage); 4] = [
        ("lowest bit", |b| b ^ 1),
        ("highest bit", |b| b ^ 0x80),
        ("zeroed", |_| 0),
        ("all ones", |_| 0xFF),
    ];
    let mut tried = 0;
    for at in 0..stream.len() {
        for (kind, damage) in kinds {
            let mut bytes = stream.clone();
            bytes[at] = damage(bytes[at]);
            if bytes[at] != stream[at] {
                to.refuses(&bytes, &format!("byte {at}, {kind}"));
                tried += 1;
            }
        }
    }
    assert!(tried > 3 * stream.len());
    received(&to.root, "dst", &stream, false).unwrap();
}

#[test]
fn every_cut_is_noticed_and_so_is_what_follows_the_end() {
    let (stream, to) = (stream(), Empty::new());
    for len in 0..stream.len() {
        let e = to.refuses(&stream[..len], &format!("cut at {len}"));
        assert_eq!(e.kind(), Kind::Corrupt, "{e}");
    }
    for more in [&[0][..], &stream] {
        let e = to.refuses(&[stream.as_slice(), more].concat(), "more");
        assert!(e.to_string().contains("follows the end"), "{e}");
    }
}

#[test]
fn frames_that_are_missing_repeated_moved_or_another_streams_are_noticed() {
    let (stream, other, to) = (stream(), stream(), Empty::new());
    let at = frames(&stream);
    assert_eq!(at.len(), frames(&other).len());
    let all: Vec<&[u8]> = at.windows(2).map(|w| &stream[w[0]..w[1]]).collect();
    let others = frames(&other);
    let others: Vec<&[u8]> = others.windows(2).map(|w| &other[w[0]..w[1]]).collect();
    let whole = |frames: &[&[u8]]| {
        let mut bytes = stream[..at[0]].to_vec();
        bytes.extend(frames.concat());
        bytes
    };
    assert_eq!(whole(&all), stream);
    for n in 0..all.len() {
        let mut missing = all.clone();
        missing.remove(n);
        to.refuses(&whole(&missing), &format!("without frame {n}"));
        let mut foreign = all.clone();
        foreign[n] = others[n];
        to.refuses(&whole(&foreign), &format!("frame {n} of another stream"));
        for m in 0..all.len() {
            let mut repeated = all.clone();
            repeated.insert(m, all[n]);
            to.refuses(&whole(&repeated), &format!("frame {n} again at {m}"));
            if n != m {
                let mut swapped = all.clone();
                swapped.swap(n, m);
                to.refuses(&whole(&swapped), &format!("frames {n} and {m} swapped"));
            }
        }
    }
}

/// A stream of these frames, right in every checksum.
fn made(features: u32, frames: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::begin(&mut bytes, features).unwrap();
    for (kind, payload) in frames {
        writer.raw(*kind, payload).unwrap();
    }
    bytes
}

fn frame(kind: Type, record: &Value) -> (u8, Vec<u8>) {
    (kind as u8, record.to_string().into_bytes())
}

fn disk() -> Value {
    json!({
        "name": "x", "what": "tree", "cluster_sectors": 64, "images": 1, "base": null,
        "quota": null, "limits": {},
    })
}

fn image() -> Value {
    json!({
        "guid": "{5fbaabe3-6958-40ff-92a7-860e329aab41}", "parent": null, "version": 2,
        "size": 131072, "limit": null, "meta": null,
    })
}

fn with(mut record: Value, key: &str, value: Value) -> Value {
    record[key] = value;
    record
}

const EMPTY: &str =
    "sha256-blocks:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// What follows the records of a disk of one image, with this data.
fn data(pieces: &[(u64, usize)]) -> Vec<(u8, Vec<u8>)> {
    let mut all = vec![frame(Type::Begin, &json!({ "image": 0 }))];
    for (offset, len) in pieces {
        let bytes = [&offset.to_le_bytes()[..], &vec![1; *len]].concat();
        all.push((Type::Data as u8, bytes));
    }
    all.push(frame(Type::Done, &json!({ "hash": EMPTY })));
    all
}

#[test]
fn numbers_and_names_that_no_disk_can_have_are_refused() {
    let to = Empty::new();
    let guid = "{00000000-0000-0000-0000-000000000001}";
    let disks = [
        with(disk(), "images", json!(0)),
        with(disk(), "images", json!(u64::MAX)),
        with(disk(), "images", json!(20_001)),
        with(disk(), "images", json!(2)),
        with(disk(), "images", json!(-1)),
        with(disk(), "cluster_sectors", json!(0)),
        with(disk(), "cluster_sectors", json!(1)),
        with(disk(), "cluster_sectors", json!(u32::MAX)),
        with(disk(), "limits", json!({ "iops": u64::MAX })),
        with(disk(), "limits", json!({ "later": [[[[0, 0, 0]]]] })),
        with(disk(), "what", json!("everything")),
        with(disk(), "later", json!(1)),
        with(
            disk(),
            "base",
            json!({ "template": { "content": "x", "size": u64::MAX } }),
        ),
        with(
            disk(),
            "base",
            json!({ "snapshot": { "guid": guid, "content": "x" } }),
        ),
        json!([]),
    ];
    let images = [
        with(image(), "size", json!(0)),
        with(image(), "size", json!(1)),
        with(image(), "size", json!(131_072 + 512)),
        with(image(), "size", json!(u64::MAX)),
        with(image(), "size", json!(u64::MAX - 511)),
        with(image(), "version", json!(3)),
        with(image(), "limit", json!(0)),
        with(image(), "limit", json!(100)),
        with(image(), "limit", json!(262_144)),
        with(image(), "guid", json!(guid)),
        with(image(), "guid", json!("../../etc")),
        with(image(), "parent", json!(guid)),
        with(image(), "meta", json!({ "name": "a" })),
        with(image(), "size", json!(1u64 << 62)),
        json!(null),
    ];
    for record in &disks {
        let frames = [frame(Type::Disk, record), frame(Type::Image, &image())];
        to.refuses(
            &made(0, &[&frames[..], &data(&[])].concat()),
            &record.to_string(),
        );
    }
    for record in &images {
        let frames = [frame(Type::Disk, &disk()), frame(Type::Image, record)];
        to.refuses(
            &made(0, &[&frames[..], &data(&[])].concat()),
            &record.to_string(),
        );
    }
    // Snapshots: their names become arguments and file names.
    let two = with(disk(), "images", json!(2));
    for (meta, id) in [
        (json!({ "name": "../x" }), guid),
        (json!({ "name": guid }), guid),
        (json!({ "name": "" }), guid),
        (json!({ "later": 1 }), guid),
        (json!({}), "{00000000-0000-0000-0000-000000000000}"),
        (json!({}), "{5fbaabe3-6958-40ff-92a7-860e329aab41}"),
    ] {
        let base = with(with(image(), "guid", json!(id)), "meta", meta);
        let top = with(image(), "parent", json!(id));
        let frames = [
            frame(Type::Disk, &two),
            frame(Type::Image, &base),
            frame(Type::Image, &top),
        ];
        to.refuses(&made(0, &frames), &base.to_string());
    }
}

#[test]
fn images_of_two_versions_in_one_disk_are_refused() {
    let to = Empty::new();
    let id = "{00000000-0000-0000-0000-000000000001}";
    let base = with(with(image(), "guid", json!(id)), "meta", json!({}));
    let top = with(image(), "parent", json!(id));
    let frames = [
        frame(Type::Disk, &with(disk(), "images", json!(2))),
        frame(Type::Image, &with(base, "version", json!(1))),
        frame(Type::Image, &top),
        frame(Type::Begin, &json!({ "image": 0 })),
    ];
    let e = to.refuses(&made(0, &frames), "two versions");
    assert!(e.to_string().contains("two versions"), "{e}");
}

#[test]
fn data_that_belongs_nowhere_is_refused() {
    let to = Empty::new();
    let records = [frame(Type::Disk, &disk()), frame(Type::Image, &image())];
    for pieces in [
        &[(131_072, 4096)][..],
        &[(u64::MAX, 4096)],
        &[(u64::MAX - 4095, 4096)],
        &[(1, 4096)],
        &[(512, 512)],
        &[(28_672, 8192)],
        &[(0, 65_536)],
        &[(4096, 4096), (0, 4096)],
        &[(4096, 4096), (4096, 4096)],
        &[(32_768, 4096), (0, 4096)],
        // Nothing is below, so zeros mean nothing.
        &[(0, 0)],
        &[(4096, 0)],
    ] {
        let frames = [&records[..], &data(pieces)].concat();
        to.refuses(&made(0, &frames), &format!("{pieces:?}"));
    }
    // Frames in the wrong place, of no type, too short, too long.
    let begin = frame(Type::Begin, &json!({ "image": 0 }));
    let done = frame(Type::Done, &json!({ "hash": EMPTY }));
    for (what, more) in [
        ("no image", vec![done.clone()]),
        (
            "another image",
            vec![frame(Type::Begin, &json!({ "image": 1 })), done.clone()],
        ),
        ("image twice", vec![begin.clone(), begin.clone()]),
        (
            "no offset",
            vec![begin.clone(), (Type::Data as u8, vec![0; 7])],
        ),
        ("no type", vec![begin.clone(), (99, Vec::new())]),
        (
            "another hash",
            vec![begin.clone(), frame(Type::Done, &json!({ "hash": "" }))],
        ),
        (
            "a wrong end",
            vec![
                begin.clone(),
                done.clone(),
                frame(Type::End, &json!({ "frames": 4, "hash": "" })),
            ],
        ),
        (
            "a wrong count",
            vec![
                begin,
                done,
                frame(Type::End, &json!({ "frames": 5, "hash": "" })),
            ],
        ),
        ("records twice", records.to_vec()),
    ] {
        to.refuses(&made(0, &[&records[..], &more].concat()), what);
    }
}

#[test]
fn versions_and_features_that_are_not_known_are_refused_by_name() {
    let to = Empty::new();
    let e = to.refuses(&made(1 << 7, &[]), "feature");
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.to_string().contains("feature bit 7"), "{e}");
    let mut bytes = stream();
    bytes[8] = 2;
    let sum = crc32fast::hash(&bytes[..32]);
    bytes[32..36].copy_from_slice(&sum.to_le_bytes());
    let e = to.refuses(&bytes, "version");
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.to_string().contains("version 2"), "{e}");
    let e = to.refuses(&[7; 100], "no stream");
    assert!(e.to_string().contains("no stream"), "{e}");
    // A length above the limit is refused before it is believed.
    let mut bytes = stream();
    bytes[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
    let e = to.refuses(&bytes, "length");
    assert!(e.to_string().contains("1048576 is the limit"), "{e}");
}

/// Goal: no panic, and nothing left, whatever a stream says. Method: streams of each sort with random
/// changes, most of them right in every checksum and hash that follows; what is taken is read, written to,
/// and removed. `PLOOP_MUTATIONS` of them.
#[test]
fn streams_that_are_changed_at_random_are_refused_or_whole() {
    let count = std::env::var("PLOOP_MUTATIONS").map_or(4000, |n| n.parse().unwrap());
    let seeds: Vec<Vec<u8>> = stream_target::seeds().into_iter().collect();
    let numbers: [&[u8]; 6] = [
        b"0",
        b"-1",
        b"18446744073709551615",
        b"4096",
        b"null",
        b"[]",
    ];
    let mut rng = Rng(1);
    for n in 0..count {
        let mut bytes = seeds[rng.below(seeds.len() as u64) as usize].clone();
        for _ in 0..=rng.below(4) {
            let at = rng.below(bytes.len() as u64) as usize;
            let to = (at + 1 + rng.below(24) as usize).min(bytes.len());
            match rng.below(6) {
                0 => bytes[at] ^= 1 << rng.below(8),
                1 => bytes[at] = rng.below(256) as u8,
                2 => drop(bytes.drain(at..to)),
                3 => {
                    let part = bytes[at..to].to_vec();
                    bytes.splice(at..at, part);
                }
                4 => {
                    // A digit becomes another number.
                    if let Some(digit) = bytes[at..].iter().position(u8::is_ascii_digit) {
                        let number = numbers[rng.below(6) as usize];
                        let at = at + digit;
                        bytes.splice(at..at + 1, number.iter().copied());
                    }
                }
                _ => bytes.truncate(to),
            }
            if bytes.is_empty() {
                bytes.push(1);
            }
        }
        println!("{n}");
        stream_target::run(&bytes);
    }
}
