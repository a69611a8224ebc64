//! One open file of the recording store.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::RecordingStore;
use super::fault::Class;
use super::log::{Action, Event};
use crate::error::Result;
use crate::store::{FileSystem, StoreFile};

/// Passes every call to the memory file below and logs those that change something.
#[derive(Debug)]
pub(super) struct RecordingFile {
    pub(super) store: RecordingStore,
    pub(super) inner: Arc<dyn StoreFile>,
}

/// All of the recording store.
#[derive(Debug)]
pub(super) struct RecordingFileSystem {
    pub(super) store: RecordingStore,
    pub(super) path: PathBuf,
}

impl FileSystem for RecordingFileSystem {
    fn sync(&self) -> Result<()> {
        let action = |started, outcome| Action::SyncAll { started, outcome };
        let what = "sync the file system of";
        self.store.sync_call(what, &self.path, action)
    }
}

impl RecordingFile {
    /// Zeroes the part of the range inside the file.
    fn clear(
        &self,
        offset: u64,
        len: u64,
        act: impl FnOnce() -> Result<()>,
        action: impl FnOnce(u64, u64) -> Action,
    ) -> Result<()> {
        self.store.change("zero a range", self.path(), || {
            let end = offset.saturating_add(len).min(self.inner.len()?);
            act()?;
            Ok((
                (),
                (offset < end).then(|| action(offset, end.saturating_sub(offset))),
            ))
        })
    }
}

impl StoreFile for RecordingFile {
    crate::delegate! { path, id }

    fn len(&self) -> Result<u64> {
        self.store.look("stat", self.path())?;
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.store
            .look("read", self.path())
            .map_err(|e| e.at(offset))?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut log = self.store.log_state();
        let verdict = log.faults.enter(Class::Change);
        let part = &buf[..verdict.reaches(buf.len(), log.faults.tear)];
        if !part.is_empty() {
            let old = self.inner.len()?;
            self.inner.write_at(part, offset)?;
            let grew = self.inner.len()? > old;
            let (file, bytes) = (self.id().ino, Arc::from(part));
            let action = Action::Write {
                file,
                offset,
                bytes,
                grew,
            };
            log.events.push(Event::new(self.path(), action));
        }
        verdict
            .error("write", self.path())
            .map_or(Ok(()), |e| Err(e.at(offset)))
    }

    fn sync(&self) -> Result<()> {
        let file = self.id().ino;
        let action = |started, outcome| Action::Sync {
            file,
            started,
            outcome,
        };
        self.store.sync_call("sync", self.path(), action)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.store.change("set the length", self.path(), || {
            self.inner.set_len(len)?;
            Ok((
                (),
                Some(Action::SetLen {
                    file: self.id().ino,
                    len,
                }),
            ))
        })
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        let file = self.id().ino;
        let action = |offset, len| Action::Punch { file, offset, len };
        self.clear(offset, len, || self.inner.punch(offset, len), action)
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let file = self.id().ino;
        let action = |offset, len| Action::Zero { file, offset, len };
        self.clear(offset, len, || self.inner.zero(offset, len), action)
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.store.change("reserve space", self.path(), || {
            self.inner.reserve(offset, len)?;
            Ok(((), None))
        })
    }

    fn set_mode(&self, mode: u32) -> Result<()> {
        self.store.look("set the permissions", self.path())?;
        self.inner.set_mode(mode)
    }

    fn next_data(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        self.store.look("seek", self.path())?;
        self.inner.next_data(from, to)
    }

    fn lock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        self.store.look("lock bytes", self.path())?;
        self.inner.lock_bytes(offset, len)
    }

    fn unlock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        self.store.look("unlock bytes", self.path())?;
        self.inner.unlock_bytes(offset, len)
    }

    fn foreign_lock(&self, offset: u64, len: u64) -> Result<bool> {
        self.store.look("look for locks", self.path())?;
        self.inner.foreign_lock(offset, len)
    }
}
