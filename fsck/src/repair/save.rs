//! What of an image goes into the undo file: every sector that repair changes, and what it cuts off.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ploop::Result;
use ploop::format::ploop::header::HEADER_BYTES;
use ploop::store::{SECTOR, StoreFile, read_or_zero};

use super::changes::Changes;
use super::record::{PIECE, Record, Writer};
use super::view::View;

/// Writes the records of one image that is to become `view`.
pub(super) fn save(
    out: &mut Writer,
    name: &Path,
    file: &Arc<dyn StoreFile>,
    view: &View,
    changes: &Changes,
) -> Result<()> {
    let mut changed: Vec<Range<u64>> = Vec::new();
    compare(file.as_ref(), view, changes, &mut |offset, old, _| {
        let end = offset + old.len() as u64;
        match changed.last_mut() {
            Some(last) if last.end == offset => last.end = end,
            _ => changed.push(offset..end),
        }
        Ok(())
    })?;
    let table_end = changes.table_end.min(changes.len);
    out.put(&Record::File {
        name: name.to_path_buf(),
        lens: [changes.len, changes.grown, changes.end],
        table_end,
        rest: sum(file.as_ref(), 0..table_end, &changed)?,
        tail: sum(view, tail_of(changes.len, changes.end), &[])?,
    })?;
    compare(file.as_ref(), view, changes, &mut |offset, old, new| {
        out.put(&Record::Bytes {
            offset,
            old: old.to_vec(),
            new: new.to_vec(),
        })
    })?;
    let mut buf = vec![0; PIECE];
    let mut at = changes.end;
    while at < changes.len
        && let Some(data) = file.next_data(at, changes.len)?
    {
        let n = (data.end - data.start).min(PIECE as u64);
        let old = &mut buf[..n as usize];
        read_or_zero(file.as_ref(), old, data.start)?;
        if old.iter().any(|&b| b != 0) {
            out.put(&Record::Bytes {
                offset: data.start,
                old: old.to_vec(),
                new: Vec::new(),
            })?;
        }
        at = data.start + n;
    }
    Ok(())
}

/// The sectors of the file that may be written, in runs, ascending. Neither of them is behind the
/// present end, nor behind the end that will be.
fn candidates(changes: &Changes) -> Vec<Range<u64>> {
    let mut all = Vec::new();
    if let Some((_, len)) = &changes.backup {
        all.push(0..*len);
    }
    if changes.header.is_some() {
        all.push(0..HEADER_BYTES);
    }
    all.extend(changes.zeroed.iter().map(|&at| at..at + 4));
    all.extend(changes.moved.iter().map(|&(at, _)| at..at + 4));
    all.extend(changes.copies.iter().map(|c| c.to..c.to + c.len));
    all.sort_unstable_by_key(|r| r.start);
    let end = changes.len.min(changes.end);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in all {
        let start = range.start / SECTOR * SECTOR;
        let stop = range.end.next_multiple_of(SECTOR).min(end);
        match runs.last_mut() {
            _ if start >= stop => {}
            Some(last) if start <= last.end => last.end = last.end.max(stop),
            _ => runs.push(start..stop),
        }
    }
    runs
}

type Each<'a> = &'a mut dyn FnMut(u64, &[u8], &[u8]) -> Result<()>;

/// Calls `each` with runs of sectors that differ between file and view: offset, old, new.
fn compare(file: &dyn StoreFile, view: &View, changes: &Changes, each: Each<'_>) -> Result<()> {
    let (mut old, mut new) = (vec![0; PIECE], vec![0; PIECE]);
    for run in candidates(changes) {
        let mut at = run.start;
        while at < run.end {
            // Where both are holes, both are zeros.
            let next = |f: &dyn StoreFile| Ok(f.next_data(at, run.end)?.map(|d| d.start));
            let data = [next(file)?, next(view)?].into_iter().flatten().min();
            let Some(data) = data else { break };
            at = data / SECTOR * SECTOR;
            let n = (run.end - at).min(PIECE as u64) as usize;
            let (old, new) = (&mut old[..n], &mut new[..n]);
            read_or_zero(file, old, at)?;
            read_or_zero(view, new, at)?;
            let sector = SECTOR as usize;
            let mut from = 0;
            while from < n {
                let mut to = from;
                let differ = |at: usize| {
                    let end = (at + sector).min(n);
                    at < n && old[at..end] != new[at..end]
                };
                while differ(to) {
                    to = (to + sector).min(n);
                }
                if to > from {
                    each(at + from as u64, &old[from..to], &new[from..to])?;
                }
                from = (to + sector).min(n).max(from + 1);
            }
            at += n as u64;
        }
    }
    Ok(())
}

/// The sectors behind the old end of a file.
pub(super) fn tail_of(len: u64, end: u64) -> Range<u64> {
    len.next_multiple_of(SECTOR)..end
}

/// A checksum of the sectors of `range` that are not zeros and in none of `changed`.
pub(super) fn sum(file: &dyn StoreFile, range: Range<u64>, changed: &[Range<u64>]) -> Result<u32> {
    let mut hash = crc32fast::Hasher::new();
    let mut buf = vec![0; PIECE];
    let (mut at, end) = (range.start, range.end);
    while at < end
        && let Some(data) = file.next_data(at, end)?
    {
        at = (data.start / SECTOR * SECTOR).max(range.start);
        let n = (data.end.next_multiple_of(SECTOR).min(end) - at).min(PIECE as u64) as usize;
        let piece = &mut buf[..n];
        read_or_zero(file, piece, at)?;
        for sector in piece.chunks(SECTOR as usize) {
            let after = changed.partition_point(|r| r.end <= at);
            let skip = changed.get(after).is_some_and(|r| r.start <= at);
            if !skip && sector.iter().any(|&b| b != 0) {
                hash.update(&at.to_le_bytes());
                hash.update(sector);
            }
            at += sector.len() as u64;
        }
    }
    Ok(hash.finalize())
}
