//! POSIX ACLs: the text that archives carry, and the value of the extended attribute.
//!
//! Text: entries `TAG:WHO:PERM[:ID]`, separated by commas or line ends. WHO is a number, or a name
//! with its number in the fourth field (star writes that); a bare name belongs to another
//! machine's user table and is refused.
//!
//! Value, little-endian: `u32` version 2, then `{u16 tag, u16 perm, u32 id}` per entry.

use ploop::error::{Error, Result};

use super::rules::show;

const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// An ACL in the kernel's order.
#[derive(Debug)]
pub(super) struct Acl {
    /// (tag, id, permissions)
    entries: Vec<(u16, u32, u16)>,
}

/// Parses the text; `None` when it holds no entry.
pub(super) fn from_text(text: &[u8]) -> Result<Option<Acl>> {
    let mut entries = Vec::new();
    for entry in text.split(|b| matches!(b, b',' | b'\n')) {
        let end = entry.iter().position(|&b| b == b'#').unwrap_or(entry.len());
        let entry = entry[..end].trim_ascii();
        if !entry.is_empty() {
            entries.push(parse(entry)?);
        }
    }
    if entries.is_empty() {
        return Ok(None);
    }
    entries.sort_unstable();
    Ok(Some(Acl { entries }))
}

impl Acl {
    /// False when the permission bits say all of it.
    pub(super) fn is_more_than_mode(&self) -> bool {
        self.entries
            .iter()
            .any(|&(tag, _, _)| matches!(tag, USER | GROUP | MASK))
    }

    pub(super) fn to_xattr(&self) -> Vec<u8> {
        let mut out = VERSION.to_le_bytes().to_vec();
        for (tag, id, perm) in &self.entries {
            out.extend(tag.to_le_bytes());
            out.extend(perm.to_le_bytes());
            out.extend(id.to_le_bytes());
        }
        out
    }
}

fn parse(entry: &[u8]) -> Result<(u16, u32, u16)> {
    let bad = || Error::corrupt(format!("{} is no ACL entry", show(entry)));
    let entry_text = std::str::from_utf8(entry).map_err(|_| bad())?;
    let parts: Vec<&str> = entry_text.split(':').map(str::trim).collect();
    let (kind, who, perm, number) = match parts[..] {
        [kind, perm] if kind.starts_with(['m', 'o']) => (kind, "", perm, None),
        [kind, who, perm] => (kind, who, perm, None),
        [kind, who, perm, id] => (kind, who, perm, Some(id)),
        _ => return Err(bad()),
    };
    let (owner, named) = match kind {
        "user" | "u" => (USER_OBJ, USER),
        "group" | "g" => (GROUP_OBJ, GROUP),
        "mask" | "m" => (MASK, MASK),
        "other" | "o" => (OTHER, OTHER),
        _ => return Err(bad()),
    };
    let perm = permissions(perm).ok_or_else(bad)?;
    if who.is_empty() {
        return Ok((owner, NO_ID, perm));
    }
    if owner == named {
        return Err(bad());
    }
    match number.unwrap_or(who).parse() {
        Ok(id) => Ok((named, id, perm)),
        Err(_) => Err(Error::unsupported(format!(
            "{} names its user, not the number",
            show(entry)
        ))
        .fix("Make the archive with tar --acls --numeric-owner")),
    }
}

fn permissions(text: &str) -> Option<u16> {
    let mut out = 0;
    for c in text.chars() {
        out |= match c {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return None,
        };
    }
    (text.len() == 3).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_the_kernels_value() {
        let acl = from_text(b"user::rwx,user:1000:r-x,group::r--\nmask::r-x,other::---").unwrap();
        let acl = acl.unwrap();
        assert!(acl.is_more_than_mode());
        let mut want = vec![2, 0, 0, 0];
        want.extend([1, 0, 7, 0, 255, 255, 255, 255]);
        want.extend([2, 0, 5, 0, 0xe8, 3, 0, 0]);
        want.extend([4, 0, 4, 0, 255, 255, 255, 255]);
        want.extend([16, 0, 5, 0, 255, 255, 255, 255]);
        want.extend([32, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!(acl.to_xattr(), want);
        let star = from_text(b"user::rwx,user:joe:r-x:1000,group::r--,mask::r-x,other::---");
        assert_eq!(star.unwrap().unwrap().to_xattr(), want);
    }

    #[test]
    fn names_without_numbers_and_nonsense_are_refused() {
        let e = from_text(b"user:joe:rwx").unwrap_err();
        assert!(
            e.to_string().contains("joe") && e.to_string().contains("--numeric-owner"),
            "{e}"
        );
        for bad in ["user", "x::rwx", "user::rwz", "user::rw", "other:5:rwx"] {
            assert!(from_text(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(from_text(b"").unwrap().is_none());
        assert!(
            !from_text(b"user::rw-,group::r--,other::r--")
                .unwrap()
                .unwrap()
                .is_more_than_mode()
        );
    }
}
