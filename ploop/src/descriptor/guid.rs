//! The 128-bit names of images and snapshots.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::error::{Error, Result};

/// A GUID: its 16 bytes in the order in which they are written as text.
///
/// Compared and hashed by value, so the case in which a file spells it doesn't matter. Displayed
/// as `{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}`, lower case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid([u8; 16]);

impl Guid {
    /// The usual GUID of the writable top, the same in every disk.
    pub const TOP: Guid = Guid([
        0x5f, 0xba, 0xab, 0xe3, 0x69, 0x58, 0x40, 0xff, 0x92, 0xa7, 0x86, 0x0e, 0x32, 0x9a, 0xab,
        0x41,
    ]);

    /// All zeros: "no parent". Never the GUID of an image.
    pub const NONE: Guid = Guid([0; 16]);

    /// A fresh random GUID (version 4).
    pub fn new_v4() -> Guid {
        Guid(Uuid::new_v4().into_bytes())
    }

    /// The GUID with these bytes, in text order.
    pub const fn from_bytes(bytes: [u8; 16]) -> Guid {
        Guid(bytes)
    }

    /// Its bytes, in text order.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Reads the 36-character hyphenated form, with or without braces, in any case.
    ///
    /// [`Kind::Invalid`](crate::error::Kind::Invalid) for anything else.
    pub fn parse(text: &str) -> Result<Guid> {
        Guid::read(text).ok_or_else(|| {
            Error::invalid(format!("{} is not a GUID", super::shown(text)))
                .fix("Write it as {xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}, x a hexadecimal digit")
        })
    }

    pub(super) fn read(text: &str) -> Option<Guid> {
        let bare = match text.strip_prefix('{') {
            Some(rest) => rest.strip_suffix('}')?,
            None => text,
        };
        // The length keeps out the crate's other spellings (without hyphens, "urn:uuid:").
        if bare.len() != 36 {
            return None;
        }
        Uuid::try_parse(bare).ok().map(|u| Guid(u.into_bytes()))
    }
}

impl FromStr for Guid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Guid> {
        Guid::parse(text)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{}}}", Uuid::from_bytes(self.0).hyphenated())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn every_spelling_is_one_guid() {
        for text in [
            "{5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "5fbaabe3-6958-40ff-92a7-860e329aab41",
            "{5FBAABE3-6958-40FF-92A7-860E329AAB41}",
            "5fbaABE3-6958-40ff-92A7-860e329aAB41",
        ] {
            assert_eq!(Guid::parse(text).unwrap(), Guid::TOP, "{text}");
        }
        assert_eq!(
            Guid::TOP.to_string(),
            "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
        );
        assert_eq!(
            Guid::NONE.to_string(),
            "{00000000-0000-0000-0000-000000000000}"
        );
        let fresh = Guid::new_v4();
        assert_eq!(fresh.to_string().parse::<Guid>().unwrap(), fresh);
        assert_eq!(Guid::from_bytes(*fresh.as_bytes()), fresh);
        assert_ne!(fresh, Guid::new_v4());
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "{}",
            "{not-a-guid}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab41",
            "5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "{{5fbaabe3-6958-40ff-92a7-860e329aab41}}",
            "5fbaabe3695840ff92a7860e329aab41",
            "{5fbaabe3695840ff92a7860e329aab41}",
            "urn:uuid:5fbaabe3-6958-40ff-92a7-860e329aab41",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4g}",
            "{5fbaabe36-958-40ff-92a7-860e329aab41}",
            " {5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4é}",
        ] {
            let e = Guid::parse(text).unwrap_err();
            assert_eq!(e.kind(), Kind::Invalid, "{text}");
        }
    }
}
