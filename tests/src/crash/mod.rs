//! What a power cut may leave of a disk, and who judges it.
//!
//! ```text
//!  Fixture ── start image ──► RecordingStore ◄── workload (steps, threads, NBD engines)
//!                                  │   └─ marks ──► History: what was begun, what was answered
//!                 states_at(point) │                   │ view(point)
//!                                  ▼                   ▼
//!                             MemoryStore ─────► judge: opened by the shipped code, read,
//!                                                    written, closed, checked; every sector
//!                                                    against the view
//! ```
//!
//! * [`history`]: the oracle. Says for every point and sector which values are allowed.
//! * [`fixture`]: start images: empty, with holes, with a tail, left dirty; bare or on a base.
//! * [`workload`]: steps on a disk, written by hand or drawn from a seed, and who runs them.
//! * [`judge`]: one state against one view.
//! * [`sweep`]: every point of a run, every state of a point.
//! * [`reorder`]: a store that performs one sync too early or too late.
//! * [`proof`]: whoever leaves out or moves a sync must be noticed.
//! * [`nbd`]: the serving engine as a client sees it, without a socket.
//! * [`tree`]: a store of templates and containers, and its operations.
//! * [`full`]: a host without room.
//! * [`scene`], [`live`], [`promise`]: disks with trees, operations on them under clients, and what
//!   is promised at every instant of those; [`front`] sees each store call before it is made.
//! * [`qemu`]: the second opinion. [`foreign`]: what is left of a state that another tool repaired.
//!
//! A sector holds one number, 64 times over: which operation wrote it, and for which sector. So a
//! sector that shows another's bytes, a mixture or garbage is known at a glance.

pub mod fixture;
pub mod foreign;
pub mod front;
pub mod full;
pub mod history;
pub mod judge;
pub mod live;
pub mod nbd;
pub mod promise;
pub mod proof;
pub mod qemu;
pub mod reorder;
pub mod scene;
pub mod sweep;
pub mod tree;
pub mod workload;

pub use fixture::{Fixture, Shape};
pub use history::{History, View};
pub use judge::{Depth, judge};
pub use sweep::{Sweep, Tally};
pub use workload::{Runner, Step};

/// Bytes of a cluster in every fixture: the smallest that OpenVZ's tools accept.
pub const CLUSTER: u64 = 32 * 1024;
/// Sectors of a cluster.
pub const CLUSTER_SECTORS: u64 = CLUSTER / SECTOR;
/// Bytes of a sector.
pub const SECTOR: u64 = ploop::store::SECTOR;

pub use ploop_fuzz::rng::Rng;

/// A number from the environment, for longer runs and for repeating one.
pub fn env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")),
        Err(_) => default,
    }
}
