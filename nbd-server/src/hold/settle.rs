//! Servers that come and go, and what of the kept changes they still have.
//!
//! | a connection reaches a server that tells | then |
//! |---|---|
//! | the life that the volume is in | nothing answered is lost: it goes on with what is not answered |
//! | no life, while another connection's link answers a flush that was sent later | the server of that link lives: it goes on |
//! | another life, or none | no connection goes on before every kept change was played again |
//! | the life of another disk | the connection ends: it is not the export that the client opened |
//!
//! Playing again begins when no connection has a link of before: what such a link still answers is
//! kept, and must not come too late to be played. One connection plays, in the order in which the
//! changes were sent, and waits where two of them meet; at the end it flushes, so that no other
//! connection's flush has to cover what this one sent. A link that fails meanwhile begins it anew
//! with the next one, when it has answered what was sent: what was played twice is there once.
//!
//! Where connections do not share their flushes, a life says nothing of a connection's own changes:
//! each that comes back plays its own again.

use std::ops::Range;

use crate::hold::kept::Place;
use crate::hold::spans::Spans;
use crate::hold::volume::{Link, Seat, SeatId, Volume, Whose};
use crate::wire::greeting::transmission_flag;
use crate::wire::reply::Style;

/// Most changes that are played at once.
const PLAYED_MAX: usize = 64;
/// Bytes that wait for the server, from which on nothing more is played.
const UNSENT_MAX: usize = 8 << 20;
/// Longest range that is played at once where a header's length has 32 bits: what a client with
/// longer ones was answered is played in parts.
const PART: u64 = 1 << 31;

/// See the module text.
#[derive(Debug, Default)]
pub(super) enum Phase {
    /// No server was reached yet.
    #[default]
    New,
    /// Requests go to servers with this life, all that is kept included.
    Flowing(Option<String>),
    /// Links of before are being closed.
    Settling,
    /// One connection plays what is kept.
    Playing(Playing),
}

/// How far it is.
#[derive(Debug)]
pub(super) struct Playing {
    seat: SeatId,
    life: Option<String>,
    /// What is kept from here on is not played yet.
    next: Place,
    /// Of that change, up to here it is.
    played: u64,
    under_way: usize,
    /// The flush at the end was sent.
    flushed: bool,
    busy: Spans,
    failed: Option<u32>,
}

/// The disk in the name of a life.
fn disk(life: &str) -> Option<&str> {
    life.split_once('/').map(|(disk, _)| disk)
}

impl Volume {
    /// A connection has a server, which told of this life. `ids`: contexts as the server and as the
    /// client number them. Error: it is another disk.
    pub(super) fn up(
        &mut self,
        id: SeatId,
        life: Option<String>,
        ids: Vec<(u32, u32)>,
    ) -> Result<(), String> {
        if let Some(new) = life.as_deref().and_then(disk) {
            let old = self.disk.get_or_insert_with(|| new.to_owned());
            if old.as_str() != new {
                return Err(format!(
                    "the export is another disk now: {new}, and the client opened {old}"
                ));
            }
        }
        self.set_ids(id, ids);
        self.clock += 1;
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.link = Link::Ready(life);
            seat.since = self.clock;
        }
        self.settle();
        Ok(())
    }

    /// A connection has no server any more.
    pub(super) fn down(&mut self, id: SeatId) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.link = Link::Away;
        }
        self.unsend(id);
        if matches!(&self.phase, Phase::Playing(p) if p.seat == id) {
            self.phase = Phase::Settling;
        }
        self.settle();
    }

    /// Nothing more is sent to a connection's server; its link is closed when all is answered.
    pub(super) fn drain(&mut self, id: SeatId) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.link = Link::Draining;
        }
        self.wake(id);
    }

    /// True when the driver is to close the connection's link: it is drained, or it is of a server
    /// whose life is over.
    pub(super) fn wants_close(&self, id: SeatId) -> bool {
        let Some(seat) = self.seats.get(&id) else {
            return true;
        };
        match (&seat.link, &self.phase) {
            (Link::Draining, _) => seat.sent == 0,
            (Link::Ready(Some(life)), Phase::Flowing(Some(flowing))) => life != flowing,
            // What it has still to answer is not done behind the back of the next.
            (Link::Ready(_), Phase::Playing(p)) => {
                p.seat == id && p.failed.is_some() && p.under_way == 0
            }
            _ => false,
        }
    }

    /// The error that a server answered to a change that was played again.
    pub(super) fn play_error(&self, id: SeatId) -> Option<u32> {
        match &self.phase {
            Phase::Playing(p) if p.seat == id => p.failed,
            _ => None,
        }
    }

    /// True when this connection plays what is kept.
    pub(super) fn replays(&self, id: SeatId) -> bool {
        matches!(&self.phase, Phase::Playing(p) if p.seat == id)
    }

    /// True when the requests of all connections flow.
    pub(super) fn is_flowing(&self) -> bool {
        self.seats.values().all(|seat| seat.link == Link::Up)
    }

    fn ready(&self) -> Vec<(SeatId, Option<String>)> {
        let of = |(&id, seat): (&SeatId, &Seat)| match &seat.link {
            Link::Ready(life) => Some((id, life.clone())),
            _ => None,
        };
        self.seats.iter().filter_map(of).collect()
    }

    /// True when requests of the connection flow.
    pub(super) fn is_up(&self, id: SeatId) -> bool {
        self.seats.get(&id).is_some_and(|s| s.link == Link::Up)
    }

    /// Lets connections with a fresh link go on, or brings the others to an end first.
    pub(super) fn settle(&mut self) {
        for (id, life) in self.ready() {
            let told = matches!(&self.phase, Phase::Flowing(Some(l)) if life.as_ref() == Some(l));
            let seat = self.seats.get(&id);
            if seat.is_some_and(|s| !s.writes() || (told && s.shares())) {
                self.go_on(id);
            }
        }
        let Some((last, life)) = self.ready().pop() else {
            return;
        };
        if matches!(self.phase, Phase::Playing(_)) || self.asks_for_voucher() {
            return;
        }
        let old = |seat: &Seat| matches!(seat.link, Link::Up | Link::Draining) && seat.writes();
        if self.seats.values().any(old) {
            self.phase = Phase::Settling;
            for seat in self.seats.values_mut() {
                if seat.link == Link::Up && seat.writes() {
                    seat.link = Link::Draining;
                }
            }
            return self.wake_all();
        }
        self.phase = Phase::Playing(Playing {
            seat: last,
            life,
            next: (0, 0),
            played: 0,
            under_way: 0,
            flushed: false,
            busy: Spans::default(),
            failed: None,
        });
        self.replay(last);
    }

    /// Whether those with a fresh link may have the server of the others, for all that was told, and
    /// one of the others says that it lives, or is asked to.
    fn asks_for_voucher(&mut self) -> bool {
        let ready = self.ready();
        let may = ready.iter().all(|(id, life)| self.may_be_there(*id, life));
        if ready.is_empty() || !may {
            return false;
        }
        let up = |(_, s): &(&SeatId, &Seat)| s.link == Link::Up && s.writes();
        let Some((&voucher, seat)) = self.seats.iter().find(up) else {
            return false;
        };
        if !seat.terms.has(transmission_flag::SEND_FLUSH) {
            // Nothing of what it answers is kept, so nothing could be played.
            self.vouched(u64::MAX);
        } else if !seat.flushing {
            self.send_flush(voucher, Whose::Own);
            self.wake(voucher);
        }
        true
    }

    /// Whether a connection that told of `life` may have the server of those that flow.
    fn may_be_there(&self, id: SeatId, life: &Option<String>) -> bool {
        let Phase::Flowing(flowing) = &self.phase else {
            return false;
        };
        let shares = self.seats.get(&id).is_some_and(Seat::shares);
        let told = life.is_none() || flowing.is_none() || life == flowing;
        told && (shares || !self.kept.any_of(id))
    }

    /// A link that flows has answered what it was sent at `stamp`: those that were ready before go on.
    pub(super) fn vouched(&mut self, stamp: u64) {
        for (id, life) in self.ready() {
            let before = self.seats.get(&id).is_some_and(|s| s.since < stamp);
            if before && self.may_be_there(id, &life) {
                self.go_on(id);
            }
        }
        self.settle();
    }

    fn go_on(&mut self, id: SeatId) {
        // One that is to leave its server leaves it.
        if let Some(seat) = self.seats.get_mut(&id)
            && matches!(seat.link, Link::Ready(_))
        {
            seat.link = Link::Up;
            seat.failing = false;
        }
        self.wake(id);
        self.pump(id);
    }

    /// Sends kept changes as far as they do not meet one that is under way; at the end, all go on.
    pub(super) fn replay(&mut self, id: SeatId) {
        while let Phase::Playing(p) = &mut self.phase {
            let seat = self.seats.get(&id);
            let unsent = seat.map_or(0, |s| s.to_server.len());
            let longest = match seat.map(|s| s.terms.style) {
                Some(Style::Extended) => u64::MAX,
                _ => PART,
            };
            let Some((place, change)) = self.kept.next(p.next) else {
                if p.under_way > 0 || p.failed.is_some() {
                    return;
                }
                if !p.flushed && !self.kept.is_empty() {
                    p.flushed = true;
                    p.under_way = 1;
                    return self.send_flush(id, Whose::Replay);
                }
                let life = p.life.take();
                let free = self.kept.clear();
                self.uncharge(free);
                return self.flow(id, life);
            };
            let (start, end) = (change.range.start.max(p.played), change.range.end);
            let part = match change.payload.is_empty() {
                true => start..end.min(start.saturating_add(longest)),
                false => start..end,
            };
            let full = p.under_way >= PLAYED_MAX || unsent >= UNSENT_MAX;
            if full || p.failed.is_some() || !p.busy.add(&part) {
                return;
            }
            (p.next, p.played) = match part.end < end {
                true => (place, part.end),
                false => ((place.0, place.1 + 1), 0),
            };
            p.under_way += 1;
            let mut change = change.clone();
            change.range = part;
            self.send_own(id, Whose::Replay, &change);
        }
    }

    fn flow(&mut self, id: SeatId, life: Option<String>) {
        self.phase = Phase::Flowing(life.clone());
        self.go_on(id);
        for (other, told) in self.ready() {
            // Without a life to tell, who has a link has it to the server that was played to: the
            // one before is gone.
            if told == life {
                self.go_on(other);
            } else {
                self.wake(other);
            }
        }
        self.asks_for_voucher();
    }

    /// A change that was played again is answered.
    pub(super) fn replayed(&mut self, id: SeatId, range: &Range<u64>, error: u32) {
        if let Phase::Playing(p) = &mut self.phase {
            p.under_way -= 1;
            p.busy.remove(range);
            if error != 0 {
                p.failed = Some(error);
            }
        }
        self.wake(id);
    }
}
