//! Clusters of the top that have a place in the file and not yet all of their bytes.
//!
//! ```text
//!   guest cluster   ▐░░░░▓▓░░░░░▓░░░▌     ▓ granule (4 KiB) in the top's file   ░ still below
//! ```
//!
//! The first write to a cluster that lies below takes a cluster of the file and writes its own
//! bytes; the rest is read from below, until it is written too or copied
//! ([`crate::disk::Disk::complete`]). Only in memory: a cluster gets its BAT entry when it is
//! complete, so another program, or the next one after a crash, never sees a part.
//!
//! The map has [`super::top::PART`] where there is one, so that a lookup of any other cluster costs
//! what it always did. Who changes a part holds the cluster's lock ([`super::busy::Busy`]); readers
//! take a copy of its bits. Bits are only ever set, after the bytes are written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a granule. A cluster that is no multiple of it is completed at once.
pub const GRANULE: u64 = 4096;
/// Parts of one image, at most: bounds memory (100 bytes each).
pub const PARTS_MAX: usize = 16 << 10;
/// Bytes of the clusters of all parts, at most: bounds what a flush has to copy.
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

impl Granules {
    /// `count` granules, none set.
    pub fn none(count: u64) -> Granules {
        Granules {
            bits: vec![0; count.div_ceil(64) as usize].into(),
            count,
        }
    }

    /// True when granule `at` is set.
    pub fn has(&self, at: u64) -> bool {
        self.bits[(at / 64) as usize] >> (at % 64) & 1 == 1
    }

    /// Sets a range, cut to what there is.
    pub fn set(&mut self, range: Range<u64>) {
        for at in range.start..range.end.min(self.count) {
            self.bits[(at / 64) as usize] |= 1 << (at % 64);
        }
    }

    /// True when all are set.
    pub fn full(&self) -> bool {
        let set: u32 = self.bits.iter().map(|w| w.count_ones()).sum();
        u64::from(set) == self.count
    }

    /// The longest run from `from` on, up to `to`, that is set throughout, or not set throughout.
    pub fn run(&self, from: u64, to: u64) -> (bool, u64) {
        let set = self.has(from);
        let mut at = from + 1;
        while at < to.min(self.count) && self.has(at) == set {
            at += 1;
        }
        (set, at)
    }

    /// The runs that are not set, ascending.
    pub fn missing(&self) -> Vec<Range<u64>> {
        let mut out = Vec::new();
        let mut at = 0;
        while at < self.count {
            let (set, end) = self.run(at, self.count);
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
}

impl Part {
    /// A part at `offset` with `present`.
    pub fn new(offset: u64, present: Granules) -> Part {
        Part {
            offset,
            present,
            soiled: false,
            seq: 0,
        }
    }
}

/// The parts of one image.
#[derive(Debug, Default)]
pub struct Parts {
    shards: [Mutex<BTreeMap<u64, Part>>; SHARDS],
    count: AtomicUsize,
    seq: AtomicU64,
}

impl Parts {
    fn shard(&self, cluster: u64) -> MutexGuard<'_, BTreeMap<u64, Part>> {
        // Whole between two statements.
        let shard = &self.shards[cluster as usize % SHARDS];
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
        self.shard(cluster).get(&cluster).cloned()
    }

    /// Enters a new part.
    pub(super) fn insert(&self, cluster: u64, part: Part) {
        let seq = self.seq.fetch_add(1, Ordering::AcqRel);
        self.count.fetch_add(1, Ordering::AcqRel);
        self.shard(cluster).insert(cluster, Part { seq, ..part });
    }

    /// Changes the part of `cluster`, where there is one.
    pub(super) fn change<T>(&self, cluster: u64, change: impl FnOnce(&mut Part) -> T) -> Option<T> {
        self.shard(cluster).get_mut(&cluster).map(change)
    }

    /// Takes a part out: the cluster is complete.
    pub(super) fn remove(&self, cluster: u64) {
        if self.shard(cluster).remove(&cluster).is_some() {
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The guest clusters of parts older than `seq`, `limit` of them at most, ascending.
    pub fn older_than(&self, seq: u64, limit: usize) -> Vec<u64> {
        let mut out = Vec::new();
        if self.count() == 0 {
            return out;
        }
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let old = shard.iter().filter(|(_, part)| part.seq < seq);
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
    fn parts_are_found_by_age() {
        let parts = Parts::default();
        for cluster in [9, 4, 77] {
            parts.insert(cluster, Part::new(0, Granules::none(16)));
        }
        assert_eq!((parts.count(), parts.next_seq()), (3, 3));
        assert_eq!(parts.older_than(2, 9), [4, 9]);
        parts.remove(4);
        parts.remove(4);
        assert_eq!(parts.older_than(9, 9), [9, 77]);
        assert_eq!(parts.older_than(9, 1).len(), 1);
        assert_eq!(parts.count(), 2);
    }
}
