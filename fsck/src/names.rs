//! Names in a disk's directory: which of them may be followed, and what was left there.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use ploop::disk::open::DESCRIPTOR;
use ploop::format::ploop::header::has_signature;
use ploop::store::{Access, EntryKind, Store};
use ploop::verify::Class;
use ploop::{Error, Kind, Result};

use crate::report::Findings;

/// `path` with all links resolved, when it lies in one of `allowed` (which are resolved). Errors:
/// `Permission` outside, without a look at what is there; `NotFound`.
pub(crate) fn confined(store: &dyn Store, path: &Path, allowed: &[PathBuf]) -> Result<PathBuf> {
    let inside = |p: &Path| allowed.iter().any(|a| p.starts_with(a));
    let outside = |p: &Path| {
        let what = "the descriptor names a file outside of the disk's directory";
        Error::new(Kind::Permission, what)
            .on(p)
            .fix("If that is meant, allow its directory with --allow-dir DIR")
    };
    let plain = lexical(path);
    if !inside(&plain) {
        return Err(outside(&plain));
    }
    let real = store.resolve(path)?;
    match inside(&real) {
        true => Ok(real),
        false => Err(outside(&real)),
    }
}

/// `path` without `.` and `..`, links not looked at.
fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(out.pop()),
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}

/// Looks for files in `dir` that an operation left: temporary ones, and images that nothing names.
/// `known` are the resolved paths of the disk's images; `merging` says that a snapshot is marked
/// for removal. Links and directories are left alone.
pub(crate) fn leftovers(
    store: &dyn Store,
    dir: &Path,
    known: &HashSet<PathBuf>,
    merging: bool,
    found: &mut Findings,
) -> Result<()> {
    for name in store.list(dir)? {
        let path = dir.join(&name);
        let text = name.to_string_lossy();
        // The backup of an image that is being converted begins like an image, and was judged
        // with it.
        let backup_of_known = path.extension().is_some_and(|e| e == "idx")
            && known.contains(&path.with_extension(""));
        if text == DESCRIPTOR || known.contains(&path) || backup_of_known {
            continue;
        }
        if store.kind(&path)? != Some(EntryKind::File) {
            continue;
        }
        if text.strip_suffix(".tmp") == Some(DESCRIPTOR) && merging {
            let what = "a merge was interrupted: the descriptor it was to end with is still here";
            found.file("interrupted-merge", Class::Dirty, &path, what.into());
        } else if is_temporary(&text) {
            let what = "a temporary file that an interrupted operation left";
            found.file("orphan-file", Class::Leak, &path, what.into());
        } else if is_image(store, &path)? {
            let what = "a ploop image that the descriptor does not name";
            found.file("orphan-file", Class::Leak, &path, what.into());
        }
    }
    Ok(())
}

/// `NAME.tmp`, or `NAME.tmp-UUID`.
fn is_temporary(name: &str) -> bool {
    match name.rsplit_once(".tmp") {
        Some((stem, "")) => !stem.is_empty(),
        Some((stem, rest)) => {
            let uuid = rest.strip_prefix('-').unwrap_or_default();
            !stem.is_empty()
                && uuid.len() == 36
                && uuid.chars().all(|c| c == '-' || c.is_ascii_hexdigit())
        }
        None => false,
    }
}

fn is_image(store: &dyn Store, path: &Path) -> Result<bool> {
    let mut head = [0; 16];
    match store.open(path, Access::Read) {
        Ok(file) => {
            let got = file.read_at(&mut head, 0)?;
            Ok(has_signature(&head[..got]))
        }
        // Gone since it was listed, or nobody's business: no image of this disk either way.
        Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Permission | Kind::Invalid) => {
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_are_told_from_others() {
        for name in [
            "DiskDescriptor.xml.tmp",
            "root.hds.tmp",
            "a.tmp-0d9bf1ce-ded8-401e-8532-73a856823f39",
        ] {
            assert!(is_temporary(name), "{name}");
        }
        for name in [
            "root.hds",
            ".tmp",
            "a.tmpl",
            "a.tmp-1",
            "a.tmp-0d9bf1ce-ded8-401e-8532-73a856823f3x",
        ] {
            assert!(!is_temporary(name), "{name}");
        }
    }
}
