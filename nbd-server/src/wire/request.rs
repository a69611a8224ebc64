//! What a client asks in transmission.
//!
//! ```text
//! compact   0x25609513 u32, flags u16, kind u16, cookie u64, offset u64, length u32
//! extended  0x21e41c71 u32, flags u16, kind u16, cookie u64, offset u64, length u64
//! ```
//!
//! Payload follows a compact WRITE, and every extended request with the `PAYLOAD_LEN` flag.

use super::reply::Style;
use super::{Error, Put, Result, u16_at, u32_at, u64_at};

/// Before a compact request.
pub const MAGIC: u32 = 0x2560_9513;
/// Before an extended request.
pub const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// Command numbers.
pub mod kind {
    /// Read a range.
    pub const READ: u16 = 0;
    /// Write the payload.
    pub const WRITE: u16 = 1;
    /// End the session; not answered.
    pub const DISC: u16 = 2;
    /// Make everything answered durable.
    pub const FLUSH: u16 = 3;
    /// Give space back.
    pub const TRIM: u16 = 4;
    /// Prepare for reading.
    pub const CACHE: u16 = 5;
    /// Make a range read as zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod flag {
    /// Durable before the answer.
    pub const FUA: u16 = 1 << 0;
    /// Keep the space (`WRITE_ZEROES`).
    pub const NO_HOLE: u16 = 1 << 1;
    /// One content chunk (READ).
    pub const DF: u16 = 1 << 2;
    /// One extent (`BLOCK_STATUS`).
    pub const REQ_ONE: u16 = 1 << 3;
    /// Refuse rather than be slow (`WRITE_ZEROES`).
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is of a payload that follows (extended only).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// [`flag`]s.
    pub flags: u16,
    /// [`kind`].
    pub kind: u16,
    /// The client's own mark, repeated in every reply.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes of the range, or of the payload.
    pub length: u64,
}

const AT_FLAGS: usize = 4;
const AT_KIND: usize = 6;
const AT_COOKIE: usize = 8;
const AT_OFFSET: usize = 16;
const AT_LENGTH: usize = 24;

impl Request {
    /// Bytes of a compact header.
    pub const COMPACT: usize = 28;
    /// Bytes of an extended header.
    pub const EXTENDED: usize = 32;

    /// Bytes of a header in a session of that style.
    pub const fn header_len(style: Style) -> usize {
        match style {
            Style::Simple | Style::Structured => Self::COMPACT,
            Style::Extended => Self::EXTENDED,
        }
    }

    const fn magic(style: Style) -> u32 {
        match style {
            Style::Simple | Style::Structured => MAGIC,
            Style::Extended => EXTENDED_MAGIC,
        }
    }

    /// Reads a header from the start of `bytes`.
    #[inline]
    pub fn parse(bytes: &[u8], style: Style) -> Result<Request> {
        let len = Self::header_len(style);
        if u32_at(bytes, 0).map_err(|_| Error::NeedMore(len))? != Self::magic(style) {
            return Err(Error::Malformed(
                "a request does not start with its magic number",
            ));
        }
        let Some(header) = bytes.get(..len) else {
            return Err(Error::NeedMore(len));
        };
        Ok(Request {
            flags: u16_at(header, AT_FLAGS)?,
            kind: u16_at(header, AT_KIND)?,
            cookie: u64_at(header, AT_COOKIE)?,
            offset: u64_at(header, AT_OFFSET)?,
            length: match style {
                Style::Simple | Style::Structured => u64::from(u32_at(header, AT_LENGTH)?),
                Style::Extended => u64_at(header, AT_LENGTH)?,
            },
        })
    }

    /// Appends the header. In a compact one, a length past 32 bits is cut to them.
    pub fn emit(&self, style: Style, out: &mut impl Put) {
        let mut header = [0; Self::EXTENDED];
        header[..AT_FLAGS].copy_from_slice(&Self::magic(style).to_be_bytes());
        header[AT_FLAGS..AT_KIND].copy_from_slice(&self.flags.to_be_bytes());
        header[AT_KIND..AT_COOKIE].copy_from_slice(&self.kind.to_be_bytes());
        header[AT_COOKIE..AT_OFFSET].copy_from_slice(&self.cookie.to_be_bytes());
        header[AT_OFFSET..AT_LENGTH].copy_from_slice(&self.offset.to_be_bytes());
        if style == Style::Extended {
            header[AT_LENGTH..].copy_from_slice(&self.length.to_be_bytes());
        } else {
            let low = self.length as u32;
            header[AT_LENGTH..Self::COMPACT].copy_from_slice(&low.to_be_bytes());
        }
        out.put(&header[..Self::header_len(style)]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::check_truncation;
    use super::*;

    #[test]
    fn round_trip_and_truncation() {
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            let request = Request {
                flags: flag::FUA | flag::NO_HOLE,
                kind: kind::WRITE_ZEROES,
                cookie: 0x0102_0304_0506_0708,
                offset: 1 << 40,
                length: if style == Style::Extended {
                    1 << 41
                } else {
                    1 << 31
                },
            };
            let mut out = Vec::new();
            request.emit(style, &mut out);
            assert_eq!(out.len(), Request::header_len(style));
            assert_eq!(Request::parse(&out, style), Ok(request));
            check_truncation(&out, |b| Request::parse(b, style));
        }
    }

    #[test]
    fn bytes_of_the_protocol() {
        let request = Request {
            flags: 1,
            kind: 1,
            cookie: 7,
            offset: 512,
            length: 4096,
        };
        let mut out = Vec::new();
        request.emit(Style::Simple, &mut out);
        let expect = b"\x25\x60\x95\x13\0\x01\0\x01\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x02\0\0\0\x10\0";
        assert_eq!(out, expect);
    }

    #[test]
    fn the_other_magic_is_refused_at_once() {
        let wrong = EXTENDED_MAGIC.to_be_bytes();
        assert!(matches!(
            Request::parse(&wrong, Style::Structured),
            Err(Error::Malformed(_))
        ));
        let wrong = MAGIC.to_be_bytes();
        assert!(matches!(
            Request::parse(&wrong, Style::Extended),
            Err(Error::Malformed(_))
        ));
    }
}
