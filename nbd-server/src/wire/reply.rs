//! Headers of the answers in transmission.
//!
//! ```text
//! simple      0x67446698 u32, error u32, cookie u64
//! structured  0x668e33ef u32, flags u16, kind u16, cookie u64, length u32
//! extended    0x6e8a278c u32, flags u16, kind u16, cookie u64, offset u64, length u64
//! ```

use super::{Error, Put, Result, u16_at, u32_at, u64_at};

/// Before a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// Before a structured chunk.
pub const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
/// Before an extended chunk.
pub const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

/// What was negotiated for headers and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies (simple ones where there is nothing to say).
    Structured,
    /// Extended requests and replies.
    Extended,
}

/// A simple reply's header; data of a READ follows when there was no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simple {
    /// 0 or an error number.
    pub error: u32,
    /// The cookie of the request.
    pub cookie: u64,
}

impl Simple {
    const AT_ERROR: usize = 4;
    const AT_COOKIE: usize = 8;
    /// Bytes.
    pub const LEN: usize = 16;

    /// Reads a reply from the start of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Simple> {
        if u32_at(bytes, 0)? != SIMPLE_MAGIC {
            return Err(Error::Malformed("not a simple reply"));
        }
        Ok(Simple {
            error: u32_at(bytes, Self::AT_ERROR)?,
            cookie: u64_at(bytes, Self::AT_COOKIE)?,
        })
    }

    /// The reply's bytes.
    pub fn bytes(&self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        b[..Self::AT_ERROR].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        b[Self::AT_ERROR..Self::AT_COOKIE].copy_from_slice(&self.error.to_be_bytes());
        b[Self::AT_COOKIE..].copy_from_slice(&self.cookie.to_be_bytes());
        b
    }
}

/// The flag of the last chunk of a reply.
pub const DONE: u16 = 1 << 0;

/// A structured or extended chunk's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// [`DONE`] or 0.
    pub flags: u16,
    /// [`super::chunk::kind`].
    pub kind: u16,
    /// The cookie of the request.
    pub cookie: u64,
    /// The offset of the request; 0 when read from a structured chunk, which has none.
    pub offset: u64,
    /// Bytes of payload that follow.
    pub length: u32,
}

impl Chunk {
    const AT_FLAGS: usize = 4;
    const AT_KIND: usize = 6;
    const AT_COOKIE: usize = 8;
    const AT_LENGTH: usize = 16;
    const AT_OFFSET: usize = 16;
    const AT_LENGTH_EXTENDED: usize = 24;
    /// Bytes of a structured header.
    pub const STRUCTURED: usize = 20;
    /// Bytes of an extended header.
    pub const EXTENDED: usize = 32;

    /// Bytes of a header; those of [`Style::Simple`] have no chunks and count as structured.
    pub const fn header_len(style: Style) -> usize {
        match style {
            Style::Simple | Style::Structured => Self::STRUCTURED,
            Style::Extended => Self::EXTENDED,
        }
    }

    /// Reads a header from the start of `bytes`, of whichever style it is.
    pub fn parse(bytes: &[u8]) -> Result<(Chunk, Style)> {
        let style = match u32_at(bytes, 0)? {
            STRUCTURED_MAGIC => Style::Structured,
            EXTENDED_MAGIC => Style::Extended,
            _ => return Err(Error::Malformed("not a reply chunk")),
        };
        let len = Self::header_len(style);
        let Some(b) = bytes.get(..len) else {
            return Err(Error::NeedMore(len));
        };
        let (offset, length) = match style {
            Style::Extended => {
                let length = u64_at(b, Self::AT_LENGTH_EXTENDED)?;
                (u64_at(b, Self::AT_OFFSET)?, u32::try_from(length).ok())
            }
            _ => (0, Some(u32_at(b, Self::AT_LENGTH)?)),
        };
        let length = length.ok_or(Error::Malformed("a chunk is longer than 4 GiB"))?;
        let (flags, kind) = (u16_at(b, Self::AT_FLAGS)?, u16_at(b, Self::AT_KIND)?);
        let chunk = Chunk {
            flags,
            kind,
            cookie: u64_at(b, Self::AT_COOKIE)?,
            offset,
            length,
        };
        Ok((chunk, style))
    }

    /// Writes the header over the first bytes of `to`, which holds at least
    /// [`Chunk::header_len`] of them.
    pub fn write(&self, style: Style, to: &mut [u8]) {
        let extended = style == Style::Extended;
        let magic = if extended {
            EXTENDED_MAGIC
        } else {
            STRUCTURED_MAGIC
        };
        to[..Self::AT_FLAGS].copy_from_slice(&magic.to_be_bytes());
        to[Self::AT_FLAGS..Self::AT_KIND].copy_from_slice(&self.flags.to_be_bytes());
        to[Self::AT_KIND..Self::AT_COOKIE].copy_from_slice(&self.kind.to_be_bytes());
        to[Self::AT_COOKIE..Self::AT_LENGTH].copy_from_slice(&self.cookie.to_be_bytes());
        if extended {
            let length = u64::from(self.length).to_be_bytes();
            let at = Self::AT_LENGTH_EXTENDED;
            to[Self::AT_OFFSET..at].copy_from_slice(&self.offset.to_be_bytes());
            to[at..Self::EXTENDED].copy_from_slice(&length);
        } else {
            to[Self::AT_LENGTH..Self::STRUCTURED].copy_from_slice(&self.length.to_be_bytes());
        }
    }

    /// Appends the header.
    pub fn emit(&self, style: Style, out: &mut impl Put) {
        let mut header = [0; Self::EXTENDED];
        self.write(style, &mut header);
        out.put(&header[..Self::header_len(style)]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::check_truncation;
    use super::*;

    #[test]
    fn simple_round_trip() {
        let reply = Simple {
            error: 5,
            cookie: 0x1122_3344_5566_7788,
        };
        let bytes = reply.bytes();
        assert_eq!(&bytes[..8], b"\x67\x44\x66\x98\0\0\0\x05");
        assert_eq!(Simple::parse(&bytes), Ok(reply));
        check_truncation(&bytes, Simple::parse);
        assert!(matches!(Simple::parse(&[0; 16]), Err(Error::Malformed(_))));
    }

    #[test]
    fn chunk_round_trip() {
        for (style, offset, len) in [(Style::Structured, 0, 20), (Style::Extended, 1 << 50, 32)] {
            let chunk = Chunk {
                flags: DONE,
                kind: 5,
                cookie: 99,
                offset,
                length: 12,
            };
            let mut out = Vec::new();
            chunk.emit(style, &mut out);
            assert_eq!(out.len(), len);
            assert_eq!(Chunk::parse(&out), Ok((chunk, style)));
            check_truncation(&out, Chunk::parse);
        }
        assert!(matches!(Chunk::parse(&[0; 32]), Err(Error::Malformed(_))));
    }

    #[test]
    fn a_chunk_of_more_than_four_gib_is_refused() {
        let mut out = Vec::new();
        Chunk {
            flags: 0,
            kind: 1,
            cookie: 0,
            offset: 0,
            length: 1,
        }
        .emit(Style::Extended, &mut out);
        out[24] = 1;
        assert!(matches!(Chunk::parse(&out), Err(Error::Malformed(_))));
    }
}
