//! qcow2 images, read-only (FORMAT.md beside this file).
//!
//! ```text
//!   header ──► vet ──► map:  parent │ zero │ file offset │ through │ fault
//!     │                                                      │
//!   backing ──► chain (opens the files below)             reader ──► qcow2-rs
//! ```
//!
//! * `header`: the first cluster; every feature that is not handled is refused there, by name.
//! * `vet`: L1 and L2 entries; none is followed that leaves the file or hits metadata.
//! * `reader`: compressed clusters, by the crate `qcow2-rs` behind glass.
//! * `audit`: who refers to which cluster, against the refcounts; only a check needs it.
//! * `chain`: a qcow2 image and the files below it, inside the directories that are allowed.
//!
//! Plain clusters are file ranges: no byte of them passes through this module. An entry that
//! cannot be right is a [`Place::Fault`] for its own range and no other; only what makes the whole
//! image doubtful refuses at open.

mod audit;
mod backing;
mod chain;
mod header;
mod reader;
#[cfg(test)]
mod tests;
mod vet;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

pub use audit::{AuditFinding, AuditKind};
pub use backing::{Backing, BackingFormat};
pub use chain::open_chain;

use self::header::{Header, MAGIC};
use self::vet::{CHUNK, Cluster, Tables, read_entries};
use super::{Delta, Place, Run};
use crate::error::{Error, Result};
use crate::store::StoreFile;

/// True when a file that begins with `first_bytes` says that it is qcow2, of any version. A guest
/// can write these bytes to a raw disk: never choose a format by this for a file that is declared
/// to be raw.
pub fn is_qcow2(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(&MAGIC)
}

/// A qcow2 image as a read-only layer: its current state, not its internal snapshots.
#[derive(Debug)]
pub struct Qcow2Delta {
    file: Arc<dyn StoreFile>,
    tables: Tables,
    /// The last compressed cluster that was asked for in parts: its guest offset and its bytes.
    recent: Mutex<Option<(u64, Arc<[u8]>)>>,
}

/// One guest cluster, and where its verdict comes from.
struct Looked {
    /// "L1" or "L2", the file byte of the entry, and the entry.
    table: &'static str,
    at: u64,
    entry: u64,
    cluster: Cluster,
}

impl Qcow2Delta {
    /// Checks the header and walks the L1 table; reads at most 32 MiB, keeps 8 bytes for each L2
    /// table. Blocks. Errors: `Corrupt` for what contradicts the format, `Unsupported` for a
    /// feature that is not handled, both with the byte. Does not open the backing file.
    pub fn open(file: Arc<dyn StoreFile>) -> Result<Qcow2Delta> {
        let header = Header::read(file.as_ref())?;
        let tables = Tables::read(file.as_ref(), header)?;
        Ok(Qcow2Delta {
            file,
            tables,
            recent: Mutex::new(None),
        })
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.tables.header.version
    }

    /// True when the last writer did not close the image. Its refcounts may be wrong, its content
    /// is not.
    pub fn is_dirty(&self) -> bool {
        self.tables.header.dirty
    }

    /// The file that this image says lies below it. Never opened here.
    pub fn backing(&self) -> Option<Backing> {
        self.tables.header.backing.clone()
    }

    /// Compares every refcount with the references that there are, internal snapshots and bitmaps
    /// included. Memory: 16 bytes for each run of clusters that are named in order. Blocks; reads
    /// all tables. An error means that the file could not be read.
    pub fn audit(&self, found: &mut dyn FnMut(AuditFinding)) -> Result<()> {
        audit::audit(self.file.as_ref(), &self.tables, found)
    }

    /// The verdict on the cluster at guest byte `guest` (a multiple of the cluster).
    fn look(&self, guest: u64) -> Result<Looked> {
        let tables = &self.tables;
        let span = tables.header.span();
        let mut entry = Vec::new();
        let l1_at = tables.header.l1.start + guest / span * 8;
        read_entries(self.file.as_ref(), l1_at, 1, &mut entry)?;
        let of_l1 = |cluster| Looked {
            table: "L1",
            at: l1_at,
            entry: entry[0],
            cluster,
        };
        let table = match tables.judge_table(entry[0]) {
            Ok(Some(table)) => table,
            Ok(None) => return Ok(of_l1(Cluster::Parent)),
            Err(flaw) => return Ok(of_l1(Cluster::Bad(flaw))),
        };
        let at = table + guest % span / tables.cluster() * 8;
        read_entries(self.file.as_ref(), at, 1, &mut entry)?;
        let cluster = tables.judge_cluster(entry[0], guest);
        Ok(Looked {
            table: "L2",
            at,
            entry: entry[0],
            cluster,
        })
    }

    /// Appends the runs of `range`, which one L2 table at `table` covers.
    fn map_table(&self, table: u64, range: Range<u64>, runs: &mut Vec<Run>) -> Result<()> {
        let cluster = self.tables.cluster();
        let mut entries = Vec::new();
        let mut guest = range.start - range.start % cluster;
        while guest < range.end {
            let count = CHUNK.min((range.end - guest).div_ceil(cluster));
            let at = table + guest % self.tables.header.span() / cluster * 8;
            read_entries(self.file.as_ref(), at, count, &mut entries)?;
            for &entry in &entries {
                let start = guest.max(range.start);
                let place = match self.tables.judge_cluster(entry, guest) {
                    Cluster::Parent => Place::Parent,
                    Cluster::Zero => Place::Zero,
                    Cluster::Plain(host) => Place::File(host + (start - guest)),
                    Cluster::Packed(_) => Place::Through,
                    Cluster::Bad(_) => Place::Fault,
                };
                guest += cluster;
                push(runs, start..guest.min(range.end), place);
            }
        }
        Ok(())
    }

    /// Reads a part of the compressed cluster at guest byte `guest`, from byte `skip` of it on.
    fn read_part(&self, guest: u64, skip: usize, buf: &mut [u8]) -> Result<()> {
        let recent = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, bytes)) = recent().clone()
            && at == guest
        {
            buf.copy_from_slice(&bytes[skip..skip + buf.len()]);
            return Ok(());
        }
        let looked = self.look(guest)?;
        let packed = match looked.cluster {
            Cluster::Packed(packed) => packed,
            Cluster::Bad(_) => return Err(self.flaw(&looked, guest)),
            _ => return Err(self.changed(&looked, guest)),
        };
        let bits = self.tables.header.cluster_bits;
        if buf.len() as u64 == self.tables.cluster() {
            return reader::inflate(self.file.as_ref(), bits, packed, buf);
        }
        let mut whole = vec![0; self.tables.cluster() as usize];
        reader::inflate(self.file.as_ref(), bits, packed, &mut whole)?;
        buf.copy_from_slice(&whole[skip..skip + buf.len()]);
        *recent() = Some((guest, whole.into()));
        Ok(())
    }

    fn flaw(&self, looked: &Looked, guest: u64) -> Error {
        let Looked {
            table,
            at,
            entry,
            cluster,
        } = *looked;
        let Cluster::Bad(flaw) = cluster else {
            return self.changed(looked, guest);
        };
        Error::corrupt(format!(
            "the {table} entry {entry:#018x} for guest byte {guest} {flaw}"
        ))
        .on(self.file.path())
        .at(at)
        .fix("What it held cannot be known; the rest of the disk is readable")
    }

    fn changed(&self, looked: &Looked, guest: u64) -> Error {
        let table = looked.table;
        Error::corrupt(format!(
            "the {table} entry for guest byte {guest} changed while in use"
        ))
        .on(self.file.path())
        .at(looked.at)
        .fix("Stop whatever writes to this image and open it again")
    }
}

impl Delta for Qcow2Delta {
    fn size(&self) -> u64 {
        self.tables.header.size
    }

    fn cluster_bytes(&self) -> u64 {
        self.tables.cluster()
    }

    fn file(&self) -> &Arc<dyn StoreFile> {
        &self.file
    }

    fn map(&self, range: Range<u64>, runs: &mut Vec<Run>) -> Result<()> {
        let end = range.end.min(self.size());
        let span = self.tables.header.span();
        let mut at = range.start;
        let mut entries = Vec::new();
        while at < end {
            let count = CHUNK.min(end.div_ceil(span) - at / span);
            let l1_at = self.tables.header.l1.start + at / span * 8;
            read_entries(self.file.as_ref(), l1_at, count, &mut entries)?;
            for &entry in &entries {
                let next = ((at / span + 1) * span).min(end);
                match self.tables.judge_table(entry) {
                    Ok(Some(table)) => self.map_table(table, at..next, runs)?,
                    Ok(None) => push(runs, at..next, Place::Parent),
                    Err(_) => push(runs, at..next, Place::Fault),
                }
                at = next;
            }
        }
        Ok(())
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            let what = format!("a read of {} bytes ends past the disk", buf.len());
            return Err(Error::invalid(what).on(self.file.path()));
        }
        let cluster = self.tables.cluster();
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let skip = at % cluster;
            let n = (rest.len() as u64).min(cluster - skip);
            let (part, tail) = rest.split_at_mut(n as usize);
            self.read_part(at - skip, skip as usize, part)?;
            at += n;
            rest = tail;
        }
        Ok(())
    }

    fn fault(&self, offset: u64) -> Error {
        if offset >= self.size() {
            let what = format!(
                "guest byte {offset} lies past the disk's {} bytes",
                self.size()
            );
            return Error::invalid(what).on(self.file.path());
        }
        let guest = offset - offset % self.tables.cluster();
        match self.look(guest) {
            Ok(looked) => self.flaw(&looked, guest),
            Err(e) => e,
        }
    }
}

/// Appends a run, joined to the one before it where both are one.
fn push(runs: &mut Vec<Run>, range: Range<u64>, place: Place) {
    let len = range.end - range.start;
    if let Some(last) = runs.last_mut() {
        let same = match (last.place, place) {
            (Place::File(a), Place::File(b)) => a + last.len == b,
            (a, b) => a == b,
        };
        if same && last.offset + last.len == range.start {
            last.len += len;
            return;
        }
    }
    runs.push(Run {
        offset: range.start,
        len,
        place,
    });
}
