//! Metadata contexts: what a client can ask about ranges.
//!
//! | context | flags of an extent |
//! |---|---|
//! | `base:allocation` | bit 0: takes no space; bit 1: reads as zeros |
//! | `qemu:allocation-depth` | 0: no layer has it; 1: the uppermost; n: the one n - 1 below that |
//! | `qemu:dirty-bitmap:NAME` | bit 0: written since the tracker was begun or cleared |
//!
//! A context belongs to a namespace, and the namespace defines its queries. A query of a namespace
//! that is not here selects nothing, as the protocol demands. A new context is a new variant.
//!
//! A client that selected a tracker holds it by its id, not by its name: one that has ended since is
//! an error for every status of that client, for there is nothing left that could say that a range
//! is clean; and another one that took its name is another one.

use std::collections::HashSet;
use std::ops::Range;

use ploop::device::{Depth, Device, Extent};
use ploop::error::{Error, Kind, Result};
use ploop::tracker::Id;

use crate::export::{Exports, OpenExport};
use crate::wire::chunk::{self, state};

/// What the contexts of trackers are called, before the name.
const BITMAP: &str = "qemu:dirty-bitmap:";

/// What a client's holder lists to learn the life of a disk ([`crate::export::Lives`]): answered with
/// one name, this and `:` and the life. It is nothing about ranges, so it is listed only when it is
/// asked for by name, in any style, and never selected.
pub const LIFE: &str = "ploop:life";

/// A metadata context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: takes space, reads as zeros.
    Allocation,
    /// `qemu:allocation-depth`: which layer has it.
    Depth,
    /// `qemu:dirty-bitmap:NAME`: what was written.
    Bitmap {
        /// Which tracker.
        id: Id,
        /// The full name of the context.
        name: String,
    },
}

/// Memory for extents that is used again.
#[derive(Debug, Default)]
pub struct Extents {
    allocation: Vec<Extent>,
    depths: Vec<Depth>,
    /// What was found.
    pub found: Vec<chunk::Extent>,
}

impl Context {
    /// Those that every export has.
    pub const ALWAYS: [Context; 2] = [Context::Allocation, Context::Depth];

    /// All that `export` has now, those of its trackers by name. Blocks for its metadata.
    pub fn all_of(export: &OpenExport, exports: &dyn Exports) -> Result<Vec<Context>> {
        let mut all = Context::ALWAYS.to_vec();
        let mut trackers = export.device.bitmaps();
        trackers.retain(|t| !t.passing);
        if trackers.is_empty() {
            return Ok(all);
        }
        let names = exports.tracker_names(export)?;
        let mut taken = HashSet::new();
        let mut bitmaps: Vec<(String, Id)> = Vec::new();
        for tracker in trackers {
            let id = tracker.id.to_string();
            let sound = |name: &&String| crate::wire::string(name.as_bytes()).is_ok();
            let name = names.get(&id).filter(sound).unwrap_or(&id);
            // Of two with one name (metadata made by hand) it would be unknown which is meant.
            if taken.insert(name.clone()) {
                bitmaps.push((format!("{BITMAP}{name}"), tracker.id));
            }
        }
        bitmaps.sort();
        let bitmaps = bitmaps.into_iter();
        all.extend(bitmaps.map(|(name, id)| Context::Bitmap { id, name }));
        Ok(all)
    }

    /// The full name.
    pub fn name(&self) -> &str {
        match self {
            Context::Allocation => "base:allocation",
            Context::Depth => "qemu:allocation-depth",
            Context::Bitmap { name, .. } => name,
        }
    }

    /// The queries that list this context among others.
    fn groups(&self) -> &'static [&'static str] {
        match self {
            Context::Allocation => &["base:"],
            Context::Depth => &["qemu:"],
            Context::Bitmap { .. } => &["qemu:", BITMAP],
        }
    }

    /// True when `query` selects this context.
    pub fn selected_by(&self, query: &str) -> bool {
        query == self.name()
    }

    /// True when `query` lists this context.
    pub fn listed_by(&self, query: &str) -> bool {
        query == self.name() || self.groups().contains(&query)
    }

    /// Fills `extents.found` with what there is to say of `range` of `device`, from its start on, in
    /// `limit` extents at most and at least one. Errors: those of the device; `Invalid` for a tracker
    /// that has ended.
    pub fn describe(
        &self,
        device: &dyn Device,
        range: Range<u64>,
        limit: usize,
        extents: &mut Extents,
    ) -> Result<()> {
        let out = &mut extents.found;
        out.clear();
        match self {
            Context::Allocation => {
                device.allocation(range, limit, &mut extents.allocation)?;
                let all = extents.allocation.iter().take(limit);
                out.extend(all.map(|e| chunk::Extent {
                    len: e.len,
                    flags: allocation_flags(e),
                }));
            }
            Context::Depth => {
                device.depths(range, limit, &mut extents.depths)?;
                let all = extents.depths.iter().take(limit);
                out.extend(all.map(|d| chunk::Extent {
                    len: d.len,
                    flags: d.depth,
                }));
            }
            Context::Bitmap { id, name } => {
                let mut trackers = device.bitmaps().into_iter();
                let tracker = trackers.find(|t| t.id == *id).ok_or_else(|| {
                    Error::invalid(format!("the tracker of {name} has ended"))
                        .fix("Connect again: nothing says any more what was not written")
                })?;
                let end = range.end;
                let runs = tracker.bits.runs(range.clone());
                // Its disk may have grown since it was looked up: what it does not know is dirty.
                let known = tracker.bits.size().clamp(range.start, end);
                let beyond = Some((known..end, true)).filter(|(r, _)| !r.is_empty());
                for (bytes, dirty) in runs.chain(beyond) {
                    let flags = if dirty { state::DIRTY } else { 0 };
                    let len = bytes.end - bytes.start;
                    let full = out.len() == limit;
                    match out.last_mut() {
                        Some(last) if last.flags == flags => last.len += len,
                        _ if full => break,
                        _ => out.push(chunk::Extent { len, flags }),
                    }
                }
            }
        }
        match out.is_empty() {
            true => Err(Error::new(Kind::Io, "the device gave no extent")),
            false => Ok(()),
        }
    }
}

fn allocation_flags(extent: &Extent) -> u32 {
    let hole = if extent.hole { state::HOLE } else { 0 };
    let zero = if extent.zero { state::ZERO } else { 0 };
    hole | zero
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(name: &str) -> Context {
        Context::Bitmap {
            id: Id([7; 16]),
            name: format!("{BITMAP}{name}"),
        }
    }

    #[test]
    fn groups_list_but_never_select() {
        let all = [
            Context::Allocation,
            Context::Depth,
            bitmap("a"),
            bitmap("b"),
        ];
        for (query, selected, listed) in [
            ("base:allocation", &[0][..], &[0][..]),
            ("base:", &[], &[0]),
            ("qemu:allocation-depth", &[1], &[1]),
            ("qemu:", &[], &[1, 2, 3]),
            ("qemu:dirty-bitmap:", &[], &[2, 3]),
            ("qemu:dirty-bitmap:a", &[2], &[2]),
            ("", &[], &[]),
            ("base", &[], &[]),
            ("qemu", &[], &[]),
            ("base:allocation2", &[], &[]),
            ("qemu:allocation-depth:", &[], &[]),
            ("qemu:dirty-bitmap", &[], &[]),
            ("qemu:dirty-bitmap:ab", &[], &[]),
            ("x-a:allocation", &[], &[]),
        ] {
            let which = |f: &dyn Fn(&Context) -> bool| {
                (0..all.len()).filter(|i| f(&all[*i])).collect::<Vec<_>>()
            };
            assert_eq!(which(&|c| c.selected_by(query)), selected, "{query}");
            assert_eq!(which(&|c| c.listed_by(query)), listed, "{query}");
        }
    }
}
