//! NBD's bytes and nothing else: one file per message family, no I/O, no state, no policy.
//!
//! Every message can be parsed and emitted, whichever side sends it: the server needs one half, and
//! whoever drives it without a socket (crash tests, fuzzers) needs the other. All numbers are
//! big-endian. Parsing borrows from its input, and never panics, whatever the bytes.
//!
//! | file | message |
//! |---|---|
//! | [`greeting`] | the first words of both sides, and the old end of the handshake |
//! | [`option`] | what a client asks in the handshake |
//! | [`option_reply`] | what the server answers there |
//! | [`request`] | what a client asks in transmission, compact or extended |
//! | [`reply`] | headers of the answers: simple, structured, extended |
//! | [`chunk`] | payloads of structured and extended answers |

pub mod chunk;
pub mod greeting;
pub mod option;
pub mod option_reply;
pub mod reply;
pub mod request;

/// Longest string (name, description, query, message) that the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The message is longer than the input: at least this many bytes in all.
    NeedMore(usize),
    /// More bytes would not help; says what is wrong.
    Malformed(&'static str),
}

/// `Result` with this module's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Where messages are appended to.
pub trait Put {
    /// Appends `bytes`.
    fn put(&mut self, bytes: &[u8]);
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// The error numbers that may stand in a reply.
pub mod errno {
    /// Operation not permitted: a change of a read-only export.
    pub const EPERM: u32 = 1;
    /// Input/output error.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// The request makes no sense.
    pub const EINVAL: u32 = 22;
    /// No space, or a write past the end.
    pub const ENOSPC: u32 = 28;
    /// Too long for what was asked.
    pub const EOVERFLOW: u32 = 75;
    /// Not to be had fast (`FAST_ZERO` only).
    pub const ENOTSUP: u32 = 95;
    /// The server is going down.
    pub const ESHUTDOWN: u32 = 108;
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let end = at.saturating_add(N);
    let found = bytes.get(at..end).and_then(|b| b.try_into().ok());
    found.ok_or(Error::NeedMore(end))
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    array_at(bytes, at).map(u16::from_be_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    array_at(bytes, at).map(u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    array_at(bytes, at).map(u64::from_be_bytes)
}

/// A string as the protocol means it: UTF-8, no NUL, at most [`MAX_STRING`] bytes.
pub fn string(bytes: &[u8]) -> Result<&str> {
    if bytes.len() > MAX_STRING {
        return Err(Error::Malformed("a string is longer than 4096 bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Error::Malformed("a string is not UTF-8"))?;
    if text.contains('\0') {
        return Err(Error::Malformed("a string contains NUL"));
    }
    Ok(text)
}

/// The longest beginning of `text` that the protocol allows as a string.
pub fn clip(text: &str) -> &str {
    let mut end = text.find('\0').unwrap_or(text.len()).min(MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Checks that every proper prefix of `whole` asks for more, without panic.
#[cfg(test)]
fn check_truncation<'a, T: std::fmt::Debug>(
    whole: &'a [u8],
    parse: impl Fn(&'a [u8]) -> Result<T>,
) {
    assert!(parse(whole).is_ok(), "{:?}", parse(whole));
    for cut in 0..whole.len() {
        match parse(&whole[..cut]) {
            Err(Error::NeedMore(n)) => assert!(n > cut && n <= whole.len(), "{cut}: {n}"),
            other => panic!("{cut} of {} bytes: {other:?}", whole.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_bounded_utf8_without_nul() {
        assert_eq!(string(b"disk"), Ok("disk"));
        assert_eq!(string(&[b'a'; MAX_STRING]).map(str::len), Ok(MAX_STRING));
        assert!(string(&[b'a'; MAX_STRING + 1]).is_err());
        assert!(string(b"a\0b").is_err());
        assert!(string(&[0xff, 0xfe]).is_err());
    }

    #[test]
    fn clipping_keeps_characters_whole() {
        assert_eq!(clip("short"), "short");
        assert_eq!(clip("be\0fore"), "be");
        let long = "é".repeat(MAX_STRING);
        assert_eq!(clip(&long).len(), MAX_STRING);
        let odd = format!("x{long}");
        assert_eq!(clip(&odd).len(), MAX_STRING - 1);
        assert!(string(clip(&odd).as_bytes()).is_ok());
    }
}
