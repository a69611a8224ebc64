//! The first words of both sides, and the old end of the handshake.
//!
//! ```text
//! S: "NBDMAGIC" u64, "IHAVEOPT" u64, handshake flags u16
//! C: client flags u32
//! …options…
//! S: size u64, transmission flags u16, 124 zeros unless NO_ZEROES    (EXPORT_NAME only)
//! ```

use super::{Error, Put, Result, u16_at, u32_at, u64_at};

/// "NBDMAGIC".
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": in the greeting, and before every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Zeros after the answer to `EXPORT_NAME`.
pub const ZEROES: usize = 124;

/// Handshake flags of the server; the client's flags have the same bits.
pub mod handshake_flag {
    /// Options are answered one by one.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The zeros after the answer to `EXPORT_NAME` can be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags: what an export can do.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Every change is refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` and its `NO_HOLE` are understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag of READ is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// Connections to one export see each other's writes and flushes.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The `FAST_ZERO` flag of `WRITE_ZEROES` is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// The server's first message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// [`handshake_flag`]s.
    pub flags: u16,
}

impl Greeting {
    const AT_OPTION_MAGIC: usize = 8;
    const AT_FLAGS: usize = 16;
    /// Bytes.
    pub const LEN: usize = 18;

    /// Reads a greeting from the start of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Greeting> {
        if u64_at(bytes, 0)? != INIT_MAGIC || u64_at(bytes, Self::AT_OPTION_MAGIC)? != OPTION_MAGIC
        {
            return Err(Error::Malformed("not an NBD newstyle greeting"));
        }
        Ok(Greeting {
            flags: u16_at(bytes, Self::AT_FLAGS)?,
        })
    }

    /// Appends the greeting.
    pub fn emit(&self, out: &mut impl Put) {
        out.put(&INIT_MAGIC.to_be_bytes());
        out.put(&OPTION_MAGIC.to_be_bytes());
        out.put(&self.flags.to_be_bytes());
    }
}

/// The client's first message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags(pub u32);

impl ClientFlags {
    /// Bytes.
    pub const LEN: usize = 4;

    /// Reads the flags from the start of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<ClientFlags> {
        u32_at(bytes, 0).map(ClientFlags)
    }

    /// Appends the flags.
    pub fn emit(&self, out: &mut impl Put) {
        out.put(&self.0.to_be_bytes());
    }

    /// True when the client understands answers to its options.
    pub fn fixed_newstyle(self) -> bool {
        self.0 & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0
    }

    /// True when the zeros are to be left out.
    pub fn no_zeroes(self) -> bool {
        self.0 & u32::from(handshake_flag::NO_ZEROES) != 0
    }

    /// Flags that no server of ours offered.
    pub fn unknown(self) -> u32 {
        self.0 & !u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES)
    }
}

/// The answer to `EXPORT_NAME`: the handshake is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportReply {
    /// Bytes of the export.
    pub size: u64,
    /// [`transmission_flag`]s.
    pub flags: u16,
}

impl ExportReply {
    const AT_FLAGS: usize = 8;
    const AT_ZEROES: usize = 10;

    /// Reads the answer; `zeroes` says whether the zeros follow.
    pub fn parse(bytes: &[u8], zeroes: bool) -> Result<ExportReply> {
        let (size, flags) = (u64_at(bytes, 0)?, u16_at(bytes, Self::AT_FLAGS)?);
        let len = Self::AT_ZEROES + if zeroes { ZEROES } else { 0 };
        if bytes.len() < len {
            return Err(Error::NeedMore(len));
        }
        Ok(ExportReply { size, flags })
    }

    /// Appends the answer.
    pub fn emit(&self, zeroes: bool, out: &mut impl Put) {
        out.put(&self.size.to_be_bytes());
        out.put(&self.flags.to_be_bytes());
        if zeroes {
            out.put(&[0; ZEROES]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check_truncation;
    use super::*;

    #[test]
    fn greeting_has_the_bytes_of_the_protocol() {
        let mut out = Vec::new();
        Greeting { flags: 3 }.emit(&mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(Greeting::parse(&out), Ok(Greeting { flags: 3 }));
        assert_eq!(out.len(), Greeting::LEN);
        check_truncation(&out, Greeting::parse);
        out[9] ^= 1;
        assert!(matches!(Greeting::parse(&out), Err(Error::Malformed(_))));
    }

    #[test]
    fn client_flags_name_what_is_unknown() {
        let mut out = Vec::new();
        ClientFlags(0x8000_0003).emit(&mut out);
        check_truncation(&out, ClientFlags::parse);
        let flags = ClientFlags::parse(&out).unwrap();
        assert!(flags.fixed_newstyle() && flags.no_zeroes());
        assert_eq!(flags.unknown(), 0x8000_0000);
    }

    #[test]
    fn export_reply_with_and_without_zeros() {
        let reply = ExportReply {
            size: 1 << 40,
            flags: 0x155,
        };
        for (zeroes, len) in [(true, 134), (false, 10)] {
            let mut out = Vec::new();
            reply.emit(zeroes, &mut out);
            assert_eq!(out.len(), len);
            assert_eq!(ExportReply::parse(&out, zeroes), Ok(reply));
            check_truncation(&out, |b| ExportReply::parse(b, zeroes));
        }
    }
}
