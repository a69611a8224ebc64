//! The file system inside a disk: checked by its own tool, read-only, and asked whose bytes are lost.
//!
//! ```text
//!  guest view ─ table ─► volumes ─ view ─► nameless copy ─┬─ ext  e2fsck -n; debugfs: block → file
//!                                                         └─ xfs  xfs_repair -n
//! ```
//!
//! The tools open files and devices only, and what they may write must not be the disk: each gets a
//! sparse private copy of its volume. On that copy a journal can be replayed, so a disk that was
//! stopped in the middle is judged as its next mount will find it. The copy has no name: nothing of
//! it is left, however this ends.

mod ext;
mod files;
mod table;
mod tool;
mod view;
mod xfs;

use std::path::Path;

use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::verify::Class;
use ploop::{Kind, Result};

use crate::progress::Progress;
use crate::report::{Finding, Report};

pub use files::{FILES_MAX, Files, name_files};
pub use tool::{Said, run_command};

use table::{System, Volume};
use view::View;

/// Adds to `report`, which [`crate::check`] made of this source, what is wrong with the file systems
/// of the disk's top. Writes nothing but a nameless copy in `TMPDIR` or /var/tmp.
///
/// Errors: `NotFound` for a tool that is not installed; `NoSpace` for the copy; `Io`. A disk that
/// cannot be opened is a finding.
pub fn check(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    report: &mut Report,
    progress: &mut dyn Progress,
) -> Result<()> {
    let file = opener.store().resolve(&source.path)?;
    let options = OpenOptions {
        write: false,
        ..options.clone()
    };
    let disk = match opener.open(source, &options) {
        Ok(disk) => disk,
        Err(e) if matches!(e.kind(), Kind::Io | Kind::InUse) => return Err(e),
        Err(e) => {
            let what = format!("the disk cannot be opened: {}", e.what());
            report.add(Finding::new("fs-unknown", Class::Clean, &file, what));
            return Ok(());
        }
    };
    let volumes = table::volumes(&disk)?;
    if volumes.is_empty() {
        let what = "neither a file system that is known here nor a partition";
        report.add(Finding::new("fs-unknown", Class::Clean, &file, what.into()));
    }
    for volume in &volumes {
        let found = match volume.system {
            System::Other(name) => vec![Found::unknown(format!("{name}, not checked here"))],
            System::Ext => ext::check(&View::of(&disk, &volume.range, progress)?)?,
            System::Xfs => xfs::check(&View::of(&disk, &volume.range, progress)?)?,
        };
        for f in found {
            report.add(f.finding(&file, volume));
        }
    }
    Ok(())
}

/// What is said of one volume.
#[derive(Debug)]
struct Found {
    kind: &'static str,
    class: Class,
    what: String,
}

impl Found {
    fn errors(what: String) -> Found {
        Found {
            kind: "fs-errors",
            class: Class::Corrupt,
            what,
        }
    }

    fn unclean(what: String) -> Found {
        Found {
            kind: "fs-unclean",
            class: Class::Dirty,
            what,
        }
    }

    fn unknown(what: String) -> Found {
        Found {
            kind: "fs-unknown",
            class: Class::Clean,
            what,
        }
    }

    fn finding(self, file: &Path, volume: &Volume) -> Finding {
        let what = format!("{}: {}", volume.name, self.what);
        Finding {
            guest: Some(volume.range.clone()),
            ..Finding::new(self.kind, self.class, file, what)
        }
    }
}
