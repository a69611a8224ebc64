//! Rearranging the file of an open disk's top, one cluster at a time, under its clients. The order of
//! steps is in `format::ploop::moving`; who needs it is [`super::grow`] and [`super::compact`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Disk, Stack};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::top::Top;

/// A place in the file that a cluster has left.
#[derive(Debug)]
struct Left {
    offset: u64,
    /// Granules that are charged of it.
    charged: u64,
}

/// A rearrangement that goes on. While it lives, flushes keep no journal. However it ends, the disk
/// goes on.
#[derive(Debug)]
pub(super) struct Moving<'a> {
    disk: &'a Disk,
    top: Arc<Top>,
    /// Places that nobody is given: (byte of the file, clusters).
    kept: Vec<(u64, u64)>,
    left: Vec<Left>,
    /// The longest time that the gate was closed.
    pub(super) pause: Duration,
    /// The top is another image now.
    replaced: bool,
}

impl Disk {
    /// Begins to move clusters of the top. The caller holds [`Disk::arrange`]. Errors: `ReadOnly`;
    /// `InUse` before a barrier is settled; those of a flush.
    pub(super) fn begin_moving(&self) -> Result<Moving<'_>> {
        let now = self.stack();
        let top = now.top()?.clone();
        if now.sealing.is_some() {
            let what = "the snapshot before this is not sealed yet";
            return Err(Error::new(Kind::InUse, what).on(top.file().path()));
        }
        top.before_change()?;
        // What is left for the closed gate is little.
        self.complete(u64::MAX, usize::MAX)?;
        top.flush_or(&|| now.complete_parts())?;
        drop(now);
        let mut moving = Moving {
            disk: self,
            top,
            kept: Vec::new(),
            left: Vec::new(),
            pause: Duration::ZERO,
            replaced: false,
        };
        moving.alone(|stack, top| {
            stack.complete_parts()?;
            top.begin_plain()
        })?;
        Ok(moving)
    }

    /// With nobody changing the disk; `pause` becomes the longest time that writes were held up.
    pub(super) fn alone<T>(
        &self,
        pause: &mut Duration,
        change: impl FnOnce(&Arc<Stack>) -> Result<T>,
    ) -> Result<T> {
        // From here on they wait, for those under way too.
        let began = Instant::now();
        let gate = self.gate.close();
        let changed = change(&self.stack());
        drop(gate);
        *pause = (*pause).max(began.elapsed());
        changed
    }
}

impl Moving<'_> {
    /// The image.
    pub(super) fn top(&self) -> &Top {
        &self.top
    }

    /// With nobody changing the disk.
    pub(super) fn alone<T>(
        &mut self,
        change: impl FnOnce(&Arc<Stack>, &Arc<Top>) -> Result<T>,
    ) -> Result<T> {
        let top = &self.top;
        self.disk.alone(&mut self.pause, |stack| change(stack, top))
    }

    /// Nobody is given a place before byte `end` of the file any more. Error: `NoSpace`.
    pub(super) fn keep_off(&mut self, end: u64) -> Result<()> {
        // In-flight writes have such places, and parts that were begun since the last time; those
        // have no entry to be found by.
        let kept = self.alone(|stack, top| {
            stack.complete_parts()?;
            top.keep_off(end)
        })?;
        self.kept.extend(kept);
        Ok(())
    }

    /// Moves a cluster to the first free place, or a new one at the end; false, and nothing is done,
    /// when that is not before byte `before`. Errors: `NoSpace`, `Io`.
    pub(super) fn shift(&mut self, cluster: u64, before: u64) -> Result<bool> {
        let (to, _) = self.top.allocate(1)?;
        if to >= before {
            self.top.give_back(to, 1);
            return Ok(false);
        }
        let from = self.alone(|_, top| top.move_to(cluster, to));
        let (offset, charged) = from.inspect_err(|_| self.top.give_back(to, 1))?;
        self.left.push(Left { offset, charged });
        Ok(true)
    }

    /// Takes a cluster out of the top, if it is one that `same` says reads the same below; returns
    /// the granules that it will give up.
    pub(super) fn unname(
        &mut self,
        cluster: u64,
        same: impl FnOnce(&Arc<Stack>) -> Result<bool>,
    ) -> Result<Option<u64>> {
        let unnamed = self.alone(|stack, top| match same(stack)? {
            true => top.unname(cluster).map(Some),
            false => Ok(None),
        })?;
        Ok(unnamed.map(|(offset, charged)| {
            self.left.push(Left { offset, charged });
            charged
        }))
    }

    /// Makes durable what was moved, waits until nobody reads the old places, and empties those.
    /// They are given to nobody while this lives.
    pub(super) fn vacate(&mut self) -> Result<()> {
        if self.left.is_empty() {
            return Ok(());
        }
        self.top.flush_moved()?;
        self.disk.publish(self.disk.below());
        self.disk.drain();
        let mut failed = None;
        for left in self.left.drain(..) {
            // One that could not be emptied is free all the same, and charged.
            self.kept.push((left.offset, 1));
            if let Err(e) = self.top.vacate(left.offset, left.charged) {
                failed.get_or_insert(e);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Another image has taken the place of the top.
    pub(super) fn replaced(mut self) -> Duration {
        self.replaced = true;
        self.pause
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        if self.replaced {
            return;
        }
        if let Err(e) = self.vacate() {
            // They hold what they held, and are free when the image is opened next.
            tracing::warn!(
                file = %self.top.file().path().display(),
                error = %e,
                "the places that clusters were moved from are not free yet"
            );
        }
        for &(offset, clusters) in &self.kept {
            self.top.give_back(offset, clusters);
        }
        self.top.end_plain();
    }
}

#[cfg(test)]
#[path = "moving_tests.rs"]
mod tests;
