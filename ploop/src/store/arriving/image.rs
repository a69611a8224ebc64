//! One image that is arriving: what it lacks, who fetches it, and what the record says by now.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::bits::{Bits, PER_PAGE, Page};
use super::side::{self, Head, Side, granules};
use super::{Fetch, Filled, GRANULE};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::header::{HEADER_BYTES, IN_USE_DIRTY, Unchecked};
use crate::store::{Store, StoreFile, read_exact};

/// Bytes that one call of [`Fetch::fetch`] is asked for, at most.
pub const FETCH_MAX: u64 = 1 << 20;
/// Bytes that a reader fetches at least, where so many are missing side by side.
const AHEAD: u64 = 64 << 10;
/// The record is written after so many bytes that the background fetched.
const CHECKPOINT: u64 = 64 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Image {
    store: Arc<dyn Store>,
    /// Where it is: its directory may be renamed.
    path: Mutex<PathBuf>,
    /// Open for writing: what arrives, and nothing else.
    file: Arc<dyn StoreFile>,
    len: u64,
    side: Side,
    from: Mutex<Arc<dyn Fetch>>,
    state: Mutex<State>,
    /// A fetch has ended.
    changed: Condvar,
    /// Held by who writes the record.
    saving: Mutex<()>,
    /// Nothing is missing, and there is no record any more.
    whole: AtomicBool,
    /// How often granules that were there became missing again.
    lost: AtomicU64,
    /// A sync of the record failed, or is under way.
    unsettled: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Granules that are not in the file, those that are being fetched among them.
    missing: Bits,
    left: u64,
    /// None below is missing.
    low: u64,
    /// Where the background looks first: behind what could not be had.
    from: u64,
    /// Being fetched, each by one.
    flying: Vec<Range<u64>>,
    /// Pages that say less than the record, as the record has them.
    saved: BTreeMap<u64, Page>,
    /// Bytes that came since the record was written.
    unsaved: u64,
}

/// What there is to do for a range of granules.
enum Next {
    Nothing,
    Wait,
    Fetch(Range<u64>),
}

impl State {
    /// What to do for the first missing granule of `at..end`. What is to be fetched is `most` at most,
    /// and goes on behind `end` while it is less than `ahead`; it is noted.
    fn next(&mut self, at: &mut u64, end: u64, ahead: u64, most: u64) -> Next {
        let Some(first) = self.missing.next_set(*at, end) else {
            *at = end;
            return Next::Nothing;
        };
        *at = first;
        if self.flying.iter().any(|f| f.contains(&first)) {
            return Next::Wait;
        }
        let limit = end.max(first + ahead).min(self.missing.len());
        let limit = limit.min(first + most);
        let mut stop = self.missing.next_clear(first, limit);
        for other in &self.flying {
            if other.start > first {
                stop = stop.min(other.start);
            }
        }
        self.flying.push(first..stop);
        Next::Fetch(first..stop)
    }

    fn arrived(&mut self, run: &Range<u64>, bytes: u64) {
        let pages = run.start / PER_PAGE..=(run.end - 1) / PER_PAGE;
        for n in pages {
            let missing = &self.missing;
            self.saved.entry(n).or_insert_with(|| missing.page(n));
        }
        self.missing.clear(run.start, run.end);
        self.left -= run.end - run.start;
        self.unsaved += bytes;
    }

    /// What came since the record was written may not be there: a sync failed.
    fn lose(&mut self) {
        for (n, page) in std::mem::take(&mut self.saved) {
            self.missing.add(n, &page);
        }
        self.left = self.missing.count();
        (self.low, self.from) = (0, 0);
        self.unsaved = 0;
    }
}

/// Granules that one thread fetches. However that ends, others may go on.
struct Flight<'a> {
    image: &'a Image,
    run: Range<u64>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        lock(&self.image.state).flying.retain(|f| *f != self.run);
        self.image.changed.notify_all();
    }
}

/// Bytes that came and found no room: for the reader that asked for them.
type Loose = Vec<(u64, Vec<u8>)>;

impl Image {
    /// The image at `path`, open for writing as `file`, with its record.
    pub(super) fn new(
        store: Arc<dyn Store>,
        path: PathBuf,
        file: Arc<dyn StoreFile>,
        side: Side,
        missing: Bits,
        from: Arc<dyn Fetch>,
    ) -> Result<Image> {
        let state = State {
            left: missing.count(),
            missing,
            low: 0,
            from: 0,
            flying: Vec::new(),
            saved: BTreeMap::new(),
            unsaved: 0,
        };
        Ok(Image {
            store,
            path: Mutex::new(path),
            len: file.len()?,
            file,
            side,
            from: Mutex::new(from),
            state: Mutex::new(state),
            changed: Condvar::new(),
            saving: Mutex::default(),
            whole: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            unsettled: AtomicBool::new(false),
        })
    }

    pub(super) fn path(&self) -> PathBuf {
        lock(&self.path).clone()
    }

    pub(super) fn moved(&self, to: PathBuf) {
        *lock(&self.path) = to;
    }

    pub(super) fn fetch_from(&self, from: Arc<dyn Fetch>) {
        *lock(&self.from) = from;
    }

    /// True when nothing concerns it any more.
    pub(super) fn is_whole(&self) -> bool {
        self.whole.load(Ordering::Acquire)
    }

    /// Bytes that are missing, the last granule counted as a whole one.
    pub(super) fn remaining(&self) -> u64 {
        match self.is_whole() {
            true => 0,
            false => lock(&self.state).left * GRANULE,
        }
    }

    /// The error for who wants more than to read it.
    pub(super) fn in_the_way(&self) -> Error {
        super::arriving(&self.path())
    }

    /// The granules of a range of bytes, as far as the file goes.
    fn granules(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).min(self.len);
        match offset < end {
            true => offset / GRANULE..granules(end),
            false => 0..0,
        }
    }

    /// The first missing bytes of `from..to`.
    pub(super) fn missing(&self, from: u64, to: u64) -> Option<Range<u64>> {
        let all = self.granules(from, to.saturating_sub(from));
        let state = lock(&self.state);
        let first = state.missing.next_set(all.start, all.end)?;
        let stop = state.missing.next_clear(first, all.end);
        let end = (stop * GRANULE).min(to).min(self.len);
        Some((first * GRANULE).max(from)..end)
    }

    /// Reads from `file`, which is this image, what is missing fetched before.
    pub(super) fn read(&self, file: &dyn StoreFile, buf: &mut [u8], offset: u64) -> Result<usize> {
        loop {
            let lost = self.lost.load(Ordering::Acquire);
            let loose = self.bring(self.granules(offset, buf.len() as u64))?;
            let got = file.read_at(buf, offset)?;
            if self.lost.load(Ordering::Acquire) != lost {
                continue;
            }
            self.unmark(&mut buf[..got], offset);
            for (at, bytes) in loose {
                let start = at.max(offset);
                let end = (at + bytes.len() as u64).min(offset + got as u64);
                if start < end {
                    let from = (start - at) as usize..(end - at) as usize;
                    let to = (start - offset) as usize..(end - offset) as usize;
                    buf[to].copy_from_slice(&bytes[from]);
                }
            }
            return Ok(got);
        }
    }

    /// The same without waiting for anybody.
    pub(super) fn read_now(
        &self,
        file: &dyn StoreFile,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<Option<usize>> {
        let lost = self.lost.load(Ordering::Acquire);
        if self
            .missing(offset, offset.saturating_add(buf.len() as u64))
            .is_some()
        {
            return Ok(None);
        }
        let Some(got) = file.read_now(buf, offset)? else {
            return Ok(None);
        };
        self.unmark(&mut buf[..got], offset);
        let same = self.lost.load(Ordering::Acquire) == lost;
        Ok(same.then_some(got))
    }

    /// Shows the header without the mark that it bears for others.
    fn unmark(&self, buf: &mut [u8], offset: u64) {
        if let Some(head) = &self.side.head
            && offset < HEADER_BYTES
        {
            let head = &head[offset as usize..];
            let n = head.len().min(buf.len());
            buf[..n].copy_from_slice(&head[..n]);
        }
    }

    /// Fetches what is missing of `all`, or waits for who does.
    fn bring(&self, all: Range<u64>) -> Result<Loose> {
        let (mut at, mut loose) = (all.start, Loose::new());
        let mut state = lock(&self.state);
        loop {
            let (ahead, most) = (AHEAD / GRANULE, FETCH_MAX / GRANULE);
            let run = match state.next(&mut at, all.end, ahead, most) {
                Next::Nothing => return Ok(loose),
                Next::Wait => {
                    let waited = self.changed.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                Next::Fetch(run) => run,
            };
            drop(state);
            at = run.end;
            let flight = Flight { image: self, run };
            let (bytes, kept) = self.fetch(&flight)?;
            match kept {
                Ok(()) => {}
                // A full host is an error to who writes, and to nobody who reads.
                Err(e) if e.kind() == Kind::NoSpace => {
                    loose.push((flight.run.start * GRANULE, bytes));
                }
                Err(e) => return Err(e),
            }
            drop(flight);
            state = lock(&self.state);
        }
    }

    /// Fetches and writes; the second result says whether that could be kept.
    fn fetch(&self, flight: &Flight<'_>) -> Result<(Vec<u8>, Result<()>)> {
        let run = &flight.run;
        let start = run.start * GRANULE;
        let end = (run.end * GRANULE).min(self.len);
        let mut bytes = vec![0; (end - start) as usize];
        let from = lock(&self.from).clone();
        from.fetch(start, &mut bytes)?;
        loop {
            let lost = self.lost.load(Ordering::Acquire);
            if let Err(e) = self.file.write_at(&bytes, start) {
                return Ok((bytes, Err(e)));
            }
            let mut state = lock(&self.state);
            // A sync that failed since may have been the one that was to make this durable.
            if self.lost.load(Ordering::Acquire) == lost {
                state.arrived(run, end - start);
                return Ok((bytes, Ok(())));
            }
        }
    }

    /// Fetches the next missing bytes, `budget` at most and a granule at least. Completes the image
    /// when there are none. A granule that cannot be had, asked for alone, waits until the rest was tried.
    pub(super) fn fill_next(&self, budget: u64, names: &Mutex<()>) -> Result<Filled> {
        if self.is_whole() {
            return Ok(Filled::Done);
        }
        let most = (budget.min(FETCH_MAX) / GRANULE).max(1);
        let mut state = lock(&self.state);
        let all = state.missing.len();
        let Some(low) = state.missing.next_set(state.low, all) else {
            drop(state);
            return self.complete(names);
        };
        state.low = low;
        let first = state.missing.next_set(state.from.max(low), all);
        let first = first.unwrap_or(low);
        state.from = first;
        // The first that nobody fetches.
        let mut at = first;
        let run = loop {
            match state.next(&mut at, all, 0, most) {
                Next::Fetch(run) => break Some(run),
                Next::Nothing => break None,
                Next::Wait => {
                    let flying = state.flying.iter().find(|f| f.contains(&at));
                    at = flying.map_or(all, |f| f.end);
                }
            }
        };
        let Some(run) = run else {
            let waited = self.changed.wait(state);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            return Ok(Filled::More);
        };
        drop(state);
        let flight = Flight { image: self, run };
        if let Err(e) = self.fetch(&flight).and_then(|(_, kept)| kept) {
            if flight.run.end - flight.run.start == 1 {
                lock(&self.state).from = flight.run.end;
            }
            return Err(e);
        }
        drop(flight);
        if lock(&self.state).unsaved >= CHECKPOINT {
            self.checkpoint()?;
        }
        Ok(Filled::More)
    }

    /// Makes what came durable, and then the record say so. After an error of the sync it is missing
    /// again.
    ///
    /// Order: the pages as they are, the image's sync, the pages' writes.
    pub(super) fn checkpoint(&self) -> Result<()> {
        let _one = lock(&self.saving);
        self.save()
    }

    fn save(&self) -> Result<()> {
        let pages: Vec<(u64, Page)> = {
            let mut state = lock(&self.state);
            state.unsaved = 0;
            let missing = &state.missing;
            state.saved.keys().map(|&n| (n, missing.page(n))).collect()
        };
        if pages.is_empty() {
            return Ok(());
        }
        if let Err(e) = self.file.sync() {
            let mut state = lock(&self.state);
            state.lose();
            self.lost.fetch_add(1, Ordering::AcqRel);
            return Err(e);
        }
        for (n, page) in pages {
            self.side.write(n, &page)?;
            let mut state = lock(&self.state);
            if state.missing.page(n) == page {
                state.saved.remove(&n);
            } else {
                state.saved.insert(n, page);
            }
        }
        Ok(())
    }

    /// Ends it: nothing is missing. Durable on return; after an error it is tried again.
    ///
    /// 1. the image's sync, the record's pages, their sync: from here on there is nothing to fetch;
    /// 2. the mark goes, the image's sync;
    /// 3. the record goes, the directory's sync.
    fn complete(&self, names: &Mutex<()>) -> Result<Filled> {
        let _one = lock(&self.saving);
        if self.is_whole() {
            return Ok(Filled::Done);
        }
        // 1.
        self.save()?;
        self.settle()?;
        {
            // Another one's sync may have failed meanwhile.
            let state = lock(&self.state);
            if state.left > 0 || !state.saved.is_empty() {
                return Ok(Filled::More);
            }
        }
        // 2.
        if let Some(head) = &self.side.head {
            self.clear_mark(head)?;
        }
        // 3. Nobody renames the directory meanwhile.
        let _names = lock(names);
        side::remove(self.store.as_ref(), &self.path())?;
        self.whole.store(true, Ordering::Release);
        Ok(Filled::Done)
    }

    /// Makes the record durable as it is. What a sync that failed was to cover, the next one may not:
    /// then all of it is written again.
    fn settle(&self) -> Result<()> {
        if self.unsettled.swap(true, Ordering::Relaxed) {
            let pages = lock(&self.state).missing.pages();
            for n in 0..pages {
                let page = self.recorded(n);
                self.side.write(n, &page)?;
            }
        }
        self.side.sync()?;
        self.unsettled.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Page `n` as the record may have it.
    fn recorded(&self, n: u64) -> Page {
        let state = lock(&self.state);
        let saved = state.saved.get(&n).copied();
        saved.unwrap_or_else(|| state.missing.page(n))
    }

    fn clear_mark(&self, head: &Head) -> Result<()> {
        let mut now = [0; HEADER_BYTES as usize];
        read_exact(self.file.as_ref(), &mut now, 0)?;
        if now != *head && now != marked(head, self.len)? {
            let what = "the header of the image was changed while it was arriving";
            return Err(Error::corrupt(what)
                .on(self.path())
                .at(0)
                .fix("See `ploop check`; whoever did that may have changed more"));
        }
        self.file.write_at(head, 0)?;
        self.file.sync()
    }
}

/// `head` with the in-use mark.
pub(super) fn marked(head: &Head, len: u64) -> Result<Head> {
    let header = Unchecked::parse(head)?.check(len)?;
    let mut out = *head;
    out.copy_from_slice(header.marked(IN_USE_DIRTY).bytes());
    Ok(out)
}

/// Where the data of the image with this header begins.
pub(super) fn data_start(head: &Head, len: u64) -> Result<u64> {
    // What is missing is rounded to granules.
    let data = Unchecked::parse(head)?.check(len)?.data_start;
    Ok(data.next_multiple_of(GRANULE))
}
