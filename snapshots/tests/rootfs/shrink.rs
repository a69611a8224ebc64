//! Shrinking what is on a disk: nothing of the files is lost, and nothing is cut off that is not known
//! to be empty.

use std::fs;
use std::path::Path;

use ploop::error::{Error, Kind};
use snapshots::rootfs::{BuildOptions, Built, RootSource, build, grow, shrink};

use crate::host::{Mounted, fsck, need_root, picture, sh};

const MIB: u64 = 1 << 20;

/// The smallest size that the refusal says would do.
fn smallest(e: &Error) -> u64 {
    let text = e.what().to_owned();
    let number = text.split(": ").nth(1).unwrap().split(' ').next().unwrap();
    number.parse().unwrap_or_else(|_| panic!("{text}"))
}

fn unchanged(image: &Path, say: impl FnOnce()) {
    let hash = || {
        let bytes = fs::read(image).unwrap();
        (bytes.len(), crc32fast::hash(&bytes))
    };
    let before = hash();
    say();
    assert_eq!(hash(), before, "a refused disk is as it was");
}

/// Files all over a disk of `bytes`, most of them gone again: what is left must move.
fn spread(built: &Built, bytes: u64, user_quota: bool) {
    if user_quota {
        return spread_unmounted(built);
    }
    let mounted = Mounted::new(&built.image, built.partition_offset, bytes, "rw");
    let dir = mounted.path().display().to_string();
    sh(&format!(
        "cd '{dir}' && mkdir d && for n in $(seq 20); do head -c 12M /dev/urandom >d/$n; sync; done \
         && rm d/[2-9] d/1[0-7] && chown 7919:104729 d/18 && ln d/18 d/same && truncate -s 1G d/hole"
    ));
}

/// The same without a mount: a kernel without quota mounts no such file system for writing. debugfs
/// charges nobody, so e2fsck counts anew.
fn spread_unmounted(built: &Built) {
    let on = format!(
        "'{}?offset={}'",
        built.image.display(),
        built.partition_offset
    );
    sh(&format!(
        "src=$(mktemp); head -c 12M /dev/urandom >$src; \
         (for n in $(seq 20); do echo write $src f$n; done; for n in $(seq 2 17); do echo rm f$n; done) \
         | debugfs -w -f - {on} >/dev/null; rm $src; \
         e2fsck -fy {on} >/dev/null || [ $? = 1 ]; debugfs -R 'stat f20' {on} | grep -q 'Size: 12582912'"
    ));
}

#[test]
fn a_disk_shrinks_with_what_is_on_it_and_keeps_every_file() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    sh(&format!("cp -a /etc '{}'", root.display()));
    for (partition, user_quota) in [(true, false), (false, false), (true, true)] {
        let options = BuildOptions {
            partition,
            user_quota,
            ..BuildOptions::default()
        };
        let work = dir.path().join(format!("work-{partition}-{user_quota}"));
        fs::create_dir(&work).unwrap();
        let mut built = build(&RootSource::Dir(root.clone()), &options, &work, &|_| {}).unwrap();
        let grown = grow(&built.image, 400 * MIB).unwrap();
        spread(&built, grown.bytes, user_quota);
        built.partition_bytes = grown.bytes;
        let before = picture(Mounted::read_only(&built).path());
        let mut size = 400 * MIB;
        // What does not fit is said with the size that does; down to that, and not below.
        let aside = dir.path().join("aside");
        sh(&format!(
            "cp '{}' '{}'",
            built.image.display(),
            aside.display()
        ));
        let e = shrink(&aside, 8 * MIB).unwrap_err();
        assert_eq!(e.kind(), Kind::NoSpace, "{e}");
        let least = smallest(&e);
        assert!((40 * MIB..300 * MIB).contains(&least), "{e}");
        for to in [300 * MIB, 250 * MIB + 65536, least] {
            let shrunk = shrink(&built.image, to).unwrap();
            let frame = if partition { 2 * MIB } else { 0 };
            assert!(shrunk.filesystem <= to - frame / 2, "{shrunk:?}");
            assert!(shrunk.filesystem > to - frame - MIB, "{shrunk:?}");
            assert_eq!(fs::metadata(&built.image).unwrap().len(), to);
            built.partition_bytes = shrunk.filesystem;
            fsck(&built);
            if partition {
                sh(&format!(
                    "sgdisk -v '{}' | grep -q 'No problems found'",
                    built.image.display()
                ));
            }
            assert!(before == picture(Mounted::read_only(&built).path()));
            size = to;
        }
        // And it grows again.
        let grown = grow(&built.image, 500 * MIB).unwrap();
        assert!(grown.filesystem && size < grown.bytes);
        built.partition_bytes = grown.bytes;
        fsck(&built);
        assert!(before == picture(Mounted::read_only(&built).path()));
        let quota = format!(
            "dumpe2fs -h '{}?offset={}' 2>/dev/null | grep -q 'User quota inode'",
            built.image.display(),
            built.partition_offset
        );
        if user_quota {
            sh(&quota);
        }
        let left: Vec<_> = fs::read_dir(&work)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(!left.iter().any(|n| n == "disk.raw.fs"), "{left:?}");
    }
}

#[test]
fn what_cannot_shrink_is_refused_by_name_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let shown = image.display();
    let ext4 = |at: u64, len: u64| {
        format!(
            "mke2fs -q -t ext4 -E offset={} '{shown}' {}k",
            at * MIB,
            len * 1024
        )
    };
    let mbr = format!("printf '\\125\\252' | dd of='{shown}' bs=1 seek=510 conv=notrunc");
    let luks = format!("printf 'LUKS\\272\\276' | dd of='{shown}' conv=notrunc");
    let parted = |rest: &str| format!("sgdisk -n 1:2048:204799 {rest} '{shown}'");
    let data = |at: u64| format!("printf x | dd of='{shown}' bs=1 seek={at} conv=notrunc");
    for (make, named) in [
        (format!("mkfs.xfs -q '{shown}'"), "XFS"),
        ("true".to_owned(), "something unknown"),
        (mbr, "MBR"),
        (luks, "LUKS"),
        (
            format!("sgdisk -n 2:2048:10000 '{shown}'"),
            "without partition 1",
        ),
        (parted("-n 2:204800:400000"), "behind partition 1"),
        (parted(""), "something unknown"),
        // A file system that is smaller than its place, and something behind it: in the partition,
        // behind it, and behind the file system of a whole disk.
        (
            format!("{} && {} && {}", parted(""), ext4(1, 40), data(90 * MIB)),
            "data behind the new end",
        ),
        (
            format!("{} && {} && {}", parted(""), ext4(1, 99), data(350 * MIB)),
            "data behind the new end",
        ),
        (
            format!("{} && {}", ext4(0, 200), data(399 * MIB)),
            "data behind the new end",
        ),
    ] {
        sh(&format!(
            "rm -f '{shown}' && truncate -s 400M '{shown}' && PATH=$PATH:/sbin:/usr/sbin && {make}"
        ));
        unchanged(&image, || {
            let e = shrink(&image, 64 * MIB).unwrap_err();
            assert_eq!(e.kind(), Kind::Unsupported, "{make}: {e}");
            assert!(e.to_string().contains(named), "{make}: {e}");
        });
    }
    unchanged(&image, || {
        for size in [400 * MIB, 500 * MIB, 64 * MIB + 1] {
            assert_eq!(shrink(&image, size).unwrap_err().kind(), Kind::Invalid);
        }
    });
}

#[test]
fn what_is_behind_the_file_system_and_empty_is_cut_off_and_what_is_damaged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let shown = image.display();
    // The partition ends before the new end, and the file system before the partition.
    sh(&format!(
        "PATH=$PATH:/sbin:/usr/sbin; truncate -s 400M '{shown}' && sgdisk -n 1:2048:204799 '{shown}' \
         && mke2fs -q -t ext4 -E offset=1048576 '{shown}' 40M"
    ));
    let shrunk = shrink(&image, 200 * MIB).unwrap();
    assert_eq!(shrunk.filesystem, 40 * MIB);
    sh(&format!(
        "sgdisk -v '{shown}' | grep -q 'No problems found' && sgdisk -i 1 '{shown}' | grep -q 'Last sector: 204799'"
    ));
    // Through the partition, not through the file system.
    let shrunk = shrink(&image, 60 * MIB).unwrap();
    assert_eq!(shrunk.filesystem, 40 * MIB);
    sh(&format!(
        "sgdisk -v '{shown}' | grep -q 'No problems found'"
    ));
    // A file system that cannot be mended without a question.
    sh(&format!(
        "dd if=/dev/urandom of='{shown}' bs=4096 seek=257 count=40 conv=notrunc 2>/dev/null"
    ));
    let e = shrink(&image, 30 * MIB).unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt, "{e}");
    assert!(e.to_string().contains("e2fsck -f"), "{e}");
    let table = "printf x | dd bs=1 seek=560 conv=notrunc of=";
    sh(&format!("{table}'{shown}'"));
    unchanged(&image, || {
        assert_eq!(shrink(&image, 50 * MIB).unwrap_err().kind(), Kind::Corrupt);
    });
}

/// Goal: what a guest's file system or partition table says of itself is not believed beyond the disk
/// that it is on. Method: a superblock with more blocks than there are, and a table of a larger disk.
#[test]
fn what_claims_more_than_the_disk_has_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let shown = image.display();
    let blocks = |fs: u64| {
        let put = |at: u64| {
            format!(
                "printf '\\377\\377\\377\\377' | dd of='{shown}' bs=1 seek={} conv=notrunc",
                fs + 1024 + at
            )
        };
        format!("{} && {}", put(4), put(336))
    };
    let whole = format!("mke2fs -q -t ext4 -O 64bit '{shown}' && {}", blocks(0));
    let parted = format!(
        "sgdisk -n 1:2048:102399 '{shown}' && mke2fs -q -t ext4 -O 64bit -E offset=1048576 '{shown}' 40M"
    );
    let claims = format!("{parted} && {}", blocks(MIB));
    for make in [whole, claims] {
        let make = format!(
            "rm -f '{shown}' && truncate -s 100M '{shown}' && PATH=$PATH:/sbin:/usr/sbin && {make}"
        );
        for size in [60 * MIB, 100 * MIB, 120 * MIB] {
            sh(&make);
            let e = match size < 100 * MIB {
                true => shrink(&image, size).map(drop),
                false => grow(&image, size).map(drop),
            };
            let e = e.unwrap_err();
            assert_eq!(e.kind(), Kind::Corrupt, "{make}: {e}");
            assert!(e.to_string().contains("says it has"), "{make}: {e}");
        }
    }
    // The partition ends behind the disk: nothing is grown to there.
    sh(&format!(
        "rm -f '{shown}' && truncate -s 4T '{shown}' && PATH=$PATH:/sbin:/usr/sbin \
         && sgdisk -n 1:2048:8000000000 '{shown}' && mke2fs -q -t ext4 -E offset=1048576 '{shown}' 40M \
         && truncate -s 100M '{shown}'"
    ));
    let e = grow(&image, 120 * MIB).unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt, "{e}");
    assert!(e.to_string().contains("behind the disk"), "{e}");
}
