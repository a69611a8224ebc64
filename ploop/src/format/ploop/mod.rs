//! The ploop image format, v1 and v2 (FORMAT.md beside this file).
//!
//! * [`header`]: the 64 bytes, unchecked and checked.
//! * [`delta`]: an image as a read-only layer.
//! * [`top`]: the one writable image of a disk: allocation, mark; `durable`: its flush and close.
//! * [`held`]: what of it is charged to its disk's account.
//! * [`parts`]: its clusters that are not complete yet.
//! * [`bitmaps`]: its trackers' bits while it is closed, in its [`extension`].
//! * [`journal`]: what was flushed of those.
//! * `moving`: its clusters to other places, and another header before them.
//! * [`create()`]: a new empty image.

pub mod alloc;
pub mod bitmaps;
pub mod busy;
mod charge;
mod create;
pub mod delta;
mod durable;
pub mod extension;
pub mod flush;
pub mod header;
pub mod held;
pub mod journal;
mod merging;
mod moving;
pub mod parts;
pub mod top;

pub use create::{create, create_unsynced};
pub use delta::PloopDelta;
pub use header::{Header, Version};
