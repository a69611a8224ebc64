//! Moving a running disk to another host, from one service to another.
//!
//! * [`link`]: the bytes between the two: a unix socket, TCP with TLS, or a command.

pub mod link;
