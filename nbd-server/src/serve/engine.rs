//! Executes requests: bytes in, bytes out, everything done on the calling thread.
//!
//! ```text
//!  input ─▶ Rules::next ─▶ map / prepare ─▶ move ─▶ commit ─▶ Output ─▶ Sink
//! ```
//!
//! All complete requests of the input are executed in order, and their answers go out in one piece.
//! Whatever was executed is answered: there is no queue behind the engine, so the requests in
//! flight on a connection are those in its input buffer. There is no socket, no thread and no clock
//! here; a crash test drives this engine with bytes over a recording store.
//!
//! Reads go from the file into the output, writes from the input into the file, without a copy in
//! between and without an allocation once the buffers have grown. A long read in chunks is sent
//! while it is still being read, piece by piece; the lease on a piece is gone before its bytes go
//! to the client, so a client that stops reading holds up nobody's maintenance.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use ploop::device::{Device, Extent, Segment, WriteSegment};
use ploop::error::{Error, Kind, Result};

use crate::serve::read;
use crate::session::replies::{Replies, Tag};
use crate::session::transmission::{Action, Command, Next, Refusal, Rules};
use crate::session::{MAX_EXTENTS, Negotiated, Output, errno};

/// Gathered answers are sent when they reach this many bytes. The output holds at most this, plus
/// one piece of a read in chunks, or plus one whole read where it cannot be split.
pub const SEND_AT: usize = 256 << 10;

/// Longest single write to a file. On ext4 a page-cache folio is as large as the write that made
/// it, and a small overwrite in a large folio costs several times one in a small.
const WRITE_PIECE: usize = 64 << 10;

/// What one CACHE reads at most; the rest of its range is left alone. A client cannot keep a disk
/// busy for a terabyte with one request of 28 bytes.
pub const CACHE_MAX: u64 = 256 << 20;

const CACHE_PIECE: u64 = 128 << 10;

/// Where answers go.
pub trait Sink {
    /// Sends all of `bytes`, in order.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;

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
    /// The client said good-bye.
    Disconnected,
    /// The client broke the protocol; close. Says how.
    Violated(&'static str),
}

/// The transmission of one connection, without the connection.
#[derive(Debug)]
pub struct Engine {
    device: Arc<dyn Device>,
    rules: Rules,
    replies: Replies,
    out: Output,
    /// A refusal to send when this many more bytes of input are thrown away.
    discarding: Option<(Refusal, u64)>,
    segments: Vec<Segment>,
    write_segments: Vec<WriteSegment>,
    extents: Vec<Extent>,
    scratch: Vec<u8>,
}

impl Engine {
    /// An engine that executes on `device` what `rules` let pass.
    pub fn new(device: Arc<dyn Device>, rules: Rules) -> Engine {
        Engine {
            replies: Replies::new(rules.style),
            device,
            rules,
            out: Output::new(),
            discarding: None,
            segments: Vec::new(),
            write_segments: Vec::new(),
            extents: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// The engine of a finished handshake.
    pub fn of(negotiated: &Negotiated) -> Engine {
        Engine::new(negotiated.export.device.clone(), Rules::of(negotiated))
    }

    /// Executes every complete request at the start of `input`, sends the answers, and returns the
    /// bytes that were used up. An error is one of `sink`; the session is then over.
    pub fn run(&mut self, input: &[u8], sink: &mut dyn Sink) -> io::Result<(usize, Turn)> {
        let mut used = 0;
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
                self.replies
                    .fail(refusal.tag, refusal.error, &refusal.text, &mut self.out);
                continue;
            }
            match self.rules.next(rest) {
                Next::NeedMore(n) => break Turn::NeedMore(n),
                Next::Disconnect => break Turn::Disconnected,
                Next::Violation(why) => break Turn::Violated(why),
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
                    self.execute(&command, &rest[header..end], sink)?;
                    used += end;
                }
            }
            if self.out.len() >= SEND_AT {
                send(&mut self.out, sink)?;
            }
        };
        send(&mut self.out, sink)?;
        Ok((used, turn))
    }

    /// True when [`Engine::shrink`] would give memory back.
    pub fn is_large(&self) -> bool {
        self.out.is_large() || self.segments.capacity() > read::KEEP_SEGMENTS
    }

    /// Gives the memory of buffers back; they grow again when needed.
    pub fn shrink(&mut self) {
        self.out.shrink();
        self.segments = Vec::new();
        self.write_segments = Vec::new();
        self.extents = Vec::new();
        self.scratch = Vec::new();
    }

    fn execute(&mut self, c: &Command, payload: &[u8], sink: &mut dyn Sink) -> io::Result<()> {
        let range = c.range.clone();
        let mut fast = false;
        let done = match c.action {
            Action::Read { whole } => {
                let mut read = read::Read {
                    device: self.device.as_ref(),
                    replies: self.replies,
                    tag: c.tag,
                    range,
                    segments: &mut self.segments,
                    out: &mut self.out,
                };
                return read.run(self.rules.style, whole, sink);
            }
            Action::Status { one } => return self.status(c.tag, &range, one),
            Action::Write => self.write(range, payload),
            Action::Flush => self.flush(),
            Action::Trim => self.device.discard(range),
            Action::Cache => self.cache(range),
            Action::Zero(mode) => {
                fast = mode.only_if_fast;
                self.device.zero(range, mode)
            }
        };
        let done = if c.fua {
            done.and_then(|()| self.device.flush())
        } else {
            done
        };
        match done {
            Ok(()) => self.replies.ok(c.tag, &mut self.out),
            Err(e) => fail(&self.replies, c.tag, &e, fast, &mut self.out),
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        // Nothing was changed through a read-only export, so there is nothing to make durable.
        if self.rules.read_only {
            Ok(())
        } else {
            self.device.flush()
        }
    }

    fn write(&mut self, range: Range<u64>, payload: &[u8]) -> Result<()> {
        if payload.is_empty() {
            return Ok(());
        }
        let lease = self.device.prepare(range, &mut self.write_segments)?;
        let mut rest = payload;
        for segment in &self.write_segments {
            let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
            let Some((bytes, after)) = rest.split_at_checked(len) else {
                return Err(misprepared());
            };
            let mut at = segment.file_offset;
            for piece in bytes.chunks(WRITE_PIECE) {
                lease.file().write_at(piece, at)?;
                at += piece.len() as u64;
            }
            rest = after;
        }
        if !rest.is_empty() {
            return Err(misprepared());
        }
        self.device.commit(lease)
    }

    fn cache(&mut self, range: Range<u64>) -> Result<()> {
        let end = range.end.min(range.start.saturating_add(CACHE_MAX));
        let mut at = range.start;
        self.scratch.resize(CACHE_PIECE as usize, 0);
        while at < end {
            let to = end.min(at + CACHE_PIECE);
            let lease = self.device.map(at..to, &mut self.segments)?;
            for s in self.segments.iter().filter(|s| !read::is_hole(s)) {
                let len = s.len.min(CACHE_PIECE) as usize;
                lease.read(s, 0, &mut self.scratch[..len])?;
            }
            at = to;
        }
        Ok(())
    }

    fn status(&mut self, tag: Tag, range: &Range<u64>, one: bool) -> io::Result<()> {
        let limit = if one { 1 } else { MAX_EXTENTS };
        let count = self.rules.contexts.len();
        for (i, context) in self.rules.contexts.iter().enumerate() {
            let asked = self
                .device
                .allocation(range.clone(), limit, &mut self.extents);
            let asked = asked.and_then(|()| match self.extents.is_empty() {
                true => Err(Error::new(Kind::Io, "the device gave no extent")),
                false => Ok(()),
            });
            if let Err(e) = asked {
                fail(&self.replies, tag, &e, false, &mut self.out);
                break;
            }
            self.extents.truncate(limit);
            let (id, done) = (i as u32 + 1, i + 1 == count);
            self.replies
                .status(tag, id, *context, &self.extents, done, &mut self.out);
        }
        Ok(())
    }
}

/// The failure of a device that prepared another range than it was asked to.
fn misprepared() -> Error {
    Error::new(
        Kind::Io,
        "the device prepared another length than the write has",
    )
    .fix("This is a defect of the server; please report it.")
}

/// Sends what is gathered.
pub(super) fn send(out: &mut Output, sink: &mut dyn Sink) -> io::Result<()> {
    if !out.is_empty() {
        sink.send(out.filled())?;
        out.clear();
    }
    Ok(())
}

/// Answers with an error of the device, and says it in the log: the client sees a number at most.
fn fail(replies: &Replies, tag: Tag, e: &Error, fast: bool, out: &mut Output) {
    let error = errno::of(e.kind(), fast);
    if fast && e.kind() == Kind::Unsupported {
        tracing::debug!(error = %e, "fast zero refused");
    } else {
        tracing::warn!(offset = tag.offset, error = %e, "request failed");
    }
    replies.fail(tag, error, e.what(), out);
}

#[cfg(test)]
#[path = "engine_tests/mod.rs"]
mod tests;
