//! Conversion: the corpus by its hashes, random disks by QEMU's judgement.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use ploop::Kind as ErrorKind;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{Format, OpenOptions, Opener, Source};
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create};
use ploop::store::{Access, RealStore, Store, StoreFile};
use ploop_tests::corpus::{self, Case};
use ploop_tests::tools::{run, tool};
use sha2::{Digest, Sha256};
use snapshots::convert::{Converted, Kind, Target, To, convert};

fn to_file(
    from: &str,
    target: &Path,
    to: impl Into<To>,
    options: &OpenOptions,
) -> ploop::Result<Converted> {
    let opener = Opener::host();
    let source = Source::parse(opener.store().as_ref(), from)?;
    let target = Target::File(target.to_path_buf());
    convert(&opener, &source, options, target, to, &|_, _| ())
}

/// The corpus's digest for sparse reading, of a raw file.
fn blocks_digest(file: &dyn StoreFile) -> String {
    let (size, mut at) = (file.len().unwrap(), 0);
    let mut hash = Sha256::new();
    while let Some(data) = file.next_data(at, size).unwrap() {
        let mut offset = (data.start / 4096 * 4096).max(at);
        while offset < data.end {
            let mut block = vec![0; (size - offset).min(4096) as usize];
            file.read_at(&mut block, offset).unwrap();
            if block.iter().any(|&b| b != 0) {
                hash.update(offset.to_le_bytes());
                hash.update(&block);
            }
            offset += 4096;
        }
        at = offset;
    }
    corpus::hex(hash)
}

fn full_digest(path: &Path) -> String {
    let mut hash = Sha256::new();
    let mut file = File::open(path).unwrap();
    let mut buf = vec![0; 1 << 20];
    loop {
        match file.read(&mut buf).unwrap() {
            0 => return corpus::hex(hash),
            n => hash.update(&buf[..n]),
        }
    }
}

/// Whether one node of a case, as a raw file, is what it should be; the file is removed again.
fn right(case: &Case, dir: &Path, node: &str, options: &OpenOptions) -> ploop::Result<bool> {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("out.raw");
    let entry = dir.join(case.text("entry")).display().to_string();
    let from = if node == "top" {
        entry
    } else {
        format!("{entry}@{node}")
    };
    let done = to_file(&from, &target, Kind::Raw, options).inspect_err(|_| {
        let left = fs::read_dir(out.path()).unwrap().count();
        assert_eq!(left, 0, "{} {node}: something is left", case.name);
    })?;
    let file = RealStore.open(&target, Access::Read).unwrap();
    assert_eq!(file.len().unwrap(), done.source_bytes);
    assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o600);
    let names: Vec<_> = fs::read_dir(out.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "{}: {names:?}", case.name);
    Ok(match case.hashes().remove(node) {
        Some((Some(full), _)) if done.source_bytes <= 1 << 30 => full_digest(&target) == full,
        Some((_, Some(blocks))) => blocks_digest(file.as_ref()) == blocks,
        _ => false,
    })
}

#[test]
fn every_case_becomes_the_right_raw_file_or_nothing() {
    let mut wrong = Vec::new();
    for case in corpus::cases() {
        let tmp = case.unpack();
        let dir = fs::canonicalize(tmp.path()).unwrap();
        let rule = case.read_rule();
        let needs_allow = case.needs_allow();
        let options = OpenOptions {
            allow: if needs_allow {
                vec![dir.clone()]
            } else {
                vec![]
            },
            ..OpenOptions::default()
        };
        for node in case.nodes() {
            let verdict = right(&case, &dir, &node, &options);
            if !case.accepts(&node, &verdict) {
                wrong.push(format!("{} {node} [{rule}]: {verdict:?}", case.name));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}

/// A closed ploop image of a bit more than 1 GiB with pieces of data all over it.
fn random_disk(path: &Path, seed: u64, cluster_sectors: u32) {
    let sectors = (1 << 21) + u64::from(cluster_sectors);
    let header = Header::new(Version::V2, cluster_sectors, sectors).unwrap();
    let file = create(&RealStore, path, &header, 0o600).unwrap();
    let disk = Disk::writable(None, Top::open(file).unwrap(), None).unwrap();
    let mut rng = Rng(seed);
    let mut last = vec![0xEE; 1000];
    for i in 0..120u64 {
        let len = rng.below(300_000) + 1;
        let at = rng.below(disk.size() - len);
        let zero = rng.below(4) == 0;
        let bytes: Vec<u8> = (0..len)
            .map(|k| if zero { 0 } else { (k * 31 + i) as u8 })
            .collect();
        disk.write(at, &bytes).unwrap();
    }
    // The very last byte counts, too.
    last[999] = 0x77;
    disk.write(disk.size() - 1000, &last).unwrap();
    disk.close().unwrap();
}

fn compare(a: (&str, &Path), b: (&str, &Path)) {
    let mut command = tool("qemu-img");
    command.args(["compare", "-f", a.0, "-F", b.0]);
    run(command.arg(a.1).arg(b.1));
}

fn qemu_check(format: &str, path: &Path) {
    run(tool("qemu-img").args(["check", "-f", format]).arg(path));
}

#[test]
fn random_disks_go_through_every_format_and_qemu_sees_no_difference() {
    let options = OpenOptions::default();
    for (seed, cluster) in [(1, 128), (2, 2048), (3, 64)] {
        let tmp = tempfile::tempdir().unwrap();
        let at = |name: &str| tmp.path().join(name);
        random_disk(&at("a.hdd"), seed, cluster);
        qemu_check("parallels", &at("a.hdd"));
        let steps = [
            ("a.hdd", "b.qcow2", Kind::Qcow2),
            ("b.qcow2", "c.raw", Kind::Raw),
            ("a.hdd", "d.hds", Kind::PloopV1),
            ("d.hds", "e.raw", Kind::Raw),
            ("c.raw", "f.hds", Kind::Ploop),
            ("f.hds", "g.qcow2", Kind::Qcow2),
        ];
        for (from, to, kind) in steps {
            let done = to_file(at(from).to_str().unwrap(), &at(to), kind, &options).unwrap();
            assert!(done.bytes_written > 1 << 20, "{from} to {to}: {done:?}");
            let format = match kind {
                Kind::Raw => "raw",
                Kind::Qcow2 => "qcow2",
                Kind::Ploop | Kind::PloopV1 => "parallels",
            };
            if kind != Kind::Raw {
                qemu_check(format, &at(to));
            }
            compare(("parallels", &at("a.hdd")), (format, &at(to)));
        }
        assert_eq!(full_digest(&at("c.raw")), full_digest(&at("e.raw")));
        let size = fs::metadata(at("c.raw")).unwrap();
        assert!(
            size.blocks() * 512 < size.size() / 4,
            "the raw file is sparse"
        );
        let cluster_of = |name: &str| {
            let file = RealStore.open(&at(name), Access::Read).unwrap();
            ploop::format::ploop::delta::read_header(file.as_ref())
                .unwrap()
                .0
                .cluster_sectors
        };
        assert_eq!(cluster_of("d.hds"), cluster, "the source's cluster");
        assert_eq!(cluster_of("f.hds"), 128, "a raw source has none");
    }
}

#[test]
fn a_qcow2_of_several_refcount_blocks_and_l2_tables_is_sound() {
    // In memory: tens of thousands of extents would keep a disk busy for a minute.
    let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
    let (raw, qcow2) = (tmp.path().join("a.raw"), tmp.path().join("b.qcow2"));
    let file = File::create(&raw).unwrap();
    // One sector in each of more clusters than one refcount block counts.
    for i in 0..33_000u64 {
        file.write_all_at(&[i as u8 | 1; 512], i * 65_536 + i % 128 * 512)
            .unwrap();
    }
    file.set_len((33_000 << 16) + 512).unwrap();
    let done = to_file(
        raw.to_str().unwrap(),
        &qcow2,
        Kind::Qcow2,
        &OpenOptions::default(),
    )
    .unwrap();
    assert_eq!(done.bytes_written, 33_000 * 4096);
    qemu_check("qcow2", &qcow2);
    compare(("raw", &raw), ("qcow2", &qcow2));
}

#[test]
fn every_size_around_a_border_makes_an_image_that_qemu_calls_sound() {
    let tmp = tempfile::tempdir().unwrap();
    for size in [
        0,
        1,
        511,
        512,
        65_535,
        65_536,
        65_537,
        (512 << 20) - 1,
        (512 << 20) + 1,
    ] {
        let raw = tmp.path().join(format!("{size}.raw"));
        let file = File::create(&raw).unwrap();
        file.set_len(size).unwrap();
        if size > 0 {
            file.write_all_at(&[9], size - 1).unwrap();
        }
        for (kind, format) in [
            (Kind::Qcow2, "qcow2"),
            (Kind::Ploop, "parallels"),
            (Kind::PloopV1, "parallels"),
        ] {
            let to = tmp.path().join(format!("{size}.{kind:?}"));
            let options = OpenOptions {
                format: Some(Format::Raw),
                ..OpenOptions::default()
            };
            let done = to_file(raw.to_str().unwrap(), &to, kind, &options);
            if size == 0 && kind != Kind::Qcow2 {
                assert_eq!(done.unwrap_err().kind(), ErrorKind::Invalid);
                continue;
            }
            let done = done.unwrap();
            assert!(done.virtual_bytes - size < 65_536, "{done:?}");
            qemu_check(format, &to);
            compare(("raw", &raw), (format, &to));
        }
    }
}

#[test]
fn an_existing_target_and_an_unreadable_source_leave_the_directory_as_it_was() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    random_disk(&at("a.hdd"), 4, 128);
    let options = OpenOptions::default();
    fs::write(at("there"), "mine").unwrap();
    std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
    let names = || {
        let list = fs::read_dir(tmp.path()).unwrap();
        let mut names: Vec<_> = list.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    for kind in [Kind::Raw, Kind::Ploop, Kind::PloopV1, Kind::Qcow2] {
        for target in ["there", "link"] {
            let from = at("a.hdd").display().to_string();
            let e = to_file(&from, &at(target), kind, &options).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Exists, "{e}");
        }
        // The last entry of the BAT, so that everything before it was written already.
        let bad = File::options().write(true).open(at("a.hdd")).unwrap();
        let slot = 64 + 4 * ((1 << 21) / 128);
        let mut good = [0; 4];
        File::open(at("a.hdd"))
            .unwrap()
            .read_exact_at(&mut good, slot)
            .unwrap();
        bad.write_all_at(&[0xFF; 4], slot).unwrap();
        let from = at("a.hdd").display().to_string();
        let e = to_file(&from, &at("new"), kind, &options).unwrap_err();
        assert_eq!((e.kind(), e.offset()), (ErrorKind::Corrupt, Some(slot)));
        bad.write_all_at(&good, slot).unwrap();
    }
    assert_eq!(names(), before);
    assert_eq!(fs::read(at("there")).unwrap(), b"mine");
}
