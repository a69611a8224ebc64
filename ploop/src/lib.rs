//! What a disk *is*: formats, descriptor, chain, map, allocation, trackers, locks.
//!
//! No sockets, no threads of its own, no clock, no environment.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod account;
pub mod chain;
pub mod descriptor;
pub mod device;
pub mod disk;
pub mod error;
pub mod format;
mod gate;
pub mod host;
pub mod locks;
pub mod owner;
mod paged;
pub mod store;
pub mod tracker;
pub mod verify;

pub use error::{Error, Kind, Result};
