//! The instant of a backup.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ploop::device::Device as _;
use ploop::disk::live::Barrier;
use ploop::error::{Error, Kind, Result};
use ploop::tracker::bitmap::Bitmap;
use ploop::tracker::{GRANULARITY, Id};
use serde::Serialize;
use uuid::Uuid;

use super::record::Record;
use super::{Base, Format, Pending, Used, beside, end};
use crate::convert::qcow2;
use crate::meta::{Meta, TrackerMeta};
use crate::place::{Place, now};
use crate::snapshot::{self, Along, Live, NewSnapshot};
use crate::{name, tracker};

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The new file. Must not exist; absolute.
    pub target: PathBuf,
    /// Its format.
    pub format: Format,
    /// A tracker to begin, or to clear, with a full backup.
    pub tracker: Option<String>,
    /// The granularity of a tracker that begins; 64 KiB unless it is said.
    pub granularity: Option<u64>,
    /// A tracker whose granules alone are to be in the backup.
    pub since: Option<String>,
    /// Where the backup before it is now, if it was moved.
    pub base: Option<PathBuf>,
    /// Hash what the chain shows, too, where that means to read all of the disk.
    pub content: bool,
}

/// A backup that has begun.
#[derive(Clone, Debug, Serialize)]
pub struct Begun {
    /// Its entry.
    #[serde(flatten)]
    pub pending: Pending,
    /// It had begun before, and goes on.
    pub resumed: bool,
    /// How long the disk's gate was closed: what a writer waited at most, in seconds.
    pub pause: f64,
}

/// The backups of a disk that have not ended.
pub fn pending(place: &Place<'_>) -> Result<Vec<Pending>> {
    Ok(place.meta()?.backups.into_values().collect())
}

/// Begins a backup of what the disk shows at this instant. Durable on return. One that has begun for
/// the same target, and is the same, is what is returned.
///
/// 1. what is asked for is looked at, and what earlier ones left is removed;
/// 2. the snapshot's steps 1 to 3, with the backup in its metadata, and a tracker that begins;
/// 3. its barrier: at that instant the tracker is begun or cleared;
/// 4. COMMIT: its commit;
/// 5. the bits that the tracker had are in a file of their own, durable;
/// 6. from now on the tracker is clear after a crash, too.
///
/// Cut before 4: no backup, and the tracker has all that it had. Cut between 4 and 6: a backup
/// that can go on, and a tracker with what it had and what came since. An error of 5 puts the bits
/// back.
///
/// Errors, with nothing changed: `Exists` for the target; `NotFound` for a tracker, or the file to
/// stand on; `Invalid` for what does not go together; `InUse` while another backup has the tracker;
/// those of [`snapshot::take`] and of [`tracker::start`].
pub fn begin(live: Live<'_>, request: &Request) -> Result<Begun> {
    let place = live.place;
    let target = resolved(place, &request.target)?;
    end::clean(live)?;
    // 1.
    if let Some(pending) = place
        .meta()?
        .backups
        .into_values()
        .find(|p| p.target == target && !p.done)
    {
        refuse_other(&pending, request)?;
        return Ok(Begun {
            pending,
            resumed: true,
            pause: 0.0,
        });
    }
    refuse_taken(place, &target)?;
    let (pending, known) = plan(live, request, target)?;
    let new = NewSnapshot {
        name: Some(pending.snapshot_name()),
        description: format!("For a backup to {}", pending.target.display()),
        guid: Some(ploop::descriptor::Guid::new_v4()),
        ..NewSnapshot::default()
    };
    let instant = Instant {
        live,
        guid: new.guid.map_or_else(String::new, |g| g.to_string()),
        pending,
        known,
        had: Mutex::default(),
    };
    let taken = snapshot::take_with(live, &new, &instant).inspect_err(|_| {
        // Behind the commit there is a backup, which nobody was told of.
        let id = &instant.pending.id;
        match end::abandon(live, id) {
            Err(e) if e.kind() != Kind::NotFound => {
                tracing::warn!(error = %e, backup = id, "a backup that failed stays, to be abandoned");
            }
            _ => {}
        }
    })?;
    Ok(Begun {
        pending: instant.pending,
        resumed: false,
        pause: taken.pause,
    })
}

/// What happens along with the snapshot.
struct Instant<'a> {
    live: Live<'a>,
    guid: String,
    pending: Pending,
    /// Of a tracker that begins.
    known: Option<TrackerMeta>,
    had: Mutex<Option<Arc<Bitmap>>>,
}

impl Instant<'_> {
    fn tracker(&self) -> Result<Option<(Id, &Used)>> {
        let used = self.pending.tracker.as_ref();
        used.map(|u| Ok((Id::parse(&u.id)?, u))).transpose()
    }
}

impl Along for Instant<'_> {
    fn enter(&self, meta: &mut Meta) -> Result<()> {
        // Nobody came between: from here on the disk is arranged by us alone.
        if meta
            .backups
            .values()
            .any(|p| p.target == self.pending.target && !p.done)
        {
            return Err(
                Error::new(Kind::Exists, "a backup to this file has just begun")
                    .on(&self.pending.target),
            );
        }
        if let Some(used) = self.pending.tracker.as_ref().filter(|u| !u.begun) {
            refuse_used(self.live.place, meta, Id::parse(&used.id)?, &used.name)?;
            let known = meta.trackers.get(&used.id);
            let last = known.and_then(|k| k.backup.as_ref()).map(|b| &b.id);
            if let Some(base) = self.pending.base.as_ref().filter(|b| Some(&b.id) != last) {
                let what = format!("the tracker {} is no more of backup {}", used.name, base.id);
                return Err(Error::new(Kind::InUse, what).fix("Run the command again"));
            }
        }
        let twice = |known: &TrackerMeta| meta.trackers.values().any(|t| t.name == known.name);
        if self.known.as_ref().is_some_and(twice) {
            let what = "a tracker of this name has just begun";
            return Err(Error::new(Kind::Exists, what).fix("Run the command again"));
        }
        meta.backups.insert(self.guid.clone(), self.pending.clone());
        if let (Some(known), Some(used)) = (&self.known, &self.pending.tracker) {
            meta.trackers.insert(used.id.clone(), known.clone());
        }
        Ok(())
    }

    fn at(&self, gate: &Barrier<'_>) -> Result<()> {
        let Some((id, used)) = self.tracker()? else {
            return Ok(());
        };
        if used.begun {
            return gate.start_tracker(id, used.granularity).map(drop);
        }
        let had = gate.clear_tracker(id)?;
        *self.had.lock().unwrap_or_else(PoisonError::into_inner) = Some(had);
        Ok(())
    }

    fn committed(&self) -> Result<()> {
        let Some((id, _)) = self.tracker()? else {
            return Ok(());
        };
        let had = self
            .had
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(had) = had {
            // 5.
            if let Err(e) = self.pending.bits(self.live.place).keep(&had) {
                self.live.disk.add_to_tracker(id, &had)?;
                return Err(
                    e.while_doing("keep the bits of the backup; the tracker has them again")
                );
            }
        }
        // 6.
        self.live.disk.settle_trackers()
    }
}

/// The entry of a new backup.
fn plan(
    live: Live<'_>,
    request: &Request,
    target: PathBuf,
) -> Result<(Pending, Option<TrackerMeta>)> {
    let place = live.place;
    let meta = place.meta()?;
    if snapshot::is_over_raw(place)? {
        let what = "a backup of a raw disk without a snapshot";
        return Err(Error::unsupported(what)
            .on(place.dir())
            .fix("Make a snapshot of it first, or copy its file"));
    }
    let mut pending = Pending {
        id: Uuid::new_v4().to_string(),
        target,
        format: request.format,
        time: now(),
        tracker: None,
        base: None,
        content: request.content,
        done: false,
    };
    let used = |id: Id, name: &str, granularity, begun| Used {
        id: id.to_string(),
        name: name.to_owned(),
        granularity,
        size: live.disk.top().map_or(0, |top| top.header().size()),
        begun,
    };
    let mut known = None;
    match (&request.since, &request.tracker) {
        (Some(_), Some(_)) => {
            let what = "an increment clears the tracker that it is of, and begins no other";
            return Err(Error::invalid(what).fix("Name it with --since alone"));
        }
        (Some(since), None) => {
            let id = tracker::find(place, &meta, live.disk, since)?;
            refuse_used(place, &meta, id, since)?;
            let granularity = live.disk.tracker(id)?.bits.granularity();
            pending.tracker = Some(used(id, since, granularity, false));
            pending.base = Some(base(place, &meta, id, since, request)?);
            if request.format != Format::Qcow2 {
                let what = format!("a {} file cannot stand on another", request.format.name());
                return Err(Error::unsupported(what).fix("An increment is qcow2: --to qcow2"));
            }
            qcow2::check_size(live.disk.size(), super::copy::cluster(granularity))?;
        }
        (None, Some(name)) => match tracker::find(place, &meta, live.disk, name) {
            Ok(id) => {
                refuse_used(place, &meta, id, name)?;
                let granularity = live.disk.tracker(id)?.bits.granularity();
                if request.granularity.is_some_and(|g| g != granularity) {
                    let what = format!("the tracker {name} has a granularity of {granularity}");
                    return Err(Error::invalid(what));
                }
                pending.tracker = Some(used(id, name, granularity, false));
            }
            Err(e) if e.kind() == Kind::NotFound => {
                name::check(name)?;
                let granularity = request.granularity.unwrap_or(GRANULARITY);
                live.disk.check_tracker(granularity)?;
                pending.tracker = Some(used(Id::random(), name, granularity, true));
                known = Some(TrackerMeta {
                    name: name.clone(),
                    granularity,
                    started: pending.time,
                    backup: None,
                    other: BTreeMap::new(),
                });
            }
            Err(e) => return Err(e),
        },
        (None, None) => {}
    }
    if request.since.is_none() && request.base.is_some() {
        let what = "a full backup stands on no other";
        return Err(Error::invalid(what).fix("--base goes with --since"));
    }
    Ok((pending, known))
}

/// The backup that the tracker's granules were written after.
fn base(place: &Place<'_>, meta: &Meta, id: Id, name: &str, request: &Request) -> Result<Base> {
    let known = meta.trackers.get(&id.to_string());
    let Some(mut base) = known.and_then(|k| k.backup.clone()) else {
        let what = format!(
            "no backup was made when the tracker {name} was begun or cleared last, so there is none \
             to be its increment on"
        );
        return Err(Error::invalid(what).fix(format!(
            "Make a full one: ploop backup {} TARGET --tracker {name}",
            place.shown()
        )));
    };
    let moved = |e: Error| {
        e.while_doing("look at the backup before this one")
            .fix("Say where it is: --base FILE; or make a full one")
    };
    let store = place.store();
    if let Some(file) = &request.base {
        // A link to it may name another file tomorrow.
        let file = store.resolve(&resolved(place, file)?).map_err(moved)?;
        base.file = resolved(place, &file)?;
    }
    if store.kind(&base.file)?.is_none() {
        let gone = Error::new(Kind::NotFound, "the backup before this one is not there");
        return Err(gone
            .on(&base.file)
            .fix("Say where it is: --base FILE; or make a full one"));
    }
    let record = Record::read(store, &base.file).map_err(moved)?;
    if record.id != base.id {
        let what = format!(
            "is another backup than {}, the last of tracker {name}",
            base.id
        );
        return Err(moved(Error::invalid(what).on(&base.file)));
    }
    base.format = record.format;
    if base.format == Format::Ploop {
        let what = "an increment on a ploop image: qcow2 cannot stand on one";
        return Err(Error::unsupported(what)
            .on(&base.file)
            .fix(format!("Make a full one: --tracker {name} --to qcow2")));
    }
    Ok(base)
}

fn refuse_used(place: &Place<'_>, meta: &Meta, id: Id, name: &str) -> Result<()> {
    match meta.backup_with(&id.to_string()) {
        Some(pending) => Err(pending.in_the_way(place, name)),
        None => Ok(()),
    }
}

impl Pending {
    /// The error for whoever wants its tracker, or its snapshot.
    pub(crate) fn in_the_way(&self, place: &Place<'_>, name: &str) -> Error {
        let target = self.target.display();
        let what = format!("the backup to {target} has {name}, and has not ended");
        Error::new(Kind::InUse, what).on(place.dir()).fix(format!(
            "End it, by the command that began it, or with: ploop backup {} {target} --abandon",
            place.shown()
        ))
    }
}

/// Refuses to go on with a backup as another.
fn refuse_other(pending: &Pending, request: &Request) -> Result<()> {
    let tracker = pending.tracker.as_ref().map(|u| u.name.as_str());
    let (since, with) = match pending.base {
        Some(_) => (tracker, None),
        None => (None, tracker),
    };
    let same = pending.format == request.format
        && since == request.since.as_deref()
        && with == request.tracker.as_deref();
    if same {
        return Ok(());
    }
    let of = match (since, with) {
        (Some(name), _) => format!("since {name}"),
        (_, Some(name)) => format!("in full, with the tracker {name}"),
        _ => "in full".to_owned(),
    };
    let what = format!(
        "a backup to this file has begun, {of}, as {}; it goes on only as what it is",
        pending.format.name()
    );
    Err(Error::new(Kind::Exists, what)
        .on(&pending.target)
        .fix("Run it with the same options, or drop it with --abandon"))
}

/// The target with its directory resolved; it, and what will be beside it, must be free.
fn resolved(place: &Place<'_>, file: &Path) -> Result<PathBuf> {
    let bad = |what| Err(Error::invalid(what).on(file));
    let Some(name) = file.file_name() else {
        return bad("not the name of a file");
    };
    if !file.is_absolute() {
        return bad("the file must be named by its whole path");
    }
    let dir = file.parent().unwrap_or(Path::new("/"));
    let path = place.store().resolve(dir)?.join(name);
    match path.to_str() {
        Some(text) if text.len() < qcow2::NAME_MAX => Ok(path),
        Some(_) => bad("the path is too long to be named in a qcow2 image"),
        None => bad("the path is not UTF-8: no image could name it"),
    }
}

/// Refuses a target of which something is there.
fn refuse_taken(place: &Place<'_>, target: &Path) -> Result<()> {
    for more in ["", ".part", ".part.json", ".json"] {
        let path = beside(target, more);
        if place.store().kind(&path)?.is_some() {
            return Err(
                Error::new(Kind::Exists, "there is something of that name already")
                    .on(path)
                    .fix("Choose another target, or remove it"),
            );
        }
    }
    Ok(())
}
