//! Resizing on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// To resize a container's disk, and what is on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// What it is to have, in bytes; rounded up to a whole cluster.
    pub size: u64,
    /// It is meant to be less than it has: without this that is refused, and with it anything else.
    #[serde(default)]
    pub shrink: bool,
    /// Make the disk one image of its own of that size; only without snapshots.
    #[serde(default)]
    pub flatten: bool,
    /// Only the disk: what is on it stays as it is, and a disk is cut only where it reads as zeros.
    #[serde(default)]
    pub no_filesystem: bool,
}

impl From<&Resize> for snapshots::resize::ResizeOptions {
    fn from(r: &Resize) -> Self {
        snapshots::resize::ResizeOptions {
            size: r.size,
            shrink: r.shrink,
            flatten: r.flatten,
            filesystem: !r.no_filesystem,
        }
    }
}

/// A disk that was resized.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resized {
    /// The container.
    pub container: String,
    /// Bytes that it showed before.
    pub before: u64,
    /// Bytes that it shows now.
    pub size: u64,
    /// Bytes of the file system on it now, if that was resized.
    #[serde(default)]
    pub filesystem: Option<u64>,
    /// Why that was not.
    #[serde(default)]
    pub reason: Option<String>,
    /// What is left to do, and when that is done.
    #[serde(default)]
    pub note: Option<String>,
}

impl From<snapshots::resize::Resized> for Resized {
    fn from(r: snapshots::resize::Resized) -> Resized {
        Resized {
            container: r.disk,
            before: r.before,
            size: r.size,
            filesystem: r.filesystem,
            reason: r.reason,
            note: r.note,
        }
    }
}
