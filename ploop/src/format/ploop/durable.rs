//! Making the writable image durable: its flush, with or without a journal, and its close. The order
//! of steps is in [`super::top`].

use std::sync::atomic::Ordering;

use super::header::{Header, IN_USE_CLOSED};
use super::held::granules_behind;
use super::journal::{Batch, Image, Journal, TAIL};
use super::top::{Found, PAGE, PART, Top, lock};
use crate::error::{Error, Kind, Result};
use crate::tracker::Tracking;

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
        let plain = self.plain.load(Ordering::Acquire);
        let begins = self.journals && !plain && self.parts.count() > 0;
        if !journal.is_there() && !begins {
            // Who came here took us for one that keeps a journal.
            if plain
                && self.parts.count() > 0
                && let Err(e) = complete()
            {
                return Ok(Err(e));
            }
            return self.flush_entries().map(Ok);
        }
        // All taken before the sync: what is committed while it runs has data that it may have
        // missed, and must wait for the next flush. Parts first: one that is completed in between
        // is among the slots.
        let base = journal.wants_base();
        let parts = self.parts.take(base);
        let entries = self.take_pending()?;
        let nothing = parts.is_empty() && entries.is_empty();
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
        let image = Image {
            file: self.file.as_ref(),
            header: &self.header,
        };
        let batch = Batch { entries, parts };
        let refused = match tailed {
            Ok(()) => journal.log(&image, &batch, base)?,
            Err(e) => Some(e),
        };
        journal.charge(&self.held)?;
        if let Some(e) = refused {
            tracing::warn!(
                file = %self.file.path().display(),
                error = %e,
                "the journal could not be written: clusters are completed instead"
            );
            lock(&self.pending).extend(batch.entries.iter().map(|(slot, _)| *slot));
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
        self.parts
            .logged_whole(batch.entries.iter().map(|(slot, _)| *slot));
        self.write_entries(&batch.entries)?;
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
        let entries = self.take_pending()?;
        let unsynced = self.unsynced.swap(false, Ordering::AcqRel);
        if unsynced || !entries.is_empty() {
            self.file.sync()?;
        }
        if entries.is_empty() {
            return Ok(());
        }
        self.write_entries(&entries)?;
        self.file.sync()
    }

    /// Makes durable what was moved or taken out ([`super::moving`]), and all other clusters that are
    /// complete. Parts stay as they are: one that cannot be completed is in nobody's way here.
    pub fn flush_moved(&self) -> Result<()> {
        let _journal = lock(&self.journal);
        self.gate.check()?;
        self.flush_entries().inspect_err(|e| self.gate.latch(e))
    }

    /// The slots that were committed since the last call, ascending, each with its entry. Before the
    /// sync that their bytes need: one that changes while that runs waits for the next.
    fn take_pending(&self) -> Result<Vec<(u32, u32)>> {
        let mut slots = std::mem::take(&mut *lock(&self.pending));
        slots.sort_unstable();
        self.entries_of(slots)
    }

    fn entries_of(&self, slots: Vec<u32>) -> Result<Vec<(u32, u32)>> {
        let of = |slot| Ok((slot, self.entry(slot)?));
        slots.into_iter().map(of).collect()
    }

    /// Lets the journal go; durable on return, and so is all that it names. Order: data, sync, the
    /// entries of its slots and no others (it must explain the BAT for as long as it is there),
    /// sync, the journal's name. Error: `Io` while clusters that it names are in parts. After one
    /// that does not latch, the image goes on with its journal or without.
    pub(super) fn end_journal(&self, journal: &mut Journal) -> Result<()> {
        let latch = |e: &Error| self.gate.latch(e);
        self.refuse_parts(journal.slots().into_iter().map(u64::from))?;
        if journal.is_there() {
            self.file.sync().inspect_err(latch)?;
            journal.settle().inspect_err(latch)?;
            let entries = self.entries_of(journal.slots());
            let written = entries.and_then(|entries| self.write_entries(&entries));
            written.and_then(|()| self.file.sync()).inspect_err(latch)?;
        }
        let ended = journal.end(latch);
        if !journal.is_there() {
            lock(&self.alloc).set_tail(0);
            self.parts.unlogged();
            journal.charge(&self.held)?;
        }
        ended
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

    /// What the table on disk is to have at `slot`: nothing, for a cluster that was taken out and is
    /// there in part again.
    fn entry(&self, slot: u32) -> Result<u32> {
        let page = self.load(u64::from(slot) / PAGE)?;
        let entry = page[(u64::from(slot) % PAGE) as usize].load(Ordering::Acquire);
        Ok(if entry == PART { 0 } else { entry })
    }

    /// Writes `entries` (sorted by slot), and no byte of any other: a neighbour may have been committed
    /// since, and its data is not on disk.
    fn write_entries(&self, entries: &[(u32, u32)]) -> Result<()> {
        let mut bytes = Vec::with_capacity(BAT_WRITE_MAX.min(entries.len() * 4));
        let mut first = 0u64;
        for (i, &(slot, entry)) in entries.iter().enumerate() {
            let slot = u64::from(slot);
            if bytes.is_empty() {
                first = slot;
            }
            bytes.extend_from_slice(&entry.to_le_bytes());
            let goes_on = entries
                .get(i + 1)
                .is_some_and(|&(next, _)| u64::from(next) == slot + 1);
            if !goes_on || bytes.len() >= BAT_WRITE_MAX {
                self.file.write_at(&bytes, Header::slot_offset(first))?;
                bytes.clear();
            }
        }
        Ok(())
    }

    /// Closes the image: the journal ends, flush, cut the file behind the last cluster in use, sync;
    /// the bits of its disk's trackers, sync; clear the mark, sync. An image that was never changed is
    /// not touched, and one that latched stays marked. Its clusters are complete, or it fails.
    pub fn close(&self) -> Result<()> {
        self.close_as(&self.header.marked(IN_USE_CLOSED))
    }

    /// The same, with another header ([`Header::grown`]); to be opened anew then. No cluster lies
    /// before its data area, and nobody is given a place there ([`Top::keep_off`]).
    pub fn close_as(&self, header: &Header) -> Result<()> {
        let tracking = self.tracking();
        let tracking = tracking.as_deref();
        let _one = lock(&self.mark);
        self.gate.check()?;
        self.refuse_parts(self.parts.older_than(u64::MAX, usize::MAX).into_iter())?;
        if !self.marked.load(Ordering::Acquire) {
            // A mark found at open and proven harmless is ours to clear, and so is half a mark.
            let unsaved = tracking.is_some_and(Tracking::is_unsaved);
            if !self.unclean.load(Ordering::Acquire) && !unsaved {
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
        let (used_len, handed_end) = {
            let alloc = lock(&self.alloc);
            (alloc.used_len(), alloc.handed_end())
        };
        let len = self.file.len()?;
        if len != used_len {
            // Room behind that was taken ahead, and is not charged.
            let cut = granules_behind(self.file.as_ref(), used_len, handed_end)?;
            self.file.set_len(used_len)?;
            self.held.back(cut);
        }
        lock(&self.alloc).cut();
        let grows = header.size_sectors != self.header.size_sectors;
        if grows {
            self.clear_for(header)?;
        }
        if len != used_len || grows {
            self.file.sync().inspect_err(|e| self.gate.latch(e))?;
        }
        self.held.settle(self.file.as_ref(), used_len)?;
        let extended = tracking.and_then(|t| self.save_bits(t, header, used_len));
        let header = extended.as_ref().unwrap_or(header);
        // Should this fail, the header may say either, and no change may follow.
        let closed = self.file.write_at(header.bytes(), 0);
        let closed = closed.and_then(|()| self.file.sync());
        closed.inspect_err(|e| self.gate.latch(e))?;
        self.marked.store(false, Ordering::Release);
        self.unclean.store(false, Ordering::Release);
        self.file.keep(self.held.own());
        if let Some(tracking) = tracking {
            tracking.saved();
        }
        Ok(())
    }

    /// Writes the trackers' bits behind the last cluster in use. Where that fails the image is closed
    /// without: then every granule counts as written.
    fn save_bits(&self, tracking: &Tracking, header: &Header, end: u64) -> Option<Header> {
        let saved = tracking.save(self.file.as_ref(), header, end);
        saved.unwrap_or_else(|e| {
            tracing::warn!(
                file = %self.file.path().display(),
                error = %e,
                "the trackers' bits could not be stored: every granule will count as written"
            );
            drop(self.file.set_len(end));
            None
        })
    }

    /// What has taken the place of this image, closed with a larger header, in the same file: with
    /// its home and its charge. Nobody uses this one any more.
    pub fn opened_anew(&self) -> Result<Top> {
        let home = lock(&self.journal).home();
        let own = self.held.own();
        let new = Top::open_at(self.file.clone(), home)?.charged_to(self.held.account().clone())?;
        new.count()?;
        self.held.back(own);
        Ok(new)
    }
}
