//! Repair: plan, apply, undo.
//!
//! ```text
//!  plan   reads ──► Plan: steps (what, what is lost, what is doubtful), what cannot be repaired
//!  apply  locks ─► plan again, the same? ─► undo file, durable ─► changes, in order ─► check
//!  undo   undo file whole? ─► every sector old or new? ─► bytes and lengths as they were
//! ```
//!
//! * Nothing is guessed: what header, BAT and file do not say is not repaired ([`Plan::unrepairable`]),
//!   and then nothing of the disk is touched.
//! * *Automatic* steps lose nothing: every guest byte that could be read before reads the same
//!   after, in every snapshot. All others name guest ranges: *lost* ones, whose bytes are gone, and
//!   *suspect* ones, which read what they read before (or can be read at last), and may be another
//!   cluster's bytes.
//! * [`How::Preen`] leaves a file that has any other step as it is, entirely. [`How::Yes`] makes all.
//! * What an operation of ours, or OpenVZ's, left half-way and can finish is not repaired away
//!   ([`Plan::left`]): the sentence says what finishes it. A journal that can be replayed belongs to
//!   opening.
//! * qcow2 images are checked and not repaired.

mod apply;
mod back;
mod changes;
mod disk;
mod entries;
mod fields;
mod files;
mod geometry;
mod image;
mod journal;
mod leftovers;
mod names;
mod ranges;
mod record;
mod save;
mod tree;
mod view;

use std::ops::Range;
use std::path::{Path, PathBuf};

use ploop::descriptor::Guid;
use ploop::disk::open::{Format, OpenOptions, Opener, Source};
use ploop::store::Access;
use ploop::{Error, Result};

use crate::inside::Files;
use crate::progress::{Meter, Progress, Stage};

pub use apply::{How, Outcome, apply, apply_with};
pub use back::{Undone, undo};

use disk::Survey;

/// One thing that repair does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// To which file.
    pub file: PathBuf,
    /// What is wrong, and what is done about it.
    pub what: String,
    /// Guest ranges whose bytes are gone. Nothing brings them back but a copy from elsewhere; where
    /// there are images below, what those hold shows.
    pub lost: Vec<Range<u64>>,
    /// Guest ranges that can be read and may hold another's bytes.
    pub suspect: Vec<Range<u64>>,
    /// What else is given up.
    pub gives_up: Option<String>,
    /// It loses nothing, and is done without asking.
    pub automatic: bool,
    /// The nodes of the disk that read this file, where it is a disk's.
    pub snapshots: Vec<Guid>,
    /// The guest's files that `lost` and `suspect` are in, where somebody asked for them
    /// ([`crate::inside::name_files`]).
    pub files: Option<Files>,
}

impl Step {
    fn new(file: &Path, what: String) -> Step {
        Step {
            file: file.to_path_buf(),
            what,
            lost: Vec::new(),
            suspect: Vec::new(),
            gives_up: None,
            automatic: false,
            snapshots: Vec::new(),
            files: None,
        }
    }

    /// The guest reads something else afterwards, or may.
    fn changes_what_is_shown(&self) -> bool {
        !self.lost.is_empty() || !self.suspect.is_empty()
    }
}

/// Something that repair does not touch, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// About which file.
    pub file: PathBuf,
    /// One sentence.
    pub what: String,
}

/// A file that is put elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Move {
    from: PathBuf,
    to: PathBuf,
    /// The image whose repair it belongs to.
    with: Option<PathBuf>,
    automatic: bool,
}

/// What repair would do. Made by [`plan`], given to [`apply()`].
#[derive(Clone, Debug)]
pub struct Plan {
    /// What would be done, in order.
    pub steps: Vec<Step>,
    /// What cannot be repaired. If there is any, nothing is done.
    pub unrepairable: Vec<Remark>,
    /// What is left to another command, which the sentence names.
    pub left: Vec<Remark>,
    source: Source,
    options: OpenOptions,
    /// The directory that everything is in, resolved.
    root: PathBuf,
    survey: Survey,
    /// Leftovers beside the images.
    moves: Vec<Move>,
}

impl Plan {
    /// Nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Nothing is to be done that loses anything or leaves doubt.
    pub fn is_automatic(&self) -> bool {
        self.steps.iter().all(|s| s.automatic)
    }
}

/// Looks at an image, or at a disk with its images, and says what would repair it. Writes nothing.
/// Complete, whatever the number of faults; memory goes with the entries that the files really have.
///
/// Errors: `Unsupported` for qcow2; `InUse`, `NotFound`, `Io`. What is damaged beyond repair is no
/// error.
pub fn plan(opener: &Opener, source: &Source, options: &OpenOptions) -> Result<Plan> {
    plan_with(opener, source, options, &mut ())
}

/// [`plan`], telling how far it is.
pub fn plan_with(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    progress: &mut dyn Progress,
) -> Result<Plan> {
    if source.snapshot.is_some() {
        return Err(
            Error::invalid("a repair is one of the whole disk, not of a snapshot")
                .on(&source.path)
                .fix("Leave out @SNAPSHOT"),
        );
    }
    let store = opener.store();
    let real = store.resolve(&source.path)?;
    let root = real.parent().unwrap_or(Path::new("/")).to_path_buf();
    let mut plan = Plan {
        steps: Vec::new(),
        unrepairable: Vec::new(),
        left: Vec::new(),
        source: source.clone(),
        options: OpenOptions {
            write: false,
            ..options.clone()
        },
        root: root.clone(),
        survey: Survey::default(),
        moves: Vec::new(),
    };
    if !source.descriptor && !is_ploop(opener, &real, options)? {
        return Ok(plan);
    }
    let mut files = files::Files::new(store);
    let mut meter = Meter::new(progress, Stage::Plan, 0);
    plan.survey = disk::survey(opener, &mut files, &real, &plan, &mut meter)?;
    drop(files);
    plan.steps = plan.survey.steps();
    plan.unrepairable = plan.survey.unrepairable.clone();
    plan.left = plan.survey.left.clone();
    if source.descriptor {
        leftovers::look(opener, &mut plan)?;
    }
    if !plan.unrepairable.is_empty() {
        plan.steps.clear();
    }
    Ok(plan)
}

/// False for a raw image, which nothing can be wrong with. Error: `Unsupported` for qcow2.
fn is_ploop(opener: &Opener, real: &Path, options: &OpenOptions) -> Result<bool> {
    let mut head = [0; 8];
    let got = opener
        .store()
        .open(real, Access::Read)?
        .read_at(&mut head, 0)?;
    let qcow2 = ploop::format::qcow2::is_qcow2(&head[..got]);
    match options.format {
        Some(Format::Raw) => Ok(false),
        None if real.extension().is_some_and(|e| e == "raw") => Ok(false),
        Some(Format::Ploop) => Ok(true),
        format if format == Some(Format::Qcow2) || qcow2 => {
            let fix = format!("qemu-img check -r all {}", real.display());
            Err(
                Error::unsupported("a qcow2 image is checked and not repaired here")
                    .on(real)
                    .fix(fix),
            )
        }
        _ => Ok(true),
    }
}
