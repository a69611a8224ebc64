//! Every operation that changes the tree or the set of disks, one file each.
//!
//! ```text
//!  template::import ─┐                    ┌─ clone::create_containers    list
//!  rootfs (dir, tar) ├─ layers/UUID ──────┤                              remove
//!  convert (images) ─┤   sealed, shared   └─ grow (a larger size, once)   hash
//!  share (snapshots) ┘       └─ flatten                                   resize
//!  stream (send, receive)      backup (and restore)
//!                              store::Root: names, locks, work directories
//! ```
//!
//! Each operation is written as numbered steps with its commit point marked COMMIT.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod backup;
pub mod check;
pub mod clone;
pub mod compact;
pub mod convert;
pub mod delete;
pub mod diff;
pub mod enlarge;
pub mod export;
mod flatten;
pub mod foretell;
pub mod grow;
pub mod hash;
mod layer;
pub mod life;
pub mod limits;
pub mod list;
pub mod merge;
pub mod meta;
pub mod moving;
pub mod name;
pub mod owner;
pub mod place;
pub mod quota;
pub mod remove;
pub mod rename;
pub mod resize;
pub mod rootfs;
pub mod share;
pub mod snapshot;
pub mod space;
pub mod store;
pub mod stream;
pub mod switch;
pub mod template;
pub mod tracker;
pub mod tree;
mod uses;

pub use clone::{CloneSource, CreateOptions, Created};
pub use clone::{create_container, create_containers, numbered};
pub use remove::{remove_container, remove_containers, remove_template};
pub use store::{DEFAULT_ROOT, Root};
pub use template::{ImportOptions, ImportSource, ImportStep, Imported, import};
