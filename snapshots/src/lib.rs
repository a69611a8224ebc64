//! Every operation that changes the tree or the set of disks, one file each.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod rootfs;
