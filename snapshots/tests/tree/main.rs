//! The tree of a disk: showing it, going back in it, naming its nodes, taking it elsewhere.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

mod arriving;
mod backup;
mod backup_faults;
mod common;
mod diff;
mod export;
mod journal;
mod quota;
mod rename;
mod resize;
mod switch;
mod switch_crash;
mod tracker;
mod tree;
