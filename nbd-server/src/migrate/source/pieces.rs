//! What was written, cut into pieces: in which order they are sent, and what of them is zeros.

use std::collections::HashMap;

use ploop::error::{Error, Result};
use ploop::tracker::Id;
use ploop::tracker::bitmap::Bitmap;

use super::PIECE;
use crate::migrate::wire::{RUNS_MAX, Type, Wire};

/// Bytes of which it is remembered how often they were written.
pub(super) const REGION: u64 = 64 << 10;
/// Blocks that are looked at for zeros.
pub(super) const BLOCK: usize = 4096;
/// Zeros that are sent as such; fewer cost less as bytes than as a request.
pub(super) const ZEROS_MIN: usize = 16 << 10;

/// Sends the bits of a tracker that are not in `sent`, and enters them there. Error: `Unsupported` for
/// more than the destination takes; `room` is what is left of that.
pub(super) fn bits(
    wire: &mut Wire,
    id: Id,
    bits: &Bitmap,
    sent: &Bitmap,
    room: &mut usize,
) -> Result<()> {
    let mut runs = Vec::new();
    let set = bits.runs(0..bits.size()).filter(|r| r.1);
    let mut set = set
        .flat_map(|(range, _)| sent.runs(range).filter(|r| !r.1))
        .inspect(|(range, _)| sent.set(range))
        .peekable();
    // One frame at least: it says that the tracker came.
    loop {
        while runs.len() < 512 << 10
            && let Some((range, _)) = set.next()
        {
            runs.extend(range.start.to_le_bytes());
            runs.extend((range.end - range.start).to_le_bytes());
        }
        *room = room.checked_sub(runs.len()).ok_or_else(|| {
            let what = format!(
                "the bits of its trackers are in more than {} pieces",
                RUNS_MAX / 16
            );
            Error::unsupported(what).fix("Clear or stop one: `ploop tracker` shows them")
        })?;
        wire.send(Type::Bits, &[&id.0, &runs])?;
        runs.clear();
        if set.peek().is_none() {
            return Ok(());
        }
    }
}

/// The pieces of what was written, in the order in which they are sent: what was written in the fewest
/// rounds first.
pub(super) fn order(dirty: &Bitmap, heat: &HashMap<u64, u32>) -> Vec<(u64, u64)> {
    let mut pieces: Vec<(u32, u64, u64)> = Vec::new();
    let runs = dirty.runs(0..dirty.size()).filter(|r| r.1);
    for (range, _) in runs {
        let mut at = range.start;
        while at < range.end {
            let end = ((at / REGION + 1) * REGION).min(range.end);
            let warm = heat.get(&(at / REGION)).copied().unwrap_or(0);
            match pieces.last_mut() {
                Some((h, start, sum))
                    if *h == warm && *start + *sum == at && *sum + (end - at) <= PIECE =>
                {
                    *sum += end - at;
                }
                _ => pieces.push((warm, at, end - at)),
            }
            at = end;
        }
    }
    pieces.sort_by_key(|p| p.0);
    pieces
        .into_iter()
        .map(|(_, start, len)| (start, len))
        .collect()
}

pub(super) fn heat(dirty: &Bitmap, before: &HashMap<u64, u32>) -> HashMap<u64, u32> {
    let mut heat = HashMap::new();
    for (range, _) in dirty.runs(0..dirty.size()).filter(|r| r.1) {
        for region in range.start / REGION..range.end.div_ceil(REGION) {
            heat.insert(region, before.get(&region).map_or(1, |w| w + 1));
        }
    }
    heat
}

/// Stretches of bytes, and of zeros that are worth saying so.
pub(super) fn stretches(buf: &[u8]) -> Vec<(usize, bool)> {
    let mut out: Vec<(usize, bool)> = Vec::new();
    for block in buf.chunks(BLOCK) {
        let zeros = block.iter().all(|b| *b == 0);
        match out.last_mut() {
            Some((len, z)) if *z == zeros => *len += block.len(),
            _ => out.push((block.len(), zeros)),
        }
    }
    let mut joined: Vec<(usize, bool)> = Vec::new();
    for (len, zeros) in out {
        let zeros = zeros && len >= ZEROS_MIN.min(buf.len());
        match joined.last_mut() {
            Some((l, z)) if *z == zeros => *l += len,
            _ => joined.push((len, zeros)),
        }
    }
    joined
}
