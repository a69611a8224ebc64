//! Moving clusters between two files, hole for hole: what was a hole stays one, and what was data
//! is data, zeros or not, so that the space is what was foretold.

use std::ops::Range;

use ploop::error::Result;
use ploop::store::{StoreFile, read_or_zero};

/// Bytes in memory at a time.
const BUFFER: usize = 256 << 10;

/// Copies the data of `len` bytes at `from` in `source` to `to` in `target`. The holes of the range
/// are left alone: they read as zeros in `target` already.
pub(super) fn copy_data(
    source: &dyn StoreFile,
    from: u64,
    target: &dyn StoreFile,
    to: u64,
    len: u64,
) -> Result<()> {
    each_extent(source, from..from + len, |data, is_data| match is_data {
        true => copy_bytes(
            source,
            data.start,
            target,
            to + (data.start - from),
            data.end - data.start,
        ),
        false => Ok(()),
    })
}

/// The same over bytes of `target` that may be anything: holes become holes there.
pub(super) fn copy_over(
    source: &dyn StoreFile,
    from: u64,
    target: &dyn StoreFile,
    to: u64,
    len: u64,
) -> Result<()> {
    each_extent(source, from..from + len, |part, is_data| {
        let (at, n) = (to + (part.start - from), part.end - part.start);
        match is_data {
            true => copy_bytes(source, part.start, target, at, n),
            false => target.punch(at, n),
        }
    })
}

/// Calls `f` with each extent of a range of a file, in order, and whether it is data.
fn each_extent(
    file: &dyn StoreFile,
    range: Range<u64>,
    mut f: impl FnMut(Range<u64>, bool) -> Result<()>,
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let data = file
            .next_data(at, range.end)?
            .unwrap_or(range.end..range.end);
        let data = data.start.clamp(at, range.end)..data.end.clamp(at, range.end);
        if at < data.start {
            f(at..data.start, false)?;
        }
        if data.start < data.end {
            f(data.clone(), true)?;
        }
        at = data.end.max(data.start);
    }
    Ok(())
}

fn copy_bytes(
    source: &dyn StoreFile,
    mut from: u64,
    target: &dyn StoreFile,
    mut to: u64,
    mut len: u64,
) -> Result<()> {
    let mut buf = vec![0; BUFFER.min(len as usize)];
    while len > 0 {
        let n = len.min(buf.len() as u64);
        let piece = &mut buf[..n as usize];
        read_or_zero(source, piece, from)?;
        target.write_at(piece, to)?;
        from += n;
        to += n;
        len -= n;
    }
    Ok(())
}
