//! A container that moves, as this store's files have it: what of it no stream carries, its record
//! ([`ploop::owner`]), and its end here.

pub mod later;

use std::collections::BTreeMap;
use std::path::Path;

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use ploop::owner::{self, Owner, Record, State, past};
use ploop::store::Store;
use ploop::store::arriving::Missing;
use ploop::tracker::Id;
use ploop::tracker::bitmap::check_granularity;
use serde::{Deserialize, Serialize};

use crate::meta::TrackerMeta;
use crate::owner::{Decision, KEPT, Next, Stand, resolve};
use crate::place::Place;
use crate::snapshot::Live;
use crate::store::Root;
use crate::{delete, name, remove};

/// Trackers that move with a container, at most.
const TRACKERS_MAX: usize = 64;

/// What moves with a container beside its images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Luggage {
    /// Its trackers, by their ids.
    pub trackers: BTreeMap<String, TrackerMeta>,
    /// The life of the disk, which goes on ([`crate::life`]).
    pub life: Option<String>,
}

impl Luggage {
    /// What the container has. Error: `InUse` while a backup of it has not ended.
    pub fn of(live: Live<'_>, life: Option<String>) -> Result<Luggage> {
        let meta = live.place.meta()?;
        if let Some(backup) = meta.backups.values().find(|b| !b.done) {
            return Err(backup.in_the_way(live.place, "the move"));
        }
        let here = live.disk.trackers();
        let lasts = |id: &str| here.iter().any(|t| !t.passing && t.id.to_string() == id);
        let mut trackers = meta.trackers;
        trackers.retain(|id, _| lasts(id));
        Ok(Luggage { trackers, life })
    }

    /// Refuses what no disk of ours can have: it comes from elsewhere.
    pub fn check(&self) -> Result<()> {
        if self.trackers.len() > TRACKERS_MAX {
            let what = format!("{} trackers; {TRACKERS_MAX} can move", self.trackers.len());
            return Err(Error::unsupported(what));
        }
        let mut names = std::collections::BTreeSet::new();
        for (id, tracker) in &self.trackers {
            Id::parse(id)?;
            name::check(&tracker.name)?;
            check_granularity(0, tracker.granularity)?;
            if !names.insert(&tracker.name) {
                return Err(Error::corrupt("two trackers have one name"));
            }
        }
        Ok(())
    }

    /// Enters it in the metadata of a container that nobody has opened; durable on return. Its trackers
    /// count everything as written until their bits come.
    pub fn unpack(&self, place: &Place<'_>) -> Result<()> {
        if self.trackers.is_empty() {
            return Ok(());
        }
        let mut meta = place.meta()?;
        meta.trackers = self.trackers.clone();
        place.set_meta(&meta)
    }
}

/// A move that has not ended, as `ploop info` and `ploop list` show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unended {
    /// `offered`, `given`, `arriving`, `ready` or `taken` ([`ploop::owner`]).
    pub state: &'static str,
    /// The move.
    pub id: String,
    /// One more with every owner.
    pub epoch: u64,
    /// Where the other side is.
    pub peer: String,
    /// Bytes that are still to come from there: until then the container needs it.
    pub missing: u64,
}

impl Unended {
    /// That of the disk in `dir`. Error: `Corrupt`.
    pub fn of(store: &dyn Store, dir: &Path) -> Result<Option<Unended>> {
        let Some(record) = owner::read(store, dir)? else {
            return Ok(None);
        };
        Ok(Some(Unended {
            state: record.state.name(),
            id: record.id.to_string(),
            epoch: record.epoch,
            peer: record.peer,
            missing: missing(store, dir)?,
        }))
    }
}

/// Bytes that the disk in `dir` lacks.
fn missing(store: &dyn Store, dir: &Path) -> Result<u64> {
    let images = Missing::images(store, dir)?;
    let bytes = images.iter().map(|path| match Missing::bytes(store, path) {
        // It was complete, and merged away, just now.
        Err(e) if e.kind() == Kind::NotFound => Ok(0),
        bytes => bytes,
    });
    bytes.sum()
}

/// The record of the move `id` of container `name`; `None` where there is no such container, or it is of
/// another move.
pub fn record(root: &Root, name: &str, id: Guid) -> Result<Option<Record>> {
    let dir = match root.existing_container(name) {
        Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Invalid) => return Ok(None),
        dir => dir?,
    };
    let record = owner::read(root.store(), &dir)?;
    Ok(record.filter(|r| r.id == id))
}

/// Where a side of a move is.
pub fn stand(record: Option<&Record>) -> Stand {
    record.map(|r| (r.state, r.epoch))
}

/// Does `next` to container `name`, which nobody has open, and whose record is of the move `id` and in the
/// state `at`; durable on return. Errors: `InUse` while somebody has it open; `NotFound` where the record is
/// another by now.
pub fn enact(root: &Root, name: &str, (id, at): (Guid, State), next: Next) -> Result<()> {
    if next == Next::Stay {
        return Ok(());
    }
    let dir = root.existing_container(name)?;
    let gone = || {
        let what = format!("container {name} is not {at} by the move {id} any more");
        Error::new(Kind::NotFound, what).on(&dir)
    };
    let is = |record: &Record| record.id == id && record.state == at;
    if next == Next::Remove {
        return remove::remove_moved(root, name, || {
            owner::read(root.store(), &dir)?
                .filter(is)
                .ok_or_else(gone)?;
            past::leave(root.store(), &dir, root.dir())
        });
    }
    let _held = root.lock_moving(&dir)?;
    let mut owner = Owner::open(root.store(), &dir)?.ok_or_else(gone)?;
    if !is(owner.record()) {
        return Err(gone());
    }
    match next {
        Next::Become(state, epoch) => {
            if (state, epoch) == (State::Given, KEPT) {
                past::leave(root.store(), &dir, root.dir())?;
            }
            owner.set(state, epoch)
        }
        Next::Own => owner::remove_of(root.store(), &dir, id).map(drop),
        Next::Stay | Next::Remove => Ok(()),
    }
}

/// What is known of the move `id`, by which container `name` came, where its record is another by now or
/// the container has moved on ([`past`]); and whether it is still here.
pub fn past(root: &Root, name: &str, id: Guid) -> Result<Option<(Record, bool)>> {
    if let Ok(dir) = root.existing_container(name)
        && let Some(record) = past::aside(root.store(), &dir)?.filter(|r| r.id == id)
    {
        return Ok(Some((record, true)));
    }
    let left = past::read(root.store(), root.dir(), id)?;
    Ok(left.map(|record| (record, false)))
}

/// The source of the move `id`, by which container `name` came, knows that it was taken. Durable on
/// return.
pub fn confirmed(root: &Root, name: &str, id: Guid) -> Result<()> {
    if let Ok(dir) = root.existing_container(name) {
        past::confirm(root.store(), &dir, id)?;
    }
    past::forget(root.store(), root.dir(), id)
}

/// Refuses a container that came, and of which some is still to come. Error: `InUse`.
pub fn refuse_missing(store: &dyn Store, dir: &Path, name: &str) -> Result<()> {
    match Unended::of(store, dir)? {
        Some(m) if m.missing > 0 => {
            let what = format!(
                "{} bytes of {name} are still to come from {}: it needs that service until then",
                m.missing, m.peer
            );
            Err(Error::new(Kind::InUse, what).on(dir).fix(
                "See that it runs, and reaches this one. If it is gone for good, only what has come is \
                 here: ploop rm removes it",
            ))
        }
        _ => Ok(()),
    }
}

/// What [`decide`] came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decided {
    /// The container.
    pub name: String,
    /// What it was.
    pub was: &'static str,
    /// Whether this store has it now.
    pub owned: bool,
    /// What may be lost by it.
    pub lost: &'static str,
}

/// Decides a move whose other side cannot say how it ended. Durable on return. Errors: `Invalid` where
/// there is nothing to decide; `InUse`; `Corrupt` for a record that cannot be read, unless it is to be
/// taken.
pub fn decide(root: &Root, name: &str, decision: Decision) -> Result<Decided> {
    let dir = root.existing_container(name)?;
    let record = match owner::read(root.store(), &dir) {
        Err(e) if e.kind() == Kind::Corrupt && decision == Decision::Take => {
            let _held = root.lock_moving(&dir)?;
            let missing = missing(root.store(), &dir)?;
            if missing > 0 {
                // Without the record nobody fetches it.
                return Err(e.while_doing(format_args!(
                    "take {name}, of which {missing} bytes have not come"
                )));
            }
            owner::remove(root.store(), &dir)?;
            // Without a record it takes what was kept of another away.
            past::set_aside(root.store(), &dir)?;
            return Ok(Decided {
                name: name.to_owned(),
                was: "damaged",
                owned: true,
                lost: "what was written elsewhere, if another service had it",
            });
        }
        record => record?,
    };
    let at = stand(record.as_ref());
    if decision == Decision::Take {
        refuse_missing(root.store(), &dir, name)?;
    }
    let (next, lost) =
        resolve(at, decision).map_err(|why| Error::invalid(format!("{name}: {why}")).on(&dir))?;
    let Some(record) = record else {
        return Err(Error::invalid(format!("{name} does not move")).on(&dir));
    };
    enact(root, name, (record.id, record.state), next)?;
    Ok(Decided {
        name: name.to_owned(),
        was: record.state.name(),
        owned: match next {
            Next::Become(state, _) => state.owns(),
            Next::Own | Next::Stay => true,
            Next::Remove => false,
        },
        lost,
    })
}

/// The containers whose move has not ended, with their records; of those that cannot be read nothing.
pub fn unsettled(root: &Root) -> Result<Vec<(String, Record)>> {
    let mut found = Vec::new();
    for name in root.names("containers")? {
        match owner::read(root.store(), &root.container(&name)) {
            Ok(Some(record)) => found.push((name, record)),
            Ok(None) => {}
            Err(e) => tracing::warn!(container = %name, error = %e, "nobody can open it"),
        }
    }
    Ok(found)
}

/// Removes what came of moves that were cut before all of it was there, and what other work left that
/// was cut. For a service that starts: no other one has it.
pub fn clear(root: &Root) -> Result<()> {
    root.collect_tmp()?;
    for (name, record) in unsettled(root)? {
        if record.state != State::Arriving {
            continue;
        }
        match enact(root, &name, (record.id, record.state), Next::Remove) {
            Ok(()) => tracing::info!(container = %name, "half of a move that was cut is removed"),
            Err(e) => tracing::warn!(container = %name, error = %e, "half of a move stays"),
        }
    }
    Ok(())
}

/// What the hashes of a container that came without its data say is of nothing: they are not known.
/// Durable on return.
pub fn forget_hashes(place: &Place<'_>) -> Result<()> {
    let mut meta = place.meta()?;
    let known = |m: &mut crate::meta::SnapshotMeta| m.content.take().is_some();
    match meta
        .snapshots
        .values_mut()
        .filter_map(|m| known(m).then_some(()))
        .count()
    {
        0 => Ok(()),
        _ => place.set_meta(&meta),
    }
}

/// Merges away what waits for it; false when `watch` stopped that.
pub fn tidy(live: Live<'_>, watch: &dyn delete::Watch) -> Result<bool> {
    Ok(!delete::run(live, watch)?.paused)
}
