//! One bit per granule, in pages as they are on disk.

use super::side::WORDS;

/// The bits of one page.
pub(super) type Page = [u64; WORDS];

/// Granules that one page has.
pub(super) const PER_PAGE: u64 = WORDS as u64 * 64;

/// See the module text. Bits from `len` on are never set.
#[derive(Debug, Default)]
pub(super) struct Bits {
    words: Vec<u64>,
    len: u64,
}

impl Bits {
    /// No bit set of `len`.
    pub(super) fn new(len: u64) -> Bits {
        let pages = len.div_ceil(PER_PAGE) as usize;
        Bits {
            words: vec![0; pages * WORDS],
            len,
        }
    }

    /// The next page of those that are read one by one, up to `len` bits; false when it has a bit
    /// from there on.
    pub(super) fn push(&mut self, page: &Page, len: u64) -> bool {
        let before = self.words.len() as u64 * 64;
        self.words.extend_from_slice(page);
        self.len = len.min(before + PER_PAGE);
        let end = self.words.len() as u64 * 64;
        self.find(self.len, end, 0).is_none()
    }

    /// How many granules.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// How many pages.
    pub(super) fn pages(&self) -> u64 {
        (self.words.len() / WORDS) as u64
    }

    /// One page.
    pub(super) fn page(&self, n: u64) -> Page {
        let mut page = [0; WORDS];
        let at = n as usize * WORDS;
        page.copy_from_slice(&self.words[at..at + WORDS]);
        page
    }

    /// Sets all bits of page `n` that `page` has.
    pub(super) fn add(&mut self, n: u64, page: &Page) {
        let at = n as usize * WORDS;
        for (mine, more) in self.words[at..at + WORDS].iter_mut().zip(page) {
            *mine |= more;
        }
    }

    /// How many are set.
    pub(super) fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    pub(super) fn set(&mut self, from: u64, to: u64) {
        self.each(from, to, |word, mask| *word |= mask);
    }

    pub(super) fn clear(&mut self, from: u64, to: u64) {
        self.each(from, to, |word, mask| *word &= !mask);
    }

    /// The first set bit in `from..to`.
    pub(super) fn next_set(&self, from: u64, to: u64) -> Option<u64> {
        self.find(from, to.min(self.len), 0)
    }

    /// The first bit in `from..to` that is not set, or `to`.
    pub(super) fn next_clear(&self, from: u64, to: u64) -> u64 {
        self.find(from, to.min(self.len), u64::MAX).unwrap_or(to)
    }

    /// The first bit in `from..to` that is set after all were turned by `turn`.
    fn find(&self, from: u64, to: u64, turn: u64) -> Option<u64> {
        let mut at = from;
        while at < to {
            let word = (self.words[(at / 64) as usize] ^ turn) & (u64::MAX << (at % 64));
            let start = at - at % 64;
            if word != 0 {
                let found = start + u64::from(word.trailing_zeros());
                return (found < to).then_some(found);
            }
            at = start + 64;
        }
        None
    }

    fn each(&mut self, from: u64, to: u64, act: impl Fn(&mut u64, u64)) {
        let mut at = from;
        while at < to {
            let start = at - at % 64;
            let n = (to - at).min(64 - at % 64);
            let mask = (u64::MAX >> (64 - n)) << (at - start);
            act(&mut self.words[(at / 64) as usize], mask);
            at += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_as_in_a_vector() {
        let len = PER_PAGE * 2 + 77;
        let (mut bits, mut model) = (Bits::new(len), vec![false; len as usize]);
        let mut x = 1_u64;
        let mut below = |n: u64| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x >> 33) % n
        };
        for round in 0..400 {
            let from = below(len);
            let to = (from + below(200) + 1).min(len);
            match round % 3 {
                0 => bits.clear(from, to),
                _ => bits.set(from, to),
            }
            model[from as usize..to as usize].fill(round % 3 != 0);
            let (a, b) = (below(len), len.min(below(2 * len)));
            let (a, b) = (a.min(b), b);
            let first = |wanted: bool| (a..b).find(|&n| model[n as usize] == wanted);
            assert_eq!(bits.next_set(a, b), first(true));
            assert_eq!(bits.next_clear(a, b), first(false).unwrap_or(b));
        }
        assert_eq!(bits.count(), model.iter().filter(|m| **m).count() as u64);
        let mut again = Bits::default();
        for n in 0..bits.pages() {
            assert!(again.push(&bits.page(n), len));
        }
        assert_eq!((again.len(), again.count()), (len, bits.count()));
    }
}
