//! Sealed images that are read before all of their bytes are here.
//!
//! ```text
//!                         ┌─ there ──────────────────────────────▶ the file
//!   read ─▶ ArrivingStore ┤
//!                         └─ missing ─▶ Fetch ─▶ write ─▶ read ──▶ the file
//!   fill_next ──────────────────────▶ Fetch ─▶ write
//! ```
//!
//! An image that arrives is an image file whose tables are complete and which has its length; of its
//! data some ranges are holes that are still to come. Which, a record beside it says durably (module
//! `side`), granule by granule. What is missing is fetched when somebody reads it, and by
//! [`ArrivingStore::fill_next`] when nobody does; each granule by one of them at a time.
//!
//! * **The record says too much, never too little.** Bytes are written and synced before it stops
//!   calling them missing. After a crash, or a sync that failed, some are fetched again.
//! * **Nobody takes a hole for zeros.** Who opens an image that has a record, in a process that does
//!   not fetch, is refused ([`Opener`](crate::disk::open::Opener)). For programs that know of no
//!   records the image bears the in-use mark ([`begin`]); who reads it here sees its header without.
//! * **It only arrives.** Until all is there its file takes no other writes, no other name and no
//!   opening for writing: `InUse`. Its directory may be renamed, and it may be removed.
//! * **A full host is no error to who reads.** What was fetched is given to the reader and not kept.
//!
//! The end, after which everything passes through: the data synced, then the record's last pages; the
//! mark cleared, synced; the record removed, its directory synced.

mod bits;
mod file;
mod image;
mod side;

use std::collections::HashMap;
use std::fmt::Debug;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use super::{Access, FileId, Store, StoreFile, read_exact};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::header::HEADER_BYTES;
use file::ArrivingFile;
use image::Image;
use side::Side;

pub use image::FETCH_MAX;

/// Bytes of a granule: the unit of what is missing.
pub const GRANULE: u64 = 4096;

/// Where the bytes come from.
pub trait Fetch: Send + Sync + Debug {
    /// Fills `buf` with the bytes of the image file at `offset`, [`FETCH_MAX`] at most. Blocks. An error
    /// is passed on to who reads, and the next read asks again.
    fn fetch(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

/// What [`ArrivingStore::fill_next`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// There is more to do.
    More,
    /// Nothing is missing, durably.
    Done,
}

/// The error for who wants more than to read the image at `path`.
pub(crate) fn arriving(path: &Path) -> Error {
    Error::new(Kind::InUse, "the image is still arriving")
        .on(path)
        .fix("Wait until all of it is here")
}

/// The records of what images lack.
#[derive(Debug)]
pub struct Missing;

impl Missing {
    /// Writes the record of the image at `path`, which has `file_len` bytes: those in `ranges` are
    /// missing, rounded to granules. In place of one that is there. Durable on return. Error: `Invalid`
    /// for an empty range, or one that is not in the file.
    pub fn create(
        store: &dyn Store,
        path: &Path,
        file_len: u64,
        ranges: &[Range<u64>],
    ) -> Result<()> {
        Side::create(store, path, file_len, ranges, None)
    }

    /// Where the record of the image at `path` is. Error: `Invalid` for what is no name of a file.
    pub fn path(path: &Path) -> Result<PathBuf> {
        side::path_of(path)
    }

    /// The images of the directory `dir` that have one: for who starts, to register them.
    pub fn images(store: &dyn Store, dir: &Path) -> Result<Vec<PathBuf>> {
        side::images(store, dir)
    }

    /// Removes that of an image that is gone, once it is so durably. One that is not there is fine.
    pub fn remove(store: &dyn Store, path: &Path) -> Result<()> {
        // Before: its holes would pass for zeros.
        store.sync_dir(path.parent().unwrap_or(Path::new("/")))?;
        side::remove(store, path)
    }

    /// Whether the image at `path` has one.
    pub fn is_there(store: &dyn Store, path: &Path) -> Result<bool> {
        Ok(store.kind(&side::path_of(path)?)?.is_some())
    }

    /// Refuses an image that lacks bytes, for who does not fetch them. Errors: `InUse`, with what to
    /// do; `Corrupt` where the record cannot be read.
    pub fn refuse(store: &dyn Store, path: &Path) -> Result<()> {
        let missing = match Missing::is_there(store, path)? {
            true => Missing::bytes(store, path)?,
            false => 0,
        };
        if missing == 0 {
            return Ok(());
        }
        let what = format!("some of the image's bytes have not arrived ({missing} are missing)");
        Err(Error::new(Kind::InUse, what).on(path).fix(
            "They come from the service that the container was moved from: run the one it was moved \
             to (ploopd), and see that it reaches that",
        ))
    }

    /// Bytes that the image at `path` lacks, in whole granules, as its record says; 0 for one that has
    /// none. Error: `Corrupt`.
    pub fn bytes(store: &dyn Store, path: &Path) -> Result<u64> {
        let len = store.open(path, Access::Read)?.len()?;
        let side = Side::open(store, path, len, Access::Read)?;
        // None: it ended just now, or was cut right before.
        Ok(side.map_or(0, |(_, missing)| missing.count() * GRANULE))
    }
}

/// Makes the image of ploop's at `path` one that arrives: `ranges` of its file are missing. Durable on
/// return, with all that was written to the file before. Errors: `Invalid` for a range in the header
/// or the table; `Corrupt` for what is no image.
///
/// Order: the record, durable; the mark; the image's sync.
pub fn begin(store: &dyn Store, path: &Path, ranges: &[Range<u64>]) -> Result<()> {
    let file = store.open(path, Access::Write)?;
    let len = file.len()?;
    let mut head = [0; HEADER_BYTES as usize];
    read_exact(file.as_ref(), &mut head, 0)?;
    let data = image::data_start(&head, len).map_err(|e| e.on(path))?;
    if let Some(range) = ranges.iter().find(|r| r.start < data) {
        let what = format!(
            "bytes {}..{} cannot be missing: the image's tables end at {data}",
            range.start, range.end
        );
        return Err(Error::invalid(what).on(path));
    }
    let marked = image::marked(&head, len).map_err(|e| e.on(path))?;
    Side::create(store, path, len, ranges, Some(&head))?;
    file.write_at(&marked, 0)?;
    file.sync()
}

/// A store in front of another one; see the module text.
#[derive(Debug)]
pub struct ArrivingStore {
    inner: Arc<dyn Store>,
    /// By file: whatever name it is opened by.
    images: RwLock<HashMap<FileId, Arc<Image>>>,
    /// How many: most stores have none, and ask nothing else.
    count: AtomicUsize,
    /// Held while directories are renamed, and by who ends a record in one.
    names: Mutex<()>,
}

impl ArrivingStore {
    /// In front of `inner`; no image arrives.
    pub fn new(inner: Arc<dyn Store>) -> ArrivingStore {
        ArrivingStore {
            inner,
            images: RwLock::default(),
            count: AtomicUsize::new(0),
            names: Mutex::default(),
        }
    }

    fn images(&self) -> RwLockReadGuard<'_, HashMap<FileId, Arc<Image>>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, to be changed by `change`.
    fn change<T>(&self, change: impl FnOnce(&mut HashMap<FileId, Arc<Image>>) -> T) -> T {
        let mut images = self.images.write().unwrap_or_else(PoisonError::into_inner);
        let done = change(&mut images);
        self.count.store(images.len(), Ordering::Release);
        done
    }

    fn has_none(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// What is registered under `path`, as it was given or with its links resolved.
    fn at(&self, path: &Path) -> Option<Arc<Image>> {
        if self.has_none() {
            return None;
        }
        let real = self.inner.resolve(path).ok();
        let is = |image: &&Arc<Image>| {
            let here = image.path();
            here == path || Some(&here) == real.as_ref()
        };
        self.images().values().find(is).cloned()
    }

    fn known(&self, path: &Path) -> Result<Arc<Image>> {
        self.at(path).ok_or_else(|| {
            Error::new(Kind::NotFound, "the image is not one that arrives here").on(path)
        })
    }

    /// From now on what the image at `path` lacks comes from `from`: before it is opened by anybody who
    /// reads. One that is registered already gets another source. An image that lacks nothing is
    /// completed by the next [`ArrivingStore::fill_next`]. Errors: `NotFound` where it has no record;
    /// `Corrupt` for a record that is damaged.
    pub fn register(&self, path: &Path, from: Arc<dyn Fetch>) -> Result<()> {
        let real = self.inner.resolve(path)?;
        let file = self.inner.open(&real, Access::Write)?;
        let file = file.for_guests().unwrap_or(file);
        let id = file.id();
        if let Some(known) = self.images().get(&id) {
            known.fetch_from(from);
            return Ok(());
        }
        let store = self.inner.as_ref();
        let Some((side, missing)) = Side::open(store, &real, file.len()?, Access::Write)? else {
            let what = "the image has no record of what it lacks";
            return Err(Error::new(Kind::NotFound, what).on(&real));
        };
        let image = Image::new(self.inner.clone(), real, file, side, missing, from)?;
        self.change(|images| {
            images.entry(id).or_insert_with(|| Arc::new(image));
        });
        Ok(())
    }

    /// The images that arrive.
    pub fn registered(&self) -> Vec<PathBuf> {
        let mut paths: Vec<_> = self.images().values().map(|i| i.path()).collect();
        paths.sort();
        paths
    }

    /// Whether the image at `path` arrives here.
    pub fn is_registered(&self, path: &Path) -> bool {
        self.at(path).is_some()
    }

    /// Forgets the image at `path`: for who removes it. Its record stays. Who has it open reads on.
    pub fn forget(&self, path: &Path) {
        if let Some(image) = self.at(path) {
            self.drop_image(&image);
        }
    }

    fn drop_image(&self, image: &Arc<Image>) {
        self.change(|images| images.retain(|_, other| !Arc::ptr_eq(other, image)));
    }

    /// Bytes that the image at `path` lacks, in whole granules; 0 for one that is not registered.
    pub fn remaining(&self, path: &Path) -> u64 {
        self.at(path).map_or(0, |image| image.remaining())
    }

    /// Fetches the next bytes that the image at `path` lacks: `budget` at most, [`FETCH_MAX`] at most, a
    /// granule at least; one that failed by itself again when all others were tried. Writes the record
    /// now and then. When nothing is missing, completes the image
    /// and forgets it. Blocks. Errors: the source's; `NoSpace`; `NotFound` where it has a record and is
    /// not registered. After any it may be called again.
    pub fn fill_next(&self, path: &Path, budget: u64) -> Result<Filled> {
        let image = match self.known(path) {
            // Another one ended it.
            Err(_) if !Missing::is_there(self.inner.as_ref(), path)? => return Ok(Filled::Done),
            image => image?,
        };
        let filled = image.fill_next(budget, &self.names)?;
        if filled == Filled::Done {
            self.drop_image(&image);
        }
        Ok(filled)
    }

    /// Makes what came of the image at `path` durable, and says so in its record: after a crash that is
    /// not fetched again. Errors: the file's, after which some is missing again; `NotFound`.
    pub fn checkpoint(&self, path: &Path) -> Result<()> {
        self.known(path)?.checkpoint()
    }

    /// A change of the name of a file that would get another one.
    fn refuse(&self, path: &Path) -> Result<()> {
        match self.at(path) {
            Some(image) if !image.is_whole() => Err(image.in_the_way()),
            _ => Ok(()),
        }
    }

    fn rename_by(&self, from: &Path, to: &Path, rename: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.has_none() {
            return rename();
        }
        let _names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        self.refuse(from)?;
        let replaced = self.at(to);
        // Before the name goes.
        let old = self.inner.resolve(from)?;
        rename()?;
        if let Some(image) = replaced {
            self.drop_image(&image);
        }
        let new = self.inner.resolve(to)?;
        for image in self.images().values() {
            if let Ok(rest) = image.path().strip_prefix(&old) {
                image.moved(new.join(rest));
            }
        }
        Ok(())
    }
}

impl Store for ArrivingStore {
    crate::delegate! {
        create, create_dir, remove_dir, sync_dir, file_system, list, kind, space, resolve
    }

    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        let inner = self.inner.open(path, access)?;
        if self.has_none() {
            return Ok(inner);
        }
        let image = self.images().get(&inner.id()).cloned();
        match image.filter(|image| !image.is_whole()) {
            None => Ok(inner),
            Some(image) if access == Access::Write => Err(image.in_the_way()),
            Some(image) => Ok(Arc::new(ArrivingFile { inner, image })),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.rename_by(from, to, || self.inner.rename(from, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        self.rename_by(from, to, || self.inner.rename_new(from, to))
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        self.refuse(from)?;
        self.inner.hard_link(from, to)
    }

    /// An image that arrives takes its record along, which is gone after it.
    fn remove_file(&self, path: &Path) -> Result<()> {
        let image = self.at(path);
        self.inner.remove_file(path)?;
        let Some(image) = image else {
            return Ok(());
        };
        self.drop_image(&image);
        let real = image.path();
        Missing::remove(self.inner.as_ref(), &real)
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod tests;
