//! The L1 and L2 tables: every entry is judged here before anything follows it.
//!
//! Opening walks the L1 table once, so that an L2 table reached twice is found: with each table
//! reached once, walking the whole disk costs no more than the file has bytes. L2 entries are
//! judged when they are used, each time, so a file that changes under us cannot lead out of its
//! bounds. What stays in memory is the sorted offsets of the L2 tables that the file really has.

use std::fmt;

use super::header::{Header, overlap};
use crate::error::{Error, Result};
use crate::store::{SECTOR, StoreFile, read_exact};

/// The entry says that its cluster has no other owner.
pub(super) const COPIED: u64 = 1 << 63;
const PACKED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// The host offset in an L1 entry and in a plain L2 entry.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry and of a plain L2 entry that mean nothing yet.
const L1_RESERVED: u64 = !(COPIED | OFFSET);
const L2_RESERVED: u64 = !(COPIED | PACKED | OFFSET | ZERO);

/// Table entries read at a time: 32 KiB.
pub(super) const CHUNK: u64 = 4096;

/// Why an entry cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    Reserved,
    Misaligned,
    PastEnd,
    InMetadata(&'static str),
    ZeroInV2,
    CopiedPacked,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Flaw::Reserved => "sets bits that the format reserves",
            Flaw::Misaligned => "points off the cluster grid",
            Flaw::PastEnd => "points past the end of the file",
            Flaw::InMetadata(what) => return write!(f, "points into {what}"),
            Flaw::ZeroInV2 => "is a zero cluster, which version 2 does not have",
            Flaw::CopiedPacked => "is compressed and marked writable at once",
        })
    }
}

/// Where compressed bytes lie: from the first byte to the end of the last sector that may hold
/// any. Both inside the file, but for the rest of its last sector; at most two clusters long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packed {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// What an L2 entry says about its guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    Parent,
    Zero,
    Plain(u64),
    Packed(Packed),
    Bad(Flaw),
}

/// The tables of an image whose header is checked.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) header: Header,
    pub(super) file_len: u64,
    /// Offsets of all valid L2 tables, sorted, no two the same.
    l2: Box<[u64]>,
}

impl Tables {
    /// Walks the L1 table of `file`. Bad entries are left to [`Tables::judge_table`], where they
    /// cost their own range only; an L2 table named twice makes both ranges doubtful, and refuses.
    pub(super) fn read(file: &dyn StoreFile, header: Header) -> Result<Tables> {
        let mut tables = Tables {
            header,
            file_len: file.len()?,
            l2: Box::default(),
        };
        let mut found = Vec::new();
        let mut next = 0;
        let mut entries = Vec::new();
        while next < tables.header.l1_needed() {
            tables.read_l1(file, next, &mut entries)?;
            found.extend(
                entries
                    .iter()
                    .filter_map(|&e| tables.judge_table(e).ok().flatten()),
            );
            next += entries.len() as u64;
        }
        found.sort_unstable();
        if let Some(twice) = found.windows(2).find(|w| w[0] == w[1]) {
            let what = format!("two L1 entries name the same L2 table, at {}", twice[0]);
            return Err(Error::corrupt(what)
                .on(file.path())
                .at(tables.header.l1.start)
                .fix("Look at a copy with qemu-img check; no tool can tell which entry is right"));
        }
        tables.l2 = found.into_boxed_slice();
        Ok(tables)
    }

    /// Replaces `entries` by up to [`CHUNK`] L1 entries, the first of them number `first`, which
    /// must be less than [`Header::l1_needed`].
    pub(super) fn read_l1(
        &self,
        file: &dyn StoreFile,
        first: u64,
        entries: &mut Vec<u64>,
    ) -> Result<()> {
        let count = CHUNK.min(self.header.l1_needed() - first);
        read_entries(file, self.header.l1.start + first * 8, count, entries)
    }

    /// Bytes of a cluster, and of an L2 table.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// The L2 table that an L1 entry names; `None` when it names none.
    pub(super) fn judge_table(&self, entry: u64) -> Result<Option<u64>, Flaw> {
        if entry & L1_RESERVED != 0 {
            return Err(Flaw::Reserved);
        }
        let at = entry & OFFSET;
        if at == 0 {
            return Ok(None);
        }
        self.judge_place(at, self.cluster())?;
        match self.fixed_metadata(at, at + self.cluster()) {
            Some(what) => Err(Flaw::InMetadata(what)),
            None => Ok(Some(at)),
        }
    }

    /// What an L2 entry says about the cluster at guest byte `guest` (a multiple of the cluster).
    pub(super) fn judge_cluster(&self, entry: u64, guest: u64) -> Cluster {
        let judged = if entry & PACKED != 0 {
            self.judge_packed(entry).map(Cluster::Packed)
        } else {
            self.judge_plain(entry, guest)
        };
        judged.unwrap_or_else(Cluster::Bad)
    }

    fn judge_plain(&self, entry: u64, guest: u64) -> Result<Cluster, Flaw> {
        if entry & L2_RESERVED != 0 {
            return Err(Flaw::Reserved);
        }
        let at = entry & OFFSET;
        if entry & ZERO != 0 {
            // Space may be kept behind a zero cluster, written or not: where it lies is no matter,
            // but off the grid the entry as a whole is not to be believed.
            return match self.header.version {
                2 => Err(Flaw::ZeroInV2),
                _ if !at.is_multiple_of(self.cluster()) => Err(Flaw::Misaligned),
                _ => Ok(Cluster::Zero),
            };
        }
        if at == 0 {
            return Ok(Cluster::Parent);
        }
        // The guest's part of the cluster has to be there; of a last cluster that the disk's size
        // cuts, the file may lack the rest.
        let visible = self.cluster().min(self.header.size.saturating_sub(guest));
        self.judge_place(at, visible)?;
        match self.metadata(at, at + self.cluster()) {
            Some(what) => Err(Flaw::InMetadata(what)),
            None => Ok(Cluster::Plain(at)),
        }
    }

    fn judge_packed(&self, entry: u64) -> Result<Packed, Flaw> {
        if entry & COPIED != 0 {
            return Err(Flaw::CopiedPacked);
        }
        let offset_bits = packed_offset_bits(self.header.cluster_bits);
        let start = entry & ((1 << offset_bits) - 1);
        let more = (entry & !PACKED) >> offset_bits;
        let end = (start / SECTOR + 1 + more) * SECTOR;
        // The last sector of compressed data need not be whole at the end of the file.
        if start >= self.file_len || end > self.file_len.next_multiple_of(SECTOR) {
            return Err(Flaw::PastEnd);
        }
        match self.metadata(start, end) {
            Some(what) => Err(Flaw::InMetadata(what)),
            None => Ok(Packed { start, end }),
        }
    }

    fn judge_place(&self, at: u64, bytes: u64) -> Result<(), Flaw> {
        if !at.is_multiple_of(self.cluster()) {
            return Err(Flaw::Misaligned);
        }
        // `at` has 56 bits and `bytes` at most 21: no overflow.
        if at + bytes > self.file_len {
            Err(Flaw::PastEnd)
        } else {
            Ok(())
        }
    }

    fn fixed_metadata(&self, start: u64, end: u64) -> Option<&'static str> {
        let range = start..end;
        let h = &self.header;
        let kinds = [
            (0..self.cluster(), "the header"),
            (h.l1.clone(), "the L1 table"),
            (h.reftable.clone(), "the refcount table"),
        ];
        kinds
            .into_iter()
            .find(|(taken, _)| overlap(taken, &range))
            .map(|(_, what)| what)
    }

    fn metadata(&self, start: u64, end: u64) -> Option<&'static str> {
        let next = self
            .l2
            .partition_point(|&table| table + self.cluster() <= start);
        let hit = self.l2.get(next).is_some_and(|&table| table < end);
        if hit {
            Some("an L2 table")
        } else {
            self.fixed_metadata(start, end)
        }
    }
}

/// Reads `count` big-endian table entries at file byte `at`.
pub(super) fn read_entries(
    file: &dyn StoreFile,
    at: u64,
    count: u64,
    entries: &mut Vec<u64>,
) -> Result<()> {
    debug_assert!(count <= CHUNK);
    let mut raw = vec![0; count as usize * 8];
    read_exact(file, &mut raw, at)?;
    entries.clear();
    let be = |b: &[u8]| u64::from_be_bytes(b.try_into().unwrap_or_default());
    entries.extend(raw.chunks_exact(8).map(be));
    Ok(())
}

/// Low bits of a compressed entry that are its file offset; the rest counts further sectors.
pub(super) fn packed_offset_bits(cluster_bits: u32) -> u32 {
    62 - (cluster_bits - 8)
}

/// The L2 entry for compressed bytes that fill `sectors` sectors from that of byte `start` on.
pub(super) fn packed_entry(cluster_bits: u32, start: u64, sectors: u64) -> u64 {
    PACKED | (sectors - 1) << packed_offset_bits(cluster_bits) | start
}
