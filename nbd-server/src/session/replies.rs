//! What became of a command, as bytes.
//!
//! | style | success | failure | READ |
//! |---|---|---|---|
//! | simple | simple | simple | simple header, then the whole data |
//! | structured | simple | error chunk with text | chunks, the last one marked |
//! | extended | empty chunk | error chunk with text | chunks, the last one marked |
//!
//! Data is put behind its header before the header is written: a chunk is announced only when its
//! bytes are there, so an error half-way through a read never leaves a chunk to be padded.

use crate::session::output::Output;
use crate::wire::Put;
use crate::wire::chunk::{self, kind};
use crate::wire::reply::{Chunk, DONE, Simple, Style};

/// Which request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Its cookie.
    pub cookie: u64,
    /// Its offset.
    pub offset: u64,
}

/// A data chunk (or simple data) whose bytes are being filled in.
#[derive(Debug)]
#[must_use]
pub struct Data {
    start: usize,
    body: usize,
    offset: u64,
}

impl Data {
    /// Where in the output its bytes start.
    pub fn body(&self) -> usize {
        self.body
    }
}

/// Makes the replies of one session.
#[derive(Clone, Copy, Debug)]
pub struct Replies {
    style: Style,
}

impl Replies {
    /// Replies of that style.
    pub fn new(style: Style) -> Replies {
        Replies { style }
    }

    fn header(&self, tag: Tag, flags: u16, kind: u16, length: usize) -> Chunk {
        // Every payload is bounded by MAX_PAYLOAD plus its header.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        Chunk {
            flags,
            kind,
            cookie: tag.cookie,
            offset: tag.offset,
            length,
        }
    }

    fn chunk(&self, tag: Tag, done: bool, kind: u16, length: usize, out: &mut Output) {
        let flags = if done { DONE } else { 0 };
        self.header(tag, flags, kind, length).emit(self.style, out);
    }

    /// A command other than READ and `BLOCK_STATUS` succeeded.
    pub fn ok(&self, tag: Tag, out: &mut Output) {
        match self.style {
            Style::Extended => self.end(tag, out),
            _ => out.put(
                &Simple {
                    error: 0,
                    cookie: tag.cookie,
                }
                .bytes(),
            ),
        }
    }

    /// The end of a reply in chunks whose last chunk was not marked.
    pub fn end(&self, tag: Tag, out: &mut Output) {
        self.chunk(tag, true, kind::NONE, 0, out);
    }

    /// A command failed.
    pub fn fail(&self, tag: Tag, error: u32, text: &str, out: &mut Output) {
        if self.style == Style::Simple {
            return out.put(
                &Simple {
                    error,
                    cookie: tag.cookie,
                }
                .bytes(),
            );
        }
        self.chunk(tag, true, kind::ERROR, chunk::error_len(text, None), out);
        chunk::put_error(error, text, None, out);
    }

    /// A READ in chunks failed at byte `at`; what was sent before stays valid.
    pub fn fail_at(&self, tag: Tag, error: u32, text: &str, at: u64, out: &mut Output) {
        self.chunk(
            tag,
            true,
            kind::ERROR_OFFSET,
            chunk::error_len(text, Some(at)),
            out,
        );
        chunk::put_error(error, text, Some(at), out);
    }

    /// Makes room for `len` bytes read from guest byte `offset`. In simple style this is the whole
    /// answer.
    pub fn begin_data(&self, offset: u64, len: usize, out: &mut Output) -> Data {
        let start = out.len();
        let head = match self.style {
            Style::Simple => Simple::LEN,
            style => Chunk::header_len(style) + chunk::DATA_HEADER,
        };
        out.room(head + len);
        Data {
            start,
            body: start + head,
            offset,
        }
    }

    /// Writes the header for the first `len` bytes of `data` (never 0 in a chunk) and takes the
    /// rest away.
    pub fn end_data(&self, tag: Tag, data: &Data, len: usize, done: bool, out: &mut Output) {
        out.cut(data.body + len);
        let head = out.tail(data.start);
        if self.style == Style::Simple {
            let reply = Simple {
                error: 0,
                cookie: tag.cookie,
            };
            return head[..Simple::LEN].copy_from_slice(&reply.bytes());
        }
        let flags = if done { DONE } else { 0 };
        let length = chunk::DATA_HEADER + len;
        self.header(tag, flags, kind::OFFSET_DATA, length)
            .write(self.style, head);
        let at = Chunk::header_len(self.style);
        head[at..at + chunk::DATA_HEADER].copy_from_slice(&data.offset.to_be_bytes());
    }

    /// Takes everything of `data` away.
    pub fn drop_data(&self, data: &Data, out: &mut Output) {
        out.cut(data.start);
    }

    /// `len` bytes (never 0) at `offset` read as zeros.
    pub fn hole(&self, tag: Tag, offset: u64, len: u32, done: bool, out: &mut Output) {
        self.chunk(tag, done, kind::OFFSET_HOLE, chunk::HOLE_LEN, out);
        out.put(&chunk::hole(offset, len));
    }

    /// One context's part of a `BLOCK_STATUS`. `extents` is not empty.
    pub fn status(
        &self,
        tag: Tag,
        id: u32,
        extents: &[chunk::Extent],
        done: bool,
        out: &mut Output,
    ) {
        let extents = self.nameable(extents);
        let length = chunk::status_len(self.style, extents.len());
        self.chunk(tag, done, chunk::status_kind(self.style), length, out);
        let count = u32::try_from(extents.len()).unwrap_or(u32::MAX);
        chunk::put_status_head(self.style, id, count, out);
        for extent in extents {
            chunk::put_extent(self.style, *extent, out);
        }
    }

    /// The extents up to and with the first that is too long for 32 bits: that one is cut, and
    /// nothing may follow a cut one.
    fn nameable<'a>(&self, extents: &'a [chunk::Extent]) -> &'a [chunk::Extent] {
        let too_long = |e: &chunk::Extent| e.len > chunk::MAX_COMPACT_EXTENT;
        match extents.iter().position(too_long) {
            Some(i) if self.style != Style::Extended => &extents[..=i],
            _ => extents,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: Tag = Tag {
        cookie: 5,
        offset: 1 << 20,
    };

    #[test]
    fn success_is_simple_unless_extended() {
        for style in [Style::Simple, Style::Structured] {
            let mut out = Output::new();
            Replies::new(style).ok(TAG, &mut out);
            assert_eq!(
                Simple::parse(out.filled()),
                Ok(Simple {
                    error: 0,
                    cookie: 5
                })
            );
        }
        let mut out = Output::new();
        Replies::new(Style::Extended).ok(TAG, &mut out);
        let (chunk, style) = Chunk::parse(out.filled()).unwrap();
        assert_eq!(
            (style, chunk.flags, chunk.kind),
            (Style::Extended, DONE, kind::NONE)
        );
        assert_eq!(chunk.offset, 1 << 20);
    }

    #[test]
    fn a_failed_tail_of_data_is_taken_away() {
        let replies = Replies::new(Style::Structured);
        let mut out = Output::new();
        let data = replies.begin_data(4096, 100, &mut out);
        out.tail(data.body()).fill(9);
        replies.end_data(TAG, &data, 60, false, &mut out);
        let (chunk, _) = Chunk::parse(out.filled()).unwrap();
        assert_eq!(
            (chunk.flags, chunk.kind, chunk.length),
            (0, kind::OFFSET_DATA, 68)
        );
        let payload = &out.filled()[Chunk::STRUCTURED..];
        assert_eq!(chunk::parse_data(payload), Ok((4096, &[9u8; 60][..])));
    }

    #[test]
    fn extents_end_at_the_first_that_must_be_cut() {
        let extents = [(4096, 0), (1 << 33, 3), (4096, 0)];
        let extents = extents.map(|(len, flags)| chunk::Extent { len, flags });
        for (style, count) in [(Style::Structured, 2), (Style::Extended, 3)] {
            let mut out = Output::new();
            Replies::new(style).status(TAG, 1, &extents, true, &mut out);
            let payload = &out.filled()[Chunk::header_len(style)..];
            let (id, got) = chunk::parse_status(style, payload).unwrap();
            assert_eq!((id, got.len(), got[1].flags), (1, count, 3));
        }
    }
}
