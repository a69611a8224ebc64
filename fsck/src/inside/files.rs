//! Which files of the guest lost bytes belong to.

use std::ops::Range;

use ploop::Result;
use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::open::{OpenOptions, Opener, Source};

use super::ext;
use super::table::{self, System, Volume};
use super::view::View;
use crate::progress::Progress;
use crate::repair::{Plan, Step};

/// Files that a step names; more are counted.
pub const FILES_MAX: usize = 100;
/// Guest bytes of a step whose files are looked for.
const LOOK_MAX: u64 = 256 << 20;

/// Files of the guest that a repair step loses bytes of, or leaves doubtful.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// Their paths in their file system, in order; [`FILES_MAX`] at most.
    pub first: Vec<String>,
    /// How many there are beside these.
    pub more: u64,
    /// What else there is to say: bytes of no file, or why it cannot be told.
    pub note: String,
}

/// Looks for the files that each step of the plan loses bytes of, or leaves doubtful, in the file
/// system as the image of that step has it. Writes nothing but a nameless copy, as
/// [`super::check`].
///
/// Errors: as [`super::check`]. What cannot be told is said in [`Files::note`].
pub fn name_files(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    plan: &mut Plan,
    progress: &mut dyn Progress,
) -> Result<()> {
    let harms = |s: &Step| !(s.lost.is_empty() && s.suspect.is_empty());
    let mut nodes: Vec<Option<Guid>> = Vec::new();
    for step in plan.steps.iter().filter(|s| harms(s)) {
        let node = step.snapshots.first().copied();
        if !nodes.contains(&node) {
            nodes.push(node);
        }
    }
    for node in nodes {
        let source = Source {
            snapshot: node.map(|n| n.to_string()),
            ..source.clone()
        };
        let options = OpenOptions {
            write: false,
            ..options.clone()
        };
        let steps = plan.steps.iter_mut().filter(|s| harms(s));
        let steps: Vec<&mut Step> = steps
            .filter(|s| s.snapshots.first().copied() == node)
            .collect();
        match opener.open(&source, &options) {
            Ok(disk) => of_disk(&disk, steps, progress)?,
            Err(e) => {
                for step in steps {
                    step.files = Some(Files {
                        note: format!("not known: the disk cannot be opened ({})", e.what()),
                        ..Files::default()
                    });
                }
            }
        }
    }
    Ok(())
}

fn of_disk(
    disk: &dyn Device,
    mut steps: Vec<&mut Step>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let volumes = table::volumes(disk)?;
    let mut found: Vec<Found> = steps.iter().map(|_| Found::default()).collect();
    for volume in &volumes {
        let inside: Vec<Vec<Range<u64>>> = steps.iter().map(|s| clipped(s, volume)).collect();
        if inside.iter().all(Vec::is_empty) {
            continue;
        }
        let view = match volume.system {
            System::Ext => View::of(disk, &volume.range, progress)?,
            other => {
                let name = match other {
                    System::Other(name) => name,
                    _ => "xfs, which cannot be asked by block",
                };
                for (f, _) in found.iter_mut().zip(&inside).filter(|(_, r)| !r.is_empty()) {
                    f.notes.push(format!("{} is {name}", volume.name));
                }
                continue;
            }
        };
        for (f, ranges) in found.iter_mut().zip(&inside).filter(|(_, r)| !r.is_empty()) {
            let (ranges, cut) = first_of(ranges);
            match ext::owners(&view, &ranges) {
                Ok(owned) => f.add(volume, owned, cut),
                Err(e) if e.kind() == ploop::Kind::NotFound => return Err(e),
                Err(e) => f
                    .notes
                    .push(format!("{}: not known ({})", volume.name, e.what())),
            }
        }
    }
    for (step, found) in steps.iter_mut().zip(found) {
        step.files = Some(found.into_files());
    }
    Ok(())
}

/// The step's bytes within the volume, counted from its start.
fn clipped(step: &Step, volume: &Volume) -> Vec<Range<u64>> {
    let v = &volume.range;
    let all = step.lost.iter().chain(&step.suspect);
    all.map(|r| r.start.max(v.start)..r.end.min(v.end))
        .filter(|r| r.start < r.end)
        .map(|r| r.start - v.start..r.end - v.start)
        .collect()
}

/// The first bytes of them that are looked up; true when there are more.
fn first_of(ranges: &[Range<u64>]) -> (Vec<Range<u64>>, bool) {
    let mut left = LOOK_MAX;
    let mut out = Vec::new();
    for r in ranges {
        let n = (r.end - r.start).min(left);
        if n > 0 {
            out.push(r.start..r.start + n);
        }
        if n < r.end - r.start {
            return (out, true);
        }
        left -= n;
    }
    (out, false)
}

#[derive(Debug, Default)]
struct Found {
    paths: Vec<String>,
    notes: Vec<String>,
}

impl Found {
    fn add(&mut self, volume: &Volume, owned: ext::Owned, cut: bool) {
        let name = &volume.name;
        self.paths.extend(owned.paths);
        for (n, what) in [
            (
                owned.nameless,
                "deleted files that are still open, or without a name",
            ),
            (
                owned.own,
                "bytes of the file system's own journal or reserve",
            ),
            (
                owned.of_none,
                "bytes of no file: free space, or the file system's tables",
            ),
        ] {
            if n > 0 {
                self.notes.push(format!("{name}: {n} {what}"));
            }
        }
        if owned.cut {
            let note = format!("{name}: debugfs said more than is kept; there may be more files");
            self.notes.push(note);
        }
        if cut {
            let note = format!("{name}: only the first {LOOK_MAX} bytes were looked up");
            self.notes.push(note);
        }
    }

    fn into_files(mut self) -> Files {
        let more = self.paths.len().saturating_sub(FILES_MAX) as u64;
        self.paths.truncate(FILES_MAX);
        if self.paths.is_empty() && self.notes.is_empty() {
            self.notes
                .push("none: it is outside of every file system".into());
        }
        Files {
            first: self.paths,
            more,
            note: self.notes.join("; "),
        }
    }
}
