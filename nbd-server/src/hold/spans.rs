//! Byte ranges that do not meet.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of ranges without overlap: start → end.
#[derive(Clone, Debug, Default)]
pub(super) struct Spans(BTreeMap<u64, u64>);

impl Spans {
    /// True when a range of the set has a byte of `range`.
    pub(super) fn meets(&self, range: &Range<u64>) -> bool {
        // They do not overlap, so of those that start before its end the last ends last.
        let before = self.0.range(..range.end).next_back();
        before.is_some_and(|(_, &end)| end > range.start)
    }

    /// Adds a range; false, and nothing is added, when it meets another. An empty one meets none.
    pub(super) fn add(&mut self, range: &Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        if self.meets(range) {
            return false;
        }
        self.0.insert(range.start, range.end);
        true
    }

    /// Takes out a range that was added.
    pub(super) fn remove(&mut self, range: &Range<u64>) {
        if !range.is_empty() {
            self.0.remove(&range.start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_meet_when_they_share_a_byte() {
        let mut spans = Spans::default();
        assert!(spans.add(&(10..20)) && spans.add(&(20..30)) && spans.add(&(40..50)));
        for (range, meets) in [
            (0..10, false),
            (0..11, true),
            (19..20, true),
            (30..40, false),
            (29..31, true),
            (35..60, true),
            (5..100, true),
            (50..60, false),
            (15..15, false),
        ] {
            assert_eq!(spans.add(&range), !meets, "{range:?}");
            if !meets {
                spans.remove(&range);
            }
        }
        spans.remove(&(20..30));
        assert!(!spans.meets(&(20..40)));
    }
}
