//! Requests of one connection that its container's limits hold back, or that wait for room on the
//! host, while others go on: its own flushes, its reads where only writes are limited, everybody else.
//!
//! What is held is the request itself: it has no lease, nothing is prepared for it, and no other
//! request knows that it came. So a snapshot, a merge or a flush has nothing to wait for, and who
//! disappears leaves nothing behind. It is neither executed nor answered before its turn.
//!
//! At most [`REQUESTS`] and [`BYTES`] are held; then nothing more is received, and the socket holds
//! back the client: with it what stands behind a full window, flushes too. Other connections to the
//! container are not concerned.
//!
//! | end | what is held |
//! |---|---|
//! | the client says good-bye | is executed, each in its turn, as long as the client is there |
//! | the client closes the socket, breaks the protocol, is cut off | is forgotten; it was never answered |
//! | the server stops | is executed at once, or forgotten where the host has no room for it: who reconnects asks again |

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::mailbox::Mailbox;
use super::plane::Plane;
use super::work::CACHE_MAX;
use crate::export::Space;
use crate::export::limits::{Cost, Entry, Gate, Told};
use crate::export::space::OnFull;
use crate::session::transmission::{Action, Command};

/// Requests of one connection that are held; as deep as the queue of a kernel's client, so that a
/// flush behind them is seen.
pub(super) const REQUESTS: usize = 128;

/// Bytes of their payloads. One more request is taken below the bound.
pub(super) const BYTES: u64 = 16 << 20;

/// A request that waits.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) command: Command,
    pub(super) payload: Vec<u8>,
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Throttled {
    gate: Arc<Gate>,
    /// Where requests wait that the host has no room for.
    space: Option<Arc<Space>>,
    /// Nothing waits for room any more.
    released: bool,
    plane: Arc<Plane>,
    mailbox: Option<Arc<Mailbox<u64>>>,
    /// By ticket, so in the order in which they came.
    waiting: BTreeMap<u64, Held>,
    /// Their turn has come.
    ready: VecDeque<Held>,
    bytes: u64,
}

/// What a command counts as; `None` for one that never waits.
fn cost(c: &Command) -> Option<Cost> {
    let len = c.range.end - c.range.start;
    let (write, bytes) = match c.action {
        Action::Flush => return None,
        Action::Read { .. } => (false, len),
        Action::Cache => (false, len.min(CACHE_MAX)),
        Action::Status { .. } => (false, 0),
        Action::Write => (true, len),
        Action::Trim | Action::Zero(_) => (true, 0),
    };
    Some(Cost { write, bytes })
}

impl Throttled {
    pub(super) fn new(gate: Arc<Gate>, plane: Arc<Plane>) -> Throttled {
        Throttled {
            gate,
            space: None,
            released: false,
            plane,
            mailbox: None,
            waiting: BTreeMap::new(),
            ready: VecDeque::new(),
            bytes: 0,
        }
    }

    /// Has requests wait for room, where `space` says so.
    pub(super) fn wait_for_room(&mut self, space: Arc<Space>) {
        self.space = Some(space).filter(|s| s.on_full() == OnFull::Pause);
    }

    /// False when every request may go on.
    pub(super) fn binds(&self) -> bool {
        self.gate.binds()
    }

    /// Requests that are held.
    pub(super) fn count(&self) -> usize {
        self.waiting.len() + self.ready.len()
    }

    /// True when no more may be held.
    pub(super) fn is_full(&self) -> bool {
        let count = self.count();
        count > 0 && (count >= REQUESTS || self.bytes >= BYTES || self.plane.holds_much())
    }

    /// True when some of them can be executed.
    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// What to wait for, when something is held.
    pub(super) fn wake(&self) -> Option<&Arc<OwnedFd>> {
        self.mailbox.as_ref().map(|m| m.wake())
    }

    /// Holds a request back, unless it may go on: false then. An error ends the session: what
    /// cannot be held must not pass either.
    pub(super) fn hold(&mut self, command: &Command, payload: &[u8]) -> io::Result<bool> {
        let Some(cost) = cost(command) else {
            return Ok(false);
        };
        let who = self.who()?;
        let Entry::Wait(ticket) = self.gate.enter(cost, &who) else {
            return Ok(false);
        };
        self.keep(ticket, command, payload);
        Ok(true)
    }

    /// Holds back a request that the host had no room for, to be tried again; `again`: it was before.
    /// At the end it is forgotten. False when nobody waits for that: then it has failed. Errors as for
    /// [`Throttled::hold`].
    pub(super) fn hold_for_room(
        &mut self,
        command: &Command,
        payload: &[u8],
        again: bool,
    ) -> io::Result<bool> {
        let Some(space) = self.space.clone() else {
            return Ok(false);
        };
        if self.released {
            return Ok(true);
        }
        let ticket = space.wait(&self.who()?, again);
        self.keep(ticket, command, payload);
        Ok(true)
    }

    fn who(&mut self) -> io::Result<Arc<dyn Told>> {
        Ok(match &self.mailbox {
            Some(mailbox) => mailbox.clone(),
            None => self.mailbox.insert(Arc::new(Mailbox::new()?)).clone(),
        })
    }

    fn keep(&mut self, ticket: u64, command: &Command, payload: &[u8]) {
        let held = Held {
            command: command.clone(),
            payload: payload.to_vec(),
        };
        self.plane.hold(payload.len() as u64);
        self.bytes += payload.len() as u64;
        self.waiting.insert(ticket, held);
    }

    /// Notes whose turn has come.
    pub(super) fn look(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let tickets = self.mailbox.as_ref().map(|m| m.take());
        for ticket in tickets.unwrap_or_default() {
            self.ready.extend(self.waiting.remove(&ticket));
        }
    }

    /// The next whose turn has come.
    pub(super) fn next(&mut self) -> Option<Held> {
        let held = self.ready.pop_front()?;
        let bytes = held.payload.len() as u64;
        self.plane.let_go(bytes);
        self.bytes -= bytes;
        Some(held)
    }

    /// Gives all of them their turn at once; nothing waits for room any more.
    pub(super) fn release(&mut self) {
        self.released = true;
        let waiting = std::mem::take(&mut self.waiting);
        self.gate.leave(|t| waiting.contains_key(&t));
        if let Some(space) = &self.space {
            space.leave(|t| waiting.contains_key(&t));
        }
        self.ready.extend(waiting.into_values());
    }

    /// Forgets all of them; nothing waits for room any more.
    pub(super) fn forget(&mut self) {
        self.released = true;
        if self.count() > 0 {
            self.release();
            self.ready.clear();
        }
        self.plane.let_go(self.bytes);
        self.bytes = 0;
    }

    /// True when [`Throttled::shrink`] would give something back.
    pub(super) fn is_large(&self) -> bool {
        self.mailbox.is_some() && self.count() == 0
    }

    /// Gives the memory back, unless it is in use.
    pub(super) fn shrink(&mut self) {
        if self.count() == 0 {
            self.mailbox = None;
            self.ready = VecDeque::new();
        }
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        self.forget();
    }
}
