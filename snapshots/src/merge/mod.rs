//! Merging a snapshot that was deleted with its only child.
//!
//! ```text
//!   child  ──┐                     ┌── child (its own file)      up:   what only the parent has
//!   parent ──┤ ─ one of the two ─▶ │                                   goes into the child's file
//!   below  ──┘                     └── child (the parent's file) down: all that the child has
//!                                                                      goes into the parent's file
//! ```
//!
//! The direction is the cheaper one by clusters, where both are possible: a file that other disks
//! use is never written, the file that clients write takes up only, and so does a child that is
//! larger than its parent or whose parent is raw.
//!
//! Why it can be cut anywhere: a cluster moves by copy, sync, entry, sync, and only then does the
//! place where it was lose it. So child over parent reads the same at every instant, whichever
//! direction worked on it before, and whoever goes on decides the direction anew. The space of what
//! has moved is given back batch by batch, when no reader holds the place any more; all that a merge
//! needs besides is one batch, and on a full host a batch is small enough for the store's reserve.
//!
//! The job commits at its start, by the `<Temporary/>` mark of the parent: from then on that node is
//! not listed, opened or switched to, and whoever opens the disk next may go on.

mod context;
mod copy;
mod direction;
mod moving;

use ploop::descriptor::{Descriptor, Guid, Temporary};
use ploop::disk::Disk;
use ploop::error::{Error, Kind, Result};

use crate::place::Place;
use crate::quota;
use context::Context;
pub(crate) use context::marker;

pub use direction::{Costs, Direction, choose};

/// Bytes that one step moves at most, unless a cluster is larger.
pub const STEP: u64 = 16 << 20;

/// The least that it moves on a full host, unless less was asked for or a cluster is larger.
const STEP_MIN: u64 = 256 << 10;

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more to do.
    More,
    /// The node is gone.
    Done,
}

/// How far a merge is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of clusters moved.
    pub done: u64,
    /// Bytes of clusters to move, as counted at the start.
    pub total: u64,
}

/// A merge of `node` with its only child, on a disk that is open here. A state machine: whoever has
/// it calls [`Merge::step`] until it is done, and may stop between any two.
pub struct Merge<'a> {
    place: &'a Place<'a>,
    disk: &'a Disk,
    node: Guid,
    context: Option<Context>,
    progress: Progress,
}

/// The nodes of a disk that wait for their merge, or for their removal: marked, and with one child
/// at most. Those whose files other disks use wait longer, and so does one of which, or of whose child,
/// not all bytes are here ([`ploop::store::arriving`]).
pub fn waiting(place: &Place<'_>, d: &Descriptor) -> Result<Vec<Guid>> {
    let marked = d.shots.iter().filter(|s| s.temporary != Temporary::No);
    let mut found = Vec::new();
    for shot in marked {
        match d.children(shot.guid)[..] {
            [] => found.push(shot.guid),
            [child]
                if direction::possible(place, d, shot.guid, child)?
                    && !arrives(place, d, shot.guid)?
                    && !arrives(place, d, child)? =>
            {
                found.push(shot.guid);
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Whether some bytes of the image of `node` are still to come.
fn arrives(place: &Place<'_>, d: &Descriptor, node: Guid) -> Result<bool> {
    // What cannot be found is for who opens it.
    match d.image(node).map(|image| place.file_of(image)) {
        Some(Ok(path)) => place.opener().is_arriving(&path),
        _ => Ok(false),
    }
}

impl<'a> Merge<'a> {
    /// Marks `node` and begins. Durable on return: from now on it is being removed.
    ///
    /// 1. the files that will be rewritten are taken for this alone (`InUse` when somebody reads
    ///    one of them);
    /// 2. COMMIT: the descriptor with the mark.
    ///
    /// A node that is marked already is gone on with. Errors, with nothing changed: `Invalid` when
    /// it has not exactly one child; `Unsupported` when both files are other disks' too.
    pub fn begin(place: &'a Place<'a>, disk: &'a Disk, node: Guid) -> Result<Merge<'a>> {
        let mut merge = Merge {
            place,
            disk,
            node,
            context: None,
            progress: Progress::default(),
        };
        let _arranging = disk.arrange();
        place.sweep()?;
        disk.settle(place.opener())?;
        let mut d = place.descriptor()?;
        // 1.
        let context = Context::enter(place, disk, &d, node)?;
        merge.progress.total = context.total();
        // 2.
        let marked = mark(place, &mut d, node).and_then(|()| context.announce(place, node));
        merge.context = Some(context);
        if let Err(e) = marked {
            merge.leave()?;
            return Err(e);
        }
        Ok(merge)
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Which way clusters move.
    pub fn direction(&self) -> Option<Direction> {
        self.context.as_ref().map(Context::direction)
    }

    /// Moves up to `budget` bytes. Holds up snapshots of this disk meanwhile, and nothing else.
    /// After an error nothing is lost, and the next step tries again.
    pub fn step(&mut self, budget: u64) -> Result<Step> {
        let _arranging = self.disk.arrange();
        let moved = self.step_arranged(budget);
        if moved.is_err()
            && let Err(e) = self.leave()
        {
            tracing::warn!(disk = self.place.shown(), error = %e, "a merge was not left in order");
        }
        moved
    }

    fn step_arranged(&mut self, budget: u64) -> Result<Step> {
        self.disk.settle(self.place.opener())?;
        let d = self.place.descriptor()?;
        // A snapshot since the last step makes another node the child.
        if self
            .context
            .as_ref()
            .is_some_and(|c| !c.fits(self.disk, &d, self.node))
        {
            self.leave()?;
        }
        if self.context.is_none() {
            let context = Context::enter(self.place, self.disk, &d, self.node)?;
            self.progress.total = self.progress.done + context.total();
            context.announce(self.place, self.node)?;
            self.context = Some(context);
        }
        let Some(context) = &mut self.context else {
            return Ok(Step::More);
        };
        let room = affordable(self.place).max(STEP_MIN);
        let moved = context.advance(self.disk, budget.min(room).clamp(1, STEP))?;
        self.progress.done += moved.bytes;
        if moved.more {
            return Ok(Step::More);
        }
        // After an error the files are still ours to leave.
        context.finish(self.place, self.disk, d, self.node)?;
        self.context = None;
        self.progress.total = self.progress.done;
        quota::recount_limited(self.place, self.disk);
        Ok(Step::Done)
    }

    /// Pauses: the files are closed in order and may be opened by others. The node stays marked.
    pub fn pause(mut self) -> Result<()> {
        let _arranging = self.disk.arrange();
        self.leave()
    }

    fn leave(&mut self) -> Result<()> {
        match self.context.take() {
            Some(context) => context.leave(self.place, self.disk),
            None => Ok(()),
        }
    }
}

/// Half of what the host has and the store keeps in reserve: the other half is for everybody's
/// flushes, and for the file system's own tables. Each batch gives back what it took.
fn affordable(place: &Place<'_>) -> u64 {
    // Who cannot tell says so when the room is needed.
    let Ok(Some(space)) = place.store().space(place.dir()) else {
        return u64::MAX;
    };
    let reserve = place.root().map_or(Ok(0), |root| root.reserve().held());
    space.available.saturating_add(reserve.unwrap_or(0)) / 2
}

/// COMMIT of a deletion that takes long: the node is marked.
pub(crate) fn mark(place: &Place<'_>, d: &mut Descriptor, node: Guid) -> Result<()> {
    let shot = d.shot_mut(node).ok_or_else(|| unknown(place, node))?;
    if shot.temporary != Temporary::No {
        return Ok(());
    }
    shot.temporary = Temporary::Temporary;
    place.stage(d)?;
    place.commit()
}

pub(crate) fn unknown(place: &Place<'_>, node: Guid) -> Error {
    let what = format!("{} has no snapshot {node}", place.shown());
    Error::new(Kind::NotFound, what).on(place.dir())
}

/// Whether what lies in a file can be written by this disk: its own, under a plain name.
pub(crate) fn is_own(d: &Descriptor, node: Guid) -> bool {
    d.image(node).is_some_and(Place::owns)
}
