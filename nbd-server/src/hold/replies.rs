//! The server's answers, judged before the client sees a byte of them.
//!
//! A reply is passed on when all of it is there. One that a dying server began is thrown away and
//! asked for again as a whole: what the client reads is one server's answer, never half of each, and
//! no chunk, error or end of a reply has to be mended. It costs a read's length of memory, which
//! was charged when the read was taken.
//!
//! | what comes | |
//! |---|---|
//! | the answer of nothing that was asked, or of another style | a violation |
//! | data or holes outside of the read, twice, or too few at its end | a violation |
//! | a status of a context that was not agreed on, or on another command | a violation |
//! | a reply that is longer than what it can say | a violation |
//! | an error, of any kind | passed on; `ESHUTDOWN` is no answer |

use std::ops::Range;

use bytes::{Buf, BytesMut};

use crate::hold::outbox::{LARGE, Outbox};
use crate::hold::spans::Spans;
use crate::wire::chunk::{self, kind as chunk_kind};
use crate::wire::reply::{Chunk, DONE, SIMPLE_MAGIC, Simple, Style};
use crate::wire::request::kind;
use crate::wire::{Error, MAX_STRING, Put};

/// Longest status of one context that is taken, in bytes: 128 Ki extents.
pub(super) const MAX_STATUS: u32 = (2 << 20) + 64;
/// Longest error: two numbers, an offset and the text.
const MAX_ERROR: u32 = 4 + 2 + 8 + MAX_STRING as u32;
/// What the chunks of a reply may take beside their data and as much again for their headers.
const MAX_OVERHEAD: usize = 64 << 10;

/// Where the cookie stands in every header.
const COOKIE: Range<usize> = 8..16;

/// What was asked, as far as the answer must fit it, and what of the answer is there.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) kind: u16,
    pub(super) range: Range<u64>,
    /// The client's cookie.
    pub(super) cookie: u64,
    gathered: BytesMut,
    seen: Spans,
    bytes: u64,
    error: u32,
}

impl Asked {
    pub(super) fn new(kind: u16, range: Range<u64>, cookie: u64) -> Asked {
        Asked {
            kind,
            range,
            cookie,
            gathered: BytesMut::new(),
            seen: Spans::default(),
            bytes: 0,
            error: 0,
        }
    }

    /// Forgets what is there of an answer.
    pub(super) fn forget(&mut self) {
        *self = Asked::new(self.kind, self.range.clone(), self.cookie);
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// A part of what was read.
    fn content(&mut self, offset: u64, len: u64) -> Result<(), &'static str> {
        let end = offset.checked_add(len).filter(|&end| end <= self.range.end);
        let part = match end {
            Some(end) if offset >= self.range.start && len > 0 => offset..end,
            _ => return Err("data that was not asked for"),
        };
        if !self.seen.add(&part) {
            return Err("the same data twice");
        }
        self.bytes += len;
        Ok(())
    }
}

/// What stands at the start of a server's bytes.
#[derive(Debug)]
pub(super) enum Next {
    /// Nothing whole; at least this many bytes are needed.
    NeedMore(usize),
    /// A part of the answer to `cookie`, in the first `len` bytes.
    Piece(Piece),
}

/// A simple reply or a chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) cookie: u64,
    header: Chunk,
    simple: bool,
    len: usize,
}

/// The next piece of a session in `style`. `asked` finds what a cookie asked.
pub(super) fn next<'a>(
    input: &[u8],
    style: Style,
    asked: impl FnOnce(u64) -> Option<&'a Asked>,
) -> Result<Next, &'static str> {
    let Some(magic) = input.first_chunk::<4>() else {
        return Ok(Next::NeedMore(Simple::LEN));
    };
    let unknown = "an answer to nothing that was asked";
    if u32::from_be_bytes(*magic) == SIMPLE_MAGIC {
        let simple = match Simple::parse(input) {
            Ok(simple) => simple,
            Err(_) => return Ok(Next::NeedMore(Simple::LEN)),
        };
        let asked = asked(simple.cookie).ok_or(unknown)?;
        let is_read = asked.kind == kind::READ;
        let is_status = asked.kind == kind::BLOCK_STATUS && simple.error == 0;
        if style == Style::Extended || (style == Style::Structured && (is_read || is_status)) {
            return Err("a simple reply where chunks were agreed on");
        }
        let data = match is_read && simple.error == 0 {
            true => asked.len() as usize,
            false => 0,
        };
        let header = Chunk {
            flags: DONE,
            kind: chunk_kind::NONE,
            cookie: simple.cookie,
            offset: 0,
            length: simple.error,
        };
        return Ok(whole(input, header, true, Simple::LEN + data));
    }
    let (header, found) = match Chunk::parse(input) {
        Ok(parsed) => parsed,
        Err(Error::NeedMore(n)) => return Ok(Next::NeedMore(n)),
        Err(Error::Malformed(why)) => return Err(why),
    };
    if style == Style::Simple || found != style {
        return Err("a chunk of a style that was not agreed on");
    }
    let asked = asked(header.cookie).ok_or(unknown)?;
    let head = Chunk::header_len(style);
    let longest = match header.kind {
        chunk_kind::NONE => 0,
        chunk_kind::OFFSET_DATA if asked.kind == kind::READ => {
            let most = asked.len() + chunk::DATA_HEADER as u64;
            u32::try_from(most).unwrap_or(u32::MAX)
        }
        chunk_kind::OFFSET_HOLE if asked.kind == kind::READ => chunk::HOLE_LEN as u32,
        k if k == chunk::status_kind(style) && asked.kind == kind::BLOCK_STATUS => MAX_STATUS,
        k if k & 1 << 15 != 0 => MAX_ERROR,
        _ => return Err("a chunk that does not answer what was asked"),
    };
    if header.length > longest {
        return Err("a chunk is longer than what it can say");
    }
    Ok(whole(input, header, false, head + header.length as usize))
}

fn whole(input: &[u8], header: Chunk, simple: bool, len: usize) -> Next {
    match input.len() < len {
        true => Next::NeedMore(len),
        false => Next::Piece(Piece {
            cookie: header.cookie,
            header,
            simple,
            len,
        }),
    }
}

impl Piece {
    /// Takes the piece from the start of `input`. At the end of the answer: its error number, and
    /// all of it is put into `out`, if there is one. `ids`: contexts as the server and as the client
    /// number them. What it appends to the answer for the client is what came, but for the cookie
    /// and these numbers.
    pub(super) fn take(
        &self,
        input: &mut BytesMut,
        style: Style,
        asked: &mut Asked,
        ids: &[(u32, u32)],
        out: Option<&mut Outbox>,
    ) -> Result<Option<u32>, &'static str> {
        let bytes = &mut input[..self.len];
        if let Some(cookie) = bytes.get_mut(COOKIE) {
            cookie.copy_from_slice(&asked.cookie.to_be_bytes());
        }
        match self.simple {
            true => {
                asked.error = self.header.length;
                asked.bytes = asked.len();
            }
            false => self.judge(bytes, style, asked, ids)?,
        }
        let done = self.header.flags & DONE != 0;
        if !done {
            let data = match asked.kind {
                kind::READ => 2 * asked.len() as usize,
                kind::BLOCK_STATUS => MAX_STATUS as usize * ids.len(),
                _ => 0,
            };
            let room = MAX_OVERHEAD.saturating_add(data);
            if asked.gathered.len() + self.len > room {
                return Err("a reply is longer than what it can say");
            }
            asked.gathered.extend_from_slice(bytes);
            input.advance(self.len);
            return Ok(None);
        }
        if asked.kind == kind::READ && asked.error == 0 && asked.bytes != asked.len() {
            return Err("a read was answered in part");
        }
        match out {
            Some(out) if asked.error != crate::wire::errno::ESHUTDOWN => {
                if !asked.gathered.is_empty() {
                    out.pass(&asked.gathered.split().freeze());
                }
                if self.len < LARGE {
                    out.put(&input[..self.len]);
                    input.advance(self.len);
                } else {
                    out.pass(&input.split_to(self.len).freeze());
                }
            }
            _ => input.advance(self.len),
        }
        Ok(Some(asked.error))
    }

    fn judge(
        &self,
        bytes: &mut [u8],
        style: Style,
        asked: &mut Asked,
        ids: &[(u32, u32)],
    ) -> Result<(), &'static str> {
        let malformed = |_| "a chunk that its kind does not allow";
        let payload = &mut bytes[Chunk::header_len(style)..];
        let k = self.header.kind;
        match k {
            chunk_kind::NONE if self.header.flags & DONE == 0 => {
                return Err("an empty chunk that ends nothing");
            }
            chunk_kind::NONE => {}
            chunk_kind::OFFSET_DATA => {
                let (offset, data) = chunk::parse_data(payload).map_err(malformed)?;
                asked.content(offset, data.len() as u64)?;
            }
            chunk_kind::OFFSET_HOLE => {
                let (offset, len) = chunk::parse_hole(payload).map_err(malformed)?;
                if payload.len() != chunk::HOLE_LEN {
                    return Err("a hole of another length");
                }
                asked.content(offset, len.into())?;
            }
            k if k == chunk::status_kind(style) => {
                let (id, _) = chunk::parse_status(style, payload).map_err(malformed)?;
                let known = ids.iter().find(|(server, _)| *server == id);
                let (_, client) = known.ok_or("a status of a context that was not agreed on")?;
                payload[..4].copy_from_slice(&client.to_be_bytes());
            }
            _ => {
                let with_offset = k == chunk_kind::ERROR_OFFSET;
                let (error, _, _) = chunk::parse_error(payload, with_offset).map_err(malformed)?;
                if error == 0 {
                    return Err("an error without a number");
                }
                asked.error = error;
            }
        }
        Ok(())
    }
}

/// Appends the holder's own answer to a request: an error.
pub(super) fn refuse(
    style: Style,
    cookie: u64,
    offset: u64,
    error: u32,
    text: &str,
    out: &mut Outbox,
) {
    if style == Style::Simple {
        return out.put(&Simple { error, cookie }.bytes());
    }
    let length = u32::try_from(chunk::error_len(text, None)).unwrap_or(u32::MAX);
    let header = Chunk {
        flags: DONE,
        kind: chunk_kind::ERROR,
        cookie,
        offset,
        length,
    };
    header.emit(style, out);
    chunk::put_error(error, text, None, out);
}
