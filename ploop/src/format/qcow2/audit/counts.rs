//! What is counted: the refcount table and its blocks, of every width.

use std::ops::Range;

use super::super::vet::Tables;
use super::{AuditFinding, AuditKind, CHUNK, Claim, Refs, words};
use crate::error::Result;
use crate::store::{StoreFile, read_or_zero};

/// Bits of a refcount table entry that mean nothing yet.
const RESERVED: u64 = 0x1ff;

pub(super) struct Counts<'a> {
    file: &'a dyn StoreFile,
    /// The table's bytes, and those of a cluster.
    table: Range<u64>,
    cluster: u64,
    /// Bits of one refcount, as a power of two.
    order: u32,
    /// Number and file byte of each block that there is, in order.
    blocks: Vec<(u64, u64)>,
    /// File bytes that `piece` holds; zeros where it is shorter.
    held: Range<u64>,
    piece: Vec<u8>,
}

impl<'a> Counts<'a> {
    /// Reads the refcount table; `None` when there is none to be used.
    pub(super) fn read(
        file: &'a dyn StoreFile,
        tables: &Tables,
        found: &mut dyn FnMut(AuditFinding),
    ) -> Result<Option<Counts<'a>>> {
        let header = &tables.header;
        let cluster = tables.cluster();
        let mut bad = |offset, what| {
            found(AuditFinding {
                kind: AuditKind::BadRefcountTable,
                offset,
                cluster: None,
                what,
            });
        };
        let table = header.reftable.clone();
        if table.is_empty() {
            let (at, count) = header.rest.reftable;
            let what = format!("the refcount table is {count} clusters at byte {at}");
            bad(48, what);
            return Ok(None);
        }
        let mut blocks: Vec<(u64, u64)> = Vec::new();
        let mut wrong = Vec::new();
        words(
            file,
            table.start,
            (table.end - table.start) / 8,
            &mut |i, entry| {
                let inside = entry.saturating_add(cluster) <= tables.file_len;
                match entry & RESERVED == 0 && entry.is_multiple_of(cluster) && inside {
                    true => blocks.push((i, entry)),
                    false if wrong.len() < 16 => wrong.push((table.start + 8 * i, entry)),
                    false => {}
                }
            },
        )?;
        for (at, entry) in wrong {
            let what = format!("the refcount table names a block at {entry:#x}, which is none");
            bad(at, what);
        }
        let mut places: Vec<u64> = blocks.iter().map(|&(_, at)| at).collect();
        places.sort_unstable();
        if let Some(twice) = places.windows(2).find(|w| w[0] == w[1]) {
            let what = format!(
                "the refcount table names the block at byte {} twice",
                twice[0]
            );
            bad(table.start, what);
            return Ok(None);
        }
        Ok(Some(Counts {
            file,
            table,
            cluster,
            order: header.rest.refcount_order,
            blocks,
            held: 0..0,
            piece: Vec::new(),
        }))
    }

    /// The clusters that the refcounts themselves lie in.
    pub(super) fn add_owners(&self, refs: &mut Refs) {
        refs.add_bytes(self.table.clone(), self.cluster);
        for &(_, at) in &self.blocks {
            refs.add(at / self.cluster, 1, 1, Claim::Nothing);
        }
    }

    /// The cluster behind the last one that a block counts.
    pub(super) fn end(&self) -> u64 {
        let per_block = self.per_block();
        let last = self.blocks.last().map_or(0, |&(i, _)| i + 1);
        last.saturating_mul(per_block)
    }

    fn per_block(&self) -> u64 {
        (self.cluster * 8) >> self.order
    }

    /// Calls `each` with every run of clusters in `range` that have one refcount that is not zero,
    /// in order; what lies between is zero. No run is promised to be as long as it could be.
    pub(super) fn runs(
        &mut self,
        range: Range<u64>,
        each: &mut dyn FnMut(Range<u64>, u64),
    ) -> Result<()> {
        let per_block = self.per_block();
        let mut next = self
            .blocks
            .partition_point(|&(i, _)| (i + 1).saturating_mul(per_block) <= range.start);
        while let Some(&(number, at)) = self.blocks.get(next) {
            let first = number.saturating_mul(per_block);
            if first >= range.end {
                break;
            }
            let from = range.start.max(first) - first;
            let to = (range.end - first).min(per_block);
            self.block(at, from..to, &mut |run, value| {
                each(first + run.start..first + run.end, value);
            })?;
            next += 1;
        }
        Ok(())
    }

    /// The same for the refcounts `range` of the block at file byte `at`.
    fn block(
        &mut self,
        at: u64,
        range: Range<u64>,
        each: &mut dyn FnMut(Range<u64>, u64),
    ) -> Result<()> {
        let mut open: Option<(Range<u64>, u64)> = None;
        let mut i = range.start;
        while i < range.end {
            let byte = at + ((i << self.order) >> 3);
            if !self.held.contains(&byte) {
                self.load(byte, at + self.cluster)?;
            }
            let piece_end = (((self.held.end - at) << 3) >> self.order).min(range.end);
            // A hole is zeros to its end.
            let value = match self.piece.is_empty() {
                true => {
                    i = piece_end;
                    continue;
                }
                false => self.value(at, i),
            };
            match &mut open {
                Some((run, v)) if *v == value && run.end == i => run.end = i + 1,
                _ => {
                    if let Some((run, v)) = open.take() {
                        each(run, v);
                    }
                    open = (value != 0).then_some((i..i + 1, value));
                }
            }
            i += 1;
        }
        if let Some((run, v)) = open {
            each(run, v);
        }
        Ok(())
    }

    /// Loads the piece that begins at `byte`, of a block that ends at `end`.
    fn load(&mut self, byte: u64, end: u64) -> Result<()> {
        // Pieces begin where a refcount of any width does.
        let byte = byte & !7;
        self.piece.clear();
        let data = self.file.next_data(byte, end)?;
        let stop = match data {
            None => end,
            Some(data) if data.start >= byte + 8 => data.start & !7,
            Some(_) => {
                let n = (end - byte).min(CHUNK);
                self.piece.resize(n as usize, 0);
                read_or_zero(self.file, &mut self.piece, byte)?;
                byte + n
            }
        };
        self.held = byte..stop;
        Ok(())
    }

    /// Refcount `i` of the block at `at`, whose byte is in the piece.
    fn value(&self, at: u64, i: u64) -> u64 {
        let bit = i << self.order;
        let byte = (at + (bit >> 3) - self.held.start) as usize;
        if self.order < 3 {
            let mask = (1u64 << (1 << self.order)) - 1;
            return u64::from(self.piece[byte]) >> (bit & 7) & mask;
        }
        let width = 1 << (self.order - 3);
        self.piece[byte..byte + width]
            .iter()
            .fold(0, |v, &b| v << 8 | u64::from(b))
    }
}
