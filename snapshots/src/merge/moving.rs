//! Moving clusters, batch by batch: copy, sync, entry, sync; then the old place is forgotten by all
//! who read here, and only then given up.

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::claim::adopt;
use ploop::error::Result;
use ploop::format::ploop::held::granules_in;
use ploop::format::{Delta, Place as At, Run};
use ploop::store::{StoreFile, Trail};
use std::sync::Arc;

use super::context::{Context, Lower, Where};
use super::copy::{copy_data, copy_over};
use super::direction::{Direction, clusters};

/// Guest clusters looked at in one go.
const LOOK: u64 = 64 << 10;

/// What one call of [`Context::advance`] did.
pub(super) struct Moved {
    pub(super) bytes: u64,
    pub(super) more: bool,
}

impl Context {
    /// Moves a batch.
    pub(super) fn advance(&mut self, disk: &Disk, budget: u64) -> Result<Moved> {
        let want = (budget / self.cluster).max(1) as usize;
        let batch = self.batch(want)?;
        let bytes = batch.len() as u64 * self.cluster;
        if !batch.is_empty() {
            match self.direction {
                Direction::Up => self.move_up(disk, &batch)?,
                Direction::Down => self.move_down(disk, &batch)?,
            }
        }
        Ok(Moved {
            bytes,
            more: batch.len() == want,
        })
    }

    /// The next clusters to move, `want` at most; fewer only at the end.
    fn batch(&mut self, want: usize) -> Result<Vec<u64>> {
        let lower = self.lower.delta();
        let from: &dyn Delta = match self.direction {
            Direction::Up => lower.as_ref(),
            Direction::Down => self.upper.as_ref(),
        };
        let end = from.mapped_end().div_ceil(self.cluster);
        let mut batch = Vec::new();
        while self.next < end {
            let stop = (self.next + LOOK).min(end);
            let window = self.next * self.cluster..stop.saturating_mul(self.cluster);
            for k in clusters(from, window, self.cluster)? {
                if self.direction == Direction::Up && self.upper.lookup(k)?.is_some() {
                    continue;
                }
                if batch.len() == want {
                    self.next = k;
                    return Ok(batch);
                }
                batch.push(k);
            }
            self.next = stop;
        }
        Ok(batch)
    }

    fn move_up(&self, disk: &Disk, batch: &[u64]) -> Result<()> {
        let lower = self.lower.delta();
        let mut moved: Vec<(u64, u64)> = Vec::new();
        let mut trail = Trail::default();
        let target = self.upper.file().as_ref();
        for &k in batch {
            let mut runs = Vec::new();
            let end = ((k + 1).saturating_mul(self.cluster)).min(lower.size());
            lower.map(k * self.cluster..end, &mut runs)?;
            let mut copy = || {
                adopt(&self.upper, k, |to| {
                    copy_runs(lower.as_ref(), &runs, k * self.cluster, target, to)?;
                    trail.wrote(target, to, self.cluster);
                    Ok(())
                })
            };
            // A change like a client's: a barrier waits for it.
            let done = match self.at {
                Where::Top => disk.inside(copy),
                _ => copy(),
            };
            if !done? {
                // A client came first; what it left below is what is being moved away.
                if self.at == Where::Top {
                    disk.complete_cluster(k)?;
                }
            } else {
                let places = runs.iter().filter_map(|r| match r.place {
                    At::File(at) => Some((at, r.len)),
                    _ => None,
                });
                moved.extend(places);
            }
        }
        match self.at {
            Where::Top => {
                disk.flush()?;
                self.upper.settle_entries()?;
            }
            _ => self.upper.flush()?,
        }
        let Some(file) = self.lower.own_file() else {
            return Ok(());
        };
        if let Lower::Ploop(top) = &self.lower {
            top.before_change()?;
        }
        self.forget_places(disk, batch)?;
        let account = disk.account()?;
        for (at, len) in joined(moved) {
            // What the child now has, the parent is charged for no more.
            let held = match account.limit() {
                Some(_) => granules_in(file.as_ref(), at..at + len)?,
                None => 0,
            };
            file.punch(at, len)?;
            account.unseal(held);
        }
        Ok(())
    }

    fn move_down(&self, disk: &Disk, batch: &[u64]) -> Result<()> {
        let Lower::Ploop(lower) = &self.lower else {
            return Ok(());
        };
        let upper = self.upper.file().as_ref();
        lower.before_change()?;
        let mut trail = Trail::default();
        for &k in batch {
            let Some(from) = self.upper.lookup(k)? else {
                continue;
            };
            let target = lower.file().as_ref();
            match lower.lookup(k)? {
                // Nobody reads it: the child has the cluster.
                Some(to) => {
                    copy_over(upper, from, target, to, self.cluster)?;
                    trail.wrote(target, to, self.cluster);
                }
                None => {
                    adopt(lower, k, |to| {
                        copy_data(upper, from, target, to, self.cluster)?;
                        trail.wrote(target, to, self.cluster);
                        Ok(())
                    })?;
                }
            }
            lower.wrote();
        }
        lower.flush()?;
        let gone = self.upper.take_out(batch)?;
        self.forget_places(disk, batch)?;
        let bytes = |&(at, count): &(u64, u64)| (at, count * self.cluster);
        for (at, len) in joined(gone.iter().map(bytes).collect()) {
            upper.punch(at, len)?;
        }
        for (at, count) in gone {
            self.upper.give_back(at, count);
        }
        Ok(())
    }

    /// Nobody knows the old places of the clusters in `batch` when this returns.
    fn forget_places(&self, disk: &Disk, batch: &[u64]) -> Result<()> {
        let below = disk.below();
        match (self.at, below) {
            (Where::Aside, _) | (_, None) => return Ok(()),
            // The top's own entries come before what the chain says.
            (Where::Top, below) => disk.publish(below),
            (Where::Chain, Some(below)) => {
                let range = |k: &u64| k * self.cluster..(k + 1).saturating_mul(self.cluster);
                let ranges: Vec<_> = batch.iter().map(range).collect();
                disk.publish(Some(Arc::new(below.refreshed(&ranges)?)));
            }
        }
        disk.drain();
        Ok(())
    }
}

/// The ranges in ascending order, neighbours as one: one call to give a long range back costs a file
/// system no more than one for a short one.
fn joined(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut out: Vec<(u64, u64)> = Vec::new();
    for (at, len) in ranges {
        match out.last_mut() {
            Some((start, n)) if *start + *n == at => *n += len,
            _ => out.push((at, len)),
        }
    }
    out
}

/// Copies the data of a cluster's runs to `to` in `target`.
fn copy_runs(
    from: &dyn Delta,
    runs: &[Run],
    start: u64,
    target: &dyn StoreFile,
    to: u64,
) -> Result<()> {
    for run in runs {
        match run.place {
            At::File(at) => copy_data(
                from.file().as_ref(),
                at,
                target,
                to + (run.offset - start),
                run.len,
            )?,
            At::Parent | At::Zero => {}
            At::Through | At::Fault => return Err(from.fault(run.offset)),
        }
    }
    Ok(())
}
