//! The handshake: fixed newstyle, one option at a time.
//!
//! ```text
//!  greeting ─▶ client flags ─▶ option ⟲ ─▶ Negotiated
//!                                  └──────▶ Closed
//! ```
//!
//! Each call of [`Handshake::advance`] takes at most one message, so the answers that it appends
//! are bounded by what one option can cause. The client's claims are bounded before they cost
//! anything:
//!
//! | claim | answer |
//! |---|---|
//! | client flags that were not offered | the session ends, as the protocol demands |
//! | option data over [`MAX_OPTION`] | skipped as it comes; `ERR_TOO_BIG`, or `ERR_UNSUP` |
//! | option data over [`MAX_OPTION_SKIP`] | the session ends |
//! | malformed data | `ERR_INVALID`, and the handshake goes on |
//! | more than [`MAX_OPTIONS`] options | the session ends |
//!
//! `EXPORT_NAME` has no way to answer an error: where GO would be refused, the session ends.

use crate::export::{Exports, OpenExport};
use crate::session::context::Context;
use crate::session::{MAX_OPTION, MAX_OPTION_SKIP, MAX_OPTIONS, Negotiated};
use crate::wire::greeting::{ClientFlags, Greeting, handshake_flag};
use crate::wire::option::{Header, kind};
use crate::wire::option_reply as answer;
use crate::wire::reply::Style;
use crate::wire::{Error, MAX_STRING};

/// What a call of [`Handshake::advance`] came to.
#[derive(Debug)]
pub enum Step {
    /// Nothing complete at the start of the input; call again with more of it.
    NeedMore,
    /// A message was used up; send the answers and call again with the rest.
    Again,
    /// Transmission begins with the rest of the input, after the answers are sent.
    Negotiated(Box<Negotiated>),
    /// The session is over, for this reason; send the answers and close.
    Closed(String),
}

#[derive(Debug)]
enum Phase {
    ClientFlags,
    Options,
    /// Data of an option too long to look at: bytes of it still to come.
    Skip(Header, u32),
}

/// One handshake.
#[derive(Debug)]
pub struct Handshake {
    phase: Phase,
    options: u32,
    pub(super) no_zeroes: bool,
    pub(super) structured: bool,
    pub(super) extended: bool,
    /// The export that contexts were selected for, and which.
    pub(super) selected: Option<(String, Vec<Context>)>,
    /// The export opened last, under the name that was asked for: INFO and GO of one name see the
    /// same device, opened once.
    pub(super) opened: Option<(String, OpenExport)>,
    pub(super) shutting_down: bool,
}

impl Handshake {
    /// Starts one: appends the greeting to `out`.
    pub fn start(out: &mut Vec<u8>) -> Handshake {
        Greeting {
            flags: handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES,
        }
        .emit(out);
        Handshake {
            phase: Phase::ClientFlags,
            options: 0,
            no_zeroes: false,
            structured: false,
            extended: false,
            selected: None,
            opened: None,
            shutting_down: false,
        }
    }

    /// From now on every option but ABORT is refused with `ERR_SHUTDOWN`.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Headers and replies as negotiated so far.
    pub fn style(&self) -> Style {
        match (self.extended, self.structured) {
            (true, _) => Style::Extended,
            (false, true) => Style::Structured,
            (false, false) => Style::Simple,
        }
    }

    /// Takes at most one message from the start of `input`, appends the answers to `out`, and
    /// returns the bytes that were used up. Blocks as long as `exports` does.
    pub fn advance(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        exports: &dyn Exports,
    ) -> (usize, Step) {
        match self.phase {
            Phase::ClientFlags => self.client_flags(input),
            Phase::Options => self.option(input, out, exports),
            Phase::Skip(header, left) => self.skip(header, left, input, out),
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> (usize, Step) {
        let Ok(flags) = ClientFlags::parse(input) else {
            return (0, Step::NeedMore);
        };
        if flags.unknown() != 0 {
            let why = format!("client flags {:#x} were not offered", flags.unknown());
            return (ClientFlags::LEN, Step::Closed(why));
        }
        // A client that did not set FIXED_NEWSTYLE is answered all the same: it will only ever send
        // EXPORT_NAME.
        self.no_zeroes = flags.no_zeroes();
        self.phase = Phase::Options;
        (ClientFlags::LEN, Step::Again)
    }

    fn option(&mut self, input: &[u8], out: &mut Vec<u8>, exports: &dyn Exports) -> (usize, Step) {
        let header = match Header::parse(input) {
            Ok(header) => header,
            Err(Error::NeedMore(_)) => return (0, Step::NeedMore),
            Err(Error::Malformed(why)) => return (0, Step::Closed(why.into())),
        };
        if let Some(why) = self.intolerable(&header) {
            return (Header::LEN, Step::Closed(why));
        }
        if header.length > MAX_OPTION {
            self.options += 1;
            self.phase = Phase::Skip(header, header.length);
            return (Header::LEN, Step::Again);
        }
        let end = Header::LEN + header.length as usize;
        let Some(data) = input.get(Header::LEN..end) else {
            return (0, Step::NeedMore);
        };
        self.options += 1;
        (end, self.answer(header.option, data, out, exports))
    }

    /// Why the session must end before the option's data is even waited for.
    fn intolerable(&self, header: &Header) -> Option<String> {
        let name = kind::name(header.option);
        if header.length > MAX_OPTION_SKIP {
            return Some(format!(
                "option {name} with {} bytes of data",
                header.length
            ));
        }
        if header.option == kind::EXPORT_NAME && header.length as usize > MAX_STRING {
            return Some(format!("an export name of {} bytes", header.length));
        }
        (self.options >= MAX_OPTIONS).then(|| format!("more than {MAX_OPTIONS} options"))
    }

    fn skip(
        &mut self,
        header: Header,
        left: u32,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> (usize, Step) {
        if input.is_empty() {
            return (0, Step::NeedMore);
        }
        let used = input.len().min(left as usize);
        let left = left - used as u32;
        if left > 0 {
            self.phase = Phase::Skip(header, left);
            return (used, Step::Again);
        }
        self.phase = Phase::Options;
        let option = header.option;
        match option {
            kind::ABORT => {
                answer::ack(option, out);
                return (used, Step::Closed("aborted by the client".into()));
            }
            _ if self.shutting_down => self.refuse_shutting_down(option, out),
            _ if kind::name(option) == "unknown" => Self::refuse_unknown(option, out),
            _ => {
                // A request that replaces the contexts does so even when it fails.
                if option == kind::SET_META_CONTEXT {
                    self.selected = None;
                }
                let text = format!("{} bytes of data are more than {MAX_OPTION}", header.length);
                answer::error(option, answer::kind::ERR_TOO_BIG, &text, out);
            }
        }
        (used, Step::Again)
    }

    pub(super) fn refuse_unknown(option: u32, out: &mut Vec<u8>) {
        let text = format!("option {option} is not known here");
        answer::error(option, answer::kind::ERR_UNSUP, &text, out);
    }

    pub(super) fn refuse_shutting_down(&self, option: u32, out: &mut Vec<u8>) {
        answer::error(
            option,
            answer::kind::ERR_SHUTDOWN,
            "the server is shutting down",
            out,
        );
    }
}

#[cfg(test)]
#[path = "handshake_tests/mod.rs"]
mod tests;
