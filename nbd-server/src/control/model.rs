//! What goes over the wire. Times are seconds since 1970, sizes bytes; fields that are unknown to a
//! reader are ignored, missing ones have their defaults: both sides may be of different versions.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::serve::Config;

mod backup;
mod checked;
mod host;
mod limits;
mod migrate;
mod resize;
mod space;
mod tracker;
mod tree;

pub use super::failure::Failure;
pub use backup::{Backup, BackupFormat, BackupRun, BackupStart};
pub use checked::{Checked, Found};
pub use host::Space;
pub use limits::{Limits, LimitsChange};
pub use migrate::{
    Decision, Migrate, MigrateHolder, Migration, MigrationPhase, Moved, Resolve, Resolved,
};
pub use resize::{Resize, Resized};
pub use space::{Compact, DiskSpace};
pub use tracker::{Tracker, TrackerChange, TrackerMerge, TrackerStart};
pub use tree::{
    GroupOf, GroupSnapshot, Merge, Node, Rename, Snapshot, SnapshotCreate, SnapshotTaken, Switch,
    Switched, Tree,
};

/// The service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Info {
    /// Version of the program.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Its name: `ploopd`, or `ploop serve`.
    pub program: String,
    /// The store that it serves, if it serves a whole one.
    #[serde(default)]
    pub root: Option<String>,
    /// When it was started.
    pub started: u64,
    /// True when containers too are served read-only.
    pub read_only: bool,
    /// NBD connections at once.
    pub max_connections: u32,
    /// Open files that the operating system allows it.
    pub open_files_limit: u64,
    /// How it executes requests: `inline`, `uring` or `portable`.
    #[serde(default)]
    pub engine: String,
}

impl Info {
    /// What can be said of this process, which starts now and serves as `config` says.
    pub fn of_this_process(config: &Config) -> Info {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Info {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            started: now.map_or(0, |d| d.as_secs()),
            max_connections: config.max_connections,
            engine: config.engine.name().into(),
            ..Info::default()
        }
    }
}

/// What kind of thing an export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExportKind {
    /// A container's live disk.
    Container,
    /// A snapshot of a container, read-only.
    Snapshot,
    /// A template, read-only.
    Template,
    /// A single disk or image.
    Disk,
}

/// What an NBD client can open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Export {
    /// The name that opens it.
    pub name: String,
    /// What it is.
    pub kind: ExportKind,
    /// The disk is open.
    pub open: bool,
    /// Clients connected to it.
    #[serde(default)]
    pub clients: u64,
}

/// A client of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Connection {
    /// Its number.
    pub id: u64,
    /// The export.
    pub export: String,
    /// Who it is, as far as the socket tells.
    pub peer: String,
    /// When it came.
    pub since: u64,
    /// READ requests; a long one counts once for each piece.
    pub reads: u64,
    /// Bytes in them.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes in them.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// At work.
    Running,
    /// At work, and told to stop.
    Cancelling,
    /// Stopped where it cannot be undone; it goes on when it is started again.
    Paused,
    /// Done.
    Done,
    /// Failed; the job has an error.
    Failed,
    /// Stopped, and nothing was changed.
    Cancelled,
}

impl JobState {
    /// All states, in the order in which they are shown.
    pub const ALL: [JobState; 6] = [
        JobState::Running,
        JobState::Cancelling,
        JobState::Paused,
        JobState::Done,
        JobState::Failed,
        JobState::Cancelled,
    ];

    /// True for a job that does nothing any more.
    pub fn is_over(self) -> bool {
        !matches!(self, JobState::Running | JobState::Cancelling)
    }

    /// Its name in JSON, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            JobState::Running => "running",
            JobState::Cancelling => "cancelling",
            JobState::Paused => "paused",
            JobState::Done => "done",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }
}

/// Work that takes long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// `delete`, `merge`, `compact`, `resize`, `migrate`, `verify` or `flatten`.
    pub kind: String,
    /// On which container; `template:NAME` for a template.
    pub container: String,
    /// What exactly, for people.
    pub what: String,
    /// Where it is.
    pub state: JobState,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all; 0 when that is not known yet.
    pub total: u64,
    /// Bytes per second: of late while it runs, on the whole after it.
    pub rate: u64,
    /// When it was started.
    pub started: u64,
    /// When it ended.
    #[serde(default)]
    pub ended: Option<u64>,
    /// What came out, for people.
    #[serde(default)]
    pub message: Option<String>,
    /// What a `resize` came to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resized: Option<Resized>,
    /// Where a `migrate` is, or what it came to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migration>,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<Failure>,
}

/// To make containers: from a template, or from a snapshot of another container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateContainers {
    /// Their names; with `count`, one name that numbers are put behind.
    pub names: Vec<String>,
    /// How many.
    #[serde(default)]
    pub count: Option<u32>,
    /// The template.
    #[serde(default)]
    pub template: Option<String>,
    /// The other container: `NAME`, or `NAME@SNAPSHOT`.
    #[serde(default)]
    pub from: Option<String>,
    /// Virtual size in bytes.
    #[serde(default)]
    pub size: Option<u64>,
}

/// A container that was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedContainer {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// The layer that grows partition and filesystem, if this size needed one.
    #[serde(default)]
    pub grown: Option<GrownLayer>,
}

/// A layer that all containers of one template and size share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GrownLayer {
    /// Bytes of data in it.
    pub data: u64,
    /// An earlier container had made it.
    pub cached: bool,
}

/// What a container takes of its host, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// Whose it is.
    pub container: String,
    /// What is charged: granules of 4 KiB that hold data, of its images and its journal.
    pub charged: u64,
    /// What may be; 0 without a quota.
    #[serde(default)]
    pub quota: u64,
    /// What the host has given its files, with room taken ahead.
    pub host: u64,
}

/// A quota that is in force: what its container takes now, as far as memory knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuotaNow {
    /// Whose it is.
    pub container: String,
    /// What is charged, in bytes.
    pub charged: u64,
    /// What may be, in bytes.
    pub quota: u64,
    /// Requests that needed more, since the container was opened.
    pub refused: u64,
}

/// To change a quota.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuotaChange {
    /// What may be charged, in bytes; 0 for no quota.
    pub quota: u64,
}

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// Its name.
    pub name: String,
    /// Bytes that this gave back, where that is known.
    #[serde(default)]
    pub freed: Option<u64>,
}

/// A container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Container {
    /// Its name, which is also its export's.
    pub name: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of data in its own files.
    pub data: u64,
    /// The template that it stands on, while that exists.
    #[serde(default)]
    pub template: Option<String>,
    /// Images from base to top.
    pub depth: u64,
    /// What may be charged, in bytes; 0 without a quota.
    #[serde(default)]
    pub quota: u64,
    /// A move of it that has not ended.
    #[serde(default, rename = "move", skip_serializing_if = "Option::is_none")]
    pub moving: Option<UnendedMove>,
    /// Why the rest is not known: it is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A move that has not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnendedMove {
    /// `offered`, `given`, `arriving`, `ready` or `taken`.
    pub state: String,
    /// The move.
    pub id: String,
    /// One more with every owner.
    pub epoch: u64,
    /// Where the other side is.
    pub peer: String,
    /// Bytes that are still to come from there: until then the container needs it.
    #[serde(default)]
    pub missing: u64,
}

impl From<snapshots::moving::Unended> for UnendedMove {
    fn from(m: snapshots::moving::Unended) -> UnendedMove {
        UnendedMove {
            state: m.state.to_owned(),
            id: m.id,
            epoch: m.epoch,
            peer: m.peer,
            missing: m.missing,
        }
    }
}

impl From<snapshots::list::ContainerEntry> for Container {
    fn from(e: snapshots::list::ContainerEntry) -> Container {
        Container {
            name: e.name,
            size: e.size,
            data: e.data,
            template: e.template,
            depth: e.depth as u64,
            quota: e.quota,
            moving: e.moving.map(UnendedMove::from),
            error: e.error,
        }
    }
}

/// A template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of data in its layer.
    pub data: u64,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Containers that are cloned from it.
    pub clones: u64,
    /// Its layers, base first.
    #[serde(default)]
    pub layers: Vec<Layer>,
    /// The hash of its content, where it was recorded.
    #[serde(default)]
    pub content: Option<String>,
    /// `ext4`, when it was built from a root filesystem.
    #[serde(default)]
    pub filesystem: Option<String>,
    /// First byte of the filesystem.
    pub partition_offset: u64,
    /// The filesystem was given user and group quota.
    #[serde(default)]
    pub user_quota: bool,
    /// When it was imported.
    pub created: u64,
    /// What it was imported from.
    pub source: String,
}

impl From<snapshots::list::TemplateEntry> for Template {
    fn from(e: snapshots::list::TemplateEntry) -> Template {
        Template {
            name: e.name,
            size: e.size,
            data: e.data,
            cluster: e.cluster,
            clones: e.clones as u64,
            layers: e.layers.into_iter().map(Layer::from).collect(),
            content: e.content,
            filesystem: e.filesystem,
            partition_offset: e.partition_offset,
            user_quota: e.user_quota,
            created: e.created,
            source: e.source,
        }
    }
}

/// A layer of a template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Layer {
    /// Its id, and its directory in `layers`.
    pub id: String,
    /// Bytes of data in it.
    pub data: u64,
    /// Disks that stand on it: containers and templates.
    pub disks: u64,
}

impl From<snapshots::list::LayerEntry> for Layer {
    fn from(e: snapshots::list::LayerEntry) -> Layer {
        Layer {
            id: e.id,
            data: e.data,
            disks: e.disks as u64,
        }
    }
}

/// How long to wait for a job.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Wait {
    /// Answer when the job is over, or after this many seconds; more than 30 count as 30.
    #[serde(default)]
    pub wait: Option<f64>,
}

/// How to remove a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Force {
    /// End the connections of the clients that use it.
    #[serde(default)]
    pub force: bool,
}
