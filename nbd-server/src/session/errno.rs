//! From our kinds of failure to the protocol's numbers: the only place that knows both.

use ploop::error::Kind;

use crate::wire::{errno, option_reply};

/// The number in a reply for a failure of `kind`.
///
/// `ENOTSUP` is meant for `FAST_ZERO` alone: a client that sees it elsewhere may take a feature for
/// missing for ever. `fast` says whether the request was one.
pub fn of(kind: Kind, fast: bool) -> u32 {
    match kind {
        Kind::Invalid | Kind::Exists => errno::EINVAL,
        Kind::Unsupported if fast => errno::ENOTSUP,
        Kind::Unsupported => errno::EINVAL,
        Kind::NoSpace => errno::ENOSPC,
        Kind::Permission | Kind::ReadOnly => errno::EPERM,
        // Io, Corrupt, Latched, NotFound and InUse: the bytes cannot be had, whatever the client
        // asks. A kind added later is one of these until it is given its own line.
        _ => errno::EIO,
    }
}

/// The kind of answer to an option that failed with `kind`.
pub fn of_option(kind: Kind) -> u32 {
    match kind {
        Kind::NotFound => option_reply::kind::ERR_UNKNOWN,
        // The name and the option are fine; this server will not open that export now. The text
        // says why.
        _ => option_reply::kind::ERR_POLICY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table() {
        let table = [
            (Kind::Io, 5),
            (Kind::NotFound, 5),
            (Kind::Exists, 22),
            (Kind::Invalid, 22),
            (Kind::Corrupt, 5),
            (Kind::Unsupported, 22),
            (Kind::InUse, 5),
            (Kind::NoSpace, 28),
            (Kind::Permission, 1),
            (Kind::ReadOnly, 1),
            (Kind::Latched, 5),
        ];
        for (kind, number) in table {
            assert_eq!(of(kind, false), number, "{}", kind.name());
            let fast = if kind == Kind::Unsupported {
                95
            } else {
                number
            };
            assert_eq!(of(kind, true), fast, "{}", kind.name());
        }
    }
}
