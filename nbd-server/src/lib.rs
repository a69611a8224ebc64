//! The NBD service: who may open what, and moving bytes to and from them.
//!
//! ```text
//!  socket ─▶ wire ─▶ session ─▶ serve::engine ─▶ ploop::device::Device
//!            bytes   meaning    moves the bytes   maps the range
//! ```
//!
//! * [`wire`]: NBD's bytes and nothing else; no I/O, no state.
//! * [`session`]: the protocol as state machines without sockets: bytes in, bytes and actions out.
//! * [`export`]: names to devices, and the stages stacked on the one device interface.
//! * [`serve`]: the engine that executes requests, and the only place that knows the operating
//!   system: sockets, threads, signals.
//! * [`control`]: the HTTP/JSON API on a unix socket, and its client.
//! * [`hold`]: the holder: a stable address for clients, in front of servers that come and go.
//! * [`migrate`]: a running disk moves to another host.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod control;
pub mod export;
pub mod hold;
pub mod migrate;
pub mod serve;
pub mod session;
pub mod wire;

#[cfg(test)]
mod sleepy;
#[cfg(test)]
mod testing;

pub use export::{ExportInfo, Exports, OpenExport};
pub use serve::{Config, Connections, EngineKind, Server, raise_file_limit};
