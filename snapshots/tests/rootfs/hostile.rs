//! Archives that lie, leave, or end too early: each is an error that says so, and nothing is made
//! outside of the work directory.

use std::fs;
use std::path::{Path, PathBuf};

use ploop::error::{Error, Kind};
use snapshots::rootfs::{BuildOptions, RootSource, build};

use crate::host::{Mounted, names, need_root, sh};

/// Builds from an archive in a place of its own; the work directory is emptied as a caller would,
/// and everything around it must be as before.
fn refused(archive: &Path) -> Error {
    let place = tempfile::tempdir().unwrap();
    let work = place.path().join("a/b/work");
    fs::create_dir_all(&work).unwrap();
    let options = BuildOptions::default();
    let e = build(
        &RootSource::Tar(archive.to_path_buf()),
        &options,
        &work,
        &|_| {},
    )
    .unwrap_err();
    fs::remove_dir_all(&work).unwrap();
    let want: Vec<PathBuf> = ["", "a", "a/b"].iter().map(PathBuf::from).collect();
    assert_eq!(names(place.path()), want);
    e
}

/// An archive made by Python's tarfile: `body` adds members with `add(name, type, **fields)`.
fn archive(dir: &Path, body: &str) -> PathBuf {
    let script = dir.join("make.py");
    let out = dir.join("x.tar");
    let text = format!(
        "import tarfile, io\n\
         t = tarfile.open({out:?}, 'w', format=tarfile.PAX_FORMAT)\n\
         def add(name, type=tarfile.REGTYPE, data=b'', **fields):\n\
         \x20   i = tarfile.TarInfo(name); i.type = type; i.size = len(data); i.mode = 0o644\n\
         \x20   for k, v in fields.items(): setattr(i, k, v)\n\
         \x20   t.addfile(i, io.BytesIO(data))\n\
         FILE, LINK, SYM, DIR, CHR = (tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE,\n\
         \x20   tarfile.DIRTYPE, tarfile.CHRTYPE)\n\
         {body}\n\
         t.close()\n"
    );
    fs::write(&script, text).unwrap();
    sh(&format!("/usr/bin/python3 '{}'", script.display()));
    out
}

#[test]
fn names_that_leave_the_root_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (body, name, why) in [
        ("add('../out')", "../out", "\"..\""),
        ("add('a/../../out')", "a/../../out", "\"..\""),
        ("add('a/..')", "a/..", "\"..\""),
        ("add('/etc/passwd2')", "/etc/passwd2", "absolute"),
        (
            "add('s', SYM, linkname='/tmp'); add('s/x')",
            "s/x",
            "symbolic link",
        ),
        (
            "add('s', SYM, linkname='..'); add('s/d', DIR)",
            "s/d",
            "symbolic link",
        ),
        (
            "add('s', SYM, linkname='.'); add('s/l', LINK, linkname='s')",
            "s/l",
            "symbolic link",
        ),
        (
            "add('h', LINK, linkname='missing')",
            "missing",
            "no earlier file",
        ),
        (
            "add('h', LINK, linkname='/etc/passwd')",
            "/etc/passwd",
            "absolute",
        ),
        ("add('h', LINK, linkname='../x')", "../x", "\"..\""),
        (
            "add('d', DIR); add('h', LINK, linkname='d')",
            "\"h\"",
            "directory",
        ),
        ("add('f'); add('f/g')", "f/g", "not a directory"),
        ("add('d/f'); add('d')", "\"d\"", "holds names"),
        ("add('.', SYM, linkname='x')", "\".\"", "root"),
        ("add('n' * 256)", "nnnn", "255"),
        ("add('d/' * 401 + 'f')", "d/d/d/", "400"),
        ("add(('d' * 100 + '/') * 41 + 'f')", "ddd/d", "4095"),
        ("add('l', SYM, linkname='x' * 5000)", "\"l\"", "4095"),
        ("add('l\\nx', SYM, linkname='x')", "l\\nx", "line end"),
        (
            "add('x', CHR, devmajor=5000, devminor=1)",
            "\"x\"",
            "5000:1",
        ),
        ("add('u', uid=1 << 33)", "\"u\"", "32 bits"),
        ("add('t', mtime=1e12)", "\"t\"", "2446"),
        (
            "add('a', pax_headers={'SCHILY.xattr.odd.name': 'v'})",
            "odd.name",
            "no extended",
        ),
        (
            "add('a', pax_headers={'SCHILY.xattr.user.a': 'v' * 9000})",
            "\"a\"",
            "4 KiB",
        ),
        (
            "add('a', pax_headers={'SCHILY.acl.access': 'user:joe:rwx'})",
            "joe",
            "numeric-owner",
        ),
        ("add('lost+found')", "lost+found", "directory"),
        ("add('z', b'Z')", "\"z\"", "type 'Z'"),
    ] {
        let e = refused(&archive(dir.path(), body));
        let text = e.to_string();
        assert!(text.contains(name) && text.contains(why), "{body}: {text}");
        assert!(
            matches!(e.kind(), Kind::Invalid | Kind::Unsupported),
            "{body}: {e:?}"
        );
    }
}

#[test]
fn legitimate_oddities_are_kept() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let body = "add('./a//b/./c', data=b'one', mtime=-5)\n\
                add('a/b/c', data=b'two', mtime=-5.5)\n\
                add('dev/null', CHR, devmajor=1, devminor=3)\n\
                add('null', LINK, linkname='dev/null')\n\
                add('f', data=b'x'); add('f', DIR); add('f/g')\n\
                add('h', LINK, linkname='./a/b/c'); add('a/b/c', data=b'three')\n\
                add('cap', pax_headers={'SCHILY.acl.access':\n\
                \x20   'user::rwx,user:7:r--,group::r--,mask::r--,other::---'})";
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    let source = RootSource::Tar(archive(dir.path(), body));
    let built = build(&source, &BuildOptions::default(), &work, &|_| {}).unwrap();
    let mounted = Mounted::read_only(&built);
    let read = |name| fs::read_to_string(mounted.path().join(name)).unwrap();
    assert_eq!(
        (read("a/b/c"), read("h"), read("f/g")),
        ("three".into(), "two".into(), "".into())
    );
    let meta = fs::metadata(mounted.path().join("h")).unwrap();
    let time = std::os::unix::fs::MetadataExt::mtime(&meta);
    assert_eq!(
        (time, std::os::unix::fs::MetadataExt::mtime_nsec(&meta)),
        (-6, 500_000_000)
    );
    sh(&format!(
        "cd '{}'; test -c null; test null -ef dev/null",
        mounted.path().display()
    ));
    let mut acl = [0; 64];
    let at = mounted.path().join("cap");
    assert_eq!(
        rustix::fs::getxattr(&at, "system.posix_acl_access", &mut acl).unwrap(),
        44
    );
}

#[test]
fn archives_that_were_cut_short_are_not_half_imported() {
    let dir = tempfile::tempdir().unwrap();
    let tar = archive(
        dir.path(),
        "for i in range(50): add('f%d' % i, data=bytes(range(256)) * 9)",
    );
    let whole = fs::read(&tar).unwrap();
    let cut = dir.path().join("cut");
    sh(&format!("gzip -k '{0}' && zstd -q '{0}'", tar.display()));
    for name in ["x.tar", "x.tar.gz", "x.tar.zst"] {
        let bytes = fs::read(dir.path().join(name)).unwrap();
        // Inside a header, at a member's end, in the middle, and just before the end.
        for at in [700, 3072, bytes.len() / 2, bytes.len() - 1] {
            if at >= bytes.len() || name == "x.tar" && at == bytes.len() - 1 {
                continue;
            }
            fs::write(&cut, &bytes[..at]).unwrap();
            let e = refused(&cut);
            assert_eq!(e.kind(), Kind::Corrupt, "{name} cut at {at}: {e}");
        }
    }
    // One bit of a compressed archive, and one of a header.
    for (name, at) in [
        ("x.tar.gz", 300),
        ("x.tar.zst", 300),
        ("x.tar", 3 * 3072 + 2),
    ] {
        let mut bytes = fs::read(dir.path().join(name)).unwrap();
        bytes[at] ^= 0x10;
        fs::write(&cut, &bytes).unwrap();
        assert_eq!(refused(&cut).kind(), Kind::Corrupt, "{name}");
    }
    assert!(whole.len() > 100_000);
}

#[test]
fn numbers_that_lie_cost_neither_memory_nor_disk() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("lie.tar");
    let header = |kind: u8, size: &[u8; 12]| {
        let mut h = [0u8; 512];
        h[..3].copy_from_slice(b"big");
        h[100..107].copy_from_slice(b"0000644");
        for at in [108, 116] {
            h[at..at + 7].copy_from_slice(b"0000000");
        }
        h[124..136].copy_from_slice(size);
        h[136..147].copy_from_slice(b"00000000000");
        h[156] = kind;
        h[257..265].copy_from_slice(b"ustar  \0");
        h[148..156].fill(b' ');
        let sum: u32 = h.iter().map(|&b| u32::from(b)).sum();
        h[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        h
    };
    let exbi8: [u8; 12] = [
        0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    let all: [u8; 12] = [
        0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    let tib = b"77777777777\0";
    for kind in [b'0', b'5', b'2', b'L', b'K', b'x', b'g', b'S', b'D'] {
        for size in [&exbi8, &all, tib] {
            fs::write(&at, header(kind, size)).unwrap();
            let e = refused(&at);
            assert!(e.kind() != Kind::Io, "{}: {e}", char::from(kind));
        }
    }
    let sparse = archive(
        dir.path(),
        "add('s', data=b'1\\n0\\n1\\n'.ljust(512, b'\\0') + b'x', pax_headers={\n\
         \x20   'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.name': 's',\n\
         \x20   'GNU.sparse.realsize': str(2**63)})",
    );
    assert!(
        refused(&sparse)
            .to_string()
            .contains("longer than a file in ext4")
    );
    let sparse = archive(
        dir.path(),
        "add('s', data=b'99999999999999\\n0\\n1\\n'.ljust(512, b'\\0'), pax_headers={\n\
         \x20   'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.realsize': '9'})",
    );
    assert_eq!(refused(&sparse).kind(), Kind::Corrupt);
}

#[test]
fn what_is_no_tar_archive_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("x");
    for (bytes, what) in [
        (&b""[..], "not a tar"),
        (b"hello", "not a tar"),
        (&[0x41; 5000], "not a tar"),
        (&[0; 10_240], "no member"),
        (b"\xfd7zXZ\0\0\0", "xz -dc"),
        (b"BZh91AY&SY", "bzip2 -dc"),
        (b"\x1f\x8b\x08\0garbage that is no stream", "archive"),
        (b"\x28\xb5\x2f\xfdgarbage", "damaged"),
    ] {
        fs::write(&at, bytes).unwrap();
        let text = refused(&at).to_string();
        assert!(text.contains(what), "{what}: {text}");
    }
    assert_eq!(refused(dir.path()).kind(), Kind::Invalid);
    assert_eq!(refused(&dir.path().join("missing")).kind(), Kind::NotFound);
}

#[test]
fn a_full_host_is_said_and_what_was_made_can_be_removed() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let body = "import os\nfor i in range(30): add('f%d' % i, data=os.urandom(1 << 20))";
    let tar = archive(dir.path(), body);
    let small = dir.path().join("small");
    // Full while the members are staged, and full while the image is filled.
    for size in ["20m", "45m"] {
        fs::create_dir(&small).unwrap();
        sh(&format!(
            "mount -t tmpfs -o size={size} none '{}'",
            small.display()
        ));
        let work = small.join("work");
        fs::create_dir(&work).unwrap();
        let source = RootSource::Tar(tar.clone());
        let result = build(&source, &BuildOptions::default(), &work, &|_| {});
        let removed = fs::remove_dir_all(&work);
        sh(&format!("umount '{0}' && rmdir '{0}'", small.display()));
        let e = result.unwrap_err();
        assert_eq!(e.kind(), Kind::NoSpace, "{size}: {e}");
        removed.unwrap();
    }
}

#[test]
fn directories_that_cannot_be_read_whole_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("source/work");
    fs::create_dir_all(&work).unwrap();
    let build = |source: &Path| {
        build(
            &RootSource::Dir(source.to_path_buf()),
            &BuildOptions::default(),
            &work,
            &|_| {},
        )
        .unwrap_err()
    };
    let e = build(&dir.path().join("source"));
    assert!(e.to_string().contains("outside"), "{e}");
    fs::remove_dir_all(work.join("content")).unwrap();
    let e = build(Path::new("/proc/self/fdinfo"));
    assert!(e.to_string().contains("changed while"), "{e}");
    fs::remove_dir_all(work.join("content")).unwrap();
    let e = build(&dir.path().join("missing"));
    assert_eq!(e.kind(), Kind::NotFound);
    fs::remove_dir_all(work.join("content")).unwrap();
    let pipe = dir.path().join("line");
    fs::create_dir(&pipe).unwrap();
    sh(&format!("mkfifo '{}'/$'a\\nb'", pipe.display()));
    let e = build(&pipe);
    assert!(e.to_string().contains("a\\nb"), "{e}");
}
