//! Bringing back what was done to a raw copy of a disk: only the clusters that differ.

use ploop::device::{Device, Extent, ZeroMode};
use ploop::error::Result;
use ploop::store::{StoreFile, read_or_zero};

/// Writes to `after`, which reads as `before` does, every cluster in which `flat` differs from
/// `before`, up to `end`; what is behind the end of either reads as zeros. Zeros take no room. Holes
/// that both have are not looked at.
pub(crate) fn copy_changes(
    flat: &dyn StoreFile,
    before: &dyn Device,
    after: &dyn Device,
    end: u64,
) -> Result<()> {
    let cluster = after.cluster_bytes();
    let (mut new, mut old) = (vec![0; cluster as usize], vec![0; cluster as usize]);
    let mut at = 0;
    while let Some(data) = next_data(flat, before, at, end)? {
        at = (data / cluster * cluster).max(at);
        let n = (end - at).min(cluster) as usize;
        read_or_zero(flat, &mut new[..n], at)?;
        old.fill(0);
        let m = before.size().saturating_sub(at).min(n as u64) as usize;
        if m > 0 {
            before.read(at, &mut old[..m])?;
        }
        if new[..n] != old[..n] {
            match new[..n].iter().all(|&b| b == 0) {
                true => after.zero(at..at + n as u64, ZeroMode::default())?,
                false => after.write(at, &new[..n])?,
            }
        }
        at += n as u64;
    }
    Ok(())
}

/// The first byte from `at` on, before `end`, that one of the two may have data at.
fn next_data(flat: &dyn StoreFile, before: &dyn Device, at: u64, end: u64) -> Result<Option<u64>> {
    let len = flat.len()?.min(end);
    let in_flat = match at < len {
        true => flat.next_data(at, len)?.map(|data| data.start.max(at)),
        false => None,
    };
    // What the other has nearer than that.
    let until = in_flat.unwrap_or(end).min(before.size());
    Ok(first_extent(before, at, until)?.or(in_flat))
}

/// The first byte of `device` from `at` on, before `end`, that is not in a hole.
pub(super) fn first_extent(device: &dyn Device, mut at: u64, end: u64) -> Result<Option<u64>> {
    let mut extents: Vec<Extent> = Vec::new();
    while at < end {
        device.allocation(at..end, 1, &mut extents)?;
        match extents.first() {
            Some(hole) if hole.hole => at += hole.len,
            _ => return Ok(Some(at)),
        }
    }
    Ok(None)
}
