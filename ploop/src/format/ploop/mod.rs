//! The ploop image format, v1 and v2 (FORMAT.md beside this file).
//!
//! * [`header`]: the 64 bytes, unchecked and checked.
//! * [`delta`]: an image as a read-only layer.
//! * [`top`]: the one writable image of a disk: allocation, mark; `durable`: its flush and close.
//! * [`parts`]: its clusters that are not complete yet.
//! * [`journal`]: what was flushed of those.
//! * [`create()`]: a new empty image.

pub mod alloc;
pub mod busy;
mod create;
pub mod delta;
mod durable;
pub mod extension;
pub mod flush;
pub mod header;
pub mod journal;
mod merging;
pub mod parts;
pub mod top;

pub use create::{create, create_unsynced};
pub use delta::PloopDelta;
pub use header::{Header, Version};
