//! A store that tells when a descriptor is put in force: what a client reads and writes in the
//! middle of an operation, without a second thread.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ploop::disk::open::DESCRIPTOR;
use ploop::error::Result;
use ploop::store::{Access, EntryKind, FileSystem, Store, StoreFile};

type Call = Box<dyn FnMut() + Send>;

/// See the module text.
#[derive(Debug)]
pub struct Hooked {
    inner: Arc<dyn Store>,
    hook: Hook,
}

/// What is called, when somebody wants to be called.
#[derive(Clone, Default)]
pub struct Hook(Arc<Mutex<Option<Call>>>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

impl Hook {
    /// Calls `call` before each rename of a descriptor in `work`.
    pub fn during<T>(&self, call: Call, work: impl FnOnce() -> T) -> T {
        *self.0.lock().unwrap() = Some(call);
        let done = work();
        *self.0.lock().unwrap() = None;
        done
    }

    fn call(&self) {
        // Not called in the middle of itself.
        let taken = self.0.lock().unwrap().take();
        if let Some(mut call) = taken {
            call();
            *self.0.lock().unwrap() = Some(call);
        }
    }
}

impl Hooked {
    /// Files of `inner`, and who is called.
    pub fn on(inner: Arc<dyn Store>) -> (Arc<dyn Store>, Hook) {
        let hook = Hook::default();
        let hooked = Hooked {
            inner,
            hook: hook.clone(),
        };
        (Arc::new(hooked), hook)
    }
}

impl Store for Hooked {
    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        if to.file_name().is_some_and(|n| n == DESCRIPTOR) {
            self.hook.call();
        }
        self.inner.rename(from, to)
    }

    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        self.inner.open(path, access)
    }

    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>> {
        self.inner.create(path, mode)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        self.inner.rename_new(from, to)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        self.inner.hard_link(from, to)
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.inner.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.inner.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        self.inner.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.inner.sync_dir(path)
    }

    fn file_system(&self, path: &Path) -> Result<Option<Box<dyn FileSystem>>> {
        self.inner.file_system(path)
    }

    fn list(&self, path: &Path) -> Result<Vec<PathBuf>> {
        self.inner.list(path)
    }

    fn kind(&self, path: &Path) -> Result<Option<EntryKind>> {
        self.inner.kind(path)
    }

    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        self.inner.resolve(path)
    }
}
