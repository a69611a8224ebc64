//! What comes in frames: runs of trackers' bits, and of images whose data comes later. None of it is
//! believed.

use std::collections::{BTreeMap, BTreeSet};

use ploop::descriptor::Guid;
use ploop::error::{Error, Result};
use ploop::tracker::bitmap::Bitmap;
use ploop::tracker::{Id, Tracker};
use snapshots::moving::{Luggage, later};
use snapshots::place::Place;

use crate::migrate::wire::{RUNS_MAX, Type, Wire};

/// Images whose data comes later, as the source tells of them, up to the last.
pub(super) fn lay_out(wire: &mut Wire, place: &Place<'_>) -> Result<()> {
    let mut told: BTreeMap<Guid, Runs> = BTreeMap::new();
    let mut taken = 0;
    loop {
        let kind = wire.read()?;
        match kind {
            Type::Later => {
                let wrong = || wire.wrong("an image that is none");
                let (image, runs) = wire.payload().split_first_chunk::<16>().ok_or_else(wrong)?;
                // What an image costs that has none is counted, too.
                taken += runs.len() + 64;
                if taken > RUNS_MAX + RUNS_MAX / 1024 || !runs.len().is_multiple_of(16) {
                    return Err(wrong());
                }
                let all = told.entry(Guid::from_bytes(*image)).or_default();
                for at in (16..16 + runs.len()).step_by(16) {
                    all.push((wire.number(at)?, wire.number(at + 8)?));
                }
            }
            Type::Sync | Type::Open => {
                for (image, runs) in std::mem::take(&mut told) {
                    later::lay_out(place, image, &runs)?;
                }
                taken = 0;
                if kind == Type::Open {
                    return Ok(());
                }
                wire.send(Type::Synced, &[])?;
                wire.flush()?;
            }
            other => {
                let what = format!("a frame {other:?} among the images");
                return Err(wire.wrong(&what));
            }
        }
    }
}

/// Bits of one tracker, as they came.
pub(super) type Runs = Vec<(u64, u64)>;

pub(super) fn take_bits(
    wire: &Wire,
    size: u64,
    known: &BTreeSet<Id>,
    all: &mut BTreeMap<Id, Runs>,
) -> Result<()> {
    let wrong = || wire.wrong("bits that are none");
    let (id, runs) = wire.payload().split_at_checked(16).ok_or_else(wrong)?;
    let mut bytes = [0; 16];
    bytes.copy_from_slice(id);
    let taken: usize = all.values().map(|r| r.len() * 16).sum();
    if !known.contains(&Id(bytes))
        || taken + runs.len() > RUNS_MAX
        || !runs.len().is_multiple_of(16)
    {
        return Err(wrong());
    }
    let entry = all.entry(Id(bytes)).or_default();
    for at in (16..16 + runs.len()).step_by(16) {
        let (offset, len) = (wire.number(at)?, wire.number(at + 8)?);
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(wrong());
        }
        entry.push((offset, len));
    }
    Ok(())
}

/// The trackers of a disk of `size` bytes with the bits that came; error where one of them has none.
pub(super) fn trackers(
    luggage: &Luggage,
    mut bits: BTreeMap<Id, Runs>,
    size: u64,
) -> Result<Vec<Tracker>> {
    let mut all = Vec::new();
    for (id, known) in &luggage.trackers {
        let id = Id::parse(id)?;
        let none = || Error::corrupt(format!("of the tracker {} no bits came", known.name));
        let runs = bits.remove(&id).ok_or_else(none)?;
        let bitmap = Bitmap::new(size, known.granularity)?;
        for (offset, len) in runs {
            bitmap.set(&(offset..offset + len));
        }
        all.push(Tracker::with(id, bitmap));
    }
    Ok(all)
}
