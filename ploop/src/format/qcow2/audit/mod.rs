//! Refcounts against references.
//!
//! ```text
//!  header, L1, L2, snapshots, bitmaps ── owners ──► who names which clusters ┐
//!  refcount table and blocks ─────────── counts ──► what is counted          ┴─ compare
//! ```
//!
//! Nothing here is needed to read a disk, and nothing found here makes one unreadable. Everything
//! is bounded by what the file holds: holes are skipped, no table is read twice, and what is kept
//! of a table goes with its words that are not zero: 16 bytes for each, 40 for one of an L1 table.

mod compare;
mod counts;
mod owners;
mod snapshots;

use std::collections::BTreeMap;
use std::ops::Range;

use self::counts::Counts;
use self::owners::Owners;
use super::vet::Tables;
use crate::error::Result;
use crate::store::{StoreFile, read_or_zero};

/// Table bytes read at a time.
const CHUNK: u64 = 64 * 1024;

/// What an audit finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AuditKind {
    /// The refcount table, or an entry of it, cannot be followed.
    BadRefcountTable,
    /// A cluster is counted less often than it is named.
    RefcountTooLow,
    /// A cluster that is named is counted more often than that.
    RefcountTooHigh,
    /// Clusters that are counted and not named, with named ones behind them.
    LeakedClusters,
    /// The same, with none behind them.
    LeakedTail,
    /// An entry says wrongly whether its cluster has one owner.
    CopiedFlag,
    /// The table of internal snapshots, or a table of one, cannot be followed.
    BadSnapshotTable,
    /// The directory of bitmaps, or a table of one, cannot be followed.
    BadBitmapTable,
    /// A bitmap was not stored by its last writer.
    BitmapInUse,
}

/// One thing that an audit found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditFinding {
    /// What kind of thing.
    pub kind: AuditKind,
    /// The byte of the file where it was seen: a field, an entry, or the first cluster concerned.
    pub offset: u64,
    /// The first cluster of the file concerned, where there is one.
    pub cluster: Option<u64>,
    /// One sentence with all operands.
    pub what: String,
}

pub(super) fn audit(
    file: &dyn StoreFile,
    tables: &Tables,
    found: &mut dyn FnMut(AuditFinding),
) -> Result<()> {
    let mut owners = Owners::new(file, tables, found);
    owners.collect()?;
    let refs = owners.finish();
    let Some(mut counts) = Counts::read(file, tables, found)? else {
        return Ok(());
    };
    let mut all = refs;
    counts.add_owners(&mut all);
    compare::compare(all.sorted(), &mut counts, tables, found)
}

/// Clusters that are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Ref {
    first: u64,
    count: u32,
    /// How often, and above that what the entries say of it ([`Claim`]).
    weight: u32,
}

/// What an entry says about the owners of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    Nothing = 0,
    One = 1,
    More = 2,
}

const WEIGHT_BITS: u32 = 30;

impl Ref {
    fn claim(self) -> Claim {
        match self.weight >> WEIGHT_BITS {
            0 => Claim::Nothing,
            1 => Claim::One,
            _ => Claim::More,
        }
    }

    fn times(self) -> u64 {
        u64::from(self.weight & ((1 << WEIGHT_BITS) - 1))
    }
}

/// All references, runs of them joined where they go on.
#[derive(Debug, Default)]
struct Refs(Vec<Ref>);

impl Refs {
    fn add(&mut self, first: u64, count: u32, times: u32, claim: Claim) {
        let weight = times.min((1 << WEIGHT_BITS) - 1) | (claim as u32) << WEIGHT_BITS;
        if let Some(last) = self.0.last_mut()
            && last.first + u64::from(last.count) == first
            && last.weight == weight
            && let Some(joined) = last.count.checked_add(count)
        {
            last.count = joined;
            return;
        }
        self.0.push(Ref {
            first,
            count,
            weight,
        });
    }

    /// Every cluster that has a byte of `bytes`; a table, so it fits 32 bits.
    fn add_bytes(&mut self, bytes: Range<u64>, cluster: u64) {
        if !bytes.is_empty() {
            let first = bytes.start / cluster;
            let count = bytes.end.div_ceil(cluster) - first;
            self.add(
                first,
                u32::try_from(count).unwrap_or(u32::MAX),
                1,
                Claim::Nothing,
            );
        }
    }

    fn sorted(mut self) -> Vec<Ref> {
        self.0.sort_unstable();
        self.0
    }
}

/// Byte ranges that were read as tables: no byte is read as two.
#[derive(Debug, Default)]
struct Taken(BTreeMap<u64, u64>);

impl Taken {
    /// Takes the range; false when a part of it is taken.
    fn take(&mut self, range: &Range<u64>) -> bool {
        let before = self.0.range(..range.end).next_back();
        if before.is_some_and(|(_, &end)| end > range.start) {
            return false;
        }
        self.0.insert(range.start, range.end);
        true
    }
}

/// Calls `each` with number and value of every big-endian word of the `count` at file byte `at` that
/// is not zero. Holes are not read.
fn words(file: &dyn StoreFile, at: u64, count: u64, each: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let end = at + 8 * count;
    let mut buf = vec![0; CHUNK.min(8 * count) as usize];
    let mut from = at;
    while let Some(data) = file.next_data(from, end)? {
        // Holes need not begin or end with a word.
        let mut next = data.start.max(from) - (data.start.max(from) - at) % 8;
        let stop = data.end.min(end);
        while next < stop {
            let n = (end - next)
                .min(CHUNK)
                .min((stop - next).next_multiple_of(8)) as usize;
            read_or_zero(file, &mut buf[..n], next)?;
            for (i, raw) in buf[..n].chunks_exact(8).enumerate() {
                let word = raw.iter().fold(0, |v, &b| v << 8 | u64::from(b));
                if word != 0 {
                    each((next - at) / 8 + i as u64, word);
                }
            }
            next += n as u64;
        }
        from = next.max(from + 8);
        if from >= end {
            break;
        }
    }
    Ok(())
}
