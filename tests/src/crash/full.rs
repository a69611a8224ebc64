//! A host with room for so many blocks: ENOSPC as a file system gives it.
//!
//! A block of 4 KiB is taken by the first write to it (or by keeping its space), and given back by
//! a punch or a cut. Overwriting needs no room, neither do lengths and names.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use ploop::Result;
use ploop::error::Error;
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, FileId, Space, Store, StoreFile};

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
    ploop::delegate! {
        rename, rename_new, hard_link, remove_file, create_dir, remove_dir, sync_dir, file_system,
        list, kind, resolve,
    }

    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        Ok(self.wrap(self.inner.open(path, access)?))
    }

    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>> {
        Ok(self.wrap(self.inner.create(path, mode)?))
    }

    fn space(&self, _: &Path) -> Result<Option<Space>> {
        let blocks = self.blocks.lock().unwrap();
        Ok(Some(Space {
            total: (blocks.free + blocks.taken.len() as u64) * BLOCK,
            available: blocks.free * BLOCK,
        }))
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
    ploop::delegate! {
        path, id, len, read_at, sync, set_mode, next_data, lock_bytes, unlock_bytes, foreign_lock,
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let (room, done) = self.take(offset, buf.len() as u64);
        self.inner.write_at(&buf[..room as usize], offset)?;
        done
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
}
