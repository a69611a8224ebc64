//! Import of root file systems: what goes in comes out of a mount, whoever does it.

#![allow(clippy::unwrap_used)]

mod host;
mod hostile;
mod quota;
mod shrink;
mod tricky;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use host::{Mounted, assert_same, fsck, need_root, sh};
use snapshots::rootfs::{BuildOptions, Built, Grown, RootSource, Step, build, grow};

fn import(source: &RootSource, options: &BuildOptions, work: &Path) -> Built {
    fs::create_dir_all(work).unwrap();
    let built = build(source, options, work, &|_| {}).unwrap();
    fsck(&built);
    built
}

fn whole() -> BuildOptions {
    BuildOptions {
        partition: false,
        ..BuildOptions::default()
    }
}

fn assert_imported(built: &Built, source: &Path) {
    let mounted = Mounted::read_only(built);
    assert_same(mounted.path(), source);
}

#[test]
fn a_directory_comes_out_as_it_went_in() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    tricky::make(&root, false);
    let source = RootSource::Dir(root.clone());
    let built = import(&source, &BuildOptions::default(), &dir.path().join("a"));
    assert_eq!(
        (built.partition_offset, built.bytes % (1 << 20)),
        (1 << 20, 0)
    );
    sh(&format!(
        "sgdisk -v '{}' | grep -q 'No problems found'",
        built.image.display()
    ));
    assert_imported(&built, &root);
    // A large directory has its index (flag 0x1000).
    sh(&format!(
        "debugfs -R 'stat /many' '{}?offset=1048576' 2>/dev/null | grep -q 'Flags: 0x81000'",
        built.image.display()
    ));
    let built = import(&source, &whole(), &dir.path().join("b"));
    assert_eq!(
        (built.partition_offset, built.partition_bytes),
        (0, built.bytes)
    );
    assert_imported(&built, &root);
}

#[test]
fn archives_of_gnu_tar_come_out_as_they_went_in() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    tricky::make(&root, true);
    let all = "--xattrs --xattrs-include='*' --acls --numeric-owner -S";
    for (i, options) in [
        format!("{all} --format=posix"),
        format!("{all} --format=posix --sparse-version=0.1 -z"),
        format!("{all} --format=posix --sparse-version=0.0 --zstd"),
    ]
    .iter()
    .enumerate()
    {
        let (at, archive) = (root.display(), dir.path().join(format!("{i}.tar")));
        sh(&format!(
            "tar -C '{at}' {options} -cf '{}' .",
            archive.display()
        ));
        let work = dir.path().join(format!("work{i}"));
        let built = import(&RootSource::Tar(archive), &whole(), &work);
        assert_imported(&built, &root);
        fs::remove_dir_all(&work).unwrap();
    }
}

/// GNU's own format has no attributes and whole seconds; the tree is made to have none, too.
#[test]
fn the_gnu_format_with_long_names_large_owners_and_sparse_files() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let (first, root) = (dir.path().join("first"), dir.path().join("root"));
    tricky::make(&first, true);
    let (from, to) = (first.display(), root.display());
    let archive = dir.path().join("x.tar");
    sh(&format!(
        "tar -C '{from}' -S --format=gnu --no-xattrs -cf '{}' . && mkdir '{to}' && \
         tar -C '{to}' --numeric-owner -xpf '{}'",
        archive.display(),
        archive.display()
    ));
    let built = import(
        &RootSource::Tar(archive),
        &whole(),
        &dir.path().join("work"),
    );
    assert_imported(&built, &root);
}

#[test]
fn root_and_nobody_make_the_same_of_one_archive() {
    if let Some(archive) = std::env::var_os(ARCHIVE) {
        return build_as_somebody_else(archive.into());
    }
    need_root();
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let root = dir.path().join("root");
    tricky::make(&root, true);
    let archive = dir.path().join("x.tar");
    let all = "--xattrs --xattrs-include='*' --format=posix --numeric-owner";
    sh(&format!(
        "tar -C '{}' {all} -cSf '{}' .",
        root.display(),
        archive.display()
    ));
    sh(&format!("chmod 644 '{}'", archive.display()));
    // This very program, as another user, in a place that he may read.
    let program = dir.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    std::os::unix::fs::chown(&work, Some(65_534), Some(65_534)).unwrap();
    let out = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all",
        ])
        .arg(&program)
        .args([
            "--exact",
            "root_and_nobody_make_the_same_of_one_archive",
            "--nocapture",
        ])
        .env(ARCHIVE, &archive)
        .env(WORK, &work)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
    let image = work.join("disk.raw");
    let bytes = fs::metadata(&image).unwrap().len();
    let mounted = Mounted::new(&image, 1 << 20, bytes - (2 << 20), "ro");
    assert_same(mounted.path(), &root);
}

/// Set for the process of the test above that is another user's.
const ARCHIVE: &str = "PLOOP_TEST_ARCHIVE";
const WORK: &str = "PLOOP_TEST_WORK";

fn build_as_somebody_else(archive: std::path::PathBuf) {
    assert!(!rustix::process::geteuid().is_root());
    let work = std::path::PathBuf::from(std::env::var_os(WORK).unwrap());
    let source = RootSource::Tar(archive);
    fsck(&build(&source, &BuildOptions::default(), &work, &|_| {}).unwrap());
    let second = work.join("second");
    fs::create_dir(&second).unwrap();
    let closed = RootSource::Dir("/root".into());
    let e = build(&closed, &BuildOptions::default(), &second, &|_| {}).unwrap_err();
    assert_eq!(e.kind(), ploop::error::Kind::Permission, "{e}");
}

#[test]
fn nothing_but_the_image_and_the_scripts_is_left_in_the_work_directory() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/hostname"), "a").unwrap();
    let work = dir.path().join("work");
    let options = BuildOptions {
        label: Some("rootfs".into()),
        ..BuildOptions::default()
    };
    fs::create_dir(&work).unwrap();
    let steps = std::cell::RefCell::new(Vec::new());
    let built = build(&RootSource::Dir(root), &options, &work, &|p| {
        steps.borrow_mut().push(p.step);
    })
    .unwrap();
    assert_eq!(
        (built.bytes, built.entries, built.content_bytes),
        (64 << 20, 3, 4096)
    );
    steps.borrow_mut().dedup();
    assert_eq!(
        steps.into_inner(),
        [Step::Read, Step::Make, Step::Attributes, Step::Check]
    );
    sh(&format!(
        "dumpe2fs -h '{}?offset=1048576' 2>/dev/null | grep -q 'volume name: *rootfs'",
        built.image.display()
    ));
    assert!(!work.join("plain").exists());
    assert_eq!(
        fs::metadata(&built.image).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn a_size_is_kept_and_one_too_small_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let noise: Vec<u8> = (0..24 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 9) as u8)
        .collect();
    fs::write(root.join("noise"), noise).unwrap();
    let source = RootSource::Dir(root);
    let sized = |size, name: &str| {
        let work = dir.path().join(name);
        fs::create_dir(&work).unwrap();
        let options = BuildOptions {
            size: Some(size),
            ..BuildOptions::default()
        };
        build(&source, &options, &work, &|_| {})
    };
    let built = sized(100 << 30, "large").unwrap();
    assert_eq!(fs::metadata(&built.image).unwrap().len(), 100 << 30);
    fsck(&built);
    for (name, size) in [("below", 16 << 20), ("just", 26 << 20)] {
        let e = sized(size, name).unwrap_err();
        assert_eq!(e.kind(), ploop::error::Kind::NoSpace, "{e}");
        assert!(e.to_string().contains("larger size"), "{e}");
    }
    assert!(
        sized((64 << 20) + 1, "odd")
            .unwrap_err()
            .to_string()
            .contains("multiple of 4096")
    );
}

#[test]
fn a_disk_grows_with_what_is_on_it() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    sh(&format!("cp -a /usr/share/perl* /etc '{}'", root.display()));
    for partition in [true, false] {
        let options = BuildOptions {
            partition,
            ..BuildOptions::default()
        };
        let work = dir.path().join(format!("work-{partition}"));
        let mut built = import(&RootSource::Dir(root.clone()), &options, &work);
        for size in [built.bytes, 1 << 30, 9 << 30, 200 << 30] {
            let grown = grow(&built.image, size).unwrap();
            let frame = if partition { 2 << 20 } else { 0 };
            let bytes = size - frame;
            assert_eq!(
                grown,
                Grown {
                    filesystem: true,
                    bytes,
                    reason: None
                }
            );
            (built.bytes, built.partition_bytes) = (size, bytes);
            if partition {
                sh(&format!(
                    "sgdisk -v '{}' | grep -q 'No problems'",
                    built.image.display()
                ));
            }
            fsck(&built);
        }
        assert_imported(&built, &root);
        let taken = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&built.image).unwrap());
        assert!(
            taken * 512 < 1 << 30,
            "a grown disk stays sparse: {} bytes",
            taken * 512
        );
        let e = grow(&built.image, 1 << 30).unwrap_err();
        assert_eq!(e.kind(), ploop::error::Kind::Invalid);
        assert_eq!(fs::metadata(&built.image).unwrap().len(), 200 << 30);
    }
}

#[test]
fn what_is_not_ext4_grows_as_a_disk_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let only = |what: &str| {
        let grown = grow(&image, 600 << 20).unwrap();
        assert_eq!((grown.filesystem, grown.bytes), (false, 600 << 20));
        assert!(grown.reason.as_ref().unwrap().contains(what), "{grown:?}");
    };
    sh(&format!(
        "truncate -s 400M '{0}' && mkfs.xfs -q '{0}'",
        image.display()
    ));
    only("XFS");
    assert_eq!(fs::metadata(&image).unwrap().len(), 600 << 20);
    sh(&format!(
        "rm '{0}' && truncate -s 400M '{0}'",
        image.display()
    ));
    only("unknown");
    sh(&format!(
        "sgdisk -n 1:2048:4095 -n 2:8192:10000 '{0}'",
        image.display()
    ));
    only("another partition");
    sh(&format!(
        "sgdisk -v '{0}' | grep -q 'No problems'",
        image.display()
    ));
    sh(&format!(
        "printf x | dd of='{0}' bs=1 seek=560 conv=notrunc",
        image.display()
    ));
    let e = grow(&image, 700 << 20).unwrap_err();
    assert_eq!(e.kind(), ploop::error::Kind::Corrupt);
    assert_eq!(fs::metadata(&image).unwrap().len(), 600 << 20, "untouched");
}
