//! What is found and what is repaired, as people read it and as programs do: one place for
//! `ploop check` and `fsck.ploop`. Lines without an end, in the order to print them.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use crate::Report;
use crate::inside::Files;
use crate::repair::{Outcome, Plan, Remark, Step};

/// Guest ranges that a line names.
const RANGES_MAX: usize = 8;

/// Every finding, with what its kind means and what repair does, once for many of a kind.
pub fn findings(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    let mut last = ("", Path::new(""));
    for f in &report.findings {
        let (file, offset) = (f.file.display(), f.offset);
        lines.push(format!(
            "{file}: offset {offset:#x}: {}: {}",
            f.kind, f.what
        ));
        if last != (f.kind, f.file.as_path())
            && let Some(about) = f.about()
        {
            lines.push(format!("    {}", about.means));
            lines.push(format!("    Repair: {}", about.repair));
        }
        last = (f.kind, &f.file);
    }
    lines
}

/// What a repair would do, and what it leaves.
pub fn plan(plan: &Plan) -> Vec<String> {
    let mut lines: Vec<String> = plan.steps.iter().map(|s| step(s, "would be")).collect();
    lines.extend(remarks("not repairable", &plan.unrepairable));
    lines.extend(remarks("left", &plan.left));
    lines
}

/// What a repair did, what it left, and how it is taken back. `more` says how the rest is done.
pub fn outcome(outcome: &Outcome, more: &str) -> Vec<String> {
    let mut lines: Vec<String> = outcome.done.iter().map(|s| step(s, "is")).collect();
    for s in &outcome.remaining {
        lines.push(format!("not done: {}", step(s, "would be")));
    }
    lines.extend(remarks("not repairable", &outcome.unrepairable));
    lines.extend(remarks("left", &outcome.left));
    if !outcome.remaining.is_empty() {
        lines.push(format!("What is not done loses something: {more} does it"));
    }
    if let Some(undo) = &outcome.undo {
        let undo = undo.display();
        lines.push(format!("`ploop check --undo {undo}` takes it back"));
    }
    lines
}

fn remarks(why: &'static str, remarks: &[Remark]) -> impl Iterator<Item = String> {
    remarks
        .iter()
        .map(move |r| format!("{why}: {}: {}", r.file.display(), r.what))
}

/// A step, with what it loses; `tense` is before "lost".
fn step(step: &Step, tense: &str) -> String {
    let mut out = format!("{}: {}", step.file.display(), step.what);
    let named = [("lost", &step.lost), ("suspect", &step.suspect)];
    for (what, ranges) in named.into_iter().filter(|(_, r)| !r.is_empty()) {
        // Writing to a string cannot fail.
        let _ = write!(out, "; {tense} {what}: guest bytes {}", shown(ranges));
    }
    if let Some(more) = &step.gives_up {
        let _ = write!(out, "; given up: {more}");
    }
    if let Some(files) = &step.files {
        let _ = write!(out, "; files: {}", named_files(files));
    }
    out
}

fn named_files(files: &Files) -> String {
    let mut out = files.first.join(", ");
    if files.more > 0 {
        let _ = write!(out, " and {} more", files.more);
    }
    if !files.note.is_empty() {
        let _ = match out.is_empty() {
            true => write!(out, "{}", files.note),
            false => write!(out, " ({})", files.note),
        };
    }
    out
}

fn shown(ranges: &[Range<u64>]) -> String {
    let first = ranges.iter().take(RANGES_MAX);
    let mut out = first
        .map(|r| format!("{}..{}", r.start, r.end))
        .collect::<Vec<_>>()
        .join(", ");
    if ranges.len() > RANGES_MAX {
        let rest = &ranges[RANGES_MAX..];
        let bytes: u64 = rest.iter().map(|r| r.end - r.start).sum();
        let count = rest.len();
        let _ = write!(
            out,
            " and {count} more ranges, {bytes} bytes (--json names them)"
        );
    }
    out
}

/// A repair's outcome for programs: FINDINGS.md has the keys.
pub fn json(outcome: &Outcome) -> Value {
    let pairs = |ranges: &[Range<u64>]| -> Vec<[u64; 2]> {
        ranges.iter().map(|r| [r.start, r.end]).collect()
    };
    let steps = |steps: &[Step]| -> Vec<Value> {
        let one = |s: &Step| {
            let files = s
                .files
                .as_ref()
                .map(|f| json!({ "first": f.first, "more": f.more, "note": f.note }));
            json!({
                "files": files, "file": s.file.display().to_string(), "what": s.what, "lost": pairs(&s.lost),
                "suspect": pairs(&s.suspect), "gives_up": s.gives_up, "automatic": s.automatic,
                "snapshots": s.snapshots.iter().map(ToString::to_string).collect::<Vec<_>>(),
            })
        };
        steps.iter().map(one).collect()
    };
    let remarks = |remarks: &[Remark]| -> Vec<Value> {
        let one = |r: &Remark| json!({ "file": r.file.display().to_string(), "what": r.what });
        remarks.iter().map(one).collect()
    };
    json!({
        "class": outcome.after.class.name(), "findings": outcome.after.findings,
        "done": steps(&outcome.done), "not_done": steps(&outcome.remaining),
        "not_repairable": remarks(&outcome.unrepairable), "left": remarks(&outcome.left),
        "undo": outcome.undo.as_ref().map(|u| u.display().to_string()),
    })
}
