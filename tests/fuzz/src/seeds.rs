//! First inputs: from images that our own code writes, and from the corpus beside the project where
//! it is there (`PLOOP_CORPUS`, or `../shared/corpus`).

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use ploop::format::ploop::header::has_signature;
use ploop::format::ploop::{Header, Version};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, SECTOR, Store};

use crate::Target;
use crate::base::{Base, CLUSTER, disk, image};
use crate::targets::{image as images, journal, migrate, stream, undo};

/// Bytes of a file of the corpus that are looked at.
const READ_MAX: u64 = 4 << 20;
/// The longest file that the image targets make.
const LEN_MAX: u64 = 0xfff * SECTOR;

/// Writes the seeds of `target` into `dir`, which is made; says how many.
pub fn write(target: &Target, dir: &Path) -> usize {
    let mut all: BTreeSet<Vec<u8>> = match target.name {
        "header" => headers(),
        "bat" => tables(),
        "extension" => extensions(),
        "descriptor" => descriptors(),
        "qcow2" => qcow2(),
        "journal" => one(&journal::base().store, journal::JOURNAL),
        "undo" => one(undo::repaired(), undo::UNDO),
        "stream" => stream::seeds(),
        "migrate" => migrate::seeds(),
        other => panic!("{other} has no seeds"),
    };
    all.retain(|s| s.len() <= target.len_max);
    fs::create_dir_all(dir).unwrap();
    for (i, seed) in all.iter().enumerate() {
        fs::write(dir.join(format!("seed-{i:03}")), seed).unwrap();
    }
    all.len()
}

fn whole(store: &MemoryStore, path: &Path) -> Vec<u8> {
    let file = store.open(path, Access::Read).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A file as it is, and with its sums made right; without the zeros at its end.
fn one(store: &MemoryStore, path: &str) -> BTreeSet<Vec<u8>> {
    let mut bytes = whole(store, Path::new(path));
    let end = bytes.iter().rposition(|&b| b != 0).map_or(0, |at| at + 1);
    bytes.truncate(end.next_multiple_of(512).min(bytes.len()));
    [0, 1]
        .into_iter()
        .map(|flags| [&[flags], bytes.as_slice()].concat())
        .collect()
}

/// The files of the corpus, unpacked: name, length, first bytes.
fn corpus() -> Vec<(PathBuf, u64, Vec<u8>)> {
    let root = match std::env::var_os("PLOOP_CORPUS") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus"),
    };
    let mut out = Vec::new();
    for case in fs::read_dir(root).into_iter().flatten().flatten() {
        for entry in fs::read_dir(case.path()).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(packed) = fs::read(&path) else {
                continue;
            };
            let (mut bytes, mut len) = (Vec::new(), packed.len() as u64);
            if path.extension().is_some_and(|e| e == "gz") {
                let mut plain = GzDecoder::new(packed.as_slice());
                let head = plain.by_ref().take(READ_MAX).read_to_end(&mut bytes);
                let rest = std::io::copy(&mut plain, &mut std::io::sink());
                let (Ok(head), Ok(rest)) = (head, rest) else {
                    continue;
                };
                len = head as u64 + rest;
            } else {
                bytes = packed;
            }
            out.push((path, len, bytes));
        }
    }
    out
}

fn own() -> Vec<Base> {
    vec![
        image("v2", Version::V2, 128, 64),
        image("v1", Version::V1, 64, 40),
        image("v2 with a long table", Version::V2, CLUSTER, 200),
    ]
}

/// Length and first bytes of ploop images.
fn ploop_images() -> Vec<(u64, Vec<u8>)> {
    let mut all: Vec<(u64, Vec<u8>)> = Vec::new();
    for base in own() {
        let bytes = whole(&base.store, &base.source.path);
        all.push((bytes.len() as u64, bytes));
    }
    let corpus = corpus().into_iter().filter(|(_, _, b)| has_signature(b));
    all.extend(corpus.map(|(_, len, bytes)| (len, bytes)));
    all
}

fn headers() -> BTreeSet<Vec<u8>> {
    let head = |(len, bytes): (u64, Vec<u8>)| {
        let mut out = len.to_le_bytes().to_vec();
        out.extend(&bytes[..bytes.len().min(64)]);
        out
    };
    ploop_images().into_iter().map(head).collect()
}

fn number(bytes: &[u8], at: usize) -> usize {
    let raw = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_le_bytes(raw.unwrap_or_default()) as usize
}

/// Header and table, as far as there is room.
fn head(bytes: &[u8], max: usize) -> &[u8] {
    let end = number(bytes, 32).saturating_mul(4).saturating_add(64);
    &bytes[..end.min(max).min(bytes.len())]
}

fn tables() -> BTreeSet<Vec<u8>> {
    let images = ploop_images().into_iter();
    images
        .map(|(len, bytes)| images::input(len.min(LEN_MAX), 0, head(&bytes, 1000), &[]))
        .collect()
}

fn extensions() -> BTreeSet<Vec<u8>> {
    let mut out = BTreeSet::new();
    for (len, bytes) in ploop_images() {
        let at = number(&bytes, 56).saturating_mul(512);
        let head = head(&bytes, 900);
        if at != 0
            && let Some(rest) = bytes.get(at..)
        {
            let rest = &rest[..rest.len().min(800)];
            out.insert(images::input(len.min(LEN_MAX), 1, head, rest));
        }
    }
    // Of an image of ours: a bitmap with a table of 1, 0 and a cluster.
    let base = image("with an extension", Version::V2, 128, 24);
    let bytes = whole(&base.store, &base.source.path);
    let header = Header::new(Version::V2, 128, 128 * 24).unwrap();
    let cluster = header.cluster_bytes();
    let end = (bytes.len() as u64).next_multiple_of(cluster);
    let mut marked = head(&bytes, 1000).to_vec();
    marked[44..48].copy_from_slice(&0x312E_3276u32.to_le_bytes());
    marked[56..64].copy_from_slice(&(end / SECTOR).to_le_bytes());
    let mut rest = 0xAB23_4CEF_23DC_EA87u64.to_le_bytes().to_vec();
    rest.extend([0; 16]);
    for (magic, flags) in [(0x2038_5FAE_252C_B34Au64, 0u64), (0x1234, 2)] {
        rest.extend(magic.to_le_bytes());
        rest.extend(flags.to_le_bytes());
        rest.extend(56u64.to_le_bytes());
        rest.extend(header.size_sectors.to_le_bytes());
        rest.extend([5; 16]);
        rest.extend(8u32.to_le_bytes());
        rest.extend(3u32.to_le_bytes());
        for word in [1, 0, (end + cluster) / SECTOR] {
            rest.extend(word.to_le_bytes());
        }
    }
    out.insert(images::input(end + 2 * cluster, 1, &marked, &rest));
    // A conversion that was cut off, and what it kept.
    let table = head(&bytes, 1000);
    let mut converting = table.to_vec();
    converting[52] |= 2;
    out.insert(images::input(bytes.len() as u64, 2, &converting, table));
    for (path, len, backup) in corpus() {
        let name = path.to_string_lossy();
        if let Some(stem) = name.strip_suffix(".idx.gz").or(name.strip_suffix(".idx")) {
            let of = |p: &Path| {
                let p = p.to_string_lossy();
                p.as_ref() == stem || p.strip_suffix(".gz") == Some(stem)
            };
            for (_, _, image) in corpus().into_iter().filter(|(p, ..)| of(p)) {
                let backup = &backup[..backup.len().min(900)];
                let head = head(&image, 900);
                out.insert(images::input(len.min(LEN_MAX), 2, head, backup));
            }
        }
    }
    out
}

fn descriptors() -> BTreeSet<Vec<u8>> {
    let own = [disk("a disk", false)];
    let own = own.iter().map(|b| whole(&b.store, &b.source.path));
    let xml = |p: &Path| p.to_string_lossy().contains(".xml");
    let corpus = corpus().into_iter().filter(|(p, ..)| xml(p));
    own.chain(corpus.map(|(_, _, bytes)| bytes)).collect()
}

fn qcow2() -> BTreeSet<Vec<u8>> {
    let mut out = BTreeSet::from([small_qcow2()]);
    for (_, len, bytes) in corpus() {
        if bytes.starts_with(b"QFI\xfb") {
            let kept = bytes.len().min(4000);
            let more = (len - kept as u64).div_ceil(SECTOR).min(0xfff) as u16;
            out.insert([&more.to_le_bytes(), &bytes[..kept]].concat());
        }
    }
    out
}

/// An image with clusters of 512 bytes: header, refcount table, its block, L1, L2, two clusters.
fn small_qcow2() -> Vec<u8> {
    let mut b = vec![0; 7 * 512];
    let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9u32.to_be_bytes());
    put(24, &(32u64 << 10).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &1536u64.to_be_bytes());
    put(48, &512u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(512, &1024u64.to_be_bytes());
    for cluster in 0..7 {
        put(1024 + 2 * cluster, &1u16.to_be_bytes());
    }
    let copied = 1u64 << 63;
    put(1536, &(2048 | copied).to_be_bytes());
    put(2048, &(2560 | copied).to_be_bytes());
    put(2056, &1u64.to_be_bytes());
    put(2064, &(3072 | copied).to_be_bytes());
    put(2560, b"guest");
    put(3072, b"bytes");
    [&[0, 0], b.as_slice()].concat()
}
