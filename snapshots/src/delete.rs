//! `ploop snapshot delete`, `ploop snapshot merge`, and going on with what they began.
//!
//! A leaf goes at once. A node with one child is merged with it ([`crate::merge`]). A node with
//! several stays as long as they need it, hidden; when a deletion leaves it one child or none, it
//! goes too. [`run`] does all of that, as far as it is possible now.

use ploop::descriptor::{Descriptor, Guid, Temporary};
use ploop::disk::info::data_bytes;
use ploop::error::{Error, Kind, Result};
use ploop::locks::{Use, lock_image};
use ploop::store::Access;
use serde::Serialize;

use crate::merge::{self, Merge, Progress, Step};
use crate::place::Place;
use crate::quota;
use crate::snapshot::Live;
use crate::store::Root;

/// What became of a node that was to be deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deleted {
    /// It is gone.
    Gone,
    /// It is marked and waits for [`run`].
    Merging,
    /// It is marked, and stays hidden while so many nodes need it.
    Hidden(usize),
}

/// Deletes `node`. Durable on return, however much is left to do.
///
/// A leaf: 1. its file is taken for this alone; 2. the metadata lists it, durable; 3. COMMIT: the
/// descriptor without it; 4. its file is removed. Any other node: COMMIT: its mark.
///
/// Errors, with nothing changed: `Invalid` for the top; `NotFound`; `InUse` when somebody reads a
/// file that would be removed or rewritten, or a backup that has not ended needs the node.
pub fn delete(live: Live<'_>, node: Guid) -> Result<Deleted> {
    if let Some(backup) = live.place.meta()?.backups.get(&node.to_string()) {
        return Err(backup.in_the_way(live.place, "this snapshot"));
    }
    delete_any(live, node)
}

/// The same for a backup's snapshot, too.
pub(crate) fn delete_any(live: Live<'_>, node: Guid) -> Result<Deleted> {
    let place = live.place;
    {
        let _arranging = live.disk.arrange();
        place.sweep()?;
        live.disk.settle(place.opener())?;
        let mut d = place.descriptor()?;
        let shot = d.shot(node).ok_or_else(|| merge::unknown(place, node))?;
        refuse_top(place, &d, node)?;
        let marked = shot.temporary != Temporary::No;
        match d.children(node).len() {
            0 => {
                remove_leaf(place, d, node)?;
                quota::recount_limited(place, live.disk);
                return Ok(Deleted::Gone);
            }
            1 if !marked => {}
            1 => return Ok(Deleted::Merging),
            n => {
                merge::mark(place, &mut d, node)?;
                return Ok(Deleted::Hidden(n));
            }
        }
        let [child] = d.children(node)[..] else {
            return Err(merge::unknown(place, node));
        };
        if !merge::is_own(&d, child) {
            refuse_elsewhere(place, &d, child)?;
            merge::mark(place, &mut d, node)?;
            return Ok(Deleted::Hidden(1));
        }
    }
    // Whether its files can be had is found out before it is marked.
    Merge::begin(place, live.disk, node)?.pause()?;
    Ok(Deleted::Merging)
}

/// A child whose file is no layer of the store is nobody else's need, only out of our reach.
fn refuse_elsewhere(place: &Place<'_>, d: &Descriptor, child: Guid) -> Result<()> {
    let image = d.image(child).ok_or_else(|| merge::unknown(place, child))?;
    let layers = place.root().map(Root::layers);
    let path = place.file_of(image)?;
    if layers.is_some_and(|l| path.starts_with(l)) {
        return Ok(());
    }
    let what = format!(
        "the file of its child {child}, {:?}, is not in the disk's directory itself",
        image.file
    );
    Err(Error::unsupported(what)
        .on(place.dir())
        .fix("Export the disk first: ploop export DISK TARGET"))
}

fn refuse_top(place: &Place<'_>, d: &Descriptor, node: Guid) -> Result<()> {
    if node != d.top {
        return Ok(());
    }
    let what = format!(
        "{node} is the live disk of {}, not a snapshot",
        place.shown()
    );
    Err(Error::invalid(what)
        .on(place.dir())
        .fix("`ploop snapshot switch` goes back to a snapshot; `ploop rm` removes a container"))
}

/// Removes a node that nothing hangs on.
fn remove_leaf(place: &Place<'_>, mut d: Descriptor, node: Guid) -> Result<()> {
    let image = d.image(node).ok_or_else(|| merge::unknown(place, node))?;
    // 1.
    let own = Place::owns(image);
    let path = place.file_of(image);
    let _taken = match own {
        // For its locks only: one that is still arriving may go, too.
        true => match place.store().open(&path?, Access::Read) {
            Err(e) if e.kind() == Kind::NotFound => None,
            Err(e) => return Err(e),
            Ok(file) => {
                lock_image(file.as_ref(), Use::Write).map_err(|e| reads(e, place, node))?;
                Some(file)
            }
        },
        false => None,
    };
    let gone = d.remove(node)?;
    // 2.
    if own {
        let mut meta = place.meta()?;
        meta.files.insert(gone.file.clone());
        place.set_meta(&meta)?;
    }
    place.stage(&d)?;
    // 3. COMMIT
    place.commit()?;
    // 4. What comes back after a crash is swept by the next operation.
    place.drop_file(&d, &gone.file)?;
    // Of a merge that had begun before its child went.
    place.forget_side(&merge::marker(place, node))
}

/// Says which snapshot it is about.
fn reads(e: Error, place: &Place<'_>, node: Guid) -> Error {
    let name = place
        .meta()
        .ok()
        .and_then(|m| m.name_of(node).map(str::to_owned));
    let name = name.unwrap_or_else(|| node.to_string());
    e.while_doing(format_args!("snapshot {name:?} of {}", place.shown()))
}

/// How a job is watched and steered.
pub trait Watch {
    /// Called before each step with what was moved by the one before: may sleep to hold a rate.
    /// False pauses the job.
    fn go_on(&self, moved: u64) -> bool;
    /// Called after each step.
    fn progress(&self, progress: Progress);
}

/// What [`run`] came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ran {
    /// Nodes that are gone.
    pub removed: usize,
    /// Bytes of data that the disk's files have less than before, as far as clients did not write.
    pub freed: u64,
    /// True when it was paused: nodes still wait.
    pub paused: bool,
    /// Marked nodes that other nodes or disks still need.
    pub hidden: usize,
}

/// Goes on with every node that waits, until none does or `watch` pauses it.
pub fn run(live: Live<'_>, watch: &dyn Watch) -> Result<Ran> {
    let place = live.place;
    let mut ran = Ran::default();
    {
        // One that was cut behind its commit has only its file left.
        let _arranging = live.disk.arrange();
        place.sweep()?;
    }
    let before = data_of(place)?;
    let mut base = Progress::default();
    loop {
        let d = place.descriptor()?;
        let Some(&node) = merge::waiting(place, &d)?.first() else {
            ran.hidden = d
                .shots
                .iter()
                .filter(|s| s.temporary != Temporary::No)
                .count();
            break;
        };
        if d.children(node).is_empty() {
            let _arranging = live.disk.arrange();
            remove_leaf(place, place.descriptor()?, node)?;
            quota::recount_limited(place, live.disk);
            ran.removed += 1;
            continue;
        }
        let mut merge = Merge::begin(place, live.disk, node).map_err(|e| reads(e, place, node))?;
        let mut moved = 0;
        loop {
            if !watch.go_on(moved) {
                merge.pause()?;
                ran.paused = true;
                ran.freed = before.saturating_sub(data_of(place)?);
                return Ok(ran);
            }
            let was = merge.progress();
            let step = merge.step(merge::STEP)?;
            let now = merge.progress();
            moved = now.done - was.done;
            watch.progress(Progress {
                done: base.done + now.done,
                total: base.total + now.total,
            });
            if step == Step::Done {
                base.done += now.done;
                base.total += now.total;
                ran.removed += 1;
                break;
            }
        }
    }
    ran.freed = before.saturating_sub(data_of(place)?);
    Ok(ran)
}

/// Bytes of data in the files that are the disk's own.
pub fn data_of(place: &Place<'_>) -> Result<u64> {
    let d = place.descriptor()?;
    let mut sum = 0;
    for image in d.images.iter().filter(|i| Place::owns(i)) {
        let file = place.store().open(&place.file_of(image)?, Access::Read)?;
        sum += data_bytes(file.as_ref())?;
    }
    Ok(sum)
}

/// The snapshots that merging `node` down to the base takes away: every one of its chain below it
/// that is this disk's own, has one child, and is not marked yet; base first. With `all` unset,
/// its parent alone. Error: `Invalid` when there is none.
pub fn below(place: &Place<'_>, d: &Descriptor, node: Guid, all: bool) -> Result<Vec<Guid>> {
    let chain: Vec<Guid> = d.chain(node)?.iter().map(|i| i.guid).collect();
    let mut found = Vec::new();
    let backups = place.meta()?.backups;
    for pair in chain.windows(2) {
        let (parent, child) = (pair[0], pair[1]);
        let needed = backups.contains_key(&parent.to_string());
        let alone = d.children(parent).len() == 1 && !needed;
        let own = merge::is_own(d, child) && merge::is_own(d, parent);
        if alone && own {
            found.push(parent);
        }
    }
    if !all {
        let parent = chain.len().checked_sub(2).map(|i| chain[i]);
        found.retain(|g| Some(*g) == parent);
    }
    if found.is_empty() {
        let what =
            match all {
                true => "no snapshot of the chain is this disk's alone and has one child only"
                    .to_owned(),
                false => "its parent is a base, other disks use it, or it has several children"
                    .to_owned(),
            };
        return Err(
            Error::invalid(format!("nothing to merge {node} with: {what}")).on(place.dir()),
        );
    }
    Ok(found)
}
