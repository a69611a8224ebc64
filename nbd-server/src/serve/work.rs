//! One command, executed: by whichever thread.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use ploop::device::{Device, Segment, WriteSegment};
use ploop::error::{Error, Kind, Result};

use super::read;
use crate::export::Space;
use crate::export::space::OnFull;
use crate::session::context::Extents;
use crate::session::replies::{Replies, Tag};
use crate::session::transmission::{Action, Command, Rules};
use crate::session::{MAX_EXTENTS, Output, errno};

/// Longest single write to a file. On ext4 a page-cache folio is as large as the write that made
/// it, and a small overwrite in a large folio costs several times one in a small.
const WRITE_PIECE: usize = 64 << 10;

/// What one CACHE reads at most; the rest of its range is left alone. A client cannot keep a disk
/// busy for a terabyte with one request of 28 bytes.
pub const CACHE_MAX: u64 = 256 << 20;

const CACHE_PIECE: u64 = 128 << 10;

/// Longer ranges are erased on another thread: punching those takes longer than handing them over.
const QUICK_ERASE: u64 = 1 << 20;

/// Longer ranges are described on another thread.
const QUICK_STATUS: u64 = 1 << 30;

/// What the commands of one session are executed on.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) device: Arc<dyn Device>,
    pub(super) rules: Rules,
    pub(super) replies: Replies,
    space: OnceLock<Arc<Space>>,
}

/// Memory that is used again.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) segments: Vec<Segment>,
    write_segments: Vec<WriteSegment>,
    extents: Extents,
    bytes: Vec<u8>,
}

/// True for what may take as long as a disk takes. READ is looked at when it is executed, and what
/// a WRITE waits for cannot be known before.
pub(super) fn is_slow(c: &Command) -> bool {
    let len = c.range.end - c.range.start;
    match c.action {
        Action::Read { .. } | Action::Write => false,
        Action::Flush | Action::Cache => true,
        Action::Trim | Action::Zero(_) => c.fua || len > QUICK_ERASE,
        Action::Status { .. } => len > QUICK_STATUS,
    }
}

/// The flush that makes a command with FUA complete, which is answered by it.
pub(super) fn flush_after(c: &Command) -> Command {
    Command {
        tag: c.tag,
        action: Action::Flush,
        range: 0..0,
        fua: false,
    }
}

impl Site {
    pub(super) fn new(device: Arc<dyn Device>, rules: Rules) -> Site {
        Site {
            replies: Replies::new(rules.style),
            device,
            rules,
            space: OnceLock::new(),
        }
    }

    /// The host's room is looked after by `space`.
    pub(super) fn look_after(&self, space: Arc<Space>) {
        drop(self.space.set(space));
    }

    /// True when what the host has no room for waits for some.
    pub(super) fn waits(&self) -> bool {
        let pauses = |s: &Arc<Space>| s.on_full() == OnFull::Pause;
        self.space.get().is_some_and(pauses)
    }

    /// Executes a command that has no payload and is no READ, and answers it. Not when it `may_wait`
    /// and the host has no room for it: that error is returned.
    pub(super) fn perform(
        &self,
        c: &Command,
        may_wait: bool,
        scratch: &mut Scratch,
        out: &mut Output,
    ) -> Option<Error> {
        let (range, mut fast) = (c.range.clone(), false);
        let done = match c.action {
            Action::Status { one } => {
                self.status(c.tag, &range, one, scratch, out);
                return None;
            }
            Action::Flush => self.flush(),
            Action::Trim => self.device.discard(range),
            Action::Cache => self.cache(range, scratch),
            Action::Zero(mode) => {
                fast = mode.only_if_fast;
                self.device.zero(range, mode)
            }
            Action::Read { .. } | Action::Write => Err(Error::new(
                Kind::Io,
                "a command came where it is not executed",
            )),
        };
        let done = match c.fua {
            true => done.and_then(|()| self.device.flush()),
            false => done,
        };
        match done {
            Err(e) if may_wait && c.action != Action::Flush && e.is_host_full() => return Some(e),
            done => self.answer(c.tag, done, fast, out),
        }
        None
    }

    /// Answers a command that was executed.
    #[inline]
    pub(super) fn answer(&self, tag: Tag, done: Result<()>, fast: bool, out: &mut Output) {
        match done {
            Ok(()) => self.replies.ok(tag, out),
            Err(e) => self.fail(tag, &e, fast, out),
        }
    }

    /// Answers with an error of the device, and says it in the log: the client sees a number at
    /// most.
    fn fail(&self, tag: Tag, e: &Error, fast: bool, out: &mut Output) {
        let error = errno::of(e.kind(), fast);
        if let Some(space) = self.space.get().filter(|_| e.is_host_full()) {
            space.note_refused();
        }
        if fast && e.kind() == Kind::Unsupported {
            tracing::debug!(error = %e, "fast zero refused");
        } else {
            tracing::warn!(offset = tag.offset, error = %e, "request failed");
        }
        self.replies.fail(tag, error, e.what(), out);
    }

    fn flush(&self) -> Result<()> {
        // Nothing was changed through a read-only export, so there is nothing to make durable.
        if self.rules.read_only {
            Ok(())
        } else {
            self.device.flush()
        }
    }

    /// Writes `payload`, which has the length of `range`.
    pub(super) fn write(
        &self,
        range: Range<u64>,
        payload: &[u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        if payload.is_empty() {
            return Ok(());
        }
        let segments = &mut scratch.write_segments;
        let lease = self.device.prepare(range, segments)?;
        let mut rest = payload;
        for segment in segments {
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

    fn cache(&self, range: Range<u64>, scratch: &mut Scratch) -> Result<()> {
        let end = range.end.min(range.start.saturating_add(CACHE_MAX));
        let mut at = range.start;
        scratch.bytes.resize(CACHE_PIECE as usize, 0);
        while at < end {
            let to = end.min(at + CACHE_PIECE);
            let lease = self.device.map(at..to, &mut scratch.segments)?;
            for s in scratch.segments.iter().filter(|s| !read::is_hole(s)) {
                let len = s.len.min(CACHE_PIECE) as usize;
                lease.read(s, 0, &mut scratch.bytes[..len])?;
            }
            at = to;
        }
        Ok(())
    }

    fn status(
        &self,
        tag: Tag,
        range: &Range<u64>,
        one: bool,
        scratch: &mut Scratch,
        out: &mut Output,
    ) {
        let limit = if one { 1 } else { MAX_EXTENTS };
        let count = self.rules.contexts.len();
        let extents = &mut scratch.extents;
        for (i, context) in self.rules.contexts.iter().enumerate() {
            let device = self.device.as_ref();
            if let Err(e) = context.describe(device, range.clone(), limit, extents) {
                return self.fail(tag, &e, false, out);
            }
            let (id, done) = (i as u32 + 1, i + 1 == count);
            self.replies.status(tag, id, &extents.found, done, out);
        }
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
