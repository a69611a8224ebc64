//! Backups on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The format of a backup's file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum BackupFormat {
    /// What QEMU calls so.
    #[default]
    Qcow2,
    /// The guest's bytes.
    Raw,
    /// ploop v2.
    Ploop,
}

/// To begin a backup of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupStart {
    /// The new file, by its whole path on the service's host. Must not exist.
    pub target: String,
    /// Its format; an increment is qcow2.
    #[serde(default)]
    pub format: BackupFormat,
    /// A tracker to begin, or to clear, at the backup's instant.
    #[serde(default)]
    pub tracker: Option<String>,
    /// Bytes that a bit of a tracker that begins stands for; 65536 unless it is said.
    #[serde(default)]
    pub granularity: Option<u64>,
    /// A tracker: only what was written since the last backup with it. It is cleared at this one's
    /// instant.
    #[serde(default)]
    pub since: Option<String>,
    /// Where the last backup's file is now, if it was moved.
    #[serde(default)]
    pub base: Option<String>,
    /// Hash all that the increment's chain shows: reads all of the disk's data.
    #[serde(default)]
    pub content: bool,
}

/// A backup that has begun and not ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Backup {
    /// Its id, a UUID.
    pub id: String,
    /// The container.
    pub container: String,
    /// The file that it becomes.
    pub target: String,
    /// That file's format.
    pub format: BackupFormat,
    /// The instant that it shows, in seconds since 1970.
    pub time: u64,
    /// The tracker that was begun or cleared at that instant.
    #[serde(default)]
    pub tracker: Option<String>,
    /// The file that it is an increment on.
    #[serde(default)]
    pub base: Option<String>,
    /// It had begun before, and goes on.
    #[serde(default)]
    pub resumed: bool,
    /// How long writers waited at most for its instant, in seconds; 0 of one that goes on.
    #[serde(default)]
    pub pause: f64,
}

/// To copy a backup that has begun.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupRun {
    /// Bytes per second at most.
    #[serde(default)]
    pub rate: Option<u64>,
}

impl From<snapshots::backup::Format> for BackupFormat {
    fn from(f: snapshots::backup::Format) -> BackupFormat {
        match f {
            snapshots::backup::Format::Qcow2 => BackupFormat::Qcow2,
            snapshots::backup::Format::Raw => BackupFormat::Raw,
            snapshots::backup::Format::Ploop => BackupFormat::Ploop,
        }
    }
}

impl From<BackupFormat> for snapshots::backup::Format {
    fn from(f: BackupFormat) -> Self {
        match f {
            BackupFormat::Qcow2 => snapshots::backup::Format::Qcow2,
            BackupFormat::Raw => snapshots::backup::Format::Raw,
            BackupFormat::Ploop => snapshots::backup::Format::Ploop,
        }
    }
}

impl From<&BackupStart> for snapshots::backup::Request {
    fn from(s: &BackupStart) -> Self {
        snapshots::backup::Request {
            target: s.target.clone().into(),
            format: s.format.into(),
            tracker: s.tracker.clone(),
            granularity: s.granularity,
            since: s.since.clone(),
            base: s.base.clone().map(Into::into),
            content: s.content,
        }
    }
}

impl Backup {
    /// Of a container.
    pub fn of(container: &str, p: snapshots::backup::Pending) -> Backup {
        Backup {
            id: p.id,
            container: container.to_owned(),
            target: p.target.display().to_string(),
            format: p.format.into(),
            time: p.time,
            tracker: p.tracker.map(|u| u.name),
            base: p.base.map(|b| b.file.display().to_string()),
            resumed: false,
            pause: 0.0,
        }
    }
}
