//! Clusters that a change takes: locked, allocated and paid for, until they are entered or given back.

use std::ops::Range;
use std::sync::Arc;

use super::write::{granules_of, within};
use crate::device::Pending;
use crate::error::{Error, Kind, Result};
use crate::format::ploop::parts::{Granules, Part};
use crate::format::ploop::top::{Found, Top};
use crate::host::Paid;

/// A cluster that was allocated and not committed yet.
#[derive(Debug)]
pub(super) struct New {
    cluster: u64,
    pub(super) offset: u64,
    /// Its granules after the commit, unless it is complete then.
    pub(super) present: Option<Granules>,
    /// Its room on the host is taken.
    pub(super) room: bool,
    /// Its granules that are charged.
    held: Option<Granules>,
}

/// Clusters of one prepared write that are not complete in the top, all locked.
#[derive(Debug)]
pub(super) struct NewClusters {
    top: Arc<Top>,
    new: Vec<New>,
    /// Granules of clusters that are in parts already.
    pub(super) more: Vec<(u64, Range<u64>)>,
    /// Guest clusters whose lock is held.
    locked: Vec<u64>,
    /// Room of the host that is to be written to.
    pub(super) paid: Paid,
}

impl NewClusters {
    pub(super) fn new(top: &Arc<Top>) -> NewClusters {
        NewClusters {
            top: top.clone(),
            new: Vec::new(),
            more: Vec::new(),
            locked: Vec::new(),
            paid: Paid::default(),
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
                    held: None,
                });
            }
            done += n;
        }
        Ok(())
    }

    /// Allocates for one locked guest cluster that is to be a part, with the room for all of it if
    /// the host has that.
    pub(super) fn allocate_roomy(&mut self, cluster: u64) -> Result<()> {
        self.top.make_room(cluster..cluster + 1)?;
        let (offset, room) = self.top.allocate_roomy()?;
        self.new.push(New {
            cluster,
            offset,
            present: None,
            room,
            held: None,
        });
        Ok(())
    }

    /// Allocates for one locked guest cluster; gives its file offset.
    pub(super) fn allocate_one(&mut self, cluster: u64) -> Result<u64> {
        self.allocate(cluster, 1)?;
        // What was just pushed.
        Ok(self.new.last().map_or(0, |n| n.offset))
    }

    /// Charges granules of a cluster that was allocated. Error: `NoSpace`, with nothing charged.
    pub(super) fn charge(&mut self, cluster: u64, granules: Granules) -> Result<()> {
        let top = self.top.clone();
        match self.new_mut(cluster) {
            Some(new) => {
                let paid = top.held().pay(granules.count_set())?;
                new.held = Some(granules);
                self.paid.add(paid);
                Ok(())
            }
            None => Err(Error::new(Kind::Io, "a cluster was not allocated")),
        }
    }

    /// Charges what a cluster that was allocated and filled holds, whatever the limit.
    pub(super) fn note(&mut self, cluster: u64) -> Result<()> {
        let top = self.top.clone();
        if let Some(new) = self.new_mut(cluster) {
            let held = top.held().data_of(top.file().as_ref(), new.offset)?;
            top.held().note(held.count_set());
            new.held = Some(held);
        }
        Ok(())
    }

    /// Pays back what was charged of a cluster and was not copied, being zeros; `covered` of it is
    /// still to be written.
    pub(super) fn correct(&mut self, cluster: u64, covered: &Range<u64>) -> Result<()> {
        let top = self.top.clone();
        let bytes = top.header().cluster_bytes();
        if let Some(new) = self.new_mut(cluster) {
            let mut held = top.held().data_of(top.file().as_ref(), new.offset)?;
            held.set(granules_of(&within(covered, bytes)));
            let now = held.count_set();
            let before = new.held.replace(held).map_or(0, |h| h.count_set());
            top.held().note(now.saturating_sub(before));
            top.held().back(before.saturating_sub(now));
        }
        Ok(())
    }

    fn place(&self, cluster: u64) -> Option<usize> {
        self.new.binary_search_by_key(&cluster, |n| n.cluster).ok()
    }

    pub(super) fn find(&self, cluster: u64) -> Option<&New> {
        self.new.get(self.place(cluster)?)
    }

    pub(super) fn new_mut(&mut self, cluster: u64) -> Option<&mut New> {
        let place = self.place(cluster)?;
        self.new.get_mut(place)
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
            self.top.held().enter(new.cluster, new.held.as_ref())?;
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
            let held = new.held.as_ref().map_or(0, Granules::count_set);
            self.top.held().back(held);
            // Neither bytes nor room are left of it; what cannot be given up is charged.
            let bytes = self.top.header().cluster_bytes();
            drop(self.top.file().punch(new.offset, bytes));
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
    // No quota refuses a merge.
    top.make_room_anyway(cluster..cluster + 1)?;
    let offset = new.allocate_one(cluster)?;
    fill(offset)?;
    new.note(cluster)?;
    new.commit()?;
    Ok(true)
}
