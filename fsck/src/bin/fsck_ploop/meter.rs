//! Progress, as `-C` asks for it.

use std::fs::File;
use std::io::{IsTerminal, Write, stderr};
use std::os::fd::{BorrowedFd, RawFd};

use fsck::{Progress, Stage};
use indicatif::{ProgressBar, ProgressStyle};
use ploop::{Error, Result};

/// Lines are written when so much of a stage, in thousandths, is new.
const STEP: u64 = 1;

/// What is shown, and how much was looked at.
#[derive(Debug)]
pub(crate) struct Meter {
    show: Show,
    source: String,
    last: Option<(Stage, u64)>,
    /// Images that the last check has looked at.
    pub(crate) images: u64,
}

#[derive(Debug)]
enum Show {
    Nothing,
    Lines(File),
    Bar(ProgressBar),
}

impl Meter {
    /// Shows progress as the value of `-C` says.
    pub(crate) fn new(wanted: Option<i32>) -> Result<Meter> {
        let show = match wanted {
            Some(0) if stderr().is_terminal() => {
                let bar = ProgressBar::new(0);
                if let Ok(style) = ProgressStyle::with_template("{msg} |{bar:40}| {percent}%") {
                    bar.set_style(style);
                }
                Show::Bar(bar)
            }
            Some(fd @ 1..) => Show::Lines(descriptor(fd)?),
            _ => Show::Nothing,
        };
        Ok(Meter {
            show,
            source: String::new(),
            last: None,
            images: 0,
        })
    }

    /// What follows is about this source.
    pub(crate) fn begin(&mut self, source: &str) {
        source.clone_into(&mut self.source);
        self.last = None;
    }

    /// Takes the bar away, before lines are printed.
    pub(crate) fn clear(&mut self) {
        if let Show::Bar(bar) = &self.show {
            bar.finish_and_clear();
            bar.reset();
        }
    }
}

impl Progress for Meter {
    fn at(&mut self, stage: Stage, done: u64, total: u64) {
        if stage == Stage::Check {
            self.images = done;
        }
        let part = (u128::from(done) * 1000 / u128::from(total.max(1))) as u64;
        let new = |(was, at): (Stage, u64)| was != stage || part >= at + STEP || part < at;
        if !self.last.is_none_or(new) {
            return;
        }
        self.last = Some((stage, part));
        match &mut self.show {
            Show::Nothing => {}
            Show::Bar(bar) => {
                bar.set_message(format!("{}: {}", self.source, stage.name()));
                bar.set_length(total);
                bar.set_position(done);
            }
            Show::Lines(out) => {
                let (pass, source) = (stage.number(), &self.source);
                let line = format!("{pass} {done} {total} {source}\n");
                // Whoever read it has gone: the check goes on.
                if out.write_all(line.as_bytes()).is_err() {
                    self.show = Show::Nothing;
                }
            }
        }
    }
}

fn descriptor(fd: RawFd) -> Result<File> {
    // SAFETY: the descriptor is only copied; if it is not open, the call says so.
    #[expect(unsafe_code, reason = "fsck(8) passes a descriptor by number")]
    let given = unsafe { BorrowedFd::borrow_raw(fd) };
    let own = rustix::io::fcntl_dupfd_cloexec(given, 3).map_err(|e| {
        Error::invalid(format!("-C: descriptor {fd} is not open"))
            .caused_by(std::io::Error::from(e))
    })?;
    Ok(File::from(own))
}
