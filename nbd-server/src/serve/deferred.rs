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

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use ploop::device::{ReadLease, Segment};
use ploop::store::ring::{Reading, Ring};

use super::mailbox::{Came, Mailbox};
use super::plane::{EngineKind, Plane};
use super::pool::Hands;
use super::read::{Ask, Planned, Stop, Waiting};
use super::work::{Scratch, Site};
use crate::session::Output;
use crate::session::transmission::Command;

/// Requests of one connection that wait for a disk; no more are taken from its socket then. As many
/// as a ring has places; deeper queues gain nothing on any disk.
pub(super) const REQUESTS: usize = 128;

/// Bytes of them. One more request is taken below the bound, so a connection has at most this and
/// the longest READ in flight: enough for sixteen of 1 MiB.
pub(super) const BYTES: u64 = 16 << 20;

/// Those of one connection that are at the pool at once; a quarter of its threads.
pub(super) const AT_POOL: usize = 16;

/// Something for the pool.
#[derive(Debug)]
enum Job {
    Read(ReadJob),
    Command(Command),
}

/// One piece of a READ.
#[derive(Debug)]
struct ReadJob {
    ask: Ask,
    piece: Range<u64>,
    /// None when the ring has it.
    lease: Option<ReadLease>,
    segments: Vec<Segment>,
}

/// What became of a request.
#[derive(Debug)]
pub(super) struct Answer {
    /// What is to be sent.
    pub(super) out: Output,
    /// A READ that goes on from there.
    pub(super) more: Option<(Ask, u64)>,
    /// The bytes that it was counted with.
    bytes: u64,
}

/// What the pool says: `None` for work that panicked.
type Word = Option<Answer>;

/// What one connection has at the pool. Its work queues up for a thread once for each job, behind
/// that of others.
#[derive(Debug)]
struct Line {
    mailbox: Mailbox<Word>,
    jobs: Mutex<Jobs>,
    /// No more work is at the pool.
    idle: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    queue: VecDeque<Job>,
    /// Places at the pool that are taken; at most [`AT_POOL`].
    places: usize,
}

impl Line {
    fn new() -> io::Result<Line> {
        Ok(Line {
            mailbox: Mailbox::new()?,
            jobs: Mutex::default(),
            idle: Condvar::new(),
        })
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        // Nothing panics while it is held.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One place at the pool. Given back when dropped; what it holds of the device goes before.
struct Place {
    line: Arc<Line>,
    site: Option<Arc<Site>>,
    hands: Hands,
    /// It was given back.
    left: bool,
}

impl Place {
    /// Does one job, then queues up for the next.
    fn work(mut self) {
        let (Some(site), Some(job)) = (self.site.clone(), self.next()) else {
            return;
        };
        let mut ticket = Ticket(self.line.clone(), None);
        ticket.1 = Some(job.execute(&site));
        drop(site);
        drop(ticket);
        let hands = self.hands.clone();
        if !self.is_over()
            && let Err(work) = hands.run(Box::new(move || self.work()))
        {
            work();
        }
    }

    /// The next job. Without one the place is given back in the same instant: a job that comes then
    /// finds it free.
    fn next(&mut self) -> Option<Job> {
        let mut jobs = self.line.jobs();
        let job = jobs.queue.pop_front();
        if job.is_none() {
            (self.site, self.left) = (None, true);
            jobs.places -= 1;
            self.line.idle.notify_all();
        }
        job
    }

    /// True, and the place given back, when there is no further job.
    fn is_over(&mut self) -> bool {
        let mut jobs = self.line.jobs();
        if jobs.queue.is_empty() {
            (self.site, self.left) = (None, true);
            jobs.places -= 1;
            self.line.idle.notify_all();
        }
        self.left
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.left {
            self.site = None;
            self.line.jobs().places -= 1;
            self.line.idle.notify_all();
        }
    }
}

/// Tells the connection, whatever becomes of the work.
struct Ticket(Arc<Line>, Word);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.mailbox.post(self.1.take());
    }
}

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

impl ReadJob {
    fn bytes(&self) -> u64 {
        self.piece.end - self.piece.start
    }

    /// The answer when `out` holds all of the piece.
    fn answer(self, out: Output) -> Answer {
        let (bytes, at) = (self.bytes(), self.piece.end);
        Answer {
            out,
            more: (at < self.ask.range.end).then_some((self.ask, at)),
            bytes,
        }
    }

    /// Reads the piece on this thread.
    fn read(mut self) -> Answer {
        let (mut out, mut hole) = (Output::new(), 0..0);
        let Some(lease) = self.lease.take() else {
            return self.answer(out);
        };
        let ask = &self.ask;
        let put = ask.put(&lease, &self.segments, &mut Waiting, &mut hole, &mut out);
        drop(lease);
        ask.end_hole(&mut hole, &mut out);
        match put {
            Ok(()) | Err(Stop::NotNow) => self.answer(out),
            Err(Stop::Failed(e, at)) => {
                ask.fail(&e, at, &mut out);
                Answer {
                    bytes: self.bytes(),
                    more: None,
                    out,
                }
            }
        }
    }

    /// The answer as it will be, with the bytes missing that are to be read; `None` when it is not
    /// that simple.
    fn plan(&self, lease: &ReadLease) -> Option<(Output, Planned)> {
        let (mut out, mut hole, mut plan) = (Output::new(), 0..0, Planned::default());
        let put = self
            .ask
            .put(lease, &self.segments, &mut plan, &mut hole, &mut out);
        put.is_ok().then(|| {
            self.ask.end_hole(&mut hole, &mut out);
            (out, plan)
        })
    }
}

impl Job {
    fn execute(self, site: &Site) -> Answer {
        match self {
            Job::Read(job) => job.read(),
            Job::Command(command) => {
                let mut out = Output::new();
                site.perform(&command, &mut Scratch::default(), &mut out);
                Answer {
                    out,
                    more: None,
                    bytes: 0,
                }
            }
        }
    }
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
        let Some(line) = &self.line else { return };
        let mut jobs = line.jobs();
        jobs.queue.push_back(job);
        if jobs.places == AT_POOL {
            return;
        }
        jobs.places += 1;
        drop(jobs);
        let hands = self.plane.pool.hands();
        let place = Place {
            line: line.clone(),
            site: Some(self.site.clone()),
            hands: hands.clone(),
            left: false,
        };
        // Without a thread it is done here, and held up is who would have gone ahead.
        if let Err(work) = hands.run(Box::new(move || place.work())) {
            work();
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
            _ => Ok(Came {
                word: true,
                input: false,
            }),
        }
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        if let Some(line) = &self.line {
            let forgotten = std::mem::take(&mut line.jobs().queue);
            drop(forgotten);
            let mut jobs = line.jobs();
            while jobs.places > 0 {
                jobs = line.idle.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            }
        }
        // Waits for the kernel.
        self.ring = None;
        self.plane.leave(self.bytes);
    }
}
