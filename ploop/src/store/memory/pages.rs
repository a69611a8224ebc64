//! The bytes of one file: a length and the 4 KiB pages that were written.
//!
//! Pages are shared by reference count and copied when written, so a clone costs one pointer per
//! page, and an image of 1 TiB that holds nothing costs nothing.
//!
//! Bytes may lie past the length ("ghosts"): [`Pages::put`] stores them and only a later
//! [`Pages::set_len`] shows them. The replay of crash states needs that, because on a disk the data
//! and the length of a file are written apart. [`Pages::write`] never leaves a ghost.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a page: also the block that a punch gives back.
pub(in crate::store) const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// Sparse bytes. Absent pages read as zeros.
#[derive(Clone, Default)]
pub(in crate::store) struct Pages {
    len: u64,
    map: BTreeMap<u64, Arc<Page>>,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Pages {{ len: {}, pages: {} }}",
            self.len,
            self.map.len()
        )
    }
}

/// Cuts `offset..offset + len` at page borders: the page, the range in it, the range in the whole.
fn split(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % PAGE) as usize;
        let n = (len - done).min(PAGE as usize - within);
        let part = (at / PAGE, within..within + n, done..done + n);
        done += n;
        Some(part)
    })
}

impl Pages {
    pub(in crate::store) fn len(&self) -> u64 {
        self.len
    }

    /// Reads what lies inside the length; returns the bytes read.
    pub(in crate::store) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let n = left.min(buf.len());
        for (page, from, to) in split(offset, n) {
            match self.map.get(&page) {
                Some(bytes) => buf[to].copy_from_slice(&bytes[from]),
                None => buf[to].fill(0),
            }
        }
        n
    }

    /// Stores bytes without moving the length. The caller keeps `offset + bytes.len()` in `u64`.
    pub(in crate::store) fn put(&mut self, bytes: &[u8], offset: u64) {
        for (page, to, from) in split(offset, bytes.len()) {
            let page = self
                .map
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[to].copy_from_slice(&bytes[from]);
        }
    }

    /// Stores bytes and extends the length to hold them.
    pub(in crate::store) fn write(&mut self, bytes: &[u8], offset: u64) {
        if !bytes.is_empty() {
            self.put(bytes, offset);
            self.len = self.len.max(offset + bytes.len() as u64);
        }
    }

    /// Sets the length; everything past it is gone, ghosts too, when the file gets shorter.
    pub(in crate::store) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.cut(len);
        }
        self.len = len;
    }

    /// Drops the bytes past the length.
    pub(in crate::store) fn drop_ghosts(&mut self) {
        self.cut(self.len);
    }

    fn cut(&mut self, len: u64) {
        drop(self.map.split_off(&len.div_ceil(PAGE)));
        let within = (len % PAGE) as usize;
        if within > 0 && self.map.contains_key(&(len / PAGE)) {
            self.fill_zero(len / PAGE, within..PAGE as usize);
        }
    }

    /// Makes the range read as zeros: whole pages go, the edges are overwritten.
    pub(in crate::store) fn clear(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if first > last {
            self.fill_zero(
                offset / PAGE,
                (offset % PAGE) as usize..(end % PAGE) as usize,
            );
            return;
        }
        self.fill_zero(offset / PAGE, (offset % PAGE) as usize..PAGE as usize);
        self.fill_zero(last, 0..(end % PAGE) as usize);
        while let Some((&page, _)) = self.map.range(first..last).next() {
            self.map.remove(&page);
        }
    }

    /// Overwrites part of a page that is there; a whole page is left to the caller to remove.
    fn fill_zero(&mut self, page: u64, range: Range<usize>) {
        if range.is_empty() || range.len() == PAGE as usize {
            return;
        }
        if let Some(bytes) = self.map.get_mut(&page) {
            Arc::make_mut(bytes)[range].fill(0);
        }
    }

    /// The first run of pages at or after `from`, cut to `to` and to the length.
    pub(in crate::store) fn next_data(&self, from: u64, to: u64) -> Option<Range<u64>> {
        let to = to.min(self.len);
        if from >= to {
            return None;
        }
        let mut pages = self
            .map
            .range(from / PAGE..to.div_ceil(PAGE))
            .map(|(&page, _)| page);
        let first = pages.next()?;
        let run = pages
            .zip(first + 1..)
            .take_while(|(page, next)| page == next)
            .count() as u64;
        let start = from.max(first * PAGE);
        Some(start..to.min((first + 1 + run) * PAGE))
    }

    /// Feeds `hash` with everything in which `self` reads different from `base`. The same
    /// difference always feeds the same words.
    pub(in crate::store) fn feed_difference(&self, base: &Pages, hash: &mut impl FnMut(u64)) {
        hash(self.len);
        let (mut ours, mut theirs) = (self.map.iter().peekable(), base.map.iter().peekable());
        loop {
            let page = match (ours.peek(), theirs.peek()) {
                (Some((a, _)), Some((b, _))) => **a.min(b),
                (Some((page, _)), None) | (None, Some((page, _))) => **page,
                (None, None) => return,
            };
            let new = ours.next_if(|(p, _)| **p == page).map(|(_, bytes)| bytes);
            let old = theirs.next_if(|(p, _)| **p == page).map(|(_, bytes)| bytes);
            let same = match (new, old) {
                (Some(new), Some(old)) => Arc::ptr_eq(new, old) || new == old,
                (Some(only), None) | (None, Some(only)) => is_zero(only),
                (None, None) => true,
            };
            match new {
                _ if same => {}
                Some(bytes) if !is_zero(bytes) => {
                    hash(page << 1 | 1);
                    bytes
                        .as_chunks::<8>()
                        .0
                        .iter()
                        .for_each(|w| hash(u64::from_le_bytes(*w)));
                }
                _ => hash(page << 1),
            }
        }
    }
}

fn is_zero(page: &Page) -> bool {
    page.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(pages: &Pages) -> Vec<u8> {
        let mut buf = vec![0xee; pages.len() as usize];
        assert_eq!(pages.read(&mut buf, 0), buf.len());
        buf
    }

    #[test]
    fn agrees_with_a_plain_vector() {
        let (mut pages, mut plain) = (Pages::default(), Vec::new());
        let mut rng = 7u64;
        let mut next = |below: u64| {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (rng >> 33) % below
        };
        for round in 0..4000u64 {
            let (at, n) = (next(20_000), next(9000));
            let end = (at + n) as usize;
            match next(4) {
                0 | 1 => {
                    let bytes = vec![round as u8 | 1; n as usize];
                    pages.write(&bytes, at);
                    if n > 0 {
                        plain.resize(plain.len().max(end), 0);
                        plain[at as usize..end].copy_from_slice(&bytes);
                    }
                }
                2 => {
                    pages.clear(at, n);
                    let end = end.min(plain.len());
                    plain[(at as usize).min(end)..end].fill(0);
                }
                _ => {
                    pages.set_len(at);
                    plain.resize(at as usize, 0);
                }
            }
            assert_eq!(whole(&pages), plain, "round {round}");
            let mut seen = vec![0; plain.len()];
            let mut from = 0;
            while let Some(data) = pages.next_data(from, u64::MAX) {
                let range = data.start as usize..data.end as usize;
                assert!(data.start >= from && !range.is_empty() && range.end <= plain.len());
                seen[range.clone()].copy_from_slice(&plain[range]);
                from = data.end;
            }
            assert_eq!(seen, plain, "what is not reported as data is zero");
        }
    }

    #[test]
    fn a_clone_keeps_its_bytes() {
        let mut a = Pages::default();
        a.write(&[1; 5000], 0);
        let b = a.clone();
        a.write(&[2; 10], 4090);
        a.clear(0, 100);
        assert_eq!(whole(&b), [1; 5000]);
    }

    #[test]
    fn a_ghost_shows_only_when_the_length_reaches_it() {
        let mut a = Pages::default();
        a.put(&[5; 512], 512);
        assert_eq!(a.len(), 0);
        let mut shown = a.clone();
        shown.set_len(1024);
        assert_eq!(whole(&shown)[512..], [5; 512]);
        a.drop_ghosts();
        a.set_len(1024);
        assert_eq!(whole(&a), [0; 1024]);
    }

    #[test]
    fn a_difference_depends_on_content_only() {
        let words = |a: &Pages, b: &Pages| {
            let mut words = Vec::new();
            a.feed_difference(b, &mut |w| words.push(w));
            words
        };
        let mut base = Pages::default();
        base.write(&[1; 8192], 0);
        let mut same = base.clone();
        same.write(&[1; 100], 50);
        assert_eq!(words(&same, &base), words(&base, &base));
        let (mut punched, mut zeroed) = (base.clone(), base.clone());
        punched.clear(4096, 4096);
        zeroed.write(&[0; 4096], 4096);
        assert_ne!(words(&punched, &base), words(&base, &base));
        assert_eq!(words(&punched, &base), words(&zeroed, &base));
    }
}
