//! Changes that were answered and that no flush covers yet, in the order in which they were sent.
//!
//! A flush covers what was answered before it was sent; of a server whose connections do not see
//! each other's flushes, on the same connection. A change that is durable by itself covers its range
//! of what is older: played over it, that could be what a power cut leaves. Two changes that meet
//! were never under way together ([`super::volume`]), so of two that meet the later is never covered
//! before the earlier, but by another connection's flush: that takes its range out of the earlier, too.
//! So playing what is left again, in order, over any state that the server may have of it gives what
//! the clients were told.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;

/// A change.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Command number.
    pub(super) kind: u16,
    /// Command flags.
    pub(super) flags: u16,
    /// Where.
    pub(super) range: Range<u64>,
    /// Of a WRITE.
    pub(super) payload: Bytes,
}

/// A change that was answered.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) change: Change,
    /// When it was answered, on the volume's clock.
    pub(super) answered: u64,
    /// On whose connection it is to be flushed.
    pub(super) seat: u64,
    /// What it is charged.
    pub(super) cost: usize,
}

/// When a change was sent, and where what is left of it begins.
pub(super) type Place = (u64, u64);

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Kept {
    entries: BTreeMap<Place, Entry>,
    cost: usize,
}

impl Kept {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What all of it is charged.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn keep(&mut self, sent: u64, entry: Entry) {
        self.cost += entry.cost;
        self.entries.insert((sent, entry.change.range.start), entry);
    }

    /// True when one of them was answered on that connection.
    pub(super) fn any_of(&self, seat: u64) -> bool {
        self.entries.values().any(|e| e.seat == seat)
    }

    /// A flush that was sent at `sent` succeeded, on `seat` if it covers no other. What is free now, as
    /// of [`Kept::cut`].
    pub(super) fn covered(&mut self, sent: u64, seat: Option<u64>) -> isize {
        let before = self.cost as isize;
        let cost = &mut self.cost;
        let mut over_others = Vec::new();
        self.entries.retain(|&(at, _), e| {
            let stays = e.answered >= sent || seat.is_some_and(|seat| seat != e.seat);
            if !stays {
                *cost -= e.cost;
                if seat.is_some() {
                    over_others.push((at, e.change.range.clone()));
                }
            }
            stays
        });
        for (at, range) in over_others {
            if self.entries.is_empty() {
                break;
            }
            self.cut_before(at, &range);
        }
        before - self.cost as isize
    }

    /// Nobody can flush that connection's any more. What is free now.
    pub(super) fn drop_of(&mut self, seat: u64) -> usize {
        let before = self.cost;
        let cost = &mut self.cost;
        self.entries.retain(|_, e| {
            if e.seat == seat {
                *cost -= e.cost;
            }
            e.seat != seat
        });
        before - self.cost
    }

    /// `range` was changed durably after all of it: what is here of it is done. What is free now;
    /// less than nothing when a change has two ends left.
    pub(super) fn cut(&mut self, range: &Range<u64>) -> isize {
        let before = self.cost as isize;
        self.cut_before(u64::MAX, range);
        before - self.cost as isize
    }

    /// Takes `range` out of what was sent before `at`.
    fn cut_before(&mut self, at: u64, range: &Range<u64>) {
        let meets = |r: &Range<u64>| r.start < range.end && range.start < r.end;
        let met = self.entries.range(..(at, 0));
        let met = met.filter(|(_, e)| meets(&e.change.range));
        let met: Vec<Place> = met.map(|(&place, _)| place).collect();
        for place in met {
            let Some(entry) = self.entries.remove(&place) else {
                continue;
            };
            self.cost -= entry.cost;
            let whole = &entry.change.range;
            for part in [
                whole.start..range.start.max(whole.start),
                range.end.min(whole.end)..whole.end,
            ] {
                if !part.is_empty() {
                    self.keep(place.0, entry.part(part));
                }
            }
        }
    }

    /// The first at `from` or later.
    pub(super) fn next(&self, from: Place) -> Option<(Place, &Change)> {
        let (&place, entry) = self.entries.range(from..).next()?;
        Some((place, &entry.change))
    }

    /// All of it was played again and flushed. What is free now.
    pub(super) fn clear(&mut self) -> usize {
        self.entries.clear();
        std::mem::take(&mut self.cost)
    }
}

impl Entry {
    /// What is left of it. Its payload is copied: a slice would keep all of it in memory.
    fn part(&self, range: Range<u64>) -> Entry {
        let mut change = self.change.clone();
        let spared = change.payload.len();
        if !change.payload.is_empty() {
            let at = |offset: u64| (offset - change.range.start) as usize;
            change.payload =
                Bytes::copy_from_slice(&change.payload[at(range.start)..at(range.end)]);
        }
        change.range = range;
        let cost = self.cost - spared + change.payload.len();
        Entry {
            change,
            cost,
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(answered: u64, seat: u64) -> Entry {
        let change = Change {
            kind: 1,
            flags: 0,
            range: answered..answered + 1,
            payload: Bytes::new(),
        };
        Entry {
            change,
            answered,
            seat,
            cost: 10,
        }
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_was_sent() {
        let mut kept = Kept::default();
        // Sent first, answered last.
        kept.keep(1, entry(9, 1));
        kept.keep(2, entry(3, 1));
        kept.keep(4, entry(5, 2));
        assert_eq!(kept.covered(3, None), 0, "answered after it was sent");
        assert_eq!(kept.covered(8, Some(1)), 10, "another connection's stays");
        assert_eq!(kept.covered(8, None), 10);
        assert_eq!((kept.len(), kept.cost()), (1, 10));
        assert_eq!(kept.next((0, 0)).map(|(place, _)| place), Some((1, 9)));
        assert!(kept.next((2, 0)).is_none());
    }

    #[test]
    fn what_is_durable_takes_its_range_out_of_what_is_older() {
        let mut kept = Kept::default();
        let change = |range: Range<u64>, payload: &'static [u8]| Entry {
            change: Change {
                kind: 1,
                flags: 0,
                range,
                payload: Bytes::from_static(payload),
            },
            answered: 1,
            seat: 1,
            cost: 10 + payload.len(),
        };
        kept.keep(1, change(0..6, b"abcdef"));
        kept.keep(2, change(10..20, b""));
        kept.keep(3, change(30..34, b"wxyz"));
        let charged = kept.cost() as isize;
        let mut free = kept.cut(&(2..4));
        free += kept.cut(&(8..12));
        free += kept.cut(&(30..34));
        free += kept.cut(&(20..30));
        assert_eq!(charged - free, kept.cost() as isize);
        let mut left = Vec::new();
        let mut from = (0, 0);
        while let Some((place, change)) = kept.next(from) {
            left.push((change.range.clone(), change.payload.clone()));
            from = (place.0, place.1 + 1);
        }
        let of = |payload: &'static [u8]| Bytes::from_static(payload);
        assert_eq!(
            left,
            [(0..2, of(b"ab")), (4..6, of(b"ef")), (12..20, of(b""))]
        );
    }
}
