//! A store with somebody in front of it: who sees each call before it is made, and may refuse it,
//! do something else meanwhile, or never let it return.
//!
//! Calls made by the watcher itself, on the same thread, pass unseen.

use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use ploop::Result;
use ploop::error::Error;
use ploop::store::{Access, EntryKind, FileSystem, Store, StoreFile};

/// What a call does to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Look,
    /// Changes bytes, lengths, space or names.
    Change,
    /// Makes something durable.
    Sync,
}

/// A call that is about to be made.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// `write`, `sync`, `rename` …
    pub what: &'static str,
    /// On which file or name.
    pub path: &'a Path,
    /// Of which kind.
    pub kind: Kind,
}

type Watcher = Arc<dyn Fn(&Call<'_>) -> Result<()> + Send + Sync>;

/// See the module text. A clone is the same store.
#[derive(Clone)]
pub struct FrontStore {
    inner: Arc<dyn Store>,
    watcher: Arc<RwLock<Option<Watcher>>>,
}

thread_local! {
    static WATCHING: Cell<bool> = const { Cell::new(false) };
}

/// The error of a call in a process that is no more.
pub fn killed(path: &Path) -> Error {
    Error::io("call", path, std::io::Error::other("the process is killed"))
}

impl fmt::Debug for FrontStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrontStore({:?})", self.inner)
    }
}

impl FrontStore {
    /// In front of `inner`; nobody watches yet.
    pub fn new(inner: Arc<dyn Store>) -> FrontStore {
        FrontStore {
            inner,
            watcher: Arc::default(),
        }
    }

    /// From now on `watcher` is called before each call of every thread, and its error is the
    /// call's.
    pub fn watch(&self, watcher: impl Fn(&Call<'_>) -> Result<()> + Send + Sync + 'static) {
        *self.watcher.write().unwrap() = Some(Arc::new(watcher));
    }

    /// Nobody watches any more. Does not wait for a watcher that is being called.
    pub fn unwatch(&self) {
        *self.watcher.write().unwrap() = None;
    }

    fn see(&self, what: &'static str, path: &Path, kind: Kind) -> Result<()> {
        let watcher = self.watcher.read().unwrap().clone();
        let Some(watcher) = watcher.filter(|_| !WATCHING.get()) else {
            return Ok(());
        };
        WATCHING.set(true);
        let seen = watcher(&Call { what, path, kind });
        WATCHING.set(false);
        seen
    }

    fn wrap(&self, inner: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(FrontFile {
            store: self.clone(),
            inner,
        })
    }
}

impl Store for FrontStore {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        self.see("open", path, Kind::Look)?;
        Ok(self.wrap(self.inner.open(path, access)?))
    }

    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>> {
        self.see("create", path, Kind::Change)?;
        Ok(self.wrap(self.inner.create(path, mode)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.see("rename", to, Kind::Change)?;
        self.inner.rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        self.see("rename", to, Kind::Change)?;
        self.inner.rename_new(from, to)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        self.see("link", to, Kind::Change)?;
        self.inner.hard_link(from, to)
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.see("remove", path, Kind::Change)?;
        self.inner.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.see("create directory", path, Kind::Change)?;
        self.inner.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        self.see("remove directory", path, Kind::Change)?;
        self.inner.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.see("sync directory", path, Kind::Sync)?;
        self.inner.sync_dir(path)
    }

    fn file_system(&self, path: &Path) -> Result<Option<Box<dyn FileSystem>>> {
        self.see("open file system", path, Kind::Look)?;
        let inner = self.inner.file_system(path)?;
        Ok(inner.map(|inner| -> Box<dyn FileSystem> {
            Box::new(FrontFileSystem {
                store: self.clone(),
                path: path.to_path_buf(),
                inner,
            })
        }))
    }

    fn list(&self, path: &Path) -> Result<Vec<PathBuf>> {
        self.see("list", path, Kind::Look)?;
        self.inner.list(path)
    }

    fn kind(&self, path: &Path) -> Result<Option<EntryKind>> {
        self.see("stat", path, Kind::Look)?;
        self.inner.kind(path)
    }

    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        self.see("find", path, Kind::Look)?;
        self.inner.resolve(path)
    }
}

#[derive(Debug)]
struct FrontFileSystem {
    store: FrontStore,
    path: PathBuf,
    inner: Box<dyn FileSystem>,
}

impl FileSystem for FrontFileSystem {
    fn sync(&self) -> Result<()> {
        self.store.see("sync file system", &self.path, Kind::Sync)?;
        self.inner.sync()
    }
}

#[derive(Debug)]
struct FrontFile {
    store: FrontStore,
    inner: Arc<dyn StoreFile>,
}

impl FrontFile {
    fn see(&self, what: &'static str, kind: Kind) -> Result<()> {
        self.store.see(what, self.inner.path(), kind)
    }
}

impl StoreFile for FrontFile {
    ploop::delegate! { path, id }

    fn len(&self) -> Result<u64> {
        self.see("stat", Kind::Look)?;
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.see("read", Kind::Look)?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.see("write", Kind::Change)?;
        self.inner.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        self.see("sync", Kind::Sync)?;
        self.inner.sync()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.see("set length", Kind::Change)?;
        self.inner.set_len(len)
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.see("punch", Kind::Change)?;
        self.inner.punch(offset, len)
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.see("zero", Kind::Change)?;
        self.inner.zero(offset, len)
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.see("reserve", Kind::Change)?;
        self.inner.reserve(offset, len)
    }

    fn set_mode(&self, mode: u32) -> Result<()> {
        self.see("set mode", Kind::Look)?;
        self.inner.set_mode(mode)
    }

    fn next_data(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        self.see("seek", Kind::Look)?;
        self.inner.next_data(from, to)
    }

    fn lock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        self.see("lock", Kind::Look)?;
        self.inner.lock_bytes(offset, len)
    }

    fn unlock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        self.see("unlock", Kind::Look)?;
        self.inner.unlock_bytes(offset, len)
    }

    fn foreign_lock(&self, offset: u64, len: u64) -> Result<bool> {
        self.see("look for locks", Kind::Look)?;
        self.inner.foreign_lock(offset, len)
    }
}
