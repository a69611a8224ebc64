//! Making the writable image durable: its flush, with or without a journal, and its close. The order
//! of steps is in [`super::top`].

use std::sync::atomic::Ordering;

use super::header::{Header, IN_USE_CLOSED};
use super::journal::{Batch, Image, Journal, TAIL};
use super::top::{Found, PAGE, Top, lock};
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

    /// The same; `complete` completes all parts that there are when it is called, where the host has
    /// no room for a journal. Its error is the flush's, and does not latch.
    pub fn flush_or(&self, complete: &dyn Fn() -> Result<()>) -> Result<()> {
        self.gate.run(|| self.flush_alone(complete))
    }

    /// Makes the entries of flushes before the call durable in the image itself: until then a
    /// journal may be all that has them, and no other program reads that. Before what they stand for
    /// elsewhere is given up.
    pub fn settle_entries(&self) -> Result<()> {
        let journal = lock(&self.journal);
        match journal.is_there() {
            true => self.file.sync().inspect_err(|e| self.gate.latch(e)),
            false => Ok(()),
        }
    }

    fn flush_alone(&self, complete: &dyn Fn() -> Result<()>) -> Result<Result<()>> {
        let mut journal = lock(&self.journal);
        let begins = self.journals && self.parts.count() > 0;
        if !journal.is_there() && !begins {
            return self.flush_entries().map(Ok);
        }
        // All taken before the sync: what is committed while it runs has data that it may have
        // missed, and must wait for the next flush. Parts first: one that is completed in between
        // is among the slots.
        let base = journal.wants_base();
        let parts = self.parts.take(base);
        let slots = self.take_pending();
        let nothing = parts.is_empty() && slots.is_empty();
        if !nothing && self.header.dirty() && !self.marked.load(Ordering::Acquire) {
            // A base is about to say that this BAT is on disk.
            self.write_again()?;
        }
        // Durable before the journal is, like all that it says of the file.
        let tailed = match !nothing && !journal.is_there() {
            true => self.set_tail(),
            false => Ok(()),
        };
        if self.unsynced.swap(false, Ordering::AcqRel) || !nothing {
            self.file.sync()?;
        }
        if nothing {
            return Ok(Ok(()));
        }
        let entries = slots.iter().map(|&slot| Ok((slot, self.entry(slot)?)));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        let image = Image {
            file: self.file.as_ref(),
            header: &self.header,
        };
        let batch = Batch { entries, parts };
        let refused = match tailed {
            Ok(()) => journal.log(&image, &batch, base)?,
            Err(e) => Some(e),
        };
        if let Some(e) = refused {
            tracing::warn!(
                file = %self.file.path().display(),
                error = %e,
                "the journal could not be written: clusters are completed instead"
            );
            lock(&self.pending).extend(slots);
            if let Err(e) = complete() {
                self.parts
                    .changed_again(batch.parts.iter().map(|(cluster, _)| *cluster));
                return Ok(Err(e));
            }
            // Writers go on meanwhile: what they begin now is the next flush's.
            self.refuse_parts(batch.parts.iter().map(|(cluster, _)| *cluster))?;
            self.end_journal(&mut journal)?;
            return self.flush_entries().map(Ok);
        }
        self.parts.logged_whole(&slots);
        self.write_entries(&slots)?;
        // Durable with the next sync of the image; until then the journal has them.
        self.unsynced.store(true, Ordering::Release);
        Ok(Ok(()))
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
    /// sync, the journal's name. Error: `Io` while clusters that it names are in parts.
    fn end_journal(&self, journal: &mut Journal) -> Result<()> {
        self.refuse_parts(journal.slots().into_iter().map(u64::from))?;
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

    fn refuse_parts(&self, mut clusters: impl Iterator<Item = u64>) -> Result<()> {
        clusters.try_for_each(|cluster| match self.find(cluster)? {
            Found::Part => {
                let what = format!("cluster {cluster} of the disk is not complete");
                Err(Error::new(Kind::Io, what).on(self.file.path()))
            }
            Found::Below | Found::At(_) => Ok(()),
        })
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
        self.refuse_parts(self.parts.older_than(u64::MAX, usize::MAX).into_iter())?;
        if !self.marked.load(Ordering::Acquire) {
            // A mark found at open and proven harmless is ours to clear, and so is half a mark.
            if !self.unclean.load(Ordering::Acquire) {
                return Ok(());
            }
            self.mark_in_use()?;
        }
        {
            let mut journal = lock(&self.journal);
            if journal.is_there() {
                let ended = self.end_journal(&mut journal);
                ended.inspect_err(|e| self.gate.latch(e))?;
            }
        }
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
