//! Executes requests: bytes in, bytes out.
//!
//! ```text
//!  input ─▶ Rules::next ─▶ map / prepare ─▶ move ─▶ commit ─▶ Output ─▶ Sink
//!                              │                                ▲
//!                              └─▶ Deferred ─▶ ring, pool ──────┘
//! ```
//!
//! All complete requests of the input are executed in order, and their answers go out in one piece.
//! What would wait for a disk is deferred and answered when it is done, whatever came behind it;
//! [`Engine::new`] makes an engine that defers nothing. There is no socket, no thread and no clock
//! here; a crash test drives this engine with bytes over a recording store.
//!
//! What the limits of the container hold back is held before all this ([`super::throttled`]).
//!
//! A command that would be deferred is executed here when nothing else waits, neither in the input
//! nor for a disk: there is nobody to go ahead of it, and handing it over costs more than many
//! flushes do. Not so a READ: the ring costs little, and the next request may be on its way.
//!
//! Reads go from the file into the output, writes from the input into the file, without a copy in
//! between and without an allocation once the buffers have grown. A long read in chunks is sent
//! while it is still being read, piece by piece; the lease on a piece is gone before its bytes go
//! to the client, so a client that stops reading holds up nobody's maintenance.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ploop::device::{Device, ReadLease};

use super::deferred::Deferred;
use super::jobs::Answer;
use super::mailbox::{self, Came, Look};
use super::plane::{EngineKind, Plane};
use super::read::{self, Ask, Now, Stop, Waiting};
use super::throttled::Throttled;
use super::work::{self, Scratch, Site};
use crate::session::transmission::{Action, Command, Next, Refusal, Rules};
use crate::session::{Negotiated, Output};
use crate::wire::Put;

pub use super::work::CACHE_MAX;

mod held;

/// Gathered answers are sent when they reach this many bytes. The output holds at most this, plus
/// one piece of a read in chunks, or plus one whole read where it cannot be split.
pub const SEND_AT: usize = 256 << 10;

/// Longer answers are sent from where they are; shorter ones are copied to the others.
const COPY_MAX: usize = 32 << 10;

/// Where answers go.
pub trait Sink {
    /// Sends all of `bytes`, in order.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Sends what can be sent without waiting for the client; how many bytes that was.
    fn send_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes).map(|()| bytes.len())
    }

    /// True when nothing more is to be executed: nobody takes the answers.
    fn ended(&self) -> bool {
        false
    }
}

impl Sink for Vec<u8> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }
}

/// What [`Engine::run`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The first request of the rest of the input has at least this many bytes.
    NeedMore(usize),
    /// As much waits for a disk as may: run again, before anything more is received, when
    /// [`Engine::is_full`] says no. Not of an engine that defers nothing.
    Full,
    /// The client said good-bye.
    Disconnected,
    /// The client broke the protocol; close. Says how.
    Violated(&'static str),
}

/// The transmission of one connection, without the connection.
#[derive(Debug)]
pub struct Engine {
    site: Arc<Site>,
    out: Output,
    /// A refusal to send when this many more bytes of input are thrown away.
    discarding: Option<(Refusal, u64)>,
    scratch: Scratch,
    /// None: everything is executed where it comes.
    deferred: Option<Deferred>,
    /// None: nobody limits what is sent.
    throttled: Option<Throttled>,
    answers: Vec<Answer>,
    /// What is executed was held back before.
    again: bool,
    /// Requests wait for room since the current run began.
    crowded: bool,
}

impl Engine {
    /// An engine that executes on `device` what `rules` let pass, all of it at once.
    pub fn new(device: Arc<dyn Device>, rules: Rules) -> Engine {
        Engine {
            site: Arc::new(Site::new(device, rules)),
            out: Output::new(),
            discarding: None,
            scratch: Scratch::default(),
            deferred: None,
            throttled: None,
            answers: Vec::new(),
            again: false,
            crowded: false,
        }
    }

    /// The same, deferring as `plane` says what would wait.
    pub fn on(plane: &Arc<Plane>, device: Arc<dyn Device>, rules: Rules) -> Engine {
        let mut engine = Engine::new(device, rules);
        if plane.kind() != EngineKind::Inline {
            engine.deferred = Some(Deferred::new(plane.clone(), engine.site.clone()));
        }
        engine
    }

    /// Whether the export is larger than this session knew.
    fn has_grown(&self) -> bool {
        self.site.rules.size.raise(self.site.device.size())
    }

    /// The engine of a finished handshake.
    pub fn of(plane: &Arc<Plane>, negotiated: &Negotiated) -> Engine {
        let device = negotiated.export.device.clone();
        let engine = Engine::on(plane, device, Rules::of(negotiated));
        let engine = match &negotiated.export.gate {
            Some(gate) => engine.behind(gate.clone(), plane),
            None => engine,
        };
        match &negotiated.export.space {
            Some(space) => engine.waiting_for(space.clone()),
            None => engine,
        }
    }

    /// Executes every complete request at the start of `input`, sends the answers, and returns the
    /// bytes that were used up. An error is one of `sink`, or of the operating system; the session
    /// is then over.
    pub fn run(&mut self, input: &[u8], sink: &mut dyn Sink) -> io::Result<(usize, Turn)> {
        let mut used = 0;
        // Looked at once for all that came together, and again whenever answers are sent.
        let mut limited = self.is_limited();
        self.crowded = false;
        let turn = loop {
            if sink.ended() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let rest = &input[used..];
            if let Some((refusal, left)) = self.discarding.take() {
                let now = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                used += now;
                let left = left - now as u64;
                if left > 0 {
                    self.discarding = Some((refusal, left));
                    break Turn::NeedMore(1);
                }
                self.site
                    .replies
                    .fail(refusal.tag, refusal.error, &refusal.text, &mut self.out);
                continue;
            }
            if self.waits_enough() || (limited || self.crowded) && self.holds_enough() {
                break Turn::Full;
            }
            match self.site.rules.next(rest) {
                Next::NeedMore(n) => break Turn::NeedMore(n),
                Next::Disconnect => break Turn::Disconnected,
                Next::Violation(why) => break Turn::Violated(why),
                // Judged by the size that the client was told: once more by what it is now.
                Next::Refused { .. } if self.has_grown() => {}
                Next::Refused {
                    refusal,
                    header,
                    discard,
                } => {
                    tracing::debug!(
                        error = refusal.error,
                        text = refusal.text,
                        "request refused"
                    );
                    used += header;
                    self.discarding = Some((refusal, discard));
                }
                Next::Command {
                    command,
                    header,
                    payload,
                } => {
                    let end = header + payload;
                    if limited && self.holds(&command, &rest[header..end])? {
                        used += end;
                        continue;
                    }
                    let alone = rest.len() == end && self.outstanding() == 0;
                    self.execute(&command, &rest[header..end], alone, sink)?;
                    used += end;
                }
            }
            if self.out.len() >= SEND_AT {
                self.send(sink)?;
                limited = self.is_limited();
            }
        };
        if self.outstanding() > 0 {
            self.settle(sink)?;
        }
        self.send(sink)?;
        Ok((used, turn))
    }

    /// Requests that were taken and are not answered.
    pub fn outstanding(&self) -> usize {
        self.deferred.as_ref().map_or(0, Deferred::count) + self.held()
    }

    /// True when no request is taken before some of those are answered.
    pub fn is_full(&self) -> bool {
        self.waits_enough() || self.holds_enough()
    }

    /// True when no more may wait for a disk.
    fn waits_enough(&self) -> bool {
        self.deferred.as_ref().is_some_and(Deferred::is_full)
    }

    /// Waits until one of those can go on or be answered, or for `socket`.
    pub(super) fn wait(&self, socket: Option<(BorrowedFd<'_>, Look)>) -> io::Result<Came> {
        let deferred = self.deferred.as_ref().filter(|d| d.count() > 0);
        let throttled = self.throttled.as_ref().filter(|t| t.count() > 0);
        if deferred.is_none() && throttled.is_none() {
            return Ok(Came {
                input: true,
                ..Came::WORD
            });
        }
        // What is ready waits for room among the deferred, where that is full.
        let room = !self.waits_enough();
        let ready = throttled.is_some_and(Throttled::is_ready) && room;
        if ready || deferred.is_some_and(Deferred::has_landed) {
            return Ok(Came::WORD);
        }
        let wakes = [
            deferred.and_then(Deferred::wake),
            throttled.and_then(Throttled::wake),
        ];
        mailbox::wait_for(wakes, socket)
    }

    /// Answers those of the outstanding requests that are done. Errors as for [`Engine::run`].
    pub fn reap(&mut self, sink: &mut dyn Sink) -> io::Result<()> {
        self.settle(sink)?;
        self.send(sink)
    }

    /// Waits for all outstanding requests and answers them. Errors as for [`Engine::run`].
    pub fn finish(&mut self, sink: &mut dyn Sink) -> io::Result<()> {
        while self.outstanding() > 0 {
            self.wait(None)?;
            self.reap(sink)?;
        }
        Ok(())
    }

    /// Puts what is done into the output, and lets the kernel begin what was deferred, until
    /// neither is left.
    fn settle(&mut self, sink: &mut dyn Sink) -> io::Result<()> {
        loop {
            self.go_on(sink)?;
            let Some(deferred) = &mut self.deferred else {
                return Ok(());
            };
            deferred.submit()?;
            let mut answers = std::mem::take(&mut self.answers);
            deferred.reap(&mut answers)?;
            if answers.is_empty() {
                self.answers = answers;
                return Ok(());
            }
            for answer in answers.drain(..) {
                if sink.ended() {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                self.pass_on(&answer.out, sink)?;
                if let Some((ask, at)) = answer.more {
                    self.read(&ask, at, sink)?;
                }
                if let Some(command) = &answer.again {
                    self.try_later(command)?;
                }
            }
            self.answers = answers;
        }
    }

    fn pass_on(&mut self, answer: &Output, sink: &mut dyn Sink) -> io::Result<()> {
        let bytes = answer.filled();
        if bytes.len() > COPY_MAX {
            self.send(sink)?;
            return send(&mut self.deferred, bytes, sink);
        }
        self.out.put(bytes);
        if self.out.len() >= SEND_AT {
            self.send(sink)?;
        }
        Ok(())
    }

    /// Sends what is gathered.
    fn send(&mut self, sink: &mut dyn Sink) -> io::Result<()> {
        if !self.out.is_empty() {
            send(&mut self.deferred, self.out.filled(), sink)?;
            self.out.clear();
        }
        Ok(())
    }

    /// True when [`Engine::shrink`] would give memory back.
    pub fn is_large(&self) -> bool {
        self.out.is_large()
            || self.scratch.segments.capacity() > read::KEEP_SEGMENTS
            || self.deferred.as_ref().is_some_and(Deferred::is_large)
            || self.throttled.as_ref().is_some_and(Throttled::is_large)
    }

    /// Gives the memory of buffers back, and the ring; they come again when needed.
    pub fn shrink(&mut self) {
        self.out.shrink();
        self.scratch = Scratch::default();
        self.answers = Vec::new();
        self.deferred.as_mut().map(Deferred::shrink);
        self.throttled.as_mut().map(Throttled::shrink);
    }

    // For requests as they come; what was held back comes by a way of its own.
    #[inline(always)]
    fn execute(
        &mut self,
        c: &Command,
        payload: &[u8],
        alone: bool,
        sink: &mut dyn Sink,
    ) -> io::Result<()> {
        if let Action::Read { whole } = c.action {
            let ask = Ask {
                replies: self.site.replies,
                style: self.site.rules.style,
                whole,
                tag: c.tag,
                range: c.range.clone(),
            };
            return self.read(&ask, c.range.start, sink);
        }
        let defer = self.deferred.as_mut().filter(|_| !alone);
        if c.action == Action::Write {
            let written = self.site.write(c.range.clone(), payload, &mut self.scratch);
            if let Err(e) = &written
                && self.waits_for_room(e, c, payload)?
            {
                return Ok(());
            }
            // Borrowed anew.
            let defer = self.deferred.as_mut().filter(|_| !alone);
            let flush = c.fua && written.is_ok();
            if flush && defer.is_some_and(|d| d.command(&work::flush_after(c))) {
                return Ok(());
            }
            let done = match flush {
                true => self.site.device.flush(),
                false => written,
            };
            self.site.answer(c.tag, done, false, &mut self.out);
            return Ok(());
        }
        if work::is_slow(c) && defer.is_some_and(|d| d.command(c)) {
            return Ok(());
        }
        let refused = self.site.perform(c, true, &mut self.scratch, &mut self.out);
        match refused {
            Some(e) if self.waits_for_room(&e, c, &[])? => {}
            Some(e) => self.site.answer(c.tag, Err(e), false, &mut self.out),
            None => {}
        }
        Ok(())
    }

    /// Answers a READ from byte `at` on.
    fn read(&mut self, ask: &Ask, mut at: u64, sink: &mut dyn Sink) -> io::Result<()> {
        if ask.range.is_empty() {
            ask.put_empty(&mut self.out);
            return Ok(());
        }
        let mut hole = at..at;
        while at < ask.range.end {
            let piece = ask.piece(at);
            at = piece.end;
            match self.piece(ask, piece, &mut hole) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(()),
                Err(stop) => {
                    ask.end_hole(&mut hole, &mut self.out);
                    if let Stop::Failed(e, at) = stop {
                        ask.fail(&e, at, &mut self.out);
                    }
                    return Ok(());
                }
            }
            if self.out.len() >= SEND_AT && at < ask.range.end {
                self.send(sink)?;
            }
        }
        ask.end_hole(&mut hole, &mut self.out);
        Ok(())
    }

    /// Puts one piece of a READ into the output, or defers it and what follows it.
    fn piece(
        &mut self,
        ask: &Ask,
        piece: std::ops::Range<u64>,
        hole: &mut std::ops::Range<u64>,
    ) -> Result<ControlFlow<()>, Stop> {
        let segments = &mut self.scratch.segments;
        let mut lease: ReadLease = ask.map(self.site.device.as_ref(), &piece, segments)?;
        if let Some(deferred) = &mut self.deferred {
            let (mark, before) = (self.out.len(), hole.clone());
            match ask.put(&lease, segments, &mut Now, hole, &mut self.out) {
                Err(Stop::NotNow) => {}
                done => return done.map(ControlFlow::Continue),
            }
            self.out.cut(mark);
            *hole = before;
            ask.end_hole(hole, &mut self.out);
            match deferred.read(ask, piece, lease, std::mem::take(segments)) {
                Ok(()) => return Ok(ControlFlow::Break(())),
                Err((back, mapped)) => (lease, *segments) = (back, mapped),
            }
        }
        ask.put(&lease, segments, &mut Waiting, hole, &mut self.out)
            .map(ControlFlow::Continue)
    }
}

/// Sends `bytes`. Who waits for a client holds no lease.
fn send(deferred: &mut Option<Deferred>, bytes: &[u8], sink: &mut dyn Sink) -> io::Result<()> {
    let Some(deferred) = deferred.as_mut().filter(|d| d.must_land()) else {
        return sink.send(bytes);
    };
    let sent = sink.send_now(bytes)?;
    if sent == bytes.len() {
        return Ok(());
    }
    deferred.land()?;
    sink.send(&bytes[sent..])
}

#[cfg(test)]
#[path = "engine_tests/mod.rs"]
mod tests;
