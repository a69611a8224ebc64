//! Ranges of guest bytes, and of a file.

use std::ops::Range;

use ploop::Result;
use ploop::store::{StoreFile, read_or_zero};

/// Bytes read at a time.
const CHUNK: u64 = 256 * 1024;

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
