//! A file system in memory, for unit and model tests.
//!
//! It answers as the host's would: the same results, and for a refused call the same error number.
//! Open files outlive their names; locks belong to the open file. What differs:
//!
//! * Paths start at the store's own `/`, relative ones too. There are no links and no permissions:
//!   a mode is taken and ignored.
//! * Nothing is ever lost, so `sync` does nothing; [`super::recording`] is where power fails.
//! * `zero` keeps no space, since there is none to run out of.
//!
//! ```text
//!   MemoryStore ── Names (one mutex) ── directories: name → inode number
//!                     └─ files: inode number → Node ── Pages (one lock per file)
//!                                                └─ locks, by open file
//! ```
//!
//! [`MemoryStore::snapshot`] is a deep copy that shares pages until either side writes them.

mod file;
mod names;
mod pages;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::{Access, EntryKind, FileId, FileSystem, Store, StoreFile};
use crate::error::{Error, Result};
use file::{MemoryFile, Node};
use names::Names;

pub(super) use pages::{PAGE, Pages};

/// The inode number of `/`.
pub(super) const ROOT: u64 = 1;

/// A directory: name to inode number.
pub(super) type Dir = BTreeMap<OsString, u64>;

/// A whole file system as a value. Cloning copies pointers, not bytes.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) dirs: Arc<BTreeMap<u64, Dir>>,
    pub(super) files: BTreeMap<u64, Arc<Pages>>,
}

/// A file system in memory. A clone is the same file system; see [`MemoryStore::snapshot`] for a
/// copy. No call blocks for longer than another call's copying.
#[derive(Clone)]
pub struct MemoryStore {
    fs: Arc<Fs>,
}

struct Fs {
    dev: u64,
    names: Mutex<Names>,
    handles: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn os(what: impl Into<String>, path: &Path) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::io(what, path, errno.into())
}

impl Default for MemoryStore {
    fn default() -> MemoryStore {
        MemoryStore::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryStore({})", self.fs.dev)
    }
}

impl MemoryStore {
    /// An empty file system: `/` and nothing in it.
    pub fn new() -> MemoryStore {
        let root = BTreeMap::from([(ROOT, Dir::new())]);
        MemoryStore::from_disk(&Disk {
            dirs: Arc::new(root),
            files: BTreeMap::new(),
        })
    }

    /// An empty file system as the trait object that the rest of the core takes.
    pub fn shared() -> Arc<dyn Store> {
        Arc::new(MemoryStore::new())
    }

    /// A copy of every name and byte as they are now; later changes of either do not reach the
    /// other. Open files stay with the original, and so do locks. Costs a pointer per file, and
    /// per page of a file on its first write after.
    pub fn snapshot(&self) -> MemoryStore {
        MemoryStore::from_disk(&self.to_disk())
    }

    pub(super) fn from_disk(disk: &Disk) -> MemoryStore {
        static DEVICES: AtomicU64 = AtomicU64::new(1);
        let top = disk.files.keys().chain(disk.dirs.keys()).max();
        let names = Names {
            dirs: BTreeMap::clone(&disk.dirs),
            files: disk
                .files
                .iter()
                .map(|(&ino, pages)| (ino, Node::of(pages)))
                .collect(),
            next: top.copied().unwrap_or(ROOT),
        };
        MemoryStore {
            fs: Arc::new(Fs {
                dev: DEVICES.fetch_add(1, Ordering::Relaxed),
                names: Mutex::new(names),
                handles: AtomicU64::new(0),
            }),
        }
    }

    pub(super) fn to_disk(&self) -> Disk {
        let names = self.names();
        Disk {
            dirs: Arc::new(names.dirs.clone()),
            files: names
                .files
                .iter()
                .map(|(&ino, node)| (ino, Arc::clone(&node.read())))
                .collect(),
        }
    }

    /// The directory and the name in it that a path means, and the inode there, if any.
    pub(super) fn locate(&self, path: &Path) -> Option<(u64, OsString, Option<u64>)> {
        let names = self.names();
        let place = names.place(path).ok()?;
        let ino = names.found(&place).ok()?;
        Some((place.dir(), place.name?, ino))
    }

    /// The inode number of a directory.
    pub(super) fn dir_id(&self, path: &Path) -> Result<u64> {
        self.names()
            .find_dir(path)
            .map_err(os("open directory", path))
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        locked(&self.fs.names)
    }

    fn file(&self, path: &Path, access: Access, ino: u64, node: Arc<Node>) -> Arc<dyn StoreFile> {
        let id = FileId {
            dev: self.fs.dev,
            ino,
        };
        let handle = self.fs.handles.fetch_add(1, Ordering::Relaxed);
        Arc::new(MemoryFile {
            path: path.to_path_buf(),
            id,
            access,
            node,
            handle,
        })
    }
}

#[derive(Debug)]
struct Lossless;

impl FileSystem for Lossless {
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

impl Store for MemoryStore {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        let names = self.names();
        let ino = names.find(path).map_err(os("open", path))?;
        let node = names.files.get(&ino).cloned();
        let node = node.ok_or_else(|| Error::invalid("not a regular file").on(path))?;
        Ok(self.file(path, access, ino, node))
    }

    fn create(&self, path: &Path, _mode: u32) -> Result<Arc<dyn StoreFile>> {
        let (ino, node) = self.names().create(path).map_err(os("create", path))?;
        Ok(self.file(path, Access::Write, ino, node))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let what = format!("rename to {}", to.display());
        self.names().rename(from, to, true).map_err(os(what, from))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        let what = format!("rename to {}", to.display());
        self.names().rename(from, to, false).map_err(os(what, from))
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        let what = format!("link to {}", to.display());
        self.names().hard_link(from, to).map_err(os(what, from))
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.names().remove_file(path).map_err(os("remove", path))
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.names()
            .create_dir(path)
            .map_err(os("create directory", path))
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        self.names()
            .remove_dir(path)
            .map_err(os("remove directory", path))
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.dir_id(path).map(drop)
    }

    fn file_system(&self, path: &Path) -> Result<Option<Box<dyn FileSystem>>> {
        self.dir_id(path)?;
        Ok(Some(Box::new(Lossless)))
    }

    fn list(&self, path: &Path) -> Result<Vec<PathBuf>> {
        self.names().list(path).map_err(os("list directory", path))
    }

    fn kind(&self, path: &Path) -> Result<Option<EntryKind>> {
        let names = self.names();
        match names.find(path) {
            Ok(ino) if names.dirs.contains_key(&ino) => Ok(Some(EntryKind::Dir)),
            Ok(_) => Ok(Some(EntryKind::File)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(os("stat", path)(errno)),
        }
    }

    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        self.names().resolve(path).map_err(os("find", path))
    }
}
