//! READ: the one command whose answer is large.
//!
//! Simple replies and DF need the whole range in one piece: it is read into the output before the
//! header says that it succeeded. Everything else goes in pieces of at most [`PIECE`]: holes of at
//! least [`HOLE_MIN`] as hole chunks, joined across pieces; the rest as data.
//!
//! An error half-way ends the reply with its offset; the chunks before it stay valid.
//!
//! | mover | bytes that are not in memory |
//! |---|---|
//! | [`Waiting`] | are waited for |
//! | [`Now`] | stop the piece: [`Stop::NotNow`] |
//! | [`Planned`] | are noted, to be read by a ring; so are those that are in memory |

use std::ops::Range;

use ploop::device::{Device, ReadLease, Segment, SegmentPlace};
use ploop::error::{Error, Kind, Result};
use ploop::store::ring::Fetch;

use crate::session::errno;
use crate::session::output::Output;
use crate::session::replies::{Replies, Tag};
use crate::wire::reply::Style;

/// Longest piece that is mapped, read and sent at once. Pieces end at its multiples.
pub(super) const PIECE: u64 = 256 << 10;

/// Shorter holes are sent as zeros: a chunk and the client's work on it cost more.
const HOLE_MIN: u64 = 4 << 10;

/// Segments whose memory is kept when idle.
pub(super) const KEEP_SEGMENTS: usize = 64;

pub(super) fn is_hole(s: &Segment) -> bool {
    matches!(s.place, SegmentPlace::Hole)
}

/// One READ.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) replies: Replies,
    pub(super) style: Style,
    /// In one content chunk.
    pub(super) whole: bool,
    pub(super) tag: Tag,
    pub(super) range: Range<u64>,
}

/// Why a piece was not put into the output.
pub(super) enum Stop {
    /// Not all of it is in memory.
    NotNow,
    /// A failure, and the guest byte where it happened.
    Failed(Error, u64),
}

/// How bytes come from their file into the output.
pub(super) trait Mover {
    /// Puts the bytes of `segment` where `at` is in `out`; false when they are not there now.
    fn put(
        &mut self,
        lease: &ReadLease,
        segment: &Segment,
        out: &mut Output,
        at: usize,
    ) -> Result<bool>;
}

/// See the module text.
pub(super) struct Waiting;

/// See the module text.
pub(super) struct Now;

/// See the module text.
#[derive(Default)]
pub(super) struct Planned(pub(super) Vec<Fetch>);

fn place<'a>(out: &'a mut Output, at: usize, segment: &Segment) -> &'a mut [u8] {
    &mut out.tail(at)[..segment.len as usize]
}

impl Mover for Waiting {
    fn put(&mut self, lease: &ReadLease, s: &Segment, out: &mut Output, at: usize) -> Result<bool> {
        lease.read(s, 0, place(out, at, s)).map(|()| true)
    }
}

impl Mover for Now {
    fn put(&mut self, lease: &ReadLease, s: &Segment, out: &mut Output, at: usize) -> Result<bool> {
        match s.place {
            SegmentPlace::File { layer, offset } => {
                let into = place(out, at, s);
                let Some(got) = lease.file(layer).read_now(into, offset)? else {
                    return Ok(false);
                };
                into[got..].fill(0);
                Ok(true)
            }
            // A compressed cluster has to be read and unpacked.
            SegmentPlace::Through { .. } => Ok(false),
            _ => Waiting.put(lease, s, out, at),
        }
    }
}

impl Mover for Planned {
    fn put(&mut self, lease: &ReadLease, s: &Segment, out: &mut Output, at: usize) -> Result<bool> {
        match s.place {
            SegmentPlace::File { layer, offset } => {
                let len = s.len as usize;
                self.0.push(Fetch {
                    layer,
                    offset,
                    at,
                    len,
                });
                Ok(true)
            }
            SegmentPlace::Through { .. } => Ok(false),
            _ => Waiting.put(lease, s, out, at),
        }
    }
}

impl Ask {
    /// True when the answer is one piece.
    fn is_one_piece(&self) -> bool {
        self.whole || self.style == Style::Simple
    }

    /// The piece that begins at `at`.
    pub(super) fn piece(&self, at: u64) -> Range<u64> {
        if self.is_one_piece() || self.range.end - at <= PIECE {
            return at..self.range.end;
        }
        at..(at / PIECE + 1) * PIECE
    }

    /// Answers the READ of nothing.
    pub(super) fn put_empty(&self, out: &mut Output) {
        match self.style {
            Style::Simple => self.replies.ok(self.tag, out),
            _ => self.replies.end(self.tag, out),
        }
    }

    /// Maps a piece.
    pub(super) fn map(
        &self,
        device: &dyn Device,
        piece: &Range<u64>,
        segments: &mut Vec<Segment>,
    ) -> std::result::Result<ReadLease, Stop> {
        let mapped = device.map(piece.clone(), segments);
        mapped
            .and_then(|lease| check_cover(segments, piece).map(|()| lease))
            .map_err(|e| Stop::Failed(e, piece.start))
    }

    /// Puts one piece into the output. A hole at its end is left in `hole`, to be joined with what
    /// follows. After [`Stop::NotNow`] the output holds a part of it, to be cut off.
    pub(super) fn put(
        &self,
        lease: &ReadLease,
        segments: &[Segment],
        mover: &mut impl Mover,
        hole: &mut Range<u64>,
        out: &mut Output,
    ) -> std::result::Result<(), Stop> {
        if self.is_one_piece() {
            return self.put_whole(lease, segments, mover, out);
        }
        let mut i = 0;
        while i < segments.len() {
            let s = segments[i];
            if is_hole(&s) && (s.len >= HOLE_MIN || !hole.is_empty()) {
                if hole.is_empty() {
                    *hole = s.offset..s.offset;
                }
                hole.end = s.offset + s.len;
                i += 1;
                continue;
            }
            self.end_hole(hole, out);
            let count = segments[i..]
                .iter()
                .take_while(|s| !is_hole(s) || s.len < HOLE_MIN)
                .count();
            self.put_data(lease, &segments[i..i + count], mover, out)?;
            i += count;
        }
        Ok(())
    }

    fn put_whole(
        &self,
        lease: &ReadLease,
        segments: &[Segment],
        mover: &mut impl Mover,
        out: &mut Output,
    ) -> std::result::Result<(), Stop> {
        // At most MAX_PAYLOAD.
        let len = (self.range.end - self.range.start) as usize;
        let all_hole = len as u64 >= HOLE_MIN && segments.iter().all(is_hole);
        if self.style != Style::Simple && all_hole {
            self.put_hole(&self.range, true, out);
            return Ok(());
        }
        let data = self.replies.begin_data(self.range.start, len, out);
        match move_all(lease, segments, mover, out, data.body()) {
            (_, None) => {
                self.replies.end_data(self.tag, &data, len, true, out);
                Ok(())
            }
            (_, Some(stop)) => {
                self.replies.drop_data(&data, out);
                Err(stop)
            }
        }
    }

    /// One data chunk of consecutive segments. Where a read fails, the bytes before it are kept.
    fn put_data(
        &self,
        lease: &ReadLease,
        segments: &[Segment],
        mover: &mut impl Mover,
        out: &mut Output,
    ) -> std::result::Result<(), Stop> {
        let Some(first) = segments.first() else {
            return Ok(());
        };
        let len = segments.iter().map(|s| s.len).sum::<u64>();
        let data = self.replies.begin_data(first.offset, len as usize, out);
        let (moved, stop) = move_all(lease, segments, mover, out, data.body());
        let done = stop.is_none() && first.offset + len == self.range.end;
        if moved > 0 {
            self.replies.end_data(self.tag, &data, moved, done, out);
        } else {
            self.replies.drop_data(&data, out);
        }
        stop.map_or(Ok(()), Err)
    }

    /// Sends a hole that was being joined, if there is one.
    pub(super) fn end_hole(&self, hole: &mut Range<u64>, out: &mut Output) {
        if !hole.is_empty() {
            self.put_hole(hole, hole.end == self.range.end, out);
            *hole = 0..0;
        }
    }

    fn put_hole(&self, hole: &Range<u64>, done: bool, out: &mut Output) {
        // Inside a READ, so at most MAX_PAYLOAD.
        let len = u32::try_from(hole.end - hole.start).unwrap_or(u32::MAX);
        self.replies.hole(self.tag, hole.start, len, done, out);
    }

    /// Ends the answer with a failure at guest byte `at`.
    pub(super) fn fail(&self, e: &Error, at: u64, out: &mut Output) {
        tracing::warn!(offset = at, error = %e, "read failed");
        let error = errno::of(e.kind(), false);
        if self.style == Style::Simple {
            self.replies.fail(self.tag, error, e.what(), out);
        } else {
            self.replies.fail_at(self.tag, error, e.what(), at, out);
        }
    }
}

/// Moves the bytes of consecutive segments to where `body` is in the output. Returns the bytes
/// moved, and what stopped it.
fn move_all(
    lease: &ReadLease,
    segments: &[Segment],
    mover: &mut impl Mover,
    out: &mut Output,
    body: usize,
) -> (usize, Option<Stop>) {
    let mut moved = 0;
    for s in segments {
        match mover.put(lease, s, out, body + moved) {
            Ok(true) => moved += s.len as usize,
            Ok(false) => return (moved, Some(Stop::NotNow)),
            Err(e) => return (moved, Some(Stop::Failed(e, s.offset))),
        }
    }
    (moved, None)
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
