//! Moves as they are asked for, and seen.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// To move a container to another service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Where to: `unix:/PATH`, `tcp:HOST:PORT` or `exec:COMMAND`.
    pub to: String,
    /// What it is called there; as here where there is nothing.
    #[serde(default)]
    pub name: Option<String>,
    /// How long clients may wait at the hand-over, in milliseconds.
    #[serde(default)]
    pub downtime_ms: Option<u64>,
    /// Bytes per second at most, before the hand-over; 65536 at least.
    #[serde(default)]
    pub rate: Option<u64>,
    /// The holder of its clients.
    #[serde(default)]
    pub holder: Option<MigrateHolder>,
    /// Its files stay here; nobody opens them.
    #[serde(default)]
    pub keep: bool,
    /// The destination serves at once, and its data follows.
    #[serde(default)]
    pub post_copy: bool,
    /// Clients are never slowed down: a move that does not converge then fails.
    #[serde(default)]
    pub no_brake: bool,
    /// Wait, before the last rounds, until somebody says that what is inside is frozen.
    #[serde(default)]
    pub freeze: bool,
    /// For so many seconds at most; then the move fails. 60 where nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_seconds: Option<u64>,
}

/// A holder (`ploop hold`) that is to go to the destination at the hand-over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateHolder {
    /// Its control socket.
    pub control: String,
    /// Where it finds the disk at the destination: `unix:/PATH` or `tcp:HOST:PORT`.
    pub to: String,
}

/// Where a move is, or how it went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// What it does now.
    pub phase: MigrationPhase,
    /// Rounds of what was written meanwhile.
    pub round: u32,
    /// Bytes of the disk that were sent.
    pub sent: u64,
    /// Bytes that are left, as far as is known.
    pub left: u64,
    /// Bytes per second that are sent.
    pub rate: u64,
    /// Bytes per second that are written by clients.
    pub dirty_rate: u64,
    /// Bytes per second that clients are let write, because they write faster than can be sent; 0: they
    /// are not slowed down.
    #[serde(default)]
    pub brake: u64,
    /// When it is expected to end, in seconds from now; nothing where it does not converge.
    #[serde(default)]
    pub expected: Option<f64>,
    /// How it went, when it is over.
    #[serde(default)]
    pub moved: Option<Moved>,
}

/// What a move does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// Sends the tree.
    #[default]
    Tree,
    /// Sends what was written meanwhile, in rounds.
    Rounds,
    /// Waits until what is inside is frozen.
    Freeze,
    /// The last of it.
    HandOver,
    /// The destination has it, and its data follows.
    PostCopy,
}

/// What a move came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// Bytes that went over the link.
    pub bytes: u64,
    /// Bytes of data of the tree.
    pub data: u64,
    /// Bytes of what was written since, each granule once.
    pub written: u64,
    /// Bytes of the last round, for which clients waited.
    pub last: u64,
    /// From the first request that was held back until the destination had the disk, in seconds.
    pub gap: f64,
}

/// How a move whose other side is gone ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resolve {
    /// Who is to have the container.
    pub decision: Decision,
}

/// Who is to have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// This service.
    Take,
    /// The other one.
    Give,
}

/// What was decided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resolved {
    /// The container.
    pub name: String,
    /// How far its move was.
    pub was: String,
    /// Whether this service has it now.
    pub owned: bool,
    /// What may be lost by it.
    pub lost: String,
}

impl From<Decision> for snapshots::owner::Decision {
    fn from(d: Decision) -> Self {
        match d {
            Decision::Take => snapshots::owner::Decision::Take,
            Decision::Give => snapshots::owner::Decision::Give,
        }
    }
}

impl From<snapshots::moving::Decided> for Resolved {
    fn from(d: snapshots::moving::Decided) -> Resolved {
        Resolved {
            name: d.name,
            was: d.was.to_owned(),
            owned: d.owned,
            lost: d.lost.to_owned(),
        }
    }
}

impl From<crate::migrate::source::Moved> for Moved {
    fn from(m: crate::migrate::source::Moved) -> Moved {
        Moved {
            bytes: m.bytes,
            data: m.data,
            written: m.written,
            last: m.last,
            gap: m.gap,
        }
    }
}
