//! Doing what a plan says.
//!
//! | step | of each image, in the plan's order | durable before the next |
//! |---|---|---|
//! | 0 | the undo file, with all that follows, and its name | yes |
//! | 1 | from a backup: the table behind the first sector; then that, and the length | each |
//! | 2 | entries that become 0 | yes |
//! | 3 | the file grows; clusters are copied | yes |
//! | 4 | entries of the copies | yes |
//! | 5 | the end is cut; the header, all of it | yes |
//! | 6 | files are moved; the descriptor is replaced | yes |
//!
//! A bad entry is gone before the file grows, so it never names what comes to be where it points.
//! An entry names a copy only when that is there. The header comes last: an image that could not be
//! opened cannot until then, and the mark of one that was not closed stays that long. Cut anywhere, the undo file takes it back, and a repair begun anew ends like the first.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::disk::open::Opener;
use ploop::store::{Access, SECTOR, Store, StoreFile, read_or_zero};
use ploop::{Error, Kind, Result};

use super::changes::Changes;
use super::disk::{Survey, survey};
use super::fields::HeaderBytes;
use super::files::Files;
use super::names::{put_away, replace, still_free, undo_name};
use super::record::{PIECE, Record, Writer};
use super::save::save;
use super::view::View;
use super::{Move, Plan, Remark, Step};
use crate::progress::{Meter, Progress, Stage};
use crate::report::Report;

/// How far a repair goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Only what loses nothing.
    Preen,
    /// Everything.
    Yes,
}

/// What a repair did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was done, with what was lost by it.
    pub done: Vec<Step>,
    /// What was not done, because it loses something.
    pub remaining: Vec<Step>,
    /// What cannot be repaired.
    pub unrepairable: Vec<Remark>,
    /// What is left to another command.
    pub left: Vec<Remark>,
    /// What takes it back; `None` when nothing was changed.
    pub undo: Option<PathBuf>,
    /// What the checker says now.
    pub after: Report,
}

/// Repairs as `plan` says. Writes the undo file to `undo_path`, which must be free, or else to a
/// new name in the disk's own directory (beside a single image).
///
/// Errors: `Invalid` when a file is not as it was planned for; `InUse`; `Exists`; those of writing,
/// with what takes back what was done by then.
pub fn apply(opener: &Opener, plan: &Plan, how: How, undo_path: Option<&Path>) -> Result<Outcome> {
    apply_with(opener, plan, how, undo_path, &mut ())
}

/// [`apply`], telling how far it is.
pub fn apply_with(
    opener: &Opener,
    plan: &Plan,
    how: How,
    undo_path: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<Outcome> {
    let mut chosen = Chosen::of(plan, how);
    for step in chosen.done.iter_mut().chain(&mut chosen.remaining) {
        let same = |s: &&Step| s.file == step.file && s.what == step.what && s.lost == step.lost;
        step.files = plan.steps.iter().find(same).and_then(|s| s.files.clone());
    }
    let mut undo = None;
    if !chosen.is_empty() {
        undo = Some(change(opener, plan, &chosen, undo_path, progress)?);
    }
    // Another opener: what this one has shared of the images was read before.
    let fresh = Opener::on(opener.store().clone());
    let after = crate::check(&fresh, &plan.source, &plan.options)?;
    Ok(Outcome {
        done: chosen.done,
        remaining: chosen.remaining,
        unrepairable: plan.unrepairable.clone(),
        left: plan.left.clone(),
        undo,
        after,
    })
}

/// The part of a plan that is to be done.
#[derive(Default)]
struct Chosen<'a> {
    images: Vec<&'a Changes>,
    moves: Vec<&'a Move>,
    descriptor: bool,
    done: Vec<Step>,
    remaining: Vec<Step>,
}

impl<'a> Chosen<'a> {
    fn of(plan: &'a Plan, how: How) -> Chosen<'a> {
        let mut out = Chosen::default();
        if !plan.unrepairable.is_empty() {
            return out;
        }
        let all = how == How::Yes;
        let mut skipped = BTreeSet::new();
        for image in &plan.survey.images {
            if all || image.automatic() {
                out.done.extend(image.steps.iter().cloned());
                out.images.extend(&image.changes);
            } else {
                out.remaining.extend(image.steps.iter().cloned());
                skipped.insert(&image.path);
            }
        }
        for step in plan.survey.moves.iter().chain(&plan.moves) {
            let image_done = step.with.as_ref().is_none_or(|w| !skipped.contains(w));
            if all || step.automatic && image_done {
                out.done.push(step.step());
                out.moves.push(step);
            } else {
                out.remaining.push(step.step());
            }
        }
        if let Some(rewrite) = &plan.survey.descriptor {
            // It says what the header of the top says after its repair.
            out.descriptor = skipped.is_empty();
            match out.descriptor {
                true => out.done.push(rewrite.step()),
                false => out.remaining.push(rewrite.step()),
            }
        }
        out
    }

    fn is_empty(&self) -> bool {
        self.images.is_empty() && self.moves.is_empty() && !self.descriptor
    }
}

/// One image that is being changed.
struct Patient<'a> {
    file: Arc<dyn StoreFile>,
    view: View,
    changes: &'a Changes,
}

fn change(
    opener: &Opener,
    plan: &Plan,
    chosen: &Chosen<'_>,
    undo_path: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let store = opener.store();
    let _lock = match plan.source.descriptor && opener.locks_disks() {
        true => Some(opener.lock_disk(&plan.root)?),
        false => None,
    };
    let written = chosen.images.iter().map(|c| c.path.clone()).collect();
    let mut files = Files::writing(store, written);
    let real = store.resolve(&plan.source.path)?;
    let mut meter = Meter::new(&mut *progress, Stage::Plan, 0);
    let now = survey(opener, &mut files, &real, plan, &mut meter)?;
    same(plan, &now)?;
    for step in &chosen.moves {
        still_free(store.as_ref(), step)?;
    }
    let mut patients = Vec::new();
    for changes in &chosen.images {
        let file = files.image(&changes.path)?;
        let backup = match &changes.backup {
            Some((path, _)) => Some(store.open(path, Access::Read)?),
            None => None,
        };
        patients.push(Patient {
            view: changes.view(&file, backup.as_ref())?,
            file,
            changes,
        });
    }
    let undo = match undo_path {
        Some(path) => path.to_path_buf(),
        None => undo_name(store.as_ref(), plan, &real)?,
    };
    let written = write_undo(store.as_ref(), plan, chosen, &patients, &undo);
    if let Err(e) = written {
        // Nothing was changed: an undo file says nothing then.
        if e.kind() != Kind::Exists {
            drop(store.remove_file(&undo));
        }
        return Err(e);
    }
    let bytes = patients.iter().map(|p| p.changes.bytes()).sum();
    let mut meter = Meter::new(progress, Stage::Apply, bytes);
    let done = patients
        .iter()
        .try_for_each(|p| p.change(&mut meter))
        .and_then(|()| put_away(store.as_ref(), plan, &chosen.moves))
        .and_then(|()| match &plan.survey.descriptor {
            Some(rewrite) if chosen.descriptor => {
                replace(store.as_ref(), &rewrite.path, &rewrite.new)
            }
            _ => Ok(()),
        });
    done.map_err(|e| {
        let fix = format!(
            "The repair was cut short. Repair again with another undo file, or take back what was \
             done: ploop check --undo {}",
            undo.display()
        );
        e.fix(fix)
    })?;
    Ok(undo)
}

/// Refuses when the files are not what the plan is about.
fn same(plan: &Plan, now: &Survey) -> Result<()> {
    match plan.survey == *now {
        true => Ok(()),
        false => Err(
            Error::invalid("it was changed since the repair was planned")
                .on(&plan.source.path)
                .fix("Plan again"),
        ),
    }
}

fn relative<'a>(plan: &Plan, path: &'a Path) -> Result<&'a Path> {
    path.strip_prefix(&plan.root)
        .map_err(|_| Error::new(Kind::Permission, "outside of the disk's directory").on(path))
}

fn write_undo(
    store: &dyn Store,
    plan: &Plan,
    chosen: &Chosen<'_>,
    patients: &[Patient<'_>],
    path: &Path,
) -> Result<()> {
    let mut out = Writer::create(store, path)?;
    out.put(&Record::Root(plan.root.clone()))?;
    for p in patients {
        let name = relative(plan, &p.changes.path)?;
        save(&mut out, name, &p.file, &p.view, p.changes)?;
    }
    for step in &chosen.moves {
        out.put(&Record::Move {
            from: relative(plan, &step.from)?.to_path_buf(),
            to: relative(plan, &step.to)?.to_path_buf(),
        })?;
    }
    if let Some(rewrite) = plan
        .survey
        .descriptor
        .as_ref()
        .filter(|_| chosen.descriptor)
    {
        out.put(&Record::Replace {
            name: relative(plan, &rewrite.path)?.to_path_buf(),
            old: rewrite.old.clone(),
            new: rewrite.new.clone(),
        })?;
    }
    out.finish()?;
    store.sync_dir(
        path.parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new(".")),
    )
}

impl Patient<'_> {
    fn change(&self, meter: &mut Meter<'_>) -> Result<()> {
        let (file, c) = (self.file.as_ref(), self.changes);
        if let Some((_, len)) = &c.backup {
            return self.restore(*len, meter);
        }
        let zeroed: Vec<(u64, u32)> = c.zeroed.iter().map(|&at| (at, 0)).collect();
        write_entries(file, &zeroed)?;
        if c.grown > c.len {
            file.set_len(c.grown)?;
        }
        self.copy(meter)?;
        if c.grown > c.len || !c.copies.is_empty() {
            file.sync()?;
        }
        write_entries(file, &c.moved)?;
        self.finish(c.header.as_ref().map(HeaderBytes::as_slice))
    }

    /// Header and BAT from the backup; what else there is to do is in the view.
    fn restore(&self, len: u64, meter: &mut Meter<'_>) -> Result<()> {
        let file = self.file.as_ref();
        if self.changes.grown > self.changes.len {
            file.set_len(self.changes.grown)?;
        }
        let mut buf = vec![0; PIECE];
        let mut at = SECTOR;
        while at < len {
            let n = (len - at).min(PIECE as u64) as usize;
            let piece = &mut buf[..n];
            read_or_zero(&self.view, piece, at)?;
            // Holes stay holes.
            let hole = file.next_data(at, at + n as u64)?.is_none();
            if !hole || piece.iter().any(|&b| b != 0) {
                file.write_at(piece, at)?;
            }
            meter.add(n as u64);
            at += n as u64;
        }
        file.sync()?;
        let mut first = [0; SECTOR as usize];
        read_or_zero(&self.view, &mut first, 0)?;
        self.finish(Some(&first))
    }

    /// Copies what is there; holes stay holes.
    fn copy(&self, meter: &mut Meter<'_>) -> Result<()> {
        let file = self.file.as_ref();
        let mut buf = vec![0; PIECE];
        for copy in &self.changes.copies {
            let (mut at, end) = (copy.from, copy.from + copy.len);
            let to = |at: u64| copy.to + (at - copy.from);
            while at < end {
                let data = file.next_data(at, end)?.unwrap_or(end..end);
                clear(file, to(at)..to(data.start))?;
                at = data.start;
                while at < data.end {
                    let n = (data.end - at).min(PIECE as u64);
                    let piece = &mut buf[..n as usize];
                    read_or_zero(file, piece, at)?;
                    file.write_at(piece, to(at))?;
                    at += n;
                }
            }
            meter.add(copy.len);
        }
        Ok(())
    }

    /// The length, and what makes the image a clean one. With either of them alone it is one that
    /// has a tail, or is still marked.
    fn finish(&self, head: Option<&[u8]>) -> Result<()> {
        let (file, c) = (self.file.as_ref(), self.changes);
        if c.end != c.grown {
            file.set_len(c.end)?;
        }
        if let Some(head) = head {
            file.write_at(head, 0)?;
        }
        match head.is_some() || c.end != c.grown {
            true => file.sync(),
            false => Ok(()),
        }
    }
}

/// Makes the range read as zeros, where it does not yet.
fn clear(file: &dyn StoreFile, range: Range<u64>) -> Result<()> {
    let mut at = range.start;
    while at < range.end
        && let Some(data) = file.next_data(at, range.end)?
    {
        file.punch(data.start, data.end - data.start)?;
        at = data.end;
    }
    Ok(())
}

/// Writes BAT entries, ascending by their byte, in sectors.
fn write_entries(file: &dyn StoreFile, entries: &[(u64, u32)]) -> Result<()> {
    let mut buf = vec![0; PIECE];
    let mut rest = entries;
    while let Some(&(first, _)) = rest.first() {
        let start = first / SECTOR * SECTOR;
        let here = rest.partition_point(|(at, _)| at + 4 <= start + PIECE as u64);
        let (now, later) = rest.split_at(here);
        let end = now.last().map_or(start, |(at, _)| at + 4);
        // Only up to the last entry: behind it the file may end.
        let piece = &mut buf[..(end - start) as usize];
        read_or_zero(file, piece, start)?;
        for (at, entry) in now {
            let from = (at - start) as usize;
            piece[from..from + 4].copy_from_slice(&entry.to_le_bytes());
        }
        file.write_at(piece, start)?;
        rest = later;
    }
    match entries.is_empty() {
        true => Ok(()),
        false => file.sync(),
    }
}
