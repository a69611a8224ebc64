//! What can be typed about trees: `snapshot`, `tree`, `export`, `jobs`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::openvz::OpenvzSnapshot;
use super::{Json, OfDisk};
use crate::output::parse_size;

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    pub command: Option<Snapshot>,
    #[command(flatten)]
    pub openvz: OpenvzSnapshot,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Keep what a disk shows now as a snapshot.
    Create {
        /// The container, or the disk directory; with --group, several.
        #[arg(required = true)]
        disks: Vec<String>,
        /// Its name.
        #[arg(long)]
        name: Option<String>,
        /// A text for people.
        #[arg(long, default_value = "")]
        description: String,
        /// All of them at one instant.
        #[arg(long)]
        group: bool,
        #[command(flatten)]
        json: Json,
    },
    /// List the snapshots of a disk.
    List(OfDisk),
    /// Go back to a snapshot. What was written since stays as a snapshot of its own.
    #[command(visible_alias = "rollback")]
    Switch {
        /// The container, or the disk directory.
        disk: String,
        /// The snapshot: its name or GUID.
        snapshot: String,
        /// Do not keep what was written since.
        #[arg(long)]
        discard: bool,
        /// End the connections of the clients that use the disk.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        json: Json,
    },
    /// Delete a snapshot; other nodes keep what they need of it.
    Delete {
        /// The container, or the disk directory.
        disk: String,
        /// The snapshot: its name or GUID.
        snapshot: String,
        #[command(flatten)]
        json: Json,
    },
    /// Merge a node with its parent, which goes.
    Merge {
        /// The container, or the disk directory.
        disk: String,
        /// The node: a snapshot's name or GUID [default: the live disk].
        snapshot: Option<String>,
        /// With all of its chain that can be.
        #[arg(long)]
        all: bool,
        /// Only go on with what was begun before.
        #[arg(long = "continue", conflicts_with_all = ["all", "snapshot"])]
        go_on: bool,
        /// Bytes per second, at most.
        #[arg(long, value_parser = parse_size)]
        rate: Option<u64>,
        #[command(flatten)]
        json: Json,
    },
    /// Give a snapshot another name; an empty one takes it away.
    Rename {
        /// The container, or the disk directory.
        disk: String,
        /// The snapshot: its name or GUID.
        snapshot: String,
        /// The new name.
        name: String,
    },
    /// Give a snapshot another description.
    Describe {
        /// The container, or the disk directory.
        disk: String,
        /// The snapshot: its name or GUID.
        snapshot: String,
        /// The new text.
        text: String,
    },
}

impl Snapshot {
    pub(super) fn wants_json(&self) -> bool {
        match self {
            Snapshot::Create { json, .. }
            | Snapshot::List(OfDisk { json, .. })
            | Snapshot::Switch { json, .. }
            | Snapshot::Delete { json, .. }
            | Snapshot::Merge { json, .. } => json.json,
            Snapshot::Rename { .. } | Snapshot::Describe { .. } => false,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Tracker {
    /// Show the trackers of a disk, and what they have.
    List(OfDisk),
    /// Begin to track writes, at one instant.
    Start {
        /// The container, or the disk directory.
        disk: String,
        /// The tracker's name.
        name: String,
        /// Bytes that a bit stands for, a power of two [default: 64K].
        #[arg(long, value_parser = parse_size)]
        granularity: Option<u64>,
        #[command(flatten)]
        json: Json,
    },
    /// End a tracker.
    Stop {
        /// The container, or the disk directory.
        disk: String,
        /// The tracker: its name or id.
        name: String,
        #[command(flatten)]
        json: Json,
    },
    /// Forget what a tracker has, at one instant.
    Clear {
        /// The container, or the disk directory.
        disk: String,
        /// The tracker: its name or id.
        name: String,
        #[command(flatten)]
        json: Json,
    },
    /// Add what one tracker has to another.
    Merge {
        /// The container, or the disk directory.
        disk: String,
        /// The tracker that stays as it is.
        from: String,
        /// The tracker that gets more.
        into: String,
        #[command(flatten)]
        json: Json,
    },
}

impl Tracker {
    pub(super) fn wants_json(&self) -> bool {
        match self {
            Tracker::List(OfDisk { json, .. })
            | Tracker::Start { json, .. }
            | Tracker::Stop { json, .. }
            | Tracker::Clear { json, .. }
            | Tracker::Merge { json, .. } => json.json,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct Df {
    /// Containers, or disk directories [default: all of the store, and the store].
    pub disks: Vec<String>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub(crate) struct Compact {
    /// The container, or the disk directory.
    pub disk: String,
    /// Only say what would be given back.
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Bytes per second, at most.
    #[arg(long, value_parser = parse_size)]
    pub rate: Option<u64>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub(crate) struct Tree {
    /// The container, or the disk directory.
    pub disk: String,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub(crate) struct Diff {
    /// The container, or the disk directory, with @SNAPSHOT.
    pub from: String,
    /// Another snapshot, of the same disk or of a clone of the same template; without @SNAPSHOT what
    /// the disk shows now, if nobody uses it [default: so of the same disk].
    pub to: Option<String>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub(crate) struct Export {
    /// The container, or the disk directory, perhaps with @SNAPSHOT.
    pub disk: String,
    /// The new directory or file; must not exist.
    pub target: PathBuf,
    /// `disk`: a directory that OpenVZ's tools open, with every layer in it (without @SNAPSHOT, with
    /// the whole tree); or one file of that format.
    #[arg(long, value_enum, default_value = "disk")]
    pub to: ExportTo,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportTo {
    Disk,
    Raw,
    Ploop,
    Qcow2,
}

#[derive(Args, Debug)]
pub(crate) struct JobsArgs {
    /// Cancel this job.
    #[arg(long, value_name = "JOB")]
    pub cancel: Option<u64>,
    /// The service's control socket [default: control.sock of the store].
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}
