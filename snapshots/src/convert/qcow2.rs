//! A new qcow2 image, version 3, written in one pass.
//!
//! ```text
//!  cluster 0 │ data and L2 tables, as they come │ L1 table │ refcount table │ refcount blocks
//! ```
//!
//! All numbers are big-endian; a cluster is 64 KiB; a refcount has 16 bits.
//!
//! | what | holds | of the guest, or of the file |
//! |---|---|---|
//! | L2 table | 8192 entries in one cluster | 512 MiB of the guest |
//! | L1 table | an entry for each L2 table, 32 MiB of them at most | 2 PiB of the guest |
//! | refcount block | 32768 refcounts in one cluster | 2 GiB of the file |
//!
//! Guest clusters come in ascending order, so one L2 table is in memory at a time; it is appended
//! behind its data. Every cluster of the file has exactly one user, so each refcount is 1 and is
//! known without counting; every entry has the bit that says so (63, "copied"). Guest clusters of
//! zeros have no entry. Order: data and L2; L1; refcounts; sync; header; sync. A file cut short in
//! between has no magic, and nobody takes it for an image.

use ploop::device::Device;
use ploop::store::{SECTOR, StoreFile};
use ploop::{Error, Result};

use super::copy::{PIECE, pieces};
use super::staged::Staged;
use super::{Converted, MODE, Progress};

const CLUSTER_BITS: u32 = 16;
/// Bytes of a cluster.
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
const ENTRIES: u64 = CLUSTER / 8;
/// Guest bytes that one L2 table covers.
const SPAN: u64 = ENTRIES * CLUSTER;
/// The largest L1 table that known readers accept.
const L1_MAX: u64 = 32 << 20;
const REFCOUNT_ORDER: u32 = 4;
const REFCOUNTS: u64 = CLUSTER / 2;
/// The cluster that an entry names has no other user.
const COPIED: u64 = 1 << 63;

// A piece lies in one cluster.
const _: () = assert!(PIECE <= CLUSTER && CLUSTER.is_multiple_of(PIECE));

/// Writes the image. Its bytes are durable on return.
pub(super) fn file(
    from: &dyn Device,
    staged: &mut Staged<'_>,
    progress: Progress<'_>,
) -> Result<Converted> {
    let size = from.size().next_multiple_of(SECTOR);
    if size.div_ceil(SPAN) * 8 > L1_MAX {
        let what = format!("{size} bytes in a qcow2 image with 64 KiB clusters; 2 PiB is the most");
        return Err(Error::unsupported(what).on(staged.target()));
    }
    let file = staged.store().create(staged.temp(), MODE)?;
    staged.made();
    let mut writer = Writer {
        file: file.as_ref(),
        next: 1,
        data: None,
        table: None,
        l1: Vec::new(),
        written: 0,
    };
    pieces(from, progress, &mut |offset, bytes| {
        writer.piece(offset, bytes)
    })?;
    let bytes_written = writer.written;
    writer.finish(size)?;
    Ok(Converted {
        source_bytes: from.size(),
        virtual_bytes: size,
        bytes_written,
    })
}

struct Writer<'a> {
    file: &'a dyn StoreFile,
    /// The next free cluster of the file.
    next: u64,
    /// Guest cluster and file cluster of the last piece.
    data: Option<(u64, u64)>,
    /// The L2 table under work: which one, and its bytes.
    table: Option<(u64, Vec<u8>)>,
    /// L1 entries that are not 0: (index, file cluster), ascending.
    l1: Vec<(u64, u64)>,
    written: u64,
}

impl Writer<'_> {
    fn take(&mut self, clusters: u64) -> u64 {
        let first = self.next;
        self.next += clusters;
        first
    }

    /// Writes a piece, which lies in one guest cluster and behind all earlier ones.
    fn piece(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let guest = offset / CLUSTER;
        let host = match self.data {
            Some((last, host)) if last == guest => host,
            _ => self.enter(guest)?,
        };
        self.file
            .write_at(bytes, host * CLUSTER + offset % CLUSTER)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Appends a cluster for `guest` and enters it into its L2 table.
    fn enter(&mut self, guest: u64) -> Result<u64> {
        let index = guest / ENTRIES;
        if self.table.as_ref().is_some_and(|(i, _)| *i != index) {
            self.end_table()?;
        }
        let host = self.take(1);
        let (_, table) = self
            .table
            .get_or_insert_with(|| (index, vec![0; CLUSTER as usize]));
        put64(table, (guest % ENTRIES) as usize * 8, entry(host));
        self.data = Some((guest, host));
        Ok(host)
    }

    /// Appends the L2 table under work.
    fn end_table(&mut self) -> Result<()> {
        let Some((index, table)) = self.table.take() else {
            return Ok(());
        };
        let host = self.take(1);
        self.l1.push((index, host));
        self.file.write_at(&table, host * CLUSTER)
    }

    fn finish(mut self, size: u64) -> Result<()> {
        self.end_table()?;
        // An empty disk gets an entry, too: a table without any would have no place in the file.
        let l1_entries = size.div_ceil(SPAN).max(1);
        let l1_at = self.take((l1_entries * 8).div_ceil(CLUSTER));
        self.write_l1(l1_at)?;
        let (table_clusters, blocks) = refcount_clusters(self.next);
        let table_at = self.take(table_clusters);
        let blocks_at = self.take(blocks);
        let mut table = vec![0; (table_clusters * CLUSTER) as usize];
        for i in 0..blocks {
            put64(&mut table, i as usize * 8, (blocks_at + i) * CLUSTER);
        }
        self.file.write_at(&table, table_at * CLUSTER)?;
        self.write_refcounts(blocks_at, blocks)?;
        self.file.set_len(self.next * CLUSTER)?;

        let mut header = [0; SECTOR as usize];
        header[..4].copy_from_slice(b"QFI\xfb");
        put32(&mut header, 4, 3);
        put32(&mut header, 20, CLUSTER_BITS);
        put64(&mut header, 24, size);
        // Bounded by `L1_MAX`; and 8192 refcount blocks, 16 TiB of file, are one table cluster.
        put32(&mut header, 36, l1_entries as u32);
        put64(&mut header, 40, l1_at * CLUSTER);
        put64(&mut header, 48, table_at * CLUSTER);
        put32(&mut header, 56, table_clusters as u32);
        put32(&mut header, 96, REFCOUNT_ORDER);
        put32(&mut header, 100, 104);
        // Zeros behind the header's 104 bytes: no extension. One sync for all: until it is renamed,
        // nobody takes the file for an image.
        self.file.write_at(&header, 0)?;
        self.file.sync()
    }

    /// Writes those clusters of the L1 table that have entries.
    fn write_l1(&self, at: u64) -> Result<()> {
        for entries in self.l1.chunk_by(|a, b| a.0 / ENTRIES == b.0 / ENTRIES) {
            let mut bytes = vec![0; CLUSTER as usize];
            for &(index, host) in entries {
                put64(&mut bytes, (index % ENTRIES) as usize * 8, entry(host));
            }
            let number = entries.first().map_or(0, |e| e.0 / ENTRIES);
            self.file.write_at(&bytes, (at + number) * CLUSTER)?;
        }
        Ok(())
    }

    /// One for every cluster that was taken, zero for the rest of the last block.
    fn write_refcounts(&self, at: u64, blocks: u64) -> Result<()> {
        let mut bytes: Vec<u8> = [0, 1].repeat(REFCOUNTS as usize);
        for i in 0..blocks {
            let used = (self.next - i * REFCOUNTS).min(REFCOUNTS);
            bytes[used as usize * 2..].fill(0);
            self.file.write_at(&bytes, (at + i) * CLUSTER)?;
        }
        Ok(())
    }
}

/// Clusters of the refcount table and of its blocks behind `used` others: they count themselves.
fn refcount_clusters(used: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let need = (used + table + blocks).div_ceil(REFCOUNTS);
        let need_table = need.div_ceil(ENTRIES);
        if (need_table, need) == (table, blocks) {
            return (table, blocks);
        }
        // Never less than before: more clusters need more refcounts.
        (table, blocks) = (need_table, need);
    }
}

/// The entry for a file cluster.
fn entry(host: u64) -> u64 {
    COPIED | (host * CLUSTER)
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcount_blocks_cover_themselves_and_no_block_is_idle() {
        for used in (1..300_000).chain([8192 * REFCOUNTS - 8194, 8192 * REFCOUNTS - 1]) {
            let (table, blocks) = refcount_clusters(used);
            let all = used + table + blocks;
            assert!(blocks * REFCOUNTS >= all, "{used}");
            assert!(table * ENTRIES >= blocks, "{used}");
            assert!(table <= 2 && (blocks - 1) * REFCOUNTS < all, "{used}");
        }
    }
}
