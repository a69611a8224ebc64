//! Random operations on a store of disks with trees, against a model that is right at a glance.
//!
//! ```text
//!  seed ─ profile::draw ─► [Op] ─ World::run ─┬─ the shipped operations on a real store
//!                            ▲                └─ oracle: a node is a Vec of sectors
//!                            └─ shrink: the shortest list that still fails
//! ```
//!
//! * [`op`]: what can be done, as plain values. What an operation works on is a number that is taken
//!   modulo of what there is, so every part of a list is a list that can be run.
//! * [`oracle`]: what every node must read, how the tree hangs together, what may be lost.
//! * [`world`]: does the operations; [`data`] on bytes, [`nodes`] on trees, [`merges`] in the middle
//!   of a merge, [`set`] on the set of containers.
//! * [`check`]: compares the two; [`hook`]: what a client sees in the middle of an operation.
//!
//! A sector holds one number, 128 times: the write that wrote it, or 0. Disks are larger than what
//! is written to them, so that maps have several pages.

pub mod check;
pub mod data;
pub mod hook;
pub mod merges;
pub mod nodes;
pub mod op;
pub mod oracle;
pub mod profile;
pub mod set;
pub mod shrink;
pub mod world;

/// Sectors of a cluster.
pub const CLUSTER: usize = 64;
/// Clusters of a disk that are ever written: [`WINDOWS`], one after the other.
pub const CLUSTERS: usize = 10 * WINDOWS.len();
/// Sectors of them.
pub const SECTORS: usize = CLUSTER * CLUSTERS;
/// Where ten clusters begin that are written: the last five of a page of a map, and the first five
/// of the next.
pub const WINDOWS: [usize; 4] = [0, 1024 - 5, 2 * 1024 - 5, 3 * 1024 - 5];
/// Sectors of a disk.
pub const SIZE: usize = (WINDOWS[3] + 20) * CLUSTER;
/// Containers at a time.
pub const CONTAINERS: usize = 6;
/// Snapshots of one container.
pub const SNAPSHOTS: usize = 340;
