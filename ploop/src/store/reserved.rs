//! Room that is kept for what must not fail: a flush, a descriptor, a deletion, a merge.
//!
//! ```text
//!   call ─▶ NoSpace? ─▶ cut some of the reserve off ─▶ call again
//! ```
//!
//! The reserve is a file of the store, `reserve`, whose blocks the file system has really given:
//! other programs fill the same file system. Every call on a file or a name of the store that finds
//! it full gives up as much of the reserve as it may need, and is tried again. Not so:
//!
//! * what clients write ([`StoreFile::for_guests`]): theirs is `NoSpace`;
//! * work in progress below the store's `tmp`, which imports and clones are built in: it can be had
//!   again later; and whatever is outside of the store;
//! * a sync: after a failed one nothing may be assumed, and a second must not be believed.
//!
//! Whoever serves the store makes the reserve, and fills it again ([`Reserve::fill`]); every process
//! that works on the store uses it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Access, Store, StoreFile};
use crate::error::{Error, Kind, Result};

/// The reserve's file name.
pub const RESERVE: &str = "reserve";

/// Given up at a time, at least: the file system's own tables grow, too. Not more: others may take what
/// is left over.
pub const STEP: u64 = 256 << 10;

/// How often one call is helped: others may take what was given up for it.
const TRIES: u32 = 4;

/// The reserve of a store.
#[derive(Debug)]
pub struct Reserve {
    store: Arc<dyn Store>,
    path: PathBuf,
    /// Held by whoever changes the file here.
    changing: Mutex<()>,
    uses: AtomicU64,
    given: AtomicU64,
}

impl Reserve {
    /// The reserve of the store at `dir`, there or not. `store` must be one without a reserve.
    pub fn of(store: Arc<dyn Store>, dir: &Path) -> Reserve {
        Reserve {
            store,
            path: dir.join(RESERVE),
            changing: Mutex::default(),
            uses: AtomicU64::new(0),
            given: AtomicU64::new(0),
        }
    }

    /// Bytes of the host that it holds now.
    pub fn held(&self) -> Result<u64> {
        match self.open()? {
            Some(file) => held_of(file.as_ref()),
            None => Ok(0),
        }
    }

    /// How often this process gave some of it up, and how many bytes together.
    pub fn used(&self) -> (u64, u64) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (load(&self.uses), load(&self.given))
    }

    fn open(&self) -> Result<Option<Arc<dyn StoreFile>>> {
        match self.store.open(&self.path, Access::Write) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Makes it hold `bytes`; 0 removes it. Takes what it lacks of the host, `most` at most. Blocks
    /// for the file system; nothing needs to be durable. Error: `NoSpace`, with what was to be had.
    pub fn fill(&self, bytes: u64, most: u64) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = self.open()? else {
            return match bytes.min(most) {
                0 => Ok(()),
                want => grow(self.store.create(&self.path, 0o600)?.as_ref(), want),
            };
        };
        let held = held_of(file.as_ref())?;
        match bytes {
            0 => self.store.remove_file(&self.path),
            // One step less is as good: the file system counts its own blocks with it.
            _ if held > bytes + STEP => file.set_len(bytes),
            _ if held < bytes => grow(file.as_ref(), (held + most).min(bytes)),
            _ => Ok(()),
        }
    }

    /// Gives up `need` bytes, a [`STEP`] at least, or what is left. False when nothing is.
    pub fn give_up(&self, need: u64) -> bool {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = || {
            let Some(file) = self.open()? else {
                return Ok(0);
            };
            let held = held_of(file.as_ref())?.min(file.len()?);
            let given = need.max(STEP).min(held);
            if given > 0 {
                file.set_len(held - given)?;
                // Some file systems hand out again what a commit has freed, and nothing before.
                file.sync()?;
            }
            Ok(given)
        };
        match cut() {
            Ok(0) => false,
            Ok(given) => {
                self.uses.fetch_add(1, Ordering::Relaxed);
                self.given.fetch_add(given, Ordering::Relaxed);
                true
            }
            Err(e) => {
                let e: Error = e;
                tracing::warn!(error = %e, "the reserve of the store cannot be used");
                false
            }
        }
    }

    /// Makes a call that may need `need` bytes, with the reserve's help.
    fn help<T>(&self, need: u64, tries: u32, call: impl Fn() -> Result<T>) -> Result<T> {
        let mut left = tries;
        loop {
            match call() {
                Err(e) if e.is_host_full() && left > 0 && self.give_up(need) => left -= 1,
                done => return done,
            }
        }
    }
}

/// What the host has given, of the file's length: a tail that another process cut off and this one
/// did not see is a hole.
fn held_of(file: &dyn StoreFile) -> Result<u64> {
    file.host_bytes()
}

fn grow(file: &dyn StoreFile, len: u64) -> Result<()> {
    let got = file.reserve(0, len);
    // Of what there is not enough of, some was given.
    let held = held_of(file)?.min(len);
    if held > file.len()? {
        file.set_len(held)?;
    }
    got?;
    if held >= len {
        return Ok(());
    }
    // A file system that takes no room ahead.
    let zeros = vec![0; STEP as usize];
    let mut at = 0;
    while at < len {
        let n = (len - at).min(STEP);
        file.write_at(&zeros[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

/// A store of disks whose files may use its reserve.
#[derive(Debug)]
pub struct Reserved {
    inner: Arc<dyn Store>,
    reserve: Arc<Reserve>,
    dir: PathBuf,
    tmp: PathBuf,
}

impl Reserved {
    /// `inner`, with the reserve of the store of disks at `dir`, a resolved path.
    pub fn new(inner: Arc<dyn Store>, dir: &Path) -> Reserved {
        Reserved {
            reserve: Arc::new(Reserve::of(inner.clone(), dir)),
            dir: dir.to_path_buf(),
            tmp: dir.join("tmp"),
            inner,
        }
    }

    /// The reserve.
    pub fn reserve(&self) -> &Arc<Reserve> {
        &self.reserve
    }

    fn may_use(&self, path: &Path) -> bool {
        path.starts_with(&self.dir) && !path.starts_with(&self.tmp)
    }

    fn wrap(&self, path: &Path, inner: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        match self.may_use(path) {
            true => Arc::new(ReservedFile {
                inner,
                reserve: self.reserve.clone(),
            }),
            false => inner,
        }
    }

    /// A change of a name. Once: a full table of inodes looks the same, and no room helps there.
    fn name(&self, path: &Path, change: impl Fn() -> Result<()>) -> Result<()> {
        let tries = u32::from(self.may_use(path));
        self.reserve.help(STEP, tries, change)
    }
}

impl Store for Reserved {
    crate::delegate! { sync_dir, file_system, list, kind, space, resolve }

    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        let file = self.inner.open(path, access)?;
        Ok(match access {
            Access::Read => file,
            Access::Write => self.wrap(path, file),
        })
    }

    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>> {
        let tries = u32::from(self.may_use(path));
        let create = || self.inner.create(path, mode);
        Ok(self.wrap(path, self.reserve.help(STEP, tries, create)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.name(from, || self.inner.rename(from, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        self.name(from, || self.inner.rename_new(from, to))
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        self.name(to, || self.inner.hard_link(from, to))
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.name(path, || self.inner.remove_file(path))
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.name(path, || self.inner.create_dir(path))
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        self.name(path, || self.inner.remove_dir(path))
    }
}

/// A file that may use the reserve.
#[derive(Debug)]
struct ReservedFile {
    inner: Arc<dyn StoreFile>,
    reserve: Arc<Reserve>,
}

impl ReservedFile {
    fn help(&self, need: u64, call: impl Fn() -> Result<()>) -> Result<()> {
        self.reserve.help(need, TRIES, call)
    }
}

impl StoreFile for ReservedFile {
    crate::delegate! {
        path, id, len, read_at, read_now, for_ring, sync, begin_sync, set_mode, rights, set_rights,
        next_data, host_bytes, keep, recall, lock_bytes, unlock_bytes, foreign_lock,
    }

    fn for_guests(&self) -> Option<Arc<dyn StoreFile>> {
        Some(self.inner.clone())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.help(buf.len() as u64, || self.inner.write_at(buf, offset))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.help(STEP, || self.inner.set_len(len))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.help(STEP, || self.inner.punch(offset, len))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.help(len, || self.inner.zero(offset, len))
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.help(len, || self.inner.reserve(offset, len))
    }
}
