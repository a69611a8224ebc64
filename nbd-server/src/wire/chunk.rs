//! Payloads of structured and extended answers.
//!
//! ```text
//! OFFSET_DATA       offset u64, data
//! OFFSET_HOLE       offset u64, length u32
//! BLOCK_STATUS      context u32, n × (length u32, flags u32)
//! BLOCK_STATUS_EXT  context u32, n u32, n × (length u64, flags u64)
//! ERROR             error u32, message length u16, message
//! ERROR_OFFSET      error u32, message length u16, message, offset u64
//! ```

use super::reply::Style;
use super::{Error, Put, Result, clip, string, u16_at, u32_at, u64_at};

/// Kinds of chunk.
pub mod kind {
    /// Nothing; the end of a reply that succeeded.
    pub const NONE: u16 = 0;
    /// Bytes at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeros at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents, 32 bits.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents, 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The request failed.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// Flags of an extent: of `base:allocation`, if nothing else is said.
pub mod state {
    /// Takes no space.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeros.
    pub const ZERO: u32 = 1 << 1;
    /// Of a dirty bitmap: written.
    pub const DIRTY: u32 = 1 << 0;
}

/// Bytes of [`kind::OFFSET_DATA`] before its data.
pub const DATA_HEADER: usize = 8;
/// Bytes of [`kind::OFFSET_HOLE`].
pub const HOLE_LEN: usize = 12;

/// The payload of a hole.
pub fn hole(offset: u64, len: u32) -> [u8; HOLE_LEN] {
    let mut b = [0; HOLE_LEN];
    b[..DATA_HEADER].copy_from_slice(&offset.to_be_bytes());
    b[DATA_HEADER..].copy_from_slice(&len.to_be_bytes());
    b
}

/// The offset and length in the payload of a hole.
pub fn parse_hole(payload: &[u8]) -> Result<(u64, u32)> {
    Ok((u64_at(payload, 0)?, u32_at(payload, DATA_HEADER)?))
}

/// The offset and bytes in the payload of data.
pub fn parse_data(payload: &[u8]) -> Result<(u64, &[u8])> {
    let offset = u64_at(payload, 0)?;
    match payload.get(DATA_HEADER..) {
        Some(data) if !data.is_empty() => Ok((offset, data)),
        _ => Err(Error::NeedMore(DATA_HEADER + 1)),
    }
}

/// One extent of a block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// Meaning set by the metadata context.
    pub flags: u32,
}

/// The longest extent that a compact chunk can name, kept to whole sectors.
pub const MAX_COMPACT_EXTENT: u64 = 0xffff_fe00;

/// Bytes of the payload of a status of `count` extents.
pub const fn status_len(style: Style, count: usize) -> usize {
    match style {
        Style::Simple | Style::Structured => 4 + 8 * count,
        Style::Extended => 8 + 16 * count,
    }
}

/// The kind of a status chunk.
pub const fn status_kind(style: Style) -> u16 {
    match style {
        Style::Simple | Style::Structured => kind::BLOCK_STATUS,
        Style::Extended => kind::BLOCK_STATUS_EXT,
    }
}

/// Appends the words before the extents of a status.
pub fn put_status_head(style: Style, context: u32, count: u32, out: &mut impl Put) {
    out.put(&context.to_be_bytes());
    if style == Style::Extended {
        out.put(&count.to_be_bytes());
    }
}

/// Appends one extent; in a compact status it is cut to [`MAX_COMPACT_EXTENT`].
pub fn put_extent(style: Style, extent: Extent, out: &mut impl Put) {
    if style == Style::Extended {
        out.put(&extent.len.to_be_bytes());
        out.put(&u64::from(extent.flags).to_be_bytes());
    } else {
        let len = extent.len.min(MAX_COMPACT_EXTENT) as u32;
        out.put(&len.to_be_bytes());
        out.put(&extent.flags.to_be_bytes());
    }
}

/// The context and extents in the payload of a status.
pub fn parse_status(style: Style, payload: &[u8]) -> Result<(u32, Vec<Extent>)> {
    let context = u32_at(payload, 0)?;
    let mut extents = Vec::new();
    if style == Style::Extended {
        let count = u32_at(payload, 4)? as usize;
        if payload.len() != status_len(style, count) {
            return Err(Error::Malformed(
                "a status has another length than its count says",
            ));
        }
        for e in payload[8..].chunks_exact(16) {
            extents.push(Extent {
                len: u64_at(e, 0)?,
                flags: u32_at(e, 12)?,
            });
        }
    } else {
        if payload.len() % 8 != 4 {
            return Err(Error::Malformed("a status does not end with an extent"));
        }
        for e in payload[4..].chunks_exact(8) {
            extents.push(Extent {
                len: u64::from(u32_at(e, 0)?),
                flags: u32_at(e, 4)?,
            });
        }
    }
    if extents.is_empty() || extents.iter().any(|e| e.len == 0) {
        return Err(Error::Malformed(
            "a status without extents, or with an empty one",
        ));
    }
    Ok((context, extents))
}

const AT_MESSAGE_LENGTH: usize = 4;
const AT_MESSAGE: usize = 6;
const OFFSET: usize = 8;

/// Bytes of the payload of an error.
pub fn error_len(message: &str, offset: Option<u64>) -> usize {
    AT_MESSAGE + clip(message).len() + if offset.is_some() { OFFSET } else { 0 }
}

/// Appends the payload of an error; with an offset it is of [`kind::ERROR_OFFSET`].
pub fn put_error(error: u32, message: &str, offset: Option<u64>, out: &mut impl Put) {
    let message = clip(message).as_bytes();
    out.put(&error.to_be_bytes());
    out.put(
        &u16::try_from(message.len())
            .unwrap_or(u16::MAX)
            .to_be_bytes(),
    );
    out.put(message);
    if let Some(offset) = offset {
        out.put(&offset.to_be_bytes());
    }
}

/// The error, message and (for [`kind::ERROR_OFFSET`]) offset in the payload of an error.
pub fn parse_error(payload: &[u8], with_offset: bool) -> Result<(u32, &str, Option<u64>)> {
    let error = u32_at(payload, 0)?;
    let end = AT_MESSAGE + usize::from(u16_at(payload, AT_MESSAGE_LENGTH)?);
    let message = string(payload.get(AT_MESSAGE..end).ok_or(Error::NeedMore(end))?)?;
    let offset = if with_offset {
        Some(u64_at(payload, end)?)
    } else {
        None
    };
    Ok((error, message, offset))
}

#[cfg(test)]
mod tests {
    use super::super::check_truncation;
    use super::*;

    #[test]
    fn hole_and_data_round_trip() {
        let payload = hole(1 << 33, 4096);
        assert_eq!(parse_hole(&payload), Ok((1 << 33, 4096)));
        check_truncation(&payload, parse_hole);
        let payload = [&7u64.to_be_bytes()[..], b"x"].concat();
        assert_eq!(parse_data(&payload), Ok((7, &b"x"[..])));
        check_truncation(&payload, parse_data);
    }

    #[test]
    fn status_round_trip() {
        let extents = [
            Extent {
                len: 4096,
                flags: 0,
            },
            Extent {
                len: 1 << 31,
                flags: 3,
            },
        ];
        for style in [Style::Structured, Style::Extended] {
            let mut out = Vec::new();
            put_status_head(style, 1, 2, &mut out);
            for e in extents {
                put_extent(style, e, &mut out);
            }
            assert_eq!(out.len(), status_len(style, 2));
            assert_eq!(parse_status(style, &out), Ok((1, extents.to_vec())));
            for cut in 0..out.len() {
                let cut_at_an_extent = style == Style::Structured && cut == 12;
                assert_eq!(
                    parse_status(style, &out[..cut]).is_ok(),
                    cut_at_an_extent,
                    "{cut}"
                );
            }
        }
    }

    #[test]
    fn a_long_extent_is_cut_in_a_compact_status_only() {
        let long = Extent {
            len: 1 << 40,
            flags: 0,
        };
        for (style, len) in [
            (Style::Structured, MAX_COMPACT_EXTENT),
            (Style::Extended, 1 << 40),
        ] {
            let mut out = Vec::new();
            put_status_head(style, 1, 1, &mut out);
            put_extent(style, long, &mut out);
            assert_eq!(
                parse_status(style, &out).unwrap().1,
                [Extent { len, flags: 0 }]
            );
        }
    }

    #[test]
    fn error_round_trip() {
        for offset in [None, Some(1u64 << 35)] {
            let mut out = Vec::new();
            put_error(28, "the host is full", offset, &mut out);
            assert_eq!(out.len(), error_len("the host is full", offset));
            let parse = |b: &[u8]| parse_error(b, offset.is_some()).map(|e| (e.0, e.2));
            assert_eq!(parse(&out), Ok((28, offset)));
            check_truncation(&out, parse);
        }
    }
}
