//! What is wrong with an image or a disk. Looks only: nothing here writes.
//!
//! ```text
//!  check ─┬─ disk    descriptor, tree, parent volumes, leftovers ─┐
//!         ├─ image   one ploop file: ploop::verify, or the reason  ├─► Findings ─► Report
//!         └─ qcow2   a qcow2 file and those below it              ─┘
//! ```
//!
//! There is one checker of ploop images, [`ploop::verify`]; this crate puts files together and says
//! the result in stable words. Three answers, never mixed up:
//!
//! * a [`Report`]: it was looked at, and this is what is wrong. What contradicts the format so much
//!   that it cannot be opened is a finding of class corrupt, too;
//! * `Unsupported`: sound, as far as one can tell, but not to be judged here; says what it is;
//! * any other error: it could not be looked at (not there, in use, an I/O error).
//!
//! FINDINGS.md has the JSON and every kind of finding; [`kinds`] is the same table for programs.
//! The content of clusters is not looked at, but by [`inside`], which has the guest's file system
//! checked by that file system's own tool.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod descriptor;
mod disk;
mod family;
mod image;
pub mod inside;
mod journal;
pub mod kinds;
mod names;
mod progress;
mod qcow2;
pub mod repair;
mod report;
pub mod text;

use ploop::disk::open::{Format, OpenOptions, Opener, Source};
use ploop::format::qcow2::is_qcow2;
use ploop::locks::{Use, lock_image};
use ploop::store::Access;
use ploop::{Error, Result};
use std::path::Path;

pub use ploop::verify::Class;
pub use progress::{Progress, Stage};
pub use report::{FINDINGS_MAX, Finding, Owners, Report, SNAPSHOTS_MAX};

use progress::Meter;
use report::Findings;

/// Looks at an image, or at a disk with all its images and those of parent volumes that it needs.
/// Writes nothing, whatever `options` say. Blocks; reads the tables of every image.
///
/// Errors: `Unsupported` for what cannot be judged here; `InUse` for what another program writes, or
/// what has not arrived as a whole ([`ploop::store::arriving`]); `NotFound` for the source itself; `Io`. A file that is missing or damaged below the source is a
/// finding.
pub fn check(opener: &Opener, source: &Source, options: &OpenOptions) -> Result<Report> {
    check_with(opener, source, options, &mut ())
}

/// The same for a disk that this process has open for writing with `top` as its top, and whose tree
/// nobody changes meanwhile: no locks are asked for, and what its open top looks like while it is
/// used is no finding (the mark, room ahead, clusters that memory or a journal knows).
///
/// Beside writers a finding of the top can be a change that was seen half. What is found while no
/// change is under way ([`ploop::disk::Disk::barrier`]) is so.
pub fn check_held(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    top: &Path,
) -> Result<Report> {
    look(opener, source, options, Some(top), &mut ())
}

/// [`check`], telling how far it is.
pub fn check_with(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    progress: &mut dyn Progress,
) -> Result<Report> {
    look(opener, source, options, None, progress)
}

fn look(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    held: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<Report> {
    if source.snapshot.is_some() {
        return Err(
            Error::invalid("a check looks at all of a disk, not at one snapshot")
                .on(&source.path)
                .fix("Leave out @SNAPSHOT"),
        );
    }
    let options = OpenOptions {
        write: false,
        ..options.clone()
    };
    let mut found = Findings::default();
    let mut meter = Meter::new(progress, Stage::Check, 0);
    if source.descriptor {
        disk::check(opener, source, &options, held, &mut found, &mut meter)?;
    } else {
        meter.expect(1);
        check_image(opener, source, &options, &mut found)?;
        meter.add(1);
    }
    Ok(found.into_report())
}

fn check_image(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    found: &mut Findings,
) -> Result<()> {
    let store = opener.store();
    let real = store.resolve(&source.path)?;
    opener.refuse_missing(&real)?;
    let file = store.open(&real, Access::Read)?;
    let mut head = [0; 8];
    let got = file.read_at(&mut head, 0)?;
    let format = match options.format {
        Some(format) => format,
        None if source.path.extension().is_some_and(|e| e == "raw") => Format::Raw,
        None if is_qcow2(&head[..got]) => Format::Qcow2,
        None => Format::Ploop,
    };
    match format {
        Format::Raw => lock_image(file.as_ref(), Use::Read),
        Format::Qcow2 => qcow2::check(store.as_ref(), &real, options, found),
        Format::Ploop => {
            lock_image(file.as_ref(), Use::Read)?;
            if let Some(header) = image::check(file.as_ref(), &[], found)? {
                journal::check(store, &real, file.as_ref(), &header, found)?;
            }
            image::check_backup(store.as_ref(), &real, found)
        }
    }
}
