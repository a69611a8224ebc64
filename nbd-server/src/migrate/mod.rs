//! Moving a container to another service, under its clients.
//!
//! ```text
//!  client ═══ holder ═══ source ──── link ────▶ destination
//!                 └───── from the hand-over on ═══════╯
//! ```
//!
//! * [`link`]: bytes between the two: a unix socket, TCP with TLS, or a command;
//! * [`wire`]: frames on it;
//! * [`source`], [`destination`]: the two sides, step by step; each has its commit point;
//! * [`settle`]: the end of a move that was cut: the source says how it ends, as often as it takes;
//! * [`listen`]: where a service takes containers;
//! * `clients`: their holder, which goes along;
//! * `feed`: post-copy: what a container that was taken still lacks.
//!
//! Who has the disk is in a record beside it ([`ploop::owner`]), and what may follow what in
//! [`snapshots::owner`]: at every instant one side at most can open it.

#[doc(hidden)]
pub mod bytes;
mod clients;
pub mod destination;
mod feed;
pub mod link;
pub mod listen;
pub mod settle;
pub mod source;
mod wire;

pub use destination::Destination;
pub use listen::Arrivals;
