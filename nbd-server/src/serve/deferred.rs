//! Requests of one connection that wait for a disk, while the ones behind them go on.
//!
//! ```text
//!           ┌─▶ ring ─────────────┐
//!  engine ──┤                     ├─▶ reap ─▶ answer, or the next piece of the READ
//!           └─▶ queue ─▶ pool ────┘
//! ```
//!
//! Each has an output of its own, is answered once, and is in one place at a time. The lease of a
//! READ goes when its bytes are there, before they are sent. A ring that cannot do a piece, or
//! fails at it, leaves it to the pool, which waits for the bytes and knows what to say of an error.
//! So the ring decides nothing.
//!
//! A lease ends when its bytes are there, whatever the client does: the pool goes on by itself, and
//! the ring is looked after before the connection waits for its client ([`Deferred::land`]).
//!
//! Dropping this waits for what is at work, and forgets what has not begun.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use ploop::device::{ReadLease, Segment};
use ploop::store::ring::{Reading, Ring};

use super::jobs::{Answer, Job, ReadJob};
use super::line::Line;
use super::mailbox::Came;
use super::plane::{EngineKind, Plane};
use super::read::Ask;
use super::work::Site;
use crate::session::Output;
use crate::session::transmission::Command;

/// Requests of one connection that wait for a disk; no more are taken from its socket then. As many
/// as a ring has places; deeper queues gain nothing on any disk.
pub(super) const REQUESTS: usize = 128;

/// Bytes of them. One more request is taken below the bound, so a connection has at most this and
/// the longest READ in flight: enough for sixteen of 1 MiB.
pub(super) const BYTES: u64 = 16 << 20;

/// See the module text.
#[derive(Debug)]
pub(super) struct Deferred {
    plane: Arc<Plane>,
    site: Arc<Site>,
    line: Option<Arc<Line>>,
    ring: Option<Ring>,
    /// A ring could not be made, and that was said.
    no_ring: bool,
    /// What the ring is reading, by token.
    reading: HashMap<u64, ReadJob>,
    tokens: u64,
    /// Over, and not yet taken.
    landed: Vec<Answer>,
    count: usize,
    bytes: u64,
}

impl Deferred {
    pub(super) fn new(plane: Arc<Plane>, site: Arc<Site>) -> Deferred {
        Deferred {
            plane,
            site,
            line: None,
            ring: None,
            no_ring: false,
            reading: HashMap::new(),
            tokens: 0,
            landed: Vec::new(),
            count: 0,
            bytes: 0,
        }
    }

    /// Requests that wait.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// True when no more may wait.
    pub(super) fn is_full(&self) -> bool {
        self.count >= REQUESTS || self.bytes >= BYTES
    }

    /// True when [`Deferred::shrink`] would give something back.
    pub(super) fn is_large(&self) -> bool {
        self.line.is_some() && self.count == 0
    }

    /// Gives the ring and the memory back, unless they are in use.
    pub(super) fn shrink(&mut self) {
        if self.count == 0 {
            self.ring = None;
            self.line = None;
            self.reading = HashMap::new();
            self.landed = Vec::new();
        }
    }

    /// Has a command without payload executed elsewhere. False when that cannot be; then nothing
    /// was done.
    pub(super) fn command(&mut self, command: &Command) -> bool {
        let opened = self.open();
        if opened {
            self.count += 1;
            self.to_pool(Job::Command(command.clone()));
        }
        opened
    }

    /// Has a mapped piece of a READ read elsewhere. Gives lease and segments back when that cannot
    /// be.
    pub(super) fn read(
        &mut self,
        ask: &Ask,
        piece: Range<u64>,
        lease: ReadLease,
        segments: Vec<Segment>,
    ) -> Result<(), (ReadLease, Vec<Segment>)> {
        let bytes = piece.end - piece.start;
        if !self.open() || !self.plane.admit(bytes) {
            return Err((lease, segments));
        }
        self.count += 1;
        self.bytes += bytes;
        let ask = ask.clone();
        let job = ReadJob {
            ask,
            piece,
            lease: None,
            segments,
        };
        match self.on_ring(&job, lease) {
            Ok(token) => {
                self.reading.insert(token, job);
            }
            Err(lease) => self.read_at_pool(job, lease),
        }
        Ok(())
    }

    fn read_at_pool(&self, job: ReadJob, lease: ReadLease) {
        let lease = Some(lease);
        self.to_pool(Job::Read(ReadJob { lease, ..job }));
    }

    fn to_pool(&self, job: Job) {
        if let Some(line) = &self.line {
            line.add(job, &self.site, self.plane.pool.hands());
        }
    }

    /// Gives a piece to the ring; what it is called there.
    fn on_ring(&mut self, job: &ReadJob, lease: ReadLease) -> Result<u64, ReadLease> {
        if self.ring.is_none() {
            self.make_ring();
        }
        let Some(ring) = &mut self.ring else {
            return Err(lease);
        };
        let Some((out, plan)) = job.plan(&lease) else {
            return Err(lease);
        };
        let (mut bytes, end) = out.into_parts();
        bytes.truncate(end);
        self.tokens += 1;
        let reading = Reading {
            token: self.tokens,
            lease,
            bytes,
            fetches: plan.0,
        };
        ring.begin(reading).map_err(|back| back.lease)?;
        Ok(self.tokens)
    }

    fn make_ring(&mut self) {
        let wanted = self.plane.kind == EngineKind::Uring && !self.no_ring;
        let Some(line) = self.line.as_ref().filter(|_| wanted) else {
            return;
        };
        match (self.plane.make_ring)(line.mailbox.wake().clone()) {
            Ok(ring) => self.ring = Some(ring),
            Err(e) => {
                tracing::warn!(error = %e, "no io_uring for a connection; threads do its work");
                self.no_ring = true;
            }
        }
    }

    /// Makes what waiting needs; false when the system has no more.
    fn open(&mut self) -> bool {
        if self.line.is_none() {
            match Line::new() {
                Ok(line) => self.line = Some(Arc::new(line)),
                Err(e) => tracing::debug!(error = %e, "no eventfd; the connection itself waits"),
            }
        }
        self.line.is_some()
    }

    /// Lets the kernel begin what the ring was given. An error ends the session.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), Ring::submit)
    }

    /// Appends what is over to `answers`. Does not wait. An error ends the session.
    pub(super) fn reap(&mut self, answers: &mut Vec<Answer>) -> io::Result<()> {
        self.reap_ring()?;
        let words = self.line.as_ref().map(|line| line.mailbox.take());
        for word in words.unwrap_or_default() {
            let Some(answer) = word else {
                return Err(io::Error::other("the work of a request panicked"));
            };
            self.landed.push(answer);
        }
        for answer in self.landed.drain(..) {
            self.count -= 1;
            self.bytes -= answer.bytes;
            self.plane.leave(answer.bytes);
            answers.push(answer);
        }
        Ok(())
    }

    fn reap_ring(&mut self) -> io::Result<()> {
        loop {
            let reaped = self.ring.as_mut().map_or(Ok(None), Ring::reap)?;
            let Some((reading, done)) = reaped else {
                return Ok(());
            };
            let Reading {
                token,
                lease,
                bytes,
                ..
            } = reading;
            let Some(job) = self.reading.remove(&token) else {
                continue;
            };
            match done {
                Ok(()) => {
                    drop(lease);
                    let end = bytes.len();
                    self.landed.push(job.answer(Output::of_parts(bytes, end)));
                }
                Err(e) => {
                    tracing::debug!(error = %e, "a read by ring failed; it is tried once more");
                    self.read_at_pool(job, lease);
                }
            }
        }
    }

    /// True while the ring has leases, which end when this thread looks after them.
    pub(super) fn must_land(&self) -> bool {
        !self.reading.is_empty()
    }

    /// Waits until the ring has no lease any more. An error ends the session.
    pub(super) fn land(&mut self) -> io::Result<()> {
        self.submit()?;
        self.reap_ring()?;
        while self.must_land() {
            self.wait(None)?;
            self.reap_ring()?;
        }
        Ok(())
    }

    /// Waits until something is over, or `socket` can be read. Something must be waiting.
    pub(super) fn wait(&self, socket: Option<BorrowedFd<'_>>) -> io::Result<Came> {
        match &self.line {
            Some(line) if self.landed.is_empty() || self.must_land() => line.mailbox.wait(socket),
            _ => Ok(Came::WORD),
        }
    }

    /// What to wait for, when something waits.
    pub(super) fn wake(&self) -> Option<&Arc<OwnedFd>> {
        self.line.as_ref().map(|line| line.mailbox.wake())
    }

    /// True when something is over that was not taken yet.
    pub(super) fn has_landed(&self) -> bool {
        !self.landed.is_empty()
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        if let Some(line) = &self.line {
            line.end();
        }
        // Waits for the kernel.
        self.ring = None;
        self.plane.leave(self.bytes);
    }
}
