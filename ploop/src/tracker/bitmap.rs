//! A bit for each granule of a disk.
//!
//! Bits are in pages that are made when one of them is first set; a page of ones alone takes no
//! memory either. So a bitmap costs what was written, not what the disk claims to be.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::store::SECTOR;

/// Bits of a page.
pub(crate) const PAGE_BITS: u64 = 32768;
/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = PAGE_BITS as usize / 8;
const WORDS: usize = PAGE_BYTES / 8;
/// The most bits of one bitmap.
pub const BITS_MAX: u64 = 1 << 32;

/// What a page is without a word of its own.
const ZEROS: u8 = 0;
const ONES: u8 = 1;

type Words = Box<[AtomicU64; WORDS]>;

#[derive(Debug, Default)]
struct Page {
    all: AtomicU8,
    words: OnceLock<Words>,
}

/// What a page holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// No bit is set.
    Zeros,
    /// Every bit is, those behind the end of the disk, too.
    Ones,
    /// These; the first bit is the lowest of the first byte.
    Bits(Vec<u8>),
}

/// Written granules of a disk. All methods may be called from many threads; a bit that was set is
/// seen by whoever looks after the call.
#[derive(Debug)]
pub struct Bitmap {
    size: u64,
    /// The power of two of a granule's bytes.
    shift: u32,
    pages: Box<[Page]>,
}

/// Checks that a bitmap may have a bit for every `granularity` bytes of `size`.
pub fn check_granularity(size: u64, granularity: u64) -> Result<()> {
    if !granularity.is_power_of_two() || !(SECTOR..=1 << 40).contains(&granularity) {
        return Err(Error::invalid(format!(
            "a granularity of {granularity} bytes: it must be a power of two, at least {SECTOR}"
        )));
    }
    if size.div_ceil(granularity) > BITS_MAX {
        let least = size.div_ceil(BITS_MAX).next_power_of_two();
        return Err(Error::invalid(format!(
            "a granularity of {granularity} bytes is too fine for a disk of {size} bytes: at most \
             {BITS_MAX} granules"
        ))
        .fix(format!("Take {least} bytes or more")));
    }
    Ok(())
}

impl Bitmap {
    /// No bit set. Error: `Invalid` for a granularity that [`check_granularity`] refuses.
    pub fn new(size: u64, granularity: u64) -> Result<Bitmap> {
        check_granularity(size, granularity)?;
        let pages = size.div_ceil(granularity).div_ceil(PAGE_BITS);
        Ok(Bitmap {
            size,
            shift: granularity.trailing_zeros(),
            pages: (0..pages).map(|_| Page::default()).collect(),
        })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that a bit stands for: a power of two.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// How many bits there are.
    pub fn len(&self) -> u64 {
        self.size.div_ceil(self.granularity())
    }

    /// True when the disk has no byte.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// Sets the bits of all granules that `range` touches; what lies behind the end is left out.
    pub fn set(&self, range: &Range<u64>) {
        let end = range.end.min(self.size);
        if range.start < end {
            self.set_bits(range.start >> self.shift..((end - 1) >> self.shift) + 1);
        }
    }

    /// True when `range` lies in one granule whose bit is set; of others it may be false all the same.
    #[inline]
    pub(crate) fn has_one(&self, range: &Range<u64>) -> bool {
        let bit = range.start >> self.shift;
        range.end.wrapping_sub(1) >> self.shift == bit && self.is_in_words(bit)
    }

    /// Clears every bit; nobody sets one meanwhile.
    pub(crate) fn clear_all(&self) {
        for page in &self.pages {
            page.all.store(ZEROS, Ordering::Release);
            for word in page.words.get().into_iter().flat_map(|w| w.iter()) {
                word.store(0, Ordering::Release);
            }
        }
    }

    /// True when `bit` is set by a word; else it may be all the same.
    #[inline]
    fn is_in_words(&self, bit: u64) -> bool {
        let page = self.pages.get((bit / PAGE_BITS) as usize);
        let Some(words) = page.and_then(|p| p.words.get()) else {
            return false;
        };
        let word = &words[(bit % PAGE_BITS / 64) as usize];
        word.load(Ordering::Acquire) >> (bit % 64) & 1 == 1
    }

    /// Sets every bit.
    pub fn set_all(&self) {
        self.set_bits(0..self.len());
    }

    fn set_bits(&self, bits: Range<u64>) {
        let mut at = bits.start;
        while at < bits.end {
            let page = at / PAGE_BITS;
            let stop = ((page + 1) * PAGE_BITS).min(bits.end);
            self.set_in(page, at % PAGE_BITS..stop - page * PAGE_BITS);
            at = stop;
        }
    }

    fn set_in(&self, page: u64, bits: Range<u64>) {
        let all = (self.len() - page * PAGE_BITS).min(PAGE_BITS);
        let page = &self.pages[page as usize];
        if page.all.load(Ordering::Acquire) == ONES {
            return;
        }
        if bits.end - bits.start == all {
            page.all.store(ONES, Ordering::Release);
            return;
        }
        let words = page
            .words
            .get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
        let mut at = bits.start;
        while at < bits.end {
            let stop = ((at / 64 + 1) * 64).min(bits.end);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            let word = &words[(at / 64) as usize];
            // Most writes are to where somebody wrote before.
            if word.load(Ordering::Acquire) & mask != mask {
                word.fetch_or(mask, Ordering::AcqRel);
            }
            at = stop;
        }
    }

    /// How many pages there are.
    pub(crate) fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// What page `page` holds.
    pub(crate) fn page(&self, page: u64) -> Content {
        let Some(page) = self.pages.get(page as usize) else {
            return Content::Zeros;
        };
        match (page.all.load(Ordering::Acquire), page.words.get()) {
            (ONES, _) => Content::Ones,
            (_, None) => Content::Zeros,
            (_, Some(words)) => {
                let words = words.iter().map(|w| w.load(Ordering::Acquire));
                let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
                match bytes.iter().all(|&b| b == 0) {
                    true => Content::Zeros,
                    false => Content::Bits(bytes),
                }
            }
        }
    }

    /// Fills `out` with the bits from byte `offset` on; what lies behind the end is zeros.
    pub(crate) fn copy_bytes(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let first = offset * 8;
        let last = (first + out.len() as u64 * 8).min(self.len());
        let mut at = first;
        while at < last {
            let set = self.next(at, last, true);
            let end = self.next(set, last, false);
            for bit in set..end {
                out[((bit - first) / 8) as usize] |= 1 << (bit % 8);
            }
            at = end;
        }
    }

    /// Sets what `bytes` has set, from byte `offset` of the bits on; what lies behind the end is
    /// left out.
    pub(crate) fn add_bytes(&self, offset: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let ones = bytes[at..].iter().take_while(|&&b| b == 0xff).count();
            let first = (offset + at as u64) * 8;
            if ones > 0 {
                self.set_bits(first.min(self.len())..(first + 8 * ones as u64).min(self.len()));
                at += ones;
                continue;
            }
            for bit in (0..8).filter(|bit| bytes[at] >> bit & 1 == 1) {
                let bit = first + bit;
                self.set_bits(bit.min(self.len())..(bit + 1).min(self.len()));
            }
            at += 1;
        }
    }

    /// Sets every granule that has a byte in common with one that is set in `other`.
    pub fn add(&self, other: &Bitmap) {
        for run in other.runs(0..other.size) {
            if run.1 {
                self.set(&run.0);
            }
        }
    }

    /// The bytes of `range` in runs of granules that are set or not, in order: (bytes, set).
    /// Neighbours differ. `range` ends inside the disk.
    pub fn runs(&self, range: Range<u64>) -> Runs<'_> {
        Runs {
            bitmap: self,
            at: range.start,
            end: range.end.min(self.size),
        }
    }

    /// Bytes that set granules stand for.
    pub fn dirty_bytes(&self) -> u64 {
        let runs = self.runs(0..self.size).filter(|run| run.1);
        runs.map(|(bytes, _)| bytes.end - bytes.start).sum()
    }

    fn has(&self, bit: u64) -> bool {
        let page = &self.pages[(bit / PAGE_BITS) as usize];
        page.all.load(Ordering::Acquire) == ONES
            || page.words.get().is_some_and(|words| {
                words[(bit % PAGE_BITS / 64) as usize].load(Ordering::Acquire) >> (bit % 64) & 1
                    == 1
            })
    }

    /// The first bit from `from` on, and before `end`, that is `set`; `end` if there is none.
    fn next(&self, from: u64, end: u64, set: bool) -> u64 {
        let mut at = from;
        while at < end {
            let page = &self.pages[(at / PAGE_BITS) as usize];
            let stop = ((at / PAGE_BITS + 1) * PAGE_BITS).min(end);
            match (page.all.load(Ordering::Acquire), page.words.get()) {
                (ZEROS, Some(words)) => {
                    while at < stop {
                        let word = words[(at % PAGE_BITS / 64) as usize].load(Ordering::Acquire);
                        let word = if set { word } else { !word } >> (at % 64);
                        if word != 0 {
                            let found = at + u64::from(word.trailing_zeros());
                            if found < stop {
                                return found;
                            }
                            break;
                        }
                        at = (at / 64 + 1) * 64;
                    }
                }
                (all, _) if (all == ONES) == set => return at,
                _ => {}
            }
            at = stop;
        }
        end
    }

    /// A bitmap of the same granules for a disk of `size` bytes, with the same bits as far as it
    /// reaches. What is new counts as written: the disk may have been as large before, and then it
    /// held something else there. Error: `Invalid` as of [`Bitmap::new`].
    pub fn resized(&self, size: u64) -> Result<Bitmap> {
        let new = Bitmap::new(size, self.granularity())?;
        new.add(self);
        new.set(&(self.size..size));
        Ok(new)
    }
}

/// See [`Bitmap::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    bitmap: &'a Bitmap,
    at: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = (Range<u64>, bool);

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let granularity = self.bitmap.granularity();
        let first = self.at / granularity;
        let set = self.bitmap.has(first);
        let last = self.end.div_ceil(granularity);
        let stop = (self.bitmap.next(first, last, !set) * granularity).min(self.end);
        let run = (self.at..stop, set);
        self.at = stop;
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn granularities_that_cannot_be_are_refused() {
        for bad in [0, 1, 256, 65535, 1 << 41] {
            assert!(Bitmap::new(1 << 30, bad).is_err(), "{bad}");
        }
        assert!(Bitmap::new(1 << 50, 65536).is_err());
        assert!(Bitmap::new(1 << 48, 65536).is_ok());
    }

    #[test]
    fn a_page_of_ones_takes_no_memory_and_reads_as_ones() {
        let b = Bitmap::new(100 << 30, 65536).unwrap();
        b.set_all();
        assert!(b.pages.iter().all(|p| p.words.get().is_none()));
        assert_eq!(b.dirty_bytes(), 100 << 30);
        assert_eq!(
            b.runs(5..100 << 30).collect::<Vec<_>>(),
            [(5..100 << 30, true)]
        );
    }

    proptest! {
        #[test]
        fn it_says_what_a_list_of_bools_says(
            size in 1u64..40_000_000,
            shift in 9u32..13,
            sets in prop::collection::vec((0u64..40_000_000, 1u64..3_000_000), 0..12),
            from in 0u64..40_000_000,
        ) {
            let g = 1u64 << shift;
            let b = Bitmap::new(size, g).unwrap();
            let mut oracle = vec![false; size.div_ceil(g) as usize];
            for (at, len) in sets {
                b.set(&(at..at + len));
                for (i, bit) in oracle.iter_mut().enumerate() {
                    let i = i as u64;
                    *bit |= at < size && i >= at / g && i <= (at + len - 1) / g;
                }
            }
            let copy = Bitmap::new(size, g).unwrap();
            for page in 0..b.pages() {
                match b.page(page) {
                    Content::Zeros => {}
                    Content::Ones => copy.add_bytes(page * PAGE_BYTES as u64, &[0xff; PAGE_BYTES]),
                    Content::Bits(bytes) => copy.add_bytes(page * PAGE_BYTES as u64, &bytes),
                }
            }
            for b in [&b, &copy, &b.resized(size).unwrap()] {
                let mut at = from.min(size);
                let mut before = None;
                for (run, set) in b.runs(at..size) {
                    prop_assert_eq!(run.start, at);
                    prop_assert_ne!(before, Some(set));
                    before = Some(set);
                    for bit in run.start / g..run.end.div_ceil(g) {
                        prop_assert_eq!(oracle[bit as usize], set);
                    }
                    at = run.end;
                }
                prop_assert_eq!(at, size);
            }
        }
    }
}
