//! The protocol as state machines without sockets.
//!
//! | file | in | out |
//! |---|---|---|
//! | [`handshake`] | the client's bytes, [`crate::Exports`] | answers, then [`Negotiated`] |
//! | [`transmission`] | the client's bytes | one [`transmission::Command`], or a refusal |
//! | [`replies`] | what became of a command | bytes in an [`Output`] |
//!
//! Nothing here waits, locks or knows a clock. Whatever the bytes: no panic, and no memory in
//! proportion to a number that they name.

pub mod context;
pub mod errno;
pub mod handshake;
mod options;
pub mod output;
pub mod replies;
pub mod transmission;

use crate::export::OpenExport;
use crate::session::context::Context;
use crate::wire::greeting::transmission_flag as flag;
use crate::wire::option_reply::BlockSize;
use crate::wire::reply::Style;

pub use handshake::{Handshake, Step};
pub use output::Output;

/// Longest READ or WRITE, in bytes; the protocol's own default.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Longest compact WRITE whose payload is read and thrown away before the refusal; a longer one
/// ends the session.
pub const MAX_DISCARD: u64 = 64 << 20;
/// Most extents in one status.
pub const MAX_EXTENTS: usize = 16 << 10;
/// Most metadata contexts of one session.
pub const MAX_CONTEXTS: usize = 16;
/// Longest option data that is looked at.
pub const MAX_OPTION: u32 = 64 << 10;
/// Longest option data that is skipped and refused; a longer one ends the session.
pub const MAX_OPTION_SKIP: u32 = 4 << 20;
/// Most options in one handshake.
pub const MAX_OPTIONS: u32 = 4096;

const PREFERRED_MIN: u64 = 4 << 10;
const PREFERRED_MAX: u64 = 64 << 10;

/// What a handshake ended in.
#[derive(Debug)]
pub struct Negotiated {
    /// The export and its device.
    pub export: OpenExport,
    /// Bytes, as told to the client.
    pub size: u64,
    /// Headers and replies.
    pub style: Style,
    /// True when the client did not want the zeros after `EXPORT_NAME`.
    pub no_zeroes: bool,
    /// Metadata contexts; the id of each is its place in this list, plus one.
    pub contexts: Vec<Context>,
}

/// The transmission flags of a device in a session of that style.
pub fn transmission_flags(read_only: bool, style: Style) -> u16 {
    let mut flags = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE;
    flags |= if read_only {
        flag::READ_ONLY
    } else {
        flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
    };
    if style != Style::Simple {
        flags |= flag::SEND_DF;
    }
    flags
}

/// The block sizes of a device with that allocation unit.
pub fn block_sizes(cluster_bytes: u64) -> BlockSize {
    let preferred = cluster_bytes
        .clamp(PREFERRED_MIN, PREFERRED_MAX)
        .next_power_of_two();
    BlockSize {
        minimum: 1,
        preferred: preferred as u32,
        maximum: MAX_PAYLOAD,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preferred_size_is_a_bounded_power_of_two() {
        for (cluster, preferred) in [
            (0, 4096),
            (512, 4096),
            (32 << 10, 32 << 10),
            (40_000, 65536),
            (1 << 26, 65536),
        ] {
            assert_eq!(block_sizes(cluster).preferred, preferred, "{cluster}");
        }
    }

    #[test]
    fn a_read_only_export_offers_no_change() {
        let flags = transmission_flags(true, Style::Structured);
        assert_ne!(flags & flag::READ_ONLY, 0);
        assert_eq!(
            flags & (flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO),
            0
        );
        assert_eq!(
            transmission_flags(false, Style::Simple) & (flag::READ_ONLY | flag::SEND_DF),
            0
        );
        assert_ne!(
            transmission_flags(false, Style::Extended) & flag::SEND_DF,
            0
        );
    }
}
