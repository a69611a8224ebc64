//! What can be typed about backups.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Hooks, Json, OfDisk};
use crate::output::parse_size;

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct BackupArgs {
    #[command(subcommand)]
    pub command: Option<Backup>,
    #[command(flatten)]
    pub new: NewBackup,
}

impl BackupArgs {
    pub(crate) fn wants_json(&self) -> bool {
        match &self.command {
            Some(Backup::Verify { json, .. } | Backup::List(OfDisk { json, .. })) => json.json,
            None => self.new.json.json,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Backup {
    /// Compare a backup, and all that it stands on, with what was recorded when it was made.
    Verify {
        /// The backup's file.
        file: PathBuf,
        #[command(flatten)]
        json: Json,
    },
    /// List the backups of a disk that have begun and not ended.
    List(OfDisk),
}

#[derive(Args, Debug)]
pub(crate) struct NewBackup {
    /// The container, or the disk directory.
    #[arg(required = true)]
    pub disk: Option<String>,
    /// The new file; must not exist. One that was cut goes on.
    #[arg(required = true)]
    pub target: Option<PathBuf>,
    /// Only what was written since the last backup with this tracker; it is cleared at this one's
    /// instant.
    #[arg(long, value_name = "TRACKER", conflicts_with = "tracker")]
    pub since: Option<String>,
    /// Begin this tracker, or clear it, at the backup's instant: for an increment on it.
    #[arg(long, value_name = "NAME")]
    pub tracker: Option<String>,
    /// Bytes that a bit of a tracker that begins stands for [default: 64K].
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "tracker")]
    pub granularity: Option<u64>,
    /// Where the last backup's file is now, if it was moved.
    #[arg(long, value_name = "FILE", requires = "since")]
    pub base: Option<PathBuf>,
    /// The file's format; an increment is qcow2.
    #[arg(long, value_enum, default_value = "qcow2")]
    pub to: BackupTo,
    /// Record the hash of all that an increment's chain shows, too: reads all of the disk's data.
    #[arg(long)]
    pub content: bool,
    #[command(flatten)]
    pub hooks: Hooks,
    /// Bytes per second, at most.
    #[arg(long, value_parser = parse_size)]
    pub rate: Option<u64>,
    /// Drop one that has begun; its tracker has its bits again.
    #[arg(long)]
    pub abandon: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackupTo {
    Qcow2,
    Raw,
    Ploop,
}

#[derive(Args, Debug)]
pub(crate) struct Restore {
    /// The last backup alone, or its whole chain, base first.
    #[arg(required = true, num_args = 1.., value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// The new container.
    #[arg(required = true, value_name = "CONTAINER")]
    pub name: Option<String>,
    #[command(flatten)]
    pub json: Json,
}
