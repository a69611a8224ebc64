//! Which granules of a writable image are charged to its disk's account.
//!
//! ```text
//!   guest cluster   ▐▓▓▓░░░░▓▓▓▓▓░░░▌    ▓ granule (4 KiB) that is charged: it holds data, or is to
//! ```
//!
//! A bit per granule of the guest, in pages that are made when first written to. What a cluster of
//! the file holds that was there at open is asked of the file when the cluster is first written to
//! again; from then on its bits are true.
//!
//! * A bit is set, and paid for, before its bytes are written; two writers that come to one granule
//!   both pay, and one gets his money back.
//! * A bit is cleared before its bytes are given up, while no write is under way, and paid back
//!   after: so nobody writes to a granule that he takes for charged and that is not.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::parts::{Granules, masks};
use super::top::PAGE;
use crate::account::{Account, GRANULE};
use crate::error::Result;
use crate::host::Paid;
use crate::paged::Paged;
use crate::store::StoreFile;

/// The charged granules of one image.
#[derive(Debug)]
pub struct Held {
    account: Arc<Account>,
    /// What of the account's charge is this image's.
    own: AtomicU64,
    cluster: u64,
    /// Granules of a cluster.
    per: u64,
    pages: Paged<Page>,
    /// Held by whoever asks the file what a cluster holds.
    asking: Mutex<()>,
    /// Something was charged that may not have been written.
    doubt: AtomicBool,
}

#[derive(Debug)]
struct Page {
    /// A bit per cluster: its bits are true.
    known: Box<[AtomicU64]>,
    /// A bit per granule.
    bits: Box<[AtomicU64]>,
}

fn words(bits: u64) -> Box<[AtomicU64]> {
    (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

impl Page {
    fn missing(&self, range: Range<u64>) -> u64 {
        let less = |(word, mask): (usize, u64)| {
            u64::from((mask & !self.bits[word].load(Ordering::Relaxed)).count_ones())
        };
        masks(range).map(less).sum()
    }

    /// Sets bits; how many were not.
    fn set(&self, range: Range<u64>) -> u64 {
        let set = |(word, mask): (usize, u64)| {
            u64::from((mask & !self.bits[word].fetch_or(mask, Ordering::Relaxed)).count_ones())
        };
        masks(range).map(set).sum()
    }

    /// Clears bits; how many were set.
    fn clear(&self, range: Range<u64>) -> u64 {
        let clear = |(word, mask): (usize, u64)| {
            u64::from((mask & self.bits[word].fetch_and(!mask, Ordering::Relaxed)).count_ones())
        };
        masks(range).map(clear).sum()
    }
}

impl Held {
    /// For an image with clusters of `cluster` bytes and `pages` pages of entries.
    pub(super) fn new(account: Arc<Account>, cluster: u64, pages: u64) -> Held {
        Held {
            account,
            own: AtomicU64::new(0),
            cluster,
            per: cluster.div_ceil(GRANULE),
            pages: Paged::new(pages),
            asking: Mutex::default(),
            doubt: AtomicBool::new(false),
        }
    }

    /// Who pays.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Another pays. Before anything is charged.
    pub(super) fn charge_to(&mut self, account: Arc<Account>) {
        self.account = account;
    }

    /// Granules that are charged for this image.
    pub fn own(&self) -> u64 {
        self.own.load(Ordering::Relaxed)
    }

    /// Charges `granules` that are to be written while what is returned lives. Error: `NoSpace`, with
    /// nothing charged.
    pub fn pay(&self, granules: u64) -> Result<Paid> {
        let paid = self.account.take(granules)?;
        self.own.fetch_add(granules, Ordering::Relaxed);
        Ok(paid)
    }

    /// Charges `granules` whatever the limit.
    pub fn note(&self, granules: u64) {
        self.account.put(granules);
        self.own.fetch_add(granules, Ordering::Relaxed);
    }

    /// Takes `granules` off the charge, which hold nothing any more.
    pub fn back(&self, granules: u64) {
        self.account.give(granules);
        self.own.fetch_sub(granules, Ordering::Relaxed);
    }

    /// A change was given up half-way: what it had charged may hold nothing. The next close counts.
    pub fn doubt(&self) {
        self.doubt.store(true, Ordering::Release);
    }

    /// After [`Held::doubt`]: charges what the file holds up to `end`, and asks it anew for every
    /// cluster. Nobody changes the image.
    pub(super) fn settle(&self, file: &dyn StoreFile, end: u64) -> Result<()> {
        if !self.doubt.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.pages.each(|_, page| {
            for word in page.known.iter().chain(&*page.bits) {
                word.store(0, Ordering::Relaxed);
            }
            Ok(())
        })?;
        let now = granules_in(file, 0..end).inspect_err(|_| self.doubt())?;
        self.note(now);
        self.back(self.own().saturating_sub(now));
        Ok(())
    }

    fn page(&self, page: u64) -> Result<&Page> {
        self.pages.get_or_make(page, || {
            Ok(Page {
                known: words(PAGE),
                bits: words(PAGE * self.per),
            })
        })
    }

    /// The page of a cluster, the cluster's place in it, and the place of its first granule.
    fn place(&self, cluster: u64) -> Result<(&Page, u64, u64)> {
        let at = cluster % PAGE;
        Ok((self.page(cluster / PAGE)?, at, at * self.per))
    }

    /// The granules of a cluster that bytes `range` of it lie in.
    fn granules(&self, range: Range<u64>) -> Range<u64> {
        range.start / GRANULE..range.end.div_ceil(GRANULE)
    }

    /// Makes the bits of a cluster at `offset` of `file` true.
    fn learn(&self, file: &dyn StoreFile, cluster: u64, offset: u64) -> Result<()> {
        let (page, at, first) = self.place(cluster)?;
        let (word, bit) = ((at / 64) as usize, 1 << (at % 64));
        if page.known[word].load(Ordering::Acquire) & bit != 0 {
            return Ok(());
        }
        let _one = super::top::lock(&self.asking);
        if page.known[word].load(Ordering::Acquire) & bit != 0 {
            return Ok(());
        }
        for data in data_in(file, offset..offset + self.cluster)? {
            let inside = self.granules(data.start - offset..data.end - offset);
            page.set(first + inside.start..first + inside.end);
        }
        page.known[word].fetch_or(bit, Ordering::Release);
        Ok(())
    }

    /// The charged granules of a cluster at `offset`.
    pub(super) fn known(
        &self,
        file: &dyn StoreFile,
        cluster: u64,
        offset: u64,
    ) -> Result<Granules> {
        self.learn(file, cluster, offset)?;
        let (page, _, first) = self.place(cluster)?;
        let mut known = Granules::none(self.per);
        for granule in (0..self.per).filter(|g| page.missing(first + g..first + g + 1) == 0) {
            known.set(granule..granule + 1);
        }
        Ok(known)
    }

    /// Sets the bits of what a cluster at `offset` holds; returns how many were not set. They are not
    /// charged by that.
    pub fn learn_again(&self, file: &dyn StoreFile, cluster: u64, offset: u64) -> Result<u64> {
        let (page, _, first) = self.place(cluster)?;
        let of = self.data_of(file, offset)?;
        Ok(of
            .set_runs()
            .map(|r| page.set(first + r.start..first + r.end))
            .sum())
    }

    /// Granules that a write to `bytes` of a cluster at `offset` needs more.
    pub fn missing(
        &self,
        file: &dyn StoreFile,
        cluster: u64,
        offset: u64,
        bytes: &Range<u64>,
    ) -> Result<u64> {
        // Nearly always: a page that is there, a cluster that is known, and one word of it.
        let at = cluster % PAGE;
        if let Some(page) = self.pages.get(cluster / PAGE)
            && page.known[(at / 64) as usize].load(Ordering::Acquire) >> (at % 64) & 1 == 1
        {
            let first = at * self.per + bytes.start / GRANULE;
            let count = bytes.end.div_ceil(GRANULE) - bytes.start / GRANULE;
            if first % 64 + count <= 64 && count > 0 {
                let mask = (u64::MAX >> (64 - count)) << (first % 64);
                let held = page.bits[(first / 64) as usize].load(Ordering::Relaxed);
                return Ok(u64::from((mask & !held).count_ones()));
            }
        }
        self.missing_slowly(file, cluster, offset, bytes)
    }

    #[cold]
    fn missing_slowly(
        &self,
        file: &dyn StoreFile,
        cluster: u64,
        offset: u64,
        bytes: &Range<u64>,
    ) -> Result<u64> {
        self.learn(file, cluster, offset)?;
        let (page, _, first) = self.place(cluster)?;
        let g = self.granules(bytes.clone());
        Ok(page.missing(first + g.start..first + g.end))
    }

    /// Charges `missing` granules of writes to pieces of clusters, each (cluster, bytes of it), as
    /// [`Held::missing`] told them; they are to be written while what is returned lives. Error:
    /// `NoSpace`, with nothing charged.
    pub fn take(
        &self,
        missing: u64,
        pieces: impl Iterator<Item = (u64, Range<u64>)>,
    ) -> Result<Paid> {
        let taken = self.pay(missing)?;
        let mut paid = 0;
        for (cluster, bytes) in pieces {
            let (page, _, first) = self.place(cluster)?;
            let g = self.granules(bytes);
            paid += page.set(first + g.start..first + g.end);
        }
        // Another writer was there in between.
        self.back(missing.saturating_sub(paid));
        Ok(taken)
    }

    /// Enters a new cluster, whose granules `of` are paid for.
    pub fn enter(&self, cluster: u64, of: Option<&Granules>) -> Result<()> {
        let (page, at, first) = self.place(cluster)?;
        for run in of.iter().flat_map(|of| of.set_runs()) {
            page.set(first + run.start..first + run.end);
        }
        page.known[(at / 64) as usize].fetch_or(1 << (at % 64), Ordering::Release);
        Ok(())
    }

    /// Enters a cluster that is to hold `missing` beside what it holds, and charges those.
    pub(super) fn put(
        &self,
        file: &dyn StoreFile,
        cluster: u64,
        offset: u64,
        missing: &[Range<u64>],
    ) -> Result<()> {
        self.learn(file, cluster, offset)?;
        let (page, _, first) = self.place(cluster)?;
        let more = missing
            .iter()
            .map(|r| page.set(first + r.start..first + r.end));
        self.note(more.sum());
        Ok(())
    }

    /// Clears the whole granules of bytes `range` of a cluster at `offset`, whose bytes are to be given
    /// up. Returns how many are to be paid back ([`Held::back`]) once they are. No write to the image
    /// is under way.
    pub fn release(
        &self,
        file: &dyn StoreFile,
        cluster: u64,
        offset: u64,
        range: Range<u64>,
    ) -> Result<u64> {
        let whole = range.start.div_ceil(GRANULE)..range.end / GRANULE;
        if whole.start >= whole.end {
            return Ok(0);
        }
        self.learn(file, cluster, offset)?;
        let (page, _, first) = self.place(cluster)?;
        Ok(page.clear(first + whole.start..first + whole.end))
    }

    /// Pays back granules of a cluster that were charged and are empty. Nobody writes to them.
    pub fn vacate(&self, cluster: u64, granules: Range<u64>) -> Result<()> {
        let (page, _, first) = self.place(cluster)?;
        self.back(page.clear(first + granules.start..first + granules.end));
        Ok(())
    }
}

impl Held {
    /// The granules of the cluster at `offset` that hold data.
    pub fn data_of(&self, file: &dyn StoreFile, offset: u64) -> Result<Granules> {
        let mut of = Granules::none(self.per);
        for data in data_in(file, offset..offset + self.cluster)? {
            of.set(self.granules(data.start - offset..data.end - offset));
        }
        Ok(of)
    }
}

/// Granules of `range` (from a granule on) that hold data.
pub fn granules_in(file: &dyn StoreFile, range: Range<u64>) -> Result<u64> {
    let (mut sum, mut end) = (0, 0);
    for data in data_in(file, range)? {
        let g = (data.start / GRANULE).max(end)..data.end.div_ceil(GRANULE);
        sum += g.end.saturating_sub(g.start);
        end = end.max(g.end);
    }
    Ok(sum)
}

/// Granules that a cut at `len` gives up of a file of `old` bytes: that which the cut is in stays.
pub(super) fn granules_behind(file: &dyn StoreFile, len: u64, old: u64) -> Result<u64> {
    let from = len.next_multiple_of(GRANULE);
    granules_in(file, from..old.max(from))
}

/// The ranges of `range` that hold data.
pub(super) fn data_in(file: &dyn StoreFile, range: Range<u64>) -> Result<Vec<Range<u64>>> {
    let (mut at, mut out) = (range.start, Vec::new());
    while at < range.end
        && let Some(data) = file.next_data(at, range.end)?
    {
        at = data.end;
        out.push(data);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::store::memory::MemoryStore;
    use std::path::Path;

    #[test]
    fn masks_cover_their_bits_and_no_others() {
        for (start, end) in [
            (0, 1),
            (0, 64),
            (63, 65),
            (5, 5),
            (64, 128),
            (3, 200),
            (127, 128),
        ] {
            let mut bits = [0u64; 4];
            for (word, mask) in masks(start..end) {
                bits[word] |= mask;
            }
            for bit in 0..256u64 {
                let set = bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                assert_eq!(set, (start..end).contains(&bit), "{start}..{end}: {bit}");
            }
        }
    }

    #[test]
    fn a_granule_is_paid_for_once_and_only_what_is_new() {
        let store = MemoryStore::new();
        let file = store.create(Path::new("/i"), 0o600).unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_at(&[1; 5000], 65536 + 8192).unwrap();
        let account = Arc::new(Account::default());
        let held = Held::new(account.clone(), 65536, 4);
        let take = |bytes: Range<u64>| {
            let missing = held.missing(&*file, 7, 65536, &bytes)?;
            held.take(missing, [(7, bytes)].into_iter()).map(drop)
        };
        // What was there is known, and not charged again.
        take(8192..8192 + 100).unwrap();
        assert_eq!(account.used(), 0);
        take(4095..8193).unwrap();
        assert_eq!(account.used(), 2 * GRANULE);
        take(0..8192).unwrap();
        assert_eq!(account.used(), 2 * GRANULE);
        account.set_limit(Some(3 * GRANULE));
        assert!(take(0..65536).is_err());
        assert_eq!(account.used(), 2 * GRANULE);
        // Of the file's granules 2 and 3 hold data; the first one is not whole.
        let back = held.release(&*file, 7, 65536, 1..12288).unwrap();
        assert_eq!(back, 2);
        // What was paid for and not written.
        held.vacate(7, 0..1).unwrap();
        assert_eq!(account.used(), GRANULE);
    }
}
