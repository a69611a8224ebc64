//! Trackers of an open disk: begun, ended, cleared and merged while it is written to.

use std::sync::Arc;

use super::Disk;
use super::live::Barrier;
use crate::device::Device as _;
use crate::error::{Error, Kind, Result};
use crate::format::ploop::bitmaps::check_fit;
use crate::format::ploop::top::Top;
use crate::tracker::bitmap::{Bitmap, check_granularity};
use crate::tracker::{Id, Tracker};

impl Disk {
    /// The trackers, with their bits as they are.
    pub fn trackers(&self) -> Vec<Tracker> {
        self.tracking.trackers()
    }

    /// The tracker `id`. Error: `NotFound`.
    pub fn tracker(&self, id: Id) -> Result<Tracker> {
        let mut trackers = self.trackers().into_iter();
        let found = trackers.find(|t| t.id == id);
        found.ok_or_else(|| none(id))
    }

    /// Whether [`Disk::start_tracker`] would take another one.
    pub fn check_tracker(&self, granularity: u64) -> Result<()> {
        let top = self.top()?;
        check_granularity(top.header().size(), granularity)?;
        fits(&top, &self.trackers(), granularity)
    }

    /// Begins to track writes, at one instant: none that ended before has a bit set, and every one
    /// that ends after has. Writers wait for an instant, and those that are the first in their region
    /// for a sync. Durable on return, unless it is `passing`. Errors: `Exists`; `ReadOnly`; `Invalid`
    /// for the granularity; `Unsupported` where the image has no place for it.
    pub fn start_tracker(&self, id: Id, granularity: u64, passing: bool) -> Result<Tracker> {
        self.change_trackers(|top, trackers| start(top, trackers, id, granularity, passing))
    }

    /// Ends a tracker; durable on return. Gives what it had. Error: `NotFound`.
    pub fn stop_tracker(&self, id: Id) -> Result<Tracker> {
        self.change_trackers(|_, trackers| {
            let at = trackers.iter().position(|t| t.id == id);
            at.map(|at| trackers.remove(at)).ok_or_else(|| none(id))
        })
    }

    /// Clears a tracker, at one instant; durable on return. Gives the bits that it had: nobody sets
    /// any of them any more. Error: `NotFound`.
    pub fn clear_tracker(&self, id: Id) -> Result<Arc<Bitmap>> {
        self.change_trackers(|_, trackers| clear(trackers, id))
    }

    /// Adds what `from` has to `into`; durable on return. Error: `NotFound`.
    pub fn merge_trackers(&self, from: Id, into: Id) -> Result<()> {
        self.change_trackers(|_, trackers| {
            let find = |id| {
                trackers
                    .iter()
                    .position(|t| t.id == id)
                    .ok_or_else(|| none(id))
            };
            let (from, into) = (find(from)?, find(into)?);
            let more = trackers[from].bits.clone();
            trackers[into].add(&more)
        })
    }

    /// Adds `more` to a tracker; durable on return. Error: `NotFound`.
    pub fn add_to_tracker(&self, id: Id, more: &Bitmap) -> Result<()> {
        self.change_trackers(|_, trackers| {
            let tracker = trackers.iter_mut().find(|t| t.id == id);
            tracker.ok_or_else(|| none(id))?.add(more)
        })
    }

    /// Puts `trackers` in place of all lasting ones; durable on return. For who knows what they are to
    /// hold: of what is written meanwhile they may lack some. Error: `Unsupported` where the image has
    /// no place for them.
    pub fn adopt_trackers(&self, trackers: Vec<Tracker>) -> Result<()> {
        self.change_trackers(|top, all| {
            all.retain(|t| t.passing);
            for tracker in trackers {
                fits(top, all, tracker.bits.granularity())?;
                all.push(tracker);
            }
            Ok(())
        })
    }

    fn change_trackers<T>(
        &self,
        change: impl FnOnce(&Top, &mut Vec<Tracker>) -> Result<T>,
    ) -> Result<T> {
        let done = self.barrier().change_trackers(change)?;
        self.settle_trackers()?;
        Ok(done)
    }

    /// Makes changes of the trackers that a barrier made durable.
    pub fn settle_trackers(&self) -> Result<()> {
        let changed = self.trackers();
        if !self.tracking.is_unsaved() {
            return Ok(());
        }
        // Else a close would leave the extension as it is.
        self.inside(|| self.top()?.before_change())?;
        // What the disk held when they were changed must not be lost behind them.
        self.flush()?;
        self.tracking.settle(&changed)
    }

    /// Refuses a size that a tracker is too fine for. Error: `Invalid`.
    pub(super) fn check_trackers(&self, size: u64) -> Result<()> {
        let mut trackers = self.trackers().into_iter();
        trackers.try_for_each(|t| check_granularity(size, t.bits.granularity()))
    }

    /// The bits are for a disk of `size` bytes from here on; the gate is closed.
    pub(super) fn resize_trackers(&self, size: u64) -> Result<()> {
        self.tracking.change(size, |trackers| {
            trackers.iter_mut().try_for_each(|t| t.resize(size))
        })?;
        self.publish_trackers();
        Ok(())
    }
}

impl Barrier<'_> {
    /// Changes the trackers at this instant. In force at once; durable after
    /// [`Disk::settle_trackers`], or the next write to a region.
    fn change_trackers<T>(
        &self,
        change: impl FnOnce(&Top, &mut Vec<Tracker>) -> Result<T>,
    ) -> Result<T> {
        let top = self.disk.top()?;
        let size = top.header().size();
        let tracking = &self.disk.tracking;
        let done = tracking.change(size, |trackers| change(&top, trackers))?;
        self.disk.publish_trackers();
        Ok(done)
    }

    /// Clears a tracker at this instant; gives the bits that it had. Durable after
    /// [`Disk::settle_trackers`]. Error: `NotFound`.
    pub fn clear_tracker(&self, id: Id) -> Result<Arc<Bitmap>> {
        self.change_trackers(|_, trackers| clear(trackers, id))
    }

    /// Begins a lasting tracker at this instant; durable as above. Errors: as of
    /// [`Disk::start_tracker`].
    pub fn start_tracker(&self, id: Id, granularity: u64) -> Result<Tracker> {
        self.change_trackers(|top, trackers| start(top, trackers, id, granularity, false))
    }
}

fn start(
    top: &Top,
    trackers: &mut Vec<Tracker>,
    id: Id,
    granularity: u64,
    passing: bool,
) -> Result<Tracker> {
    if trackers.iter().any(|t| t.id == id) {
        let what = format!("there is a tracker {id}");
        return Err(Error::new(Kind::Exists, what));
    }
    let tracker = Tracker::new(id, top.header().size(), granularity, passing)?;
    if !passing {
        fits(top, trackers, granularity)?;
    }
    trackers.push(tracker.clone());
    Ok(tracker)
}

/// Refuses one more tracker where the image cannot keep it.
fn fits(top: &Top, trackers: &[Tracker], granularity: u64) -> Result<()> {
    let lasting = trackers.iter().filter(|t| !t.passing);
    let all = lasting.map(|t| t.bits.granularity());
    check_fit(top.header(), all.chain([granularity]))
}

fn clear(trackers: &mut [Tracker], id: Id) -> Result<Arc<Bitmap>> {
    let tracker = trackers.iter_mut().find(|t| t.id == id);
    let tracker = tracker.ok_or_else(|| none(id))?;
    tracker.clear()
}

fn none(id: Id) -> Error {
    Error::new(Kind::NotFound, format!("no tracker {id}"))
}
