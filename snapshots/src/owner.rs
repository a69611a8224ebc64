//! How the two sides of a move agree on who has the disk: the rules, without messages or files.
//!
//! ```text
//!  source        destination          the move
//!  (none)        arriving             data, in rounds
//!  offered  ──▶                       the source says that it may give it
//!                ready           ◀──  all of it is there, durable
//!  given    ──▶                       from here on the source does not have it
//!                taken           ◀──  it serves
//!  removed  ──▶  (none)               and knows that the source knows
//! ```
//!
//! Each step is durable before the other side hears of it. Whoever crashes comes back with its
//! record, and the source then says how the move ends: one that was `offered` has ended, one that was
//! `given` goes on. A message may be lost, come late, or come twice: nothing here depends on which.
//!
//! | came back | says | the destination, and its answer |
//! |---|---|---|
//! | `offered` | aborted | `arriving`, `ready`: drops what came. `taken` by decision: keeps it, and the source steps down |
//! | `given` | given | `ready`: takes it. `taken`: has it, or had it ([`ploop::owner::past`]) |
//!
//! With the other side gone, `given` and `ready` wait: neither may be opened. An operator may decide
//! ([`resolve`]); what was decided has a higher epoch, so that when both are there again one of
//! them steps down.

use ploop::owner::State;

/// The epoch of a disk that is about to move.
pub const BEGUN: u64 = 1;
/// The epoch of one that was taken because it was given.
pub const TAKEN: u64 = 2;
/// The epoch of one that was taken because somebody decided that.
pub const DECIDED: u64 = 3;

/// The epoch of one that has left and whose files stay: nothing more is said of it.
pub const KEPT: u64 = 4;
/// The epoch of one that was given and whose files are to stay, until the other side has it.
pub const KEEPS: u64 = 5;

/// How far a side is: its state and epoch. `None`: it has no record of the move.
pub type Stand = Option<(State, u64)>;

/// What the source says of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// The destination has it.
    Given,
    /// The source has it, in this epoch.
    Aborted(u64),
}

/// What the destination answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Answer {
    /// It has the disk, in this epoch.
    Taken(u64),
    /// The same, and some of its data is still to come from the source.
    Needs(u64),
    /// It does not have it, and never will by this move.
    Dropped,
    /// It knows of no such move.
    Unknown,
}

/// What a side does with its disk. Durable before it says anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Next {
    /// Nothing.
    Stay,
    /// The record changes.
    Become(State, u64),
    /// The record goes: the disk is this side's, and the move has ended.
    Own,
    /// The disk goes, with its record.
    Remove,
}

impl Next {
    /// Where a side is that was at `stand`.
    pub fn after(self, stand: Stand) -> Stand {
        match self {
            Next::Stay => stand,
            Next::Become(state, epoch) => Some((state, epoch)),
            Next::Own | Next::Remove => None,
        }
    }
}

/// What a source says that comes back, or whose link was lost; `None`: it is no source.
pub fn verdict(state: State, epoch: u64) -> Option<Verdict> {
    match state {
        State::Given if epoch == KEPT => None,
        State::Offered => Some(Verdict::Aborted(epoch)),
        State::Given => Some(Verdict::Given),
        State::Arriving | State::Ready | State::Taken => None,
    }
}

/// What a destination does that hears `verdict`, and its answer.
pub fn destination(stand: Stand, verdict: Verdict) -> (Next, Answer) {
    match (stand, verdict) {
        (Some((State::Ready, _)), Verdict::Given) => {
            (Next::Become(State::Taken, TAKEN), Answer::Taken(TAKEN))
        }
        (Some((State::Arriving | State::Ready, _)), Verdict::Aborted(_)) => {
            (Next::Remove, Answer::Dropped)
        }
        (Some((State::Taken, mine)), Verdict::Aborted(theirs)) if theirs > mine => {
            (Next::Become(State::Given, theirs), Answer::Dropped)
        }
        (Some((State::Taken, mine)), _) => (Next::Stay, Answer::Taken(mine)),
        // It stepped down, or never had all of it.
        (Some((State::Given, _)), Verdict::Aborted(_)) => (Next::Stay, Answer::Dropped),
        (Some(_) | None, _) => (Next::Stay, Answer::Unknown),
    }
}

/// The same of one that took the disk in `epoch`, and from where it has moved on since.
pub fn gone_on(epoch: u64, verdict: Verdict) -> Answer {
    match verdict {
        // Somebody decided that the source has it, and nobody here can step down.
        Verdict::Aborted(theirs) if theirs > epoch => Answer::Unknown,
        Verdict::Given | Verdict::Aborted(_) => Answer::Taken(epoch),
    }
}

/// What a source does that hears `answer` to its verdict.
pub fn source(stand: Stand, answer: Answer) -> Next {
    match (stand, answer) {
        (Some((State::Given, KEEPS)), Answer::Taken(_)) => Next::Become(State::Given, KEPT),
        (Some((State::Given, _)), Answer::Taken(_)) => Next::Remove,
        (Some((State::Offered, mine)), Answer::Taken(theirs) | Answer::Needs(theirs))
            if theirs >= mine =>
        {
            Next::Become(State::Given, theirs)
        }
        (Some((State::Offered, _)), Answer::Dropped | Answer::Unknown) => Next::Own,
        // It is fed until it needs nothing any more: [`Answer::Needs`].
        // A disk that was given and that nobody has: somebody removed it there, or asks the wrong
        // service.
        _ => Next::Stay,
    }
}

/// What a destination does that hears that the source knows: the record is not needed any more.
pub fn confirmed(stand: Stand) -> Next {
    match stand {
        Some((State::Taken, _)) => Next::Own,
        _ => Next::Stay,
    }
}

/// What a destination does when the link is lost, or it comes back.
pub fn lost(stand: Stand) -> Next {
    match stand {
        Some((State::Arriving, _)) => Next::Remove,
        _ => Next::Stay,
    }
}

/// Who is to have the disk, where the other side cannot say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// This side.
    Take,
    /// The other one.
    Give,
}

/// What an operator's decision does, and what may be lost by it. An error says why there is nothing
/// to decide.
pub fn resolve(stand: Stand, decision: Decision) -> Result<(Next, &'static str), &'static str> {
    let (at, epoch) = stand.unzip();
    match (at, decision) {
        (None, _) => Err("it does not move: nothing is to be decided"),
        (Some(State::Arriving), _) => Err("not all of it is here: it goes when the move ends"),
        // The destination is not told: it keeps what it has.
        (Some(State::Given), Decision::Take) if epoch == Some(KEPT) => Ok((
            Next::Own,
            "what was written at the destination since the hand-over is not here; and that service has \
             it, too: two containers from now on, of which no holder is to be moved to the other",
        )),
        (Some(State::Given), Decision::Take) => Ok((
            Next::Become(State::Offered, DECIDED),
            "what was written at the destination since the hand-over is not here; and if it has moved on \
             from there, where it is now has it, too",
        )),
        (Some(State::Given), Decision::Give) => Ok((
            Next::Remove,
            "if the destination does not have all of it, nobody has",
        )),
        (Some(State::Offered), Decision::Take) => Ok((
            Next::Own,
            "nothing here; a destination that is ready stays in doubt until it is decided there",
        )),
        (Some(State::Offered), Decision::Give) => {
            Err("the destination may not have all of it: it cannot be given like that")
        }
        (Some(State::Ready), Decision::Take) => Ok((
            Next::Become(State::Taken, DECIDED),
            "what was written at the source since the hand-over failed is not here",
        )),
        (Some(State::Ready), Decision::Give) => Ok((
            Next::Remove,
            "if the source gave it up already, only the source's copy is left, and it waits for a \
             decision there",
        )),
        (Some(State::Taken), Decision::Take) => Ok((
            Next::Own,
            "nothing here; a source that was not told waits for a decision there",
        )),
        (Some(State::Taken), Decision::Give) => {
            Err("it is this service's, and used: move it back, with ploop migrate")
        }
    }
}

#[cfg(test)]
mod tests;
