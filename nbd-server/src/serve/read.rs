//! READ: the one command whose answer is large.
//!
//! Simple replies and DF need the whole range in one piece: it is read into the output before the
//! header says that it succeeded. Everything else goes in pieces of at most [`PIECE`]: holes of at
//! least [`HOLE_MIN`] as hole chunks, joined across pieces; the rest as data.
//!
//! An error half-way ends the reply with its offset; the chunks before it stay valid.

use std::io;
use std::ops::Range;

use ploop::device::{Device, ReadLease, Segment, SegmentPlace};
use ploop::error::{Error, Kind, Result};

use super::engine::{SEND_AT, Sink, send};
use crate::session::errno;
use crate::session::output::Output;
use crate::session::replies::{Replies, Tag};
use crate::wire::reply::Style;

/// Longest piece that is mapped, read and sent at once. Pieces end at its multiples.
const PIECE: u64 = 256 << 10;

/// Shorter holes are sent as zeros: a chunk and the client's work on it cost more.
const HOLE_MIN: u64 = 4 << 10;

/// Segments whose memory is kept when idle.
pub(super) const KEEP_SEGMENTS: usize = 64;

pub(super) fn is_hole(s: &Segment) -> bool {
    matches!(s.place, SegmentPlace::Hole)
}

/// One READ being answered.
pub(super) struct Read<'a> {
    pub(super) device: &'a dyn Device,
    pub(super) replies: Replies,
    pub(super) tag: Tag,
    pub(super) range: Range<u64>,
    pub(super) segments: &'a mut Vec<Segment>,
    pub(super) out: &'a mut Output,
}

/// A failure, and the guest byte where it happened.
struct FailedAt(Error, u64);

impl Read<'_> {
    /// Answers the READ. An error is one of `sink`.
    pub(super) fn run(&mut self, style: Style, whole: bool, sink: &mut dyn Sink) -> io::Result<()> {
        match style {
            Style::Simple => self.simple(),
            _ if self.range.is_empty() => self.replies.end(self.tag, self.out),
            _ if whole => self.whole(),
            _ => return self.pieces(sink),
        }
        Ok(())
    }

    fn simple(&mut self) {
        let data = self
            .replies
            .begin_data(self.range.start, self.len(), self.out);
        match self.fill(data.body()) {
            Ok(()) => self
                .replies
                .end_data(self.tag, &data, self.len(), true, self.out),
            Err(FailedAt(e, at)) => {
                self.replies.drop_data(&data, self.out);
                let error = self.log(&e, at);
                self.replies.fail(self.tag, error, e.what(), self.out);
            }
        }
    }

    fn whole(&mut self) {
        let data = self
            .replies
            .begin_data(self.range.start, self.len(), self.out);
        match self.fill(data.body()) {
            Ok(()) if self.segments.iter().all(is_hole) && self.len() as u64 >= HOLE_MIN => {
                self.replies.drop_data(&data, self.out);
                self.put_hole(&self.range.clone(), true);
            }
            Ok(()) => self
                .replies
                .end_data(self.tag, &data, self.len(), true, self.out),
            Err(failed) => {
                self.replies.drop_data(&data, self.out);
                self.fail_at(&failed);
            }
        }
    }

    /// The length of the range; at most `MAX_PAYLOAD`.
    fn len(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }

    /// Reads the whole range to where `body` starts in the output.
    fn fill(&mut self, body: usize) -> std::result::Result<(), FailedAt> {
        let start = self.range.start;
        let lease = self.device.map(self.range.clone(), self.segments);
        let lease = lease.map_err(|e| FailedAt(e, start))?;
        check_cover(self.segments, &self.range).map_err(|e| FailedAt(e, start))?;
        let (_, failed) = move_all(&lease, self.segments, self.out.tail(body));
        failed.map_or(Ok(()), Err)
    }

    fn pieces(&mut self, sink: &mut dyn Sink) -> io::Result<()> {
        let mut at = self.range.start;
        let mut hole = at..at;
        while at < self.range.end {
            let short = self.range.end - at <= PIECE;
            let to = if short {
                self.range.end
            } else {
                (at / PIECE + 1) * PIECE
            };
            if let Err(failed) = self.piece(at..to, &mut hole) {
                self.end_hole(&mut hole);
                self.fail_at(&failed);
                return Ok(());
            }
            at = to;
            if self.out.len() >= SEND_AT {
                send(self.out, sink)?;
            }
        }
        self.end_hole(&mut hole);
        Ok(())
    }

    /// Puts the data of one piece into the output; the lease on it ends here. A hole at its end is
    /// left in `hole`, to be joined with what follows.
    fn piece(
        &mut self,
        range: Range<u64>,
        hole: &mut Range<u64>,
    ) -> std::result::Result<(), FailedAt> {
        let start = range.start;
        let lease = self.device.map(range.clone(), self.segments);
        let lease = lease.map_err(|e| FailedAt(e, start))?;
        check_cover(self.segments, &range).map_err(|e| FailedAt(e, start))?;
        let mut i = 0;
        while i < self.segments.len() {
            let s = self.segments[i];
            if is_hole(&s) && (s.len >= HOLE_MIN || !hole.is_empty()) {
                if hole.is_empty() {
                    *hole = s.offset..s.offset;
                }
                hole.end = s.offset + s.len;
                i += 1;
                continue;
            }
            self.end_hole(hole);
            let count = self.segments[i..].iter();
            let count = count
                .take_while(|s| !is_hole(s) || s.len < HOLE_MIN)
                .count();
            self.data(&lease, i..i + count)?;
            i += count;
        }
        Ok(())
    }

    /// One data chunk of consecutive segments. Where a read fails, the bytes before it are kept.
    fn data(
        &mut self,
        lease: &ReadLease,
        which: Range<usize>,
    ) -> std::result::Result<(), FailedAt> {
        let segments = &self.segments[which];
        let Some(first) = segments.first() else {
            return Ok(());
        };
        let len = segments.iter().map(|s| s.len).sum::<u64>();
        let data = self
            .replies
            .begin_data(first.offset, len as usize, self.out);
        let (moved, failed) = move_all(lease, segments, self.out.tail(data.body()));
        let done = failed.is_none() && first.offset + len == self.range.end;
        if moved > 0 {
            self.replies
                .end_data(self.tag, &data, moved, done, self.out);
        } else {
            self.replies.drop_data(&data, self.out);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Sends a hole that was being joined, if there is one.
    fn end_hole(&mut self, hole: &mut Range<u64>) {
        if !hole.is_empty() {
            self.put_hole(hole, hole.end == self.range.end);
            *hole = 0..0;
        }
    }

    fn put_hole(&mut self, hole: &Range<u64>, done: bool) {
        // Inside a READ, so at most MAX_PAYLOAD.
        let len = u32::try_from(hole.end - hole.start).unwrap_or(u32::MAX);
        self.replies.hole(self.tag, hole.start, len, done, self.out);
    }

    fn fail_at(&mut self, FailedAt(e, at): &FailedAt) {
        let error = self.log(e, *at);
        self.replies
            .fail_at(self.tag, error, e.what(), *at, self.out);
    }

    fn log(&self, e: &Error, at: u64) -> u32 {
        tracing::warn!(offset = at, error = %e, "read failed");
        errno::of(e.kind(), false)
    }
}

/// Moves the bytes of consecutive segments into `body`, which has exactly their length. Returns the
/// bytes moved, and the failure that stopped it.
fn move_all(lease: &ReadLease, segments: &[Segment], body: &mut [u8]) -> (usize, Option<FailedAt>) {
    let mut at = 0;
    for s in segments {
        let end = at + s.len as usize;
        if let Err(e) = lease.read(s, 0, &mut body[at..end]) {
            return (at, Some(FailedAt(e, s.offset)));
        }
        at = end;
    }
    (at, None)
}

/// Checks that the segments are the range, no more and no less. The output holds old bytes where
/// nothing is read into it: a device that forgot a part must not make them another client's.
fn check_cover(segments: &[Segment], range: &Range<u64>) -> Result<()> {
    let mut at = range.start;
    for s in segments {
        if s.offset != at || s.len == 0 || s.len > range.end - at {
            at = u64::MAX;
            break;
        }
        at += s.len;
    }
    if at == range.end {
        return Ok(());
    }
    let text = format!(
        "the device mapped another range than {}..{}",
        range.start, range.end
    );
    Err(Error::new(Kind::Io, text).fix("This is a defect of the server; please report it."))
}
