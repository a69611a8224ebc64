//! Clients write and read through a volume while its servers die, are stopped, and lose what was
//! not flushed. Every request is answered once, every read has what the client was told before, at
//! the end the disk has every answered write, flushed or not; and at every instant a cut that takes
//! the holder, too, would leave what was flushed, or something newer.
//!
//! Nothing here waits: links, deaths and every byte that moves are drawn from a seed.

use bytes::BytesMut;

use super::server::{Disk, Peer, Rng, SIZE, terms_of};
use super::truth::Byte;
use crate::hold::volume::{SeatId, Volume};
use crate::wire::chunk::{self, kind as chunk_kind};
use crate::wire::reply::{Chunk, DONE, Simple, Style};
use crate::wire::request::{Request, flag, kind};

const SHARE: usize = 16 << 10;

/// A client; its requests may meet each other, and those of others.
#[derive(Debug)]
struct Client {
    seat: SeatId,
    style: Style,
    to: BytesMut,
    from: Vec<u8>,
    asked: Vec<Asked>,
    next: u64,
    answered: u64,
}

#[derive(Clone, Debug)]
struct Asked {
    request: Request,
    /// Reads: what each byte may be.
    may: Vec<Vec<u8>>,
    data: Vec<Option<u8>>,
    /// Reads, and flushes of all bytes: no change was under way beside it.
    alone: Vec<bool>,
}

struct World {
    volume: Volume,
    disk: Disk,
    peers: Vec<Option<Peer>>,
    clients: Vec<Client>,
    bytes: Vec<Byte>,
    rng: Rng,
    fill: u8,
    /// Of so many steps, servers die in one.
    calm: u64,
}

fn change(k: u16) -> bool {
    matches!(k, kind::WRITE | kind::TRIM | kind::WRITE_ZEROES)
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng(seed);
        let shares = !rng.once_in(3);
        let mut volume = Volume::new(SHARE);
        let count = rng.below(3) + 1;
        let clients: Vec<Client> = (0..count)
            .map(|_| {
                let style =
                    [Style::Simple, Style::Structured, Style::Extended][rng.below(3) as usize];
                Client {
                    seat: volume.sit(terms_of(style, shares)),
                    style,
                    to: BytesMut::new(),
                    from: Vec::new(),
                    asked: Vec::new(),
                    next: 1,
                    answered: 0,
                }
            })
            .collect();
        World {
            volume,
            disk: Disk::new(rng.once_in(2), shares),
            peers: clients.iter().map(|_| None).collect(),
            clients,
            bytes: vec![Byte::zero(); SIZE],
            calm: [40, 400][rng.below(2) as usize],
            rng,
            fill: 0,
        }
    }

    fn ask(&mut self, n: usize) {
        let client = &self.clients[n];
        if client.asked.len() >= 6 {
            return;
        }
        let rng = &mut self.rng;
        let k = [
            kind::READ,
            kind::WRITE,
            kind::WRITE,
            kind::TRIM,
            kind::WRITE_ZEROES,
            kind::FLUSH,
        ][rng.below(6) as usize];
        let len = rng.below(12) + 1;
        let at = rng.below(SIZE as u64 - len);
        let (offset, length) = if k == kind::FLUSH { (0, 0) } else { (at, len) };
        let range = offset as usize..(offset + length) as usize;
        let mut flags = if change(k) && rng.once_in(5) {
            flag::FUA
        } else {
            0
        };
        if client.style == Style::Extended && k == kind::WRITE {
            flags |= flag::PAYLOAD_LEN;
        }
        self.fill = self.fill % 250 + 1;
        let fill = if k == kind::WRITE { self.fill } else { 0 };
        let request = Request {
            flags,
            kind: k,
            cookie: client.next,
            offset,
            length,
        };
        if change(k) {
            for byte in &mut self.bytes[range.clone()] {
                byte.asked(fill);
            }
            // A read that is under way may see it.
            for other in self.clients.iter_mut().flat_map(|c| &mut c.asked) {
                if other.request.kind == kind::FLUSH {
                    other.alone[range.clone()].fill(false);
                }
                let start = other.request.offset as usize;
                for (i, m) in other.may.iter_mut().enumerate() {
                    if range.contains(&(start + i)) {
                        m.push(fill);
                        other.alone[i] = false;
                    }
                }
            }
        }
        let (mut may, mut alone) = (Vec::new(), Vec::new());
        if k == kind::READ {
            may = self.bytes[range.clone()].iter().map(Byte::may).collect();
            alone = self.bytes[range].iter().map(Byte::is_alone).collect();
        } else if k == kind::FLUSH {
            alone = self.bytes.iter().map(Byte::is_alone).collect();
        }
        let client = &mut self.clients[n];
        client.next += 1;
        let mut bytes = Vec::new();
        request.emit(client.style, &mut bytes);
        if k == kind::WRITE {
            bytes.extend(vec![fill; length as usize]);
        }
        client.to.extend_from_slice(&bytes);
        client.asked.push(Asked {
            request,
            may,
            data: vec![None; if k == kind::READ { length as usize } else { 0 }],
            alone,
        });
    }

    /// Brings a link up: a server is there whenever it is asked for.
    fn dial(&mut self, n: usize) {
        let client = &self.clients[n];
        self.peers[n] = Some(Peer::new(client.style, &mut self.disk));
        let life = self.disk.life();
        self.volume.up(client.seat, life, Vec::new()).unwrap();
    }

    /// What the server's end of a connection left is read before its end is seen, or lost.
    fn cut(&mut self, n: usize) {
        let Some(mut peer) = self.peers[n].take() else {
            return;
        };
        let keep = self.rng.below(peer.output.len() as u64 + 1) as usize;
        let mut rest: BytesMut = peer.output.drain(..keep).collect::<Vec<_>>()[..].into();
        let seat = self.clients[n].seat;
        self.volume.take_answers(seat, &mut rest).unwrap();
        self.volume.down(seat);
    }

    /// Every server process is gone, in order or not.
    fn die(&mut self) {
        if self.rng.once_in(3) {
            self.disk.close();
        } else {
            self.disk.crash(&mut self.rng);
        }
        for peer in self.peers.iter_mut().flatten() {
            peer.die();
        }
        // Each connection notices in its own time: some at once, others after the first has a new
        // server.
        for n in 0..self.peers.len() {
            if self.rng.once_in(2) {
                self.cut(n);
                if self.rng.once_in(2) {
                    self.dial(n);
                }
            }
        }
    }

    fn is_dead(&self, n: usize) -> bool {
        self.peers[n].as_ref().is_some_and(|p| p.dead)
    }

    /// Moves some bytes of one connection one way or the other, or lets its server work.
    fn step(&mut self, n: usize) {
        let seat = self.clients[n].seat;
        // A request and its answer more than its share for each connection, and no more.
        assert!(
            self.volume.charged() <= SHARE + 4096,
            "{}",
            self.volume.charged()
        );
        match self.rng.below(5) {
            0 => {
                let client = &mut self.clients[n];
                let take = self.rng.below(client.to.len() as u64 + 1) as usize;
                let mut rest = client.to.split_off(take);
                self.volume.take_requests(seat, &mut client.to).unwrap();
                // What was not taken stands before what was not offered.
                let mut left = client.to.split();
                left.unsplit(rest.split());
                client.to = left;
            }
            1 => {
                self.volume.pump(seat);
                let out = self.volume.seats.get_mut(&seat).unwrap();
                let bytes = out.to_server.take();
                if !self.is_dead(n)
                    && let Some(peer) = &mut self.peers[n]
                {
                    peer.input.extend(bytes);
                }
            }
            2 if self.is_dead(n) => self.cut(n),
            2 => {
                if let Some(peer) = &mut self.peers[n] {
                    peer.step(&mut self.disk, &mut self.rng);
                }
            }
            3 => {
                if let Some(peer) = &mut self.peers[n] {
                    let take = self.rng.below(peer.output.len() as u64 + 1) as usize;
                    let mut some: BytesMut =
                        peer.output.drain(..take).collect::<Vec<_>>()[..].into();
                    self.volume.take_answers(seat, &mut some).unwrap();
                    for byte in some.iter().rev() {
                        peer.output.push_front(*byte);
                    }
                }
            }
            _ => {
                if self.volume.wants_close(seat) {
                    self.cut(n);
                }
                if self.peers[n].is_none() {
                    self.dial(n);
                }
                self.hear(n);
            }
        }
    }

    fn hear(&mut self, n: usize) {
        let seat = self.clients[n].seat;
        let bytes = self.volume.seats.get_mut(&seat).unwrap().to_client.take();
        self.volume.charge_untaken(seat);
        self.clients[n].from.extend(bytes);
        while self.piece(n) {}
    }

    /// Takes one piece of an answer.
    fn piece(&mut self, n: usize) -> bool {
        let client = &mut self.clients[n];
        let from = client.from.clone();
        let find = |cookie: u64| client.asked.iter().position(|a| a.request.cookie == cookie);
        if let Ok(simple) = Simple::parse(&from) {
            let place = find(simple.cookie).expect("an answer that was asked for, once");
            let asked = &mut client.asked[place];
            assert_eq!(simple.error, 0);
            let len = Simple::LEN + asked.data.len();
            assert!(from.len() >= len, "whole answers only");
            asked.data = from[Simple::LEN..len].iter().copied().map(Some).collect();
            client.from.drain(..len);
            self.done(n, place);
            return true;
        }
        let Ok((header, style)) = Chunk::parse(&from) else {
            assert!(from.is_empty(), "whole answers only");
            return false;
        };
        let place = find(header.cookie).expect("an answer that was asked for, once");
        let asked = &mut client.asked[place];
        let head = Chunk::header_len(style);
        let payload = &from[head..head + header.length as usize];
        let start = asked.request.offset;
        let mut fill = |offset: u64, data: &[u8]| {
            for (i, b) in data.iter().enumerate() {
                let slot = &mut asked.data[(offset - start) as usize + i];
                assert!(slot.replace(*b).is_none(), "a byte twice");
            }
        };
        match header.kind {
            chunk_kind::OFFSET_DATA => {
                let (offset, data) = chunk::parse_data(payload).unwrap();
                fill(offset, data);
            }
            chunk_kind::OFFSET_HOLE => {
                let (offset, len) = chunk::parse_hole(payload).unwrap();
                fill(offset, &vec![0; len as usize]);
            }
            k => assert_eq!(k, chunk_kind::NONE),
        }
        client.from.drain(..head + payload.len());
        if header.flags & DONE != 0 {
            self.done(n, place);
        }
        true
    }

    fn done(&mut self, n: usize, place: usize) {
        let asked = self.clients[n].asked.remove(place);
        self.clients[n].answered += 1;
        for (i, (byte, may)) in asked.data.iter().zip(&asked.may).enumerate() {
            let at = asked.request.offset as usize + i;
            let byte = byte.expect("every byte that was read");
            assert!(
                may.contains(&byte),
                "byte {at} reads {byte}, not one of {may:?}"
            );
        }
        let range = asked.request.offset as usize..;
        for (byte, (read, alone)) in self.bytes[range.clone()]
            .iter_mut()
            .zip(asked.data.iter().zip(&asked.alone))
        {
            // What was read once stays until it is changed.
            if let (Some(read), true) = (read, alone) {
                byte.base = vec![*read];
            }
        }
        if asked.request.kind == kind::FLUSH {
            for (byte, alone) in self.bytes.iter_mut().zip(&asked.alone) {
                if *alone && (self.disk.shares || byte.last == Some(n)) {
                    byte.flushed();
                }
            }
        }
        if change(asked.request.kind) {
            let fua = asked.request.flags & flag::FUA != 0;
            for byte in self.bytes[range]
                .iter_mut()
                .take(asked.request.length as usize)
            {
                byte.answered(n, fua);
            }
        }
    }

    /// What a power cut now may leave is what was promised, or newer.
    fn cut_power(&self) {
        for (at, byte) in self.bytes.iter().enumerate() {
            for left in [self.disk.durable[at], self.disk.content[at]] {
                assert!(
                    byte.may_be_left(left),
                    "byte {at} would be {left}, not of {byte:?}"
                );
            }
        }
    }

    fn run(&mut self) {
        for _ in 0..600 {
            let n = self.rng.below(self.clients.len() as u64) as usize;
            match self.rng.below(self.calm) {
                0 => self.die(),
                1 => self.cut_one(n),
                k if (2..=8).contains(&(k % 40)) => self.ask(n),
                _ => self.step(n),
            }
            self.cut_power();
        }
        for _ in 0..20_000 {
            if self.clients.iter().all(|c| c.asked.is_empty()) {
                break;
            }
            let n = self.rng.below(self.clients.len() as u64) as usize;
            self.step(n);
            self.cut_power();
        }
        for client in &self.clients {
            assert!(
                client.asked.is_empty(),
                "never answered: {:?}",
                client.asked
            );
            assert_eq!(client.answered, client.next - 1);
        }
    }

    /// One connection breaks; the server lives, and has done what it had begun.
    fn cut_one(&mut self, n: usize) {
        if self.is_dead(n) {
            return self.cut(n);
        }
        if let Some(peer) = &mut self.peers[n] {
            for _ in 0..self.rng.below(8) {
                peer.step(&mut self.disk, &mut self.rng);
            }
        }
        self.cut(n);
    }
}

#[test]
fn clients_are_told_one_truth_whatever_servers_do() {
    let runs = std::env::var("PLOOP_RUNS")
        .ok()
        .and_then(|n| n.parse().ok());
    let first = std::env::var("PLOOP_SEED")
        .ok()
        .and_then(|n| n.parse().ok());
    let first = first.unwrap_or(1);
    for seed in first..first + runs.unwrap_or(1000) {
        let caught = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            world.run();
            // Everything dies once more, and what was answered is there all the same.
            world.die();
            for n in 0..world.clients.len() {
                world.cut(n);
            }
            for _ in 0..20_000 {
                let n = world.rng.below(world.clients.len() as u64) as usize;
                world.step(n);
                if world.volume.is_flowing() {
                    break;
                }
            }
            assert!(world.volume.is_flowing(), "it never flows again");
            for (at, (now, byte)) in world.disk.content.iter().zip(&world.bytes).enumerate() {
                assert!(
                    byte.base.contains(now),
                    "byte {at} is {now}, not of {byte:?}"
                );
            }
        });
        if let Err(e) = caught {
            eprintln!("PLOOP_SEED={seed} PLOOP_RUNS=1 repeats it");
            std::panic::resume_unwind(e);
        }
    }
}
