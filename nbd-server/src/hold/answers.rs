//! What servers answer: passed on, and of changes kept until a flush covers them.

use std::ops::Range;

use bytes::BytesMut;

use crate::hold::kept::{Change, Entry};
use crate::hold::replies::{self, Next};
use crate::hold::volume::{Held, Link, REQUEST_COST, Seat, SeatId, Volume, Whose, is_change};
use crate::wire::errno;
use crate::wire::greeting::transmission_flag;
use crate::wire::request::{flag, kind};

impl Volume {
    /// Takes whole pieces of answers from the start of `input`; how many bytes the next one needs.
    /// Error: the server broke the protocol.
    pub(super) fn take_answers(
        &mut self,
        id: SeatId,
        input: &mut BytesMut,
    ) -> Result<usize, String> {
        let need = loop {
            let Some(seat) = self.seats.get_mut(&id) else {
                break 0;
            };
            let style = seat.terms.style;
            let Seat {
                held,
                ids,
                to_client,
                client_gone,
                ..
            } = seat;
            let found = replies::next(input, style, |cookie| {
                held.get(&cookie).filter(|h| h.sent).map(|h| &h.asked)
            });
            let piece = match found? {
                Next::NeedMore(n) => break n,
                Next::Piece(piece) => piece,
            };
            let Some(asker) = held.get_mut(&piece.cookie) else {
                break 0;
            };
            let out = (asker.whose == Whose::Client && !*client_gone).then_some(to_client);
            let done = piece.take(input, style, &mut asker.asked, ids, out)?;
            self.charge_untaken(id);
            if let Some(error) = done {
                self.answered(id, piece.cookie, error);
            }
        };
        self.pump(id);
        Ok(need)
    }

    fn answered(&mut self, id: SeatId, cookie: u64, error: u32) {
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        if error == errno::ESHUTDOWN {
            // No answer: the next server is asked. Nothing more is sent to this one.
            if let Some(held) = seat.held.get_mut(&cookie) {
                held.asked.forget();
                held.sent = false;
            }
            seat.sent -= 1;
            seat.link = Link::Draining;
            return self.wake(id);
        }
        let Some(held) = seat.held.remove(&cookie) else {
            return;
        };
        seat.sent -= 1;
        let shared = seat.shares();
        let up = seat.link == Link::Up;
        let flushes = seat.terms.has(transmission_flag::SEND_FLUSH);
        if held.whose == Whose::Own {
            seat.flushing = false;
            self.flush_failed = error != 0;
            // Those that end wait for it, too.
            self.wake_all();
        }
        self.uncharge(held.cost);
        let command = held.asked.kind;
        if held.whose == Whose::Replay {
            return self.replayed(id, &held.asked.range, error);
        }
        if command == kind::FLUSH && error == 0 {
            self.flush_failed = false;
            let free = self.kept.covered(held.stamp, (!shared).then_some(id));
            self.freed(free);
        }
        if is_change(command) {
            if error == 0 && flushes && !held.asked.range.is_empty() {
                match held.flags & flag::FUA != 0 {
                    true => self.durable(&held.asked.range),
                    false => self.keep(id, &held),
                }
            }
            self.unfence(&held.asked.range);
        }
        if held.whose == Whose::Own && up {
            self.vouched(held.stamp);
        }
    }

    fn durable(&mut self, range: &Range<u64>) {
        let free = self.kept.cut(range);
        self.freed(free);
    }

    fn freed(&mut self, free: isize) {
        match usize::try_from(free) {
            Ok(free) => self.uncharge(free),
            Err(_) => self.charged += free.unsigned_abs(),
        }
    }

    fn keep(&mut self, id: SeatId, held: &Held) {
        self.clock += 1;
        // Zeros that were fast need not be so when they are played again.
        let flags = held.flags & !flag::FAST_ZERO;
        let change = Change {
            kind: held.asked.kind,
            flags,
            range: held.asked.range.clone(),
            payload: held.payload.clone(),
        };
        let cost = REQUEST_COST + held.payload.len();
        self.charged += cost;
        let entry = Entry {
            change,
            answered: self.clock,
            seat: id,
            cost,
        };
        self.kept.keep(held.stamp, entry);
    }
}
