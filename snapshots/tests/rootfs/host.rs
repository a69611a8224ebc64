//! What the tests need of the host: root, mounts, and a picture of a whole tree.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use snapshots::rootfs::Built;

/// A tree: for each path everything that an import must keep.
pub(crate) type Picture = BTreeMap<Vec<u8>, String>;

/// Runs a shell command; its failure is the test's.
pub(crate) fn sh(command: &str) {
    let out = Command::new("bash")
        .args(["-ec", command])
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

pub(crate) fn need_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests mount images: run them as root"
    );
}

/// A mounted image; unmounted when dropped.
#[derive(Debug)]
pub(crate) struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn read_only(built: &Built) -> Mounted {
        Mounted::new(
            &built.image,
            built.partition_offset,
            built.partition_bytes,
            "ro",
        )
    }

    pub(crate) fn new(image: &Path, offset: u64, bytes: u64, options: &str) -> Mounted {
        need_root();
        let dir = tempfile::tempdir().unwrap();
        let all = format!("loop,{options},offset={offset},sizelimit={bytes}");
        sh(&format!(
            "mount -t ext4 -o {all} '{}' '{}'",
            image.display(),
            dir.path().display()
        ));
        Mounted { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(self.dir.path()).status();
        assert!(
            done.is_ok_and(|s| s.success()),
            "cannot unmount {}",
            self.dir.path().display()
        );
    }
}

/// Checks the file system of an image that nobody has mounted.
pub(crate) fn fsck(built: &Built) {
    sh(&format!(
        "e2fsck -fn '{}?offset={}'",
        built.image.display(),
        built.partition_offset
    ));
}

/// Everything below `root`, and the root; without a `lost+found` that mke2fs made.
pub(crate) fn picture(root: &Path) -> Picture {
    let mut out = Picture::new();
    let mut groups: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let name = path
            .strip_prefix(root)
            .unwrap()
            .as_os_str()
            .as_bytes()
            .to_vec();
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else if meta.nlink() > 1 {
            groups.entry(meta.ino()).or_default().push(name.clone());
        }
        out.insert(name, describe(&path, &meta));
    }
    for mut names in groups.into_values() {
        names.sort();
        for name in &names {
            let all: Vec<_> = names.iter().map(|n| String::from_utf8_lossy(n)).collect();
            out.get_mut(name)
                .unwrap()
                .push_str(&format!(" links {all:?}"));
        }
    }
    out
}

fn describe(path: &Path, meta: &fs::Metadata) -> String {
    let kind = meta.file_type();
    let rdev = if kind.is_char_device() || kind.is_block_device() {
        meta.rdev()
    } else {
        0
    };
    let content = if kind.is_file() {
        format!("{} bytes {:08x}", meta.len(), crc(path))
    } else if kind.is_symlink() {
        format!("-> {:?}", fs::read_link(path).unwrap())
    } else {
        String::new()
    };
    format!(
        "{:06o} {}:{} {}.{:09} rdev {rdev:x} {content} {:?}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec(),
        xattrs(path)
    )
}

/// A checksum over the blocks that hold anything, with their places.
fn crc(path: &Path) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    let mut file = File::open(path).unwrap();
    let mut block = vec![0; 4096];
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
        at = data / 4096 * 4096;
        file.seek(SeekFrom::Start(at)).unwrap();
        while at < end {
            let n = (&file).take(4096).read(&mut block).unwrap();
            if block[..n].iter().any(|&b| b != 0) {
                hash.update(&at.to_le_bytes());
                hash.update(&block[..n]);
            }
            at += n as u64;
        }
    }
    hash.finalize()
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    let mut list = vec![0; 65536];
    let n = rustix::fs::llistxattr(path, &mut list[..]).unwrap_or(0);
    for name in list[..n].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0; 65536];
        let n = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(n);
        out.insert(String::from_utf8_lossy(name).into_owned(), value);
    }
    out
}

/// The trees are the same; says the first differences otherwise.
pub(crate) fn assert_same(got: &Path, want: &Path) {
    let (mut got, want) = (picture(got), picture(want));
    if !want.contains_key(&b"lost+found"[..]) {
        assert!(
            got.remove(&b"lost+found"[..]).is_some(),
            "lost+found is missing"
        );
    }
    let mut differences = Vec::new();
    for name in got.keys().chain(want.keys()) {
        if got.get(name) != want.get(name) {
            let name_text = String::from_utf8_lossy(name);
            differences.push(format!(
                "{name_text}\n  {:?}\n  {:?}",
                got.get(name),
                want.get(name)
            ));
        }
    }
    differences.dedup();
    assert!(
        differences.is_empty(),
        "{} differ:\n{}",
        differences.len(),
        differences[..differences.len().min(8)].join("\n")
    );
}

/// All names in a directory tree, for "nothing was left behind".
pub(crate) fn names(root: &Path) -> Vec<PathBuf> {
    picture(root)
        .into_keys()
        .map(|k| PathBuf::from(std::ffi::OsStr::from_bytes(&k)))
        .collect()
}
