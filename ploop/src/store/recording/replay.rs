//! The durable disk and the units on top of it, at any point of the log.
//!
//! The base moves forward only: a unit enters it once it is durable and no losable unit of the same
//! file (or, for names, of any directory) precedes it, so program order holds in every subset.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::log::{Action, Event, Outcome, Unit};
use crate::store::memory::{Dir, Disk, ROOT};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Losable until the right sync.
    Open,
    /// Losable whatever comes: a sync that covered it failed.
    Stuck,
    Durable,
}

#[derive(Clone)]
struct Pending {
    event: usize,
    path: Arc<Path>,
    unit: Arc<Unit>,
    fate: Fate,
    /// Directories still to be synced.
    dirs: Vec<u64>,
}

/// Everything that the states at one point have in common.
pub(super) struct Point {
    pub(super) at: usize,
    /// The event before this point, and the length of the log, for people.
    pub(super) after: String,
    pub(super) of: usize,
    pub(super) base: Disk,
    /// In program order; numbers of losable units count only those with `losable`.
    pub(super) units: Vec<PointUnit>,
}

pub(super) struct PointUnit {
    pub(super) path: Arc<Path>,
    pub(super) unit: Arc<Unit>,
    pub(super) losable: bool,
}

/// A cursor on the log.
pub(super) struct Replay {
    start: Disk,
    at: usize,
    base: Disk,
    pending: Vec<Pending>,
}

impl Replay {
    pub(super) fn new(start: Disk) -> Replay {
        Replay {
            base: start.clone(),
            start,
            at: 0,
            pending: Vec::new(),
        }
    }

    /// The point after the first `at` events. Goes on from the last one asked for, if it can.
    pub(super) fn go_to(&mut self, at: usize, events: &[Event]) -> Point {
        let at = at.min(events.len());
        if at < self.at {
            *self = Replay::new(self.start.clone());
        }
        while self.at < at {
            self.step(&events[self.at]);
        }
        let after = at
            .checked_sub(1)
            .map_or("the start".into(), |n| events[n].to_string());
        let units = self.reachable_units();
        Point {
            at,
            after,
            of: events.len(),
            base: self.base.clone(),
            units,
        }
    }

    fn step(&mut self, event: &Event) {
        match event.action {
            Action::Create { file, .. } => drop(self.base.files.insert(file, Arc::default())),
            Action::CreateDir { dir, .. } => {
                Arc::make_mut(&mut self.base.dirs).insert(dir, Dir::new());
            }
            Action::Sync {
                file,
                started,
                outcome,
            } => self.sync(started, outcome, |pending| {
                pending.unit.file() == Some(file)
            }),
            Action::SyncDir {
                dir,
                started,
                outcome,
            } => self.sync(started, outcome, |pending| {
                let touched = pending.dirs.contains(&dir);
                if touched && outcome == Outcome::Done {
                    pending.dirs.retain(|other| *other != dir);
                }
                touched && (outcome != Outcome::Done || pending.dirs.is_empty())
            }),
            Action::SyncAll { started, outcome } => self.sync(started, outcome, |_| true),
            _ => {}
        }
        let number = self.at;
        self.pending
            .extend(event.action.units().into_iter().map(|unit| Pending {
                event: number,
                path: Arc::clone(&event.path),
                dirs: unit.dirs(),
                unit: Arc::new(unit),
                fate: Fate::Open,
            }));
        self.at += 1;
    }

    fn sync(&mut self, started: usize, outcome: Outcome, hit: impl Fn(&mut Pending) -> bool) {
        let fate = match outcome {
            Outcome::Done => Fate::Durable,
            Outcome::Failed => Fate::Stuck,
            Outcome::Dropped => return,
        };
        for pending in self
            .pending
            .iter_mut()
            .take_while(|pending| pending.event < started)
        {
            if pending.fate == Fate::Open && hit(pending) {
                pending.fate = fate;
            }
        }
        self.fold();
    }

    /// Moves into the base what can no longer be lost and follows nothing that can.
    fn fold(&mut self) {
        let mut blocked = BTreeSet::new();
        let base = &mut self.base;
        self.pending.retain(|pending| {
            let object = pending.unit.file();
            let keep = pending.fate != Fate::Durable || blocked.contains(&object);
            if keep {
                blocked.insert(object);
            } else {
                pending.unit.apply(base);
            }
            keep
        });
    }

    /// The units that can show in some state: files and directories that neither the base nor any
    /// unit gives a name to are gone for good. One pass does, since a directory gets its name
    /// before anything in it does, and the base takes names in that order.
    fn reachable_units(&self) -> Vec<PointUnit> {
        if self.pending.is_empty() {
            return Vec::new();
        }
        let mut reached = reached(&self.base);
        for pending in &self.pending {
            if let Unit::Link { ino, name } | Unit::Rename { ino, to: name, .. } = &*pending.unit
                && reached.contains(&name.dir)
            {
                reached.insert(*ino);
            }
        }
        let shows = |pending: &&Pending| match pending.unit.file() {
            Some(file) => reached.contains(&file),
            None => pending.unit.dirs().iter().any(|dir| reached.contains(dir)),
        };
        let pending = self.pending.iter().filter(shows);
        pending
            .map(|pending| PointUnit {
                path: Arc::clone(&pending.path),
                unit: Arc::clone(&pending.unit),
                losable: pending.fate != Fate::Durable,
            })
            .collect()
    }
}

/// The inodes that have a name, and `/`.
pub(super) fn reached(disk: &Disk) -> BTreeSet<u64> {
    let mut reached = BTreeSet::from([ROOT]);
    let mut todo = vec![ROOT];
    while let Some(dir) = todo.pop() {
        for &ino in disk.dirs.get(&dir).into_iter().flat_map(Dir::values) {
            if reached.insert(ino) {
                todo.push(ino);
            }
        }
    }
    reached
}
