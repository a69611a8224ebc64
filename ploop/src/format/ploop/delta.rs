//! A ploop image as a read-only layer.
//!
//! Entries are read from the file when asked for, a slice at a time, and judged one by one: an
//! entry that points into the header or BAT, past the end of the file, or off the cluster grid is a
//! [`Place::Fault`] for its own cluster and no other.

use std::ops::Range;
use std::sync::Arc;

use super::header::{FLAG_CONVERTING, HEADER_BYTES, Header, Unchecked, Version};
use super::journal::{self, Home, Replay};
use super::parts::{GRANULE, Part};
use crate::error::{Error, Kind, Result};
use crate::format::{Delta, Place, Run};
use crate::store::{StoreFile, read_exact};
use crate::verify::scan_image;

/// BAT entries read at a time: 4 KiB.
const SLICE: u64 = 1024;

/// Reads and checks the header of `file`. Errors name the file and the byte.
pub fn read_header(file: &dyn StoreFile) -> Result<(Header, u64)> {
    let len = file.len()?;
    let mut head = [0; HEADER_BYTES as usize];
    let got = file.read_at(&mut head, 0)?;
    let header = Unchecked::parse(&head[..got]).and_then(|h| h.check(len));
    Ok((header.map_err(|e| e.on(file.path()))?, len))
}

/// Why a BAT entry cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryFault {
    /// It points into the header, the BAT or the gap behind it.
    InMetadata,
    /// v1: it is off the grid of clusters.
    Misaligned,
    /// Its cluster starts past the end of the file.
    BeyondEof,
    /// Its cluster is cut by the end of the file.
    Truncated,
}

/// Judges the non-zero entry of guest cluster `slot` in a file of `file_len` bytes.
pub fn judge(header: &Header, file_len: u64, slot: u64, entry: u32) -> Result<u64, EntryFault> {
    let offset = header.entry_offset(entry);
    if offset < header.data_start {
        return Err(EntryFault::InMetadata);
    }
    let cluster = header.cluster_bytes();
    if header.version == Version::V1 && !(offset - header.data_start).is_multiple_of(cluster) {
        return Err(EntryFault::Misaligned);
    }
    if offset >= file_len {
        return Err(EntryFault::BeyondEof);
    }
    // Of a last cluster that the disk's size cuts, only the guest's part has to be there.
    let guest = header
        .size()
        .saturating_sub(slot.saturating_mul(cluster))
        .min(cluster);
    if offset + guest > file_len {
        return Err(EntryFault::Truncated);
    }
    Ok(offset)
}

/// The error for a faulty entry, as a reader meets it.
pub fn entry_error(file: &dyn StoreFile, header: &Header, slot: u64, fault: EntryFault) -> Error {
    let at = Header::slot_offset(slot);
    let mut raw = [0; 4];
    let entry = match read_exact(file, &mut raw, at) {
        Ok(()) => u32::from_le_bytes(raw),
        Err(e) => return e,
    };
    let where_to = header.entry_offset(entry);
    let why = match fault {
        EntryFault::InMetadata => "inside the header or BAT",
        EntryFault::Misaligned => "which is not on the cluster grid",
        EntryFault::BeyondEof => "past the end of the file",
        EntryFault::Truncated => "whose cluster the end of the file cuts",
    };
    let what = format!("BAT entry {slot} is {entry:#x}, file offset {where_to}, {why}");
    let fix = format!("See `ploop check {}`", file.path().display());
    Error::new(Kind::Corrupt, what)
        .on(file.path())
        .at(at)
        .fix(fix)
}

/// A ploop image, v1 or v2, read-only.
#[derive(Debug)]
pub struct PloopDelta {
    file: Arc<dyn StoreFile>,
    header: Header,
    file_len: u64,
    /// What a journal says of an image that was not closed.
    replay: Option<Box<Replay>>,
}

impl PloopDelta {
    /// Reads and checks the header; the BAT is read on demand. Any in-use value is accepted; an
    /// image in the middle of a version conversion is not (its entries mix two units).
    pub fn open(file: Arc<dyn StoreFile>) -> Result<PloopDelta> {
        let (header, file_len) = read_header(file.as_ref())?;
        refuse_converting(file.as_ref(), &header)?;
        Ok(PloopDelta {
            file,
            header,
            file_len,
            replay: None,
        })
    }

    /// The same, with what a journal at `home` says. Error: `Corrupt` for one that does not explain
    /// the image.
    pub fn open_at(file: Arc<dyn StoreFile>, home: Option<Home>) -> Result<PloopDelta> {
        let mut delta = PloopDelta::open(file)?;
        if let Some(home) = home
            && home.is_live()?
        {
            let scan = scan_image(delta.file.as_ref())?;
            delta.replay = journal::find(&home, delta.file.as_ref(), &scan)?.map(Box::new);
        }
        Ok(delta)
    }

    fn part(&self, slot: u64) -> Option<&Part> {
        let replay = self.replay.as_ref()?;
        replay.parts.get(&u32::try_from(slot).ok()?)
    }

    fn replayed(&self, slot: u64, entry: u32) -> u32 {
        match &self.replay {
            Some(replay) if entry == 0 => {
                let slot = u32::try_from(slot).ok();
                let entry = slot.and_then(|slot| replay.entries.get(&slot));
                entry.copied().unwrap_or(0)
            }
            _ => entry,
        }
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn place(&self, slot: u64, entry: u32) -> Place {
        if entry == 0 {
            return Place::Parent;
        }
        judge(&self.header, self.file_len, slot, entry).map_or(Place::Fault, Place::File)
    }
}

/// Refuses an image that OpenVZ's `convert -v` was interrupted on.
pub fn refuse_converting(file: &dyn StoreFile, header: &Header) -> Result<()> {
    if header.flags & FLAG_CONVERTING == 0 {
        return Ok(());
    }
    Err(Error::new(
        Kind::Unsupported,
        "a conversion between ploop v1 and v2 was interrupted here; its BAT may mix both units",
    )
    .on(file.path())
    .at(52)
    .fix("Let OpenVZ's `ploop check` restore the image from its .idx backup first"))
}

impl Delta for PloopDelta {
    fn size(&self) -> u64 {
        self.header.size()
    }

    fn cluster_bytes(&self) -> u64 {
        match &self.replay {
            Some(replay) if !replay.parts.is_empty() => GRANULE,
            _ => self.header.cluster_bytes(),
        }
    }

    fn shareable(&self) -> bool {
        self.replay.is_none()
    }

    fn mapped_end(&self) -> u64 {
        let table = u64::from(self.header.entries).saturating_mul(self.header.cluster_bytes());
        table.min(self.header.size())
    }

    fn file(&self) -> &Arc<dyn StoreFile> {
        &self.file
    }

    fn map(&self, range: Range<u64>, runs: &mut Vec<Run>) -> Result<()> {
        let cluster = self.header.cluster_bytes();
        let entries = u64::from(self.header.entries);
        let mut slot = range.start / cluster;
        let end_slot = range.end.div_ceil(cluster);
        let mut bytes = [0u8; SLICE as usize * 4];
        while slot < end_slot {
            let count = SLICE.min(end_slot - slot);
            // A table shorter than the disk leaves the rest unallocated.
            let stored = entries.saturating_sub(slot).min(count);
            let slice = &mut bytes[..count as usize * 4];
            slice.fill(0);
            let table = &mut slice[..stored as usize * 4];
            read_exact(self.file.as_ref(), table, Header::slot_offset(slot))?;
            for (i, raw) in slice.chunks_exact(4).enumerate() {
                let here = slot + i as u64;
                let entry = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                let entry = self.replayed(here, entry);
                let start = range.start.max(here * cluster);
                let end = range.end.min((here + 1) * cluster);
                if let Some(part) = self.part(here) {
                    push_part(runs, part, here * cluster, start..end);
                    continue;
                }
                let place = match self.place(here, entry) {
                    Place::File(offset) => Place::File(offset + (start - here * cluster)),
                    other => other,
                };
                push(
                    runs,
                    Run {
                        offset: start,
                        len: end - start,
                        place,
                    },
                );
            }
            slot += count;
        }
        Ok(())
    }

    fn read(&self, offset: u64, _buf: &mut [u8]) -> Result<()> {
        // A ploop cluster is always plain bytes, so `map` never answers `Through`.
        Err(self.fault(offset))
    }

    fn fault(&self, offset: u64) -> Error {
        let slot = offset / self.header.cluster_bytes();
        let mut raw = [0; 4];
        if let Err(e) = read_exact(self.file.as_ref(), &mut raw, Header::slot_offset(slot)) {
            return e;
        }
        match judge(&self.header, self.file_len, slot, u32::from_le_bytes(raw)) {
            Err(fault) => entry_error(self.file.as_ref(), &self.header, slot, fault),
            Ok(_) => Error::corrupt(format!("BAT entry {slot} changed while it was open"))
                .on(self.file.path())
                .at(Header::slot_offset(slot)),
        }
    }
}

/// Appends the runs of `range` in the cluster at guest byte `cluster`, which is there in part.
fn push_part(runs: &mut Vec<Run>, part: &Part, cluster: u64, range: Range<u64>) {
    let last = (range.end - cluster).div_ceil(GRANULE);
    let mut at = range.start;
    while at < range.end {
        let (here, end) = part.present.run((at - cluster) / GRANULE, last);
        let end = (cluster + end * GRANULE).min(range.end);
        let place = match here {
            true => Place::File(part.offset + (at - cluster)),
            false => Place::Parent,
        };
        let len = end - at;
        push(
            runs,
            Run {
                offset: at,
                len,
                place,
            },
        );
        at = end;
    }
}

/// Appends a run, joined to the one before where they continue each other.
pub(super) fn push(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut() {
        let joins = last.offset + last.len == run.offset
            && match (last.place, run.place) {
                (Place::File(a), Place::File(b)) => a + last.len == b,
                (a, b) => a == b && a != Place::Through,
            };
        if joins {
            last.len += run.len;
            return;
        }
    }
    runs.push(run);
}
