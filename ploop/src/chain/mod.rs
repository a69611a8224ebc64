//! A sealed chain: read-only deltas, base first, as one map.
//!
//! A lookup costs the same whatever the depth: the deltas are merged page by page, each page when
//! it is first touched, and the merged page is kept and shared by every disk on the chain
//! ([`cache::LayerCache`]). A page of nothing but holes keeps no entries.
//!
//! ```text
//! entry (u64):  kind:2 │ layer:16 │ first sector in the layer's file:46     0 = hole
//! ```
//!
//! Deltas may differ in size. Guest bytes past the end of a delta are zeros for everything under
//! it too: what lies there in a lower delta was cut off when that overlay was made. So each layer
//! has a *clip*: the smallest size from it up to the top of the chain.

pub mod cache;

use std::ops::Range;
use std::sync::Arc;

use crate::device::{Layers, Segment, SegmentPlace};
use crate::error::{Error, Kind, Result};
use crate::format::{Delta, Place, Run};
use crate::paged::Paged;
use crate::store::{SECTOR, StoreFile};

/// Entries in a page of the merged map: 8 KiB.
const PAGE: u64 = 1024;
/// The deepest chain. OpenVZ stops at 127; the bound is the 16 bits of an entry's layer.
pub const DEPTH_MAX: usize = u16::MAX as usize;

const KIND_SHIFT: u32 = 62;
const LAYER_SHIFT: u32 = 46;
const SECTOR_MASK: u64 = (1 << LAYER_SHIFT) - 1;
const HOLE: u64 = 0;
const FILE: u64 = 1;
const THROUGH: u64 = 2;
const FAULT: u64 = 3;
/// Not yet resolved, while a page is being merged; no kind uses layer and sector all ones.
const UNRESOLVED: u64 = u64::MAX;

/// `None`: nothing but holes. Versions of a chain share the pages that are equal in both.
type Page = Option<Arc<[u64]>>;

/// Read-only deltas as one map.
#[derive(Debug)]
pub struct Chain {
    deltas: Vec<Arc<dyn Delta>>,
    clip: Vec<u64>,
    unit: u64,
    size: u64,
    /// From here on there is nothing but holes: what no table in any file reaches.
    mapped: u64,
    pages: Paged<Page>,
}

impl Chain {
    /// A chain of `deltas`, base first, not empty. Its size is the last one's.
    pub fn new(deltas: Vec<Arc<dyn Delta>>) -> Result<Chain> {
        let Some(top) = deltas.last() else {
            return Err(Error::invalid("a chain needs one delta at least"));
        };
        if deltas.len() > DEPTH_MAX {
            let what = format!(
                "a chain of {} deltas; {DEPTH_MAX} is the limit",
                deltas.len()
            );
            return Err(Error::unsupported(what).on(top.file().path()));
        }
        let size = top.size();
        let mut unit = u64::MAX;
        for d in &deltas {
            unit = unit.min(d.cluster_bytes());
        }
        for d in &deltas {
            if !d.cluster_bytes().is_multiple_of(unit) {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "clusters of {} bytes on a chain whose smallest are {unit} bytes",
                        d.cluster_bytes()
                    ),
                )
                .on(d.file().path()));
            }
        }
        // A layer's clip is the smallest size from itself upwards.
        let mut smallest = u64::MAX;
        let mut clip: Vec<u64> = deltas
            .iter()
            .rev()
            .map(|d| {
                smallest = smallest.min(d.size());
                smallest
            })
            .collect();
        clip.reverse();
        for d in &deltas {
            if d.file().len()? / SECTOR > SECTOR_MASK {
                let what = "the file is longer than 32 PiB, more than a map entry can say";
                return Err(Error::unsupported(what).on(d.file().path()));
            }
        }
        // The map is sized by what the tables reach, not by the size that a header claims.
        let reach = deltas
            .iter()
            .zip(&clip)
            .map(|(d, clip)| d.mapped_end().min(*clip));
        let mapped = reach.max().unwrap_or(0);
        let pages = Paged::new(mapped.div_ceil(unit).div_ceil(PAGE));
        Ok(Chain {
            deltas,
            clip,
            unit,
            size,
            mapped,
            pages,
        })
    }

    /// `delta` over `below`. What `below` has merged already is taken over, so that a snapshot does
    /// not make the next reads slow.
    pub fn over(below: &Chain, delta: Arc<dyn Delta>) -> Result<Chain> {
        let mut deltas = below.deltas.clone();
        deltas.push(delta.clone());
        let layer = below.deltas.len() as u64;
        let chain = Chain::new(deltas)?;
        if chain.unit != below.unit || delta.size() < below.clip.last().copied().unwrap_or(0) {
            return Ok(chain);
        }
        let mut runs = Vec::new();
        below.pages.each(|number, page| {
            let first = number * PAGE;
            let start = first * chain.unit;
            let end = ((first + PAGE).saturating_mul(chain.unit)).min(chain.clip[layer as usize]);
            runs.clear();
            if start < end {
                delta.map(start..end, &mut runs)?;
            }
            let mut own = runs.iter().filter(|r| r.place != Place::Parent).peekable();
            let merged = match own.peek() {
                None => page.clone(),
                Some(_) => {
                    let mut entries = page
                        .as_ref()
                        .map_or_else(|| vec![HOLE; PAGE as usize], |p| p.to_vec());
                    for run in own {
                        let units =
                            run.offset / chain.unit..(run.offset + run.len).div_ceil(chain.unit);
                        entries[(units.start - first) as usize..(units.end - first) as usize]
                            .fill(UNRESOLVED);
                        chain.resolve(&mut entries, first, layer, run);
                    }
                    keep(entries)
                }
            };
            chain.pages.get_or_make(number, || Ok(merged)).map(drop)
        })?;
        Ok(chain)
    }

    /// The same chain over `deltas`: the same files, opened otherwise.
    pub fn with_deltas(&self, deltas: Vec<Arc<dyn Delta>>) -> Result<Chain> {
        self.kept(Chain::new(deltas)?, &[])
    }

    /// The same chain, with the map of `changed` (guest bytes) to be merged anew.
    pub fn refreshed(&self, changed: &[Range<u64>]) -> Result<Chain> {
        self.kept(Chain::new(self.deltas.clone())?, changed)
    }

    fn kept(&self, chain: Chain, changed: &[Range<u64>]) -> Result<Chain> {
        let bytes = PAGE * self.unit;
        self.pages.each(|number, page| {
            let start = number * bytes;
            if changed
                .iter()
                .any(|c| c.start < start.saturating_add(bytes) && start < c.end)
            {
                return Ok(());
            }
            chain
                .pages
                .get_or_make(number, || Ok(page.clone()))
                .map(drop)
        })?;
        Ok(chain)
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Guest bytes from here on are a hole.
    pub fn mapped_end(&self) -> u64 {
        self.mapped
    }

    /// Granularity of the map in bytes.
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// The deltas, base first.
    pub fn deltas(&self) -> &[Arc<dyn Delta>] {
        &self.deltas
    }

    /// The smallest size from `layer` up to the top of the chain: what is behind it, in that layer, is
    /// not shown. None above the top.
    pub(crate) fn clip(&self, layer: u32) -> Option<u64> {
        self.clip.get(layer as usize).copied()
    }

    /// Appends the segments that cover `range`; what lies past the chain's size is a hole.
    pub fn map(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let end = range.end.min(self.mapped);
        let mut at = range.start;
        while at < end {
            let index = at / self.unit;
            let number = index / PAGE;
            let page = self.pages.get_or_make(number, || self.merge(number))?;
            let page_end = ((number + 1) * PAGE).saturating_mul(self.unit).min(end);
            let Some(entries) = page else {
                push_segment(segments, at, page_end - at, SegmentPlace::Hole);
                at = page_end;
                continue;
            };
            while at < page_end {
                let index = at / self.unit;
                let stop = (index + 1).saturating_mul(self.unit).min(page_end);
                self.push(segments, entries[(index % PAGE) as usize], index, at..stop);
                at = stop;
            }
        }
        if at < range.end {
            push_segment(segments, at, range.end - at, SegmentPlace::Hole);
        }
        Ok(())
    }

    /// Appends one unit's piece, cut at the clip of the layer that it is in.
    fn push(&self, segments: &mut Vec<Segment>, entry: u64, index: u64, range: Range<u64>) {
        let layer = (entry >> LAYER_SHIFT & 0xFFFF) as u32;
        let skip = range.start - index * self.unit;
        let place = match entry >> KIND_SHIFT {
            FILE => {
                let offset = (entry & SECTOR_MASK) * SECTOR + skip;
                SegmentPlace::File { layer, offset }
            }
            THROUGH => SegmentPlace::Through { layer },
            FAULT => SegmentPlace::Fault { layer },
            _ => SegmentPlace::Hole,
        };
        let clip = match place {
            SegmentPlace::Hole => range.end,
            _ => self.clip[layer as usize].clamp(range.start, range.end),
        };
        push_segment(segments, range.start, clip - range.start, place);
        push_segment(segments, clip, range.end - clip, SegmentPlace::Hole);
    }

    /// Merges one page: from the top down, each unit is resolved by the first delta that has it.
    fn merge(&self, number: u64) -> Result<Page> {
        let first = number * PAGE;
        let start = first * self.unit;
        let end = ((first + PAGE).saturating_mul(self.unit)).min(self.size);
        let mut entries = vec![UNRESOLVED; PAGE as usize];
        let mut runs: Vec<Run> = Vec::new();
        for (layer, delta) in self.deltas.iter().enumerate().rev() {
            let Some(hull) = unresolved(&entries, start, self.unit) else {
                break;
            };
            let stop = hull.end.min(end).min(self.clip[layer]);
            if hull.start >= stop {
                continue;
            }
            runs.clear();
            delta.map(hull.start..stop, &mut runs)?;
            for run in &runs {
                self.resolve(&mut entries, first, layer as u64, run);
            }
        }
        for e in &mut entries {
            if *e == UNRESOLVED {
                *e = HOLE;
            }
        }
        Ok(keep(entries))
    }

    fn resolve(&self, entries: &mut [u64], first: u64, layer: u64, run: &Run) {
        if run.place == Place::Parent {
            return;
        }
        let mut at = run.offset;
        while at < run.offset + run.len {
            let index = at / self.unit;
            let entry = &mut entries[(index - first) as usize];
            if *entry == UNRESOLVED {
                let tag = layer << LAYER_SHIFT;
                *entry = match run.place {
                    Place::File(offset) => {
                        let sector = (offset + (at - run.offset)) / SECTOR;
                        FILE << KIND_SHIFT | tag | sector & SECTOR_MASK
                    }
                    Place::Through => THROUGH << KIND_SHIFT | tag,
                    Place::Fault => FAULT << KIND_SHIFT | tag,
                    Place::Zero | Place::Parent => HOLE,
                };
            }
            at = (index + 1) * self.unit;
        }
    }
}

/// A page as it is kept.
fn keep(entries: Vec<u64>) -> Page {
    entries
        .iter()
        .any(|&e| e != HOLE)
        .then(|| Arc::from(entries))
}

/// From the first to the last unresolved entry of a page, in guest bytes.
fn unresolved(entries: &[u64], start: u64, unit: u64) -> Option<Range<u64>> {
    let first = entries.iter().position(|&e| e == UNRESOLVED)?;
    let last = entries.iter().rposition(|&e| e == UNRESOLVED)?;
    Some(start + first as u64 * unit..(start + (last as u64 + 1) * unit))
}

impl Layers for Chain {
    fn file(&self, layer: u32) -> &Arc<dyn StoreFile> {
        self.deltas[layer as usize].file()
    }

    fn read_through(&self, layer: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.deltas[layer as usize].read(offset, buf)
    }

    fn fault(&self, layer: u32, offset: u64) -> Error {
        self.deltas[layer as usize].fault(offset)
    }
}

/// Appends a segment, joined to the one before where they continue each other. Length 0 is nothing.
pub fn push_segment(segments: &mut Vec<Segment>, offset: u64, len: u64, place: SegmentPlace) {
    if len == 0 {
        return;
    }
    if let Some(last) = segments.last_mut() {
        let joins = match (last.place, place) {
            (SegmentPlace::Hole, SegmentPlace::Hole) => true,
            (
                SegmentPlace::File {
                    layer: a,
                    offset: x,
                },
                SegmentPlace::File {
                    layer: b,
                    offset: y,
                },
            ) => a == b && x + last.len == y,
            (SegmentPlace::Through { layer: a }, SegmentPlace::Through { layer: b }) => a == b,
            _ => false,
        };
        if joins && last.offset + last.len == offset {
            last.len += len;
            return;
        }
    }
    segments.push(Segment { offset, len, place });
}
