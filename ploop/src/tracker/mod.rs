//! Trackers: which granules of a disk were written since somebody began to look.
//!
//! ```text
//!   write ─▶ announced? ── no ─▶ announce the region, sync ─▶ write ─▶ set the granules' bits
//!                 └──── yes ───────────────────────────────────▲
//! ```
//!
//! | the disk is | the bits are in | and are |
//! |---|---|---|
//! | closed | the format extension of its top ([`bitmaps`]) | exact |
//! | in use | memory | exact |
//! | | the side file ([`side`]): bits at one instant, and the regions announced since | too many, never too few |
//!
//! The side file is durable before the header says that the image is in use, which is what takes the
//! extension out of force; and the extension is durable before the header says that it is closed.
//! So one of the two holds at every instant, and the header says which. A tracker whose bits are in
//! neither (another program wrote to the image) has all of them set.
//!
//! Writers find the list in the version of the disk that they write to. Whatever takes a tracker's
//! bits away closes the disk's gate, so that no change is under way, and a change sets its bits before
//! it leaves the gate: who takes the bits and then reads the disk reads what every write left whose bit
//! he took, or finds the bit again. A write that was given up in its middle counts as one.
//!
//! A tracker says what of the disk may read otherwise than when it was started. What changes nothing
//! of that (a snapshot, a merge, moving clusters) sets no bit.

pub mod bitmap;
pub mod side;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use serde::Deserialize;

use crate::error::{Error, Kind, Result};
use crate::format::ploop::{Header, bitmaps};
use crate::store::StoreFile;
use bitmap::Bitmap;
use side::{Home, Side, region_bytes};

/// The granularity of a tracker unless another is asked for, in bytes.
pub const GRANULARITY: u64 = 64 * 1024;

/// A tracker's name in files: a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// One that nobody has.
    pub fn random() -> Id {
        Id(uuid::Uuid::new_v4().into_bytes())
    }

    /// From its text. Error: `Invalid` for anything but a UUID.
    pub fn parse(text: &str) -> Result<Id> {
        let id = uuid::Uuid::try_parse(text);
        let id = id.map_err(|e| Error::invalid(format!("{text:?} is no UUID")).caused_by(e))?;
        Ok(Id(id.into_bytes()))
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        uuid::Uuid::from_bytes(self.0).fmt(f)
    }
}

/// What the side metadata of a disk says of a tracker, as far as opening must know.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Known {
    /// Bytes that a bit stands for.
    pub granularity: u64,
}

/// One tracker.
#[derive(Clone, Debug)]
pub struct Tracker {
    /// Its name in files.
    pub id: Id,
    /// The granules.
    pub bits: Arc<Bitmap>,
    /// It is in memory only, and ends with the disk's use.
    pub passing: bool,
    /// What counts, too, after a power cut, until what was written before the tracker was begun or
    /// cleared is durable: lost again, it would read otherwise than then.
    before: Option<Arc<Bitmap>>,
}

impl Tracker {
    /// One that is begun now, of a disk of `size` bytes. Error: `Invalid` for a granularity that
    /// cannot be.
    pub fn new(id: Id, size: u64, granularity: u64, passing: bool) -> Result<Tracker> {
        let before = Bitmap::new(size, granularity)?;
        before.set_all();
        Ok(Tracker {
            id,
            bits: Arc::new(Bitmap::new(size, granularity)?),
            passing,
            before: Some(Arc::new(before)),
        })
    }

    /// One that has these bits, of a disk whose changes until now are durable.
    pub fn with(id: Id, bits: Bitmap) -> Tracker {
        Tracker {
            id,
            bits: Arc::new(bits),
            passing: false,
            before: None,
        }
    }

    /// Begins anew; gives the bits that it had.
    pub(crate) fn clear(&mut self) -> Result<Arc<Bitmap>> {
        let old = self.bits.clone();
        let before = old.resized(old.size())?;
        if let Some(earlier) = &self.before {
            before.add(earlier);
        }
        self.before = Some(Arc::new(before));
        self.bits = Arc::new(Bitmap::new(old.size(), old.granularity())?);
        Ok(old)
    }

    /// Takes `more` in, too.
    pub(crate) fn add(&mut self, more: &Bitmap) -> Result<()> {
        let bits = self.bits.resized(self.bits.size())?;
        bits.add(more);
        self.bits = Arc::new(bits);
        Ok(())
    }

    /// The disk has another size now.
    pub(crate) fn resize(&mut self, size: u64) -> Result<()> {
        self.bits = Arc::new(self.bits.resized(size)?);
        if let Some(before) = &self.before {
            self.before = Some(Arc::new(before.resized(size)?));
        }
        Ok(())
    }

    /// What a power cut must leave.
    fn safe(&self) -> Result<Arc<Bitmap>> {
        let Some(before) = &self.before else {
            return Ok(self.bits.clone());
        };
        let all = before.resized(before.size())?;
        all.add(&self.bits);
        Ok(Arc::new(all))
    }
}

/// The trackers in force, and what of the disk they were announced for.
#[derive(Debug)]
pub(crate) struct Set {
    trackers: Vec<Tracker>,
    /// A bit for each region that is announced in the side file.
    announced: Arc<[AtomicU64]>,
    /// The power of two of a region's bytes.
    region: u32,
    /// Granules of the finest tracker that are announced and that all trackers have: a write to one of
    /// them need not be looked at.
    settled: Option<Arc<Bitmap>>,
}

impl Set {
    fn new(size: u64, trackers: Vec<Tracker>) -> Set {
        let region = region_bytes(size).trailing_zeros();
        let regions = match trackers.iter().all(|t| t.passing) {
            true => 0,
            false => size.div_ceil(1 << region),
        };
        let finest = trackers.iter().map(|t| t.bits.granularity()).min();
        let settled = finest.and_then(|g| Bitmap::new(size, g).ok());
        Set {
            settled: settled.map(Arc::new),
            trackers,
            announced: (0..regions.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            region,
        }
    }

    /// Sets the granules of a change, before it leaves the gate.
    pub(crate) fn mark(&self, range: &Range<u64>) {
        for tracker in &self.trackers {
            tracker.bits.set(range);
        }
        if let Some(settled) = &self.settled {
            settled.set(range);
        }
    }

    /// The first run of regions that `range` touches and that are not announced; empty if none is.
    fn missing(&self, range: &Range<u64>) -> Range<u64> {
        let last = (range.end.max(1) - 1) >> self.region;
        let mut at = range.start >> self.region;
        while at <= last && self.is_announced(at) {
            at += 1;
        }
        let start = at;
        while at <= last && !self.is_announced(at) {
            at += 1;
        }
        start..at
    }

    fn is_announced(&self, region: u64) -> bool {
        let word = self.announced.get((region / 64) as usize);
        word.is_none_or(|w| w.load(Ordering::Acquire) >> (region % 64) & 1 == 1)
    }

    fn note(&self, regions: Range<u64>) {
        for region in regions {
            if let Some(word) = self.announced.get((region / 64) as usize) {
                word.fetch_or(1 << (region % 64), Ordering::AcqRel);
            }
        }
    }

    fn lasting(&self) -> impl Iterator<Item = (&[u8; 16], &Bitmap)> + Clone {
        let lasting = self.trackers.iter().filter(|t| !t.passing);
        lasting.map(|t| (&t.id.0, t.bits.as_ref()))
    }
}

/// The side file, as this process knows it.
#[derive(Debug)]
enum State {
    /// The bits are in the extension, and whatever the side file says is not in force.
    Closed,
    /// The file does not say what the set is; before the next write or mark it must.
    Old,
    /// It does.
    Current(Side),
}

/// All trackers of a disk.
#[derive(Debug)]
pub struct Tracking {
    home: Option<Home>,
    set: ArcSwap<Set>,
    /// Locked inside the gate: whoever closes the gate does so before.
    state: Mutex<State>,
    /// The bits are nowhere but in memory and in the side file.
    unsaved: AtomicBool,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The trackers of the image `file` as it stands: those that its disk's metadata knows, and those of
/// other programs that are in its extension. Writes nothing.
pub fn load(
    home: Option<&Home>,
    file: &dyn StoreFile,
    header: &Header,
    known: &[(Id, Known)],
) -> Result<Vec<Tracker>> {
    let size = header.size();
    let found = match bitmaps::load(file, header)? {
        Some(found) => found,
        None if header.dirty() => match home.map(|h| h.read(size)).transpose()?.flatten() {
            // Those of others end with a crash, and those of ours that were stopped are not back.
            Some(found) => {
                let ours = |id| known.iter().any(|(k, _)| k.0 == id);
                let found = found.into_iter().filter(|s| ours(s.id));
                found.map(|s| (s.id, s.bits)).collect()
            }
            None => Vec::new(),
        },
        None => Vec::new(),
    };
    let mut out: Vec<Tracker> = Vec::new();
    for (id, bits) in found {
        if !out.iter().any(|t| t.id == Id(id)) {
            out.push(Tracker::with(Id(id), bits));
        }
    }
    for &(id, known) in known {
        let right = |t: &&Tracker| t.id == id && t.bits.granularity() == known.granularity;
        if out.iter().any(|t| right(&t)) {
            continue;
        }
        // Nobody knows what was written.
        let bits = Bitmap::new(size, known.granularity)
            .map_err(|e| Error::new(Kind::Corrupt, e.what()).on(file.path()))?;
        bits.set_all();
        tracing::warn!(
            file = %file.path().display(),
            tracker = %id,
            "the bits of this tracker are not with its image, so every granule counts as written"
        );
        out.retain(|t| t.id != id);
        out.push(Tracker::with(id, bits));
    }
    Ok(out)
}

impl Tracking {
    /// With `trackers`, of a disk of `size` bytes. Without a home, what is not closed cleanly has no
    /// trackers any more.
    pub fn new(home: Option<Home>, size: u64, trackers: Vec<Tracker>) -> Tracking {
        Tracking {
            home,
            set: ArcSwap::from_pointee(Set::new(size, trackers)),
            state: Mutex::new(State::Closed),
            unsaved: AtomicBool::new(false),
        }
    }

    /// Those of a disk that gets another top, of `size` bytes, with what `changed` sets besides; to be
    /// stored at that one's close.
    pub fn carried(trackers: &[Tracker], size: u64, changed: &dyn Fn(&Bitmap)) -> Result<Tracking> {
        let mut carried = Vec::new();
        for tracker in trackers.iter().filter(|t| !t.passing) {
            let bits = tracker.safe()?.resized(size)?;
            changed(&bits);
            carried.push(Tracker::with(tracker.id, bits));
        }
        let tracking = Tracking::new(None, size, carried);
        let any = !tracking.set.load().trackers.is_empty();
        tracking.unsaved.store(any, Ordering::Release);
        Ok(tracking)
    }

    /// True when there are trackers that a close stores.
    pub(crate) fn lasts(&self) -> bool {
        self.set.load().lasting().next().is_some()
    }

    /// The trackers in force.
    pub fn trackers(&self) -> Vec<Tracker> {
        self.set.load().trackers.clone()
    }

    /// The trackers in force as writers look at them; `None` without any.
    pub(crate) fn set(&self) -> Option<Arc<Set>> {
        let set = self.set.load_full();
        (!set.trackers.is_empty()).then_some(set)
    }

    /// A change of `range` begins, inside the gate; `set` is of the disk's version in force. Blocks for
    /// a sync where it is the first in a region. Gives whether [`Set::mark`] is to follow. Errors:
    /// `NoSpace`, `Io`; then nothing may be changed.
    #[inline]
    pub(crate) fn before(&self, set: &Set, range: &Range<u64>) -> Result<bool> {
        if set.settled.as_ref().is_some_and(|s| s.has_one(range)) {
            return Ok(false);
        }
        if !set.missing(range).is_empty() {
            self.announce(set, range)?;
        }
        Ok(true)
    }

    #[cold]
    fn announce(&self, set: &Set, range: &Range<u64>) -> Result<()> {
        let mut state = lock(&self.state);
        let first = set.missing(range);
        if self.bring_up(&mut state, first.clone())? {
            set.note(first);
        }
        loop {
            let regions = set.missing(range);
            if regions.is_empty() {
                return Ok(());
            }
            if let State::Current(side) = &mut *state
                && let Err(e) = side.announce(regions.clone())
            {
                // What is in the file behind the last announcement is anything now.
                *state = State::Old;
                return Err(e);
            }
            set.note(regions);
        }
    }

    /// Makes the side file say what the set is, and announce `more`; false when it said the former
    /// already, or never will.
    fn bring_up(&self, state: &mut State, more: Range<u64>) -> Result<bool> {
        if matches!(state, State::Current(_)) {
            return Ok(false);
        }
        let set = self.set.load();
        let Some(home) = self.home.as_ref().filter(|h| h.is_there().unwrap_or(true)) else {
            // A close stores them all the same.
            let any = set.lasting().next().is_some();
            self.unsaved.fetch_or(any, Ordering::AcqRel);
            return Ok(false);
        };
        if set.lasting().next().is_none() {
            home.remove()?;
            *state = State::Old;
            return Ok(false);
        }
        let size = set.trackers.first().map_or(0, |t| t.bits.size());
        let lasting = set.trackers.iter().filter(|t| !t.passing);
        let safe = lasting.map(|t| Ok((t.id.0, t.safe()?)));
        let safe = safe.collect::<Result<Vec<_>>>()?;
        // And what was announced in the file before: it was perhaps written to since.
        let mut announced = Vec::from_iter(Some(more).filter(|m| !m.is_empty()));
        let (mut at, end) = (0, set.announced.len() as u64 * 64);
        while at < end {
            let run = (at..end).take_while(|&r| set.is_announced(r)).count() as u64;
            if run > 0 {
                announced.push(at..at + run);
            }
            at += run.max(1);
        }
        let bits = safe.iter().map(|(id, bits)| (id, bits.as_ref()));
        *state = State::Current(home.write(size, bits, &announced)?);
        self.unsaved.store(true, Ordering::Release);
        Ok(true)
    }

    /// The image is about to be marked in use: from then on the side file is what holds. Durable on
    /// return.
    pub(crate) fn before_mark(&self) -> Result<()> {
        self.bring_up(&mut lock(&self.state), 0..0).map(drop)
    }

    /// Makes the changes of the trackers that are in `changed` durable. What the disk held then is.
    pub(crate) fn settle(&self, changed: &[Tracker]) -> Result<()> {
        let mut state = lock(&self.state);
        let now = self.set.load();
        let mut trackers = now.trackers.clone();
        let mut settled = false;
        for tracker in trackers.iter_mut().filter(|t| t.before.is_some()) {
            // Not what was cleared since.
            if changed.iter().any(|c| Arc::ptr_eq(&c.bits, &tracker.bits)) {
                tracker.before = None;
                settled |= !tracker.passing;
            }
        }
        self.set.store(Arc::new(Set {
            trackers,
            announced: now.announced.clone(),
            region: now.region,
            settled: now.settled.clone(),
        }));
        if settled {
            *state = State::Old;
        }
        self.bring_up(&mut state, 0..0).map(drop)
    }

    /// True when the bits are not in the image.
    pub(crate) fn is_unsaved(&self) -> bool {
        self.unsaved.load(Ordering::Acquire)
    }

    /// Changes the trackers; the gate is closed, and the disk gets a version with the new
    /// [`Tracking::set`] before it is opened. A tracker whose bits change without its being written
    /// to gets other bits, in a bitmap of its own. What was announced is so no more.
    pub(crate) fn change<T>(
        &self,
        size: u64,
        change: impl FnOnce(&mut Vec<Tracker>) -> Result<T>,
    ) -> Result<T> {
        let mut state = lock(&self.state);
        let before = self.set.load();
        let mut trackers = before.trackers.clone();
        let done = change(&mut trackers)?;
        let mut set = Set::new(size, trackers);
        let same = before.lasting().count() == set.lasting().count()
            && (before.lasting().zip(set.lasting()))
                .all(|((a, a_bits), (b, b_bits))| a == b && std::ptr::eq(a_bits, b_bits));
        if same {
            // Of no interest to the file.
            set.announced = before.announced.clone();
        } else {
            self.unsaved.store(true, Ordering::Release);
            *state = State::Old;
        }
        self.set.store(Arc::new(set));
        Ok(done)
    }

    /// Writes the bits behind byte `end` of the image, which has `header`; gives the header that
    /// closes it. Durable on return. Nobody changes the disk.
    pub(crate) fn save(
        &self,
        file: &dyn StoreFile,
        header: &Header,
        end: u64,
    ) -> Result<Option<Header>> {
        bitmaps::store(file, header, end, self.set.load().lasting())
    }

    /// The header that [`Tracking::save`] gave is durable.
    pub(crate) fn saved(&self) {
        let mut state = lock(&self.state);
        self.unsaved.store(false, Ordering::Release);
        // Nothing is announced of what comes next.
        let set = self.set.load();
        for word in set.announced.iter() {
            word.store(0, Ordering::Release);
        }
        if let Some(settled) = &set.settled {
            settled.clear_all();
        }
        *state = State::Closed;
        // It is out of force; the next use of the disk begins with a new one.
        if let Some(home) = &self.home
            && let Err(e) = home.remove()
        {
            tracing::debug!(error = %e, "the trackers' side file was not removed");
        }
    }
}
