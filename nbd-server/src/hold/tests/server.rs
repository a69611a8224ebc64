//! A server in memory that dies as servers do: what was flushed stays, of the rest any part.

use std::collections::VecDeque;

use crate::hold::terms::Terms;
use crate::wire::chunk::{self, kind as chunk_kind};
use crate::wire::greeting::transmission_flag as flag;
use crate::wire::reply::{Chunk, DONE, Simple, Style};
use crate::wire::request::{Request, flag as request_flag, kind};
use crate::wire::{Put, errno};

/// Bytes of an export.
pub(super) const SIZE: usize = 64;

/// A small generator.
#[derive(Clone, Debug)]
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % n
    }

    pub(super) fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub(super) fn terms(style: Style) -> Terms {
    terms_of(style, true)
}

/// `shares`: connections share their flushes.
pub(super) fn terms_of(style: Style, shares: bool) -> Terms {
    let shared = if shares { flag::CAN_MULTI_CONN } else { 0 };
    Terms {
        export: "disk".into(),
        style,
        size: SIZE as u64,
        flags: flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | shared,
        minimum: None,
        maximum: None,
        wanted: Vec::new(),
        queries: Vec::new(),
        contexts: Vec::new(),
    }
}

/// A disk behind servers that come and go.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) content: [u8; SIZE],
    pub(super) durable: [u8; SIZE],
    /// Which connection wrote it last.
    by: [u64; SIZE],
    /// A flush covers what was written on other connections, too.
    pub(super) shares: bool,
    peers: u64,
    life: u64,
    /// It tells of its life.
    pub(super) tells: bool,
    pub(super) flushes: u64,
}

impl Disk {
    pub(super) fn new(tells: bool, shares: bool) -> Disk {
        Disk {
            content: [0; SIZE],
            durable: [0; SIZE],
            by: [0; SIZE],
            shares,
            peers: 0,
            life: 1,
            tells,
            flushes: 0,
        }
    }

    pub(super) fn life(&self) -> Option<String> {
        self.tells.then(|| format!("d/{}", self.life))
    }

    /// Killed: of every byte that was not flushed, the old or the new is left.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        for (now, before) in self.content.iter_mut().zip(self.durable) {
            if rng.once_in(2) {
                *now = before;
            }
        }
        self.durable = self.content;
        self.life += 1;
    }

    /// Stopped in order.
    pub(super) fn close(&mut self) {
        self.durable = self.content;
    }

    /// Does a request; its error and what was read.
    fn execute(&mut self, peer: u64, r: &Request, payload: &[u8]) -> (u32, Vec<u8>) {
        let range = r.offset as usize..(r.offset + r.length) as usize;
        if range.end > SIZE {
            return (errno::EINVAL, Vec::new());
        }
        match r.kind {
            kind::READ => return (0, self.content[range].to_vec()),
            kind::WRITE => self.content[range.clone()].copy_from_slice(payload),
            kind::TRIM | kind::WRITE_ZEROES => self.content[range.clone()].fill(0),
            kind::FLUSH => {
                for at in 0..SIZE {
                    if self.shares || self.by[at] == peer {
                        self.durable[at] = self.content[at];
                    }
                }
                self.flushes += 1;
            }
            _ => return (errno::EINVAL, Vec::new()),
        }
        self.by[range.clone()].fill(peer);
        if r.flags & request_flag::FUA != 0 {
            self.durable[range.clone()].copy_from_slice(&self.content[range]);
        }
        (0, Vec::new())
    }
}

/// A connection as the server has it: requests in any order, answers in pieces.
#[derive(Debug)]
pub(super) struct Peer {
    number: u64,
    pub(super) style: Style,
    pub(super) input: Vec<u8>,
    waiting: Vec<(Request, Vec<u8>)>,
    /// Answers that the holder has not read.
    pub(super) output: VecDeque<u8>,
    /// Its process is gone: nothing is done any more, and what it answered can still be read.
    pub(super) dead: bool,
}

impl Peer {
    pub(super) fn new(style: Style, disk: &mut Disk) -> Peer {
        disk.peers += 1;
        Peer {
            number: disk.peers,
            style,
            input: Vec::new(),
            waiting: Vec::new(),
            output: VecDeque::new(),
            dead: false,
        }
    }

    /// True when there is nothing to do.
    pub(super) fn is_idle(&self) -> bool {
        self.input.is_empty() && self.waiting.is_empty()
    }

    pub(super) fn die(&mut self) {
        self.dead = true;
        self.input.clear();
        self.waiting.clear();
    }

    fn parse(&mut self) {
        while let Ok(r) = Request::parse(&self.input, self.style) {
            let head = Request::header_len(self.style);
            let has_payload = self.style == Style::Extended && r.kind == kind::WRITE;
            assert_eq!(
                r.flags & request_flag::PAYLOAD_LEN != 0,
                has_payload,
                "{r:?} in another style"
            );
            let payload = if r.kind == kind::WRITE {
                r.length as usize
            } else {
                0
            };
            if self.input.len() < head + payload {
                return;
            }
            let payload = self.input[head..head + payload].to_vec();
            self.input.drain(..head + payload.len());
            // What the holder promises to its servers: two changes that meet are not under way at
            // the same time.
            let change = |k: u16| matches!(k, kind::WRITE | kind::TRIM | kind::WRITE_ZEROES);
            let meets = |o: &Request| {
                change(r.kind)
                    && change(o.kind)
                    && o.offset < r.offset + r.length
                    && r.offset < o.offset + o.length
            };
            assert!(
                !self.waiting.iter().any(|(o, _)| meets(o)),
                "{r:?} meets one under way"
            );
            self.waiting.push((r, payload));
        }
    }

    /// Does one of the waiting requests, and answers it.
    pub(super) fn step(&mut self, disk: &mut Disk, rng: &mut Rng) {
        self.parse();
        if self.waiting.is_empty() || self.dead {
            return;
        }
        let (r, payload) = self
            .waiting
            .remove(rng.below(self.waiting.len() as u64) as usize);
        let (error, data) = disk.execute(self.number, &r, &payload);
        let mut out = Vec::new();
        let (cookie, style) = (r.cookie, self.style);
        if style == Style::Simple {
            out.put(&Simple { error, cookie }.bytes());
            out.extend(data);
            return self.output.extend(out);
        }
        let head = |flags, kind, length: usize| Chunk {
            flags,
            kind,
            cookie,
            offset: r.offset,
            length: length as u32,
        };
        if error != 0 {
            let len = chunk::error_len("no", None);
            head(DONE, chunk_kind::ERROR, len).emit(style, &mut out);
            chunk::put_error(error, "no", None, &mut out);
            return self.output.extend(out);
        }
        // In two parts, the later first.
        let cut = data.len() / 2;
        let parts = [(cut, &data[cut..]), (0, &data[..cut])];
        for (at, part) in parts.into_iter().filter(|(_, p)| !p.is_empty()) {
            let offset = r.offset + at as u64;
            if part.iter().all(|b| *b == 0) {
                head(0, chunk_kind::OFFSET_HOLE, chunk::HOLE_LEN).emit(style, &mut out);
                out.put(&chunk::hole(offset, part.len() as u32));
            } else {
                head(0, chunk_kind::OFFSET_DATA, 8 + part.len()).emit(style, &mut out);
                out.put(&offset.to_be_bytes());
                out.put(part);
            }
        }
        head(DONE, chunk_kind::NONE, 0).emit(style, &mut out);
        self.output.extend(out);
    }
}
