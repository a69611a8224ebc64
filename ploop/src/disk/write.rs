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
use super::claim::{New, NewClusters};
use crate::device::{Layers, ReadLease, Segment, SegmentPlace, WriteLease, WriteSegment};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::parts::{self, GRANULE, Granules};
use crate::format::ploop::top::Found;
use crate::host::Paid;
use crate::store::{StoreFile, Trail};

/// Bytes copied at a time when a cluster is completed from below. Small pieces on purpose: on ext4
/// with large folios, data written in large ones is several times slower to overwrite later.
const COPY: usize = 64 * 1024;
/// A copy leaves out blocks of this size that are all zeros.
const BLOCK: usize = 4096;

/// The part of a guest range that lies in `cluster`.
pub(super) fn part(range: &Range<u64>, cluster: u64, bytes: u64) -> Range<u64> {
    range.start.max(cluster * bytes)..range.end.min((cluster + 1) * bytes)
}

/// The granules that bytes of a cluster lie in.
pub(super) fn granules_of(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / GRANULE..bytes.end.div_ceil(GRANULE)
}

/// `part` of a cluster, counted from the cluster's first byte.
pub(super) fn within(part: &Range<u64>, bytes: u64) -> Range<u64> {
    let start = part.start % bytes;
    start..start + (part.end - part.start)
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
        let mut missing = 0;
        for cluster in clusters.clone() {
            let Some(offset) = top.lookup(cluster)? else {
                return self.prepare_new(&range, clusters, segments);
            };
            let covered = part(&range, cluster, bytes);
            let inside = within(&covered, bytes);
            missing += top
                .held()
                .missing(top.file().as_ref(), cluster, offset, &inside)?;
            push(segments, offset, &covered, bytes);
        }
        let mut lease = WriteLease::in_place(top.guest().clone());
        lease.tell(top.clone());
        if missing > 0 {
            let pieces = clusters.map(|k| (k, within(&part(&range, k, bytes), bytes)));
            lease.pay(top.held().take(missing, pieces)?);
        }
        Ok(lease)
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
                Found::At(offset) => {
                    new.paid.add(self.take_in_place(cluster, offset, &covered)?);
                    offset
                }
                Found::Part => self.enlarge(&mut new, cluster, &covered)?,
                Found::Below => self.begin(&mut new, cluster, &covered)?,
            };
            push(segments, offset, &covered, bytes);
        }
        let mut lease = WriteLease::allocating(top.guest().clone(), Box::new(new));
        lease.tell(top.clone());
        Ok(lease)
    }

    /// Charges what a write to `covered`, in a cluster of the top at `offset`, needs more. What is
    /// charged when the write is given up then stays so until the disk is opened next. The bytes are
    /// to be written while what is returned lives.
    pub(super) fn take_in_place(
        &self,
        cluster: u64,
        offset: u64,
        covered: &Range<u64>,
    ) -> Result<Paid> {
        let top = self.top()?;
        let inside = within(covered, self.cluster);
        let missing = top
            .held()
            .missing(top.file().as_ref(), cluster, offset, &inside)?;
        match missing {
            0 => Ok(Paid::default()),
            _ => top.held().take(missing, [(cluster, inside)].into_iter()),
        }
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
        let Some(&New { offset, room, .. }) = clusters.find(cluster) else {
            return Err(Error::new(Kind::Io, "a cluster was not allocated"));
        };
        let guest = self.extent(cluster);
        let mut held = Granules::none(self.cluster.div_ceil(GRANULE));
        held.set(granules_of(&within(covered, self.cluster)));
        if *covered == guest {
            clusters.charge(cluster, held)?;
            return Ok(offset);
        }
        let mut below = Vec::new();
        self.map_below(guest.clone(), &mut below)?;
        for s in below.iter().filter(|s| s.place != SegmentPlace::Hole) {
            let start = s.offset - guest.start;
            held.set(granules_of(&(start..start + s.len)));
        }
        clusters.charge(cluster, held)?;
        if !self.cluster.is_multiple_of(GRANULE) {
            self.complete(cluster, offset, covered)?;
            clusters.correct(cluster, covered)?;
            return Ok(offset);
        }
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
        let ends = self.fill_ends(covered, offset, &present)?;
        present.set(ends);
        if present.full() {
            return Ok(offset);
        }
        if top.parts().count() >= parts::most(self.cluster) {
            for missing in present.missing() {
                self.fill(top.guest().as_ref(), &guest, missing, offset)?;
            }
            clusters.correct(cluster, covered)?;
            return Ok(offset);
        }
        let missing = match room {
            true => Vec::new(),
            false => present.missing(),
        };
        for missing in missing {
            let len = (missing.end - missing.start) * GRANULE;
            top.guest().reserve(offset + missing.start * GRANULE, len)?;
        }
        if let Some(new) = clusters.new_mut(cluster) {
            new.present = Some(present);
        }
        Ok(offset)
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
        let paid = self.take_in_place(cluster, part.offset, covered)?;
        clusters.paid.add(paid);
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
                write_below(self, self.top()?.guest().as_ref(), rest, at)?;
            }
        }
        Ok(first..last + 1)
    }

    /// Copies granules of the cluster at `guest` from below to `file`, the top's; returns those that
    /// it wrote to: zeros are left out.
    fn fill(
        self: &Arc<Self>,
        file: &dyn StoreFile,
        guest: &Range<u64>,
        granules: Range<u64>,
        offset: u64,
    ) -> Result<Granules> {
        let start = guest.start + granules.start * GRANULE;
        let end = (guest.start + granules.end * GRANULE).min(guest.end);
        let mut wrote = Granules::none(self.cluster / GRANULE);
        let at = offset + granules.start * GRANULE;
        let mut note = |bytes: Range<u64>| {
            wrote.set(granules_of(&(bytes.start - offset..bytes.end - offset)));
        };
        copy_below(self, file, start..end, at, &mut note)?;
        Ok(wrote)
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
            let file = top.file().as_ref();
            let wrote = self.fill(file, &guest, missing.clone(), part.offset)?;
            // Nobody wrote to the others: their room is not needed.
            for empty in wrote.missing_in(missing) {
                let len = (empty.end - empty.start) * GRANULE;
                top.file().punch(part.offset + empty.start * GRANULE, len)?;
                top.held().vacate(cluster, empty)?;
            }
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
        let file = self.top()?.guest().as_ref();
        for rest in [guest.start..covered.start, covered.end..guest.end] {
            if rest.start < rest.end {
                let at = offset + (rest.start - guest.start);
                copy_below(self, file, rest, at, &mut |_| ())?;
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

/// Copies bytes from below, without blocks of zeros; `wrote` is told the bytes of the file.
fn copy_below(
    stack: &Arc<Stack>,
    file: &dyn StoreFile,
    range: Range<u64>,
    file_offset: u64,
    wrote: &mut dyn FnMut(Range<u64>),
) -> Result<()> {
    let mut segments = Vec::new();
    stack.map_below(range.clone(), &mut segments)?;
    let lease = ReadLease::new(stack.clone() as Arc<dyn Layers>);
    let mut buf = Vec::new();
    for s in segments.iter().filter(|s| s.place != SegmentPlace::Hole) {
        buf.resize(COPY.min(s.len as usize), 0);
        let at = file_offset + (s.offset - range.start);
        copy_segment(&lease, s, file, at, &mut buf, wrote)?;
    }
    Ok(())
}

/// Writes the bytes below of a piece of a granule, zeros too: what is there may be anything.
fn write_below(
    stack: &Arc<Stack>,
    file: &dyn StoreFile,
    range: Range<u64>,
    file_offset: u64,
) -> Result<()> {
    let mut segments = Vec::new();
    stack.map_below(range.clone(), &mut segments)?;
    let lease = ReadLease::new(stack.clone() as Arc<dyn Layers>);
    let mut buf = [0; GRANULE as usize];
    let buf = &mut buf[..(range.end - range.start) as usize];
    for s in &segments {
        let at = (s.offset - range.start) as usize;
        lease.read(s, 0, &mut buf[at..at + s.len as usize])?;
    }
    file.write_at(buf, file_offset)
}

fn copy_segment(
    lease: &ReadLease,
    s: &Segment,
    file: &dyn StoreFile,
    file_offset: u64,
    buf: &mut [u8],
    wrote: &mut dyn FnMut(Range<u64>),
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
                let to = file_offset + done + at as u64;
                file.write_at(&piece[at..at + data], to)?;
                wrote(to..to + data as u64);
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
