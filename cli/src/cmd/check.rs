//! `ploop check`: look, repair, take the repair back.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use fsck::repair::{self, How, Plan};
use fsck::{Class, Report, inside, text};
use ploop::disk::open::{Opener, Source};
use ploop::{Error, Kind, Result};
use serde_json::json;

use crate::args;
use crate::output::{Bar, line, print_json, report};

use super::check_openvz;

pub(crate) fn check(root: &Path, c: &args::Check) -> Result<ExitCode> {
    match checked(root, c) {
        Err(e) if c.openvz.openvz_exit_codes => {
            let code = check_openvz::code_of(&e);
            // Printed; OpenVZ has other codes.
            let _ = report(e, c.json.json);
            Ok(ExitCode::from(code))
        }
        done => done,
    }
}

fn checked(root: &Path, c: &args::Check) -> Result<ExitCode> {
    let opener = Opener::host();
    if let Some(file) = &c.undo {
        return undo(&opener, file, c.json.json);
    }
    let Some(source) = &c.source else {
        return Err(Error::invalid("nothing to check was named"));
    };
    let (source, options) = super::locate(root, source, &c.from)?;
    let (source, options) = check_openvz::narrowed(&opener, &c.openvz, source, options)?;
    let Some(wish) = Wish::of(c) else {
        let mut bar = Bar::new(c.progress);
        let mut report = match fsck::check_with(&opener, &source, &options, &mut bar) {
            // Whoever has it open knows what its files do not say yet.
            Err(e) if e.kind() == Kind::InUse && source.descriptor && !c.fs => {
                let text = c.source.as_deref().unwrap_or_default();
                match super::tree::agent(root, text) {
                    Ok((agent, name)) => agent.check(&name)?.into_report()?,
                    Err(_) => return Err(e),
                }
            }
            other => other?,
        };
        if c.fs {
            inside::check(&Opener::host(), &source, &options, &mut report, &mut bar)?;
        }
        drop(bar);
        show(c, &report)?;
        return Ok(code(c, &source, &report));
    };
    let mut bar = Bar::new(c.progress);
    let mut plan = repair::plan_with(&opener, &source, &options, &mut bar)?;
    if c.fs {
        // Its own one: what it has open is locked.
        inside::name_files(&Opener::host(), &source, &options, &mut plan, &mut bar)?;
    }
    drop(bar);
    let how = match wish {
        Wish::All => How::Yes,
        Wish::Ask if !plan.is_automatic() && plan.unrepairable.is_empty() => ask(c, &plan)?,
        _ => How::Preen,
    };
    let mut bar = Bar::new(c.progress);
    let undo_file = c.undo_file.as_deref();
    let mut outcome = repair::apply_with(&opener, &plan, how, undo_file, &mut bar)?;
    // What was repaired is told, whatever comes of the look inside.
    let mut looked = Ok(());
    if c.fs {
        // What the first one knows of the images is from before the repair.
        let fresh = Opener::host();
        looked = inside::check(&fresh, &source, &options, &mut outcome.after, &mut bar);
    }
    drop(bar);
    match c.json.json {
        true => print_json(&text::json(&outcome))?,
        false => {
            lines(c, &text::outcome(&outcome, "--repair --yes"))?;
            verdict(c, outcome.after.class)?;
        }
    }
    looked?;
    Ok(code(c, &source, &outcome.after))
}

/// How far the command line lets a repair go.
#[derive(Clone, Copy)]
enum Wish {
    Preen,
    Ask,
    All,
}

impl Wish {
    /// `None`: nothing is written.
    fn of(c: &args::Check) -> Option<Wish> {
        let o = &c.openvz;
        match () {
            () if o.read_only => None,
            () if c.yes || o.hard_force => Some(Wish::All),
            () if c.repair => Some(Wish::Ask),
            () if o.drop_in_use => Some(Wish::Preen),
            () => None,
        }
    }
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
    lines(c, &text::findings(report))?;
    verdict(c, report.class)
}

fn lines(c: &args::Check, all: &[String]) -> Result<()> {
    match c.openvz.silent {
        true => Ok(()),
        false => all.iter().try_for_each(line),
    }
}

fn verdict(c: &args::Check, class: Class) -> Result<()> {
    let source = c.source.as_deref().unwrap_or_default();
    lines(c, &[format!("{source}: {}", class.name())])
}

fn code(c: &args::Check, source: &Source, report: &Report) -> ExitCode {
    if c.openvz.openvz_exit_codes {
        return ExitCode::from(check_openvz::code(source, report));
    }
    match report.class {
        Class::Clean | Class::Leak => ExitCode::SUCCESS,
        Class::Dirty => ExitCode::from(1),
        Class::Corrupt => ExitCode::from(Kind::Corrupt.exit_code()),
    }
}

/// Asks whether to do what loses something; without a terminal the answer is no.
fn ask(c: &args::Check, plan: &Plan) -> Result<How> {
    if c.json.json || c.openvz.silent || !std::io::stdin().is_terminal() {
        return Ok(How::Preen);
    }
    lines(c, &text::plan(plan))?;
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
