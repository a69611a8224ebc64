//! One open file.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use rustix::io::Errno;

use super::{Pages, locked, os};
use crate::error::Result;
use crate::store::{Access, FileId, StoreFile};

/// A file whatever its name, or without one.
#[derive(Default)]
pub(super) struct Node {
    body: RwLock<Arc<Pages>>,
    locks: Mutex<Vec<Lock>>,
}

struct Lock {
    handle: u64,
    bytes: Range<u64>,
}

impl Node {
    pub(super) fn of(pages: &Arc<Pages>) -> Arc<Node> {
        Arc::new(Node {
            body: RwLock::new(Arc::clone(pages)),
            locks: Mutex::default(),
        })
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Arc<Pages>> {
        self.body.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open file description: `handle` tells its locks from those of others.
pub(super) struct MemoryFile {
    pub(super) path: PathBuf,
    pub(super) id: FileId,
    pub(super) access: Access,
    pub(super) node: Arc<Node>,
    pub(super) handle: u64,
}

impl fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryFile({}, {:?})", self.path.display(), self.id)
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        locked(&self.node.locks).retain(|lock| lock.handle != self.handle);
    }
}

/// The bytes of a lock; length 0 means to the end of every file, as it does for fcntl.
fn lock_range(offset: u64, len: u64) -> Range<u64> {
    offset..if len == 0 {
        u64::MAX
    } else {
        offset.saturating_add(len)
    }
}

impl MemoryFile {
    fn change(&self, what: &str, at: u64, end: u64, act: impl FnOnce(&mut Pages)) -> Result<()> {
        let refused = match self.access {
            Access::Read => Some(Errno::BADF),
            Access::Write if at > i64::MAX as u64 => Some(Errno::INVAL),
            Access::Write if end > i64::MAX as u64 => Some(Errno::FBIG),
            Access::Write => None,
        };
        if let Some(errno) = refused {
            return Err(os(what, &self.path)(errno).at(at));
        }
        let mut body = self
            .node
            .body
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        act(Arc::make_mut(&mut body));
        Ok(())
    }

    fn clear(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len).min(self.len()?);
        if offset >= end {
            return Ok(());
        }
        self.change("zero a range", offset, end, |pages| {
            pages.clear(offset, end - offset)
        })
    }
}

impl StoreFile for MemoryFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn id(&self) -> FileId {
        self.id
    }

    fn len(&self) -> Result<u64> {
        Ok(self.node.read().len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        if !buf.is_empty() && offset > i64::MAX as u64 {
            return Err(os("read", &self.path)(Errno::INVAL).at(offset));
        }
        Ok(self.node.read().read(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let end = offset.saturating_add(buf.len() as u64);
        self.change("write", offset, end, |pages| pages.write(buf, offset))
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change("set the length", len, len, |pages| pages.set_len(len))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.clear(offset, len)
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.clear(offset, len)
    }

    fn reserve(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn set_mode(&self, _mode: u32) -> Result<()> {
        Ok(())
    }

    fn next_data(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        Ok(self.node.read().next_data(from, to))
    }

    fn lock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        let bytes = lock_range(offset, len);
        locked(&self.node.locks).push(Lock {
            handle: self.handle,
            bytes,
        });
        Ok(())
    }

    fn unlock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        let freed = lock_range(offset, len);
        let mut locks = locked(&self.node.locks);
        for lock in std::mem::take(&mut *locks) {
            if lock.handle != self.handle {
                locks.push(lock);
                continue;
            }
            let Range { start, end } = lock.bytes;
            for bytes in [start..end.min(freed.start), start.max(freed.end)..end] {
                if bytes.start < bytes.end {
                    let handle = lock.handle;
                    locks.push(Lock { handle, bytes });
                }
            }
        }
        Ok(())
    }

    fn foreign_lock(&self, offset: u64, len: u64) -> Result<bool> {
        let asked = lock_range(offset, len);
        let overlaps = |held: &Range<u64>| held.start < asked.end && asked.start < held.end;
        let locks = locked(&self.node.locks);
        Ok(locks
            .iter()
            .any(|lock| lock.handle != self.handle && overlaps(&lock.bytes)))
    }
}
