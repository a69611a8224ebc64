//! Where two disks on one tree may read differently, by their maps alone.
//!
//! ```text
//!   base ── x ─┬─ a1 ── a        common: base, x         what a1, a, b1 or b have may differ;
//!              └─ b1 ── b        own: a1, a and b1, b    what none of them has is common
//! ```
//!
//! Layers are the same where they are the same file. What both have written may be equal by chance:
//! nobody looks. Behind the end of a smaller layer what lies below it reads as zeros, so from there
//! on the common layers count, too, as far as only one of the disks shows them.

use std::ops::Range;

use super::{Disk, Stack, map_over};
use crate::chain::push_segment;
use crate::device::{Device as _, Layers as _, Segment, SegmentPlace};
use crate::error::Result;
use crate::format::{Place, Run};

/// Guest bytes looked at in one call.
const WINDOW: u64 = 1 << 30;

/// What one disk shows, as far as it matters here.
struct Side<'a> {
    stack: &'a Stack,
    /// Guest bytes of the common layers that it shows.
    common_end: u64,
    /// Guest bytes that it has.
    end: u64,
}

impl Side<'_> {
    fn new<'a>(stack: &'a Stack, common: u32, size: u64) -> Side<'a> {
        let chain = stack.below.as_ref();
        // Tops do not shrink what is below them.
        let clip = chain.and_then(|c| c.clip(common)).unwrap_or(u64::MAX);
        Side {
            stack,
            common_end: clip.min(size),
            end: size,
        }
    }

    /// Adds what its layers from `first` up to `end` have of `range`.
    fn add(&self, layers: Range<u32>, range: &Range<u64>, found: &mut Found) -> Result<()> {
        let range = range.start..range.end.min(self.end);
        if range.is_empty() {
            return Ok(());
        }
        let depth = self.stack.depth();
        self.add_chain(layers.start..layers.end.min(depth), &range, found)?;
        let sealing = self.stack.sealing.as_ref().map(|s| (depth, &s.top));
        let top = self.stack.top.as_ref();
        let top = top.map(|top| (self.stack.top_layer(), top));
        for (layer, top) in sealing.into_iter().chain(top) {
            if !layers.contains(&layer) {
                continue;
            }
            let mut segments: Vec<Segment> = Vec::new();
            map_over(top, layer, range.clone(), &mut segments, &|range, out| {
                let len = range.end - range.start;
                push_segment(out, range.start, len, SegmentPlace::Hole);
                Ok(())
            })?;
            let there = segments.iter().filter(|s| s.place != SegmentPlace::Hole);
            found.add(there.map(|s| s.offset..s.offset + s.len));
        }
        Ok(())
    }

    fn add_chain(&self, layers: Range<u32>, range: &Range<u64>, found: &mut Found) -> Result<()> {
        let Some(chain) = &self.stack.below else {
            return Ok(());
        };
        let mut runs: Vec<Run> = Vec::new();
        for layer in layers {
            let Some(delta) = chain.deltas().get(layer as usize) else {
                break;
            };
            let end = chain.clip(layer).unwrap_or(0).min(delta.mapped_end());
            let range = range.start..range.end.min(end);
            if range.is_empty() {
                continue;
            }
            runs.clear();
            delta.map(range, &mut runs)?;
            let there = runs.iter().filter(|r| r.place != Place::Parent);
            found.add(there.map(|r| r.offset..r.offset + r.len));
        }
        Ok(())
    }
}

/// Ranges, sorted and apart.
#[derive(Default)]
struct Found(Vec<Range<u64>>);

impl Found {
    fn add(&mut self, more: impl Iterator<Item = Range<u64>>) {
        let before = self.0.len();
        self.0.extend(more);
        if self.0.len() == before {
            return;
        }
        self.0.sort_by_key(|r| r.start);
        self.0.dedup_by(|next, last| {
            let joins = next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
    }
}

/// How many of the lowest layers of both are the same files.
fn common_layers(a: &Stack, b: &Stack) -> u32 {
    let layers = a.layers().min(b.layers());
    let same = |layer: &u32| a.file(*layer).id() == b.file(*layer).id();
    (0..layers).take_while(same).count() as u32
}

impl Disk {
    /// How many of the lowest layers of this disk and `other` are the same files: 0 when what they
    /// show has nothing to do with each other.
    pub fn common_layers(&self, other: &Disk) -> u32 {
        common_layers(&self.stack(), &other.stack())
    }

    /// Where, in `range`, this disk and `other` may read differently: clears `out` and fills it with
    /// ranges in order, apart from each other. Gives the byte up to which it looked, which may be
    /// before the end of `range`; go on from there. Never leaves out what differs; what is in vain
    /// is a cluster (of one that is there in part, a granule) that was written as it was, and what
    /// a damaged entry names. The end of the smaller disk counts as zeros from there on.
    ///
    /// Reads tables, no data; blocks for that. Memory follows the clusters of 1 GiB. Of disks that
    /// are being written the answer is as of some instant during the call.
    pub fn differing(
        &self,
        other: &Disk,
        range: Range<u64>,
        out: &mut Vec<Range<u64>>,
    ) -> Result<u64> {
        out.clear();
        let (a, b) = (self.stack(), other.stack());
        let common = common_layers(&a, &b);
        let sides = [
            Side::new(&a, common, self.size()),
            Side::new(&b, common, other.size()),
        ];
        let mapped = a.mapped_end().max(b.mapped_end());
        if range.start >= mapped {
            return Ok(range.end);
        }
        let end = range.start.saturating_add(WINDOW).min(range.end);
        let window = range.start..end.min(mapped);
        let mut found = Found::default();
        for side in &sides {
            side.add(common..side.stack.layers(), &window, &mut found)?;
        }
        let [x, y] = &sides;
        let (less, more) = match x.common_end <= y.common_end {
            true => (x, y),
            false => (y, x),
        };
        let alone = window.start.max(less.common_end)..window.end.min(more.common_end);
        if !alone.is_empty() {
            more.add(0..common, &alone, &mut found)?;
        }
        *out = found.0;
        Ok(end)
    }
}
