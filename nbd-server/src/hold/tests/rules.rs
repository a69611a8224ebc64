//! One rule each, of those that seeds meet rarely or that show only in what is not done.

use bytes::BytesMut;

use super::server::{Disk, Peer, Rng, terms, terms_of};
use crate::hold::volume::{Link, SeatId, Volume};
use crate::wire::greeting::transmission_flag;
use crate::wire::reply::{Simple, Style};
use crate::wire::request::{Request, flag, kind};
use crate::wire::{Put, errno};

const SHARE: usize = 16 << 10;

/// Clients in the simple style, and a server that does what comes at once when it is asked to.
struct Rig {
    volume: Volume,
    disk: Disk,
    rng: Rng,
    peers: Vec<(SeatId, Option<Peer>)>,
}

impl Rig {
    fn new(clients: usize, shares: bool) -> Rig {
        let mut volume = Volume::new(SHARE);
        let mut sit = |_| (volume.sit(terms_of(Style::Simple, shares)), None);
        let peers = (0..clients).map(&mut sit).collect();
        Rig {
            volume,
            disk: Disk::new(false, shares),
            rng: Rng(1),
            peers,
        }
    }

    fn up(&mut self, n: usize) {
        let (seat, peer) = &mut self.peers[n];
        *peer = Some(Peer::new(Style::Simple, &mut self.disk));
        let life = self.disk.life();
        self.volume.up(*seat, life, Vec::new()).unwrap();
    }

    fn down(&mut self, n: usize) {
        self.peers[n].1 = None;
        self.volume.down(self.peers[n].0);
    }

    fn is_up(&self, n: usize) -> bool {
        self.volume.is_up(self.peers[n].0)
    }

    fn ask(&mut self, n: usize, flags: u16, kind: u16, offset: u64, data: &[u8]) {
        let length = data.len() as u64;
        let request = Request {
            flags,
            kind,
            cookie: 7,
            offset,
            length,
        };
        let mut bytes = Vec::new();
        request.emit(Style::Simple, &mut bytes);
        if kind == kind::WRITE {
            bytes.put(data);
        }
        let mut bytes: BytesMut = bytes[..].into();
        self.volume
            .take_requests(self.peers[n].0, &mut bytes)
            .unwrap();
        assert!(bytes.is_empty(), "it is taken");
    }

    /// What is on its way to the server of a client reaches it.
    fn send(&mut self, n: usize) -> Vec<u8> {
        let (seat, peer) = &mut self.peers[n];
        self.volume.pump(*seat);
        let bytes = self.volume.seats.get_mut(seat).unwrap().to_server.take();
        if let Some(peer) = peer {
            peer.input.extend(&bytes);
        }
        bytes
    }

    /// Its server does one thing, and the answer comes.
    fn step(&mut self, n: usize) {
        let (seat, peer) = &mut self.peers[n];
        let Some(peer) = peer else { return };
        peer.step(&mut self.disk, &mut self.rng);
        let mut bytes: BytesMut = peer.output.drain(..).collect::<Vec<_>>()[..].into();
        self.volume.take_answers(*seat, &mut bytes).unwrap();
    }

    /// Until its server has nothing to do.
    fn settle(&mut self, n: usize) {
        loop {
            self.send(n);
            if self.peers[n].1.as_ref().is_none_or(Peer::is_idle) {
                return;
            }
            self.step(n);
        }
    }

    fn write(&mut self, n: usize, flags: u16, offset: u64, data: &[u8]) {
        self.ask(n, flags, kind::WRITE, offset, data);
        self.settle(n);
    }
}

/// Connections to a server without lives do not drive each other out: one of them shows that its
/// server lives, and the next goes on beside it, without a change sent again.
#[test]
fn connections_to_a_server_without_lives_are_there_together() {
    for shares in [true, false] {
        let mut rig = Rig::new(3, shares);
        rig.up(0);
        assert!(rig.is_up(0));
        rig.write(0, 0, 0, b"one");
        rig.up(1);
        assert!(!rig.is_up(1), "nobody has said yet that the server lives");
        // It comes after the first was asked: that says nothing of its server.
        rig.send(0);
        rig.up(2);
        rig.step(0);
        assert!(rig.is_up(1) && !rig.is_up(2));
        rig.settle(0);
        for n in 0..3 {
            assert!(rig.is_up(n), "{n}");
            assert!(!rig.volume.wants_close(rig.peers[n].0), "{n}");
            assert!(rig.send(n).is_empty(), "{n}");
        }
    }
}

/// The one that is asked dies: what it was answered is played by the next.
#[test]
fn a_server_that_does_not_say_that_it_lives_is_dead() {
    let mut rig = Rig::new(2, true);
    rig.up(0);
    rig.write(0, 0, 0, b"one");
    rig.up(1);
    rig.disk.content.fill(0);
    rig.down(0);
    rig.settle(1);
    assert!(rig.is_up(1));
    assert_eq!(&rig.disk.content[..3], b"one");
    assert_eq!(&rig.disk.durable[..3], b"one", "flushed by who played it");
    assert!(rig.volume.kept.is_empty());
}

/// A write with FUA is durable: what is older is never played over it, not for an instant.
#[test]
fn nothing_is_played_over_what_is_durable() {
    let mut rig = Rig::new(1, true);
    rig.up(0);
    rig.write(0, 0, 0, b"abcdef");
    rig.write(0, flag::FUA, 2, b"XY");
    assert_eq!(rig.volume.kept.len(), 2);
    rig.disk.crash(&mut Rng(4));
    rig.down(0);
    rig.up(0);
    loop {
        assert_eq!(&rig.disk.durable[2..4], b"XY");
        assert_eq!(&rig.disk.content[2..4], b"XY");
        rig.send(0);
        if rig.peers[0].1.as_ref().unwrap().is_idle() {
            break;
        }
        rig.step(0);
    }
    assert_eq!(&rig.disk.durable[..6], b"abXYef");
}

/// A change that cannot be played again: the link is closed when all that was sent on it is answered,
/// or one of those would be done after the next link played the same.
#[test]
fn a_failed_play_ends_when_all_of_it_is_answered() {
    let mut rig = Rig::new(1, true);
    rig.up(0);
    rig.write(0, 0, 0, b"one");
    rig.write(0, 0, 8, b"two");
    rig.down(0);
    rig.up(0);
    let seat = rig.peers[0].0;
    let sent = rig.send(0);
    let first = Request::parse(&sent, Style::Simple).unwrap();
    let second = Request::parse(
        &sent[Request::header_len(Style::Simple) + 3..],
        Style::Simple,
    );
    let (first, second) = (first.cookie, second.unwrap().cookie);
    let mut answer = |cookie, error| {
        let bytes = Simple { error, cookie }.bytes();
        rig.volume
            .take_answers(seat, &mut bytes[..].into())
            .unwrap();
        rig.volume.wants_close(seat)
    };
    assert!(!answer(first, errno::ENOSPC), "one is still under way");
    assert!(answer(second, 0));
}

/// The last link of before is gone: who plays then is told so, whoever noticed.
#[test]
fn who_is_to_play_is_woken() {
    let mut rig = Rig::new(2, true);
    rig.disk.tells = true;
    rig.up(0);
    rig.write(0, 0, 0, b"one");
    rig.disk.crash(&mut Rng(4));
    rig.up(1);
    rig.volume.woken();
    rig.down(0);
    assert!(rig.volume.replays(rig.peers[1].0));
    assert!(rig.volume.woken().contains(&rig.peers[1].0));
}

/// Two clients end at once: the flush of the one is the end of the other, too.
#[test]
fn who_waits_for_anothers_flush_to_end_is_woken() {
    let mut rig = Rig::new(2, true);
    rig.disk.tells = true;
    rig.up(0);
    rig.up(1);
    rig.write(0, 0, 0, b"one");
    let seats = [rig.peers[0].0, rig.peers[1].0];
    for seat in seats {
        rig.volume.client_gone(seat);
    }
    for seat in seats {
        assert!(!rig.volume.finished(seat));
    }
    rig.volume.woken();
    rig.settle(0);
    assert!(rig.volume.woken().contains(&seats[1]));
    assert!(seats.iter().all(|&seat| rig.volume.finished(seat)));
}

/// What a client has not taken is charged; one that takes nothing makes others slow, no more.
#[test]
fn answers_that_nobody_takes_are_charged_and_stop_nobody() {
    let mut rig = Rig::new(2, true);
    rig.disk.tells = true;
    rig.up(0);
    rig.up(1);
    let seats = [rig.peers[0].0, rig.peers[1].0];
    let mut asked = 0;
    while rig.volume.takes(seats[0]) {
        rig.ask(0, 0, kind::READ, 0, &[0; 60]);
        rig.settle(0);
        asked += 1;
        assert!(asked < 1000, "without end");
    }
    let untaken = rig.volume.seats[&seats[0]].to_client.len();
    assert!(untaken >= SHARE && rig.volume.charged() >= untaken);
    for n in 0..100 {
        assert!(rig.volume.takes(seats[1]), "{n}");
        rig.write(1, 0, 0, &[n; 40]);
        let seat = rig.volume.seats.get_mut(&seats[1]).unwrap();
        assert_eq!(seat.to_client.take().len(), Simple::LEN);
        rig.volume.charge_untaken(seats[1]);
    }
    assert!(rig.volume.charged() < 2 * SHARE + 4096);
    rig.volume.client_gone(seats[0]);
    assert!(rig.volume.charged() <= rig.volume.kept.cost());
}

/// What a status may take is charged before it comes.
#[test]
fn a_status_is_charged() {
    let mut volume = Volume::new(8 << 20);
    let seat = volume.sit(terms(Style::Structured));
    volume.up(seat, None, vec![(7, 1), (8, 2)]).unwrap();
    let request = Request {
        flags: 0,
        kind: kind::BLOCK_STATUS,
        cookie: 1,
        offset: 0,
        length: 8,
    };
    let mut one = Vec::new();
    request.emit(Style::Structured, &mut one);
    let mut bytes: BytesMut = one.repeat(10)[..].into();
    volume.take_requests(seat, &mut bytes).unwrap();
    assert_eq!(bytes.len(), 8 * one.len(), "two of ten");
}

/// A client of a read-only export that writes all the same is told so, whatever the server is now.
#[test]
fn a_read_only_client_changes_nothing() {
    let mut volume = Volume::new(SHARE);
    let mut told = terms(Style::Simple);
    told.flags |= transmission_flag::READ_ONLY;
    let seat = volume.sit(told);
    volume.up(seat, None, Vec::new()).unwrap();
    let mut bytes = Vec::new();
    Request {
        flags: 0,
        kind: kind::WRITE_ZEROES,
        cookie: 1,
        offset: 0,
        length: 8,
    }
    .emit(Style::Simple, &mut bytes);
    volume.take_requests(seat, &mut bytes[..].into()).unwrap();
    let seat = volume.seats.get_mut(&seat).unwrap();
    assert_eq!(seat.to_server.len(), 0);
    let told = Simple::parse(&seat.to_client.take()).unwrap();
    assert_eq!(told.error, errno::EPERM);
}

/// Patience that is over is over until requests flow again, whatever is tried meanwhile.
#[test]
fn patience_is_over_until_requests_flow() {
    let mut rig = Rig::new(1, true);
    rig.up(0);
    rig.write(0, 0, 0, b"one");
    rig.down(0);
    let seat = rig.peers[0].0;
    rig.volume.seats.get_mut(&seat).unwrap().to_client.take();
    rig.volume.fail(seat);
    rig.up(0);
    rig.ask(0, 0, kind::READ, 0, b"...");
    let said = rig.volume.seats.get_mut(&seat).unwrap().to_client.take();
    assert_eq!(Simple::parse(&said).unwrap().error, errno::EIO);
    rig.settle(0);
    assert!(matches!(rig.volume.seats[&seat].link, Link::Up));
    rig.ask(0, 0, kind::READ, 0, b"...");
    rig.settle(0);
    let said = rig.volume.seats.get_mut(&seat).unwrap().to_client.take();
    assert_eq!(&said[Simple::LEN..], b"one");
}

/// Where connections do not share their flushes, what one of them flushed is durable over what another
/// was answered before: that is not played over it.
#[test]
fn nothing_is_played_over_what_another_connection_flushed() {
    let mut rig = Rig::new(2, false);
    for n in 0..2 {
        rig.up(n);
        rig.settle(0);
        rig.settle(n);
    }
    rig.write(0, 0, 0, b"before");
    rig.write(1, 0, 2, b"XY");
    rig.ask(1, 0, kind::FLUSH, 0, b"");
    rig.settle(1);
    assert_eq!(&rig.disk.durable[2..4], b"XY");
    rig.disk.crash(&mut Rng(4));
    rig.down(0);
    rig.down(1);
    rig.up(0);
    rig.settle(0);
    assert!(rig.is_up(0));
    assert_eq!(&rig.disk.content[..6], b"beXYre");
}

/// The one whose flush makes room loses its link: another one flushes in its place.
#[test]
fn who_waits_for_a_flush_that_ends_with_its_link_is_woken() {
    let mut rig = Rig::new(2, true);
    rig.disk.tells = true;
    rig.up(0);
    rig.up(1);
    let seats = [rig.peers[0].0, rig.peers[1].0];
    rig.write(1, 0, 0, b"one");
    rig.volume.set_share(0);
    rig.send(0);
    assert!(rig.volume.seats[&seats[0]].flushing);
    assert!(!rig.volume.takes(seats[1]), "no room");
    rig.send(1);
    assert!(
        rig.peers[1].1.as_ref().unwrap().is_idle(),
        "one flush is enough"
    );
    rig.volume.woken();
    rig.down(0);
    assert!(rig.volume.woken().contains(&seats[1]));
    rig.settle(1);
    assert!(rig.volume.kept.is_empty());
}

/// What a client in one style was answered is played in the style of who plays it: a range that its
/// numbers cannot hold, in parts.
#[test]
fn changes_are_played_in_the_style_of_who_plays() {
    const LONG: u64 = (5 << 32) + 4096;
    let mut volume = Volume::new(SHARE);
    let mut seats = Vec::new();
    for style in [Style::Extended, Style::Simple] {
        let mut told = terms(style);
        told.size = LONG;
        let seat = volume.sit(told);
        volume.up(seat, Some("d/1".into()), Vec::new()).unwrap();
        seats.push(seat);
    }
    let mut bytes = Vec::new();
    for (flags, kind, length) in [
        (flag::PAYLOAD_LEN, kind::WRITE, 3),
        (0, kind::WRITE_ZEROES, LONG - 8),
    ] {
        let request = Request {
            flags,
            kind,
            cookie: 1,
            offset: if kind == kind::WRITE { 0 } else { 8 },
            length,
        };
        request.emit(Style::Extended, &mut bytes);
        if kind == kind::WRITE {
            bytes.put(b"abc");
        }
    }
    volume
        .take_requests(seats[0], &mut bytes[..].into())
        .unwrap();
    let sent = |volume: &mut Volume, seat| {
        let seat = volume.seats.get_mut(&seat).unwrap();
        (seat.to_server.take(), seat.terms.style)
    };
    let answer = |volume: &mut Volume, seat, what: &mut dyn FnMut(&Request, &[u8])| {
        loop {
            let (bytes, style) = sent(volume, seat);
            let mut rest = &bytes[..];
            if rest.is_empty() {
                break;
            }
            let mut answers = Vec::new();
            while let Ok(r) = Request::parse(rest, style) {
                let head = Request::header_len(style);
                let len = if r.kind == kind::WRITE { 3 } else { 0 };
                what(&r, &rest[head..head + len]);
                rest = &rest[head + len..];
                let simple = Simple {
                    error: 0,
                    cookie: r.cookie,
                };
                match style {
                    Style::Simple => answers.put(&simple.bytes()),
                    _ => crate::wire::reply::Chunk {
                        flags: crate::wire::reply::DONE,
                        kind: crate::wire::chunk::kind::NONE,
                        cookie: r.cookie,
                        offset: r.offset,
                        length: 0,
                    }
                    .emit(style, &mut answers),
                }
            }
            assert!(rest.is_empty(), "whole requests in its style");
            volume.take_answers(seat, &mut answers[..].into()).unwrap();
        }
    };
    answer(&mut volume, seats[0], &mut |_, _| {});
    assert_eq!(volume.kept.len(), 2);
    for seat in &seats {
        volume.down(*seat);
    }
    volume.up(seats[1], Some("d/2".into()), Vec::new()).unwrap();
    let mut zeroed = 8;
    answer(&mut volume, seats[1], &mut |r, payload| match r.kind {
        kind::WRITE => assert_eq!((r.flags, r.offset, payload), (0, 0, &b"abc"[..])),
        kind::WRITE_ZEROES => {
            assert_eq!(r.offset, zeroed);
            zeroed += r.length;
        }
        k => assert_eq!(k, kind::FLUSH),
    });
    assert_eq!(zeroed, LONG);
    assert!(volume.kept.is_empty() && volume.is_up(seats[1]));
}

/// Patience that ends as requests begin to flow again has not ended.
#[test]
fn patience_does_not_end_for_who_has_a_server() {
    let mut rig = Rig::new(1, true);
    rig.up(0);
    let seat = rig.peers[0].0;
    rig.volume.fail(seat);
    rig.ask(0, 0, kind::WRITE, 0, b"one");
    rig.settle(0);
    assert_eq!(&rig.disk.content[..3], b"one");
}

/// What changes nothing is not kept, wherever it is.
#[test]
fn a_change_of_nothing_is_not_kept() {
    let mut rig = Rig::new(1, true);
    rig.up(0);
    rig.ask(0, 0, kind::TRIM, u64::MAX, b"");
    let sent = rig.send(0);
    let cookie = Request::parse(&sent, Style::Simple).unwrap().cookie;
    let answer = Simple { error: 0, cookie }.bytes();
    let seat = rig.peers[0].0;
    rig.volume
        .take_answers(seat, &mut answer[..].into())
        .unwrap();
    assert!(rig.volume.kept.is_empty());
}

/// A flush of the holder's own fails, for want of room, say: what is refused for it asks for another one,
/// or a client that never flushes would be refused for ever.
#[test]
fn a_flush_that_failed_is_tried_again() {
    let mut rig = Rig::new(1, true);
    rig.up(0);
    let seat = rig.peers[0].0;
    rig.write(0, 0, 0, b"one");
    rig.volume.set_share(512);
    let flush = Request::parse(&rig.send(0), Style::Simple).unwrap();
    assert_eq!(flush.kind, kind::FLUSH);
    rig.peers[0].1.as_mut().unwrap().input.clear();
    let failed = Simple {
        error: errno::ENOSPC,
        cookie: flush.cookie,
    };
    let answer = failed.bytes();
    rig.volume
        .take_answers(seat, &mut answer[..].into())
        .unwrap();
    assert!(rig.send(0).is_empty(), "not without end and rest");
    let told = |rig: &mut Rig| {
        let said = rig.volume.seats.get_mut(&seat).unwrap().to_client.take();
        rig.volume.charge_untaken(seat);
        Simple::parse(&said).unwrap().error
    };
    assert_eq!(told(&mut rig), 0);
    rig.write(0, 0, 0, b"two");
    assert_eq!(told(&mut rig), errno::EIO);
    assert_eq!(&rig.disk.durable[..3], b"one", "flushed again");
    rig.write(0, 0, 0, b"two");
    assert_eq!(told(&mut rig), 0);
}
