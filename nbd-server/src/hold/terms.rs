//! What a client negotiated, and whether another server keeps it.

use crate::session::MAX_PAYLOAD;
use crate::wire::greeting::transmission_flag as flag;
use crate::wire::reply::Style;

/// Longest payload that the holder takes, whatever a server allows, in bytes.
pub(super) const MAX_HELD: u32 = 64 << 20;

/// Transmission flags whose meaning the holder knows. Others are not passed on: a client that used
/// them would send what the holder cannot keep.
pub(super) const KNOWN: u16 = flag::HAS_FLAGS
    | flag::READ_ONLY
    | flag::SEND_FLUSH
    | flag::SEND_FUA
    | flag::SEND_TRIM
    | flag::SEND_WRITE_ZEROES
    | flag::SEND_DF
    | flag::CAN_MULTI_CONN
    | flag::SEND_CACHE
    | flag::SEND_FAST_ZERO;

/// What makes no difference to a client when it goes.
const IDLE: u16 = flag::READ_ONLY;

/// A metadata context and the number that a server gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) id: u32,
    pub(super) name: String,
}

/// See the module text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// The export, as the client named it.
    pub(super) export: String,
    /// Headers and replies.
    pub(super) style: Style,
    /// Bytes.
    pub(super) size: u64,
    /// Transmission flags.
    pub(super) flags: u16,
    /// Smallest length and alignment, where the server said so.
    pub(super) minimum: Option<u32>,
    /// Longest payload, where the server said so.
    pub(super) maximum: Option<u32>,
    /// What the client wanted to know of the export.
    pub(super) wanted: Vec<u16>,
    /// What the client asked for as contexts.
    pub(super) queries: Vec<String>,
    /// The contexts that it got.
    pub(super) contexts: Vec<Named>,
}

impl Terms {
    pub(super) fn read_only(&self) -> bool {
        self.has(flag::READ_ONLY)
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Longest payload that is taken from the client, and read that is passed on.
    pub(super) fn payload_max(&self) -> u32 {
        self.maximum.unwrap_or(MAX_PAYLOAD).min(MAX_HELD)
    }

    /// The numbers of the contexts at a server with terms `new`, each with what the client calls it.
    /// Error: what the client relies on and the server does not have.
    pub(super) fn kept_by(&self, new: &Terms) -> Result<Vec<(u32, u32)>, String> {
        if new.size < self.size {
            return Err(format!(
                "the export has {} bytes now; the client was told {}",
                new.size, self.size
            ));
        }
        let gone = self.flags & !new.flags & !IDLE;
        if gone != 0 {
            let what = "transmission flags that the client was told are gone";
            return Err(format!("{what}: {gone:#x} of {:#x}", self.flags));
        }
        if new.read_only() && !self.read_only() {
            return Err("the export is read-only now".into());
        }
        // A client that was told nothing may send single sectors.
        let minimum = |t: &Terms| t.minimum.unwrap_or(512);
        if new.minimum.is_some_and(|new| new > minimum(self)) {
            return Err(format!(
                "its smallest request is {} bytes now, not {}",
                minimum(new),
                minimum(self)
            ));
        }
        if new.payload_max() < self.payload_max() {
            return Err(format!(
                "its longest request is {} bytes now, not {}",
                new.payload_max(),
                self.payload_max()
            ));
        }
        let number = |old: &Named| {
            let found = new.contexts.iter().find(|c| c.name == old.name);
            let found = found.ok_or_else(|| format!("it has no context {} now", old.name))?;
            Ok((found.id, old.id))
        };
        self.contexts.iter().map(number).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        Terms {
            export: "ct".into(),
            style: Style::Structured,
            size: 1 << 20,
            flags: flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_TRIM,
            minimum: Some(1),
            maximum: Some(1 << 25),
            wanted: vec![3],
            queries: vec!["base:allocation".into()],
            contexts: vec![Named {
                id: 1,
                name: "base:allocation".into(),
            }],
        }
    }

    #[test]
    fn more_is_kept_and_less_is_named() {
        let old = terms();
        assert_eq!(old.kept_by(&old), Ok(vec![(1, 1)]));
        let mut more = Terms {
            size: 1 << 21,
            flags: old.flags | flag::SEND_FUA,
            maximum: None,
            ..terms()
        };
        more.contexts[0].id = 9;
        assert_eq!(old.kept_by(&more), Ok(vec![(9, 1)]));
        type Less<'a> = (&'a str, &'a dyn Fn(&mut Terms));
        let less: [Less<'_>; 6] = [
            ("bytes now", &|t| t.size -= 1),
            ("0x20", &|t| t.flags &= !flag::SEND_TRIM),
            ("read-only", &|t| t.flags |= flag::READ_ONLY),
            ("smallest", &|t| t.minimum = Some(512)),
            ("longest", &|t| t.maximum = Some(4096)),
            ("base:allocation", &|t| t.contexts.clear()),
        ];
        for (says, change) in less {
            let mut new = terms();
            change(&mut new);
            let why = old.kept_by(&new).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
    }
}
