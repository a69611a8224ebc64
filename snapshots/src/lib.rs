//! Every operation that changes the tree or the set of disks, one file each.
//!
//! ```text
//!  template::import ─┐                    ┌─ clone::create_container     list
//!  rootfs (dir, tar) ├─ layers/UUID ──────┤                              remove
//!  convert (images) ─┘   sealed, shared   └─ grow (a larger size, once)
//!                              store::Root: names, locks, work directories
//! ```
//!
//! Each operation is written as numbered steps with its commit point marked COMMIT.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod clone;
pub mod convert;
pub mod grow;
mod layer;
pub mod list;
mod meta;
pub mod name;
pub mod remove;
pub mod rootfs;
pub mod store;
pub mod template;

pub use clone::{CreateOptions, Created, create_container};
pub use remove::{remove_container, remove_template};
pub use store::{DEFAULT_ROOT, Root};
pub use template::{ImportOptions, ImportSource, ImportStep, Imported, import};
