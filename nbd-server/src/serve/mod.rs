//! Moving bytes between clients and devices: the only place that knows the operating system.
//!
//! ```text
//!  listen ─▶ accept ─▶ handshake ─▶ connection ─▶ engine
//!  names     tokio task, deadline   own thread     no sockets
//! ```
//!
//! Listening and the handshake are tokio's, where thousands may wait at once. A connection that has
//! negotiated gets a thread of its own: one receive takes all requests that wait, the engine
//! executes them, one send answers them. What the page cache can answer is never handed to another
//! thread, because a hand-over costs as much as sixty such reads; what waits for a disk goes to the
//! connection's ring, or to a few threads, and holds up nobody ([`plane`]).

mod activation;
mod connection;
mod deferred;
pub mod engine;
mod files;
mod greet;
mod hall;
mod input;
mod jobs;
mod line;
pub(crate) mod listen;
mod mailbox;
pub mod plane;
mod pool;
mod read;
pub mod server;
mod spin;
mod throttled;
pub mod traffic;
mod work;

pub use engine::{Engine, Sink, Turn};
pub use files::raise_file_limit;
pub use hall::{Connected, Connections};
pub use plane::{EngineKind, Plane};
pub use server::{Config, Server};
pub use traffic::Totals;
