//! The host's room on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::export::Space as Watched;

/// The host's room for a store: how it is, and how it was. Sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Space {
    /// What is looked at.
    pub directory: String,
    /// How full it is: `plenty`, `low` (below the soft mark), `full` (containers get nothing more).
    pub level: String,
    /// All that its file system has.
    pub total: u64,
    /// What is left, without the reserve and what that lacks.
    pub free: u64,
    /// The soft mark.
    pub soft: u64,
    /// The hard mark.
    pub hard: u64,
    /// What the reserve holds.
    pub reserve: u64,
    /// What it is to hold.
    pub reserve_wanted: u64,
    /// What becomes of writes when it is full: `error` or `pause`.
    pub on_full: String,
    /// How often it became low.
    pub became_low: u64,
    /// How often it became full.
    pub became_full: u64,
    /// Requests that failed because it was full.
    pub refused: u64,
    /// Requests that wait for room now.
    pub waiting: u64,
    /// Requests that had to wait for room.
    pub waited: u64,
    /// How often some of the reserve was given up.
    pub reserve_uses: u64,
    /// How many bytes that were.
    pub reserve_given: u64,
}

impl From<&Watched> for Space {
    fn from(space: &Watched) -> Space {
        let now = space.status();
        Space {
            directory: space.dir().display().to_string(),
            level: now.level.name().into(),
            total: now.seen.total,
            free: now.seen.free,
            soft: now.seen.soft,
            hard: now.seen.hard,
            reserve: now.seen.reserve,
            reserve_wanted: now.seen.reserve_wanted,
            on_full: space.on_full().to_string(),
            became_low: now.crossed.0,
            became_full: now.crossed.1,
            refused: now.refused,
            waiting: now.waiting.0,
            waited: now.waiting.1,
            reserve_uses: now.reserve_used.0,
            reserve_given: now.reserve_used.1,
        }
    }
}
