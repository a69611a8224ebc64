//! Power cuts, kills and parked jobs while the tree of a disk changes under its clients.
//!
//! * [`states`]: every legal state after every step of every operation, offline and live.
//! * [`kill`]: a process that is killed anywhere, and a power cut after the next one worked on.
//! * [`proof`]: whoever leaves out or moves a sync of these operations sees red.
//! * [`parked`]: no job holds a lock that a client needs.
//! * [`stress`]: many threads, on memory and on files.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

mod kill;
mod parked;
mod proof;
mod scenes;
mod states;
mod stress;
