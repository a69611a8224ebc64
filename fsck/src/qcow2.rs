//! A qcow2 image and the files below it: headers, tables, in-use bit, refcounts.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::disk::open::OpenOptions;
use ploop::format::qcow2::{AuditKind, BackingFormat, Qcow2Delta, open_chain};
use ploop::format::{Delta, Place, Run};
use ploop::locks::{Use, lock_image};
use ploop::store::{Access, Store, StoreFile};
use ploop::verify::Class;
use ploop::{Error, Kind, Result};

use crate::report::{Finding, Findings};

/// Guest clusters looked at in one step.
const STEP_CLUSTERS: u64 = 1 << 16;

/// Checks the image at `path`, which is resolved, and all below it.
pub(crate) fn check(
    store: &dyn Store,
    path: &Path,
    options: &OpenOptions,
    found: &mut Findings,
) -> Result<()> {
    let mut allowed: Vec<&Path> = options.allow.iter().map(PathBuf::as_path).collect();
    allowed.extend(path.parent());
    let chain = match open_chain(store, path, &allowed) {
        Ok(chain) => chain,
        Err(e) => return broken(store, path, e, found),
    };
    for delta in &chain {
        lock_image(delta.file().as_ref(), Use::Read)?;
    }
    let mut above: Option<BackingFormat> = None;
    for delta in chain.iter().rev() {
        if above == Some(BackingFormat::Raw) {
            break;
        }
        above = check_one(delta.file(), found)?;
    }
    Ok(())
}

/// What an error at opening the chain means.
fn broken(store: &dyn Store, path: &Path, e: Error, found: &mut Findings) -> Result<()> {
    let kind = match e.kind() {
        Kind::Corrupt if e.what().starts_with("parent cycle") => "parent-cycle",
        Kind::Corrupt => header_kind(&e),
        Kind::Unsupported if names_no_format(store, &e) => "format-probing",
        Kind::NotFound => "missing-file",
        Kind::Permission => "path-outside",
        _ => return Err(e),
    };
    found.corrupt(kind, path, &e);
    Ok(())
}

/// True when the image that the error is about has a backing file of no recorded format.
fn names_no_format(store: &dyn Store, e: &Error) -> bool {
    let Some(path) = e.path() else { return false };
    let file = store.open(path, Access::Read);
    let delta = file.and_then(Qcow2Delta::open);
    delta.is_ok_and(|d| d.backing().is_some_and(|b| b.format.is_none()))
}

fn header_kind(e: &Error) -> &'static str {
    match e.offset() {
        _ if e.what().starts_with("the file ends inside the header") => "header-truncated",
        Some(72) => "corrupt-bit",
        Some(0) => "bad-signature",
        Some(24) => "size-overflow",
        Some(8) => "bad-path",
        Some(20) => "bad-cluster-size",
        Some(36) => "entry-count-mismatch",
        _ => "unreadable",
    }
}

/// One image of the chain; gives the format of the file below it.
fn check_one(file: &Arc<dyn StoreFile>, found: &mut Findings) -> Result<Option<BackingFormat>> {
    let delta = Qcow2Delta::open(file.clone())?;
    if delta.is_dirty() {
        let what = "the image was not closed cleanly (dirty bit): its refcounts may be wrong";
        found.add(Finding {
            offset: 72,
            ..Finding::new("in-use", Class::Dirty, file.path(), what.into())
        });
    }
    let cluster = delta.cluster_bytes();
    let mut runs: Vec<Run> = Vec::new();
    // (file bytes, first guest byte), for those that are plain.
    let mut used: Vec<(Range<u64>, u64)> = Vec::new();
    let mut at = 0;
    while at < delta.size() {
        let end = at.saturating_add(STEP_CLUSTERS * cluster).min(delta.size());
        runs.clear();
        delta.map(at..end, &mut runs)?;
        for run in &runs {
            match run.place {
                Place::File(offset) => push(&mut used, offset..offset + run.len, run.offset),
                Place::Fault => faults(&delta, run, found),
                _ => {}
            }
        }
        at = end;
    }
    overlaps(file.path(), cluster, used, found);
    audit(&delta, found)?;
    Ok(delta.backing().and_then(|b| b.format))
}

/// Refcounts, internal snapshots, bitmaps.
fn audit(delta: &Qcow2Delta, found: &mut Findings) -> Result<()> {
    let dirty = delta.is_dirty();
    delta.audit(&mut |f| {
        let (kind, class) = match f.kind {
            AuditKind::BadRefcountTable => ("bad-refcount-table", Class::Corrupt),
            // What an image that was not closed counts is known to be old.
            AuditKind::RefcountTooLow if dirty => ("refcount-too-low", Class::Dirty),
            AuditKind::CopiedFlag if dirty => ("copied-flag", Class::Dirty),
            AuditKind::RefcountTooLow => ("refcount-too-low", Class::Corrupt),
            AuditKind::CopiedFlag => ("copied-flag", Class::Corrupt),
            AuditKind::RefcountTooHigh => ("refcount-too-high", Class::Leak),
            AuditKind::LeakedClusters => ("leaked-clusters", Class::Leak),
            AuditKind::LeakedTail => ("leaked-tail", Class::Leak),
            AuditKind::BadSnapshotTable => ("bad-snapshot-table", Class::Corrupt),
            AuditKind::BadBitmapTable => ("bad-bitmap-table", Class::Corrupt),
            AuditKind::BitmapInUse => ("bitmap-in-use", Class::Dirty),
            _ => ("unreadable", Class::Corrupt),
        };
        found.add(Finding {
            offset: f.offset,
            cluster: f.cluster,
            ..Finding::new(kind, class, delta.file().path(), f.what)
        });
    })
}

/// Adds file bytes, joined to those before where both go on.
fn push(used: &mut Vec<(Range<u64>, u64)>, bytes: Range<u64>, guest: u64) {
    match used.last_mut() {
        Some((last, first))
            if last.end == bytes.start && *first + (last.end - last.start) == guest =>
        {
            last.end = bytes.end;
        }
        _ => used.push((bytes, guest)),
    }
}

/// One finding for a run of faults: the first says how.
fn faults(delta: &Qcow2Delta, run: &Run, found: &mut Findings) {
    let e = delta.fault(run.offset);
    let what = e.what();
    let kind = if what.contains("past the end") {
        "entry-beyond-eof"
    } else if what.contains("off the cluster grid") {
        "misaligned-entry"
    } else if what.contains("points into") {
        "entry-in-metadata"
    } else {
        "unreadable"
    };
    found.add(Finding {
        offset: e.offset().unwrap_or(0),
        guest: Some(run.offset..run.offset + run.len),
        ..Finding::new(kind, Class::Corrupt, delta.file().path(), what.to_owned())
    });
}

/// Guest clusters that share a cluster of the file.
fn overlaps(path: &Path, cluster: u64, mut used: Vec<(Range<u64>, u64)>, found: &mut Findings) {
    used.sort_unstable_by_key(|(bytes, _)| (bytes.start, bytes.end));
    let mut reach: Option<(Range<u64>, u64)> = None;
    for (bytes, guest) in used {
        if let Some((before, first)) = &reach
            && bytes.start < before.end
        {
            let shared = bytes.start..bytes.end.min(before.end);
            let other = first + (shared.start - before.start);
            let what = format!("guest bytes {other} and {guest} are the same bytes of the file");
            found.add(Finding {
                offset: shared.start,
                cluster: Some(shared.start / cluster),
                guest: Some(guest..guest + (shared.end - shared.start)),
                ..Finding::new("duplicate-entry", Class::Corrupt, path, what)
            });
        }
        if reach.as_ref().is_none_or(|(b, _)| bytes.end > b.end) {
            reach = Some((bytes, guest));
        }
    }
}
