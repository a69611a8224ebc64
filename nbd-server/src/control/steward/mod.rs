//! The operations, on disks that this process serves or only holds for them.
//!
//! ```text
//!  live       snapshot, delete, merge, clone from a snapshot    on the disk that clients use
//!  alone      switch, resize, remove                            behind its closed door
//!  neither    list, tree, describe                              on what is in the files
//! ```
//!
//! One long job works on a container at a time; the next waits for it ([`turns`]).

mod backup;
mod compact;
mod limits;
mod migrate;
mod quota;
mod resize;
mod tracker;
mod turns;
mod work;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use snapshots::clone::{CloneSource, CreateOptions, create_containers, numbered};
use snapshots::delete::{self, Deleted, Watch};
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::snapshot::{self, Live, NewSnapshot, Taken};
use snapshots::switch::SwitchOptions;
use snapshots::{Root, check, list, remove, rename, share, switch, template, tree};

use self::turns::Turns;
use crate::control::jobs::{Ended, JobHandle, Jobs};
use crate::control::metrics::Meter;
use crate::control::model::{
    Backup, BackupRun, BackupStart, Checked, Compact, Container, CreateContainers,
    CreatedContainer, DiskSpace, Export, ExportKind, GroupSnapshot, GrownLayer, Limits,
    LimitsChange, Merge, Migrate, Node, Quota, QuotaChange, QuotaNow, Removed, Rename, Resize,
    Resolve, Resolved, Snapshot, SnapshotCreate, SnapshotTaken, Space, Switch, Switched, Template,
    Tracker, TrackerChange, TrackerStart, Tree,
};
use crate::control::ops::Operations;
use crate::export::disks::{Door, OpenDisk, TEMPLATE};
use crate::export::{Disks, Exports};
use crate::migrate::link::Tls;
use crate::serve::Connections;

/// For clients that were cut off to let go of a disk, and for its close.
const LET_GO: Duration = Duration::from_secs(30);

/// Between two looks whether a container is free for a job.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What the operations work on.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The disks, as the NBD side has them.
    pub disks: Arc<Disks>,
    /// The NBD side's connections.
    pub connections: Connections,
    /// Where pauses are noted.
    pub meter: Arc<Meter>,
    /// By what other services know this one, if it has that.
    pub tls: Option<Tls>,
}

/// The operations on `parts`.
pub fn operations(parts: Parts) -> Arc<dyn Operations> {
    Arc::new(Steward {
        parts,
        turns: Turns::default(),
        frozen: Mutex::default(),
    })
}

/// Goes on with merges that an earlier process left, when their container is opened.
pub fn go_on_with_merges(disks: &Disks, jobs: Jobs, operations: &Arc<dyn Operations>) {
    let operations = Arc::downgrade(operations);
    disks.on_unfinished(move |container| {
        let Some(operations) = operations.upgrade() else {
            return;
        };
        let name = container.to_owned();
        let started = jobs.start("merge", container, "what was left", move |job| {
            operations.go_on(&name, job)
        });
        if let Err(e) = started {
            tracing::warn!(container, error = %e, "unfinished merges wait for the next opening");
        }
    });
}

struct Steward {
    parts: Parts,
    turns: Turns,
    /// Moves that wait until what is inside is frozen, and whether it is.
    frozen: Mutex<HashMap<String, bool>>,
}

impl fmt::Debug for Steward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steward").finish_non_exhaustive()
    }
}

impl Operations for Steward {
    fn exports(&self) -> Result<Vec<Export>> {
        let all = self.disks().list()?.into_iter();
        Ok(all
            .map(|e| Export {
                kind: match () {
                    () if e.name.starts_with(TEMPLATE) => ExportKind::Template,
                    () if e.name.contains('@') => ExportKind::Snapshot,
                    () if self.disks().root().is_some() => ExportKind::Container,
                    () => ExportKind::Disk,
                },
                open: self.disks().is_open(&e.name),
                name: e.name,
                clients: 0,
            })
            .collect())
    }

    fn open_disks(&self) -> usize {
        self.disks().open_count()
    }

    fn containers(&self) -> Result<Vec<Container>> {
        Ok(list::containers(self.root()?)?
            .into_iter()
            .map(Container::from)
            .collect())
    }

    fn container(&self, container: &str) -> Result<Container> {
        list::one(self.root()?, container).map(Container::from)
    }

    fn create_containers(&self, request: &CreateContainers) -> Result<Vec<CreatedContainer>> {
        let root = self.root()?;
        let names = match (&request.names[..], request.count) {
            ([prefix], Some(count)) => numbered(prefix, count)?,
            (names, None) => names.to_vec(),
            _ => return Err(Error::invalid("a count goes with one name")),
        };
        let from = match (&request.template, &request.from) {
            (Some(template), None) => CloneSource::Template(template.clone()),
            (None, Some(from)) => {
                let (container, snapshot) = match from.split_once('@') {
                    Some((container, snapshot)) => (container.to_owned(), snapshot.to_owned()),
                    // Of a container itself: of a snapshot that is made for it.
                    None => {
                        let text = format!("For {}", names.first().map_or("", String::as_str));
                        let new = SnapshotCreate {
                            name: None,
                            description: text,
                        };
                        (from.clone(), self.snapshot_create(from, &new)?.guid)
                    }
                };
                self.share_live(&container, &snapshot)?;
                CloneSource::Snapshot {
                    container,
                    snapshot,
                }
            }
            _ => return Err(Error::invalid("clones are of a template or of a container")),
        };
        let options = CreateOptions { size: request.size };
        let made = create_containers(root, &names, &from, &options, &|_, _| ())?;
        Ok(names
            .into_iter()
            .zip(made)
            .map(|(name, c)| CreatedContainer {
                name,
                dir: c.dir.display().to_string(),
                size: c.size,
                grown: c.grown.map(|g| GrownLayer {
                    data: g.data,
                    cached: g.cached,
                }),
            })
            .collect())
    }

    fn remove_container(&self, container: &str, force: bool) -> Result<Removed> {
        let root = self.root()?;
        let _alone = self.alone(container, Some(force))?;
        let freed = self.container(container).ok().map(|c| c.data);
        remove::remove_container(root, container)?;
        self.disks().throttle().forget(container);
        Ok(Removed {
            name: container.to_owned(),
            freed,
        })
    }

    fn check(&self, container: &str) -> Result<Checked> {
        let place = self.disks().place(container)?;
        let _working = self.turn_free(container)?;
        // Opened for this, it would be written to.
        let report = match self.disks().open_disk(container) {
            Some(disk) if !self.disks().read_only() => {
                let live = Live {
                    place: &place,
                    disk: disk.disk(),
                };
                check::check(live)?
            }
            _ => fsck::check(
                place.opener(),
                &place.source(None),
                &place.open_options(false),
            )?,
        };
        Ok(report.into())
    }

    fn quota(&self, container: &str) -> Result<Quota> {
        self.quota_of(container)
    }

    fn quotas(&self) -> Vec<QuotaNow> {
        self.quotas_now()
    }

    fn quota_change(&self, container: &str, request: &QuotaChange) -> Result<Quota> {
        self.set_quota(container, request)
    }

    fn trackers(&self, container: &str) -> Result<Vec<Tracker>> {
        self.trackers_of(container)
    }

    fn tracker_start(&self, container: &str, request: &TrackerStart) -> Result<Tracker> {
        self.start_tracker(container, request)
    }

    fn tracker_change(
        &self,
        container: &str,
        tracker: &str,
        change: &TrackerChange,
    ) -> Result<Tracker> {
        self.change_tracker(container, tracker, change)
    }

    fn migrate(&self, container: &str, request: &Migrate, job: &JobHandle) -> Result<Ended> {
        self.move_away(container, request, job)
    }

    fn migrate_frozen(&self, container: &str) -> Result<()> {
        self.frozen(container)
    }

    fn migrate_resolve(&self, container: &str, request: &Resolve) -> Result<Resolved> {
        self.resolve(container, request)
    }

    fn backups(&self, container: &str) -> Result<Vec<Backup>> {
        self.backups_of(container)
    }

    fn backup_begin(&self, container: &str, request: &BackupStart) -> Result<Backup> {
        self.begin_backup(container, request)
    }

    fn backup_run(
        &self,
        container: &str,
        backup: &str,
        request: &BackupRun,
        job: &JobHandle,
    ) -> Result<Ended> {
        self.run_backup(container, backup, request, job)
    }

    fn backup_abandon(&self, container: &str, backup: &str, job: &JobHandle) -> Result<Ended> {
        self.abandon_backup(container, backup, job)
    }

    fn limits(&self, container: &str) -> Result<Limits> {
        self.limits_of(container)
    }

    fn limits_change(&self, container: &str, request: &LimitsChange) -> Result<Limits> {
        self.set_limits(container, request)
    }

    fn space(&self) -> Option<Space> {
        self.disks().space().map(|space| space.as_ref().into())
    }

    fn all_limits(&self) -> (Vec<Limits>, (u64, u64)) {
        let throttle = self.disks().throttle();
        let all = throttle.all().into_iter().map(Limits::from);
        (all.collect(), throttle.store())
    }

    fn tree(&self, container: &str) -> Result<Tree> {
        let place = self.disks().place(container)?;
        let tree = tree::tree(&place)?;
        Ok(Tree {
            container: tree.disk,
            nodes: tree.nodes.into_iter().map(Node::from).collect(),
        })
    }

    fn snapshots(&self, container: &str) -> Result<Vec<Snapshot>> {
        let place = self.disks().place(container)?;
        let all = tree::list(&place)?.into_iter().map(Snapshot::from);
        Ok(all
            .map(|mut s| {
                if let Some(group) = &mut s.group {
                    group.whole = self.is_whole(&group.id, &group.members);
                }
                s
            })
            .collect())
    }

    fn snapshot_create(&self, container: &str, request: &SnapshotCreate) -> Result<SnapshotTaken> {
        self.disks().leaving().refuse(container)?;
        let place = self.disks().place(container)?;
        let new = NewSnapshot {
            name: request.name.clone(),
            description: request.description.clone(),
            ..NewSnapshot::default()
        };
        if snapshot::is_over_raw(&place)? {
            let _alone = self.alone(container, None)?;
            return snapshot::take_offline(&place, &new).map(|t| self.taken(t));
        }
        let disk = self.disks().live(container)?;
        // It may have been waited for.
        self.disks().leaving().refuse(container)?;
        let live = Live {
            place: &place,
            disk: disk.disk(),
        };
        snapshot::take(live, &new).map(|t| self.taken(t))
    }

    fn snapshot_group(&self, request: &GroupSnapshot) -> Result<Vec<SnapshotTaken>> {
        let names = request.containers.iter();
        let places: Vec<_> = names
            .map(|c| self.disks().place(c))
            .collect::<Result<_>>()?;
        // In one order, so that two groups at a time do not wait for each other.
        let mut sorted: Vec<_> = request.containers.iter().zip(&places).collect();
        sorted.sort_by(|a, b| a.1.dir().cmp(b.1.dir()));
        let mut disks = Vec::new();
        for (container, _) in &sorted {
            self.disks().leaving().refuse(container)?;
            disks.push(self.disks().live(container)?);
        }
        // They may have been waited for.
        for (container, _) in &sorted {
            self.disks().leaving().refuse(container)?;
        }
        let lives: Vec<_> = sorted
            .iter()
            .zip(&disks)
            .map(|((_, place), disk)| Live {
                place,
                disk: disk.disk(),
            })
            .collect();
        let new = NewSnapshot {
            name: request.name.clone(),
            description: request.description.clone(),
            ..NewSnapshot::default()
        };
        let taken = snapshot::take_group(&lives, &new)?;
        Ok(taken.into_iter().map(|t| self.taken(t)).collect())
    }

    fn snapshot_rename(
        &self,
        container: &str,
        snapshot: &str,
        request: &Rename,
    ) -> Result<Snapshot> {
        let (place, node) = self.node(container, snapshot)?;
        let (name, text) = (request.name.as_deref(), request.description.as_deref());
        self.as_it_is(container, |place, _| {
            rename::describe(place, node, name, text)
        })?;
        let guid = node.to_string();
        let found = tree::list(&place)?.into_iter().find(|s| s.guid == guid);
        found
            .map(Snapshot::from)
            .ok_or_else(|| Error::new(Kind::NotFound, "the snapshot is gone").on(place.dir()))
    }

    fn snapshot_delete(&self, container: &str, snapshot: &str, job: &JobHandle) -> Result<Ended> {
        let Some(_working) = self.turn(container, job) else {
            return Ok(Ended::Cancelled);
        };
        let (place, node) = self.node(container, snapshot)?;
        self.refuse_exported(container, &place, node)?;
        let disk = self.disks().live(container)?;
        if job.cancelled() {
            return Ok(Ended::Cancelled);
        }
        let live = Live {
            place: &place,
            disk: disk.disk(),
        };
        let before = delete::data_of(&place)?;
        match delete::delete(live, node)? {
            Deleted::Gone => {
                let freed = before.saturating_sub(delete::data_of(&place)?);
                match self.run_on(&place, &disk, job, None)? {
                    // What hung on nothing any more went with it.
                    Ended::Done(_) => Ok(Ended::Done(format!("{freed} bytes freed"))),
                    other => Ok(other),
                }
            }
            Deleted::Hidden(n) => Ok(Ended::Done(format!(
                "hidden, 0 bytes freed: {n} {} it; it goes when they no longer do",
                if n == 1 { "other needs" } else { "others need" }
            ))),
            Deleted::Merging => self.run_on(&place, &disk, job, None),
        }
    }

    fn switch(&self, container: &str, request: &Switch) -> Result<Switched> {
        let place = self.disks().place(container)?;
        let d = place.descriptor()?;
        // Before anybody's connection is ended for it.
        if place.find(&d, &place.meta()?, &request.snapshot)? == d.top {
            let what = format!(
                "{} is the top of the disk: it is what the disk shows now",
                d.top
            );
            return Err(Error::invalid(what).on(place.dir()));
        }
        let (_door, _working, ended) = self.alone(container, Some(request.force))?;
        let options = SwitchOptions {
            to: request.snapshot.clone(),
            discard: request.discard,
            keep_as: None,
        };
        let switched = switch::switch(&place, &options)?;
        tracing::info!(container, snapshot = switched.to, ended, "switched");
        Ok(Switched {
            snapshot: switched.to,
            kept: switched.kept.map(|k| k.name.unwrap_or(k.guid)),
            ended: ended as u64,
            note: Some(switched.notes.join("; ")).filter(|n| !n.is_empty()),
        })
    }

    fn resize(&self, container: &str, request: &Resize, job: &JobHandle) -> Result<Ended> {
        self.resize_now(container, request, job)
    }

    fn merge(&self, container: &str, request: &Merge, job: &JobHandle) -> Result<Ended> {
        let Some(_working) = self.turn(container, job) else {
            return Ok(Ended::Cancelled);
        };
        let place = self.disks().place(container)?;
        let d = place.descriptor()?;
        let node = match &request.snapshot {
            Some(text) => place.find(&d, &place.meta()?, text)?,
            None => d.top,
        };
        let gone = match request.go_on {
            true => Vec::new(),
            false => delete::below(&place, &d, node, request.all)?,
        };
        for &node in &gone {
            self.refuse_exported(container, &place, node)?;
        }
        let disk = self.disks().live(container)?;
        if job.cancelled() {
            return Ok(Ended::Cancelled);
        }
        for node in gone {
            let live = Live {
                place: &place,
                disk: disk.disk(),
            };
            delete::delete(live, node)?;
        }
        self.run_on(&place, &disk, job, request.rate)
    }

    fn go_on(&self, container: &str, job: &JobHandle) -> Result<Ended> {
        self.run_left(container, job)
    }

    fn disk_space(&self, container: &str) -> Result<DiskSpace> {
        self.space_of(container)
    }

    fn compact(&self, container: &str, request: &Compact, job: &JobHandle) -> Result<Ended> {
        self.compact_now(container, request, job)
    }

    fn templates(&self) -> Result<Vec<Template>> {
        let all = list::templates(self.root()?)?;
        Ok(all.into_iter().map(Template::from).collect())
    }

    fn template(&self, template: &str) -> Result<Template> {
        list::template(self.root()?, template).map(Template::from)
    }

    fn template_remove(&self, template: &str) -> Result<Removed> {
        remove::remove_template(self.root()?, template)?;
        Ok(Removed {
            name: template.to_owned(),
            freed: None,
        })
    }

    fn template_verify(&self, name: &str, job: &JobHandle) -> Result<Ended> {
        let verified = template::verify(self.root()?, name, &|done, total| {
            job.progress(done, total);
        })?;
        match (verified.ok, verified.expected) {
            (true, _) => Ok(Ended::Done(format!("{name} is {}", verified.content))),
            (false, None) => {
                let what = format!(
                    "template {name} has no recorded hash: it is {}",
                    verified.content
                );
                Err(Error::unsupported(what).fix("Import it anew to have one"))
            }
            (false, Some(expected)) => {
                let what = format!(
                    "template {name} is damaged: its content is {}, recorded is {expected}",
                    verified.content
                );
                Err(Error::corrupt(what)
                    .fix("Import it anew under another name, and clone from that"))
            }
        }
    }

    fn template_flatten(&self, name: &str, job: &JobHandle) -> Result<Ended> {
        let done = template::flatten(
            self.root()?,
            name,
            &|done, total| job.progress(done, total),
            &|| job.cancelled(),
        )?;
        Ok(match done {
            None => Ended::Cancelled,
            Some(f) => Ended::Done(format!(
                "{} layers became one, {} bytes copied",
                f.layers, f.copied
            )),
        })
    }
}
