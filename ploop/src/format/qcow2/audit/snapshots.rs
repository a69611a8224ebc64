//! The tables of internal snapshots and of bitmaps: rows of bounded length, nothing kept of them.

use super::owners::Owners;
use super::{AuditKind, Claim, words};
use crate::error::Result;
use crate::store::{StoreFile, read_or_zero};

/// Rows of the largest snapshot table and of the largest bitmap directory that QEMU reads.
const ROWS_MAX: u32 = 65_536;
/// Bytes in front of a snapshot row's extra data.
const SNAPSHOT_ROW: u64 = 40;
/// Bytes in front of a bitmap row's extra data.
const BITMAP_ROW: u64 = 24;
/// Entries of the largest L1 table that any known tool accepts.
const L1_MAX: u64 = (32 << 20) / 8;
/// A bitmap's flag: it was not stored by its last writer.
const IN_USE: u64 = 1;
/// The place in a bitmap's table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |v, &b| v << 8 | u64::from(b))
}

fn row<const N: usize>(file: &dyn StoreFile, at: u64) -> Result<[u8; N]> {
    let mut raw = [0; N];
    read_or_zero(file, &mut raw, at)?;
    Ok(raw)
}

impl Owners<'_> {
    pub(super) fn snapshots(&mut self) -> Result<()> {
        let (count, start) = self.tables.header.rest.snapshots;
        let (cluster, len) = (self.tables.cluster(), self.tables.file_len);
        if count == 0 {
            return Ok(());
        }
        let bad = AuditKind::BadSnapshotTable;
        if count > ROWS_MAX || !start.is_multiple_of(cluster) || start < cluster || start > len {
            let what = format!("{count} internal snapshots in a table at byte {start}");
            self.report(bad, 60, what);
            return Ok(());
        }
        let mut at = start;
        for number in 0..count {
            let raw: [u8; SNAPSHOT_ROW as usize] = row(self.file, at)?;
            let (l1, entries) = (be(&raw[..8]), be(&raw[8..12]));
            let bytes = SNAPSHOT_ROW + be(&raw[36..40]) + be(&raw[12..14]) + be(&raw[14..16]);
            if at + bytes > len {
                let what = format!("row {number} of the snapshot table is not inside the file");
                self.report(bad, at, what);
                return Ok(());
            }
            let range = l1..l1.saturating_add(8 * entries);
            let fits = l1.is_multiple_of(cluster) && l1 >= cluster && range.end <= len;
            if entries > L1_MAX || entries != 0 && !(fits && self.taken.take(&range)) {
                let what = format!(
                    "the L1 table of snapshot {number} ({entries} entries at byte {l1}) cannot be \
                     where it is"
                );
                self.report(bad, at, what);
            } else if entries != 0 {
                self.refs.add_bytes(range, cluster);
                self.l1(l1, entries, false)?;
            }
            at = (at + bytes).next_multiple_of(8);
        }
        self.refs.add_bytes(start..at.min(len), cluster);
        Ok(())
    }

    pub(super) fn bitmaps(&mut self) -> Result<()> {
        let Some(maps) = self.tables.header.rest.bitmaps else {
            return Ok(());
        };
        let (cluster, len) = (self.tables.cluster(), self.tables.file_len);
        let start = maps.directory;
        let end = start.saturating_add(maps.directory_bytes);
        let bad = AuditKind::BadBitmapTable;
        let placed = start.is_multiple_of(cluster) && start >= cluster && end <= len;
        if maps.count > ROWS_MAX || !placed || !self.taken.take(&(start..end)) {
            let what = format!("{} bitmaps in a directory at byte {start}", maps.count);
            self.report(bad, 0, what);
            return Ok(());
        }
        self.refs.add_bytes(start..end, cluster);
        let mut at = start;
        for number in 0..maps.count {
            let raw: [u8; BITMAP_ROW as usize] = row(self.file, at)?;
            let bytes = BITMAP_ROW + be(&raw[20..24]) + be(&raw[18..20]);
            if at + bytes > end {
                let what = format!("row {number} of the bitmap directory leaves it");
                self.report(bad, at, what);
                return Ok(());
            }
            if be(&raw[12..16]) & IN_USE != 0 {
                let what = format!("bitmap {number} was not stored by its last writer");
                self.report(AuditKind::BitmapInUse, at + 12, what);
            }
            self.bitmap(at, be(&raw[..8]), be(&raw[8..12]))?;
            at = (at + bytes).next_multiple_of(8);
        }
        Ok(())
    }

    /// The table of `entries` at byte `table`, that the row at byte `at` names.
    fn bitmap(&mut self, at: u64, table: u64, entries: u64) -> Result<()> {
        let (cluster, len) = (self.tables.cluster(), self.tables.file_len);
        let range = table..table.saturating_add(8 * entries);
        let placed = table.is_multiple_of(cluster) && table >= cluster && range.end <= len;
        if entries == 0 {
            return Ok(());
        }
        if !placed || !self.taken.take(&range) {
            let what = format!("a bitmap's table of {entries} entries at byte {table}");
            self.report(AuditKind::BadBitmapTable, at, what);
            return Ok(());
        }
        self.refs.add_bytes(range, cluster);
        let refs = &mut self.refs;
        let mut wrong = None;
        words(self.file, table, entries, &mut |i, entry| {
            let to = entry & OFFSET;
            if !to.is_multiple_of(cluster) || to.saturating_add(cluster) > len {
                wrong.get_or_insert((table + 8 * i, to));
            } else if to != 0 {
                refs.add(to / cluster, 1, 1, Claim::Nothing);
            }
        })?;
        if let Some((at, to)) = wrong {
            let what = format!("a part of a bitmap is at byte {to}, where the file has no cluster");
            self.report(AuditKind::BadBitmapTable, at, what);
        }
        Ok(())
    }
}
