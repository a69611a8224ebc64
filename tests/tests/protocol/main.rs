//! What the server promises a client, seen over real sockets: every command and flag, every option,
//! clients that lie, sockets, and every way to end.

#![allow(clippy::unwrap_used)]

mod coherence;
mod commands;
mod contexts;
mod endings;
mod hostile;
mod options;
mod sockets;
