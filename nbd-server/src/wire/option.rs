//! What a client asks in the handshake.
//!
//! ```text
//! C: "IHAVEOPT" u64, option u32, length u32, data
//! INFO, GO:            name length u32, name, count u16, count × information u16
//! LIST/SET_META:       name length u32, name, count u32, count × (length u32, query)
//! ```
//!
//! The header is parsed from a stream, so a short one asks for more. The data is parsed when all of
//! it is there, so whatever does not fit its own length is malformed.

use super::greeting::OPTION_MAGIC;
use super::{Error, MAX_STRING, Put, Result, string, u16_at, u32_at, u64_at};

/// Option numbers.
pub mod kind {
    /// Choose an export and end the handshake, without any answer but data.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Withdrawn from the protocol.
    pub const PEEK_EXPORT: u32 = 4;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and end the handshake.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;

    /// The option's name, for logs.
    pub fn name(option: u32) -> &'static str {
        match option {
            EXPORT_NAME => "EXPORT_NAME",
            ABORT => "ABORT",
            LIST => "LIST",
            PEEK_EXPORT => "PEEK_EXPORT",
            STARTTLS => "STARTTLS",
            INFO => "INFO",
            GO => "GO",
            STRUCTURED_REPLY => "STRUCTURED_REPLY",
            LIST_META_CONTEXT => "LIST_META_CONTEXT",
            SET_META_CONTEXT => "SET_META_CONTEXT",
            EXTENDED_HEADERS => "EXTENDED_HEADERS",
            _ => "unknown",
        }
    }
}

/// Kinds of information in INFO and GO.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// The export's own name.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// The words before an option's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// [`kind`].
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl Header {
    const AT_OPTION: usize = 8;
    const AT_LENGTH: usize = 12;
    /// Bytes.
    pub const LEN: usize = 16;

    /// Reads a header from the start of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        if u64_at(bytes, 0)? != OPTION_MAGIC {
            return Err(Error::Malformed("an option does not start with IHAVEOPT"));
        }
        let option = u32_at(bytes, Self::AT_OPTION)?;
        Ok(Header {
            option,
            length: u32_at(bytes, Self::AT_LENGTH)?,
        })
    }

    /// Appends the header.
    pub fn emit(&self, out: &mut impl Put) {
        out.put(&OPTION_MAGIC.to_be_bytes());
        out.put(&self.option.to_be_bytes());
        out.put(&self.length.to_be_bytes());
    }
}

/// Appends an option whose data is `data`.
pub fn emit(option: u32, data: &[u8], out: &mut impl Put) {
    // A client of ours has no data of 4 GiB.
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    Header { option, length }.emit(out);
    out.put(data);
}

const LENGTH: usize = 4;

/// A length and that many bytes of string, then the rest. For data that is all there.
fn counted(data: &[u8]) -> Result<(&str, &[u8])> {
    let short = Error::Malformed("the data ends inside a string");
    let len = u32_at(data, 0).map_err(|_| short)?;
    let len = usize::try_from(len).map_err(|_| short)?;
    if len > MAX_STRING {
        return Err(Error::Malformed("a string is longer than 4096 bytes"));
    }
    let text = data.get(LENGTH..LENGTH + len).ok_or(short)?;
    Ok((string(text)?, &data[LENGTH + len..]))
}

fn put_counted(text: &str, out: &mut impl Put) {
    out.put(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.put(text.as_bytes());
}

/// The data of INFO and GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Which export; empty for the default one.
    pub name: &'a str,
    wanted: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    const COUNT: usize = 2;

    /// Reads the whole data of the option.
    pub fn parse(data: &'a [u8]) -> Result<InfoRequest<'a>> {
        let (name, rest) = counted(data)?;
        let count = u16_at(rest, 0).map_err(|_| Error::Malformed("the count is missing"))?;
        let wanted = &rest[Self::COUNT..];
        if wanted.len() != usize::from(count) * 2 {
            return Err(Error::Malformed(
                "the count of information requests is not their number",
            ));
        }
        Ok(InfoRequest { name, wanted })
    }

    /// True when information `kind` was asked for.
    pub fn wants(&self, kind: u16) -> bool {
        self.wanted.chunks_exact(2).any(|w| w == kind.to_be_bytes())
    }

    /// Appends the data of an option that asks for `wanted`.
    pub fn emit(name: &str, wanted: &[u16], out: &mut impl Put) {
        put_counted(name, out);
        out.put(
            &u16::try_from(wanted.len())
                .unwrap_or(u16::MAX)
                .to_be_bytes(),
        );
        for kind in wanted {
            out.put(&kind.to_be_bytes());
        }
    }
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// Which export.
    pub name: &'a str,
    queries: &'a [u8],
}

impl<'a> MetaRequest<'a> {
    const COUNT: usize = 4;

    /// Reads the whole data of the option, every query included.
    pub fn parse(data: &'a [u8]) -> Result<MetaRequest<'a>> {
        let (name, rest) = counted(data)?;
        let count = u32_at(rest, 0).map_err(|_| Error::Malformed("the count is missing"))?;
        let queries = &rest[Self::COUNT..];
        let mut left = queries;
        // Each turn takes at least four bytes or fails, so a claimed count costs nothing.
        for _ in 0..count {
            left = counted(left)?.1;
        }
        if !left.is_empty() {
            return Err(Error::Malformed("bytes are left after the last query"));
        }
        Ok(MetaRequest { name, queries })
    }

    /// The queries, in order.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut left = self.queries;
        std::iter::from_fn(move || {
            let (query, rest) = counted(left).ok()?;
            left = rest;
            Some(query)
        })
    }

    /// Appends the data of an option with these queries.
    pub fn emit(name: &str, queries: &[&str], out: &mut impl Put) {
        put_counted(name, out);
        out.put(
            &u32::try_from(queries.len())
                .unwrap_or(u32::MAX)
                .to_be_bytes(),
        );
        for query in queries {
            put_counted(query, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check_truncation;
    use super::*;

    #[test]
    fn header_round_trip() {
        let mut out = Vec::new();
        emit(kind::GO, b"xyz", &mut out);
        assert_eq!(
            Header::parse(&out),
            Ok(Header {
                option: 7,
                length: 3
            })
        );
        assert_eq!(&out[Header::LEN..], b"xyz");
        check_truncation(&out[..Header::LEN], Header::parse);
        out[0] = 0;
        assert!(matches!(Header::parse(&out), Err(Error::Malformed(_))));
    }

    #[test]
    fn info_round_trip_and_every_cut_is_malformed() {
        let mut data = Vec::new();
        InfoRequest::emit("disk", &[info::BLOCK_SIZE, 77], &mut data);
        let request = InfoRequest::parse(&data).unwrap();
        assert_eq!(request.name, "disk");
        assert!(request.wants(info::BLOCK_SIZE) && request.wants(77) && !request.wants(info::NAME));
        for cut in 0..data.len() {
            assert!(
                matches!(InfoRequest::parse(&data[..cut]), Err(Error::Malformed(_))),
                "{cut}"
            );
        }
        data.push(0);
        assert!(InfoRequest::parse(&data).is_err());
    }

    #[test]
    fn a_name_longer_than_the_data_is_malformed() {
        for claimed in [5u32, 4096, 4097, u32::MAX] {
            let mut data = claimed.to_be_bytes().to_vec();
            data.extend(b"disk\0\0");
            assert!(
                matches!(InfoRequest::parse(&data), Err(Error::Malformed(_))),
                "{claimed}"
            );
            assert!(
                matches!(MetaRequest::parse(&data), Err(Error::Malformed(_))),
                "{claimed}"
            );
        }
    }

    #[test]
    fn meta_round_trip_and_every_cut_is_malformed() {
        let mut data = Vec::new();
        MetaRequest::emit("", &["base:", "x-y:z"], &mut data);
        let request = MetaRequest::parse(&data).unwrap();
        assert_eq!(request.name, "");
        assert_eq!(request.queries().collect::<Vec<_>>(), ["base:", "x-y:z"]);
        for cut in 0..data.len() {
            assert!(
                matches!(MetaRequest::parse(&data[..cut]), Err(Error::Malformed(_))),
                "{cut}"
            );
        }
        data.push(0);
        assert!(MetaRequest::parse(&data).is_err());
    }
}
