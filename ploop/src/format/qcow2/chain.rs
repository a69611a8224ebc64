//! A qcow2 image and the files below it.
//!
//! Names in an image are untrusted: an image can name any file of the host, to be read by the
//! guest. So each is resolved first and must lie in an allowed directory, its format must be
//! recorded (guest bytes at the start of a raw file can look like any format), and no name is
//! followed by anything but this function.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Backing, BackingFormat, Qcow2Delta};
use crate::error::{Error, Kind, Result};
use crate::format::Delta;
use crate::format::raw::RawDelta;
use crate::store::{Access, Store};

/// Files in one chain, at most.
const MAX_DEPTH: usize = 64;

/// Opens the qcow2 image `path` and what lies below it, read-only; the base comes first. `path`
/// itself may lie anywhere; every backing file must, with all links resolved, lie in one of the
/// directories `allowed`.
///
/// Deltas keep their own sizes: past the end of a smaller one, a larger one above it reads zeros.
///
/// Blocks. Errors: `Permission` for a backing file outside, `NotFound` for a missing one,
/// `Corrupt` for a loop, `Unsupported` for a backing format that is not given or not handled, and
/// those of [`Qcow2Delta::open`].
pub fn open_chain(
    store: &dyn Store,
    path: &Path,
    allowed: &[&Path],
) -> Result<Vec<Arc<dyn Delta>>> {
    let allowed: Vec<PathBuf> = allowed
        .iter()
        .map(|d| store.resolve(d))
        .collect::<Result<_>>()?;
    let mut chain: Vec<Arc<dyn Delta>> = Vec::new();
    let mut named = path.to_path_buf();
    let mut real = store.resolve(path)?;
    let mut format = BackingFormat::Qcow2;
    loop {
        let file = store.open(&real, Access::Read)?;
        if chain.iter().any(|above| above.file().id() == file.id()) {
            let what = "parent cycle: the image is its own backing file, over others or directly";
            return Err(Error::corrupt(what).on(&real));
        }
        if chain.len() == MAX_DEPTH {
            let what = format!("the chain of backing files is longer than {MAX_DEPTH}");
            return Err(Error::unsupported(what)
                .on(path)
                .fix("Merge it into fewer files with qemu-img convert"));
        }
        let backing = match format {
            BackingFormat::Raw => {
                chain.push(Arc::new(RawDelta::new(file)?));
                None
            }
            _ => {
                let delta = Qcow2Delta::open(file)?;
                let backing = delta.backing();
                chain.push(Arc::new(delta));
                backing
            }
        };
        let Some(backing) = backing else { break };
        format = judge_format(&backing, &real)?;
        named = named.parent().unwrap_or(Path::new("")).join(&backing.name);
        real = judge_place(store, &named, &real, &allowed)?;
    }
    chain.reverse();
    Ok(chain)
}

/// The backing format, where it is recorded and one that is handled.
fn judge_format(backing: &Backing, image: &Path) -> Result<BackingFormat> {
    let name = &backing.name;
    let (what, fix) = match &backing.format {
        Some(format @ (BackingFormat::Raw | BackingFormat::Qcow2)) => return Ok(format.clone()),
        Some(BackingFormat::Parallels) => (
            format!("the backing file {name:?} is a Parallels image, which qcow2 cannot sit on"),
            "Make a qcow2 image of both with qemu-img convert".to_owned(),
        ),
        Some(BackingFormat::Other(format)) => (
            format!("the backing file {name:?} has the format {format:?}"),
            "Only raw and qcow2 are handled; make a qcow2 image of both with qemu-img convert"
                .to_owned(),
        ),
        None => (
            format!(
                "the format of the backing file {name:?} is not recorded, and format probing is \
                 never done: a guest can make its raw disk look like any format"
            ),
            format!(
                "Record it: qemu-img rebase -u -b {name:?} -F FORMAT {}",
                image.display()
            ),
        ),
    };
    Err(Error::unsupported(what).on(image).fix(fix))
}

/// The real path of the backing file `named`, if it lies where it may.
fn judge_place(
    store: &dyn Store,
    named: &Path,
    image: &Path,
    allowed: &[PathBuf],
) -> Result<PathBuf> {
    let real = store
        .resolve(named)
        .map_err(|e| e.while_doing(format!("open the backing file of {}", image.display())))?;
    if allowed.iter().any(|dir| real.starts_with(dir)) {
        return Ok(real);
    }
    let dir = real.parent().unwrap_or(Path::new("/")).display();
    let what = format!(
        "the backing file of {} lies outside its directory",
        image.display()
    );
    let fix = format!("If that is meant, allow its directory with --allow-dir {dir}");
    Err(Error::new(Kind::Permission, what).on(&real).fix(fix))
}
