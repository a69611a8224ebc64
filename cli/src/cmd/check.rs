//! `ploop check`: look, repair, take the repair back.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;

use fsck::repair::{self, How, Outcome, Plan, Remark, Step};
use fsck::{Class, Report};
use ploop::disk::open::Opener;
use ploop::{Error, Result};
use serde_json::{Value, json};

use crate::args;
use crate::output::{line, print_json};

/// Guest ranges that a line names.
const RANGES_MAX: usize = 8;

pub(crate) fn check(root: &Path, c: &args::Check) -> Result<ExitCode> {
    let opener = Opener::host();
    if let Some(file) = &c.undo {
        return undo(&opener, file, c.json.json);
    }
    let Some(source) = &c.source else {
        return Err(Error::invalid("nothing to check was named"));
    };
    let (source, options) = super::locate(root, source, &c.from)?;
    if !c.repair {
        let report = fsck::check(&opener, &source, &options)?;
        show(c, &report)?;
        return Ok(code(report.class));
    }
    let plan = repair::plan(&opener, &source, &options)?;
    let how = match c.yes {
        true => How::Yes,
        false if plan.is_automatic() || !plan.unrepairable.is_empty() => How::Preen,
        false => ask(c, &plan)?,
    };
    let outcome = repair::apply(&opener, &plan, how, c.undo_file.as_deref())?;
    match c.json.json {
        true => print_json(&as_json(&outcome))?,
        false => tell(c, &outcome)?,
    }
    Ok(code(outcome.after.class))
}

fn undo(opener: &Opener, file: &Path, as_json: bool) -> Result<ExitCode> {
    let undone = repair::undo(opener, file)?;
    let names: Vec<String> = undone
        .files
        .iter()
        .map(|f| f.display().to_string())
        .collect();
    match as_json {
        true => print_json(
            &json!({ "directory": undone.root.display().to_string(), "restored": names }),
        )?,
        false => {
            for name in &names {
                line(format!("{name}: as it was before the repair"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(c: &args::Check, report: &Report) -> Result<()> {
    if c.json.json {
        return print_json(report);
    }
    let mut last = ("", String::new());
    for f in &report.findings {
        let file = f.file.display().to_string();
        line(format!(
            "{file}: offset {:#x}: {}: {}",
            f.offset, f.kind, f.what
        ))?;
        // Once for many of a kind.
        if last != (f.kind, file.clone())
            && let Some(about) = f.about()
        {
            line(format!("    {}", about.means))?;
            line(format!("    Repair: {}", about.repair))?;
        }
        last = (f.kind, file);
    }
    let source = c.source.as_deref().unwrap_or_default();
    line(format!("{source}: {}", report.class.name()))
}

fn code(class: Class) -> ExitCode {
    match class {
        Class::Clean | Class::Leak => ExitCode::SUCCESS,
        Class::Dirty => ExitCode::from(1),
        Class::Corrupt => ExitCode::from(ploop::Kind::Corrupt.exit_code()),
    }
}

/// Asks whether to do what loses something; without a terminal the answer is no.
fn ask(c: &args::Check, plan: &Plan) -> Result<How> {
    if c.json.json || !std::io::stdin().is_terminal() {
        return Ok(How::Preen);
    }
    for step in &plan.steps {
        line(describe(step, "would be"))?;
    }
    let mut out = std::io::stderr();
    let io = |e| Error::io("ask on", "standard error", e);
    write!(
        out,
        "Do all of this? What is changed can be taken back. [y/N] "
    )
    .map_err(io)?;
    out.flush().map_err(io)?;
    let mut answer = String::new();
    let read = std::io::stdin().read_line(&mut answer);
    read.map_err(|e| Error::io("read the answer from", "standard input", e))?;
    Ok(match answer.trim() {
        "y" | "Y" | "yes" => How::Yes,
        _ => How::Preen,
    })
}

fn tell(c: &args::Check, outcome: &Outcome) -> Result<()> {
    for step in &outcome.done {
        line(describe(step, "is"))?;
    }
    for step in &outcome.remaining {
        line(format!("not done: {}", describe(step, "would be")))?;
    }
    for (why, remarks) in [
        ("not repairable", &outcome.unrepairable),
        ("left", &outcome.left),
    ] {
        for Remark { file, what } in remarks {
            line(format!("{why}: {}: {what}", file.display()))?;
        }
    }
    let source = c.source.as_deref().unwrap_or_default();
    if !outcome.remaining.is_empty() {
        line("What is not done loses something: --repair --yes does it")?;
    }
    if let Some(undo) = &outcome.undo {
        line(format!(
            "`ploop check --undo {}` takes it back",
            undo.display()
        ))?;
    }
    line(format!("{source}: {}", outcome.after.class.name()))
}

fn describe(step: &Step, tense: &str) -> String {
    let mut out = format!("{}: {}", step.file.display(), step.what);
    let named = [("lost", &step.lost), ("suspect", &step.suspect)];
    for (what, ranges) in named.into_iter().filter(|(_, r)| !r.is_empty()) {
        // Writing to a string cannot fail.
        let _ = write!(out, "; {tense} {what}: guest bytes {}", shown(ranges));
    }
    if let Some(more) = &step.gives_up {
        let _ = write!(out, "; given up: {more}");
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
        let _ = write!(
            out,
            " and {} more ranges, {bytes} bytes (--json names them)",
            rest.len()
        );
    }
    out
}

fn as_json(outcome: &Outcome) -> Value {
    let pairs = |ranges: &[Range<u64>]| -> Vec<[u64; 2]> {
        ranges.iter().map(|r| [r.start, r.end]).collect()
    };
    let steps = |steps: &[Step]| -> Vec<Value> {
        let one = |s: &Step| {
            json!({
                "file": s.file.display().to_string(), "what": s.what, "lost": pairs(&s.lost),
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
