//! What a holder says of itself, as JSON.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A holder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// The server that its clients are connected to: `unix:PATH` or `tcp:HOST:PORT`.
    pub to: String,
    /// Bytes that it may keep for all exports together.
    pub buffer: u64,
    /// Seconds that a client waits for a server; for ever without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// The exports that clients use.
    pub exports: Vec<Export>,
}

/// An export that a holder's clients use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Export {
    /// As the clients named it.
    pub name: String,
    /// Of clients.
    pub connections: u64,
    /// Changes that were answered and that no flush covers yet.
    pub kept_changes: u64,
    /// What is kept takes, with requests that are not answered.
    pub bytes: u64,
    /// There is no server, or what it lost is being sent again.
    pub waiting: bool,
}

/// Where the server is from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Move {
    /// `unix:PATH` or `tcp:HOST:PORT`.
    pub to: String,
}
