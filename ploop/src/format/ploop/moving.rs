//! Moving clusters of the writable image to other places of its file, under its clients, taking out
//! what is below them anyway, and putting another header before them.
//!
//! ```text
//!  plain       no journal; a flush completes parts           gate closed
//!  keep off    nobody is given a place that is to be free    gate closed
//!  move        copy, enter the new place in memory; or
//!  unname      take the entry out, in memory                 gate closed, one cluster at a time
//!  flush       the copies, sync; their BAT entries, sync
//!  drain       nobody reads the old places any more
//!  give back   the old places: punched, or part of the BAT
//! ```
//!
//! Until the flush is done, the BAT on disk names the old places, which nobody writes to: a crash
//! finds every cluster whole, in one place or the other. A journal knows entries that begin, and
//! none that change: so there is none meanwhile.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::bitmaps;
use super::header::Header;
use super::held::{data_in, granules_behind, granules_in};
use super::top::{PAGE, Top, lock};
use crate::account::GRANULE;
use crate::error::{Error, Kind, Result};
use crate::store::read_or_zero;

/// Bytes copied at a time.
const COPY: usize = 64 * 1024;

impl Top {
    /// No journal from here on until [`Top::end_plain`]: what it names is made durable in the image,
    /// and it ends. Gate closed, parts complete.
    pub fn begin_plain(&self) -> Result<()> {
        self.gate.check()?;
        let mut journal = lock(&self.journal);
        if journal.is_there() {
            self.end_journal(&mut journal)?;
        }
        self.plain.store(true, Ordering::Release);
        Ok(())
    }

    /// Flushes may begin a journal again.
    pub fn end_plain(&self) {
        self.plain.store(false, Ordering::Release);
    }

    /// Gives nobody a place in the file before byte `end` any more, and empties those that were free
    /// there; returns them, (first byte, count) each. Error: `NoSpace`. Gate closed, parts complete:
    /// those are not among [`Top::clusters_in`].
    pub fn keep_off(&self, end: u64) -> Result<Vec<(u64, u64)>> {
        let bytes = self.header.cluster_bytes();
        let first = end.saturating_sub(self.header.data_start).div_ceil(bytes);
        let (free, fresh) = lock(&self.alloc).keep_off(first, self.file.as_ref())?;
        self.wrote();
        let all = || free.iter().chain([&fresh]).filter(|r| !r.is_empty());
        let empty = |range: &Range<u64>| -> Result<(u64, u64)> {
            let count = range.end - range.start;
            let (offset, len) = (self.header.data_start + range.start * bytes, count * bytes);
            // What was never handed out may have room, and no charge.
            let held = match *range == fresh {
                true => 0,
                false => granules_in(self.file.as_ref(), offset..offset + len)?,
            };
            self.file.punch(offset, len)?;
            self.held.back(held);
            Ok((offset, count))
        };
        let kept: Result<Vec<_>> = all().map(empty).collect();
        kept.inspect_err(|_| {
            // What is left of them is charged still.
            self.held.doubt();
            let mut alloc = lock(&self.alloc);
            all().for_each(|range| alloc.give_back(range.clone()));
        })
    }

    /// The guest clusters that lie in bytes `range` of the file, ascending. Blocks: reads the BAT.
    pub fn clusters_in(&self, range: Range<u64>) -> Result<Vec<u64>> {
        let (mut at, end) = (0, u64::from(self.header.entries));
        let mut found = Vec::new();
        loop {
            at = self.next_page_with_entries(at, end);
            if at >= end {
                return Ok(found);
            }
            if self.lookup(at)?.is_some_and(|o| range.contains(&o)) {
                found.push(at);
            }
            at += 1;
        }
    }

    /// Copies a guest cluster to the place `to`, which was allocated, and enters it there; returns
    /// where it was, and the granules that are charged of it: as many more are, of the copy,
    /// whatever the limit. After an error the caller gives `to` back. Gate closed. Not durable
    /// before a flush.
    pub fn move_to(&self, cluster: u64, to: u64) -> Result<(u64, u64)> {
        self.gate.check()?;
        let bytes = self.header.cluster_bytes();
        let Some(from) = self.lookup(cluster)? else {
            let what = format!("cluster {cluster} of the disk is not in this image");
            return Err(Error::new(Kind::Io, what).on(self.file.path()));
        };
        let file = self.file.as_ref();
        let held = self.held.known(file, cluster, from)?;
        self.held.note(held.count_set());
        let copied = (|| {
            let mut buf = vec![0; COPY];
            // What is charged and was not written is by that.
            for run in held.set_runs() {
                let (mut at, end) = (run.start * GRANULE, (run.end * GRANULE).min(bytes));
                while at < end {
                    let n = (end - at).min(COPY as u64) as usize;
                    read_or_zero(file, &mut buf[..n], from + at)?;
                    file.write_at(&buf[..n], to + at)?;
                    at += n as u64;
                }
            }
            self.commit(cluster, to)
        })();
        // What it had written is noted when its place is given back.
        copied.inspect_err(|_| self.held.back(held.count_set()))?;
        Ok((from, held.count_set()))
    }

    /// Takes a guest cluster out of this image, which reads the same below; returns where it was, and
    /// the granules that are charged of it. Gate closed. Not durable before a flush.
    pub fn unname(&self, cluster: u64) -> Result<(u64, u64)> {
        self.gate.check()?;
        let bytes = self.header.cluster_bytes();
        let Some(from) = self.lookup(cluster)? else {
            let what = format!("cluster {cluster} of the disk is not in this image");
            return Err(Error::new(Kind::Io, what).on(self.file.path()));
        };
        let held = self
            .held
            .release(self.file.as_ref(), cluster, from, 0..bytes)?;
        let page = self.load(cluster / PAGE)?;
        let mut pending = lock(&self.pending);
        page[(cluster % PAGE) as usize].store(0, Ordering::Release);
        pending.push(cluster as u32);
        drop(pending);
        self.wrote();
        Ok((from, held))
    }

    /// Empties a place that a flush has made unnamed and nobody reads any more, and takes `charged`
    /// granules off the charge. Nobody is given it before [`Top::give_back`].
    pub fn vacate(&self, offset: u64, charged: u64) -> Result<()> {
        // What a failed call leaves is charged until the image is closed.
        self.file
            .punch(offset, self.header.cluster_bytes())
            .inspect_err(|_| self.held.doubt())?;
        self.held.back(charged);
        self.wrote();
        Ok(())
    }

    /// Empties a guest cluster that is all zeros; returns the granules that it gave up. Gate closed.
    pub fn hollow(&self, cluster: u64) -> Result<u64> {
        self.gate.check()?;
        let bytes = self.header.cluster_bytes();
        let Some(offset) = self.lookup(cluster)? else {
            return Ok(0);
        };
        let file = self.file.as_ref();
        let held = self.held.release(file, cluster, offset, 0..bytes)?;
        // What a failed call leaves is charged until the image is closed.
        file.punch(offset, bytes)
            .inspect_err(|_| self.held.doubt())?;
        self.held.back(held);
        self.wrote();
        Ok(held)
    }

    /// Granules that places hold that are free, and what lies behind the last one in use: of an image
    /// that was not changed yet, anything; else what was handed out, but no room that was taken ahead.
    pub fn spare(&self) -> Result<u64> {
        let (mut free, named, handed) = {
            let alloc = lock(&self.alloc);
            let of = |r: Range<u64>| alloc.offset(r.start)..alloc.offset(r.end);
            let free: Vec<_> = alloc.free().map(of).collect();
            (free, alloc.named_end(), alloc.handed_end())
        };
        let end = match self.marked.load(Ordering::Acquire) {
            true => handed,
            false => self.file.len()?,
        };
        free.push(named..end.max(named));
        let mut sum = 0;
        for range in free {
            sum += granules_in(self.file.as_ref(), range)?;
        }
        let marked = self.marked.load(Ordering::Acquire);
        let bits = match self.tracking().filter(|t| !marked && t.lasts()) {
            // They go with the first change, and are there again after the close.
            Some(_) => bitmaps::granules(self.file.as_ref(), &self.header)?,
            None => 0,
        };
        Ok(sum.saturating_sub(bits))
    }

    /// Empties all places that are free.
    pub fn empty_free(&self) -> Result<()> {
        self.gate.check()?;
        let taken = lock(&self.alloc).take_free();
        let mut failed = None;
        for range in taken {
            if failed.is_none() {
                let (start, end) = {
                    let alloc = lock(&self.alloc);
                    (alloc.offset(range.start), alloc.offset(range.end))
                };
                let emptied = granules_in(self.file.as_ref(), start..end)
                    .and_then(|held| self.file.punch(start, end - start).map(|()| held));
                match emptied {
                    Ok(held) => self.held.back(held),
                    Err(e) => {
                        self.held.doubt();
                        failed = Some(e);
                    }
                }
            }
            lock(&self.alloc).give_back(range);
        }
        self.wrote();
        failed.map_or(Ok(()), Err)
    }

    /// Whether the file is longer than its last place in use needs.
    pub fn is_longer(&self) -> Result<bool> {
        Ok(self.file.len()? > lock(&self.alloc).used_len())
    }

    /// Cuts the file behind its last place in use. Gate closed.
    pub fn cut(&self) -> Result<()> {
        self.gate.check()?;
        let mut alloc = lock(&self.alloc);
        let (used_len, handed, file) = (alloc.used_len(), alloc.handed_end(), self.file.as_ref());
        // Room that was taken ahead is not charged.
        let charged = granules_behind(file, used_len, handed)?;
        // What a journal's tail keeps of the next cluster may be anything.
        let tail = alloc.tail();
        if tail > 0 {
            file.punch(used_len - tail, tail)?;
        }
        file.set_len(used_len)?;
        alloc.cut();
        self.held.back(charged);
        self.wrote();
        Ok(())
    }

    /// Whether it was changed since it was opened, or closed.
    pub fn is_marked(&self) -> bool {
        self.marked.load(Ordering::Acquire)
    }

    /// The first byte of the file behind all places that were ever handed out.
    pub fn handed_end(&self) -> u64 {
        lock(&self.alloc).handed_end()
    }

    /// The first byte of the file behind as many places as there are guest clusters in it.
    pub fn packed_end(&self) -> u64 {
        lock(&self.alloc).packed_end()
    }

    /// Makes room for the BAT and the disk of `header`, which is larger than this image's: zeros
    /// where its new entries will be, and behind the disk's end as it is. Nothing names any of it, and
    /// none of it is charged.
    pub(super) fn clear_for(&self, header: &Header) -> Result<()> {
        let (file, old) = (self.file.as_ref(), &self.header);
        let end = Header::slot_offset(old.clusters());
        self.wipe(end..old.data_start)?;
        if old.size() % old.cluster_bytes() > 0
            && let Some(last) = self.lookup(old.clusters() - 1)?
        {
            self.wipe(last + old.size() % old.cluster_bytes()..last + old.cluster_bytes())?;
        }
        let moved = old.data_start..header.data_start;
        if !moved.is_empty() {
            file.punch(moved.start, moved.end - moved.start)?;
        }
        Ok(())
    }

    /// Writes zeros over what in `range` is not zeros: no room is taken by that.
    fn wipe(&self, range: Range<u64>) -> Result<()> {
        let (mut buf, zeros) = (vec![0; COPY], vec![0; COPY]);
        for data in data_in(self.file.as_ref(), range)? {
            let mut at = data.start;
            while at < data.end {
                let n = (data.end - at).min(COPY as u64) as usize;
                read_or_zero(self.file.as_ref(), &mut buf[..n], at)?;
                if buf[..n].iter().any(|&b| b != 0) {
                    self.file.write_at(&zeros[..n], at)?;
                }
                at += n as u64;
            }
        }
        Ok(())
    }
}
