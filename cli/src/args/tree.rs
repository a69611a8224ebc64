//! What can be typed about trees: `snapshot`, `tree`, `export`, `jobs`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::Json;
use super::openvz::OpenvzSnapshot;
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
    List {
        /// The container, or the disk directory.
        disk: String,
        #[command(flatten)]
        json: Json,
    },
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
            | Snapshot::List { json, .. }
            | Snapshot::Switch { json, .. }
            | Snapshot::Delete { json, .. }
            | Snapshot::Merge { json, .. } => json.json,
            Snapshot::Rename { .. } | Snapshot::Describe { .. } => false,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct Tree {
    /// The container, or the disk directory.
    pub disk: String,
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
