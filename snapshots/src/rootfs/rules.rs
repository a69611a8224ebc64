//! What a member may be: the rules of names, and what ext4 cannot hold. Each refusal names the
//! member and says why.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use ploop::error::{Error, Result};

use super::tree::{Kind, Meta};

/// Longest name of a directory entry, in bytes (ext4's and Linux's).
const NAME_MAX: usize = 255;
/// Longest path, in bytes: what one system call takes.
const PATH_MAX: usize = 4095;
/// Deepest path, in components: whoever removes the stage holds a directory open per level.
const DEPTH_MAX: usize = 400;
/// Longest symbolic link: one block less the terminating zero.
const TARGET_MAX: usize = 4095;
/// Bytes of attributes that one inode can hold: a block less its header and end mark.
const XATTR_BYTES: usize = 4096 - 32 - 4;
/// Seconds that an ext4 time can hold: 34 bits, from 1901 to 2446.
const TIME_RANGE: std::ops::Range<i64> = -(1 << 31)..(1 << 34) - (1 << 31);

/// A name for a message: quoted, with everything unprintable escaped.
pub(super) fn show(name: &[u8]) -> String {
    format!("{:?}", OsStr::from_bytes(name))
}

/// Splits a member's name: no component is empty, `.` or `..`. The root itself has none.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    if path.is_empty() {
        return Err(Error::invalid("a member has an empty name"));
    }
    if path[0] == b'/' {
        return Err(refused(path, "its name is absolute")
            .fix("Make the archive with relative names (tar -C DIR -c .)"));
    }
    if path.contains(&0) {
        return Err(refused(path, "its name holds a zero byte"));
    }
    let mut out = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(refused(path, "its name goes through \"..\"")),
            _ if part.len() > NAME_MAX => {
                return Err(refused(path, "a part of its name is longer than 255 bytes"));
            }
            _ => out.push(part),
        }
    }
    if out.len() > DEPTH_MAX {
        return Err(refused(path, "it lies deeper than 400 directories"));
    }
    let len = out.iter().map(|p| p.len() + 1).sum::<usize>();
    if len > PATH_MAX + 1 {
        return Err(refused(path, "its path is longer than 4095 bytes"));
    }
    Ok(out)
}

/// The error for a member that cannot be taken, and why.
pub(super) fn refused(path: &[u8], why: &str) -> Error {
    let shown = &path[..path.len().min(512)];
    Error::invalid(format!("member {} is refused: {why}", show(shown)))
}

/// What ext4 cannot hold is refused here, with the member's name.
pub(super) fn check(path: &[u8], kind: &Kind, meta: &Meta) -> Result<()> {
    match kind {
        Kind::Symlink(target) if target.is_empty() || target.contains(&0) => {
            return Err(refused(
                path,
                "its link target is empty or holds a zero byte",
            ));
        }
        Kind::Symlink(target) if target.len() > TARGET_MAX => {
            return Err(refused(path, "its link target is longer than 4095 bytes"));
        }
        Kind::Char(d) | Kind::Block(d) if d.major >= 1 << 12 || d.minor >= 1 << 20 => {
            let why = format!("Linux has no device {}:{}", d.major, d.minor);
            return Err(refused(path, &why));
        }
        _ => {}
    }
    if !TIME_RANGE.contains(&meta.mtime.sec) || meta.mtime.nsec >= 1_000_000_000 {
        return Err(refused(
            path,
            "its time is outside of what ext4 can hold (1901 to 2446)",
        ));
    }
    let mut bytes = 0;
    for (name, value) in &meta.xattrs {
        check_xattr(path, name)?;
        bytes += 16 + name.len().next_multiple_of(4) + value.len().next_multiple_of(4);
    }
    if bytes > XATTR_BYTES {
        return Err(refused(
            path,
            "its extended attributes are larger than a 4 KiB block",
        ));
    }
    Ok(())
}

fn check_xattr(path: &[u8], name: &[u8]) -> Result<()> {
    let known = [&b"user."[..], b"trusted.", b"security."];
    let acl = [&b"system.posix_acl_access"[..], b"system.posix_acl_default"];
    let good = acl.contains(&name)
        || known
            .iter()
            .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix));
    if good && name.len() <= NAME_MAX && !name.iter().any(|b| matches!(b, 0 | b'\n' | b'\r')) {
        return Ok(());
    }
    Err(refused(
        path,
        &format!("ext4 has no extended attribute named {}", show(name)),
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::tree::{Content, Device, Time, Tree};
    use super::*;

    fn file(id: u64) -> Kind {
        Kind::File(Content {
            id,
            len: 1,
            blocks: 1,
            runs: 1,
        })
    }

    #[test]
    fn names_that_leave_the_tree_are_refused_by_name() {
        for bad in ["/etc/passwd", "../x", "a/../b", "a/..", ""] {
            let e = Tree::new()
                .insert(bad.as_bytes(), file(0), Meta::default())
                .unwrap_err();
            assert!(e.to_string().contains(bad), "{e}");
        }
        let long = "x".repeat(256);
        assert!(components(long.as_bytes()).is_err());
        assert!(components("a/".repeat(401).as_bytes()).is_err());
        assert!(components(format!("{0}/", "x".repeat(200)).repeat(30).as_bytes()).is_err());
        assert_eq!(components(b"./a//b/./c/").unwrap(), [b"a", b"b", b"c"]);
        assert!(components(b"./").unwrap().is_empty());
    }

    #[test]
    fn what_ext4_cannot_hold_is_refused() {
        let mut tree = Tree::new();
        let mut with = |kind, meta| tree.insert(b"x", kind, meta).map(|_| ());
        let time = |sec| Meta {
            mtime: Time { sec, nsec: 0 },
            ..Meta::default()
        };
        assert!(with(file(0), time(TIME_RANGE.end)).is_err());
        assert!(with(file(0), time(TIME_RANGE.start)).is_ok());
        assert!(
            with(
                Kind::Char(Device {
                    major: 4096,
                    minor: 0
                }),
                time(0)
            )
            .is_err()
        );
        assert!(with(Kind::Symlink(vec![b'a'; 4096]), time(0)).is_err());
        let attr = |name: &str, len| Meta {
            xattrs: BTreeMap::from([(name.as_bytes().to_vec(), vec![0; len])]),
            ..Meta::default()
        };
        assert!(with(file(0), attr("user.a", 5000)).is_err());
        assert!(with(file(0), attr("ceph.a", 1)).is_err());
        assert!(with(file(0), attr("user.a\nb", 1)).is_err());
        assert!(with(file(0), attr("user.a", 4000)).is_ok());
    }
}
