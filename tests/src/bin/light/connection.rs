//! One connection at work.

use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use nbd_server::wire::reply::{Simple, Style};
use nbd_server::wire::request::{Request, flag, kind};

use crate::Result;
use crate::args::{Args, Op};
use crate::handshake::{receive, unread};
use crate::latencies::Latencies;
use crate::walk::Walk;

const HEAD: usize = Request::COMPACT;

/// What a slot waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Read,
    Write,
    /// A write that is answered, whose flush is to be sent.
    Unflushed,
    Flush,
}

#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
}

/// The cookie of a good answer.
fn answered_slot(head: &[u8]) -> Result<usize> {
    let reply = Simple::parse(head).map_err(unread)?;
    match reply.error {
        0 => Ok(usize::try_from(reply.cookie).unwrap_or(usize::MAX)),
        error => Err(format!("the server answered error {error}")),
    }
}

/// One connection at work.
pub(crate) struct Connection<'a> {
    args: &'a Args,
    socket: UnixStream,
    walk: Walk,
    /// Steps of the walk taken so far by all connections.
    taken: &'a AtomicU64,
    slots: Vec<Slot>,
    sent: Vec<Instant>,
    /// A header and a block for each slot, one after another.
    frames: Vec<u8>,
    waiting: usize,
    /// An answer's header as far as it has come; the slot that it answers, and the bytes of data
    /// that still follow it.
    head: [u8; Simple::LEN],
    have: usize,
    slot: usize,
    skip: usize,
    scratch: Vec<u8>,
    /// Pieces of the frames to send: where, and how long.
    ready: Vec<(usize, usize)>,
    pub(crate) counts: Counts,
    pub(crate) latencies: Latencies,
}

impl Connection<'_> {
    /// A connection that has not sent anything yet.
    pub(crate) fn new<'a>(
        args: &'a Args,
        number: u64,
        socket: UnixStream,
        walk: Walk,
        taken: &'a AtomicU64,
    ) -> Connection<'a> {
        Connection {
            args,
            socket,
            walk,
            taken,
            slots: vec![Slot::Free; args.depth],
            sent: vec![Instant::now(); args.depth],
            frames: frames(args, number),
            waiting: 0,
            head: [0; Simple::LEN],
            have: 0,
            slot: 0,
            skip: 0,
            scratch: Vec::new(),
            ready: Vec::new(),
            counts: Counts::default(),
            latencies: Latencies::new(),
        }
    }

    fn frame(&self) -> usize {
        HEAD + self.args.block
    }

    /// Works until then, and until all that was sent is answered.
    pub(crate) fn run(&mut self, until: Instant) -> Result<()> {
        let mut room = vec![0; (self.slots.len() * (Simple::LEN + self.args.block)).min(4 << 20)];
        let mut now = Instant::now();
        loop {
            self.send(now < until, now)?;
            if self.waiting == 0 {
                return Ok(());
            }
            let got = match self.socket.read(&mut room) {
                Ok(0) => return Err("the server closed the connection".into()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(format!("receive: {e}")),
            };
            now = Instant::now();
            self.take(&room[..got], now)?;
        }
    }

    /// Sends a request for each slot that is free, while there is `more` to do, and the flushes
    /// that are due.
    fn send(&mut self, more: bool, now: Instant) -> Result<()> {
        let frame = self.frame();
        self.ready.clear();
        for slot in 0..self.slots.len() {
            let length = match self.slots[slot] {
                Slot::Free if more => self.fill(slot, now),
                Slot::Unflushed => {
                    self.slots[slot] = Slot::Flush;
                    self.request(slot, kind::FLUSH, 0, 0, 0)
                }
                _ => 0,
            };
            if length > 0 {
                self.ready.push((slot * frame, length));
            }
        }
        self.waiting += self.ready.len();
        let slice = |&(at, length): &(usize, usize)| IoSlice::new(&self.frames[at..at + length]);
        let mut pieces: Vec<_> = self.ready.iter().map(slice).collect();
        let mut pieces = &mut pieces[..];
        while !pieces.is_empty() {
            match self.socket.write_vectored(pieces) {
                Ok(n) => IoSlice::advance_slices(&mut pieces, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(format!("send: {e}")),
            }
        }
        Ok(())
    }

    /// Puts the next operation into a free slot; the bytes to send, none when all are done.
    fn fill(&mut self, slot: usize, now: Instant) -> usize {
        let step = self.taken.fetch_add(1, Relaxed);
        if step >= self.args.ops {
            return 0;
        }
        let block = self.args.block as u64;
        let offset = self.args.offset + self.walk.at(step) * block;
        let is_read = match self.args.op {
            Op::Read => true,
            // Spread: steps that follow one another are in one batch.
            Op::Mixed => step.wrapping_mul(7) % 10 < 7,
            _ => false,
        };
        self.sent[slot] = now;
        if is_read {
            self.slots[slot] = Slot::Read;
            return self.request(slot, kind::READ, 0, offset, block);
        }
        self.slots[slot] = Slot::Write;
        let flags = if self.args.op == Op::Fua {
            flag::FUA
        } else {
            0
        };
        let length = self.request(slot, kind::WRITE, flags, offset, block) + self.args.block;
        // No two writes are the same.
        let payload = &mut self.frames[slot * (HEAD + self.args.block) + HEAD..];
        let stamp = step.to_le_bytes();
        let stamped = stamp.len().min(self.args.block);
        payload[..stamped].copy_from_slice(&stamp[..stamped]);
        length
    }

    fn request(&mut self, slot: usize, kind: u16, flags: u16, offset: u64, length: u64) -> usize {
        let request = Request {
            flags,
            kind,
            cookie: slot as u64,
            offset,
            length,
        };
        self.scratch.clear();
        request.emit(Style::Simple, &mut self.scratch);
        let at = slot * self.frame();
        self.frames[at..at + HEAD].copy_from_slice(&self.scratch);
        HEAD
    }

    /// Takes what has come.
    fn take(&mut self, mut bytes: &[u8], now: Instant) -> Result<()> {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let skipped = self.skip.min(bytes.len());
                self.skip -= skipped;
                bytes = &bytes[skipped..];
                if self.skip == 0 {
                    self.done(now);
                }
                continue;
            }
            let wanted = (Simple::LEN - self.have).min(bytes.len());
            self.head[self.have..self.have + wanted].copy_from_slice(&bytes[..wanted]);
            self.have += wanted;
            bytes = &bytes[wanted..];
            if self.have == Simple::LEN {
                self.have = 0;
                self.slot = answered_slot(&self.head)?;
                match self.slots.get(self.slot) {
                    Some(Slot::Read) => self.skip = self.args.block,
                    Some(Slot::Write | Slot::Flush) => self.done(now),
                    _ => return Err("the server answered what was not asked".into()),
                }
            }
        }
        Ok(())
    }

    /// The slot's answer is complete.
    fn done(&mut self, now: Instant) {
        let slot = self.slot;
        let was = std::mem::replace(&mut self.slots[slot], Slot::Free);
        self.waiting -= 1;
        match was {
            Slot::Read => self.counts.reads += 1,
            Slot::Write => self.counts.writes += 1,
            _ => self.counts.flushes += 1,
        }
        if was == Slot::Write && self.args.op == Op::FlushWrites {
            self.slots[slot] = Slot::Unflushed;
            return;
        }
        let took = (now - self.sent[slot]).as_nanos();
        self.latencies.note(u64::try_from(took).unwrap_or(u64::MAX));
    }

    /// A FLUSH, answered; then the end of the session. The seconds of the first.
    pub(crate) fn end(&mut self, flush: bool) -> Result<f64> {
        let began = Instant::now();
        if flush {
            self.request(0, kind::FLUSH, 0, 0, 0);
            let sent = self.socket.write_all(&self.frames[..HEAD]);
            sent.map_err(|e| format!("send: {e}"))?;
            receive(&mut self.socket, &mut self.head)?;
            answered_slot(&self.head)?;
            self.counts.flushes += 1;
        }
        let took = began.elapsed().as_secs_f64();
        self.request(0, kind::DISC, 0, 0, 0);
        // A server that has gone first took everything else before.
        self.socket.write_all(&self.frames[..HEAD]).ok();
        Ok(took)
    }
}

/// A frame for each slot, with noise in it: zeros could be told from data by a server.
fn frames(args: &Args, connection: u64) -> Vec<u8> {
    let mut state = args.seed.wrapping_add(connection) | 1;
    let mut noise = || {
        // xorshift64, Marsaglia's triple.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..args.depth * (HEAD + args.block))
        .map(|_| noise())
        .collect()
}
