//! A picture of a whole tree, for comparing what was put into a filesystem with what is in it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::corpus::hex;

/// Path below the root → type and mode, owner, modification time, device number, content or link
/// target, extended attributes (ACLs are some), and the names that are the same file.
pub type Tree = BTreeMap<PathBuf, String>;

/// The tree at `root`, the root itself included. Other filesystems in it are not entered.
pub fn tree(root: &Path) -> Tree {
    let device = fs::symlink_metadata(root).unwrap().dev();
    let mut out = Tree::new();
    let mut links: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_path_buf();
        if meta.dev() != device {
            continue;
        }
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else if meta.nlink() > 1 {
            links.entry(meta.ino()).or_default().push(name.clone());
        }
        out.insert(name, describe(&path, &meta));
    }
    for mut names in links.into_values() {
        names.sort();
        let group = format!(" is {names:?}");
        for name in names {
            out.get_mut(&name).unwrap().push_str(&group);
        }
    }
    out
}

/// One hash over all of a tree.
pub fn digest(tree: &Tree) -> String {
    let mut hash = Sha256::new();
    for (name, text) in tree {
        for part in [name.as_os_str().as_bytes(), text.as_bytes()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    }
    hex(hash)
}

/// Panics with the first differences unless both are the same. A `lost+found` that only `got` has
/// is mke2fs's.
pub fn assert_same(got: &Tree, want: &Tree, what: &str) {
    let mut got = got.clone();
    if !want.contains_key(Path::new("lost+found")) {
        got.remove(Path::new("lost+found"));
    }
    if digest(&got) == digest(want) {
        return;
    }
    let mut names: Vec<_> = got.keys().chain(want.keys()).collect();
    names.sort();
    names.dedup();
    names.retain(|n| got.get(*n) != want.get(*n));
    let show = |n: &&PathBuf| format!("{n:?}\n  got  {:?}\n  want {:?}", got.get(*n), want.get(*n));
    let shown: Vec<_> = names.iter().take(8).map(show).collect();
    panic!(
        "{what}: {} entries differ:\n{}",
        names.len(),
        shown.join("\n")
    );
}

fn describe(path: &Path, meta: &Metadata) -> String {
    let kind = meta.file_type();
    let device = kind.is_char_device() || kind.is_block_device();
    let content = if kind.is_file() {
        format!("{} bytes {}", meta.len(), file_digest(path))
    } else if kind.is_symlink() {
        format!("-> {:?}", fs::read_link(path).unwrap())
    } else {
        String::new()
    };
    format!(
        "{:06o} {}:{} {}.{:09} rdev {:x} {content} {:?}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec(),
        if device { meta.rdev() } else { 0 },
        xattrs(path),
    )
}

/// SHA-256 of a file.
pub fn file_digest(path: &Path) -> String {
    let mut hash = Sha256::new();
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    io::copy(&mut file, &mut HashWriter(&mut hash)).unwrap();
    hex(hash)
}

/// SHA-256 of everything a reader has.
pub fn reader_digest(reader: &mut impl io::Read) -> String {
    let mut hash = Sha256::new();
    io::copy(reader, &mut HashWriter(&mut hash)).unwrap();
    hex(hash)
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.update(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    // The kernel's own limits for a list and for a value.
    let (mut list, mut value) = (vec![0; 65536], vec![0; 65536]);
    let len = rustix::fs::llistxattr(path, &mut list[..]).unwrap_or(0);
    let mut out = BTreeMap::new();
    for name in list[..len].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
        out.insert(
            String::from_utf8_lossy(name).into_owned(),
            value[..len].to_vec(),
        );
    }
    out
}
