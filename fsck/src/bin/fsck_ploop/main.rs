//! `fsck.ploop`: what fsck(8) runs. Parse, check, plan, apply, print; the codes of fsck(8).
//!
//! Stateless between sources: one that fails adds its code, and the next one is looked at.

mod args;
mod interrupt;
mod meter;

use std::io::{IsTerminal, Write, stderr, stdin, stdout};
use std::process::ExitCode;

use clap::Parser;
use fsck::repair::{self, How, Outcome, Plan};
use fsck::{Class, Report, inside, text};
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::{Error, Kind, Result};

use args::Args;
use meter::Meter;

const CORRECTED: u8 = 1;
const LEFT: u8 = 4;
const FAILED: u8 = 8;
const USAGE: u8 = 16;
const CANCELLED: u8 = 32;

fn main() -> ExitCode {
    let args = match Args::try_parse_from(args::attached(std::env::args_os())) {
        Ok(args) => args,
        Err(e) => {
            // To the right stream; if nobody reads it, the code says enough.
            drop(e.print());
            return ExitCode::from(if e.use_stderr() { USAGE } else { 0 });
        }
    };
    interrupt::handle();
    match run(&args) {
        Ok(()) => ExitCode::from(interrupt::code()),
        Err(e) if e.kind() == Kind::Invalid => failed(&e, USAGE),
        Err(e) => failed(&e, FAILED),
    }
}

fn failed(e: &Error, code: u8) -> ExitCode {
    say(e);
    ExitCode::from(interrupt::code() | code)
}

fn say(e: &Error) {
    drop(writeln!(stderr(), "fsck.ploop: {e}"));
}

fn line(text: impl AsRef<str>) -> Result<()> {
    let written = writeln!(stdout(), "{}", text.as_ref());
    written.map_err(|e| Error::io("write", "standard output", e))
}

fn lines(all: &[String]) -> Result<()> {
    all.iter().try_for_each(line)
}

fn run(args: &Args) -> Result<()> {
    let asks = !(args.preen || args.no || args.yes);
    if asks && !(stdin().is_terminal() && stdout().is_terminal()) {
        let what = "there is no terminal to ask at";
        return Err(Error::new(Kind::Unsupported, what)
            .fix("Say how to repair: -p without loss, -y all, -n nothing"));
    }
    if args.undo_file.is_some() && args.sources.len() > 1 {
        return Err(Error::invalid("one undo file is for one source"));
    }
    let mut meter = Meter::new(args.progress)?;
    for name in &args.sources {
        meter.begin(name);
        let code = match one(args, name, &mut meter) {
            Ok(code) => code,
            Err(e) => {
                meter.clear();
                say(&e);
                FAILED
            }
        };
        if interrupt::add(code) {
            return Ok(());
        }
    }
    Ok(())
}

/// Checks and repairs one source; its exit code.
fn one(args: &Args, name: &str, meter: &mut Meter) -> Result<u8> {
    let opener = Opener::host();
    let source = Source::parse(opener.store().as_ref(), name)?;
    let options = OpenOptions {
        allow: args.allow_dir.clone(),
        ..OpenOptions::default()
    }
    .of_store(opener.store().as_ref(), &source);
    // One opener for each look: it keeps what it has open, locked and as it was.
    let mut report = fsck::check_with(&Opener::host(), &source, &options, meter)?;
    if args.fs {
        inside::check(&Opener::host(), &source, &options, &mut report, meter)?;
    }
    meter.clear();
    let images = match meter.images {
        1 => "1 image".to_owned(),
        n => format!("{n} images"),
    };
    let clean = report.class == Class::Clean;
    if clean && (report.findings.is_empty() || !args.force) {
        // What could not be looked at inside is no damage, and not checked either.
        let mut but = "";
        if args.fs {
            lines(&text::findings(&report))?;
            if report.findings.iter().any(|f| f.kind == "fs-unknown") {
                but = "; what is inside was not all checked";
            }
        }
        line(format!("{name}: clean, {images}{but}"))?;
        return Ok(0);
    }
    lines(&text::findings(&report))?;
    let mut plan = match repair::plan_with(&opener, &source, &options, meter) {
        Ok(plan) => plan,
        Err(e) if e.kind() == Kind::Unsupported => {
            meter.clear();
            say(&e);
            line(format!("{name}: {}, {images}", verdict(report.class)))?;
            return Ok(if clean { 0 } else { LEFT });
        }
        Err(e) => return Err(e),
    };
    if args.fs {
        inside::name_files(&Opener::host(), &source, &options, &mut plan, meter)?;
    }
    meter.clear();
    let how = match (args.preen, args.yes) {
        (true, _) => Some(How::Preen),
        (_, true) => Some(How::Yes),
        _ => decide(args, name, &plan)?,
    };
    let Some(how) = how else {
        line(format!("{name}: {}, {images}", verdict(report.class)))?;
        let more = !plan.is_empty() || !plan.unrepairable.is_empty();
        return Ok(left(&report, more, !plan.left.is_empty()));
    };
    let undo_file = args.undo_file.as_deref();
    let applied = interrupt::uninterrupted(
        || repair::apply_with(&opener, &plan, how, undo_file, meter),
        |done| done.as_ref().map_or(FAILED, corrected),
    );
    let mut done = applied?;
    // What was repaired is told, whatever comes of the look inside.
    let mut looked = Ok(());
    if args.fs && !interrupt::seen() {
        // What the first one knows of the images is from before the repair.
        let fresh = Opener::host();
        looked = inside::check(&fresh, &source, &options, &mut done.after, meter);
    }
    meter.clear();
    lines(&text::outcome(&done, "-y"))?;
    let words = match done.done.len() {
        0 => String::new(),
        1 => ", 1 repair made".to_owned(),
        n => format!(", {n} repairs made"),
    };
    let after = verdict(done.after.class);
    line(format!("{name}: {after}, {images}{words}"))?;
    let mut code = corrected(&done);
    if let Err(e) = looked {
        say(&e);
        code |= FAILED;
    }
    let more = !done.remaining.is_empty() || !done.unrepairable.is_empty();
    Ok(code | left(&done.after, more, !done.left.is_empty()))
}

fn corrected(done: &Outcome) -> u8 {
    if done.undo.is_some() { CORRECTED } else { 0 }
}

fn verdict(class: Class) -> &'static str {
    match class {
        Class::Clean => "clean",
        Class::Leak => "NOT CLEAN (space is lost)",
        Class::Dirty => "NOT CLEAN (not closed)",
        Class::Corrupt => "NOT CLEAN (damaged)",
    }
}

/// The code for what is left. `more`: a repair would do, or could not do, something; `finished`:
/// another command finishes what an operation left.
fn left(report: &Report, more: bool, finished: bool) -> u8 {
    let mut wrong = report.findings.iter().filter(|f| f.class > Class::Clean);
    // A mount finishes the file system's own, as opening does a disk's journal.
    let mounts = wrong.all(|f| f.kind == "fs-unclean");
    let settled = match report.class {
        Class::Clean => true,
        Class::Leak | Class::Dirty => !more && (finished || mounts),
        Class::Corrupt => false,
    };
    if settled { 0 } else { LEFT }
}

/// What to do without -p and -y; `None`: nothing.
fn decide(args: &Args, name: &str, plan: &Plan) -> Result<Option<How>> {
    lines(&text::plan(plan))?;
    if args.no || plan.is_empty() {
        return Ok(None);
    }
    let mut out = stdout();
    let question = format!("{name}: do all of this? What is changed can be taken back. [y/N] ");
    let asked = out
        .write_all(question.as_bytes())
        .and_then(|()| out.flush());
    asked.map_err(|e| Error::io("ask on", "standard output", e))?;
    let mut answer = String::new();
    let read = stdin().read_line(&mut answer);
    read.map_err(|e| Error::io("read the answer from", "standard input", e))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes").then_some(How::Yes))
}
