//! Zeroing and discarding, without data I/O wherever that is possible.

use std::ops::Range;
use std::sync::Arc;

use super::write::{NewClusters, part};
use super::{Stack, unmapped_run};
use crate::device::{Pending, Segment, SegmentPlace, ZeroMode};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::top::Found;

/// Clusters looked at in one step: bounds the list of segments, whatever the range.
pub(super) const STEP_CLUSTERS: u64 = 4096;

/// What is wanted of a range.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    /// It must read as zeros.
    Zero(ZeroMode),
    /// Its space may be given back.
    Discard,
}

impl How {
    fn keep_space(self) -> bool {
        matches!(self, How::Zero(mode) if mode.keep_space)
    }
}

impl Stack {
    pub(super) fn erase(self: &Arc<Self>, range: Range<u64>, how: How) -> Result<()> {
        let top = self.top()?;
        top.check_latch()?;
        let mut at = range.start;
        while at < range.end {
            // Steps end on cluster borders, so that no cluster is looked at in two of them.
            let step =
                at.saturating_add(STEP_CLUSTERS * self.cluster) / self.cluster * self.cluster;
            let step = step.min(range.end);
            self.settle_parts(at..step, how)?;
            while at < step {
                let stop = unmapped_run(top, at..step)?;
                at = if stop > at {
                    self.erase_below(at..stop, how)?;
                    stop
                } else {
                    let cluster = at / self.cluster;
                    if top.find(cluster)? == Found::Part {
                        self.complete_part(cluster, &part(&range, cluster, self.cluster))?;
                    }
                    self.erase_mapped(at..step, how)?
                };
            }
        }
        Ok(())
    }

    /// Completes the parts in `range`, and if any of their rooms would have to stay for a journal's
    /// sake, flushes: once for all of them.
    fn settle_parts(self: &Arc<Self>, range: Range<u64>, how: How) -> Result<()> {
        let top = self.top()?;
        let clusters = range.start / self.cluster..range.end.div_ceil(self.cluster);
        let (parts, logged) = top.parts().within(clusters);
        for cluster in parts {
            self.complete_part(cluster, &part(&range, cluster, self.cluster))?;
        }
        if logged && top.journals() && !how.keep_space() {
            top.flush_or(&|| self.complete_parts())?;
        }
        Ok(())
    }

    /// Zeroes clusters of the top from the start of `range` on, as many as follow each other in the
    /// file; returns where it stopped.
    fn erase_mapped(self: &Arc<Self>, range: Range<u64>, how: How) -> Result<u64> {
        let top = self.top()?;
        let Some(first) = top.lookup(range.start / self.cluster)? else {
            return Ok(range.start);
        };
        let start = first + range.start % self.cluster;
        let mut stop = part(&range, range.start / self.cluster, self.cluster).end;
        while stop < range.end {
            let next = start + (stop - range.start);
            if top.lookup(stop / self.cluster)? != Some(next) {
                break;
            }
            stop = part(&range, stop / self.cluster, self.cluster).end;
        }
        top.before_change()?;
        let len = stop - range.start;
        let mut clusters = range.start / self.cluster..stop.div_ceil(self.cluster);
        if !how.keep_space() && clusters.any(|k| top.keeps_room(k)) {
            top.flush_or(&|| self.complete_parts())?;
        }
        if how.keep_space() {
            top.file().zero(start, len)?;
        } else {
            top.file().punch(start, len)?;
        }
        top.wrote();
        Ok(stop)
    }

    /// Erases bytes that the top does not have.
    fn erase_below(self: &Arc<Self>, range: Range<u64>, how: How) -> Result<()> {
        let mut clusters = Vec::new();
        if how.keep_space() {
            clusters.extend(range.start / self.cluster..range.end.div_ceil(self.cluster));
        } else {
            self.clusters_with_data(&range, &mut clusters)?;
        }
        for cluster in clusters {
            let covered = part(&range, cluster, self.cluster);
            let whole = covered.end - covered.start == self.cluster || self.ends_disk(&covered);
            match how {
                How::Discard if !whole => {}
                How::Discard => match self.erase_new(cluster, covered, how) {
                    // A discard is a hint: without room for it the old bytes stay.
                    Err(e) if e.kind() == Kind::NoSpace => return Ok(()),
                    other => other?,
                },
                How::Zero(_) => self.erase_new(cluster, covered, how)?,
            }
        }
        Ok(())
    }

    /// `covered` is the whole of a last cluster that the end of the disk cuts.
    fn ends_disk(&self, covered: &Range<u64>) -> bool {
        covered.start.is_multiple_of(self.cluster) && covered.end == self.size
    }

    /// The clusters of `range` that have anything but holes below, in `range`.
    fn clusters_with_data(&self, range: &Range<u64>, clusters: &mut Vec<u64>) -> Result<()> {
        let mut segments: Vec<Segment> = Vec::new();
        self.map_below(range.clone(), &mut segments)?;
        for s in segments.iter().filter(|s| s.place != SegmentPlace::Hole) {
            for cluster in s.offset / self.cluster..(s.offset + s.len).div_ceil(self.cluster) {
                if clusters.last() != Some(&cluster) {
                    clusters.push(cluster);
                }
            }
        }
        Ok(())
    }

    /// Puts a sparse cluster over what is below, with `covered` zero and the rest completed.
    fn erase_new(self: &Arc<Self>, cluster: u64, covered: Range<u64>, how: How) -> Result<()> {
        let top = self.top()?;
        top.before_change()?;
        let mut new = NewClusters::new(top);
        if new.lock(cluster)? != Found::Below {
            // A writer came to it since we looked.
            drop(new);
            self.complete_part(cluster, &covered)?;
            return self.erase_mapped(covered, how).map(|_| ());
        }
        let offset = new.allocate_one(cluster)?;
        if how.keep_space() {
            let at = offset + covered.start % self.cluster;
            top.file().zero(at, covered.end - covered.start)?;
        }
        self.complete(cluster, offset, &covered)?;
        new.commit()
    }

    /// Refuses a range that cannot be zeroed without copying data from below.
    pub(super) fn refuse_slow(&self, range: &Range<u64>) -> Result<()> {
        let ends = [
            range.start / self.cluster,
            range.end.saturating_sub(1) / self.cluster,
        ];
        for cluster in ends {
            let covered = part(range, cluster, self.cluster);
            if covered.start >= covered.end {
                continue;
            }
            let whole = self.extent(cluster);
            let copies = match self.top()?.find(cluster)? {
                Found::At(_) => false,
                Found::Part => covered != whole,
                Found::Below => {
                    let mut data = Vec::new();
                    self.clusters_with_data(&covered, &mut data)?;
                    let mut rest = Vec::new();
                    self.clusters_with_data(&(whole.start..covered.start), &mut rest)?;
                    self.clusters_with_data(&(covered.end..whole.end), &mut rest)?;
                    !data.is_empty() && !rest.is_empty()
                }
            };
            if copies {
                return Err(Error::unsupported(format!(
                    "zeroing bytes {}..{} needs a copy of the cluster's rest",
                    covered.start, covered.end
                )));
            }
        }
        Ok(())
    }
}
