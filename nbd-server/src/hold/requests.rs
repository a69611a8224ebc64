//! What clients ask: taken as far as there is room, and sent as far as nothing that it meets is under
//! way.

use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};

use crate::hold::kept::Change;
use crate::hold::replies::{self, Asked};
use crate::hold::volume::{Held, Link, REQUEST_COST, SeatId, Volume, Whose, is_change};
use crate::wire::reply::Style;
use crate::wire::request::{Request, flag, kind};
use crate::wire::{self, errno};

impl Volume {
    /// Takes whole requests from the start of `input`, as many as there is room for; how many bytes
    /// the next one needs. Error: the client broke the protocol.
    pub(super) fn take_requests(
        &mut self,
        id: SeatId,
        input: &mut BytesMut,
    ) -> Result<usize, String> {
        let mut need = 0;
        while self.takes(id) {
            let Some(seat) = self.seats.get_mut(&id) else {
                break;
            };
            let style = seat.terms.style;
            let request = match Request::parse(input, style) {
                Ok(request) => request,
                Err(wire::Error::NeedMore(n)) => {
                    need = n;
                    break;
                }
                Err(wire::Error::Malformed(why)) => return Err(why.into()),
            };
            let has_payload = match style {
                Style::Extended => request.flags & flag::PAYLOAD_LEN != 0,
                _ => request.kind == kind::WRITE,
            };
            if has_payload != (request.kind == kind::WRITE) {
                return Err(format!(
                    "command {} with flags {:#x} has another payload than the holder knows",
                    request.kind, request.flags
                ));
            }
            let payload = if has_payload { request.length } else { 0 };
            if payload > seat.terms.payload_max().into() {
                return Err(format!("a write of {payload} bytes"));
            }
            let header = Request::header_len(style);
            // At most `MAX_HELD`.
            let whole = header + payload as usize;
            if input.len() < whole {
                need = whole;
                break;
            }
            let payload = Bytes::copy_from_slice(&input[header..whole]);
            input.advance(whole);
            if request.kind == kind::DISC {
                self.client_gone(id);
                break;
            }
            self.take(id, &request, payload);
        }
        self.pump(id);
        Ok(need)
    }

    fn take(&mut self, id: SeatId, request: &Request, payload: Bytes) {
        let full = self.charged >= self.share;
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        let refused = if request.kind > kind::BLOCK_STATUS {
            Some((errno::EINVAL, "the holder does not know this command"))
        } else if request.kind == kind::READ && request.length > u64::from(seat.terms.payload_max())
        {
            Some((errno::EINVAL, "a read is longer than the server takes"))
        } else if request.offset.checked_add(request.length).is_none() {
            Some((errno::EINVAL, "a range ends behind all numbers"))
        } else if is_change(request.kind) && !seat.writes() {
            Some((errno::EPERM, "the export is read-only"))
        } else if seat.failing {
            Some((errno::EIO, "there is no server"))
        } else if full && self.flush_failed && is_change(request.kind) {
            Some((errno::EIO, "the server does not flush what it answered"))
        } else {
            None
        };
        if let Some((error, text)) = refused {
            let (style, out) = (seat.terms.style, &mut seat.to_client);
            replies::refuse(style, request.cookie, request.offset, error, text, out);
            self.charge_untaken(id);
            if self.flush_failed {
                // What it failed for may be over, and a client that never flushes would be refused for
                // ever.
                self.flush_own(id);
            }
            return;
        }
        let answer = match request.kind {
            kind::READ => request.length as usize,
            kind::BLOCK_STATUS => replies::MAX_STATUS as usize * seat.ids.len(),
            _ => 0,
        };
        let end = match request.kind {
            kind::FLUSH => request.offset,
            _ => request.offset + request.length,
        };
        let held = Held {
            asked: Asked::new(request.kind, request.offset..end, request.cookie),
            whose: Whose::Client,
            flags: request.flags,
            length: request.length,
            cost: REQUEST_COST + payload.len() + answer,
            payload,
            sent: false,
            fenced: false,
            stamp: 0,
        };
        self.charged += held.cost;
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.held.insert(cookie, held);
            seat.queue.push_back(cookie);
        }
    }

    /// Sends what may be sent.
    pub(super) fn pump(&mut self, id: SeatId) {
        if self.replays(id) {
            return self.replay(id);
        }
        while let Some(seat) = self.seats.get_mut(&id)
            && seat.link == Link::Up
            && let Some(cookie) = seat.queue.pop_front()
        {
            let Some(held) = seat.held.get_mut(&cookie) else {
                continue;
            };
            if is_change(held.asked.kind) && !held.fenced {
                let range = held.asked.range.clone();
                if self.busy.meets(&range) || self.meets_waiting(&range) {
                    self.waiting.insert(cookie, id);
                    continue;
                }
                self.fence(id, cookie);
            }
            self.send(id, cookie);
        }
        self.flush_if_full(id);
    }

    fn meets_waiting(&self, range: &Range<u64>) -> bool {
        self.waiting.iter().any(|(cookie, seat)| {
            let held = self.seats.get(seat).and_then(|s| s.held.get(cookie));
            held.is_some_and(|h| h.asked.range.start < range.end && range.start < h.asked.range.end)
        })
    }

    fn fence(&mut self, id: SeatId, cookie: u64) {
        self.clock += 1;
        let seat = self.seats.get_mut(&id);
        if let Some(held) = seat.and_then(|s| s.held.get_mut(&cookie)) {
            self.busy.add(&held.asked.range);
            held.fenced = true;
            held.stamp = self.clock;
        }
    }

    /// Lets go of a change's range, and of those that waited for it.
    pub(super) fn unfence(&mut self, range: &Range<u64>) {
        self.busy.remove(range);
        if self.waiting.is_empty() {
            return;
        }
        for (cookie, id) in std::mem::take(&mut self.waiting) {
            let seat = self.seats.get(&id);
            let Some(held) = seat.and_then(|s| s.held.get(&cookie)) else {
                continue;
            };
            let range = held.asked.range.clone();
            // Those before it that still wait are in `waiting` again.
            if self.busy.meets(&range) || self.meets_waiting(&range) {
                self.waiting.insert(cookie, id);
                continue;
            }
            self.fence(id, cookie);
            if let Some(seat) = self.seats.get_mut(&id) {
                seat.queue.push_back(cookie);
            }
            self.wake(id);
        }
    }

    fn send(&mut self, id: SeatId, cookie: u64) {
        self.clock += 1;
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        let Some(held) = seat.held.get_mut(&cookie) else {
            return;
        };
        if held.asked.kind == kind::FLUSH {
            held.stamp = self.clock;
        }
        held.sent = true;
        seat.sent += 1;
        let request = Request {
            flags: held.flags,
            kind: held.asked.kind,
            cookie,
            offset: held.asked.range.start,
            length: held.length,
        };
        request.emit(seat.terms.style, &mut seat.to_server);
        seat.to_server.pass(&held.payload);
    }

    /// Sends one of the holder's own: a flush, or a change again.
    pub(super) fn send_own(&mut self, id: SeatId, whose: Whose, change: &Change) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let Some(seat) = self.seats.get_mut(&id) else {
            return;
        };
        let length = change.range.end - change.range.start;
        // It may have been answered in another style.
        let payload = match (seat.terms.style, change.kind) {
            (Style::Extended, kind::WRITE) => flag::PAYLOAD_LEN,
            _ => 0,
        };
        let held = Held {
            asked: Asked::new(change.kind, change.range.clone(), 0),
            whose,
            flags: change.flags & !flag::PAYLOAD_LEN | payload,
            length,
            payload: change.payload.clone(),
            cost: 0,
            sent: false,
            fenced: false,
            stamp: 0,
        };
        seat.held.insert(cookie, held);
        self.send(id, cookie);
        // It may be another connection's end that made this one play.
        self.wake(id);
    }

    fn flush_if_full(&mut self, id: SeatId) {
        let full = self.kept.cost() > self.share / 2
            || (self.charged >= self.share && !self.kept.is_empty());
        if full && !self.flush_failed {
            self.flush_own(id);
        }
    }

    /// Flushes what is kept, on this connection, unless that is under way.
    pub(super) fn flush_own(&mut self, id: SeatId) {
        let Some(seat) = self.seats.get(&id) else {
            return;
        };
        let under_way = match seat.shares() {
            true => self.seats.values().any(|s| s.flushing),
            false => seat.flushing || !self.kept.any_of(id),
        };
        if !under_way && seat.link == Link::Up {
            self.send_flush(id, Whose::Own);
        }
    }

    pub(super) fn send_flush(&mut self, id: SeatId, whose: Whose) {
        let flush = Change {
            kind: kind::FLUSH,
            flags: 0,
            range: 0..0,
            payload: Bytes::new(),
        };
        self.send_own(id, whose, &flush);
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.flushing |= whose == Whose::Own;
        }
    }
}
