//! Writing: in place, into new clusters, or into parts of them.
//!
//! A cluster that is not complete in the top is locked (guest cluster, [`Top::busy`]) from the look
//! at its entry to its commit or abort, and no reader sees what is written before the commit. So a
//! failure in the middle leaves the guest range as it was.
//!
//! A new cluster over data takes the bytes of the write, and those of the granules that it begins
//! and ends in; the rest stays below until it is written or [`Stack::complete_part`] copies it. The
//! room for it is taken from the host at once: completing must not fail for want of it.

use std::ops::Range;
use std::sync::Arc;

use super::Stack;
use crate::device::{Layers, Pending, ReadLease, Segment, SegmentPlace, WriteLease, WriteSegment};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::parts::{self, GRANULE, Granules, Part};
use crate::format::ploop::top::{Found, Top};
use crate::store::Trail;

/// Bytes copied at a time when a cluster is completed from below. Small pieces on purpose: on ext4
/// with large folios, data written in large ones is several times slower to overwrite later.
const COPY: usize = 64 * 1024;
/// A copy leaves out blocks of this size that are all zeros.
const BLOCK: usize = 4096;

/// A cluster that was allocated and not committed yet.
#[derive(Debug)]
struct New {
    cluster: u64,
    offset: u64,
    /// Its granules after the commit, unless it is complete then.
    present: Option<Granules>,
    /// Its room on the host is taken.
    room: bool,
}

/// Clusters of one prepared write that are not complete in the top, all locked.
#[derive(Debug)]
pub(super) struct NewClusters {
    top: Arc<Top>,
    new: Vec<New>,
    /// Granules of clusters that are in parts already.
    more: Vec<(u64, Range<u64>)>,
    /// Guest clusters whose lock is held.
    locked: Vec<u64>,
}

impl NewClusters {
    pub(super) fn new(top: &Arc<Top>) -> NewClusters {
        NewClusters {
            top: top.clone(),
            new: Vec::new(),
            more: Vec::new(),
            locked: Vec::new(),
        }
    }

    /// Locks a guest cluster and looks again. One that another writer has completed meanwhile is not
    /// kept locked.
    pub(super) fn lock(&mut self, cluster: u64) -> Result<Found> {
        self.top.busy.acquire(cluster);
        self.locked.push(cluster);
        let found = self.top.find(cluster)?;
        if matches!(found, Found::At(_)) {
            self.locked.pop();
            self.top.busy.release(cluster);
        }
        Ok(found)
    }

    /// Allocates for `count` locked guest clusters from `cluster` on.
    pub(super) fn allocate(&mut self, cluster: u64, count: u64) -> Result<()> {
        self.top.make_room(cluster..cluster + count)?;
        let bytes = self.top.header().cluster_bytes();
        let mut done = 0;
        while done < count {
            let (offset, n) = self.top.allocate(count - done)?;
            for i in 0..n {
                self.new.push(New {
                    cluster: cluster + done + i,
                    offset: offset + i * bytes,
                    present: None,
                    room: false,
                });
            }
            done += n;
        }
        Ok(())
    }

    /// Allocates for one locked guest cluster that is to be a part, with the room for all of it if
    /// the host has that.
    fn allocate_roomy(&mut self, cluster: u64) -> Result<()> {
        self.top.make_room(cluster..cluster + 1)?;
        let (offset, room) = self.top.allocate_roomy()?;
        self.new.push(New {
            cluster,
            offset,
            present: None,
            room,
        });
        Ok(())
    }

    /// Allocates for one locked guest cluster; gives its file offset.
    pub(super) fn allocate_one(&mut self, cluster: u64) -> Result<u64> {
        self.allocate(cluster, 1)?;
        // What was just pushed.
        Ok(self.new.last().map_or(0, |n| n.offset))
    }

    fn new_mut(&mut self, cluster: u64) -> Option<&mut New> {
        let found = self
            .new
            .binary_search_by_key(&cluster, |n| n.cluster)
            .ok()?;
        self.new.get_mut(found)
    }
}

impl Pending for NewClusters {
    fn commit(&mut self) -> Result<()> {
        while let Some((cluster, granules)) = self.more.last().cloned() {
            self.top.fill_part(cluster, granules)?;
            self.more.pop();
        }
        // From the back, so that what an error leaves is given back by `drop`.
        while let Some(new) = self.new.last() {
            match &new.present {
                None => self.top.commit(new.cluster, new.offset)?,
                Some(present) => {
                    let part = Part::new(new.offset, present.clone());
                    self.top.commit_part(new.cluster, part)?;
                }
            }
            self.new.pop();
        }
        Ok(())
    }
}

impl Drop for NewClusters {
    fn drop(&mut self) {
        for new in &self.new {
            self.top.give_back(new.offset, 1);
        }
        for (cluster, _) in &self.more {
            self.top.soil_part(*cluster);
        }
        for &cluster in &self.locked {
            self.top.busy.release(cluster);
        }
    }
}

/// Gives `top` a guest cluster that it does not have: allocates, lets `fill` write to the file
/// offset that it is given (what it leaves reads as zeros), and enters it. False when the image has
/// the cluster, or a part of it, already; then nothing is done. Not durable before a flush.
pub fn adopt(top: &Arc<Top>, cluster: u64, fill: impl FnOnce(u64) -> Result<()>) -> Result<bool> {
    top.before_change()?;
    let mut new = NewClusters::new(top);
    if new.lock(cluster)? != Found::Below {
        return Ok(false);
    }
    let offset = new.allocate_one(cluster)?;
    fill(offset)?;
    new.commit()?;
    Ok(true)
}

/// The part of a guest range that lies in `cluster`.
pub(super) fn part(range: &Range<u64>, cluster: u64, bytes: u64) -> Range<u64> {
    range.start.max(cluster * bytes)..range.end.min((cluster + 1) * bytes)
}

impl Stack {
    pub(super) fn prepare_write(
        self: &Arc<Self>,
        range: Range<u64>,
        segments: &mut Vec<WriteSegment>,
    ) -> Result<WriteLease> {
        let top = self.top()?;
        top.before_change()?;
        let bytes = self.cluster;
        let clusters = range.start / bytes..range.end.div_ceil(bytes);
        for cluster in clusters.clone() {
            let Some(offset) = top.lookup(cluster)? else {
                return self.prepare_new(&range, clusters, segments);
            };
            push(segments, offset, &part(&range, cluster, bytes), bytes);
        }
        Ok(WriteLease::in_place(top.file().clone()).telling(top.clone()))
    }

    fn prepare_new(
        self: &Arc<Self>,
        range: &Range<u64>,
        clusters: Range<u64>,
        segments: &mut Vec<WriteSegment>,
    ) -> Result<WriteLease> {
        segments.clear();
        let top = self.top()?;
        let bytes = self.cluster;
        let mut new = NewClusters::new(top);
        let mut found = Vec::with_capacity((clusters.end - clusters.start) as usize);
        for cluster in clusters.clone() {
            found.push(match top.find(cluster)? {
                Found::At(offset) => Found::At(offset),
                Found::Below | Found::Part => new.lock(cluster)?,
            });
        }
        let mut at = 0;
        while at < found.len() {
            let cluster = clusters.start + at as u64;
            let run = found[at..].iter().take_while(|f| **f == Found::Below);
            let run = run.count() as u64;
            if run > 0 && self.is_over_data(range, cluster)? {
                new.allocate_roomy(cluster)?;
                at += 1;
                continue;
            }
            // Only the ends of the range can be parts.
            let end = run > 1 && self.is_over_data(range, cluster + run - 1)?;
            let count = run - u64::from(end);
            new.allocate(cluster, count)?;
            at += (count as usize).max(1);
        }
        for (cluster, found) in clusters.zip(found) {
            let covered = part(range, cluster, bytes);
            let offset = match found {
                Found::At(offset) => offset,
                Found::Part => self.enlarge(&mut new, cluster, &covered)?,
                Found::Below => self.begin(&mut new, cluster, &covered)?,
            };
            push(segments, offset, &covered, bytes);
        }
        Ok(WriteLease::allocating(top.file().clone(), Box::new(new)).telling(top.clone()))
    }

    /// True when a write to `range` leaves some of `cluster`, and no byte below it is a hole: then all
    /// of its room will be needed.
    fn is_over_data(&self, range: &Range<u64>, cluster: u64) -> Result<bool> {
        let guest = self.extent(cluster);
        if part(range, cluster, self.cluster) == guest || !self.cluster.is_multiple_of(GRANULE) {
            return Ok(false);
        }
        let mut below = Vec::new();
        self.map_below(guest, &mut below)?;
        Ok(below.iter().all(|s| s.place != SegmentPlace::Hole))
    }

    /// Prepares a cluster that was just allocated for a write to `covered`; gives its file offset.
    fn begin(
        self: &Arc<Self>,
        clusters: &mut NewClusters,
        cluster: u64,
        covered: &Range<u64>,
    ) -> Result<u64> {
        let top = self.top()?;
        let Some(new) = clusters.new_mut(cluster) else {
            return Err(Error::new(Kind::Io, "a cluster was not allocated"));
        };
        let guest = self.extent(cluster);
        if *covered == guest {
            return Ok(new.offset);
        }
        if !self.cluster.is_multiple_of(GRANULE) {
            self.complete(cluster, new.offset, covered)?;
            return Ok(new.offset);
        }
        let mut below = Vec::new();
        self.map_below(guest.clone(), &mut below)?;
        let mut present = Granules::none(self.cluster / GRANULE);
        let inside = |range: Range<u64>| range.start - guest.start..range.end - guest.start;
        // Bytes past the end of the disk, and granules without data, are there already.
        present.set((guest.end - guest.start).div_ceil(GRANULE)..self.cluster / GRANULE);
        for s in below.iter().filter(|s| s.place == SegmentPlace::Hole) {
            let hole = inside(s.offset..s.offset + s.len);
            let end = match s.offset + s.len == guest.end {
                true => hole.end.div_ceil(GRANULE),
                false => hole.end / GRANULE,
            };
            present.set(hole.start.div_ceil(GRANULE)..end);
        }
        let ends = self.fill_ends(covered, new.offset, &present)?;
        present.set(ends);
        if present.full() {
            return Ok(new.offset);
        }
        if top.parts().count() >= parts::most(self.cluster) {
            for missing in present.missing() {
                self.fill(&guest, missing, new.offset)?;
            }
            return Ok(new.offset);
        }
        let missing = match new.room {
            true => Vec::new(),
            false => present.missing(),
        };
        for missing in missing {
            let len = (missing.end - missing.start) * GRANULE;
            top.file()
                .reserve(new.offset + missing.start * GRANULE, len)?;
        }
        new.present = Some(present);
        Ok(new.offset)
    }

    /// Prepares a cluster that is there in part for a write to `covered`; gives its file offset.
    fn enlarge(
        self: &Arc<Self>,
        clusters: &mut NewClusters,
        cluster: u64,
        covered: &Range<u64>,
    ) -> Result<u64> {
        // The lock is held: it stays a part, and as it is.
        let Some(part) = self.top()?.parts().get(cluster) else {
            return Err(Error::new(Kind::Io, "a part of a cluster is gone"));
        };
        clusters.more.push((cluster, 0..0));
        let granules = self.fill_ends(covered, part.offset, &part.present)?;
        if let Some(last) = clusters.more.last_mut() {
            last.1 = granules;
        }
        Ok(part.offset)
    }

    /// Copies what a write to `covered` leaves of the granules that it begins and ends in, unless
    /// they are `present`; returns the granules that are there after the write.
    fn fill_ends(
        self: &Arc<Self>,
        covered: &Range<u64>,
        offset: u64,
        present: &Granules,
    ) -> Result<Range<u64>> {
        let guest = self.extent(covered.start / self.cluster);
        let first = (covered.start - guest.start) / GRANULE;
        let last = (covered.end - 1 - guest.start) / GRANULE;
        let head = guest.start + first * GRANULE..covered.start;
        let tail = covered.end..(guest.start + (last + 1) * GRANULE).min(guest.end);
        for (granule, rest) in [(first, head), (last, tail)] {
            if rest.start < rest.end && !present.has(granule) {
                let at = offset + (rest.start - guest.start);
                write_below(self, self.top()?, rest, at)?;
            }
        }
        Ok(first..last + 1)
    }

    /// Copies granules of the cluster at `guest` from below.
    fn fill(self: &Arc<Self>, guest: &Range<u64>, granules: Range<u64>, offset: u64) -> Result<()> {
        let start = guest.start + granules.start * GRANULE;
        let end = (guest.start + granules.end * GRANULE).min(guest.end);
        copy_below(
            self,
            self.top()?,
            start..end,
            offset + granules.start * GRANULE,
        )
    }

    /// The guest bytes of a cluster.
    pub(super) fn extent(&self, cluster: u64) -> Range<u64> {
        let start = cluster * self.cluster;
        start..(start + self.cluster).min(self.size)
    }

    /// Completes all clusters that are there in part.
    pub(super) fn complete_parts(self: &Arc<Self>) -> Result<()> {
        let top = self.top()?;
        let mut trail = Trail::default();
        for cluster in top.parts().older_than(u64::MAX, usize::MAX) {
            if let Some(at) = self.complete_part(cluster, &(0..0))? {
                trail.wrote(top.file().as_ref(), at, self.cluster);
            }
        }
        Ok(())
    }

    /// Copies what is missing of a cluster that is there in part, `except` whole granules of a range
    /// that is to be zeroed; enters it. Returns where it is in the file; `None` for any other
    /// cluster: there is nothing to do then.
    pub(super) fn complete_part(
        self: &Arc<Self>,
        cluster: u64,
        except: &Range<u64>,
    ) -> Result<Option<u64>> {
        let top = self.top()?;
        let mut held = NewClusters::new(top);
        if held.lock(cluster)? != Found::Part {
            return Ok(None);
        }
        let Some(part) = top.parts().get(cluster) else {
            return Ok(None);
        };
        top.check_latch()?;
        let guest = self.extent(cluster);
        let mut present = part.present.clone();
        if except.start < except.end {
            let (start, end) = (except.start.max(guest.start), except.end.min(guest.end));
            let last = match end == guest.end {
                true => (end - guest.start).div_ceil(GRANULE),
                false => (end - guest.start) / GRANULE,
            };
            present.set((start - guest.start).div_ceil(GRANULE)..last);
        }
        if part.soiled {
            for missing in part.present.missing() {
                let len = (missing.end - missing.start) * GRANULE;
                // The room stays: it was taken so that this cannot fail for want of it.
                top.file()
                    .zero(part.offset + missing.start * GRANULE, len)?;
            }
        }
        for missing in present.missing() {
            self.fill(&guest, missing, part.offset)?;
        }
        top.finish_part(cluster, part.offset)?;
        Ok(Some(part.offset))
    }

    /// Copies what lies below a new cluster into it, except for the part that is `covered` by the
    /// change to come. The cluster reads as zeros before.
    pub(super) fn complete(
        self: &Arc<Self>,
        cluster: u64,
        offset: u64,
        covered: &Range<u64>,
    ) -> Result<()> {
        let guest = self.extent(cluster);
        let top = self.top()?;
        for rest in [guest.start..covered.start, covered.end..guest.end] {
            if rest.start < rest.end {
                copy_below(self, top, rest.clone(), offset + (rest.start - guest.start))?;
            }
        }
        Ok(())
    }
}

fn push(segments: &mut Vec<WriteSegment>, cluster_at: u64, part: &Range<u64>, bytes: u64) {
    let (file_offset, len) = (cluster_at + part.start % bytes, part.end - part.start);
    match segments.last_mut() {
        Some(last) if last.file_offset + last.len == file_offset => last.len += len,
        _ => segments.push(WriteSegment { file_offset, len }),
    }
}

fn copy_below(stack: &Arc<Stack>, top: &Top, range: Range<u64>, file_offset: u64) -> Result<()> {
    let mut segments = Vec::new();
    stack.map_below(range.clone(), &mut segments)?;
    let lease = ReadLease::new(stack.clone() as Arc<dyn Layers>);
    let mut buf = Vec::new();
    for s in segments.iter().filter(|s| s.place != SegmentPlace::Hole) {
        buf.resize(COPY.min(s.len as usize), 0);
        copy_segment(
            &lease,
            s,
            top,
            file_offset + (s.offset - range.start),
            &mut buf,
        )?;
    }
    Ok(())
}

/// Writes the bytes below of a piece of a granule, zeros too: what is there may be anything.
fn write_below(stack: &Arc<Stack>, top: &Top, range: Range<u64>, file_offset: u64) -> Result<()> {
    let mut segments = Vec::new();
    stack.map_below(range.clone(), &mut segments)?;
    let lease = ReadLease::new(stack.clone() as Arc<dyn Layers>);
    let mut buf = [0; GRANULE as usize];
    let buf = &mut buf[..(range.end - range.start) as usize];
    for s in &segments {
        let at = (s.offset - range.start) as usize;
        lease.read(s, 0, &mut buf[at..at + s.len as usize])?;
    }
    top.file().write_at(buf, file_offset)
}

fn copy_segment(
    lease: &ReadLease,
    s: &Segment,
    top: &Top,
    file_offset: u64,
    buf: &mut [u8],
) -> Result<()> {
    let mut done = 0;
    while done < s.len {
        let n = (s.len - done).min(buf.len() as u64) as usize;
        let piece = &mut buf[..n];
        lease.read(s, done, piece)?;
        let mut at = 0;
        while at < n {
            let run = |zero: bool| {
                piece[at..]
                    .chunks(BLOCK)
                    .take_while(|b| is_zero(b) == zero)
                    .map(<[u8]>::len)
                    .sum()
            };
            let data: usize = run(false);
            if data > 0 {
                top.file()
                    .write_at(&piece[at..at + data], file_offset + done + at as u64)?;
                at += data;
            } else {
                at += run(true);
            }
        }
        done += n as u64;
    }
    Ok(())
}

/// True when every byte is 0.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, tail) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| *c == [0; 64]) && tail.iter().all(|&b| b == 0)
}
