//! Trackers of a disk by name: begun, ended, cleared, merged and listed; and carried to another top.
//!
//! The metadata says which trackers there are, the top's image what they hold. A tracker that has no
//! bits there has all of them set: so whatever is cut between the two costs precision, and no change.

use std::collections::BTreeMap;

use ploop::descriptor::Guid;
use ploop::disk::Disk;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::top::Top;
use ploop::store::{Access, StoreFile};
use ploop::tracker::bitmap::Bitmap;
use ploop::tracker::{Id, Tracker, Tracking};
use serde::Serialize;

use crate::diff;
use crate::meta::{Meta, TrackerMeta};
use crate::name;
use crate::place::{Place, now};
use crate::snapshot::Live;

/// A tracker, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tracked {
    /// Its name; of another program's, its id.
    pub name: String,
    /// The UUID that it has in files.
    pub id: String,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Bytes that count as written since it was begun or cleared.
    pub dirty: u64,
    /// When it was begun, in seconds since 1970; 0 for another program's.
    pub started: u64,
}

/// The trackers of a disk, open here or used by nobody, by name.
pub fn list(place: &Place<'_>, disk: Option<&Disk>) -> Result<Vec<Tracked>> {
    let meta = place.meta()?;
    let trackers = match disk {
        Some(disk) => disk.trackers(),
        None => stored(place)?,
    };
    let lasting = trackers.iter().filter(|t| !t.passing);
    let mut out: Vec<Tracked> = lasting.map(|t| told(&meta, t)).collect();
    out.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(out)
}

fn told(meta: &Meta, tracker: &Tracker) -> Tracked {
    let id = tracker.id.to_string();
    let known = meta.trackers.get(&id);
    Tracked {
        name: known.map_or_else(|| id.clone(), |k| k.name.clone()),
        id,
        granularity: tracker.bits.granularity(),
        dirty: tracker.bits.dirty_bytes(),
        started: known.map_or(0, |k| k.started),
    }
}

/// As the files of a disk that nobody uses have them.
fn stored(place: &Place<'_>) -> Result<Vec<Tracker>> {
    let d = place.descriptor()?;
    match d
        .image(d.top)
        .filter(|_| !(d.base_is_raw() && d.images.len() == 1))
    {
        Some(image) => {
            let file = place.store().open(&place.file_of(image)?, Access::Read)?;
            place.opener().trackers(place.dir(), file.as_ref())
        }
        None => Ok(Vec::new()),
    }
}

/// Begins a tracker at one instant, under the disk's clients. Durable on return.
///
/// 1. metadata: its name; durable;
/// 2. COMMIT: its bits, all clear.
///
/// Cut between them, it is there with all bits set. Errors, with nothing changed: `Exists`;
/// `Invalid` for the name or the granularity (a power of two, 512 or more); `Unsupported` where the
/// image has no place for another; `ReadOnly`.
pub fn start(live: Live<'_>, name: &str, granularity: u64) -> Result<Tracked> {
    name::check(name)?;
    let Live { place, disk } = live;
    let _arranging = live.arrange()?;
    let before = place.meta()?;
    if find(place, &before, disk, name).is_ok() {
        let what = format!("{} has a tracker {name}", place.shown());
        return Err(Error::new(Kind::Exists, what));
    }
    let id = Id::random();
    disk.check_tracker(granularity)?;
    let mut meta = before.clone();
    let known = TrackerMeta {
        name: name.to_owned(),
        granularity,
        started: now(),
        backup: None,
        other: BTreeMap::new(),
    };
    meta.trackers.insert(id.to_string(), known);
    // 1.
    place.set_meta(&meta)?;
    // 2.
    match disk.start_tracker(id, granularity, false) {
        Ok(tracker) => Ok(told(&meta, &tracker)),
        Err(e) => {
            if let Err(e) = place.set_meta(&before) {
                tracing::warn!(disk = place.shown(), error = %e, "a tracker stays that did not begin");
            }
            Err(e)
        }
    }
}

/// Ends a tracker; durable on return.
///
/// 1. its bits; 2. COMMIT: metadata without its name. Cut between them, it is there with all bits
///    set. Errors: `NotFound`; `InUse` while a backup has it.
pub fn stop(live: Live<'_>, name: &str) -> Result<Tracked> {
    let Live { place, disk } = live;
    let _arranging = live.arrange()?;
    let mut meta = place.meta()?;
    let id = find(place, &meta, disk, name)?;
    refuse_backup(place, &meta, id, name)?;
    // 1.
    let ended = told(&meta, &disk.stop_tracker(id)?);
    // 2.
    if meta.trackers.remove(&id.to_string()).is_some() {
        place.set_meta(&meta)?;
    }
    Ok(ended)
}

/// Clears a tracker at one instant; durable on return. Gives what it had. Errors: `NotFound`;
/// `InUse` while a backup has it.
///
/// 1. metadata: no backup is what it stands on any more; 2. COMMIT: its bits.
pub fn clear(live: Live<'_>, name: &str) -> Result<Tracked> {
    let Live { place, disk } = live;
    let _arranging = live.arrange()?;
    let mut meta = place.meta()?;
    let id = find(place, &meta, disk, name)?;
    refuse_backup(place, &meta, id, name)?;
    // 1.
    let known = meta.trackers.get_mut(&id.to_string());
    if known.is_some_and(|k| k.backup.take().is_some()) {
        place.set_meta(&meta)?;
    }
    // 2.
    let had = disk.clear_tracker(id)?;
    let mut told = told(&meta, &disk.tracker(id)?);
    told.dirty = had.dirty_bytes();
    Ok(told)
}

fn refuse_backup(place: &Place<'_>, meta: &Meta, id: Id, name: &str) -> Result<()> {
    match meta.backup_with(&id.to_string()) {
        Some(backup) => Err(backup.in_the_way(place, &format!("the tracker {name}"))),
        None => Ok(()),
    }
}

/// Adds what the tracker `from` has to `into`; durable on return. Error: `NotFound`.
pub fn merge(live: Live<'_>, from: &str, into: &str) -> Result<Tracked> {
    let Live { place, disk } = live;
    let _arranging = live.arrange()?;
    let meta = place.meta()?;
    let (from, into) = (
        find(place, &meta, disk, from)?,
        find(place, &meta, disk, into)?,
    );
    disk.merge_trackers(from, into)?;
    Ok(told(&meta, &disk.tracker(into)?))
}

/// The tracker with this name, or this id.
pub fn find(place: &Place<'_>, meta: &Meta, disk: &Disk, name: &str) -> Result<Id> {
    let mut named = meta.trackers.iter();
    let id = match named.find(|(_, known)| known.name == name) {
        Some((id, _)) => Id::parse(id)?,
        None => Id::parse(name).map_err(|_| none(place, name))?,
    };
    disk.tracker(id).map_err(|_| none(place, name))?;
    Ok(id)
}

fn none(place: &Place<'_>, name: &str) -> Error {
    let what = format!("{} has no tracker {name}", place.shown());
    Error::new(Kind::NotFound, what).fix("`ploop tracker list` shows those that there are")
}

/// Where the disk, which nobody uses, may read otherwise on the node `to`; `None` where that cannot
/// be told, or nobody asks.
pub(crate) fn changed(place: &Place<'_>, meta: &Meta, to: Guid, size: u64) -> Option<Bitmap> {
    let finest = meta.trackers.values().map(|t| t.granularity).min()?;
    let changed = Bitmap::new(size, finest).ok()?;
    let told = diff::differing(place, None, Some(to), &mut |range| {
        changed.set(&range);
        Ok(())
    });
    match told {
        Ok(_) => Some(changed),
        Err(e) => {
            tracing::warn!(disk = place.shown(), error = %e, "every tracker's bits are set");
            None
        }
    }
}

/// Gives `new`, which is to be the disk's top, the trackers that the disk has; its close stores
/// them. What changes by the exchange `changed` sets.
pub(crate) fn carry(trackers: &[Tracker], new: &Top, changed: &dyn Fn(&Bitmap)) -> Result<()> {
    let carried = Tracking::carried(trackers, new.header().size(), changed)?;
    new.track(Some(std::sync::Arc::new(carried)));
    Ok(())
}

/// The same from the image `old` of a disk that nobody uses, to the new empty one `new`, which is
/// durable and closed on return. Where it cannot be done every granule counts as written.
pub(crate) fn carry_to_image(
    place: &Place<'_>,
    old: Option<&dyn StoreFile>,
    new: std::sync::Arc<dyn StoreFile>,
    changed: &dyn Fn(&Bitmap),
) -> Result<()> {
    let Some(old) = old else {
        return Ok(());
    };
    let trackers = match place.opener().trackers(place.dir(), old) {
        Ok(trackers) => trackers,
        Err(e) => {
            tracing::warn!(disk = place.shown(), error = %e, "every tracker's bits are set");
            return Ok(());
        }
    };
    if trackers.is_empty() {
        return Ok(());
    }
    let new = Top::open(new)?;
    carry(&trackers, &new, changed)?;
    new.close()
}
