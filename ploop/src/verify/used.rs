//! Which file clusters a BAT names.
//!
//! As runs: an image that was written front to back needs one. Where entries are in disorder, a bit
//! for each cluster of the file is less than their runs are, and setting it is faster than sorting.

use std::ops::Range;

/// Runs below which bits are not thought of.
const RUNS_MIN: usize = 1 << 14;

/// A run of consecutive entries that name consecutive file clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Run {
    first: u32,
    count: u32,
    slot: u32,
}

/// Collects entries in slot order.
#[derive(Debug, Default)]
pub(super) struct Owners {
    runs: Vec<Run>,
    /// How many clusters can be named; 0 when that is not known.
    clusters: u64,
    bits: Option<Bits>,
}

/// One bit for each cluster of the file.
#[derive(Debug)]
struct Bits {
    words: Vec<u64>,
    /// Clusters that were set already, and the slots that name them again.
    again: Vec<(u32, u32)>,
}

impl Bits {
    fn set(&mut self, cluster: u32, slot: u32) {
        let mask = 1 << (cluster % 64);
        match self.words.get_mut(cluster as usize / 64) {
            Some(word) if *word & mask == 0 => *word |= mask,
            _ => self.again.push((cluster, slot)),
        }
    }

    fn ranges(&self) -> Vec<Range<u32>> {
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for (i, &word) in self.words.iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                let from = rest.trailing_zeros();
                let len = (rest >> from).trailing_ones();
                let start = i as u32 * 64 + from;
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = start + len,
                    _ => ranges.push(start..start + len),
                }
                rest = match from + len {
                    64 => 0,
                    done => rest >> done << done,
                };
            }
        }
        ranges
    }
}

impl Owners {
    /// For entries that name clusters below `clusters`.
    pub(super) fn below(clusters: u64) -> Owners {
        Owners {
            clusters,
            ..Owners::default()
        }
    }

    /// Notes that `slot` names file cluster `cluster`.
    pub(super) fn add(&mut self, cluster: u32, slot: u32) {
        if let Some(bits) = &mut self.bits {
            return bits.set(cluster, slot);
        }
        if let Some(last) = self.runs.last_mut()
            && last.first.checked_add(last.count) == Some(cluster)
            && last.slot + last.count == slot
        {
            last.count += 1;
            return;
        }
        self.runs.push(Run {
            first: cluster,
            count: 1,
            slot,
        });
        let size = (self.runs.len() * size_of::<Run>()) as u64;
        if self.runs.len() >= RUNS_MIN && self.clusters != 0 && self.clusters / 8 <= size {
            self.turn();
        }
    }

    /// Goes on with bits.
    fn turn(&mut self) {
        let mut bits = Bits {
            words: vec![0; self.clusters.div_ceil(64) as usize],
            again: Vec::new(),
        };
        for run in std::mem::take(&mut self.runs) {
            for i in 0..run.count {
                bits.set(run.first + i, run.slot + i);
            }
        }
        self.bits = Some(bits);
    }

    /// The clusters that are named; and each that is named again, with the slot that was there first
    /// where it is known, and the other.
    pub(super) fn finish(mut self, duplicate: &mut dyn FnMut(u32, Option<u32>, u32)) -> Used {
        if let Some(bits) = self.bits {
            for &(cluster, slot) in &bits.again {
                duplicate(cluster, None, slot);
            }
            return Used {
                ranges: bits.ranges(),
            };
        }
        self.runs.sort_unstable();
        let mut ranges: Vec<Range<u32>> = Vec::new();
        // The run that reaches furthest so far: what starts below its end is named twice.
        let mut reach: Option<Run> = None;
        for run in self.runs {
            let end = run.first + run.count;
            if let Some(r) = reach {
                for cluster in run.first..end.min(r.first + r.count) {
                    let one = r.slot + (cluster - r.first);
                    let other = run.slot + (cluster - run.first);
                    duplicate(cluster, Some(one.min(other)), one.max(other));
                }
            }
            match ranges.last_mut() {
                Some(last) if run.first <= last.end => last.end = last.end.max(end),
                _ => ranges.push(run.first..end),
            }
            if reach.is_none_or(|r| end > r.first + r.count) {
                reach = Some(run);
            }
        }
        Used { ranges }
    }
}

/// File clusters in use, counted from the data area's start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Sorted, not empty, not touching each other.
    ranges: Vec<Range<u32>>,
}

impl Used {
    /// The runs of clusters in use, in order, with free ones between them.
    pub fn ranges(&self) -> &[Range<u32>] {
        &self.ranges
    }

    /// These, and `more`, in any order.
    #[must_use]
    pub fn with(&self, more: &[u32]) -> Used {
        let singles = more.iter().map(|&c| c..c + 1);
        let mut all: Vec<Range<u32>> = self.ranges.iter().cloned().chain(singles).collect();
        all.sort_unstable_by_key(|r| r.start);
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for range in all {
            match ranges.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => ranges.push(range),
            }
        }
        Used { ranges }
    }

    /// The cluster behind the last one in use.
    pub fn end(&self) -> u64 {
        self.ranges.last().map_or(0, |r| u64::from(r.end))
    }

    /// How many are in use.
    pub fn count(&self) -> u64 {
        self.ranges.iter().map(|r| u64::from(r.end - r.start)).sum()
    }

    /// True when `cluster` is in use.
    pub fn contains(&self, cluster: u64) -> bool {
        let after = self
            .ranges
            .partition_point(|r| u64::from(r.start) <= cluster);
        after > 0 && cluster < u64::from(self.ranges[after - 1].end)
    }
}

impl FromIterator<u32> for Used {
    /// From clusters in any order.
    fn from_iter<I: IntoIterator<Item = u32>>(clusters: I) -> Used {
        let mut owners = Owners::default();
        for (slot, cluster) in clusters.into_iter().enumerate() {
            owners.add(cluster, slot as u32);
        }
        owners.finish(&mut |_, _, _| {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_second_owner_is_reported_with_the_first() {
        let mut owners = Owners::default();
        // Slots 0..4 name 5..9; 4 names 6; 5..8 name 8..11; 8 names 2.
        for (slot, cluster) in [5, 6, 7, 8, 6, 8, 9, 10, 2].into_iter().enumerate() {
            owners.add(cluster, slot as u32);
        }
        let mut pairs = Vec::new();
        let used = owners.finish(&mut |cluster, a, b| pairs.push((cluster, a, b)));
        assert_eq!(pairs, [(6, Some(1), 4), (8, Some(3), 5)]);
        assert_eq!(used.ranges(), [2..3, 5..11]);
        assert_eq!((used.count(), used.end()), (7, 11));
        assert_eq!(used.with(&[11, 0, 3]).ranges(), [0..1, 2..4, 5..12]);
        let named: Vec<u64> = (0..12).filter(|&c| used.contains(c)).collect();
        assert_eq!(named, [2, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn bits_say_what_runs_say() {
        let clusters = 1u32 << 17;
        // In disorder, with gaps, and every cluster below 64 named twice.
        let named = |slot: u32| match slot {
            0..100_000 => slot.wrapping_mul(40_503) % clusters / 3 * 3 + slot % 2,
            _ => slot - 100_000,
        };
        let (mut runs, mut bits) = (Owners::default(), Owners::below(u64::from(clusters)));
        for slot in 0..100_064 {
            runs.add(named(slot), slot);
            bits.add(named(slot), slot);
        }
        assert!(bits.bits.is_some() && runs.bits.is_none());
        let (mut of_runs, mut of_bits) = (0, Vec::new());
        let used = runs.finish(&mut |_, _, _| of_runs += 1);
        let same = bits.finish(&mut |cluster, _, slot| of_bits.push((cluster, slot)));
        assert_eq!(used, same);
        assert_eq!(100_064 - used.count(), of_bits.len() as u64);
        assert!(of_runs > 0 && of_bits.iter().all(|&(c, s)| named(s) == c));
    }
}
