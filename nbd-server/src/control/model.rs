//! What goes over the wire. Times are seconds since 1970, sizes bytes; fields that are unknown to a
//! reader are ignored, missing ones have their defaults: both sides may be of different versions.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

pub use super::failure::Failure;

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// `delete`, `merge`, `verify` or `flatten`.
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
    /// Why it failed.
    #[serde(default)]
    pub error: Option<Failure>,
}

/// The group that a snapshot was made with, at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupOf {
    /// The same in all of them.
    pub id: String,
    /// Its containers.
    pub members: Vec<String>,
    /// Each of them has its snapshot: it was not cut half-way, and none was deleted since.
    pub whole: bool,
}

/// A snapshot of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Its GUID.
    pub guid: String,
    /// Its name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default)]
    pub description: String,
    /// When it was made, if that is known.
    #[serde(default)]
    pub created: Option<u64>,
    /// The snapshot below.
    #[serde(default)]
    pub parent: Option<String>,
    /// The live disk stands on it.
    pub current: bool,
    /// It is being removed.
    #[serde(default)]
    pub temporary: bool,
    /// The group that it was made with, if it was.
    #[serde(default)]
    pub group: Option<GroupOf>,
}

/// A snapshot that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotTaken {
    /// Of which container.
    pub container: String,
    /// Its GUID.
    pub guid: String,
    /// Its name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// How long writers had to wait, in seconds.
    pub pause: f64,
    /// Images from base to top, now.
    pub depth: u64,
    /// What the user should know.
    #[serde(default)]
    pub note: Option<String>,
}

/// A container's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tree {
    /// The container.
    pub container: String,
    /// Its nodes, parents before children.
    pub nodes: Vec<Node>,
}

/// A node of a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its GUID.
    pub guid: String,
    /// Its name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default)]
    pub description: String,
    /// When it was made, if that is known.
    #[serde(default)]
    pub created: Option<u64>,
    /// The node below.
    #[serde(default)]
    pub parent: Option<String>,
    /// It is the live disk.
    pub top: bool,
    /// It is kept only because others stand on it, or is being removed.
    #[serde(default)]
    pub hidden: bool,
    /// Its image's file.
    pub file: String,
    /// Other disks use its image too.
    pub shared: bool,
    /// Bytes that only this node's disk uses.
    pub exclusive_bytes: u64,
    /// Bytes that other disks use too.
    pub shared_bytes: u64,
    /// Bytes that deleting the node gives back.
    pub freed_if_deleted: u64,
}

/// To make a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Its name; unique in the container.
    #[serde(default)]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default)]
    pub description: String,
}

/// To make snapshots of several containers at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupSnapshot {
    /// The containers.
    pub containers: Vec<String>,
    /// The name of each.
    #[serde(default)]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default)]
    pub description: String,
}

/// To switch a container to a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// GUID or name of the snapshot.
    pub snapshot: String,
    /// Throw away what was written since the last snapshot, instead of keeping it.
    #[serde(default)]
    pub discard: bool,
    /// End the connections of the clients that use it.
    #[serde(default)]
    pub force: bool,
}

/// What a switch did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Switched {
    /// GUID of the snapshot that the live disk now stands on.
    pub snapshot: String,
    /// GUID of the snapshot that keeps what was abandoned.
    #[serde(default)]
    pub kept: Option<String>,
    /// Connections that were ended.
    #[serde(default)]
    pub ended: u64,
    /// What the user should know.
    #[serde(default)]
    pub note: Option<String>,
}

/// To merge a node with its parent, which goes, or with all of its chain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// GUID or name of the node; the live disk when not given.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// Merge all, down to the base.
    #[serde(default)]
    pub all: bool,
    /// Only go on with what was begun before.
    #[serde(default)]
    pub go_on: bool,
    /// Bytes per second at most.
    #[serde(default)]
    pub rate: Option<u64>,
}

/// To change what a snapshot is called; what is missing stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rename {
    /// Its new name; the empty one takes the name away.
    #[serde(default)]
    pub name: Option<String>,
    /// Its new description.
    #[serde(default)]
    pub description: Option<String>,
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
    /// Why the rest is not known: it is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl From<snapshots::list::ContainerEntry> for Container {
    fn from(e: snapshots::list::ContainerEntry) -> Container {
        Container {
            name: e.name,
            size: e.size,
            data: e.data,
            template: e.template,
            depth: e.depth as u64,
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

impl From<snapshots::tree::Snapshot> for Snapshot {
    fn from(s: snapshots::tree::Snapshot) -> Snapshot {
        Snapshot {
            guid: s.guid,
            name: s.name,
            description: s.description,
            created: Some(s.created).filter(|c| *c > 0),
            parent: s.parent,
            current: s.current,
            temporary: false,
            group: s.group.map(|g| GroupOf {
                id: g.id,
                members: g.members,
                whole: false,
            }),
        }
    }
}

impl From<snapshots::tree::Node> for Node {
    fn from(n: snapshots::tree::Node) -> Node {
        Node {
            guid: n.guid,
            name: n.name,
            description: n.description,
            created: Some(n.created).filter(|c| *c > 0),
            parent: n.parent,
            top: n.top,
            hidden: n.hidden,
            file: n.file,
            shared: n.references.is_some(),
            exclusive_bytes: n.exclusive,
            shared_bytes: n.shared,
            freed_if_deleted: n.freed_if_deleted.unwrap_or(0),
        }
    }
}
