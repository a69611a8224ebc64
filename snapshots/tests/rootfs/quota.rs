//! User and group quota in a template: what the file system says of itself. That a kernel counts and
//! enforces it, `tests/guest/scenarios/user_quota` shows.

use std::fs;
use std::path::Path;
use std::process::Command;

use ploop::error::Kind;
use snapshots::rootfs::{BuildOptions, RootSource, add_quota, build, grow};

use crate::host::{fsck, sh};

/// What the tools of ext4 say of the file system at `offset`.
fn said(tool: &str, args: &[&str], image: &Path, offset: u64) -> String {
    let mut command = Command::new(tool);
    command
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(args);
    let out = command.arg(format!("{}?offset={offset}", image.display()));
    String::from_utf8(out.output().unwrap().stdout).unwrap()
}

fn has_quota(image: &Path, offset: u64) {
    let head = said("dumpe2fs", &["-h"], image, offset);
    let features = head.lines().find(|l| l.starts_with("Filesystem features:"));
    assert!(features.unwrap().contains(" quota"), "{head}");
    assert!(head.contains("User quota inode:         3"), "{head}");
    assert!(head.contains("Group quota inode:        4"), "{head}");
    let options = head.lines().find(|l| l.starts_with("Mount options:"));
    assert!(options.unwrap().contains("usrquota,grpquota"), "{head}");
}

/// An archive with files of owners that are far apart: the most blocks of quota per owner.
fn many_owners(dir: &Path) -> RootSource {
    let tar = dir.join("root.tar");
    sh(&format!(
        "mkdir '{0}/r' && cd '{0}/r' && for n in $(seq 300); do echo $n >f$n; \
         tar -rf '{1}' --owner=$((n * 7919003)) --group=$((n * 104729)) f$n; done",
        dir.display(),
        tar.display()
    ));
    RootSource::Tar(tar)
}

#[test]
fn a_built_file_system_counts_every_owner_and_grows_so() {
    let dir = tempfile::tempdir().unwrap();
    let source = many_owners(dir.path());
    for partition in [true, false] {
        let options = BuildOptions {
            partition,
            user_quota: true,
            ..BuildOptions::default()
        };
        let work = dir.path().join(format!("work-{partition}"));
        fs::create_dir(&work).unwrap();
        let mut built = build(&source, &options, &work, &|_| {}).unwrap();
        for size in [built.bytes, 3 << 30] {
            grow(&built.image, size).unwrap();
            built.bytes = size;
            has_quota(&built.image, built.partition_offset);
            // It compares the counts with what is there.
            fsck(&built);
        }
        // debugfs reads the counts of the file system as it is, partition or not.
        for (kind, id) in [("user", 7_919_003u64), ("group", 104_729)] {
            let args = ["-R", &format!("list_quota {kind}")];
            let list = said("debugfs", &args, &built.image, built.partition_offset);
            for n in [1, 150, 300] {
                let line = list
                    .lines()
                    .find(|l| l.split_whitespace().next() == Some(&(n * id).to_string()));
                let line: Vec<&str> = line
                    .unwrap_or_else(|| panic!("{n}: {list}"))
                    .split_whitespace()
                    .collect();
                assert_eq!((line[1], line[4]), ("4096", "1"), "{list}");
            }
        }
    }
}

#[test]
fn an_image_gets_quota_and_keeps_its_options() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let shown = image.display();
    for make in [
        // With the feature already, a second time changes nothing.
        format!("mke2fs -q -t ext4 '{shown}' 64M"),
        format!("mke2fs -q -t ext4 -O quota '{shown}' 64M"),
        format!("mke2fs -q -t ext4 '{shown}' 64M && tune2fs -E mount_opts=data=journal '{shown}'"),
    ] {
        sh(&format!(
            "rm -f '{shown}' && PATH=$PATH:/sbin:/usr/sbin && {make}"
        ));
        for _ in 0..2 {
            assert_eq!(add_quota(&image).unwrap(), 0);
            has_quota(&image, 0);
        }
        let kept = said("dumpe2fs", &["-h"], &image, 0).contains("data=journal,usrquota,grpquota");
        assert_eq!(kept, make.contains("data=journal"));
    }
}

#[test]
fn what_is_not_ext4_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let shown = image.display();
    for (make, named) in [
        (format!("mkfs.xfs -q '{shown}'"), "XFS"),
        ("true".to_owned(), "something unknown"),
        (
            format!("sgdisk -n 2:8192:10000 '{shown}'"),
            "a partition table without partition 1",
        ),
        (
            format!("sgdisk -n 1:2048:10000 '{shown}'"),
            "something unknown",
        ),
    ] {
        sh(&format!(
            "rm -f '{shown}' && truncate -s 400M '{shown}' && PATH=$PATH:/sbin:/usr/sbin && {make}"
        ));
        let e = add_quota(&image).unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported, "{e}");
        assert!(e.to_string().contains(named), "{e}");
        assert_eq!(
            e.to_string().contains("uquota,gquota"),
            named == "XFS",
            "{e}"
        );
    }
}
