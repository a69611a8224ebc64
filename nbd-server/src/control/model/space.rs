//! Space on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// To give back the space that a container does not need.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Compact {
    /// Only say what would be given back.
    #[serde(default)]
    pub dry_run: bool,
    /// Bytes per second at most, of clusters looked at and moved.
    #[serde(default)]
    pub rate: Option<u64>,
}

/// What a container takes of its host, in bytes: `host` is the sum of `data`, `snapshots`, `unnamed`,
/// `metadata` and `room`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskSpace {
    /// The container.
    pub container: String,
    /// All that the host has given its own files.
    pub host: u64,
    /// What the live disk shows of them.
    pub data: u64,
    /// What only snapshots show.
    pub snapshots: u64,
    /// What no entry names: compacting gives it back.
    pub unnamed: u64,
    /// Headers, tables, journal, descriptor.
    pub metadata: u64,
    /// Taken ahead, and what the host's file system adds.
    pub room: u64,
    /// What the live disk shows of files that are shared; not in the sum.
    pub shared: u64,
}
