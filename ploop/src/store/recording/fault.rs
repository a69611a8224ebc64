//! Calls that fail on purpose.

use std::collections::BTreeSet;
use std::path::Path;

use rustix::io::Errno;

use crate::error::Error;

/// What an injected failure looks like to the code under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An I/O error. The call does nothing, but see [`Tear`] for writes.
    Eio,
    /// No space. The call does nothing, but see [`Tear`] for writes.
    Enospc,
    /// The power goes. The change in flight is logged as not durable, so crash states have it
    /// whole, in part and not at all; a sync in flight does nothing. This call and all later ones
    /// fail with an I/O error.
    Crash,
}

/// Which calls [`super::RecordingStore::calls`] counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Calls {
    /// Changes and syncs.
    #[default]
    Changes,
    /// Every call but `path` and `id`, which cannot fail.
    All,
}

/// How much of a failing write reaches the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tear {
    /// Nothing.
    Nothing,
    /// The first half, rounded down to a byte.
    #[default]
    Half,
    /// So many bytes, or all of a shorter write.
    Bytes(usize),
}

impl Tear {
    fn of(self, len: usize) -> usize {
        match self {
            Tear::Nothing => 0,
            Tear::Half => len / 2,
            Tear::Bytes(n) => n.min(len),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Look,
    Change,
    Sync,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Go,
    /// Fails with the fault; `true`: the change is done all the same (it was in flight).
    Fail(Fault, bool),
    /// A sync only: report success, do nothing.
    Drop,
}

impl Verdict {
    /// How many of `len` bytes a write puts into the file.
    pub(super) fn reaches(self, len: usize, tear: Tear) -> usize {
        match self {
            Verdict::Go | Verdict::Fail(_, true) => len,
            Verdict::Fail(Fault::Eio | Fault::Enospc, false) => tear.of(len),
            Verdict::Fail(Fault::Crash, false) | Verdict::Drop => 0,
        }
    }

    /// The error to return, if any.
    pub(super) fn error(self, what: &str, path: &Path) -> Option<Error> {
        let (errno, why) = match self {
            Verdict::Go | Verdict::Drop => return None,
            Verdict::Fail(Fault::Eio, _) => (Errno::IO, "injected"),
            Verdict::Fail(Fault::Enospc, _) => (Errno::NOSPC, "injected"),
            Verdict::Fail(Fault::Crash, _) => (Errno::IO, "injected: the power is cut"),
        };
        Some(Error::io(format!("{what} ({why})"), path, errno.into()))
    }
}

#[derive(Clone, Copy)]
struct Plan {
    of_sync: bool,
    first: u64,
    repeat: bool,
    fault: Fault,
}

/// Counters and plans; kept under the log's mutex.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) counting: Calls,
    pub(super) tear: Tear,
    pub(super) calls: u64,
    pub(super) syncs: u64,
    plans: Vec<Plan>,
    dropped: BTreeSet<u64>,
    dead: bool,
}

impl Faults {
    pub(super) fn plan(&mut self, of_sync: bool, first: u64, repeat: bool, fault: Fault) {
        self.plans.push(Plan {
            of_sync,
            first,
            repeat,
            fault,
        });
    }

    pub(super) fn drop_sync(&mut self, n: u64) {
        self.dropped.insert(n);
    }

    /// Forgets all plans and turns the power on again; keeps the counters.
    pub(super) fn clear(&mut self) {
        self.plans.clear();
        self.dropped.clear();
        self.dead = false;
    }

    /// Counts the call and says what becomes of it.
    pub(super) fn enter(&mut self, class: Class) -> Verdict {
        if self.dead {
            return Verdict::Fail(Fault::Crash, false);
        }
        let (mut call, mut sync) = (None, None);
        if class != Class::Look || self.counting == Calls::All {
            call = Some(self.calls);
            self.calls += 1;
        }
        if class == Class::Sync {
            sync = Some(self.syncs);
            self.syncs += 1;
        }
        let hit = |plan: &&Plan| {
            let number = if plan.of_sync { sync } else { call };
            number.is_some_and(|n| n == plan.first || plan.repeat && n > plan.first)
        };
        match self.plans.iter().find(hit).map(|plan| plan.fault) {
            Some(Fault::Crash) => {
                self.dead = true;
                Verdict::Fail(Fault::Crash, true)
            }
            Some(fault) => Verdict::Fail(fault, false),
            None if sync.is_some_and(|n| self.dropped.contains(&n)) => Verdict::Drop,
            None => Verdict::Go,
        }
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead
    }
}
