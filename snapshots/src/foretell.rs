//! What a merge will free, before anybody begins it.
//!
//! One file goes and the other stays. What stays has its data of before, and what moves into it:
//! data extents as they are, without looking at bytes, and the blocks of its table in which the
//! first entries appear. Tables are read a window at a time, and their holes are skipped, so memory
//! and time follow the data, not the sizes that a header claims.
//!
//! The number is exact in data bytes as [`ploop::disk::info::data_bytes`] counts them, on file
//! systems with blocks of 4 KiB, for images whose clusters begin on a block and that have no
//! cluster without an entry (`ploop check` reports those).

use std::ops::Range;
use std::sync::Arc;

use ploop::disk::info::data_bytes;
use ploop::error::Result;
use ploop::format::ploop::{Header, PloopDelta};
use ploop::format::raw::RawDelta;
use ploop::format::{Delta, Place, Run};
use ploop::store::StoreFile;

use crate::merge::Direction;

/// Guest bytes looked at in one step.
const WINDOW: u64 = 1 << 30;
/// Bytes of a block of the host.
const BLOCK: u64 = 4096;

/// An image, open to look at. Takes no lock.
#[derive(Debug)]
pub struct Part {
    delta: Arc<dyn Delta>,
    /// Entries of its table; none for a raw image, which has all clusters.
    entries: Option<u64>,
}

impl Part {
    /// A ploop image.
    pub fn ploop(file: Arc<dyn StoreFile>) -> Result<Part> {
        let delta = PloopDelta::open(file)?;
        let entries = Some(u64::from(delta.header().entries));
        Ok(Part {
            delta: Arc::new(delta),
            entries,
        })
    }

    /// A raw base under images with clusters of `cluster` bytes.
    pub fn raw(file: Arc<dyn StoreFile>, cluster: u64) -> Result<Part> {
        Ok(Part {
            delta: Arc::new(RawDelta::with_cluster(file, cluster)?),
            entries: None,
        })
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.delta.size()
    }

    fn file(&self) -> &dyn StoreFile {
        self.delta.file().as_ref()
    }

    /// The first guest byte at or after `at` that it may have; `None` when there is none.
    fn next(&self, at: u64) -> Result<Option<u64>> {
        let end = self.delta.mapped_end();
        let Some(entries) = self.entries.filter(|_| at < end) else {
            return Ok(Some(at).filter(|at| *at < end));
        };
        let cluster = self.delta.cluster_bytes();
        let table = Header::slot_offset(at / cluster)..Header::slot_offset(entries);
        let data = self.file().next_data(table.start, table.end)?;
        Ok(data.and_then(|data| {
            let skipped = data.start.saturating_sub(table.start) / 4;
            let next = at.max((at / cluster + skipped).saturating_mul(cluster));
            Some(next).filter(|next| *next < end)
        }))
    }

    /// The runs of `range` that it has, in order.
    fn runs(&self, range: Range<u64>) -> Result<Vec<Run>> {
        let end = range.end.min(self.delta.mapped_end());
        let mut runs = Vec::new();
        if range.start < end {
            self.delta.map(range.start..end, &mut runs)?;
        }
        runs.retain(|r| r.place != Place::Parent);
        match runs.iter().find(|r| !matches!(r.place, Place::File(_))) {
            Some(bad) => Err(self.delta.fault(bad.offset)),
            None => Ok(runs),
        }
    }

    /// Data bytes of the part of `run` in `range`.
    fn data_of(&self, run: &Run, range: &Range<u64>) -> Result<u64> {
        let (start, end) = common(run, range);
        match run.place {
            Place::File(at) if start < end => {
                let from = at + (start - run.offset);
                data_in(self.file(), from..from + (end - start))
            }
            _ => Ok(0),
        }
    }
}

fn common(run: &Run, range: &Range<u64>) -> (u64, u64) {
    (
        run.offset.max(range.start),
        (run.offset + run.len).min(range.end),
    )
}

/// Data bytes of a range of a file.
fn data_in(file: &dyn StoreFile, range: Range<u64>) -> Result<u64> {
    let (mut at, mut sum) = (range.start, 0);
    while at < range.end
        && let Some(data) = file.next_data(at, range.end)?
    {
        let (start, end) = (data.start.max(at), data.end.min(range.end));
        sum += end.saturating_sub(start);
        at = end.max(at + 1);
    }
    Ok(sum)
}

/// Which way a merge of two images goes, as far as their tables and sizes decide. `up_only`: the
/// parent's file is not this disk's to write, or clients write the child's.
pub fn direction(parent: &Part, child: &Part, up_only: bool) -> Result<Direction> {
    if up_only || parent.entries.is_none() || parent.size() != child.size() {
        return Ok(Direction::Up);
    }
    let cluster = child.delta.cluster_bytes();
    let (mut up, mut down) = (0u64, 0u64);
    each_window(parent, child, &mut |below, above| {
        let clusters = |r: &Run| (r.offset + r.len).div_ceil(cluster) - r.offset / cluster;
        let (theirs, mine): (u64, u64) = (
            below.iter().map(clusters).sum(),
            above.iter().map(clusters).sum(),
        );
        let mut both = 0;
        each_common(below, above, &mut |range, _, _| {
            both += range.end.div_ceil(cluster) - range.start / cluster;
            Ok(())
        })?;
        up += theirs - both;
        down += mine;
        Ok(())
    })?;
    Ok(match down < up {
        true => Direction::Down,
        false => Direction::Up,
    })
}

/// Data bytes that merging `parent` with its only child gives back: what both files have now less
/// what the one that stays will have. 0 where that is negative (a raw base whose clusters all get
/// entries).
pub fn freed_by_merge(parent: &Part, child: &Part, direction: Direction) -> Result<u64> {
    let (stays, goes) = match direction {
        Direction::Up => (child, parent),
        Direction::Down => (parent, child),
    };
    let mut added = 0u64;
    let mut replaced = 0u64;
    let mut table = Table::of(stays);
    each_window(parent, child, &mut |below, above| {
        let (staying, going) = match direction {
            Direction::Up => (above, below),
            Direction::Down => (below, above),
        };
        for run in going {
            added += goes.data_of(run, &(run.offset..run.offset + run.len))?;
        }
        each_common(going, staying, &mut |range, going, staying| {
            match direction {
                // The child's cluster is what the guest sees.
                Direction::Up => added -= goes.data_of(going, &range)?,
                Direction::Down => replaced += stays.data_of(staying, &range)?,
            }
            Ok(())
        })?;
        each_alone(going, staying, &mut |range| table.enter(range))
    })?;
    let after = data_bytes(stays.file())? - replaced + added + table.new;
    let before = data_bytes(stays.file())? + data_bytes(goes.file())?;
    Ok(before.saturating_sub(after))
}

/// The table of the image that stays: blocks that get their first entry.
struct Table<'a> {
    part: &'a Part,
    /// The first block not yet looked at.
    next: u64,
    /// Bytes of blocks that become data.
    new: u64,
}

impl Table<'_> {
    fn of(part: &Part) -> Table<'_> {
        Table {
            part,
            next: 0,
            new: 0,
        }
    }

    /// Enters the clusters of a guest range; ascending.
    fn enter(&mut self, range: Range<u64>) -> Result<()> {
        let cluster = self.part.delta.cluster_bytes();
        let first = Header::slot_offset(range.start / cluster) / BLOCK;
        let end = Header::slot_offset(range.end.div_ceil(cluster)).div_ceil(BLOCK);
        let blocks = first.max(self.next)..end;
        if blocks.start < blocks.end {
            let bytes = blocks.start * BLOCK..blocks.end * BLOCK;
            self.new += bytes.end - bytes.start - data_in(self.part.file(), bytes)?;
            self.next = blocks.end;
        }
        Ok(())
    }
}

/// Gets the parent's runs of a window, and the child's.
type OnWindow<'a> = &'a mut dyn FnMut(&[Run], &[Run]) -> Result<()>;
/// Gets a guest range, and the two runs that have it.
type OnCommon<'a> = &'a mut dyn FnMut(Range<u64>, &Run, &Run) -> Result<()>;

/// Calls `f` with the runs of both in each window in which one of them has any.
fn each_window(parent: &Part, child: &Part, f: OnWindow<'_>) -> Result<()> {
    let mut at = 0;
    loop {
        let (below, above) = (parent.next(at)?, child.next(at)?);
        let Some(start) = below.into_iter().chain(above).min() else {
            return Ok(());
        };
        // Windows lie on multiples, so no cluster is cut by one.
        let start = start / WINDOW * WINDOW;
        let start = start.max(at);
        let end = match (parent.entries, above) {
            // A raw base is one run, however long: up to where the child begins.
            (None, None) => u64::MAX,
            (None, Some(above)) if above / WINDOW > start / WINDOW => above / WINDOW * WINDOW,
            _ => (start / WINDOW + 1).saturating_mul(WINDOW),
        };
        f(&parent.runs(start..end)?, &child.runs(start..end)?)?;
        if end == u64::MAX {
            return Ok(());
        }
        at = end;
    }
}

/// Calls `f` with each guest range that both lists have.
fn each_common(a: &[Run], b: &[Run], f: OnCommon<'_>) -> Result<()> {
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (start, end) = common(x, &(y.offset..y.offset + y.len));
        if start < end {
            f(start..end, x, y)?;
        }
        match x.offset + x.len < y.offset + y.len {
            true => i += 1,
            false => j += 1,
        }
    }
    Ok(())
}

/// Calls `f` with each guest range that `a` has and `b` has not.
fn each_alone(a: &[Run], b: &[Run], f: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
    let mut b = b.iter().peekable();
    for run in a {
        let (mut at, end) = (run.offset, run.offset + run.len);
        while let Some(other) = b.peek() {
            if other.offset >= end {
                break;
            }
            if at < other.offset {
                f(at..other.offset)?;
            }
            at = at.max(other.offset + other.len);
            // It may reach into the next run.
            if other.offset + other.len > end {
                break;
            }
            b.next();
        }
        if at < end {
            f(at..end)?;
        }
    }
    Ok(())
}
