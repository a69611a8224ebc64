//! One export as its clients use it: every connection to it, and what of their changes may be lost.
//! No sockets, no clock: bytes and events in, bytes out. The driver ([`super::run`]) moves them.
//!
//! ```text
//!  client ─▶ requests ─┬─▶ sent ─▶ answered ─▶ client      reads, flushes, …
//!                      │             └─▶ kept until a flush covers it      changes
//!                      └─ waits while it meets a change that is under way
//! ```
//!
//! * A request is here, with its payload, until it is answered. When its server goes away, it is
//!   sent to the next one.
//! * Two changes that meet are never under way together, on whatever connections: what a server
//!   makes of such two has an order then, the order in which they are kept and sent again.
//! * What all of this may take, answers that clients have not taken included, is
//!   [`Volume::set_share`]. Half of it taken by what is kept: the volume flushes by itself. All of it:
//!   nothing more is taken from the clients until something is answered, taken or flushed; only a
//!   connection that has nothing itself may have one request, whatever its length, unless what is
//!   kept alone is as much. So a client that takes nothing makes others slow, and stops nobody.

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::Bytes;

use crate::hold::kept::Kept;
use crate::hold::outbox::Outbox;
use crate::hold::replies::{self, Asked};
use crate::hold::settle::Phase;
use crate::hold::spans::Spans;
use crate::hold::terms::Terms;
use crate::wire::errno;
use crate::wire::greeting::transmission_flag;
use crate::wire::request::kind;

/// Most requests of a connection that are not answered.
const REQUESTS_MAX: usize = 1024;
/// Bytes of answers that a client has not taken, from which on nothing more is taken from it.
const UNTAKEN_MAX: usize = 4 << 20;
/// What a request is charged beside its payload.
pub(super) const REQUEST_COST: usize = 512;

/// A connection's number.
pub(super) type SeatId = u64;

/// Whose a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    Client,
    /// The holder's own flush.
    Own,
    /// A kept change that is played again.
    Replay,
}

/// A request that is not answered.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) asked: Asked,
    pub(super) whose: Whose,
    pub(super) flags: u16,
    pub(super) length: u64,
    pub(super) payload: Bytes,
    pub(super) cost: usize,
    pub(super) sent: bool,
    /// A change: its range is taken.
    pub(super) fenced: bool,
    /// On the volume's clock: of a change when it was first sent, of a flush when it was last.
    pub(super) stamp: u64,
}

/// What a connection has with the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// Nothing.
    Away,
    /// A finished handshake, and the life that the server told of.
    Ready(Option<String>),
    /// All.
    Up,
    /// It is to be closed as soon as what was sent is answered.
    Draining,
}

/// A client's connection.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) terms: Terms,
    pub(super) link: Link,
    /// Contexts as the server and as the client number them.
    pub(super) ids: Vec<(u32, u32)>,
    pub(super) held: HashMap<u64, Held>,
    /// To be sent, the oldest first.
    pub(super) queue: VecDeque<u64>,
    pub(super) sent: usize,
    pub(super) to_server: Outbox,
    pub(super) to_client: Outbox,
    /// What of that is charged.
    untaken: usize,
    pub(super) client_gone: bool,
    /// Nothing more is taken from the client.
    pub(super) closing: bool,
    /// Patience is over: all is answered with an error until there is a server again.
    pub(super) failing: bool,
    /// The holder's own flush is under way.
    pub(super) flushing: bool,
    /// On the volume's clock: when its link was ready.
    pub(super) since: u64,
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) seats: BTreeMap<SeatId, Seat>,
    next_seat: SeatId,
    pub(super) next_cookie: u64,
    pub(super) clock: u64,
    pub(super) kept: Kept,
    /// What changes under way change.
    pub(super) busy: Spans,
    /// Changes that meet one of those, or each other: oldest first.
    pub(super) waiting: BTreeMap<u64, SeatId>,
    pub(super) charged: usize,
    pub(super) share: usize,
    /// A flush of the holder's own failed, and none has succeeded since.
    pub(super) flush_failed: bool,
    pub(super) phase: Phase,
    /// The disk that the first server told of.
    pub(super) disk: Option<String>,
    woken: Vec<SeatId>,
}

impl Seat {
    /// True when a flush on any connection covers what was answered on this one.
    pub(super) fn shares(&self) -> bool {
        self.terms.has(transmission_flag::CAN_MULTI_CONN)
    }

    /// True when it may change something.
    pub(super) fn writes(&self) -> bool {
        !self.terms.read_only()
    }
}

/// Commands that change what the export holds.
pub(super) fn is_change(command: u16) -> bool {
    matches!(command, kind::WRITE | kind::TRIM | kind::WRITE_ZEROES)
}

impl Volume {
    /// Without connections. `share`: bytes that it may take.
    pub(super) fn new(share: usize) -> Volume {
        Volume {
            seats: BTreeMap::new(),
            next_seat: 1,
            next_cookie: 1,
            clock: 1,
            kept: Kept::default(),
            busy: Spans::default(),
            waiting: BTreeMap::new(),
            charged: 0,
            share,
            flush_failed: false,
            phase: Phase::default(),
            disk: None,
            woken: Vec::new(),
        }
    }

    /// Bytes that it may take from now on.
    pub(super) fn set_share(&mut self, share: usize) {
        self.share = share;
        self.wake_all();
    }

    /// Bytes that are taken now.
    pub(super) fn charged(&self) -> usize {
        self.charged
    }

    /// A client that has finished its handshake; without a link yet.
    pub(super) fn sit(&mut self, terms: Terms) -> SeatId {
        let id = self.next_seat;
        self.next_seat += 1;
        let seat = Seat {
            terms,
            link: Link::Away,
            ids: Vec::new(),
            held: HashMap::new(),
            queue: VecDeque::new(),
            sent: 0,
            to_server: Outbox::default(),
            to_client: Outbox::default(),
            untaken: 0,
            client_gone: false,
            closing: false,
            failing: false,
            flushing: false,
            since: 0,
        };
        self.seats.insert(id, seat);
        id
    }

    /// The connection is over, for whatever reason.
    pub(super) fn leave(&mut self, id: SeatId) {
        self.down(id);
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.client_gone = true;
            seat.to_client.clear();
            if !seat.shares() {
                // Nobody else's flush would ever cover them.
                let free = self.kept.drop_of(id);
                self.uncharge(free);
            }
        }
        self.drop_held(id);
        self.charge_untaken(id);
        self.seats.remove(&id);
        self.settle();
    }

    pub(super) fn set_ids(&mut self, id: SeatId, ids: Vec<(u32, u32)>) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.ids = ids;
        }
        self.flush_failed = false;
    }

    pub(super) fn wake(&mut self, id: SeatId) {
        self.woken.push(id);
    }

    pub(super) fn wake_all(&mut self) {
        self.woken = self.seats.keys().copied().collect();
    }

    /// Connections that have something to do since the last call.
    pub(super) fn woken(&mut self) -> Vec<SeatId> {
        std::mem::take(&mut self.woken)
    }

    /// True when bytes of the client may be taken.
    pub(super) fn takes(&self, id: SeatId) -> bool {
        let Some(seat) = self.seats.get(&id) else {
            return false;
        };
        let under_way = self.charged - self.kept.cost();
        // Where flushing fails, what is kept is there for good: more changes are refused.
        let room = self.charged < self.share || (self.flush_failed && under_way < self.share);
        let kept_fills = self.kept.cost() >= self.share && !self.kept.is_empty();
        let has_nothing = seat.held.is_empty() && seat.to_client.len() == 0;
        let alone = has_nothing && (self.flush_failed || !kept_fills);
        let bounded = seat.held.len() < REQUESTS_MAX && (room || alone);
        !seat.closing && seat.to_client.len() < UNTAKEN_MAX && (seat.failing || bounded)
    }

    pub(super) fn uncharge(&mut self, cost: usize) {
        let was_full = self.charged >= self.share;
        self.charged -= cost;
        if was_full && self.charged < self.share {
            self.wake_all();
        }
    }

    /// What waits for a client is charged as long as it waits.
    pub(super) fn charge_untaken(&mut self, id: SeatId) {
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        let before = std::mem::replace(&mut seat.untaken, seat.to_client.len());
        self.charged += seat.untaken;
        self.uncharge(before);
    }

    /// The client hung up, or said good-bye. What it sent is still done, as far as there is a server.
    pub(super) fn client_gone(&mut self, id: SeatId) {
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        seat.client_gone = true;
        seat.closing = true;
        seat.to_client.clear();
        if seat.link == Link::Away {
            self.drop_held(id);
        }
        self.charge_untaken(id);
        self.wake(id);
    }

    /// Nothing more is taken from the client; what it sent is done and answered.
    pub(super) fn close(&mut self, id: SeatId) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.closing = true;
        }
        self.wake(id);
    }

    /// True when the client is gone, or let go, and nothing is left to do for it: what it was answered is flushed,
    /// by the holder if need be.
    pub(super) fn finished(&mut self, id: SeatId) -> bool {
        let Some(seat) = self.seats.get(&id) else {
            return true;
        };
        if !seat.closing || !seat.held.is_empty() || seat.to_client.len() > 0 {
            return false;
        }
        let shared = seat.shares();
        let others = self.seats.iter().any(|(&i, s)| i != id && !s.closing);
        let mine = match shared {
            true => !self.kept.is_empty() && !others,
            false => self.kept.any_of(id),
        };
        if !mine || self.flush_failed {
            return true;
        }
        self.flush_own(id);
        false
    }

    /// Nobody waits any longer for a server: all that waits is answered with an error, and so is
    /// what comes, until the connection goes on. One that has gone on waits for none.
    pub(super) fn fail(&mut self, id: SeatId) {
        let Some(seat) = self.seats.get_mut(&id).filter(|s| s.link != Link::Up) else {
            return;
        };
        seat.failing = true;
        if !seat.client_gone {
            let style = seat.terms.style;
            let waits = |h: &&Held| h.whose == Whose::Client && !h.sent;
            for held in seat.held.values().filter(waits) {
                let (cookie, offset) = (held.asked.cookie, held.asked.range.start);
                let (error, text) = (errno::EIO, "there is no server");
                let out = &mut seat.to_client;
                replies::refuse(style, cookie, offset, error, text, out);
            }
        }
        self.charge_untaken(id);
        self.drop_held(id);
    }

    /// Forgets what a connection has not sent.
    pub(super) fn drop_held(&mut self, id: SeatId) {
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        seat.queue.clear();
        let held: Vec<_> = seat.held.extract_if(|_, h| !h.sent).collect();
        for (cookie, held) in held {
            self.uncharge(held.cost);
            self.waiting.remove(&cookie);
            if held.fenced {
                self.unfence(&held.asked.range);
            }
        }
    }

    /// The link of a connection is gone: what was sent is to be sent again.
    pub(super) fn unsend(&mut self, id: SeatId) {
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        seat.to_server.clear();
        seat.sent = 0;
        let flushed = std::mem::take(&mut seat.flushing);
        seat.held.retain(|_, h| h.whose == Whose::Client);
        let mut again: Vec<u64> = Vec::new();
        for (&cookie, held) in &mut seat.held {
            held.sent = false;
            held.asked.forget();
            if !self.waiting.contains_key(&cookie) {
                again.push(cookie);
            }
        }
        again.sort_unstable();
        seat.queue = again.into();
        if seat.client_gone {
            self.drop_held(id);
        }
        if flushed {
            // Others wait for that flush, and are to send their own.
            self.wake_all();
        }
    }
}
