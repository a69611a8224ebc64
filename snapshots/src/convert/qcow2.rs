//! A new qcow2 image, version 3, written in one pass.
//!
//! ```text
//!  cluster 0 │ data and L2 tables, as they come │ L1 table │ refcount table │ refcount blocks
//! ```
//!
//! All numbers are big-endian; a refcount has 16 bits. A cluster is 64 KiB, or less for an image whose
//! backing file differs from it in smaller pieces. With 64 KiB:
//!
//! | what | holds | of the guest, or of the file |
//! |---|---|---|
//! | L2 table | 8192 entries in one cluster | 512 MiB of the guest |
//! | L1 table | an entry for each L2 table, 32 MiB of them at most | 2 PiB of the guest |
//! | refcount block | 32768 refcounts in one cluster | 2 GiB of the file |
//!
//! Guest clusters come in ascending order, so one L2 table is in memory at a time; its place is
//! taken before that of its data. Every cluster of the file has exactly one user, so each refcount is 1
//! and is known without counting; every entry has the bit that says so (63, "copied"). Guest clusters of
//! zeros have no entry, or over a backing file one that says so (bit 0). Order: data and L2; L1;
//! refcounts; header; sync. A file cut short in between has no magic, and nobody takes it for an image;
//! but it can be gone on with from a [`Mark`].

use std::sync::Arc;

use ploop::device::Device;
use ploop::store::{SECTOR, StoreFile, read_exact};
use ploop::{Error, Result};
use serde::{Deserialize, Serialize};

use super::copy::pieces;
use super::staged::Staged;
use super::{Converted, MODE, Progress};

const CLUSTER_BITS: u32 = 16;
/// Bytes of a cluster, unless another is asked for.
pub(crate) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Bytes of the smallest cluster that is written.
pub(crate) const CLUSTER_MIN: u64 = 4096;
/// The largest L1 table that known readers accept.
const L1_MAX: u64 = 32 << 20;
const REFCOUNT_ORDER: u32 = 4;
/// The cluster that an entry names has no other user.
const COPIED: u64 = 1 << 63;
/// The cluster reads as zeros.
const ZERO: u64 = 1;
/// Bytes of the header, before its extensions.
const HEADER: usize = 104;
/// The extension that names the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The longest name of a backing file.
pub(crate) const NAME_MAX: usize = 1023;

/// Writes the image. Its bytes are durable on return.
pub(super) fn file(
    from: &dyn Device,
    staged: &mut Staged<'_>,
    progress: Progress<'_>,
) -> Result<Converted> {
    let size = check_size(from.size(), CLUSTER).map_err(|e| e.on(staged.target()))?;
    let file = staged.store().create(staged.temp(), MODE)?;
    staged.made();
    let mut writer = Writer::new(file, CLUSTER);
    pieces(from, progress, &mut |offset, bytes| {
        writer.piece(offset, bytes)
    })?;
    let bytes_written = writer.written();
    writer.finish(size, None)?;
    Ok(Converted {
        source_bytes: from.size(),
        virtual_bytes: size,
        bytes_written,
    })
}

/// The size of an image for `size` bytes. Error: `Unsupported` for more than it can have.
pub(crate) fn check_size(size: u64, cluster: u64) -> Result<u64> {
    let span = cluster / 8 * cluster;
    let most = L1_MAX / 8 * span;
    match size.checked_next_multiple_of(SECTOR) {
        Some(size) if size <= most => Ok(size),
        _ => {
            let what = format!(
                "{size} bytes in a qcow2 image with clusters of {cluster}; {most} is the most"
            );
            Err(Error::unsupported(what))
        }
    }
}

/// The file below, as the image names it.
#[derive(Clone, Debug)]
pub(crate) struct Backing {
    /// Its path: beside the image, or absolute.
    pub(crate) name: String,
    /// `raw` or `qcow2`.
    pub(crate) format: String,
}

/// How far an image is, durable in its file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// The next free cluster of the file.
    next: u64,
    /// Entries of the L1 table that are not 0: index, file cluster.
    l1: Vec<(u64, u64)>,
    /// Guest bytes written.
    written: u64,
}

#[derive(Debug)]
struct Table {
    index: u64,
    host: u64,
    bytes: Vec<u8>,
}

/// An image in the making.
#[derive(Debug)]
pub(crate) struct Writer {
    file: Arc<dyn StoreFile>,
    cluster: u64,
    next: u64,
    /// Guest cluster and file cluster of the last piece.
    data: Option<(u64, u64)>,
    /// The L2 table under work.
    table: Option<Table>,
    /// As of [`Mark`], ascending.
    l1: Vec<(u64, u64)>,
    written: u64,
}

impl Writer {
    /// In an empty file, with clusters of `cluster` bytes: a power of two from [`CLUSTER_MIN`] to
    /// [`CLUSTER`].
    pub(crate) fn new(file: Arc<dyn StoreFile>, cluster: u64) -> Writer {
        Writer {
            file,
            cluster,
            next: 1,
            data: None,
            table: None,
            l1: Vec::new(),
            written: 0,
        }
    }

    /// Goes on behind what was written before `mark`: of the guest, that before byte `at`. Error:
    /// `Corrupt` for a mark that no such file has.
    pub(crate) fn resume(
        file: Arc<dyn StoreFile>,
        cluster: u64,
        at: u64,
        mark: Mark,
    ) -> Result<Writer> {
        let ascend = |p: &[(u64, u64)]| p[0].0 < p[1].0 && p[0].1 < p[1].1;
        let ascend = mark.l1.windows(2).all(ascend);
        let tables = at.div_ceil(cluster).div_ceil(cluster / 8);
        let fits = |&(index, host): &(u64, u64)| index < tables && (1..mark.next).contains(&host);
        let inside = mark.next > 0 && mark.l1.iter().all(fits);
        let len = mark.next.checked_mul(cluster);
        if !ascend || !inside || len.is_none_or(|len| file.len().is_ok_and(|l| l < len)) {
            let what = "the file is not as far as its mark says";
            return Err(Error::corrupt(what).on(file.path()));
        }
        // Behind that is what nobody knows of.
        file.set_len(mark.next * cluster)?;
        let mut writer = Writer::new(file, cluster);
        if let Some(&(index, host)) = mark.l1.last() {
            let mut bytes = vec![0; cluster as usize];
            read_exact(writer.file.as_ref(), &mut bytes, host * cluster)?;
            writer.table = Some(Table { index, host, bytes });
        }
        writer.next = mark.next;
        writer.l1 = mark.l1;
        writer.written = mark.written;
        Ok(writer)
    }

    /// Where it could go on, once the file is synced as it is now. The next piece must begin in
    /// another cluster.
    pub(crate) fn mark(&mut self) -> Result<Mark> {
        self.write_table()?;
        // So that the file is as long as it should be, whatever its last cluster has.
        self.file.set_len(self.next * self.cluster)?;
        Ok(Mark {
            next: self.next,
            l1: self.l1.clone(),
            written: self.written,
        })
    }

    /// What it writes to.
    pub(crate) fn file(&self) -> &dyn StoreFile {
        self.file.as_ref()
    }

    /// Guest bytes written.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    fn entries(&self) -> u64 {
        self.cluster / 8
    }

    fn take(&mut self, clusters: u64) -> u64 {
        let first = self.next;
        self.next += clusters;
        first
    }

    /// Writes a piece, which lies behind all earlier ones.
    pub(crate) fn piece(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (guest, inside) = (at / self.cluster, at % self.cluster);
            let len = (bytes.len() - done).min((self.cluster - inside) as usize);
            let host = match self.data {
                Some((last, host)) if last == guest => host,
                _ => self.enter(guest)?,
            };
            let part = &bytes[done..done + len];
            self.file.write_at(part, host * self.cluster + inside)?;
            done += len;
        }
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Says that guest cluster `guest`, behind all earlier ones, reads as zeros whatever is below.
    pub(crate) fn zero(&mut self, guest: u64) -> Result<()> {
        self.set(guest, ZERO)
    }

    /// Appends a cluster for `guest` and enters it into its L2 table.
    fn enter(&mut self, guest: u64) -> Result<u64> {
        self.table_of(guest)?;
        let host = self.take(1);
        self.set(guest, self.entry(host))?;
        self.data = Some((guest, host));
        Ok(host)
    }

    fn set(&mut self, guest: u64, value: u64) -> Result<()> {
        let at = (guest % self.entries()) as usize * 8;
        let table = self.table_of(guest)?;
        put64(&mut table.bytes, at, value);
        Ok(())
    }

    /// The table that has the entry of `guest`.
    fn table_of(&mut self, guest: u64) -> Result<&mut Table> {
        let index = guest / self.entries();
        if self.table.as_ref().is_some_and(|t| t.index != index) {
            self.write_table()?;
            self.table = None;
        }
        if self.table.is_none() {
            let host = self.take(1);
            self.l1.push((index, host));
        }
        let host = self.l1.last().map_or(0, |l| l.1);
        let bytes = || vec![0; self.cluster as usize];
        Ok(self.table.get_or_insert_with(|| Table {
            index,
            host,
            bytes: bytes(),
        }))
    }

    fn write_table(&self) -> Result<()> {
        match &self.table {
            Some(table) => self.file.write_at(&table.bytes, table.host * self.cluster),
            None => Ok(()),
        }
    }

    /// Ends an image of `size` bytes, a multiple of the sector. Durable on return.
    pub(crate) fn finish(mut self, size: u64, backing: Option<&Backing>) -> Result<()> {
        self.write_table()?;
        let cluster = self.cluster;
        // An empty disk gets an entry, too: a table without any would have no place in the file.
        let l1_entries = size.div_ceil(self.entries() * cluster).max(1);
        let l1_at = self.take((l1_entries * 8).div_ceil(cluster));
        self.write_l1(l1_at)?;
        let (table_clusters, blocks) = refcount_clusters(self.next, cluster);
        let table_at = self.take(table_clusters);
        let blocks_at = self.take(blocks);
        let mut table = vec![0; (table_clusters * cluster) as usize];
        for i in 0..blocks {
            put64(&mut table, i as usize * 8, (blocks_at + i) * cluster);
        }
        self.file.write_at(&table, table_at * cluster)?;
        self.write_refcounts(blocks_at, blocks)?;
        self.file.set_len(self.next * cluster)?;

        let mut header = vec![0; HEADER];
        header[..4].copy_from_slice(b"QFI\xfb");
        put32(&mut header, 4, 3);
        put32(&mut header, 20, cluster.trailing_zeros());
        put64(&mut header, 24, size);
        // Bounded by `L1_MAX`; and a refcount block is one entry of 8 bytes.
        put32(&mut header, 36, l1_entries as u32);
        put64(&mut header, 40, l1_at * cluster);
        put64(&mut header, 48, table_at * cluster);
        put32(&mut header, 56, table_clusters as u32);
        put32(&mut header, 96, REFCOUNT_ORDER);
        put32(&mut header, 100, HEADER as u32);
        if let Some(backing) = backing {
            let format = backing.format.as_bytes();
            let mut extension = vec![0; 8];
            put32(&mut extension, 0, BACKING_FORMAT);
            put32(&mut extension, 4, format.len() as u32);
            extension.extend_from_slice(format);
            extension.resize(extension.len().next_multiple_of(8), 0);
            header.extend_from_slice(&extension);
            // The end of the extensions.
            header.extend_from_slice(&[0; 8]);
            let name_at = header.len() as u64;
            put64(&mut header, 8, name_at);
            put32(&mut header, 16, backing.name.len() as u32);
            header.extend_from_slice(backing.name.as_bytes());
        }
        header.resize(header.len().next_multiple_of(SECTOR as usize), 0);
        // One sync for all: until it is renamed, nobody takes the file for an image.
        self.file.write_at(&header, 0)?;
        self.file.sync()
    }

    /// Writes those clusters of the L1 table that have entries.
    fn write_l1(&self, at: u64) -> Result<()> {
        let each = self.entries();
        for entries in self.l1.chunk_by(|a, b| a.0 / each == b.0 / each) {
            let mut bytes = vec![0; self.cluster as usize];
            for &(index, host) in entries {
                put64(&mut bytes, (index % each) as usize * 8, self.entry(host));
            }
            let number = entries.first().map_or(0, |e| e.0 / each);
            self.file.write_at(&bytes, (at + number) * self.cluster)?;
        }
        Ok(())
    }

    /// One for every cluster that was taken, zero for the rest of the last block.
    fn write_refcounts(&self, at: u64, blocks: u64) -> Result<()> {
        let each = self.cluster / 2;
        let mut bytes: Vec<u8> = [0, 1].repeat(each as usize);
        for i in 0..blocks {
            let used = (self.next - i * each).min(each);
            bytes[used as usize * 2..].fill(0);
            self.file.write_at(&bytes, (at + i) * self.cluster)?;
        }
        Ok(())
    }

    /// The entry for a file cluster.
    fn entry(&self, host: u64) -> u64 {
        COPIED | (host * self.cluster)
    }
}

/// Clusters of the refcount table and of its blocks behind `used` others: they count themselves.
fn refcount_clusters(used: u64, cluster: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let need = (used + table + blocks).div_ceil(cluster / 2);
        let need_table = need.div_ceil(cluster / 8);
        if (need_table, need) == (table, blocks) {
            return (table, blocks);
        }
        // Never less than before: more clusters need more refcounts.
        (table, blocks) = (need_table, need);
    }
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
        const REFCOUNTS: u64 = CLUSTER / 2;
        for used in (1..300_000).chain([8192 * REFCOUNTS - 8194, 8192 * REFCOUNTS - 1]) {
            let (table, blocks) = refcount_clusters(used, CLUSTER);
            let all = used + table + blocks;
            assert!(blocks * REFCOUNTS >= all, "{used}");
            assert!(table * (CLUSTER / 8) >= blocks, "{used}");
            assert!(table <= 2 && (blocks - 1) * REFCOUNTS < all, "{used}");
        }
    }
}
