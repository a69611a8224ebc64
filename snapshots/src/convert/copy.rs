//! What a device holds besides zeros, piece by piece, in ascending order.
//!
//! Holes are never read: neither those of the map, nor those of the files that it names. What is
//! read is looked at in blocks of 4 KiB, and zero blocks are left out. The work is thus in
//! proportion to the data, whatever size the device claims (but for walking the map).

use std::ops::Range;

use ploop::device::{Device, ReadLease, Segment, SegmentPlace};
use ploop::store::SECTOR;
use ploop::{Error, Result};

use super::Progress;

/// Zeros are left out by this unit.
const BLOCK: u64 = 4096;
/// No piece crosses a multiple of this. Small on purpose: on ext4 with large folios, data written
/// in large pieces is several times slower to overwrite later.
pub(super) const PIECE: u64 = 64 * 1024;
/// Bytes read at a time.
const READ: u64 = 1 << 20;
/// Clusters mapped at a time: bounds the list of segments.
const WINDOW_CLUSTERS: u64 = 4096;

/// Takes one piece: its guest offset, and its bytes.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<()>;

/// Copies everything but zeros from `from` to `to`, which must read as zeros and be as large at
/// least. Returns the bytes written. Not durable before `to` is flushed. Error: `Invalid` for a
/// smaller target, and the first failure of either side; `to` then holds a part.
pub fn copy(from: &dyn Device, to: &dyn Device, progress: Progress<'_>) -> Result<u64> {
    if to.size() < from.size() {
        let (have, need) = (to.size(), from.size());
        return Err(Error::invalid(format!(
            "a target of {have} bytes cannot hold a source of {need}"
        )));
    }
    let mut written = 0;
    pieces(from, progress, &mut |offset, bytes| {
        to.write(offset, bytes)?;
        written += bytes.len() as u64;
        Ok(())
    })?;
    Ok(written)
}

/// Hands every run of blocks that are not all zeros to `sink`, in ascending order. A piece begins
/// on a multiple of 4 KiB, is 64 KiB long at most and crosses no multiple of that.
pub(crate) fn pieces(from: &dyn Device, progress: Progress<'_>, sink: Sink<'_>) -> Result<()> {
    pieces_in(from, 0..from.size(), progress, sink)
}

/// The same for the blocks of `range` alone, which begins at a multiple of 4 KiB. `progress` as of the
/// whole.
pub(crate) fn pieces_in(
    from: &dyn Device,
    range: Range<u64>,
    progress: Progress<'_>,
    sink: Sink<'_>,
) -> Result<()> {
    let size = from.size();
    let stop = range.end.min(size);
    // A multiple of `BLOCK`, so no block lies in two windows.
    let window = from.cluster_bytes().next_multiple_of(SECTOR).max(SECTOR) * WINDOW_CLUSTERS;
    let mut walk = Walk {
        from,
        stop,
        size,
        progress,
        sink,
        waiting: 0..0,
        buf: Vec::new(),
    };
    let mut segments: Vec<Segment> = Vec::new();
    let mut at = range.start;
    progress(at, size);
    while at < stop {
        let end = at.saturating_add(window).min(stop);
        let lease = from.map(at..end, &mut segments)?;
        for s in &segments {
            walk.segment(&lease, s)?;
        }
        walk.read_waiting()?;
        progress(end, size);
        at = end;
    }
    Ok(())
}

struct Walk<'a> {
    from: &'a dyn Device,
    /// Where the range ends, and the device.
    stop: u64,
    size: u64,
    progress: Progress<'a>,
    sink: Sink<'a>,
    /// Data that was found and not yet read; whole blocks.
    waiting: Range<u64>,
    buf: Vec<u8>,
}

impl Walk<'_> {
    /// Finds the data of one segment.
    fn segment(&mut self, lease: &ReadLease, s: &Segment) -> Result<()> {
        let (layer, start) = match s.place {
            SegmentPlace::Hole => return Ok(()),
            SegmentPlace::File { layer, offset } => (layer, offset),
            // To be read through its format; of a fault reading gives the error.
            SegmentPlace::Through { .. } | SegmentPlace::Fault { .. } => {
                return self.data(s.offset..s.offset + s.len);
            }
        };
        let (mut at, end) = (start, start + s.len);
        while at < end
            && let Some(found) = lease.file(layer).next_data(at, end)?
        {
            let (from, to) = (found.start.clamp(at, end), found.end.clamp(at, end));
            let guest = |offset: u64| s.offset + (offset - start);
            self.data(guest(from)..guest(to))?;
            // An answer that goes nowhere must not loop.
            at = to.max(at + 1);
        }
        Ok(())
    }

    /// Adds a range of data, rounded to whole blocks, to what waits; reads that if it is apart.
    fn data(&mut self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let start = range.start / BLOCK * BLOCK;
        let end = range.end.next_multiple_of(BLOCK).min(self.stop);
        if start > self.waiting.end || self.waiting.is_empty() {
            self.read_waiting()?;
            self.waiting = start..end;
        } else {
            self.waiting.end = self.waiting.end.max(end);
        }
        Ok(())
    }

    fn read_waiting(&mut self) -> Result<()> {
        let range = std::mem::take(&mut self.waiting);
        let mut at = range.start;
        while at < range.end {
            // Up to the next multiple, so that pieces are as large as they can be.
            let stop = ((at / READ + 1) * READ).min(range.end);
            self.buf.resize((stop - at) as usize, 0);
            self.from.read(at, &mut self.buf)?;
            emit(at, &self.buf, self.sink)?;
            (self.progress)(stop, self.size);
            at = stop;
        }
        Ok(())
    }
}

/// Hands on the blocks of `bytes`, which begin at `offset`, that are not all zeros.
fn emit(offset: u64, bytes: &[u8], sink: Sink<'_>) -> Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let here = offset + at as u64;
        let stop = bytes.len().min(at + (PIECE - here % PIECE) as usize);
        let run = |zero: bool| -> usize {
            let blocks = bytes[at..stop].chunks(BLOCK as usize);
            blocks
                .take_while(|b| is_zero(b) == zero)
                .map(<[u8]>::len)
                .sum()
        };
        let data = run(false);
        if data == 0 {
            at += run(true);
            continue;
        }
        sink(here, &bytes[at..at + data])?;
        at += data;
    }
    Ok(())
}

/// True when every byte is 0.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, tail) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| *c == [0; 64]) && tail.iter().all(|&b| b == 0)
}
