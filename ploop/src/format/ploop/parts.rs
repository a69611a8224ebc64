//! Clusters of the top that have a place in the file and not yet all of their bytes.
//!
//! ```text
//!   guest cluster   ▐░░░░▓▓░░░░░▓░░░▌     ▓ granule (4 KiB) in the top's file   ░ still below
//! ```
//!
//! The first write to a cluster that lies below takes a cluster of the file and writes its own
//! bytes; the rest is read from below, until it is written too or copied
//! ([`crate::disk::Disk::complete`]). A cluster gets its BAT entry when it is complete, so another
//! program never sees a part; the next one of ours after a crash finds what was flushed of it in the
//! journal ([`super::journal`]).
//!
//! The map has [`super::top::PART`] where there is one, so that a lookup of any other cluster costs
//! what it always did. Who changes a part holds the cluster's lock ([`super::busy::Busy`]); readers
//! take a copy of its bits. Bits are only ever set, after the bytes are written.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Result;

/// A cluster that is no multiple of it is completed at once.
pub use crate::account::GRANULE;
/// Parts of one image, at most: bounds memory (100 bytes each).
pub const PARTS_MAX: usize = 16 << 10;
/// Bytes of the clusters of all parts, at most: bounds what a close, and a flush that can keep no
/// journal, has to copy.
pub const PARTS_BYTES: u64 = 1 << 30;

/// How many parts an image with clusters of `cluster` bytes may have.
pub fn most(cluster: u64) -> usize {
    usize::try_from(PARTS_BYTES / cluster).map_or(PARTS_MAX, |n| n.clamp(1, PARTS_MAX))
}

const SHARDS: usize = 16;

/// A bit per granule of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granules {
    bits: Box<[u64]>,
    count: u64,
}

/// The words that hold bits `range`, and which of their bits.
pub(super) fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = match range.is_empty() {
        true => 0..0,
        false => range.start / 64..range.end.div_ceil(64),
    };
    words.map(move |word| {
        let low = range.start.saturating_sub(word * 64);
        let high = (range.end - word * 64).min(64);
        (word as usize, (u64::MAX >> (64 - high)) & (u64::MAX << low))
    })
}

impl Granules {
    /// `count` granules, none set.
    pub fn none(count: u64) -> Granules {
        Granules {
            bits: vec![0; count.div_ceil(64) as usize].into(),
            count,
        }
    }

    /// From words of 64 granules each; `None` unless they are words for `count` granules and no
    /// more.
    pub fn from_words(bits: Box<[u64]>, count: u64) -> Option<Granules> {
        let fits = bits.len() as u64 == count.div_ceil(64)
            && (count.is_multiple_of(64) || bits.last().is_none_or(|w| w >> (count % 64) == 0));
        fits.then_some(Granules { bits, count })
    }

    /// As words of 64 granules each, the first one in the lowest bit.
    pub fn words(&self) -> &[u64] {
        &self.bits
    }

    /// True when granule `at` is set; none behind the last one is.
    pub fn has(&self, at: u64) -> bool {
        let word = self.bits.get((at / 64) as usize);
        word.is_some_and(|w| w >> (at % 64) & 1 == 1)
    }

    /// Sets a range, cut to what there is.
    pub fn set(&mut self, range: Range<u64>) {
        for (word, mask) in masks(range.start..range.end.min(self.count)) {
            self.bits[word] |= mask;
        }
    }

    /// How many are set.
    pub fn count_set(&self) -> u64 {
        self.bits.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// True when all are set.
    pub fn full(&self) -> bool {
        self.count_set() == self.count
    }

    /// The longest run from `from` on, up to `to`, that is set throughout, or not set throughout.
    pub fn run(&self, from: u64, to: u64) -> (bool, u64) {
        let (set, to) = (self.has(from), to.min(self.count));
        let mut at = from;
        while at < to {
            let word = self.bits[(at / 64) as usize];
            let same = if set { !word } else { word } >> (at % 64);
            // To the next one that is not the same, or to the end of the word.
            at += u64::from(same.trailing_zeros()).min(64 - at % 64);
            if same != 0 {
                break;
            }
        }
        (set, at.min(to).max(from + 1))
    }

    /// The runs that are set, ascending.
    pub fn set_runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < self.count {
                let (set, end) = self.run(at, self.count);
                let start = std::mem::replace(&mut at, end);
                if set {
                    return Some(start..end);
                }
            }
            None
        })
    }

    /// The runs that are not set, ascending.
    pub fn missing(&self) -> Vec<Range<u64>> {
        self.missing_in(0..self.count)
    }

    /// The same of a range.
    pub fn missing_in(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut out = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (set, end) = self.run(at, range.end);
            if !set {
                out.push(at..end);
            }
            at = end;
        }
        out
    }
}

/// One cluster.
#[derive(Clone, Debug)]
pub struct Part {
    /// Where the cluster is in the file.
    pub offset: u64,
    /// The granules whose bytes are there.
    pub present: Granules,
    /// A write to it was given up: granules that are not present may hold anything.
    pub soiled: bool,
    /// Rises from part to part: its age.
    seq: u64,
    /// It is in the list of those that changed.
    changed: bool,
}

impl Part {
    /// A part at `offset` with `present`.
    pub fn new(offset: u64, present: Granules) -> Part {
        Part {
            offset,
            present,
            soiled: false,
            seq: 0,
            changed: false,
        }
    }

    /// A part that a journal names: what is not `present` may hold anything.
    pub fn found(offset: u64, present: Granules) -> Part {
        Part {
            soiled: true,
            ..Part::new(offset, present)
        }
    }
}

#[derive(Debug, Default)]
struct Shard {
    parts: BTreeMap<u64, Part>,
    /// Clusters that the journal, or a flush under way, has as parts and not as complete.
    logged: BTreeSet<u64>,
}

/// The parts of one image.
#[derive(Debug, Default)]
pub struct Parts {
    shards: [Mutex<Shard>; SHARDS],
    count: AtomicUsize,
    seq: AtomicU64,
    /// Clusters whose part changed since [`Parts::take`]. Locked after a shard.
    changed: Mutex<Vec<u64>>,
}

impl Parts {
    fn shard(&self, cluster: u64) -> MutexGuard<'_, Shard> {
        Parts::lock(&self.shards[cluster as usize % SHARDS])
    }

    fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
        // Whole between two statements.
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// The age that the next part gets.
    pub fn next_seq(&self) -> u64 {
        self.seq.load(Ordering::Acquire)
    }

    /// A copy of the part of `cluster`.
    pub fn get(&self, cluster: u64) -> Option<Part> {
        self.shard(cluster).parts.get(&cluster).cloned()
    }

    /// Enters a new part.
    pub(super) fn insert(&self, cluster: u64, part: Part) {
        let seq = self.seq.fetch_add(1, Ordering::AcqRel);
        self.count.fetch_add(1, Ordering::AcqRel);
        let changed = true;
        let part = Part {
            seq,
            changed,
            ..part
        };
        self.shard(cluster).parts.insert(cluster, part);
        self.lock_changed().push(cluster);
    }

    fn lock_changed(&self) -> MutexGuard<'_, Vec<u64>> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the part of `cluster`, where there is one.
    pub(super) fn change<T>(&self, cluster: u64, change: impl FnOnce(&mut Part) -> T) -> Option<T> {
        let mut shard = self.shard(cluster);
        let part = shard.parts.get_mut(&cluster)?;
        let made = change(part);
        if !std::mem::replace(&mut part.changed, true) {
            self.lock_changed().push(cluster);
        }
        Some(made)
    }

    /// Copies of the parts that changed since the last call, or of `all`, for a journal. A part that
    /// is entered or changed meanwhile is in this or in the next.
    pub(super) fn take(&self, all: bool) -> Vec<(u64, Part)> {
        let changed = std::mem::take(&mut *self.lock_changed());
        let mut out = Vec::new();
        if all {
            for shard in &self.shards {
                let Shard { parts, logged } = &mut *Parts::lock(shard);
                for (&cluster, part) in parts {
                    part.changed = false;
                    logged.insert(cluster);
                    out.push((cluster, part.clone()));
                }
            }
        } else {
            for cluster in changed {
                let Shard { parts, logged } = &mut *self.shard(cluster);
                if let Some(part) = parts.get_mut(&cluster) {
                    part.changed = false;
                    logged.insert(cluster);
                    out.push((cluster, part.clone()));
                }
            }
        }
        out.sort_unstable_by_key(|(cluster, _)| *cluster);
        out.dedup_by_key(|(cluster, _)| *cluster);
        out
    }

    /// Whether a journal may have `cluster` as a part, however complete it is by now: after a crash
    /// it will have to be completed, in the room that it has.
    pub(super) fn is_logged(&self, cluster: u64) -> bool {
        self.shard(cluster).logged.contains(&cluster)
    }

    /// A journal has `cluster` as a part.
    pub(super) fn found(&self, cluster: u64) {
        self.shard(cluster).logged.insert(cluster);
    }

    /// The journal has `clusters` as complete.
    pub(super) fn logged_whole(&self, clusters: impl IntoIterator<Item = u32>) {
        for cluster in clusters.into_iter().map(u64::from) {
            self.shard(cluster).logged.remove(&cluster);
        }
    }

    /// There is no journal any more.
    pub(super) fn unlogged(&self) {
        for shard in &self.shards {
            Parts::lock(shard).logged.clear();
        }
    }

    /// The parts of `clusters` that [`Parts::take`] gave did not get into a journal.
    pub(super) fn changed_again(&self, clusters: impl Iterator<Item = u64>) {
        for cluster in clusters {
            self.change(cluster, |_| ());
        }
    }

    /// Takes a part out: the cluster is complete, and `entered` enters it. In one step: a journal
    /// has it as the one or as the other.
    pub(super) fn finish(&self, cluster: u64, entered: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut shard = self.shard(cluster);
        entered()?;
        if shard.parts.remove(&cluster).is_some() {
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// The guest clusters of parts in `clusters`, ascending, and whether a journal may have any
    /// cluster in there as a part.
    pub fn within(&self, clusters: Range<u64>) -> (Vec<u64>, bool) {
        let (mut out, mut logged) = (Vec::new(), false);
        for shard in &self.shards {
            let shard = Parts::lock(shard);
            out.extend(
                shard
                    .parts
                    .range(clusters.clone())
                    .map(|(&cluster, _)| cluster),
            );
            logged |= shard.logged.range(clusters.clone()).next().is_some();
        }
        out.sort_unstable();
        (out, logged)
    }

    /// The guest clusters of parts older than `seq`, `limit` of them at most, ascending.
    pub fn older_than(&self, seq: u64, limit: usize) -> Vec<u64> {
        let mut out = Vec::new();
        if self.count() == 0 {
            return out;
        }
        for shard in &self.shards {
            let shard = Parts::lock(shard);
            let old = shard.parts.iter().filter(|(_, part)| part.seq < seq);
            out.extend(old.map(|(&cluster, _)| cluster).take(limit - out.len()));
        }
        out.sort_unstable();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_all_granules_and_alternate() {
        let mut g = Granules::none(130);
        g.set(3..5);
        g.set(63..66);
        g.set(128..999);
        assert_eq!(g.missing(), [0..3, 5..63, 66..128]);
        assert!(!g.full());
        for missing in g.missing() {
            g.set(missing);
        }
        assert!(g.full() && g.missing().is_empty());
        assert_eq!(g.run(7, 200), (true, 130));
    }

    #[test]
    fn a_part_is_taken_after_each_change_and_once() {
        let parts = Parts::default();
        for cluster in [9, 4] {
            parts.insert(cluster, Part::new(0, Granules::none(16)));
        }
        let clusters = |taken: Vec<(u64, Part)>| taken.iter().map(|t| t.0).collect::<Vec<_>>();
        assert_eq!(clusters(parts.take(false)), [4, 9]);
        assert!(parts.take(false).is_empty());
        parts.change(9, |p| p.present.set(0..1));
        parts.change(9, |p| p.present.set(1..2));
        let taken = parts.take(false);
        assert_eq!(taken[0].1.present.words(), [3]);
        assert_eq!(clusters(taken), [9]);
        parts.change(4, |p| p.present.set(0..1));
        parts.finish(4, || Ok(())).unwrap();
        assert!(parts.take(false).is_empty());
        assert_eq!(clusters(parts.take(true)), [9]);
        parts.changed_again([9, 4].into_iter());
        assert_eq!(clusters(parts.take(false)), [9]);
    }

    #[test]
    fn a_range_has_its_parts_and_what_a_journal_has_of_it() {
        let parts = Parts::default();
        for cluster in [9, 4, 77] {
            parts.insert(cluster, Part::new(0, Granules::none(16)));
        }
        assert_eq!(parts.within(4..77), (vec![4, 9], false));
        drop(parts.take(true));
        parts.finish(9, || Ok(())).unwrap();
        assert_eq!(parts.within(5..77), (vec![], true));
        parts.logged_whole([9]);
        assert_eq!(parts.within(5..77), (vec![], false));
    }

    #[test]
    fn words_with_bits_behind_the_last_granule_are_none() {
        assert!(Granules::from_words([3].into(), 2).is_some());
        assert!(Granules::from_words([7].into(), 2).is_none());
        assert!(Granules::from_words([1, 0].into(), 64).is_none());
        assert!(Granules::from_words([u64::MAX].into(), 64).is_some_and(|g| g.full()));
    }

    #[test]
    fn parts_are_found_by_age() {
        let parts = Parts::default();
        for cluster in [9, 4, 77] {
            parts.insert(cluster, Part::new(0, Granules::none(16)));
        }
        assert_eq!((parts.count(), parts.next_seq()), (3, 3));
        assert_eq!(parts.older_than(2, 9), [4, 9]);
        parts.finish(4, || Ok(())).unwrap();
        parts.finish(4, || Ok(())).unwrap();
        assert_eq!(parts.older_than(9, 9), [9, 77]);
        assert_eq!(parts.older_than(9, 1).len(), 1);
        assert_eq!(parts.count(), 2);
    }
}
