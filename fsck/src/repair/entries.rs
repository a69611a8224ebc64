//! Every BAT entry, judged for repair: kept, emptied, or given a cluster of its own.

use std::ops::Range;

use ploop::Result;
use ploop::format::ploop::Header;
use ploop::format::ploop::delta::{EntryFault, judge};
use ploop::format::ploop::header::HEADER_BYTES;
use ploop::store::StoreFile;

use super::changes::Notes;
use super::fields::Fields;
use super::ranges::push;
use ploop::verify::slots;

/// An entry and where its cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Owner {
    pub(super) offset: u64,
    pub(super) slot: u32,
}

/// What becomes of a BAT.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Entries that keep their cluster, ascending by it.
    pub(super) owners: Vec<Owner>,
    /// Entries that get a new one, ascending by slot.
    pub(super) homeless: Vec<Owner>,
    /// Bytes of slots that become 0, ascending.
    pub(super) zeroed: Vec<u64>,
    /// Entries of the homeless, by their byte; filled in when they have homes.
    pub(super) moved: Vec<(u64, u32)>,
    /// Guest ranges that the end of the file cut off.
    pub(super) cut: Vec<Range<u64>>,
    /// How long the file must be for clusters that its end cuts.
    pub(super) reach: u64,
    /// The byte behind the last cluster that an entry keeps.
    pub(super) used_end: u64,
    lost: Vec<Range<u64>>,
    shared: Vec<Range<u64>>,
    strays: Vec<Range<u64>>,
    past: u64,
    past_used: u64,
}

/// Judges every slot of the image; `header` is right, `found` is the one on disk, `len` the length
/// of the file as it is.
pub(super) fn judge_all(
    file: &dyn StoreFile,
    header: &Header,
    found: &Fields,
    len: u64,
) -> Result<Table> {
    let mut table = Table::default();
    let cluster = header.cluster_bytes();
    let guest = |slot: u64| slot * cluster..((slot + 1) * cluster).min(header.size());
    let entries = u64::from(header.entries).min(header.clusters());
    slots(file, HEADER_BYTES..header.data_start, &mut |slot, value| {
        let at = Header::slot_offset(slot);
        if slot >= entries {
            table.past += 1;
            let was_entry = slot < u64::from(found.entries());
            table.past_used += u64::from(was_entry && judge(header, len, slot, value).is_ok());
            table.zeroed.push(at);
            return;
        }
        let owner = Owner {
            offset: header.entry_offset(value),
            // Slots are counted in 32 bits.
            slot: slot as u32,
        };
        let range = guest(slot);
        match judge(header, len, slot, value) {
            Ok(_) => table.owners.push(owner),
            Err(EntryFault::Truncated) => {
                table.reach = table.reach.max(owner.offset + cluster);
                push(
                    &mut table.cut,
                    range.start + (len - owner.offset)..range.end,
                );
                table.owners.push(owner);
            }
            // Off the grid, and all of it there.
            Err(EntryFault::Misaligned) if owner.offset + (range.end - range.start) <= len => {
                push(&mut table.strays, range);
                table.homeless.push(owner);
            }
            Err(_) => {
                push(&mut table.lost, range);
                table.zeroed.push(at);
            }
        }
    })?;
    table.part_the_shared(&guest);
    table.used_end = table.owners.last().map_or(0, |o| o.offset + cluster);
    Ok(table)
}

impl Table {
    /// Of owners of one cluster the first keeps it, the others become homeless.
    fn part_the_shared(&mut self, guest: &dyn Fn(u64) -> Range<u64>) {
        self.owners.sort_unstable();
        let mut shared: Vec<u32> = Vec::new();
        let mut first: Option<Owner> = None;
        let homeless = &mut self.homeless;
        self.owners.retain(|owner| match first {
            Some(f) if f.offset == owner.offset => {
                shared.extend([f.slot, owner.slot]);
                homeless.push(*owner);
                false
            }
            _ => {
                first = Some(*owner);
                true
            }
        });
        shared.sort_unstable();
        shared.dedup();
        for slot in shared {
            push(&mut self.shared, guest(u64::from(slot)));
        }
        self.homeless.sort_unstable_by_key(|o| o.slot);
    }

    /// The steps that all this is.
    pub(super) fn note(&self, header: &Header, notes: &mut Notes) {
        let cluster = header.cluster_bytes();
        let count = |ranges: &[Range<u64>]| -> u64 {
            ranges
                .iter()
                .map(|r| (r.end - r.start).div_ceil(cluster))
                .sum()
        };
        if self.past > 0 {
            let what = format!(
                "{} BAT slots behind the last entry are set: empty them",
                self.past
            );
            match self.past_used {
                0 => notes.sure(what),
                n => {
                    let gives_up = format!("{n} clusters that lie behind the end of the disk");
                    notes.giving_up(what, &gives_up, false);
                }
            }
        }
        if !self.lost.is_empty() {
            let n = count(&self.lost);
            let what = format!(
                "{n} BAT entries point to no cluster of the file: empty them. What is below the \
                 image shows there, or zeros"
            );
            notes.losing(what, self.lost.clone());
        }
        let copied = self.homeless.len() as u64 * cluster;
        if !self.shared.is_empty() {
            let n = count(&self.shared);
            let what = format!(
                "{n} BAT entries share clusters: give all but the first of each a copy ({copied} bytes \
                 in all). One of them is right at most"
            );
            notes.doubtful(what, self.shared.clone());
        }
        if !self.strays.is_empty() {
            let n = count(&self.strays);
            let what = format!(
                "{n} BAT entries are off the grid of clusters: copy what they name to clusters of \
                 their own"
            );
            notes.doubtful(what, self.strays.clone());
        }
    }
}
