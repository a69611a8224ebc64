//! Making the writable image durable: its flush, with or without a journal, and its close. The order
//! of steps is in [`super::top`].

use std::sync::atomic::Ordering;

use super::header::{Header, IN_USE_CLOSED};
use super::journal::{Batch, Image, Journal, TAIL};
use super::top::{PAGE, Top, lock};
use crate::error::{Error, Kind, Result};

/// The most bytes of BAT written in one call.
const BAT_WRITE_MAX: usize = 16 * 1024;

impl Top {
    /// True when a flush covers clusters in parts as they are.
    pub fn journals(&self) -> bool {
        self.journals
    }

    /// Makes durable everything committed, written, zeroed or punched before the call. Order: data,
    /// sync, BAT, sync; the second half only when entries changed. Shared with other callers. Parts
    /// are covered where the image [`Top::journals`].
    pub fn flush(&self) -> Result<()> {
        self.flush_or(&|| Ok(()))
    }

    /// The same; `complete` completes all parts, where the host has no room for a journal.
    pub fn flush_or(&self, complete: &dyn Fn() -> Result<()>) -> Result<()> {
        self.gate.run(|| self.flush_alone(complete))
    }

    fn flush_alone(&self, complete: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut journal = lock(&self.journal);
        let begins = self.journals && self.parts.count() > 0;
        if !journal.is_there() && !begins {
            return self.flush_entries();
        }
        // All taken before the sync: what is committed while it runs has data that it may have
        // missed, and must wait for the next flush. Parts first: one that is completed in between
        // is among the slots.
        let parts = self.parts.take(journal.wants_base());
        let slots = self.take_pending();
        let nothing = parts.is_empty() && slots.is_empty();
        // Durable before the journal is, like all that it says of the file.
        let tailed = match !nothing && !journal.is_there() {
            true => self.set_tail(),
            false => Ok(()),
        };
        if self.unsynced.swap(false, Ordering::AcqRel) || !nothing {
            self.file.sync()?;
        }
        if nothing {
            return Ok(());
        }
        let entries = slots.iter().map(|&slot| Ok((slot, self.entry(slot)?)));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        let image = Image {
            file: self.file.as_ref(),
            header: &self.header,
        };
        let refused = match tailed {
            Ok(()) => journal.log(&image, &Batch { entries, parts })?,
            Err(e) => Some(e),
        };
        if let Some(e) = refused {
            tracing::warn!(
                file = %self.file.path().display(),
                error = %e,
                "the journal could not be written: clusters are completed instead"
            );
            lock(&self.pending).extend(slots);
            complete()?;
            self.end_journal(&mut journal)?;
            return self.flush_entries();
        }
        self.parts.logged_whole(&slots);
        self.write_entries(&slots)?;
        // Durable with the next sync of the image; until then the journal has them.
        self.unsynced.store(true, Ordering::Release);
        Ok(())
    }

    fn set_tail(&self) -> Result<()> {
        let mut alloc = lock(&self.alloc);
        alloc.set_tail(TAIL);
        self.file.set_len(alloc.grown_len())
    }

    fn flush_entries(&self) -> Result<()> {
        let slots = self.take_pending();
        let unsynced = self.unsynced.swap(false, Ordering::AcqRel);
        if unsynced || !slots.is_empty() {
            self.file.sync()?;
        }
        if slots.is_empty() {
            return Ok(());
        }
        self.write_entries(&slots)?;
        self.file.sync()
    }

    /// The slots that were committed since the last call, ascending.
    fn take_pending(&self) -> Vec<u32> {
        let mut slots = std::mem::take(&mut *lock(&self.pending));
        slots.sort_unstable();
        slots
    }

    /// Lets the journal go; durable on return, and so is all that it names. Order: data, sync, the
    /// entries of its slots and no others (it must explain the BAT for as long as it is there),
    /// sync, the journal's name. Error: `Io` while clusters are in parts.
    fn end_journal(&self, journal: &mut Journal) -> Result<()> {
        self.refuse_parts()?;
        if journal.is_there() {
            self.file.sync()?;
            journal.settle()?;
            self.write_entries(&journal.slots())?;
            self.file.sync()?;
        }
        journal.end()?;
        lock(&self.alloc).set_tail(0);
        self.parts.unlogged();
        Ok(())
    }

    /// Whether the room of a cluster must stay, however much of it is zeros: a journal has it as a
    /// part, and after a crash it will be completed in it. Not after the next flush.
    pub fn keeps_room(&self, cluster: u64) -> bool {
        self.journals && self.parts.is_logged(cluster)
    }

    /// The same, for an image that nobody writes.
    pub(super) fn without_journal(&self) -> Result<()> {
        let mut journal = lock(&self.journal);
        let ended = match journal.is_there() {
            true => self.end_journal(&mut journal),
            false => Ok(()),
        };
        ended.inspect_err(|e| self.gate.latch(e))
    }

    fn refuse_parts(&self) -> Result<()> {
        match self.parts.count() {
            0 => Ok(()),
            n => {
                let what = format!("{n} clusters are not complete");
                Err(Error::new(Kind::Io, what).on(self.file.path()))
            }
        }
    }

    fn entry(&self, slot: u32) -> Result<u32> {
        let page = self.load(u64::from(slot) / PAGE)?;
        Ok(page[(u64::from(slot) % PAGE) as usize].load(Ordering::Acquire))
    }

    /// Writes the entries of `slots` (sorted), and no byte of any other entry: a neighbour may have
    /// been committed since, and its data is not on disk.
    fn write_entries(&self, slots: &[u32]) -> Result<()> {
        let mut bytes = Vec::with_capacity(BAT_WRITE_MAX.min(slots.len() * 4));
        let mut first = 0u64;
        for (i, &slot) in slots.iter().enumerate() {
            let entry = self.entry(slot)?;
            let slot = u64::from(slot);
            if bytes.is_empty() {
                first = slot;
            }
            bytes.extend_from_slice(&entry.to_le_bytes());
            let goes_on = slots.get(i + 1).is_some_and(|&n| u64::from(n) == slot + 1);
            if !goes_on || bytes.len() >= BAT_WRITE_MAX {
                self.file.write_at(&bytes, Header::slot_offset(first))?;
                bytes.clear();
            }
        }
        Ok(())
    }

    /// Closes the image: the journal ends, flush, cut the file behind the last cluster in use, sync,
    /// clear the mark, sync. An image that was never changed is not touched, and one that latched stays marked.
    /// Its clusters are complete, or it fails.
    pub fn close(&self) -> Result<()> {
        let _one = lock(&self.mark);
        self.gate.check()?;
        self.refuse_parts()?;
        if !self.marked.load(Ordering::Acquire) {
            // A mark found at open and proven harmless is ours to clear, and so is half a mark.
            if !self.unclean.load(Ordering::Acquire) {
                return Ok(());
            }
            self.mark_in_use()?;
        }
        self.without_journal()?;
        self.flush()?;
        let used_len = lock(&self.alloc).used_len();
        if self.file.len()? != used_len {
            self.file.set_len(used_len)?;
            self.file.sync().inspect_err(|e| self.gate.latch(e))?;
        }
        lock(&self.alloc).cut();
        // Should this fail, the header may say either, and no change may follow.
        let closed = self
            .file
            .write_at(self.header.marked(IN_USE_CLOSED).bytes(), 0);
        let closed = closed.and_then(|()| self.file.sync());
        closed.inspect_err(|e| self.gate.latch(e))?;
        self.marked.store(false, Ordering::Release);
        self.unclean.store(false, Ordering::Release);
        Ok(())
    }
}
