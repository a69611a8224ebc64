//! The writable image on top of a disk: its map, its allocation, its mark. Its flush and its close
//! are next door ([`super::durable`]).
//!
//! | step | what | durable before the next step |
//! |---|---|---|
//! | open | what was read | yes |
//! | first change, found marked | the entries that are there, written again where they are | no |
//! | first change | the trackers' side file ([`crate::tracker`]) | yes |
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
//! | | the trackers' bits, behind that cluster | yes |
//! | | header: closed | yes |
//!
//! An entry on disk therefore names a cluster whose bytes are on disk, at every instant. Entries
//! only ever go from 0 to a cluster: discarded clusters are punched where they are and keep their
//! entry, so no cluster changes owner while the image is open, and no lease can see one that does.
//! Two exceptions have no journal meanwhile: [`Top::take_out`], for an image that is being merged away,
//! and [`super::moving`], which gives a place up once no entry names it, on disk or in a lease.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;

use super::alloc::{Alloc, Taken};
use super::busy::Busy;
use super::extension;
use super::flush::FlushGate;
use super::header::{FLAG_EMPTY, Header, IN_USE_CLOSED, IN_USE_DIRTY, Version};
use super::held::{Held, granules_in};
use super::journal::{self, Home, Journal, TAIL};
use super::parts::{Part, Parts};
use crate::error::{Error, Kind, Result};
use crate::paged::Paged;
use crate::store::{StoreFile, read_exact};
use crate::tracker::Tracking;
use crate::verify::{Class, FindingKind, ImageScan, Used, class_of, scan_image};

/// BAT entries in a page of the map: 4 KiB.
pub(super) const PAGE: u64 = crate::verify::PAGE_ENTRIES;
/// Bytes of a block of the host, or a multiple of it.
pub(super) const BLOCK: u64 = 4096;

/// Stands in the map, never on disk, for a cluster that is not complete. No entry is this: a v1 one
/// is a multiple of the cluster, and a v2 one would need a longer file than [`Top::open`] takes.
pub(super) const PART: u32 = u32::MAX;

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
    /// The same without the store's reserve.
    pub(super) guest: Arc<dyn StoreFile>,
    pub(super) header: Header,
    map: Paged<Page>,
    /// A bit per page: it has entries on disk. The others are zeros and never read.
    stored: Box<[u64]>,
    pub(super) alloc: Mutex<Alloc>,
    /// Clusters being allocated.
    pub busy: Busy,
    /// Clusters that are not complete.
    pub(super) parts: Parts,
    /// What is charged to the disk's account.
    pub(super) held: Held,
    /// The granules that were there at open are on the account.
    pub(super) counted: AtomicBool,
    /// Slots committed since the last flush took them.
    pub(super) pending: Mutex<Vec<u32>>,
    /// Blocks of the BAT that have room on the host.
    pub(super) roomy: Mutex<BTreeSet<u64>>,
    /// Blocks of the BAT that are charged and hold nothing yet: a journal has their entries.
    pub(super) owed: Mutex<BTreeSet<u64>>,
    pub(super) gate: FlushGate,
    /// Locked by whoever writes to the BAT.
    pub(super) journal: Mutex<Journal>,
    /// A flush may begin one.
    pub(super) journals: bool,
    /// But not now ([`super::moving`]).
    pub(super) plain: AtomicBool,
    /// Data was written, or a length changed, since the last flush began.
    pub(super) unsynced: AtomicBool,
    pub(super) marked: AtomicBool,
    /// The header may say in use: found so at open, or we began to mark it. Closing clears it.
    pub(super) unclean: AtomicBool,
    pub(super) mark: Mutex<()>,
    /// Of its disk, while it is the top of one.
    tracking: ArcSwapOption<Tracking>,
}

pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
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
            held: Held::new(Arc::default(), scan.header.cluster_bytes(), pages),
            counted: AtomicBool::new(false),
            pending: Mutex::default(),
            roomy: Mutex::default(),
            owed: Mutex::default(),
            gate: FlushGate::default(),
            journal: Mutex::new(journal),
            journals,
            plain: AtomicBool::new(false),
            unsynced: AtomicBool::new(false),
            marked: AtomicBool::new(false),
            unclean: AtomicBool::new(scan.header.dirty()),
            mark: Mutex::new(()),
            tracking: ArcSwapOption::empty(),
            header: scan.header,
            guest: file.for_guests().unwrap_or_else(|| file.clone()),
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
            held: Held::new(Arc::default(), header.cluster_bytes(), pages),
            counted: AtomicBool::new(false),
            pending: Mutex::default(),
            roomy: Mutex::default(),
            owed: Mutex::default(),
            gate: FlushGate::default(),
            journals: home.is_some(),
            plain: AtomicBool::new(false),
            journal: Mutex::new(Journal::new(home)),
            unsynced: AtomicBool::new(false),
            marked: AtomicBool::new(true),
            unclean: AtomicBool::new(true),
            mark: Mutex::new(()),
            tracking: ArcSwapOption::empty(),
            header: header.marked(IN_USE_CLOSED),
            guest: file.for_guests().unwrap_or_else(|| file.clone()),
            file,
        }
    }

    /// The image's file.
    pub fn file(&self) -> &Arc<dyn StoreFile> {
        &self.file
    }

    /// The image's file for what clients write: its writes never use the store's reserve.
    pub fn guest(&self) -> &Arc<dyn StoreFile> {
        &self.guest
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
    pub(super) fn mark_in_use(&self) -> Result<()> {
        match self.tracking() {
            Some(tracking) => tracking.before_mark()?,
            None if extension::in_force(&self.header) => tracing::warn!(
                file = %self.file.path().display(),
                "the image's change-tracking bitmap ends here: it is dropped by the first write"
            ),
            None => {}
        }
        if self.header.dirty() {
            // A flush beside this may write entries, too.
            let _journal = lock(&self.journal);
            self.write_again()?;
        }
        self.unclean.store(true, Ordering::Release);
        self.file
            .write_at(self.header.marked(IN_USE_DIRTY).bytes(), 0)?;
        self.file.sync().inspect_err(|e| self.gate.latch(e))?;
        if self.header.dirty() {
            lock(&self.journal).end_again(|e| self.gate.latch(e))?;
        }
        self.count_alone()?;
        let (used_len, len) = (lock(&self.alloc).used_len(), self.file.len()?);
        // Of a marked image even the length may be one that a failed sync left in the cache only.
        if self.header.dirty() || len != used_len {
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
    /// The caller holds `journal`.
    pub(super) fn write_again(&self) -> Result<()> {
        let mut bytes = vec![0; PAGE as usize * 4];
        let pages = u64::from(self.header.entries).div_ceil(PAGE);
        for page in (0..pages).filter(|&page| self.is_stored(page)) {
            let first = page * PAGE;
            let count = PAGE.min(u64::from(self.header.entries) - first);
            let entries = &mut bytes[..count as usize * 4];
            let at = Header::slot_offset(first);
            read_exact(self.file.as_ref(), entries, at)?;
            let blocks = at / BLOCK..(at + count * 4).div_ceil(BLOCK);
            let new = self.empty_blocks(blocks)?;
            self.file.write_at(entries, at)?;
            // A page reaches into two blocks.
            if self.counted.load(Ordering::Acquire) {
                self.held.note(new);
            }
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
        if stale {
            self.empty(&clusters, offset)?;
        }
        Ok((offset, count))
    }

    /// Hands out one file cluster that reads as zeros; gives its first byte, and whether its room on
    /// the host is taken: it is unless that is short. The caller holds [`Top::busy`] for the guest
    /// cluster.
    pub fn allocate_roomy(&self) -> Result<(u64, bool)> {
        let (Taken { clusters, stale }, room, offset) = {
            let mut alloc = lock(&self.alloc);
            let (taken, room) = alloc.take_roomy(self.guest.as_ref())?;
            let offset = alloc.offset(taken.clusters.start);
            (taken, room, offset)
        };
        if stale {
            self.empty(&clusters, offset)?;
        }
        Ok((offset, room))
    }

    /// Takes back file clusters that were allocated and never committed. What was written to them
    /// is charged for as long as it is there.
    pub fn give_back(&self, offset: u64, count: u64) {
        let end = offset + count * self.header.cluster_bytes();
        match granules_in(self.file.as_ref(), offset..end) {
            Ok(left) => self.held.note(left),
            Err(_) => self.held.doubt(),
        }
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
        // The entry first: who finds the mark and no part looks again, and finds the entry.
        self.parts.finish(cluster, || self.commit(cluster, offset))
    }

    /// A write to a part was given up: what it may have left is no data.
    pub fn soil_part(&self, cluster: u64) {
        self.parts.change(cluster, |part| part.soiled = true);
    }

    /// The trackers of its disk.
    pub fn tracking(&self) -> Option<Arc<Tracking>> {
        self.tracking.load_full()
    }

    /// From now on it keeps the bits of these where it is closed; gives those of before.
    pub fn track(&self, tracking: Option<Arc<Tracking>>) -> Option<Arc<Tracking>> {
        self.tracking.swap(tracking)
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
