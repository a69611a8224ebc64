//! The tree of a disk: showing it, going back in it, naming its nodes, taking it elsewhere.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

mod common;
mod export;
mod journal;
mod rename;
mod switch;
mod switch_crash;
mod tree;
