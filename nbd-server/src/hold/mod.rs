//! The holder: it owns the clients' sockets, and servers come and go behind it.
//!
//! ```text
//!  client ═══ holder ═══ server        restarted, upgraded, moved: the client waits, no more
//!              │ requests that are not answered
//!              └ changes that were answered and that no flush covers
//! ```
//!
//! What a client was told stays true:
//!
//! * its handshake is repeated with every new server, and what it was told of the export must hold
//!   there ([`terms`]); else its connection ends, by name, and nothing wrong is read;
//! * a request is answered once, by one server ([`replies`]);
//! * what was answered is there, flushed or not: a server that lost it is given it again, in order,
//!   before anything else ([`settle`]). It says so by the life of the disk: see [`snapshots::life`].
//!
//! What is kept dies with the holder: then only what was flushed is certain, as without it.
//!
//! | file | |
//! |---|---|
//! | [`volume`], [`requests`], [`answers`], [`settle`], [`kept`], [`spans`] | one export: requests, links, what is kept. No sockets, no clock |
//! | [`replies`], [`outbox`] | answers judged; bytes on their way |
//! | [`relay`], [`agree`], [`terms`] | handshakes: a client's, the holder's own, what must hold |
//! | [`run`], [`dial`], [`hall`], [`line`], [`server`], [`control`] | sockets, tasks, memory, the control API |

mod agree;
mod answers;
mod control;
mod dial;
mod hall;
mod kept;
mod line;
pub mod model;
mod outbox;
mod relay;
mod replies;
mod requests;
mod run;
mod server;
mod settle;
mod spans;
mod terms;
#[cfg(test)]
mod tests;
mod volume;

pub use line::Address;
pub use server::{Holder, Options};
