//! The writable image on top of a disk: its map, its allocation, its mark, its flush.
//!
//! | step | what | durable before the next step |
//! |---|---|---|
//! | open | what was read | yes |
//! | first change, found marked | the entries that are there, written again where they are | no |
//! | first change | header: in-use mark, extension dropped | yes |
//! | first change, found marked | an ended journal, ended again | yes |
//! | first change | cut the file behind the last cluster in use | no |
//! | write, new cluster | room for the entry; grow the file, complete, write data | no |
//! | commit | the entry, in memory; of a cluster that is not complete, its granules ([`super::parts`]) | – |
//! | flush | data (and length) of every committed cluster | yes |
//! | | without a journal: the BAT entries of those clusters, and of no others | yes |
//! | | with one ([`super::journal`]): those entries, and what changed of parts, in it | yes |
//! | | the BAT entries | no |
//! | close | data; the entries of all that the journal names | yes |
//! | | no journal any more; flush; cut the file behind the last cluster in use | yes |
//! | | header: closed | yes |
//!
//! An entry on disk therefore names a cluster whose bytes are on disk, at every instant. Entries
//! only ever go from 0 to a cluster: discarded clusters are punched where they are and keep their
//! entry, so no cluster changes owner while the image is open, and no lease can see one that does.
//! The one exception is [`Top::take_out`], for an image that is being merged away: it has no journal.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::alloc::{Alloc, Taken};
use super::busy::Busy;
use super::extension;
use super::flush::FlushGate;
use super::header::{FLAG_EMPTY, Header, IN_USE_CLOSED, IN_USE_DIRTY, Version};
use super::journal::{self, Batch, Home, Image, Journal, TAIL};
use super::parts::{Part, Parts};
use crate::error::{Error, Kind, Result};
use crate::paged::Paged;
use crate::store::{StoreFile, read_exact};
use crate::verify::{Class, FindingKind, ImageScan, Used, class_of, scan_image};

/// BAT entries in a page of the map: 4 KiB.
pub(super) const PAGE: u64 = crate::verify::PAGE_ENTRIES;
/// Bytes of a block of the host, or a multiple of it.
const BLOCK: u64 = 4096;
/// The most bytes of BAT written in one call.
const BAT_WRITE_MAX: usize = 16 * 1024;

/// Stands in the map, never on disk, for a cluster that is not complete. No entry is this: a v1 one
/// is a multiple of the cluster, and a v2 one would need a longer file than [`Top::open`] takes.
const PART: u32 = u32::MAX;

type Page = Box<[AtomicU32]>;

/// What an image knows of a guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing: its bytes are below.
    Below,
    /// Some of its bytes ([`Top::parts`]).
    Part,
    /// All of them, from this byte of the file on.
    At(u64),
}

/// The writable image. All methods may be called from many threads.
#[derive(Debug)]
pub struct Top {
    pub(super) file: Arc<dyn StoreFile>,
    pub(super) header: Header,
    map: Paged<Page>,
    /// A bit per page: it has entries on disk. The others are zeros and never read.
    stored: Box<[u64]>,
    alloc: Mutex<Alloc>,
    /// Clusters being allocated.
    pub busy: Busy,
    /// Clusters that are not complete.
    parts: Parts,
    /// Slots committed since the last flush took them.
    pending: Mutex<Vec<u32>>,
    /// Blocks of the BAT that have room on the host.
    roomy: Mutex<BTreeSet<u64>>,
    pub(super) gate: FlushGate,
    /// Locked by whoever writes to the BAT.
    journal: Mutex<Journal>,
    /// A flush may begin one.
    journals: bool,
    /// Data was written, or a length changed, since the last flush began.
    unsynced: AtomicBool,
    marked: AtomicBool,
    /// The header may say in use: found so at open, or we began to mark it. Closing clears it.
    unclean: AtomicBool,
    mark: Mutex<()>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each of these is whole between two statements; a panic elsewhere does not spoil it.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Top {
    /// Opens an image for writing. Scans its BAT; a damaged one is refused. It is made durable as it
    /// stands, closed cleanly or not, and goes on from there. Writes nothing. It has no journal: its
    /// clusters are completed by whoever flushes it.
    pub fn open(file: Arc<dyn StoreFile>) -> Result<Top> {
        Top::open_at(file, None)
    }

    /// The same, with its journal at `home`: one that is there is replayed in memory, and flushes
    /// keep one. Error: `Corrupt` for one that does not explain the image.
    pub fn open_at(file: Arc<dyn StoreFile>, home: Option<Home>) -> Result<Top> {
        let scan = scan_image(file.as_ref())?;
        refuse_unwritable(file.as_ref(), &scan)?;
        // What we read, the mark of a clean close included, may still be in the page cache of a
        // killed process only.
        file.sync()?;
        let found = match &home {
            Some(home) => journal::find(home, file.as_ref(), &scan)?,
            None => None,
        };
        let journals = home.as_ref().is_some_and(Home::begins);
        let replay = found.unwrap_or_default();
        let journal = match home {
            Some(home) if !replay.slots.is_empty() => Journal::found(home, replay.slots),
            home => Journal::new(home),
        };
        let mut alloc = Alloc::new(&scan.header, &scan.used.with(&replay.claimed));
        if journal.is_there() {
            alloc.set_tail(TAIL);
        }
        let pages = u64::from(scan.header.entries).div_ceil(PAGE);
        let mut stored = vec![0u64; pages.div_ceil(64) as usize].into_boxed_slice();
        for page in scan.pages {
            stored[page as usize / 64] |= 1 << (page % 64);
        }
        let top = Top {
            map: Paged::new(pages),
            stored,
            alloc: Mutex::new(alloc),
            busy: Busy::default(),
            parts: Parts::default(),
            pending: Mutex::default(),
            roomy: Mutex::default(),
            gate: FlushGate::default(),
            journal: Mutex::new(journal),
            journals,
            unsynced: AtomicBool::new(false),
            marked: AtomicBool::new(false),
            unclean: AtomicBool::new(scan.header.dirty()),
            mark: Mutex::new(()),
            header: scan.header,
            file,
        };
        for (slot, part) in replay.parts {
            top.parts.found(u64::from(slot));
            top.commit_part(u64::from(slot), part)?;
        }
        for (slot, entry) in replay.entries {
            top.commit(u64::from(slot), top.header.entry_offset(entry))?;
        }
        Ok(top)
    }

    /// A new, empty image that was created with `header` marked in use, in `file`; its journals go
    /// to `home`.
    pub fn fresh(file: Arc<dyn StoreFile>, header: &Header, home: Option<Home>) -> Top {
        let pages = u64::from(header.entries).div_ceil(PAGE);
        Top {
            map: Paged::new(pages),
            stored: vec![0u64; pages.div_ceil(64) as usize].into_boxed_slice(),
            alloc: Mutex::new(Alloc::new(header, &Used::default())),
            busy: Busy::default(),
            parts: Parts::default(),
            pending: Mutex::default(),
            roomy: Mutex::default(),
            gate: FlushGate::default(),
            journals: home.is_some(),
            journal: Mutex::new(Journal::new(home)),
            unsynced: AtomicBool::new(false),
            marked: AtomicBool::new(true),
            unclean: AtomicBool::new(true),
            mark: Mutex::new(()),
            header: header.marked(IN_USE_CLOSED),
            file,
        }
    }

    /// The image's file.
    pub fn file(&self) -> &Arc<dyn StoreFile> {
        &self.file
    }

    /// The header as it was at open.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What this image has of a guest cluster.
    pub fn find(&self, cluster: u64) -> Result<Found> {
        let Some(page) = self.page(cluster / PAGE)? else {
            return Ok(Found::Below);
        };
        Ok(
            match page[(cluster % PAGE) as usize].load(Ordering::Acquire) {
                0 => Found::Below,
                PART => Found::Part,
                entry => Found::At(self.header.entry_offset(entry)),
            },
        )
    }

    /// The file offset of a guest cluster; `None` when this image does not have all of it.
    pub fn lookup(&self, cluster: u64) -> Result<Option<u64>> {
        Ok(match self.find(cluster)? {
            Found::At(offset) => Some(offset),
            Found::Below | Found::Part => None,
        })
    }

    /// The clusters that are not complete.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// The next cluster at or after `from` and before `end` that this image may have. Skips whole
    /// pages without entries.
    pub fn next_page_with_entries(&self, from: u64, end: u64) -> u64 {
        let mut at = from;
        while at < end {
            let page = at / PAGE;
            if self.map.get(page).is_some() || self.is_stored(page) {
                return at;
            }
            at = (page + 1) * PAGE;
        }
        end
    }

    fn is_stored(&self, page: u64) -> bool {
        self.stored[page as usize / 64] >> (page % 64) & 1 == 1
    }

    /// The page of the map, loaded if it has entries on disk; `None` when it has none anywhere.
    fn page(&self, page: u64) -> Result<Option<&Page>> {
        match self.map.get(page) {
            Some(p) => Ok(Some(p)),
            None if !self.is_stored(page) => Ok(None),
            None => self.load(page).map(Some),
        }
    }

    pub(super) fn load(&self, page: u64) -> Result<&Page> {
        self.map.get_or_make(page, || {
            let first = page * PAGE;
            let count = PAGE.min(u64::from(self.header.entries).saturating_sub(first));
            let mut bytes = vec![0; count as usize * 4];
            if self.is_stored(page) {
                read_exact(self.file.as_ref(), &mut bytes, Header::slot_offset(first))?;
            }
            let entry = |b: &[u8]| AtomicU32::new(u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            let mut made: Vec<_> = bytes.chunks_exact(4).map(entry).collect();
            made.resize_with(PAGE as usize, || AtomicU32::new(0));
            Ok(made.into_boxed_slice())
        })
    }

    /// The in-use mark, before the first change. Order: header, sync, cut the file.
    pub fn before_change(&self) -> Result<()> {
        if self.marked.load(Ordering::Acquire) {
            return self.gate.check();
        }
        let _one = lock(&self.mark);
        self.gate.check()?;
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        self.mark_in_use()
    }

    /// The caller holds `mark`. After an error the next change tries again, all from the start, but
    /// not after a failed sync: that one latches.
    fn mark_in_use(&self) -> Result<()> {
        if extension::in_force(&self.header) {
            tracing::warn!(
                file = %self.file.path().display(),
                "the image's change-tracking bitmap ends here: it is dropped by the first write"
            );
        }
        if self.header.dirty() {
            self.write_again()?;
        }
        self.unclean.store(true, Ordering::Release);
        self.file
            .write_at(self.header.marked(IN_USE_DIRTY).bytes(), 0)?;
        self.file.sync().inspect_err(|e| self.gate.latch(e))?;
        if self.header.dirty() {
            lock(&self.journal).end_again(|e| self.gate.latch(e))?;
        }
        let used_len = lock(&self.alloc).used_len();
        // Of a marked image even the length may be one that a failed sync left in the cache only.
        if self.header.dirty() || self.file.len()? != used_len {
            self.file.set_len(used_len)?;
            // What a journal's tail keeps of the next cluster may be anything.
            let tail = lock(&self.alloc).tail();
            if tail > 0 {
                self.file.punch(used_len - tail, tail)?;
            }
            self.unsynced.store(true, Ordering::Release);
        }
        self.marked.store(true, Ordering::Release);
        Ok(())
    }

    /// Writes the entries of an image that was not closed where they are.
    ///
    /// A sync that failed in another process leaves pages that the kernel takes for clean though
    /// the disk never got them. Written again, they are dirty again. Every entry that can be read
    /// was written after its cluster's data was on disk, so they may become durable in any order.
    fn write_again(&self) -> Result<()> {
        let mut bytes = vec![0; PAGE as usize * 4];
        let pages = u64::from(self.header.entries).div_ceil(PAGE);
        for page in (0..pages).filter(|&page| self.is_stored(page)) {
            let first = page * PAGE;
            let count = PAGE.min(u64::from(self.header.entries) - first);
            let entries = &mut bytes[..count as usize * 4];
            read_exact(self.file.as_ref(), entries, Header::slot_offset(first))?;
            self.file.write_at(entries, Header::slot_offset(first))?;
        }
        Ok(())
    }

    /// Takes room on the host for the entries of `clusters`: the BAT of a new image is a hole, and
    /// a flush that found the host full would stop every writer. Comes before the commit.
    pub fn make_room(&self, clusters: Range<u64>) -> Result<()> {
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
            self.file
                .reserve(start, BLOCK.min(self.header.data_start - start))?;
            lock(&self.roomy).insert(block);
        }
        Ok(())
    }

    /// Hands out up to `want` contiguous file clusters that read as zeros; returns (first byte,
    /// count). The caller holds [`Top::busy`] for the guest clusters.
    pub fn allocate(&self, want: u64) -> Result<(u64, u64)> {
        let (Taken { clusters, stale }, offset) = {
            let mut alloc = lock(&self.alloc);
            let taken = alloc.take(want, self.file.as_ref())?;
            let offset = alloc.offset(taken.clusters.start);
            (taken, offset)
        };
        let count = clusters.end - clusters.start;
        if stale && let Err(e) = self.file.punch(offset, count * self.header.cluster_bytes()) {
            lock(&self.alloc).give_back(clusters);
            return Err(e);
        }
        Ok((offset, count))
    }

    /// Hands out one file cluster that reads as zeros; gives its first byte, and whether its room on
    /// the host is taken: it is unless that is short. The caller holds [`Top::busy`] for the guest
    /// cluster.
    pub fn allocate_roomy(&self) -> Result<(u64, bool)> {
        let (Taken { clusters, stale }, room, offset) = {
            let mut alloc = lock(&self.alloc);
            let (taken, room) = alloc.take_roomy(self.file.as_ref())?;
            let offset = alloc.offset(taken.clusters.start);
            (taken, room, offset)
        };
        if stale && let Err(e) = self.file.punch(offset, self.header.cluster_bytes()) {
            lock(&self.alloc).give_back(clusters);
            return Err(e);
        }
        Ok((offset, room))
    }

    /// Takes back file clusters that were allocated and never committed.
    pub fn give_back(&self, offset: u64, count: u64) {
        let first = (offset - self.header.data_start) / self.header.cluster_bytes();
        lock(&self.alloc).give_back(first..first + count);
    }

    /// Enters a cluster whose bytes are written: from now on every read sees it.
    pub fn commit(&self, cluster: u64, offset: u64) -> Result<()> {
        let entry = self.header.entry_for(offset).ok_or_else(|| {
            Error::new(
                Kind::NoSpace,
                format!("file offset {offset} fits no BAT entry"),
            )
        })?;
        let page = self.load(cluster / PAGE)?;
        // Visible and pending in one step: who sees the entry may write in place and flush, and
        // that flush must take the slot along.
        let mut pending = lock(&self.pending);
        page[(cluster % PAGE) as usize].store(entry, Ordering::Release);
        // `entries` is 32 bits, and every cluster of the disk is below it.
        pending.push(cluster as u32);
        drop(pending);
        self.wrote();
        Ok(())
    }

    /// Enters a cluster whose bytes are written in part: what is not `present` is read from below.
    /// The caller holds [`Top::busy`] for it.
    pub fn commit_part(&self, cluster: u64, part: Part) -> Result<()> {
        let page = self.load(cluster / PAGE)?;
        self.parts.insert(cluster, part);
        page[(cluster % PAGE) as usize].store(PART, Ordering::Release);
        self.wrote();
        Ok(())
    }

    /// Enters more written granules of a part; the last ones complete the cluster. The caller holds
    /// [`Top::busy`] for it.
    pub fn fill_part(&self, cluster: u64, granules: Range<u64>) -> Result<()> {
        let full = self.parts.change(cluster, |part| {
            part.present.set(granules);
            part.present.full().then_some(part.offset)
        });
        self.wrote();
        match full {
            Some(Some(offset)) => self.finish_part(cluster, offset),
            _ => Ok(()),
        }
    }

    /// Enters a cluster that was a part and whose bytes are all written. The caller holds
    /// [`Top::busy`] for it.
    pub fn finish_part(&self, cluster: u64, offset: u64) -> Result<()> {
        // In this order: who finds the mark and no part looks again, and finds the entry.
        self.commit(cluster, offset)?;
        self.parts.remove(cluster);
        Ok(())
    }

    /// A write to a part was given up: what it may have left is no data.
    pub fn soil_part(&self, cluster: u64) {
        self.parts.change(cluster, |part| part.soiled = true);
    }

    /// Notes that bytes of the file changed and the next flush must sync.
    pub fn wrote(&self) {
        self.unsynced.store(true, Ordering::Release);
    }

    /// Fails when an earlier failure latched the image.
    pub fn check_latch(&self) -> Result<()> {
        self.gate.check()
    }

    /// Latches the image: every later change and flush fails, saying `why`.
    pub fn latch(&self, why: &Error) {
        self.gate.latch(why);
    }

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
        if !journal.is_there() && !(self.journals && self.parts.count() > 0) {
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

/// Writing needs more than reading does: a BAT without damage, a data area on the cluster grid, and
/// nothing that we must keep and do not understand.
fn refuse_unwritable(file: &dyn StoreFile, scan: &ImageScan) -> Result<()> {
    let h = &scan.header;
    let check = || {
        format!(
            "Run `ploop check {}` to see all of it",
            file.path().display()
        )
    };
    super::delta::refuse_converting(file, h)?;
    if h.version == Version::V2 && scan.file_len / h.cluster_bytes() >= u64::from(PART) {
        let what = "a file of 2^32 clusters and more can be read only";
        return Err(Error::unsupported(what).on(file.path()));
    }
    if let Some(f) = scan
        .findings
        .iter()
        .find(|f| f.kind == FindingKind::UnknownFeature)
    {
        let what = format!("{}: the image can be read, not written", f.what);
        return Err(Error::unsupported(what).on(file.path()).at(f.offset));
    }
    if h.flags & !FLAG_EMPTY != 0 {
        let what = format!(
            "header flags {:#x} are not known: the image can be read only",
            h.flags
        );
        return Err(Error::unsupported(what).on(file.path()).at(52));
    }
    let harmless = |k: FindingKind| {
        matches!(
            k,
            FindingKind::ExtensionDangling
                | FindingKind::ExtensionMagic
                | FindingKind::ExtensionOverlapsData
        )
    };
    let worst = scan.findings.iter().filter(|f| !harmless(f.kind));
    if let Some(f) = worst.clone().find(|f| f.kind.class() == Class::Corrupt) {
        let n = worst.filter(|f| f.kind.class() == Class::Corrupt).count();
        let what = format!("the image is damaged ({n} findings, the first: {})", f.what);
        return Err(Error::corrupt(what)
            .on(file.path())
            .at(f.offset)
            .fix(check()));
    }
    debug_assert!(class_of(&scan.findings) <= Class::Corrupt);
    if h.version == Version::V1 && !h.data_start.is_multiple_of(h.cluster_bytes()) {
        let what = "v1 image with a data area that is not on the cluster grid: can be read only";
        return Err(Error::unsupported(what)
            .on(file.path())
            .at(48)
            .fix("Convert it: ploop convert SOURCE TARGET --to ploop"));
    }
    Ok(())
}
