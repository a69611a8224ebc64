//! `ploop snapshot create`: what the disk shows now becomes a node that stays.
//!
//! The cost is one small file, whatever the disk holds, and for clients the instant in which the
//! gate is closed. Several disks can be taken at one instant: all their gates are closed at once.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use ploop::descriptor::{Descriptor, Guid, Temporary};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::live::{Barrier, Sealing};
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::header::IN_USE_DIRTY;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create as create_image};
use ploop::locks::{Use, lock_image};
use ploop::owner;
use ploop::store::{Access, SECTOR};
use serde::Serialize;

use crate::merge::unknown;
use crate::meta::{Group, Meta, SnapshotMeta};
use crate::place::{Place, now};
use crate::{name, quota};

/// Images in a chain that OpenVZ's tools still open.
pub const OPENVZ_DEPTH: usize = 127;

/// What a snapshot is called.
#[derive(Clone, Debug, Default)]
pub struct NewSnapshot {
    /// Unique among the snapshots of the disk.
    pub name: Option<String>,
    /// A text for people.
    pub description: String,
    /// Its GUID; a fresh one when not given.
    pub guid: Option<Guid>,
    /// It is of no use for long: it is merged away by the next [`crate::delete::run`], here or wherever
    /// the disk is by then. Its quota does not hold what is written over it meanwhile against who
    /// writes.
    pub passing: bool,
}

/// A snapshot that was made.
#[derive(Clone, Debug, Serialize)]
pub struct Taken {
    /// Which disk, as the caller named it.
    pub disk: String,
    /// The node.
    pub guid: String,
    /// Its name.
    pub name: Option<String>,
    /// How long the disk's gate was closed: what a writer waited at most, in seconds.
    pub pause: f64,
    /// Images in the chain of the disk now.
    pub depth: usize,
    /// What else there is to say.
    pub note: Option<String>,
}

/// A disk that is open here, and its place.
#[derive(Clone, Copy, Debug)]
pub struct Live<'a> {
    /// Where it is.
    pub place: &'a Place<'a>,
    /// Open for writing; it holds the disk's lock.
    pub disk: &'a Disk,
}

impl Live<'_> {
    /// Waits until nobody else rearranges the disk, and keeps others from it. Error: `InUse` where it was
    /// given away meanwhile, by a move.
    pub(crate) fn arrange(&self) -> Result<MutexGuard<'_, ()>> {
        let arranging = self.disk.arrange();
        owner::check(self.place.store(), self.place.dir())?;
        Ok(arranging)
    }
}

/// What else happens with a snapshot of one disk. The disk is arranged by the caller all the time.
pub(crate) trait Along {
    /// In step 2: enters what is to be durable with the snapshot's name; taken back with it. An error
    /// ends all of it.
    fn enter(&self, meta: &mut Meta) -> Result<()>;
    /// In step 4, while the gate is closed: no I/O. An error ends all of it.
    fn at(&self, gate: &Barrier<'_>) -> Result<()>;
    /// Behind step 7. After an error the snapshot stays.
    fn committed(&self) -> Result<()>;
}

/// A snapshot of one open disk, as [`take_group`].
pub fn take(live: Live<'_>, new: &NewSnapshot) -> Result<Taken> {
    only(take_all(&[live], new, None)?)
}

/// The same, with what else happens then.
pub(crate) fn take_with(live: Live<'_>, new: &NewSnapshot, along: &dyn Along) -> Result<Taken> {
    only(take_all(&[live], new, Some(along))?)
}

fn only(mut taken: Vec<Taken>) -> Result<Taken> {
    taken
        .pop()
        .ok_or_else(|| Error::invalid("a snapshot of no disk"))
}

/// A snapshot of several open disks at one instant. Durable on return.
///
/// For each disk:
/// 1. what an interrupted operation left is removed;
/// 2. the metadata with the name, durable;
/// 3. the new top, empty and marked in use, and the next descriptor beside the one in force, both
///    durable; what is dirty is flushed, so that less is left for later;
///
/// and for all of them together:
/// 4. the barrier: all gates closed, the tops exchanged, the gates opened;
///
/// and again for each:
/// 5. what was the top is made durable and closed;
/// 6. COMMIT: the descriptor is renamed; then flushes that came after the barrier are answered;
/// 7. what was the top becomes a layer of the chain.
///
/// Cut before 6: no snapshot; the new top is a leftover. Of a group some disks may have it and
/// others not; the members' metadata says which belong together. An error before 4 leaves all as
/// it was; one after it latches that disk (see [`ploop::disk::live`]).
pub fn take_group(all: &[Live<'_>], new: &NewSnapshot) -> Result<Vec<Taken>> {
    take_all(all, new, None)
}

fn take_all(all: &[Live<'_>], new: &NewSnapshot, along: Option<&dyn Along>) -> Result<Vec<Taken>> {
    let all = in_one_order(all)?;
    if all.len() > 1 && new.guid.is_some() {
        return Err(Error::invalid(
            "one GUID for the snapshots of several disks",
        ));
    }
    let _arranging: Vec<_> = all.iter().map(Live::arrange).collect::<Result<_>>()?;
    let group = (all.len() > 1).then(|| Group {
        id: Guid::new_v4().to_string(),
        members: all.iter().map(|l| l.place.shown().to_owned()).collect(),
    });
    // 1. to 3.
    let mut prepared: Vec<Prepared> = Vec::new();
    for live in &all {
        match prepare(*live, new, group.clone(), along) {
            Ok(p) => prepared.push(p),
            Err(e) => {
                take_back(&all, &prepared);
                return Err(e);
            }
        }
    }
    // 4.
    let start = Instant::now();
    let sealings = match barrier(&all, &prepared, along) {
        Ok(sealings) => sealings,
        Err(e) => {
            take_back(&all, &prepared);
            return Err(e);
        }
    };
    let pause = start.elapsed();
    // 5. to 7.
    let mut taken = Vec::new();
    let mut failed = None;
    for ((live, p), sealing) in all.iter().zip(prepared).zip(sealings) {
        // The failure of one disk is no reason to latch the others.
        if let Err(e) = sealing.seal().and_then(|()| live.place.commit()) {
            failed.get_or_insert(e);
            continue;
        }
        sealing.committed();
        if let Err(e) = live.disk.settle(live.place.opener()) {
            tracing::warn!(disk = live.place.shown(), error = %e, "settled by the next snapshot");
        }
        if new.passing {
            quota::recount_limited(live.place, live.disk);
        }
        taken.push(p.taken(live.place.shown(), pause));
    }
    if let Some(e) = failed {
        return Err(e);
    }
    along.map_or(Ok(()), |along| along.committed())?;
    Ok(taken)
}

/// No barrier was passed.
fn take_back(all: &[Live<'_>], prepared: &[Prepared]) {
    for (live, p) in all.iter().zip(prepared) {
        p.undo.undo(live.place);
        p.top.held().back(p.top.held().own());
    }
}

/// By directory, each once: two groups at a time then wait for each other instead of for ever.
fn in_one_order<'a>(all: &[Live<'a>]) -> Result<Vec<Live<'a>>> {
    let mut all = all.to_vec();
    all.sort_by(|a, b| a.place.dir().cmp(b.place.dir()));
    for pair in all.windows(2) {
        if pair[0].place.dir() == pair[1].place.dir() {
            let what = format!("{} is named twice", pair[0].place.shown());
            return Err(Error::invalid(what));
        }
    }
    Ok(all)
}

fn barrier(
    all: &[Live<'_>],
    prepared: &[Prepared],
    along: Option<&dyn Along>,
) -> Result<Vec<Sealing>> {
    let gates: Vec<_> = all.iter().map(|l| l.disk.barrier()).collect();
    let mut sealings: Vec<Sealing> = Vec::new();
    for (gate, p) in gates.iter().zip(prepared) {
        let pushed = gate.push_top(p.top.clone()).and_then(|sealing| {
            sealings.push(sealing);
            along.map_or(Ok(()), |along| along.at(gate))
        });
        if let Err(e) = pushed {
            for (gate, sealing) in gates.iter().zip(sealings) {
                gate.pull_top(sealing);
            }
            return Err(e);
        }
    }
    Ok(sealings)
}

/// Everything but the barrier is done.
struct Prepared {
    guid: Guid,
    name: Option<String>,
    top: Arc<Top>,
    undo: Undo,
    depth: usize,
}

/// What to take back when the barrier does not come.
struct Undo {
    file: String,
    meta: Meta,
}

impl Undo {
    /// What cannot be taken back is a leftover, which the next operation sweeps.
    fn undo(&self, place: &Place<'_>) {
        let undone = place
            .unstage()
            .and_then(|()| place.forget_file(&self.file))
            // The file is gone for good before the metadata forgets it.
            .and_then(|()| place.store().sync_dir(place.dir()))
            .and_then(|()| place.set_meta(&self.meta));
        if let Err(e) = undone {
            tracing::warn!(disk = place.shown(), error = %e, "a leftover of a snapshot stays");
        }
    }
}

impl Prepared {
    fn taken(self, disk: &str, pause: Duration) -> Taken {
        Taken {
            disk: disk.to_owned(),
            guid: self.guid.to_string(),
            name: self.name,
            pause: pause.as_secs_f64(),
            depth: self.depth,
            note: depth_note(self.depth),
        }
    }
}

/// What to say of a chain that other tools do not open.
pub fn depth_note(depth: usize) -> Option<String> {
    (depth > OPENVZ_DEPTH).then(|| {
        format!(
            "the chain has {depth} images; OpenVZ's tools open {OPENVZ_DEPTH} at most, and this disk \
             no longer"
        )
    })
}

fn prepare(
    live: Live<'_>,
    new: &NewSnapshot,
    group: Option<Group>,
    along: Option<&dyn Along>,
) -> Result<Prepared> {
    let place = live.place;
    // 1.
    place.sweep()?;
    live.disk.settle(place.opener())?;
    let mut d = place.descriptor()?;
    let before = place.meta()?;
    let guid = new.guid.unwrap_or_else(Guid::new_v4);
    let file = Place::new_file_name(&d);
    refuse_name(place, &d, &before, new.name.as_deref())?;
    let limit = before.size_of(&d, d.top);
    push(place, &mut d, guid, &file, new)?;
    let depth = d.chain(d.top)?.len();
    // 2.
    let mut meta = before.clone();
    enter(&mut meta, guid, new, group, &file);
    if let Some(bytes) = limit {
        meta.sizes.insert(guid.to_string(), bytes);
        meta.sizes.insert(file.clone(), bytes);
    }
    if let Some(along) = along {
        along.enter(&mut meta)?;
    }
    place.set_meta(&meta)?;
    // 3.
    let undo = Undo { file, meta: before };
    match prepare_files(live, &d, &undo.file) {
        Ok(top) => Ok(Prepared {
            guid,
            name: new.name.clone(),
            top: Arc::new(top),
            undo,
            depth,
        }),
        Err(e) => {
            undo.undo(place);
            Err(e)
        }
    }
}

fn prepare_files(live: Live<'_>, next: &Descriptor, file: &str) -> Result<Top> {
    let place = live.place;
    let top = live.disk.top()?;
    let h = top.header();
    let header = Header::new(h.version, h.cluster_sectors, h.size_sectors)?;
    let new = create_image(
        place.store(),
        &place.dir().join(file),
        &header.marked(IN_USE_DIRTY),
        0o600,
    )?;
    lock_image(new.as_ref(), Use::Write)?;
    place.store().sync_dir(place.dir())?;
    place.stage(next)?;
    // Before the barrier: what cannot be completed is no reason to stop the writers, and a flush
    // that comes after it waits for those clusters only that were begun since.
    live.disk.complete(u64::MAX, usize::MAX)?;
    live.disk.flush()?;
    let home = place.opener().home(&place.dir().join(file));
    Top::fresh(new, &header, home).charged_to(top.held().account().clone())
}

/// What was the top becomes node `guid`, and `file` the top.
fn push(
    place: &Place<'_>,
    d: &mut Descriptor,
    guid: Guid,
    file: &str,
    new: &NewSnapshot,
) -> Result<()> {
    d.push_overlay(guid, file.to_owned())
        .map_err(|e| e.on(place.dir()))?;
    if new.passing {
        let shot = d.shot_mut(guid);
        shot.ok_or_else(|| unknown(place, guid))?.temporary = Temporary::Temporary;
    }
    Ok(())
}

/// Enters a snapshot, and the file that is made with it.
fn enter(meta: &mut Meta, guid: Guid, new: &NewSnapshot, group: Option<Group>, file: &str) {
    let entry = SnapshotMeta {
        name: new.name.clone(),
        description: new.description.clone(),
        created: now(),
        group,
        ..SnapshotMeta::default()
    };
    meta.snapshots.insert(guid.to_string(), entry);
    meta.files.insert(file.to_owned());
}

/// Refuses a name that is none, or that another snapshot of the disk has.
pub(crate) fn refuse_name(
    place: &Place<'_>,
    d: &Descriptor,
    meta: &Meta,
    name: Option<&str>,
) -> Result<()> {
    let Some(name) = name else {
        return Ok(());
    };
    name::check(name)?;
    if Guid::parse(name).is_ok() {
        let what = format!("{name:?} reads as a GUID: it cannot be a snapshot's name");
        return Err(Error::invalid(what));
    }
    if place.find(d, meta, name).is_ok() {
        let what = format!("{} has a snapshot {name:?} already", place.shown());
        return Err(Error::new(Kind::Exists, what)
            .on(place.dir())
            .fix("Choose another name, or delete that one first"));
    }
    Ok(())
}

/// A snapshot of a disk that nobody has open. Durable on return. Steps as [`take_group`]; the disk
/// is opened for them and closed again. A disk that is a single raw image becomes the base of one
/// that is written in the ploop format. Error: `InUse`.
pub fn take_offline(place: &Place<'_>, new: &NewSnapshot) -> Result<Taken> {
    if is_over_raw(place)? {
        return over_raw(place, new);
    }
    let disk = place.open()?;
    let taken = take(Live { place, disk: &disk }, new);
    let closed = disk.close();
    let taken = taken?;
    closed?;
    Ok(taken)
}

/// True for a disk that is a single raw image: nothing of it is open while it is snapshotted.
pub fn is_over_raw(place: &Place<'_>) -> Result<bool> {
    let d = place.descriptor()?;
    Ok(d.base_is_raw() && d.chain(d.top)?.len() == 1)
}

/// The first snapshot of a raw disk: there is no header to close, and the new top is v2.
fn over_raw(place: &Place<'_>, new: &NewSnapshot) -> Result<Taken> {
    let _held = place.lock()?;
    place.sweep()?;
    let mut d = place.descriptor()?;
    let base = d.chain(d.top)?.pop().cloned();
    let base = base.ok_or_else(|| Error::corrupt("the disk has no image").on(place.dir()))?;
    let raw = place.store().open(&place.file_of(&base)?, Access::Write)?;
    lock_image(raw.as_ref(), Use::Write)?;
    let cluster = u64::from(d.cluster_sectors) * SECTOR;
    let size = raw.len()?.checked_next_multiple_of(cluster);
    let size = size.ok_or_else(|| Error::invalid("the disk is too large").on(raw.path()))?;
    let header = Header::new(Version::V2, d.cluster_sectors, size / SECTOR)?;
    let guid = new.guid.unwrap_or_else(Guid::new_v4);
    let file = Place::new_file_name(&d);
    let meta = place.meta()?;
    refuse_name(place, &d, &meta, new.name.as_deref())?;
    push(place, &mut d, guid, &file, new)?;
    let undo = Undo { file, meta };
    let mut meta = undo.meta.clone();
    enter(&mut meta, guid, new, None, &undo.file);
    place.set_meta(&meta)?;
    let path = place.dir().join(&undo.file);
    let made = create_image(place.store(), &path, &header, 0o600);
    let staged = made.and_then(|_| {
        place.store().sync_dir(place.dir())?;
        place.stage(&d)?;
        // The snapshot is what the image holds now.
        raw.sync()
    });
    if let Err(e) = staged {
        undo.undo(place);
        return Err(e);
    }
    // COMMIT
    place.commit()?;
    Ok(Taken {
        disk: place.shown().to_owned(),
        guid: guid.to_string(),
        name: new.name.clone(),
        pause: 0.0,
        depth: 2,
        note: None,
    })
}
