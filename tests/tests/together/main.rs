//! Many at one store: processes beside each other, servers beside `rm`, a user's own hands in the
//! directories, and kill -9.
//!
//! What must hold is read from the files themselves, by [`kit::Sound`]: whatever a disk names is
//! there and referred to, and after a collection nothing else is.

#![allow(clippy::unwrap_used)]

mod beside;
mod killed;
mod kit;
mod processes;
