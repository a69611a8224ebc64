//! What the server answers in the handshake.
//!
//! ```text
//! S: 0x3e889045565a9 u64, option u32, kind u32, length u32, data
//! SERVER:       name length u32, name, description
//! INFO:         information u16, then its own data
//! META_CONTEXT: id u32, name
//! errors:       a message for people
//! ```

use super::option::info;
use super::{Error, Put, Result, clip, u32_at, u64_at};

/// Before every answer.
pub const MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Kinds of answer.
pub mod kind {
    const ERROR: u32 = 1 << 31;
    /// Accepted, or the end of a list.
    pub const ACK: u32 = 1;
    /// One export.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// The option is known and not allowed.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option's data makes no sense.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    /// Extended headers are in use and cannot be taken back.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;

    /// True for every error.
    pub fn is_error(kind: u32) -> bool {
        kind & ERROR != 0
    }
}

/// The words before an answer's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The option that is answered.
    pub option: u32,
    /// [`kind`].
    pub kind: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl Header {
    const AT_OPTION: usize = 8;
    const AT_KIND: usize = 12;
    const AT_LENGTH: usize = 16;
    /// Bytes.
    pub const LEN: usize = 20;

    /// Reads a header from the start of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        if u64_at(bytes, 0)? != MAGIC {
            return Err(Error::Malformed("not an answer to an option"));
        }
        let option = u32_at(bytes, Self::AT_OPTION)?;
        let kind = u32_at(bytes, Self::AT_KIND)?;
        Ok(Header {
            option,
            kind,
            length: u32_at(bytes, Self::AT_LENGTH)?,
        })
    }

    /// Appends the header.
    pub fn emit(&self, out: &mut impl Put) {
        out.put(&MAGIC.to_be_bytes());
        out.put(&self.option.to_be_bytes());
        out.put(&self.kind.to_be_bytes());
        out.put(&self.length.to_be_bytes());
    }
}

/// Appends one answer whose data is `parts`, joined.
fn emit(option: u32, kind: u32, parts: &[&[u8]], out: &mut impl Put) {
    // Every string is clipped to 4096 bytes, so the sum is small.
    let length = parts.iter().map(|p| p.len()).sum::<usize>();
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    Header {
        option,
        kind,
        length,
    }
    .emit(out);
    for part in parts {
        out.put(part);
    }
}

/// Appends an `ACK`.
pub fn ack(option: u32, out: &mut impl Put) {
    emit(option, kind::ACK, &[], out);
}

/// Appends an error with a message for people, clipped to what the protocol allows.
pub fn error(option: u32, kind: u32, text: &str, out: &mut impl Put) {
    emit(option, kind, &[clip(text).as_bytes()], out);
}

/// Appends one entry of the list of exports.
pub fn server(option: u32, name: &str, description: &str, out: &mut impl Put) {
    let (name, description) = (clip(name).as_bytes(), clip(description).as_bytes());
    let len = u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes();
    emit(option, kind::SERVER, &[&len, name, description], out);
}

/// Appends the size and transmission flags of an export.
pub fn info_export(option: u32, size: u64, flags: u16, out: &mut impl Put) {
    let kind = info::EXPORT.to_be_bytes();
    emit(
        option,
        kind::INFO,
        &[&kind, &size.to_be_bytes(), &flags.to_be_bytes()],
        out,
    );
}

/// Appends a text about an export: `what` is [`info::NAME`] or [`info::DESCRIPTION`].
pub fn info_text(option: u32, what: u16, text: &str, out: &mut impl Put) {
    emit(
        option,
        kind::INFO,
        &[&what.to_be_bytes(), clip(text).as_bytes()],
        out,
    );
}

/// Smallest, preferred and largest request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Smallest length and alignment.
    pub minimum: u32,
    /// Length and alignment that need no read before a write.
    pub preferred: u32,
    /// Longest payload.
    pub maximum: u32,
}

/// Appends the block sizes of an export.
pub fn info_block_size(option: u32, sizes: BlockSize, out: &mut impl Put) {
    let kind = info::BLOCK_SIZE.to_be_bytes();
    let (min, preferred) = (sizes.minimum.to_be_bytes(), sizes.preferred.to_be_bytes());
    let parts: [&[u8]; 4] = [&kind, &min, &preferred, &sizes.maximum.to_be_bytes()];
    emit(option, kind::INFO, &parts, out);
}

/// Appends one metadata context.
pub fn meta_context(option: u32, id: u32, name: &str, out: &mut impl Put) {
    emit(
        option,
        kind::META_CONTEXT,
        &[&id.to_be_bytes(), clip(name).as_bytes()],
        out,
    );
}

/// One whole answer at the start of `bytes`: its header, its data, and the bytes of both.
pub fn parse(bytes: &[u8]) -> Result<(Header, &[u8], usize)> {
    let header = Header::parse(bytes)?;
    let end = Header::LEN.saturating_add(header.length as usize);
    let data = bytes.get(Header::LEN..end).ok_or(Error::NeedMore(end))?;
    Ok((header, data, end))
}

#[cfg(test)]
mod tests {
    use super::super::check_truncation;
    use super::*;

    fn check(expect_kind: u32, expect: &[u8], make: impl Fn(&mut Vec<u8>)) {
        let mut out = Vec::new();
        make(&mut out);
        let (header, data, end) = parse(&out).unwrap();
        assert_eq!(
            (header.option, header.kind, end),
            (7, expect_kind, out.len())
        );
        assert_eq!(data, expect);
        check_truncation(&out, parse);
    }

    #[test]
    fn every_answer_has_the_bytes_of_the_protocol() {
        check(kind::ACK, b"", |o| ack(7, o));
        check(kind::ERR_UNKNOWN, b"no such", |o| {
            error(7, kind::ERR_UNKNOWN, "no such", o)
        });
        check(kind::SERVER, b"\0\0\0\x02abtext", |o| {
            server(7, "ab", "text", o)
        });
        check(kind::INFO, &[0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 1], |o| {
            info_export(7, 512, 257, o)
        });
        check(kind::INFO, b"\0\x01name", |o| {
            info_text(7, info::NAME, "name", o)
        });
        check(kind::META_CONTEXT, b"\0\0\0\x01base:allocation", |o| {
            meta_context(7, 1, "base:allocation", o);
        });
        let sizes = BlockSize {
            minimum: 1,
            preferred: 4096,
            maximum: 1 << 25,
        };
        let expect = [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0];
        check(kind::INFO, &expect, |o| info_block_size(7, sizes, o));
    }

    #[test]
    fn a_long_message_is_clipped() {
        let mut out = Vec::new();
        error(7, kind::ERR_POLICY, &"x".repeat(10_000), &mut out);
        assert_eq!(parse(&out).unwrap().1.len(), 4096);
        assert!(kind::is_error(kind::ERR_POLICY) && !kind::is_error(kind::INFO));
    }
}
