//! Which file clusters a BAT names, as runs: an image that was written front to back needs one.

use std::ops::Range;

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
}

impl Owners {
    /// Notes that `slot` names file cluster `cluster`.
    pub(super) fn add(&mut self, cluster: u32, slot: u32) {
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
    }

    /// The clusters that are named; and each that is named again, with the two slots.
    pub(super) fn finish(mut self, duplicate: &mut dyn FnMut(u32, u32, u32)) -> Used {
        self.runs.sort_unstable();
        let mut ranges: Vec<Range<u32>> = Vec::new();
        // The run that reaches furthest so far: what starts below its end is named twice.
        let mut reach: Option<Run> = None;
        for run in self.runs {
            let end = run.first + run.count;
            if let Some(r) = reach {
                for cluster in run.first..end.min(r.first + r.count) {
                    duplicate(
                        cluster,
                        r.slot + (cluster - r.first),
                        run.slot + (cluster - run.first),
                    );
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
        assert_eq!(pairs, [(6, 1, 4), (8, 3, 5)]);
        assert_eq!(used.ranges(), [2..3, 5..11]);
        assert_eq!((used.count(), used.end()), (7, 11));
        assert_eq!(used.with(&[11, 0, 3]).ranges(), [0..1, 2..4, 5..12]);
        let named: Vec<u64> = (0..12).filter(|&c| used.contains(c)).collect();
        assert_eq!(named, [2, 5, 6, 7, 8, 9, 10]);
    }
}
