//! Who does an operation: the process that has the disk, or this one.
//!
//! The lock of a disk says who holds it and where that process answers. When nobody does, this
//! process opens the disk itself, does the same work on the same code, and closes it again. What the
//! caller gets is the same either way.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::error::{Error, Kind, Result};
use ploop::locks::DiskLock;
use serde::Serialize;
use serde::de::DeserializeOwned;
use snapshots::Root;

use super::client::{Client, resource};
use super::jobs::{Ended, JobHandle, Jobs};
use super::metrics::Meter;
use super::model::{
    Backup, BackupRun, BackupStart, Checked, Compact, CreateContainers, CreatedContainer,
    DiskSpace, Export, GroupSnapshot, Job, Limits, LimitsChange, Merge, Migrate, Quota,
    QuotaChange, QuotaNow, Removed, Rename, Resize, Resolve, Resolved, Snapshot, SnapshotCreate,
    SnapshotTaken, Switch, Switched, Tracker, TrackerChange, TrackerStart, Tree,
};
use super::ops::Operations;
use super::steward::{Parts, operations};
use crate::export::Disks;
use crate::serve::{Config, Server};

/// The control socket's name in a store.
const SOCKET: &str = "control.sock";

/// How often a local job's progress is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// See the module text. Names of containers are those of the store, or for a single disk the one
/// that [`Agent::name`] gives. All methods block.
#[derive(Debug)]
pub struct Agent {
    name: Option<String>,
    who: Who,
}

#[derive(Debug)]
enum Who {
    /// A process that answers the control API.
    There(Box<Client>),
    /// This process.
    Here {
        operations: Arc<dyn Operations>,
        jobs: Jobs,
    },
}

/// What follows the progress of a job: bytes done, bytes in all.
pub type Follow<'a> = &'a mut dyn FnMut(u64, u64);

impl Agent {
    /// For the store at `root`, and there for `containers`. Error: `InUse` when one of them is held
    /// by a process that does not answer.
    pub fn of_store(root: &Path, containers: &[&str]) -> Result<Agent> {
        let root = Root::open(root, false)?;
        for container in containers {
            snapshots::name::check(container)?;
            if let Some(client) = holder(&root.container(container))? {
                return Ok(Agent {
                    name: name_there(&client, container)?,
                    who: Who::There(Box::new(client)),
                });
            }
        }
        // The store's service opens a disk once for its clients and for the work on it.
        if !containers.is_empty()
            && let Some(client) = service(root.dir())
        {
            return Ok(Agent {
                name: containers.first().map(|&c| c.to_owned()),
                who: Who::There(Box::new(client)),
            });
        }
        let disks = Disks::new(root, false);
        Ok(Agent::here(
            disks,
            containers.first().map(|&c| c.to_owned()),
        ))
    }

    /// For a disk directory. `name`: what it is called in messages.
    pub fn of_disk(name: &str, source: Source, options: OpenOptions) -> Result<Agent> {
        let dir = source.path.parent().unwrap_or(Path::new("."));
        if let Some(client) = holder(dir)? {
            return Ok(Agent {
                name: name_there(&client, name)?,
                who: Who::There(Box::new(client)),
            });
        }
        let options = OpenOptions {
            write: true,
            ..options
        };
        let disks = Disks::of_disk(Opener::host(), name, source, options);
        Ok(Agent::here(disks, Some(name.to_owned())))
    }

    /// The service at a control socket. Error: `NotFound` when there is none.
    pub fn at(socket: &Path) -> Result<Agent> {
        Ok(Agent {
            name: None,
            who: Who::There(Box::new(Client::connect(socket)?)),
        })
    }

    fn here(disks: Disks, name: Option<String>) -> Agent {
        let disks = Arc::new(disks);
        let server = Server::new(disks.clone(), Config::default());
        let parts = Parts {
            disks,
            connections: server.connections(),
            meter: Arc::new(Meter::default()),
            tls: None,
        };
        Agent {
            name,
            who: Who::Here {
                operations: operations(parts),
                jobs: Jobs::default(),
            },
        }
    }

    /// What the container that it was made for is called there.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    /// True when it can do what changes the set of disks, not only one disk.
    pub fn is_of_store(&self) -> bool {
        match &self.who {
            Who::There(client) => client.info().root.is_some(),
            Who::Here { operations, .. } => operations.templates().is_ok(),
        }
    }

    /// The service, where it is one.
    pub fn client(&self) -> Option<&Client> {
        match &self.who {
            Who::There(client) => Some(client),
            Who::Here { .. } => None,
        }
    }

    /// [`Operations::snapshots`].
    pub fn snapshots(&self, container: &str) -> Result<Vec<Snapshot>> {
        self.get(&["containers", container, "snapshots"], |o| {
            o.snapshots(container)
        })
    }

    /// [`Operations::tree`].
    pub fn tree(&self, container: &str) -> Result<Tree> {
        self.get(&["containers", container, "tree"], |o| o.tree(container))
    }

    /// [`Operations::check`].
    pub fn check(&self, container: &str) -> Result<Checked> {
        self.post(&["containers", container, "check"], &(), |o| {
            o.check(container)
        })
    }

    /// [`Operations::snapshot_create`].
    pub fn snapshot_create(&self, container: &str, new: &SnapshotCreate) -> Result<SnapshotTaken> {
        self.post(&["containers", container, "snapshots"], new, |o| {
            o.snapshot_create(container, new)
        })
    }

    /// [`Operations::snapshot_group`].
    pub fn snapshot_group(&self, group: &GroupSnapshot) -> Result<Vec<SnapshotTaken>> {
        self.post(&["group-snapshots"], group, |o| o.snapshot_group(group))
    }

    /// [`Operations::snapshot_rename`].
    pub fn rename(&self, container: &str, snapshot: &str, to: &Rename) -> Result<Snapshot> {
        match &self.who {
            Who::There(client) => client.patch(
                &resource(&["containers", container, "snapshots", snapshot]),
                to,
            ),
            Who::Here { operations, .. } => operations.snapshot_rename(container, snapshot, to),
        }
    }

    /// [`Operations::quota`].
    pub fn quota(&self, container: &str) -> Result<Quota> {
        self.get(&["containers", container, "quota"], |o| o.quota(container))
    }

    /// [`Operations::quota_change`].
    pub fn set_quota(&self, container: &str, to: &QuotaChange) -> Result<Quota> {
        match &self.who {
            Who::There(client) => client.patch(&resource(&["containers", container, "quota"]), to),
            Who::Here { operations, .. } => operations.quota_change(container, to),
        }
    }

    /// [`Operations::trackers`].
    pub fn trackers(&self, container: &str) -> Result<Vec<Tracker>> {
        let path = ["containers", container, "trackers"];
        self.get(&path, |o| o.trackers(container))
    }

    /// [`Operations::tracker_start`].
    pub fn start_tracker(&self, container: &str, request: &TrackerStart) -> Result<Tracker> {
        match &self.who {
            Who::There(client) => {
                client.post(&resource(&["containers", container, "trackers"]), request)
            }
            Who::Here { operations, .. } => operations.tracker_start(container, request),
        }
    }

    /// [`Operations::tracker_change`].
    pub fn change_tracker(
        &self,
        container: &str,
        tracker: &str,
        change: &TrackerChange,
    ) -> Result<Tracker> {
        let path = ["containers", container, "trackers", tracker];
        match (&self.who, change) {
            (Who::Here { operations, .. }, _) => {
                operations.tracker_change(container, tracker, change)
            }
            (Who::There(client), TrackerChange::Stop) => client.delete(&resource(&path)),
            (Who::There(client), TrackerChange::Clear) => {
                let path = [&path[..], &["clear"]].concat();
                client.post(&resource(&path), &serde_json::json!({}))
            }
            (Who::There(client), TrackerChange::Merge(merge)) => {
                let path = [&path[..], &["merge"]].concat();
                client.post(&resource(&path), merge)
            }
        }
    }

    /// [`Operations::migrate`], to its end. `follow` is called with the job as it goes, and whenever it
    /// waits until what is inside is frozen until [`Agent::migrate_frozen`].
    pub fn migrate(
        &self,
        container: &str,
        to: &Migrate,
        follow: &mut dyn FnMut(&Job),
    ) -> Result<Job> {
        let (id, client) = match &self.who {
            Who::There(client) => {
                let path = resource(&["containers", container, "migrate"]);
                let job: Job = client.post(&path, to)?;
                (job.id, Some(client))
            }
            Who::Here { operations, jobs } => {
                let (operations, to) = (operations.clone(), to.clone());
                let (name, what) = (container.to_owned(), to.to.clone());
                let work = move |job: &JobHandle| operations.migrate(&name, &to, job);
                (jobs.start("migrate", container, &what, work)?, None)
            }
        };
        match (client, &self.who) {
            (Some(client), _) => client.wait(id, follow),
            (None, Who::Here { jobs, .. }) => watched(jobs, id, follow),
            (None, Who::There(_)) => Err(Error::invalid("a job of nobody")),
        }
    }

    /// Tells a job to stop; does not wait. Error: `NotFound`.
    pub fn cancel(&self, job: u64) -> Result<Job> {
        match &self.who {
            Who::There(client) => {
                let path = resource(&["jobs", &job.to_string(), "cancel"]);
                client.post(&path, &serde_json::json!({}))
            }
            Who::Here { jobs, .. } => jobs.cancel(job),
        }
    }

    /// [`Operations::migrate_frozen`].
    pub fn migrate_frozen(&self, container: &str) -> Result<()> {
        let path = ["containers", container, "migrate", "frozen"];
        self.post(&path, &serde_json::json!({}), |o| {
            o.migrate_frozen(container)
        })
    }

    /// [`Operations::migrate_resolve`].
    pub fn migrate_resolve(&self, container: &str, to: &Resolve) -> Result<Resolved> {
        let path = ["containers", container, "migrate", "resolve"];
        self.post(&path, to, |o| o.migrate_resolve(container, to))
    }

    /// [`Operations::backups`].
    pub fn backups(&self, container: &str) -> Result<Vec<Backup>> {
        let path = ["containers", container, "backups"];
        self.get(&path, |o| o.backups(container))
    }

    /// [`Operations::backup_begin`].
    pub fn begin_backup(&self, container: &str, new: &BackupStart) -> Result<Backup> {
        let path = ["containers", container, "backups"];
        self.post(&path, new, |o| o.backup_begin(container, new))
    }

    /// [`Operations::backup_run`], to its end.
    pub fn run_backup(
        &self,
        container: &str,
        id: &str,
        how: &BackupRun,
        follow: Follow<'_>,
    ) -> Result<Job> {
        if let Who::There(client) = &self.who {
            let path = resource(&["containers", container, "backups", id, "run"]);
            let job: Job = client.post(&path, how)?;
            return client.wait(job.id, |j| follow(j.done, j.total));
        }
        let (name, id, how) = (container.to_owned(), id.to_owned(), how.clone());
        self.run("backup", container, follow, move |o, job| {
            o.backup_run(&name, &id, &how, job)
        })
    }

    /// [`Operations::backup_abandon`], to its end.
    pub fn abandon_backup(&self, container: &str, id: &str, follow: Follow<'_>) -> Result<Job> {
        if let Who::There(client) = &self.who {
            let path = resource(&["containers", container, "backups", id]);
            let job: Job = client.delete(&path)?;
            return client.wait(job.id, |j| follow(j.done, j.total));
        }
        let (name, id) = (container.to_owned(), id.to_owned());
        self.run("abandon", container, follow, move |o, job| {
            o.backup_abandon(&name, &id, job)
        })
    }

    /// What the store's service knows of its containers' charge without a look at any file: bytes, by
    /// name, of those that are open under a quota. Nothing where no service answers that.
    pub fn quotas_in_force(root: &Root) -> HashMap<String, u64> {
        let ask = |client: Client| client.get::<Vec<QuotaNow>>(&resource(&["quotas"])).ok();
        let all = service(root.dir()).and_then(ask).unwrap_or_default();
        all.into_iter().map(|q| (q.container, q.charged)).collect()
    }

    /// [`Operations::limits`].
    pub fn limits(&self, container: &str) -> Result<Limits> {
        self.get(&["containers", container, "limits"], |o| {
            o.limits(container)
        })
    }

    /// [`Operations::limits_change`].
    pub fn set_limits(&self, container: &str, to: &LimitsChange) -> Result<Limits> {
        match &self.who {
            Who::There(client) => client.patch(&resource(&["containers", container, "limits"]), to),
            Who::Here { operations, .. } => operations.limits_change(container, to),
        }
    }

    /// [`Operations::switch`].
    pub fn switch(&self, container: &str, switch: &Switch) -> Result<Switched> {
        self.post(&["containers", container, "switch"], switch, |o| {
            o.switch(container, switch)
        })
    }

    /// [`Operations::create_containers`].
    pub fn create(&self, new: &CreateContainers) -> Result<Vec<CreatedContainer>> {
        self.post(&["containers"], new, |o| o.create_containers(new))
    }

    /// [`Operations::remove_container`].
    pub fn remove(&self, container: &str, force: bool) -> Result<Removed> {
        match &self.who {
            Who::There(client) => {
                let path = resource(&["containers", container]);
                client.delete(&format!("{path}?force={force}"))
            }
            Who::Here { operations, .. } => operations.remove_container(container, force),
        }
    }

    /// [`Operations::snapshot_delete`], to its end.
    pub fn delete(&self, container: &str, snapshot: &str, follow: Follow<'_>) -> Result<Job> {
        if let Who::There(client) = &self.who {
            let path = resource(&["containers", container, "snapshots", snapshot]);
            let job: Job = client.delete(&path)?;
            return client.wait(job.id, |j| follow(j.done, j.total));
        }
        let (name, snapshot) = (container.to_owned(), snapshot.to_owned());
        self.run("delete", container, follow, move |o, job| {
            o.snapshot_delete(&name, &snapshot, job)
        })
    }

    /// [`Operations::space`].
    pub fn disk_space(&self, container: &str) -> Result<DiskSpace> {
        self.get(&["containers", container, "space"], |o| {
            o.disk_space(container)
        })
    }

    /// [`Operations::compact`], to its end.
    pub fn compact(&self, container: &str, to: &Compact, follow: Follow<'_>) -> Result<Job> {
        if let Who::There(client) = &self.who {
            let job: Job = client.post(&resource(&["containers", container, "compact"]), to)?;
            return client.wait(job.id, |j| follow(j.done, j.total));
        }
        let (name, request) = (container.to_owned(), to.clone());
        self.run("compact", container, follow, move |o, job| {
            o.compact(&name, &request, job)
        })
    }

    /// [`Operations::merge`], to its end.
    pub fn merge(&self, container: &str, merge: &Merge, follow: Follow<'_>) -> Result<Job> {
        if let Who::There(client) = &self.who {
            let job: Job = client.post(&resource(&["containers", container, "merge"]), merge)?;
            return client.wait(job.id, |j| follow(j.done, j.total));
        }
        let (name, merge) = (container.to_owned(), merge.clone());
        self.run("merge", container, follow, move |o, job| {
            o.merge(&name, &merge, job)
        })
    }

    /// [`Operations::resize`], to its end.
    pub fn resize(&self, container: &str, to: &Resize, follow: Follow<'_>) -> Result<Job> {
        if let Who::There(client) = &self.who {
            let job: Job = client.post(&resource(&["containers", container, "resize"]), to)?;
            return client.wait(job.id, |j| follow(j.done, j.total));
        }
        let (name, to) = (container.to_owned(), to.clone());
        self.run("resize", container, follow, move |o, job| {
            o.resize(&name, &to, job)
        })
    }

    /// [`Operations::template_verify`], to its end.
    pub fn template_verify(&self, template: &str, follow: Follow<'_>) -> Result<Job> {
        let name = template.to_owned();
        self.run("verify", template, follow, move |o, job| {
            o.template_verify(&name, job)
        })
    }

    /// [`Operations::template_flatten`], to its end.
    pub fn template_flatten(&self, template: &str, follow: Follow<'_>) -> Result<Job> {
        let name = template.to_owned();
        self.run("flatten", template, follow, move |o, job| {
            o.template_flatten(&name, job)
        })
    }

    /// Runs a job of this process.
    fn run(
        &self,
        kind: &str,
        container: &str,
        follow: Follow<'_>,
        work: impl FnOnce(&dyn Operations, &JobHandle) -> Result<Ended> + Send + 'static,
    ) -> Result<Job> {
        let Who::Here { operations, jobs } = &self.who else {
            return Err(Error::unsupported("this is done by the process at hand"));
        };
        let operations = operations.clone();
        let id = jobs.start(kind, container, "", move |job| {
            work(operations.as_ref(), job)
        })?;
        watched(jobs, id, &mut |job| follow(job.done, job.total))
    }

    fn get<T: DeserializeOwned>(
        &self,
        path: &[&str],
        here: impl FnOnce(&dyn Operations) -> Result<T>,
    ) -> Result<T> {
        match &self.who {
            Who::There(client) => client.get(&resource(path)),
            Who::Here { operations, .. } => here(operations.as_ref()),
        }
    }

    fn post<T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: &impl Serialize,
        here: impl FnOnce(&dyn Operations) -> Result<T>,
    ) -> Result<T> {
        match &self.who {
            Who::There(client) => client.post(&resource(path), body),
            Who::Here { operations, .. } => here(operations.as_ref()),
        }
    }
}

/// Follows a job of this process to its end.
fn watched(jobs: &Jobs, id: u64, follow: &mut dyn FnMut(&Job)) -> Result<Job> {
    loop {
        let mut job = jobs.wait(id, LOOK)?;
        follow(&job);
        if let Some(failure) = job.error.take() {
            return Err(failure.into());
        }
        if job.state.is_over() {
            return Ok(job);
        }
    }
}

/// The service of the store in `dir`, if one answers and may write.
fn service(dir: &Path) -> Option<Client> {
    let socket = dir.join(SOCKET);
    let client = socket.exists().then(|| Client::connect(&socket).ok())??;
    let info = client.info();
    let same = info.root.as_deref().map(Path::new) == Some(dir);
    (same && !info.read_only).then_some(client)
}

/// The process that holds the disk in `dir`, if one does. Error: `InUse` when it does not answer.
fn holder(dir: &Path) -> Result<Option<Client>> {
    let Some(holder) = DiskLock::holder(dir)? else {
        return Ok(None);
    };
    let in_use =
        || Error::new(Kind::InUse, format!("the disk is in use by {}", holder.who)).on(dir);
    let Some(control) = &holder.control else {
        return Err(in_use().fix("It answers no control API; wait for its end"));
    };
    Client::connect(control).map(Some).map_err(|e| {
        in_use()
            .caused_by(e)
            .fix("Look at that process, or wait for its end")
    })
}

/// What a container is called by the process that holds it: a service of a single disk has a name
/// of its own for it.
fn name_there(client: &Client, name: &str) -> Result<Option<String>> {
    if client.info().root.is_some() {
        let last = PathBuf::from(name);
        let last = last.file_name().map(|n| n.to_string_lossy().into_owned());
        return Ok(last);
    }
    let exports: Vec<Export> = client.get(&resource(&["exports"]))?;
    let disk = exports.into_iter().find(|e| !e.name.contains('@'));
    Ok(disk.map(|e| e.name))
}
