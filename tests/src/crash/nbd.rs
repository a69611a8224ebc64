//! A client of the serving engine, without a socket: request bytes in, reply bytes out.
//!
//! What was asked is in the history before the engine sees the first byte; what was answered enters
//! it when the reply leaves the engine, no earlier.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nbd_server::serve::engine::{Engine, Sink, Turn};
use nbd_server::session::transmission::Rules;
use nbd_server::wire::chunk;
use nbd_server::wire::reply::{Chunk, DONE, Simple, Style};
use nbd_server::wire::request::{Request, flag, kind};
use ploop::Result;
use ploop::device::{Device, Extent, ReadLease, Segment, WriteLease, WriteSegment, ZeroMode};

use super::history::{Asked, History, payload};
use super::{Rng, SECTOR};

/// The cookie of a read: this, and its length. All other cookies are operations.
const READ: u64 = 1 << 63;

/// One request. Places and lengths are sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// First sector, sectors, durable when answered.
    Write(u64, u64, bool),
    /// The same, zeros; the last says whether space is kept.
    Zero(u64, u64, bool, bool),
    /// A discard.
    Trim(u64, u64),
    /// A read, whose answer is not looked at.
    Read(u64, u64),
    /// A flush.
    Flush,
}

/// One connection.
#[derive(Debug)]
pub struct Client<'a> {
    engine: Engine,
    style: Style,
    history: &'a History,
}

/// Takes the engine's answers.
struct Answers<'a> {
    history: &'a History,
    bytes: Vec<u8>,
}

impl Sink for Answers<'_> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes.extend_from_slice(bytes);
        while let Some(used) = self.answer() {
            self.bytes.drain(..used);
        }
        Ok(())
    }
}

impl Answers<'_> {
    /// Takes one reply or chunk from the front; gives its length, if it is there whole.
    fn answer(&self) -> Option<usize> {
        if let Ok(reply) = Simple::parse(&self.bytes) {
            let body = match reply.cookie & READ {
                READ if reply.error == 0 => (reply.cookie & !READ) as usize,
                _ => 0,
            };
            self.end(reply.cookie, reply.error == 0);
            return Some(Simple::LEN + body).filter(|n| *n <= self.bytes.len());
        }
        let (head, style) = Chunk::parse(&self.bytes).ok()?;
        let len = Chunk::header_len(style) + head.length as usize;
        if len > self.bytes.len() {
            return None;
        }
        if head.flags & DONE != 0 {
            let failed = matches!(head.kind, chunk::kind::ERROR | chunk::kind::ERROR_OFFSET);
            self.end(head.cookie, !failed);
        }
        Some(len)
    }

    fn end(&self, cookie: u64, good: bool) {
        match good {
            _ if cookie & READ != 0 => {}
            true => self.history.ok(cookie),
            false => self.history.failed(cookie),
        }
    }
}

impl<'a> Client<'a> {
    /// A connection to `device`.
    pub fn new(device: &Arc<dyn Device>, style: Style, history: &'a History) -> Client<'a> {
        let rules = Rules::over(device.as_ref(), style);
        Client {
            engine: Engine::new(device.clone(), rules),
            style,
            history,
        }
    }

    /// Sends requests in one piece and takes all answers.
    pub fn send(&mut self, asks: &[Ask]) {
        let mut bytes = Vec::new();
        for ask in asks {
            self.emit(ask, &mut bytes);
        }
        let mut answers = Answers {
            history: self.history,
            bytes: Vec::new(),
        };
        // The last request arrives in two parts, as it may from a socket.
        let first = bytes.len() - bytes.len().min(7);
        let (used, turn) = self.engine.run(&bytes[..first], &mut answers).unwrap();
        assert!(matches!(turn, Turn::NeedMore(_)), "{turn:?}");
        let (rest, turn) = self.engine.run(&bytes[used..], &mut answers).unwrap();
        assert_eq!(
            (used + rest, turn),
            (bytes.len(), Turn::NeedMore(Request::header_len(self.style)))
        );
        assert!(answers.bytes.is_empty(), "half an answer");
    }

    fn emit(&self, ask: &Ask, bytes: &mut Vec<u8>) {
        let (kind, mut flags, at, len) = match *ask {
            Ask::Write(at, len, fua) => (kind::WRITE, u16::from(fua) * flag::FUA, at, len),
            Ask::Zero(at, len, fua, keep) => {
                let flags = (u16::from(fua) * flag::FUA) | (u16::from(keep) * flag::NO_HOLE);
                (kind::WRITE_ZEROES, flags, at, len)
            }
            Ask::Trim(at, len) => (kind::TRIM, flag::FUA, at, len),
            Ask::Read(at, len) => (kind::READ, 0, at, len),
            Ask::Flush => (kind::FLUSH, 0, 0, 0),
        };
        let fua = flags & flag::FUA != 0;
        let sectors = at..at + len;
        let cookie = match ask {
            Ask::Write(..) => self.history.begin(Asked::Write(sectors.clone()), fua),
            Ask::Zero(..) => self.history.begin(Asked::Zero(sectors.clone()), fua),
            Ask::Trim(..) => self.history.begin(Asked::Discard(sectors.clone()), fua),
            Ask::Flush => self.history.begin(Asked::Flush, false),
            Ask::Read(..) => READ | (len * SECTOR),
        };
        let writes = matches!(ask, Ask::Write(..));
        if writes && self.style == Style::Extended {
            flags |= flag::PAYLOAD_LEN;
        }
        let (offset, length) = (at * SECTOR, len * SECTOR);
        Request {
            flags,
            kind,
            cookie,
            offset,
            length,
        }
        .emit(self.style, bytes);
        if writes {
            bytes.extend(payload(cookie, sectors));
        }
    }
}

/// A request drawn from a seed: mostly a few sectors, now and then more than one cluster.
pub fn seeded(rng: &mut Rng, sectors: u64) -> Ask {
    let at = rng.below(sectors);
    let len = match rng.below(12) {
        0 => 70 + rng.below(100),
        1 => 64,
        _ => 1 + rng.below(5),
    };
    let len = len.min(sectors - at);
    let fua = rng.below(4) == 0;
    match rng.below(12) {
        0..=5 => Ask::Write(at, len, fua),
        6 => Ask::Zero(at, len, fua, rng.below(2) == 0),
        7 => Ask::Trim(at, len),
        8 => Ask::Read(at, len),
        _ => Ask::Flush,
    }
}

/// A stage that forgets one flush: what an engine that lost one would do.
#[derive(Debug)]
pub struct Forgetful {
    inner: Arc<dyn Device>,
    forget: u64,
    flushes: AtomicU64,
}

impl Forgetful {
    /// In front of `inner`, whose flush number `forget` never comes.
    pub fn new(inner: Arc<dyn Device>, forget: u64) -> Forgetful {
        Forgetful {
            inner,
            forget,
            flushes: AtomicU64::new(0),
        }
    }

    /// Flushes that were asked for.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }
}

impl Device for Forgetful {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn cluster_bytes(&self) -> u64 {
        self.inner.cluster_bytes()
    }

    fn map(&self, range: std::ops::Range<u64>, segments: &mut Vec<Segment>) -> Result<ReadLease> {
        self.inner.map(range, segments)
    }

    fn prepare(
        &self,
        range: std::ops::Range<u64>,
        segments: &mut Vec<WriteSegment>,
    ) -> Result<WriteLease> {
        self.inner.prepare(range, segments)
    }

    fn commit(&self, lease: WriteLease) -> Result<()> {
        self.inner.commit(lease)
    }

    fn zero(&self, range: std::ops::Range<u64>, mode: ZeroMode) -> Result<()> {
        self.inner.zero(range, mode)
    }

    fn discard(&self, range: std::ops::Range<u64>) -> Result<()> {
        self.inner.discard(range)
    }

    fn flush(&self) -> Result<()> {
        match self.flushes.fetch_add(1, Ordering::SeqCst) {
            n if n == self.forget => Ok(()),
            _ => self.inner.flush(),
        }
    }

    fn allocation(
        &self,
        range: std::ops::Range<u64>,
        limit: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<()> {
        self.inner.allocation(range, limit, extents)
    }
}
