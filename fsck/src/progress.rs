//! How far a check or a repair is, for whoever waits.

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Images are checked; counted in images.
    Check,
    /// What is wrong with a disk is looked at, to plan a repair; counted in images.
    Plan,
    /// Images are changed; counted in bytes.
    Apply,
    /// The guest's view is copied for the file system's checker; counted in guest bytes.
    Copy,
}

impl Stage {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Check => "check",
            Stage::Plan => "plan",
            Stage::Apply => "repair",
            Stage::Copy => "copy",
        }
    }

    /// Its number, from 1, as programs are told.
    pub const fn number(self) -> u32 {
        self as u32 + 1
    }

    /// True when what is counted are bytes; images otherwise.
    pub const fn counts_bytes(self) -> bool {
        matches!(self, Stage::Apply | Stage::Copy)
    }
}

/// Is told how far a call is.
pub trait Progress {
    /// `done` of `total` of `stage` are done. The total may grow on the way.
    fn at(&mut self, stage: Stage, done: u64, total: u64);
}

/// Nobody waits.
impl Progress for () {
    fn at(&mut self, _: Stage, _: u64, _: u64) {}
}

/// One stage under way.
pub(crate) struct Meter<'a> {
    progress: &'a mut dyn Progress,
    stage: Stage,
    done: u64,
    total: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(progress: &'a mut dyn Progress, stage: Stage, total: u64) -> Meter<'a> {
        progress.at(stage, 0, total);
        Meter {
            progress,
            stage,
            done: 0,
            total,
        }
    }

    /// There is more to do than was known.
    pub(crate) fn expect(&mut self, more: u64) {
        self.total += more;
        self.progress.at(self.stage, self.done, self.total);
    }

    pub(crate) fn add(&mut self, done: u64) {
        self.done += done;
        self.progress.at(self.stage, self.done, self.total);
    }
}
