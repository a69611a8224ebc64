//! Zeroing and discarding, without data I/O wherever that is possible.

use std::ops::Range;
use std::sync::Arc;

use super::claim::NewClusters;
use super::write::{granules_of, part, within};
use super::{Disk, Stack, unmapped_run};
use crate::device::{Pending, Segment, SegmentPlace, ZeroMode};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::parts::{GRANULE, Granules};
use crate::format::ploop::top::{Found, Top};
use crate::host::Paid;

/// Clusters looked at in one step: bounds the list of segments, whatever the range.
pub(super) const STEP_CLUSTERS: u64 = 4096;

/// Counts something of a cluster of a top: the cluster, its file offset, bytes of it.
type OfCluster<'a> = &'a dyn Fn(&Top, u64, u64, Range<u64>) -> Result<u64>;

/// What is wanted of a range.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    /// It must read as zeros.
    Zero(ZeroMode),
    /// Its space may be given back.
    Discard,
}

impl How {
    pub(super) fn keep_space(self) -> bool {
        matches!(self, How::Zero(mode) if mode.keep_space)
    }
}

/// What an erase has taken off a top's bits, and is to pay back when its bytes are gone.
type Released = Option<(Arc<Top>, u64)>;

impl Disk {
    /// Erases step by step: a barrier waits for one step, however long the range is.
    pub(super) fn erase(&self, range: Range<u64>, how: How) -> Result<()> {
        let mut at = range.start;
        // An empty range too asks whether the disk may be written.
        loop {
            let step = (at / self.cluster)
                .saturating_add(STEP_CLUSTERS)
                .saturating_mul(self.cluster);
            let stop = step.min(range.end);
            let released = self.release(at..stop, how)?;
            self.erase_released(at..stop, how, released)?;
            at = stop;
            if at >= range.end {
                return Ok(());
            }
        }
    }

    /// Takes what an erase of `range` gives up off the top's bits, and says how much is to be paid back
    /// after. Whoever writes to it from then on pays anew: so that no write that began before does
    /// not, the gate is closed for it, once the top's bits are known.
    fn release(&self, range: Range<u64>, how: How) -> Result<Released> {
        if how.keep_space() || range.is_empty() || self.stack().held(&range)? == 0 {
            return Ok(None);
        }
        let _alone = self.gate.close();
        let stack = self.stack();
        let granules = stack.release(&range)?;
        Ok(Some((stack.top()?.clone(), granules)))
    }

    /// Erases `range`, and pays back what of it was given up.
    fn erase_released(&self, range: Range<u64>, how: How, released: Released) -> Result<()> {
        let _pass = self.gate.enter();
        let stack = self.stack();
        let tracked = stack.tracked.as_ref();
        let mark = tracked.map(|set| self.tracking.before(set, &range));
        let erased = mark.transpose().and_then(|mark| {
            let erased = stack.erase(range.clone(), how);
            if let Some(set) = tracked.filter(|_| mark == Some(true)) {
                set.mark(&range);
            }
            erased
        });
        if let Some((top, granules)) = released {
            let same = stack.top.as_ref().is_some_and(|now| Arc::ptr_eq(now, &top));
            let kept = match (same, &erased) {
                (true, Ok(())) => 0,
                (true, Err(_)) => {
                    top.held().doubt();
                    stack.hold_again(&range)?
                }
                // A barrier came between: another top's range was erased, and this one's stays.
                (false, _) => {
                    top.held().doubt();
                    if let Some(now) = &stack.top {
                        now.held().doubt();
                    }
                    granules
                }
            };
            top.held().back(granules.saturating_sub(kept));
        }
        erased
    }
}

impl Stack {
    /// Granules in `range` that are charged to the top.
    pub(super) fn held(&self, range: &Range<u64>) -> Result<u64> {
        self.each_of_top(range, &|top, cluster, offset, inside| {
            let file = top.file().as_ref();
            let all = granules_of(&inside);
            let missing = top.held().missing(file, cluster, offset, &inside)?;
            Ok(all.end - all.start - missing)
        })
    }

    /// Takes the whole granules of `range` off the top's bits; returns how many were charged. No
    /// write is under way.
    pub(super) fn release(&self, range: &Range<u64>) -> Result<u64> {
        self.each_of_top(range, &|top, cluster, offset, inside| {
            top.held()
                .release(top.file().as_ref(), cluster, offset, inside)
        })
    }

    /// Sets the top's bits for what is there in `range`; returns how many were not set.
    pub(super) fn hold_again(&self, range: &Range<u64>) -> Result<u64> {
        self.each_of_top(range, &|top, cluster, offset, _| {
            top.held().learn_again(top.file().as_ref(), cluster, offset)
        })
    }

    /// The sum of `f` over the clusters of `range` that the top has, all or part of them.
    fn each_of_top(&self, range: &Range<u64>, f: OfCluster<'_>) -> Result<u64> {
        let top = self.top()?;
        let (mut at, end) = (range.start, range.end);
        let mut sum = 0;
        while at < end {
            at = unmapped_run(top, at..end)?;
            if at >= end {
                break;
            }
            let cluster = at / self.cluster;
            let offset = match top.find(cluster)? {
                Found::At(offset) => Some(offset),
                Found::Part => top.parts().get(cluster).map(|part| part.offset),
                Found::Below => None,
            };
            let covered = part(range, cluster, self.cluster);
            if let Some(offset) = offset {
                sum += f(top, cluster, offset, within(&covered, self.cluster))?;
            }
            at = covered.end;
        }
        Ok(sum)
    }

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
            let clusters = range.start / self.cluster..stop.div_ceil(self.cluster);
            let mut paid = Paid::default();
            for cluster in clusters {
                let covered = part(&(range.start..stop), cluster, self.cluster);
                let at = start + (covered.start - range.start) - covered.start % self.cluster;
                paid.add(self.take_in_place(cluster, at, &covered)?);
            }
            top.guest().zero(start, len)?;
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
        self.pay_for_rest(&mut new, cluster, &covered, how)?;
        if how.keep_space() {
            let at = offset + covered.start % self.cluster;
            top.guest().zero(at, covered.end - covered.start)?;
        }
        self.complete(cluster, offset, &covered)?;
        let kept = match how.keep_space() {
            true => covered,
            false => 0..0,
        };
        new.correct(cluster, &kept)?;
        new.commit()
    }

    /// Charges what lies below a new cluster and is not `covered`, and the latter, too, where its
    /// space is to be kept.
    fn pay_for_rest(
        &self,
        new: &mut NewClusters,
        cluster: u64,
        covered: &Range<u64>,
        how: How,
    ) -> Result<()> {
        let guest = self.extent(cluster);
        let mut held = Granules::none(self.cluster.div_ceil(GRANULE));
        for rest in [guest.start..covered.start, covered.end..guest.end] {
            let mut below: Vec<Segment> = Vec::new();
            if rest.start < rest.end {
                self.map_below(rest, &mut below)?;
            }
            for s in below.iter().filter(|s| s.place != SegmentPlace::Hole) {
                held.set(granules_of(&within(
                    &(s.offset..s.offset + s.len),
                    self.cluster,
                )));
            }
        }
        if how.keep_space() {
            held.set(granules_of(&within(covered, self.cluster)));
        }
        new.charge(cluster, held)
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

#[cfg(test)]
#[path = "erase_tests.rs"]
mod tests;
