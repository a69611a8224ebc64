//! The control plane: HTTP/JSON on a unix socket, and its client.
//!
//! ```text
//!  ploop ── client ──▶ socket ──▶ routes ──▶ Operations (what the service can do; may block)
//!                                   │   └──▶ Jobs       (what takes long: progress, cancel)
//!                                   └──────▶ Connections, Meter
//! ```
//!
//! * [`model`]: what goes over the wire, as JSON; `GET /openapi.json` describes it.
//! * [`failure`]: an error on the wire, from and to [`ploop::Error`]: what the CLI prints and its
//!   exit code are the same whoever did the work.
//! * [`ops`]: the one trait that the service implements.
//! * [`jobs`]: work that takes long, each job on a thread of its own.
//! * [`service`]: the socket, its thread, and an orderly end.
//! * [`metrics`]: Prometheus' text format.
//!
//! The socket is its owner's alone (mode 0600): whoever can open it may do everything. Nothing that
//! a client sends or leaves unsent blocks another: bodies, connections and the time for each step
//! are bounded, and whatever may block runs on a thread for that.

pub mod agent;
pub(crate) mod answer;
pub mod client;
pub mod failure;
pub mod jobs;
pub mod metrics;
pub mod model;
pub mod openapi;
pub mod ops;
mod patient;
mod routes;
mod routes_backups;
mod routes_migrate;
mod routes_store;
mod routes_trackers;
pub mod service;
pub(crate) mod socket;
pub mod steward;
#[cfg(test)]
mod tests;

pub use agent::Agent;
pub use client::Client;
pub use failure::Failure;
pub use jobs::{Ended, JobHandle, Jobs};
pub use metrics::Meter;
pub use ops::Operations;
pub use service::{Control, Service};
pub use steward::go_on_with_merges;
