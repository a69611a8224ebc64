//! What passed through each export, also of connections that are over: for metrics, whose totals
//! never go back. Bounded: names come from clients' choice of what to open.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::export::Counters;

/// Exports that are remembered by name; the least recently used goes to the others.
pub const REMEMBERED: usize = 1024;

/// The name of all that is no longer remembered by its own. No export of a store has it.
pub const OTHERS: &str = "(others)";

/// Totals of [`Counters`], as plain numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// READ requests; a long one counts once for each piece.
    pub reads: u64,
    /// Bytes in them.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes in them.
    pub write_bytes: u64,
    /// Ranges zeroed.
    pub zeroes: u64,
    /// Ranges discarded.
    pub discards: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that failed.
    pub errors: u64,
}

impl Totals {
    /// The counters now.
    pub fn of(c: &Counters) -> Totals {
        let now = |counter: &AtomicU64| counter.load(Relaxed);
        Totals {
            reads: now(&c.reads),
            read_bytes: now(&c.read_bytes),
            writes: now(&c.writes),
            write_bytes: now(&c.write_bytes),
            zeroes: now(&c.zeroes),
            discards: now(&c.discards),
            flushes: now(&c.flushes),
            errors: now(&c.errors),
        }
    }

    fn add(&mut self, other: &Totals) {
        self.reads += other.reads;
        self.read_bytes += other.read_bytes;
        self.writes += other.writes;
        self.write_bytes += other.write_bytes;
        self.zeroes += other.zeroes;
        self.discards += other.discards;
        self.flushes += other.flushes;
        self.errors += other.errors;
    }
}

/// The totals of connections that are over.
#[derive(Debug, Default)]
pub(super) struct Past {
    exports: HashMap<String, (u64, Totals)>,
    others: Totals,
    uses: u64,
}

impl Past {
    /// Adds what a connection did to its export.
    pub(super) fn add(&mut self, export: &str, totals: &Totals) {
        self.uses += 1;
        if let Some((last, sum)) = self.exports.get_mut(export) {
            *last = self.uses;
            return sum.add(totals);
        }
        if self.exports.len() >= REMEMBERED {
            let oldest = self.exports.iter().min_by_key(|(_, (last, _))| *last);
            let oldest = oldest.map(|(name, _)| name.clone());
            if let Some((_, sum)) = oldest.and_then(|name| self.exports.remove(&name)) {
                self.others.add(&sum);
            }
        }
        self.exports.insert(export.to_owned(), (self.uses, *totals));
    }

    /// All totals, those of `live` connections added; sorted by name, [`OTHERS`] first.
    pub(super) fn with<'a>(
        &'a self,
        live: impl Iterator<Item = (&'a str, Totals)>,
    ) -> Vec<(String, Totals)> {
        let past = self.exports.iter();
        let mut all: HashMap<&str, Totals> =
            past.map(|(name, (_, sum))| (name.as_str(), *sum)).collect();
        if self.others != Totals::default() {
            all.entry(OTHERS).or_default().add(&self.others);
        }
        for (name, totals) in live {
            all.entry(name).or_default().add(&totals);
        }
        let mut all: Vec<_> = all.into_iter().map(|(n, t)| (n.to_owned(), t)).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_over_all_names_never_goes_back() {
        let one = Totals {
            reads: 1,
            ..Totals::default()
        };
        let mut past = Past::default();
        for i in 0..3 * REMEMBERED {
            past.add(&format!("export {i}"), &one);
            past.add("always", &one);
            let all = past.with([("live", one)].into_iter());
            assert!(all.len() <= REMEMBERED + 2);
            let sum: u64 = all.iter().map(|(_, t)| t.reads).sum();
            assert_eq!(sum, 2 * (i as u64 + 1) + 1);
            assert!(
                all.iter()
                    .any(|(n, t)| n == "always" && t.reads == i as u64 + 1)
            );
        }
    }
}
