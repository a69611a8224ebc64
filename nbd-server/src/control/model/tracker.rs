//! Trackers on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A dirty bitmap of a container's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tracker {
    /// Its name; of another program's, its id.
    pub name: String,
    /// The UUID that it has in files.
    pub id: String,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Bytes that count as written since it was begun or cleared; of one that was just cleared or
    /// stopped, those until then.
    pub dirty: u64,
    /// When it was begun; 0 for another program's.
    pub started: u64,
}

impl From<snapshots::tracker::Tracked> for Tracker {
    fn from(t: snapshots::tracker::Tracked) -> Tracker {
        Tracker {
            name: t.name,
            id: t.id,
            granularity: t.granularity,
            dirty: t.dirty,
            started: t.started,
        }
    }
}

/// To begin a tracker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TrackerStart {
    /// Its name; new among the container's trackers.
    pub name: String,
    /// Bytes that a bit stands for, a power of two; 65536 unless it is said.
    #[serde(default)]
    pub granularity: Option<u64>,
}

/// To add what another tracker has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TrackerMerge {
    /// The other one, which stays as it is.
    pub from: String,
}

/// What is to be done with a tracker that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrackerChange {
    /// End it.
    Stop,
    /// Clear it.
    Clear,
    /// Add another's bits.
    Merge(TrackerMerge),
}
