//! Slots of a BAT, holes of the file left out, and ranges.

use std::ops::Range;

use ploop::Result;
use ploop::format::ploop::header::HEADER_BYTES;
use ploop::store::{StoreFile, read_or_zero};

/// Bytes read at a time.
const CHUNK: u64 = 256 * 1024;

/// Calls `each` with slot and value of every slot in `bytes` of `file` that is not 0.
pub(super) fn slots(
    file: &dyn StoreFile,
    bytes: Range<u64>,
    each: &mut dyn FnMut(u64, u32),
) -> Result<()> {
    let mut at = bytes.start;
    let mut buf = vec![0; CHUNK as usize];
    while let Some(data) = file.next_data(at, bytes.end)? {
        let mut from = data.start.max(HEADER_BYTES) & !3;
        // A file may end within a slot.
        let stop = data.end.next_multiple_of(4);
        while from < stop {
            let n = (stop - from).min(CHUNK) as usize;
            read_or_zero(file, &mut buf[..n], from)?;
            for (i, raw) in buf[..n].chunks_exact(4).enumerate() {
                let value = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                if value != 0 {
                    each((from - HEADER_BYTES) / 4 + i as u64, value);
                }
            }
            from += n as u64;
        }
        at = data.end.max(at + 4);
    }
    Ok(())
}

/// Adds a range behind the others, joined where they touch.
pub(super) fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// True when `bytes` of the file hold anything but zeros.
pub(super) fn holds_anything(file: &dyn StoreFile, bytes: Range<u64>) -> Result<bool> {
    let mut any = false;
    let mut at = bytes.start;
    let mut buf = vec![0; CHUNK as usize];
    while !any && let Some(data) = file.next_data(at, bytes.end)? {
        let n = (data.end - data.start).min(CHUNK) as usize;
        read_or_zero(file, &mut buf[..n], data.start)?;
        any = buf[..n].iter().any(|&b| b != 0);
        at = data.start + n as u64;
    }
    Ok(any)
}
