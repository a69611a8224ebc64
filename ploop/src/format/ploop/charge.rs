//! What a writable image takes of its host, on the account of its disk ([`super::held`]), and the room
//! for its table.
//!
//! Counted at open, at once for a fresh image, else before the first change: what the file holds up to
//! its last cluster in use, what parts are to hold, the journal, and blocks of the table that only a
//! journal has entries for.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::header::Header;
use super::held::{Held, granules_in};
use super::top::{BLOCK, Top, lock};
use crate::account::Account;
use crate::error::Result;
use crate::host::Paid;
use crate::store::StoreFile;

impl Top {
    /// The same, charged to `account`; of a fresh one what it holds is at once. Before anybody uses
    /// it.
    pub fn charged_to(mut self, account: Arc<Account>) -> Result<Top> {
        self.held.charge_to(account);
        if self.marked.load(Ordering::Acquire) {
            self.count_alone()?;
        }
        Ok(self)
    }

    /// What of it is charged, and to whom. Complete once [`Top::count`] was.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Puts what the image held at open on the account, if that was not done. Blocks: asks the file
    /// for all its data. The first change does the same.
    pub fn count(&self) -> Result<()> {
        let _one = lock(&self.mark);
        self.count_alone()
    }

    /// The caller holds `mark`, or is alone.
    pub(super) fn count_alone(&self) -> Result<()> {
        if self.counted.load(Ordering::Acquire) {
            return Ok(());
        }
        let kept = self.file.recall().filter(|_| !self.header.dirty());
        let granules = match kept {
            Some(granules) => granules,
            // Behind that is nothing that stays: the first change cuts it.
            None => granules_in(self.file.as_ref(), 0..lock(&self.alloc).used_len())?,
        };
        // What is not there of a cluster that is to be completed.
        for cluster in self.parts.older_than(u64::MAX, usize::MAX) {
            if let Some(part) = self.parts.get(cluster) {
                let missing = part.present.missing();
                let file = self.file.as_ref();
                self.held.put(file, cluster, part.offset, &missing)?;
            }
        }
        let mut journal = lock(&self.journal);
        journal.charge(&self.held)?;
        // Entries that only the journal has get their blocks of the BAT later.
        let slots = journal.slots().into_iter().map(u64::from);
        for block in slots.map(|slot| Header::slot_offset(slot) / BLOCK) {
            let start = block * BLOCK;
            let end = (start + BLOCK).min(self.header.data_start);
            if granules_in(self.file.as_ref(), start..end)? == 0 && lock(&self.owed).insert(block) {
                self.held.note(1);
            }
        }
        // Last, and once: what came before does nothing more when it is done again.
        self.held.note(granules);
        self.counted.store(true, Ordering::Release);
        Ok(())
    }

    /// How many of the table's `blocks` hold nothing and are not charged.
    pub(super) fn empty_blocks(&self, blocks: Range<u64>) -> Result<u64> {
        let mut empty = 0;
        for block in blocks {
            let range = block * BLOCK..((block + 1) * BLOCK).min(self.header.data_start);
            if !lock(&self.owed).contains(&block) && granules_in(self.file.as_ref(), range)? == 0 {
                empty += 1;
            }
        }
        Ok(empty)
    }

    /// Takes room on the host for the entries of `clusters`: the BAT of a new image is a hole, and
    /// a flush that found the host full would stop every writer. Comes before the commit.
    pub fn make_room(&self, clusters: Range<u64>) -> Result<()> {
        self.make_room_by(clusters, self.guest.as_ref(), &|more| self.held.pay(more))
    }

    /// The same, charged whatever the limit: what is merged has its place already.
    pub fn make_room_anyway(&self, clusters: Range<u64>) -> Result<()> {
        let note = |more| {
            self.held.note(more);
            Ok(Paid::default())
        };
        self.make_room_by(clusters, self.file.as_ref(), &note)
    }

    fn make_room_by(
        &self,
        clusters: Range<u64>,
        file: &dyn StoreFile,
        pay: &dyn Fn(u64) -> Result<Paid>,
    ) -> Result<()> {
        let blocks = Header::slot_offset(clusters.start) / BLOCK
            ..Header::slot_offset(clusters.end).div_ceil(BLOCK);
        if clusters.is_empty() {
            return Ok(());
        }
        let missing: Vec<u64> = {
            let roomy = lock(&self.roomy);
            blocks.filter(|b| !roomy.contains(b)).collect()
        };
        // Without the lock: a disk that is slow here holds up nobody else.
        for block in missing {
            let start = block * BLOCK;
            let end = (start + BLOCK).min(self.header.data_start);
            let more = self.empty_blocks(block..block + 1)?;
            let _paid = pay(more)?;
            let room = file.reserve(start, end - start);
            // It may have been another's meanwhile.
            if room.is_err() || !lock(&self.roomy).insert(block) {
                self.held.back(more);
            }
            room?;
        }
        Ok(())
    }

    /// Makes clusters that were handed out hold nothing, or takes them back.
    pub(super) fn empty(&self, clusters: &Range<u64>, offset: u64) -> Result<()> {
        let end = offset + (clusters.end - clusters.start) * self.header.cluster_bytes();
        let emptied = granules_in(self.file.as_ref(), offset..end)
            .and_then(|held| self.file.punch(offset, end - offset).map(|()| held));
        match emptied {
            Ok(held) => self.held.back(held),
            Err(e) => {
                self.held.doubt();
                lock(&self.alloc).give_back(clusters.clone());
                return Err(e);
            }
        }
        Ok(())
    }
}
