//! `ploop check` of a disk that is open: by the process that has it, on what is in its files.
//!
//! ```text
//!  flush ─► look beside the writers ──nothing of the top──► that is the answer
//!                    │ something, up to LOOKS times: it may be a change seen half
//!                    └──► look again at a barrier, while no change is under way
//! ```
//!
//! A sound disk is checked without holding anybody up. One with a finding in its top holds its
//! writers up for one look at its tables, and then what is said is so.

use std::path::Path;

use fsck::Report;
use ploop::device::Device;
use ploop::error::Result;

use crate::snapshot::Live;

/// Looks beside the writers, at most.
const LOOKS: usize = 3;

/// Checks an open disk with all its images, parent volumes included. Writes what was answered and
/// not flushed, as a flush does, and nothing else. Waits for whoever rearranges the disk. Blocks;
/// reads the tables of every image.
///
/// Errors: `Latched`, which says that an earlier write failed; those of [`fsck::check`].
pub fn check(live: Live<'_>) -> Result<Report> {
    let (place, disk) = (live.place, live.disk);
    let _arranging = disk.arrange();
    disk.settle(place.opener())?;
    let top = place.store().resolve(&disk.top_file()?)?;
    disk.flush()?;
    let look = || {
        let (source, options) = (place.source(None), place.open_options(false));
        fsck::check_held(place.opener(), &source, &options, &top)
    };
    for _ in 0..LOOKS {
        let report = look()?;
        if !concerns(&report, &top) {
            return Ok(report);
        }
    }
    // The one place where there is I/O behind a closed gate: reads of the tables, which wait for
    // nobody. Entries that a flush writes meanwhile are of clusters that are there.
    let _still = disk.barrier();
    look()
}

fn concerns(report: &Report, top: &Path) -> bool {
    report.findings.iter().any(|f| f.file == top) || report.findings.len() >= fsck::FINDINGS_MAX
}
