//! A tree of everything that can go wrong.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev};

const NAMES: [&[u8]; 14] = [
    b"with space",
    b" edge ",
    b"quo\"te\"",
    b"\"\"",
    b"back\\slash\\",
    b"-leading",
    b"--",
    b"<12>",
    b"#hash",
    b"!bang",
    b"tab\there",
    b"caf\xc3\xa9",
    b"latin\xe9\xff",
    b"star*?[a]$HOME`id`;|&'",
];

/// Makes the tree below `root`; without what GNU tar has no place for: sockets, and that two names
/// are one node, if it `is_for_tar`.
pub(crate) fn make(root: &Path, is_for_tar: bool) {
    let join = |name: &[u8]| root.join(OsStr::from_bytes(name));
    fs::create_dir_all(root).unwrap();
    for (i, name) in NAMES.iter().enumerate() {
        // Every kind under every name.
        for (kind, prefix) in ["files", "dirs", "links", "pipes", "nodes"].iter().zip(0..) {
            let dir = join(kind.as_bytes());
            fs::create_dir_all(&dir).unwrap();
            let at = dir.join(OsStr::from_bytes(name));
            match prefix {
                0 => fs::write(&at, vec![i as u8 + 1; i * 1000]).unwrap(),
                1 => fs::create_dir(&at).unwrap(),
                2 => symlink(OsStr::from_bytes(name), &at).unwrap(),
                3 => node(&at, FileType::Fifo, 0, 0),
                _ => node(&at, FileType::CharacterDevice, 5, i as u32),
            }
        }
    }
    lines(root);
    for len in [1, 58, 59, 60, 61, 255, 4094, 4095] {
        symlink("x".repeat(len), root.join(format!("link{len}"))).unwrap();
    }
    symlink("/etc/passwd", root.join("absolute")).unwrap();
    symlink("../../../etc/shadow", root.join("up")).unwrap();
    node(&root.join("block"), FileType::BlockDevice, 8, 1);
    node(
        &root.join("large-number"),
        FileType::BlockDevice,
        259,
        0x12345,
    );
    node(&root.join("whiteout"), FileType::CharacterDevice, 0, 0);
    hard_links(root);
    if !is_for_tar {
        fs::hard_link(root.join("block"), root.join("hard/block")).unwrap();
        fs::hard_link(root.join("pipes/<12>"), root.join("hard/-a \"pipe\"")).unwrap();
    }
    contents(root);
    owners_and_modes(root);
    attributes(root);
    fs::create_dir(root.join("empty")).unwrap();
    fs::create_dir(root.join("lost+found")).unwrap();
    fs::write(root.join("lost+found/#12"), "kept").unwrap();
    if !is_for_tar {
        drop(UnixListener::bind(root.join("socket")).unwrap());
        drop(UnixListener::bind(root.join("s0")).unwrap());
    }
    times(root);
}

/// Line ends: in names of files and directories only; debugfs takes no others.
fn lines(root: &Path) {
    fs::write(root.join("files/line\nend"), "a").unwrap();
    fs::create_dir(root.join("dirs/line\r\nend")).unwrap();
    symlink("below", root.join("dirs/line\r\nend/link")).unwrap();
}

fn hard_links(root: &Path) {
    fs::create_dir(root.join("hard")).unwrap();
    fs::write(root.join("hard/one"), "one content, three names").unwrap();
    fs::hard_link(root.join("hard/one"), root.join("hard/two")).unwrap();
    fs::hard_link(root.join("hard/one"), root.join("a-first-name")).unwrap();
    fs::hard_link(root.join("link4095"), root.join("hard/link")).unwrap();
}

fn contents(root: &Path) {
    fs::write(root.join("zero-length"), "").unwrap();
    fs::write(root.join("zeros"), vec![0; 100_000]).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    for i in 0..40 {
        sparse.write_all_at(b"island", i * 23_000_001).unwrap();
    }
    let holes = fs::File::create(root.join("all-hole")).unwrap();
    holes.set_len((5 << 30) + 1).unwrap();
    let long: Vec<u8> = (0..3_000_001u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    fs::write(root.join("long"), long).unwrap();
    let mut deep = root.join("deep");
    for i in 0..60 {
        deep.push(format!("{i}-{}", "d".repeat(20)));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("n".repeat(255)), "deep").unwrap();
    symlink("deep link", deep.join("l".repeat(255))).unwrap();
    let many = root.join("many");
    fs::create_dir(&many).unwrap();
    for i in 0..700 {
        fs::write(many.join(format!("{i}-{}", "m".repeat(i % 200))), "").unwrap();
    }
}

fn owners_and_modes(root: &Path) {
    let owned = |name: &str, uid, gid, mode| {
        let at = root.join(name);
        std::os::unix::fs::lchown(&at, Some(uid), Some(gid)).unwrap();
        if !fs::symlink_metadata(&at).unwrap().is_symlink() {
            fs::set_permissions(&at, fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    fs::write(root.join("setuid"), "#!").unwrap();
    owned("setuid", 0, 42, 0o6755);
    fs::create_dir(root.join("sticky")).unwrap();
    owned("sticky", 1000, 1000, 0o1777);
    fs::write(root.join("nothing"), "no permission at all").unwrap();
    owned("nothing", 65_534, 65_534, 0);
    fs::create_dir(root.join("closed")).unwrap();
    fs::write(root.join("closed/inside"), "x").unwrap();
    owned("closed", 7, 8, 0);
    fs::write(root.join("high"), "ids of 32 bits").unwrap();
    owned("high", 4_000_000_000, 100_000, 0o600);
    owned("absolute", 12, 13, 0);
    owned("block", 0, 6, 0o660);
    owned("pipes/<12>", 5, 5, 0o622);
    owned("", 3, 4, 0o751);
}

fn attributes(root: &Path) {
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(root.join(path), name, value, XattrFlags::empty()).unwrap();
    };
    fs::write(root.join("ping"), "capable").unwrap();
    let mut capability = vec![1, 0, 0, 2, 0, 0x20, 0, 0];
    capability.extend([0; 12]);
    capability[4] = b'\n';
    set("ping", "security.capability", &capability);
    set("ping", "user.text", b"a value with = and \n and \" in it");
    set("ping", "user.empty", b"");
    set("ping", "user.na me=%3D\"q\"", b"odd name");
    set("long", "user.large", &[b'v'; 3500]);
    set("long", "trusted.overlay.opaque", b"y");
    set("link58", "trusted.on-a-link", b"l");
    set("dirs", "user.on-a-dir", b"d");
    set("", "user.on-the-root", b"r");
    let mut acl = vec![2, 0, 0, 0];
    for (tag, perm, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 5, 4242),
        (4, 4, u32::MAX),
        (8, 7, 77),
        (16, 7, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    set("long", "system.posix_acl_access", &acl);
    set("dirs", "system.posix_acl_default", &acl);
    set("dirs", "system.posix_acl_access", &acl);
}

fn times(root: &Path) {
    let mut todo = vec![root.to_path_buf()];
    let mut at = 0;
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        at += 1;
        let sec = match at % 11 {
            0 => -(1 << 31),
            1 => -1,
            2 => 0,
            3 => i64::from(i32::MAX),
            4 => 1 << 31,
            5 => 1 << 33,
            _ => 1_600_000_000 + at * 77,
        };
        let nsec = if at % 3 == 0 {
            0
        } else {
            (at * 123_456_789) % 1_000_000_000
        };
        let time = Timespec {
            tv_sec: sec,
            tv_nsec: nsec,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        assert_eq!(
            fs::symlink_metadata(&path).unwrap().mtime(),
            sec,
            "the host's own times"
        );
    }
}

fn node(at: &Path, kind: FileType, major: u32, minor: u32) {
    rustix::fs::mknodat(
        CWD,
        at,
        kind,
        Mode::from_raw_mode(0o640),
        makedev(major, minor),
    )
    .unwrap();
}
