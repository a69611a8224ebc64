//! Every point of a run, every state of a point, until one is wrong.

use std::fmt;

use ploop::store::recording::{Budget, RecordingStore};

use super::fixture::Fixture;
use super::history::History;
use super::judge::{Depth, judge};
use super::workload::{Runner, Step};

/// How thoroughly the states of a run are looked at.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// States per point.
    pub budget: Budget,
    /// Of how many states one is also worked with; the others are only read and checked.
    pub work_every: u64,
}

/// What a sweep looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Points.
    pub points: u64,
    /// Points of which every subset of units was tried.
    pub exhaustive: u64,
    /// States.
    pub states: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} states at {} points", self.states, self.points)?;
        write!(f, ", {} of them exhaustively", self.exhaustive)
    }
}

impl Tally {
    /// Prints what was looked at of stories, and panics when they are too long to be looked at whole:
    /// four points of five must be enumerated without gaps.
    pub fn report_stories(&self) {
        println!("{self}");
        assert!(
            self.exhaustive * 10 > self.points * 8,
            "{self}: the stories have grown too long"
        );
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.points += other.points;
        self.exhaustive += other.exhaustive;
        self.states += other.states;
    }
}

impl Sweep {
    /// Few states, each worked with: for runs that are repeated with every sync left out.
    pub fn brief() -> Sweep {
        Sweep {
            budget: Budget {
                exhaustive_units: 8,
                seeded: 40,
                seed: 0,
            },
            work_every: 1,
        }
    }

    /// Does these steps and judges every state of them. Panics at the first violation.
    pub fn steps(&self, fx: &Fixture, steps: &[Step], what: &str) -> Tally {
        let store = RecordingStore::on(&fx.start);
        let history = History::new(&store, fx.initial.clone(), fx.closed());
        Runner::new(fx, store.store(), &history).run(steps);
        self.check(fx, &store, &history)
            .unwrap_or_else(|e| panic!("{what}: {e}"))
    }

    /// Judges every state of a run. An error is the first violation, with all that is needed to
    /// repeat it.
    pub fn check(
        &self,
        fx: &Fixture,
        store: &RecordingStore,
        history: &History,
    ) -> Result<Tally, String> {
        self.check_from(0, fx, store, history)
    }

    /// The same, of the points from `first` on.
    pub fn check_from(
        &self,
        first: usize,
        fx: &Fixture,
        store: &RecordingStore,
        history: &History,
    ) -> Result<Tally, String> {
        let mut tally = Tally::default();
        for point in history.points().into_iter().filter(|p| *p >= first) {
            let view = history.view(point);
            let states = store.states_at(point, &self.budget);
            tally.points += 1;
            tally.exhaustive += u64::from(states.units() <= self.budget.exhaustive_units);
            for state in states {
                tally.states += 1;
                let work = tally.states.is_multiple_of(self.work_every);
                let depth = if work { Depth::Work } else { Depth::Look };
                judge(fx, &view, &state.build(), depth).map_err(|why| {
                    let history = history.lines().join("\n  ");
                    let log = store.log().join("\n  ");
                    format!("{why}\non {}: {state}\n  {history}\nlog:\n  {log}", fx.name)
                })?;
            }
        }
        Ok(tally)
    }
}
