//! Transmission: from a client's bytes to commands that make sense.
//!
//! A request is judged by its header alone, before any of its payload is waited for:
//!
//! | what | answer |
//! |---|---|
//! | wrong magic number | the session ends: the stream cannot be understood any more |
//! | unknown command or flag, flag not of this command | `EINVAL` |
//! | change of a read-only export | `EPERM` |
//! | READ, TRIM, CACHE, `BLOCK_STATUS` past the end | `EINVAL` |
//! | WRITE, `WRITE_ZEROES` past the end | `ENOSPC` |
//! | READ longer than [`MAX_PAYLOAD`] | `EOVERFLOW` |
//! | compact WRITE up to [`MAX_DISCARD`] | payload thrown away, `EINVAL` |
//! | compact WRITE longer than that, extended payload past [`MAX_PAYLOAD`] | the session ends |
//!
//! The end is where the client was told that it is, or behind that, where the export has grown since.
//! The payload of a refused request is thrown away as it comes, never gathered.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use ploop::device::{Device, ZeroMode};

use crate::session::context::Context;
use crate::session::replies::Tag;
use crate::session::{MAX_DISCARD, MAX_PAYLOAD, Negotiated};
use crate::wire::reply::Style;
use crate::wire::request::{Request, flag, kind};
use crate::wire::{self, errno};

/// What a command does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reads it.
    Read {
        /// In one content chunk.
        whole: bool,
    },
    /// Writes the payload, which has the length of the range.
    Write,
    /// Makes everything answered durable; the range is empty.
    Flush,
    /// Gives its space back.
    Trim,
    /// Makes it read as zeros.
    Zero(ZeroMode),
    /// Brings it into the page cache.
    Cache,
    /// Describes it.
    Status {
        /// In one extent per context.
        one: bool,
    },
}

/// A request that was found valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// For the reply.
    pub tag: Tag,
    /// What to do.
    pub action: Action,
    /// Where; inside the export.
    pub range: Range<u64>,
    /// True when it must be durable before the answer.
    pub fua: bool,
}

/// A request that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the reply.
    pub tag: Tag,
    /// The error number.
    pub error: u32,
    /// The text.
    pub text: String,
}

/// What stands at the start of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing complete; the request at its start has at least this many bytes.
    NeedMore(usize),
    /// A command; `header` and then `payload` bytes of the input are used up.
    Command {
        /// What to do.
        command: Command,
        /// Bytes of the header.
        header: usize,
        /// Bytes of the payload, all of them there.
        payload: usize,
    },
    /// A refusal; `header` bytes of the input are used up, then `discard` bytes of payload are to
    /// be thrown away, some of which may not be there yet. The answer goes out after them.
    Refused {
        /// The answer.
        refusal: Refusal,
        /// Bytes of the header.
        header: usize,
        /// Bytes of payload.
        discard: u64,
    },
    /// The client says good-bye.
    Disconnect,
    /// The client broke the protocol beyond what can be answered.
    Violation(&'static str),
}

/// Bytes of an export: what the client was told, and more once it asks for more of one that has grown.
#[derive(Debug)]
pub struct Size(AtomicU64);

impl Size {
    /// The size that requests are judged by.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// The export has `bytes`; true when that is more than was known.
    pub fn raise(&self, bytes: u64) -> bool {
        self.0.fetch_max(bytes, Ordering::Relaxed) < bytes
    }
}

impl From<u64> for Size {
    fn from(bytes: u64) -> Size {
        Size(AtomicU64::new(bytes))
    }
}

impl Clone for Size {
    fn clone(&self) -> Size {
        self.bytes().into()
    }
}

/// What a session's requests are judged by.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Headers and replies.
    pub style: Style,
    /// Bytes of the export.
    pub size: Size,
    /// True when changes are refused.
    pub read_only: bool,
    /// What `BLOCK_STATUS` answers; ids are places plus one.
    pub contexts: Vec<Context>,
}

impl Rules {
    /// The rules of a finished handshake.
    pub fn of(n: &Negotiated) -> Rules {
        Rules {
            style: n.style,
            size: n.size.into(),
            read_only: n.export.device.read_only(),
            contexts: n.contexts.clone(),
        }
    }

    /// The rules of a session on `device` that no handshake made: with `base:allocation`, where the
    /// style allows it.
    pub fn over(device: &dyn Device, style: Style) -> Rules {
        let contexts = match style {
            Style::Simple => Vec::new(),
            _ => vec![Context::Allocation],
        };
        Rules {
            style,
            size: device.size().into(),
            read_only: device.read_only(),
            contexts,
        }
    }

    /// Looks at the start of `input`.
    pub fn next(&self, input: &[u8]) -> Next {
        let request = match Request::parse(input, self.style) {
            Ok(request) => request,
            Err(wire::Error::NeedMore(n)) => return Next::NeedMore(n),
            Err(wire::Error::Malformed(why)) => return Next::Violation(why),
        };
        if request.kind == kind::DISC {
            return Next::Disconnect;
        }
        let header = Request::header_len(self.style);
        let payload = match self.payload(&request) {
            Ok(payload) => payload,
            Err(why) => return Next::Violation(why),
        };
        match self.judge(&request) {
            Ok(command) => {
                // A judged command has at most MAX_PAYLOAD bytes, so this fits any usize.
                let payload = payload as usize;
                if input.len() < header + payload {
                    return Next::NeedMore(header + payload);
                }
                Next::Command {
                    command,
                    header,
                    payload,
                }
            }
            Err((error, text)) => {
                let tag = Tag {
                    cookie: request.cookie,
                    offset: request.offset,
                };
                Next::Refused {
                    refusal: Refusal { tag, error, text },
                    header,
                    discard: payload,
                }
            }
        }
    }

    /// Bytes of payload that follow the header, or why the session must end.
    fn payload(&self, r: &Request) -> Result<u64, &'static str> {
        if self.style == Style::Extended {
            // QEMU (10.0) does not set the flag on its writes, and sends the payload all the same.
            // Without the flag a write has no meaning of its own, so this takes none away.
            return match r.flags & flag::PAYLOAD_LEN != 0 || r.kind == kind::WRITE {
                false => Ok(0),
                true if r.length <= u64::from(MAX_PAYLOAD) => Ok(r.length),
                true => Err("a payload is longer than the announced maximum"),
            };
        }
        match r.kind {
            kind::WRITE if r.length > MAX_DISCARD => Err("a write is longer than 64 MiB"),
            kind::WRITE => Ok(r.length),
            _ => Ok(0),
        }
    }

    fn judge(&self, r: &Request) -> Result<Command, (u32, String)> {
        let invalid = |text: String| Err((errno::EINVAL, text));
        let Some(allowed) = self.allowed_flags(r.kind) else {
            return invalid(format!("unknown command {}", r.kind));
        };
        let bad = r.flags & !allowed;
        if bad != 0 {
            return invalid(format!(
                "flags {bad:#x} are not valid for command {}",
                r.kind
            ));
        }
        let changes = matches!(r.kind, kind::WRITE | kind::TRIM | kind::WRITE_ZEROES);
        if changes && self.read_only {
            return Err((errno::EPERM, "the export is read-only".into()));
        }
        let range = self.range(r)?;
        let action = match r.kind {
            kind::READ => Action::Read {
                whole: r.flags & flag::DF != 0,
            },
            kind::WRITE => Action::Write,
            kind::FLUSH => Action::Flush,
            kind::TRIM => Action::Trim,
            kind::CACHE => Action::Cache,
            kind::WRITE_ZEROES => Action::Zero(ZeroMode {
                keep_space: r.flags & flag::NO_HOLE != 0,
                only_if_fast: r.flags & flag::FAST_ZERO != 0,
            }),
            _ => Action::Status {
                one: r.flags & flag::REQ_ONE != 0,
            },
        };
        let tag = Tag {
            cookie: r.cookie,
            offset: r.offset,
        };
        Ok(Command {
            tag,
            action,
            range,
            fua: changes && r.flags & flag::FUA != 0,
        })
    }

    /// The flags that a command may carry; `None` for a command that there is not.
    fn allowed_flags(&self, command: u16) -> Option<u16> {
        // FUA is valid on every command: clients are known to set it on reads and flushes.
        let own = match command {
            kind::READ if self.style != Style::Simple => flag::DF,
            kind::WRITE if self.style == Style::Extended => flag::PAYLOAD_LEN,
            kind::READ | kind::WRITE | kind::FLUSH | kind::TRIM | kind::CACHE => 0,
            kind::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            kind::BLOCK_STATUS => flag::REQ_ONE,
            _ => return None,
        };
        Some(own | flag::FUA)
    }

    fn range(&self, r: &Request) -> Result<Range<u64>, (u32, String)> {
        if r.kind == kind::FLUSH {
            return match (r.offset, r.length) {
                (0, 0) => Ok(0..0),
                _ => Err((errno::EINVAL, "a flush has no offset and no length".into())),
            };
        }
        if r.kind == kind::BLOCK_STATUS {
            if self.contexts.is_empty() {
                return Err((errno::EINVAL, "no metadata context was selected".into()));
            }
            if r.length == 0 {
                return Err((errno::EINVAL, "the status of nothing was asked for".into()));
            }
        }
        let end = r
            .offset
            .checked_add(r.length)
            .filter(|end| *end <= self.size.bytes());
        let Some(end) = end else {
            let extends = matches!(r.kind, kind::WRITE | kind::WRITE_ZEROES);
            let error = if extends {
                errno::ENOSPC
            } else {
                errno::EINVAL
            };
            let text = format!(
                "{} bytes at {} are not inside the export of {} bytes",
                r.length,
                r.offset,
                self.size.bytes()
            );
            return Err((error, text));
        };
        if r.length > u64::from(MAX_PAYLOAD) {
            let error = match r.kind {
                kind::READ => errno::EOVERFLOW,
                kind::WRITE => errno::EINVAL,
                _ => return Ok(r.offset..end),
            };
            return Err((
                error,
                format!("{} bytes are more than {MAX_PAYLOAD}", r.length),
            ));
        }
        Ok(r.offset..end)
    }
}

#[cfg(test)]
#[path = "transmission_tests.rs"]
mod tests;
