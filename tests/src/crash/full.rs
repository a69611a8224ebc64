//! A host with room for so many blocks: ENOSPC as a file system gives it.
//!
//! A block of 4 KiB is taken by the first write to it (or by keeping its space), and given back by
//! a punch or a cut. Overwriting needs no room, neither do lengths and names.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ploop::Result;
use ploop::error::Error;
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, EntryKind, FileId, FileSystem, Store, StoreFile};

const BLOCK: u64 = 4096;
const ENOSPC: i32 = 28;

#[derive(Debug)]
struct Blocks {
    free: u64,
    taken: BTreeSet<(FileId, u64)>,
}

/// See the module text. A clone is the same store.
#[derive(Clone, Debug)]
pub struct FullStore {
    inner: MemoryStore,
    blocks: Arc<Mutex<Blocks>>,
}

impl FullStore {
    /// `inner` with `free` blocks left.
    pub fn new(inner: &MemoryStore, free: u64) -> FullStore {
        let blocks = Blocks {
            free,
            taken: BTreeSet::new(),
        };
        FullStore {
            inner: inner.clone(),
            blocks: Arc::new(Mutex::new(blocks)),
        }
    }

    /// Blocks that are left.
    pub fn free(&self) -> u64 {
        self.blocks.lock().unwrap().free
    }

    /// Room for so many more.
    pub fn add(&self, blocks: u64) {
        self.blocks.lock().unwrap().free += blocks;
    }

    fn wrap(&self, inner: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        let (id, len) = (inner.id(), inner.len().unwrap());
        // What is there when it is opened takes its room already.
        let mut at = 0;
        while let Some(data) = inner.next_data(at, len).unwrap() {
            let mut blocks = self.blocks.lock().unwrap();
            blocks.taken.extend(span(&data).map(|b| (id, b)));
            at = data.end;
        }
        Arc::new(FullFile {
            store: self.clone(),
            inner,
        })
    }
}

fn span(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / BLOCK..bytes.end.div_ceil(BLOCK)
}

impl Store for FullStore {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        Ok(self.wrap(self.inner.open(path, access)?))
    }

    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>> {
        Ok(self.wrap(self.inner.create(path, mode)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.inner.rename(from, to)
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

#[derive(Debug)]
struct FullFile {
    store: FullStore,
    inner: Arc<dyn StoreFile>,
}

impl FullFile {
    /// Takes the blocks of a range as far as there is room; gives the bytes that have it.
    fn take(&self, offset: u64, len: u64) -> (u64, Result<()>) {
        let mut blocks = self.store.blocks.lock().unwrap();
        for block in span(&(offset..offset + len)) {
            if blocks.taken.contains(&(self.id(), block)) {
                continue;
            }
            if blocks.free == 0 {
                let error = std::io::Error::from_raw_os_error(ENOSPC);
                let error = Error::io("write", self.path(), error).at(offset);
                return ((block * BLOCK).saturating_sub(offset), Err(error));
            }
            blocks.free -= 1;
            blocks.taken.insert((self.id(), block));
        }
        (len, Ok(()))
    }

    fn give(&self, whole: Range<u64>) {
        let mut blocks = self.store.blocks.lock().unwrap();
        let id = self.id();
        let gone: Vec<_> = blocks
            .taken
            .range((id, whole.start)..(id, whole.end))
            .copied()
            .collect();
        for block in gone {
            blocks.taken.remove(&block);
            blocks.free += 1;
        }
    }
}

impl StoreFile for FullFile {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn id(&self) -> FileId {
        self.inner.id()
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let (room, done) = self.take(offset, buf.len() as u64);
        self.inner.write_at(&buf[..room as usize], offset)?;
        done
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)?;
        self.give(len.div_ceil(BLOCK)..u64::MAX);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.punch(offset, len)?;
        self.give(offset.div_ceil(BLOCK)..((offset + len) / BLOCK).max(offset.div_ceil(BLOCK)));
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let (_, done) = self.take(offset, len);
        done?;
        self.inner.zero(offset, len)
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        let (_, done) = self.take(offset, len);
        done?;
        self.inner.reserve(offset, len)
    }

    fn set_mode(&self, mode: u32) -> Result<()> {
        self.inner.set_mode(mode)
    }

    fn next_data(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        self.inner.next_data(from, to)
    }

    fn lock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.lock_bytes(offset, len)
    }

    fn unlock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.unlock_bytes(offset, len)
    }

    fn foreign_lock(&self, offset: u64, len: u64) -> Result<bool> {
        self.inner.foreign_lock(offset, len)
    }
}
