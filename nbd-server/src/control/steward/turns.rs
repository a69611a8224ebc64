//! Whose turn it is with a container: one long job works on it at a time, and the next waits.
//!
//! What the service does of itself, as going on with merges that were left, gives way: whoever asks
//! for the container has it soon, and the work goes on behind him.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Clone, Debug, Default)]
pub(super) struct Turns(Arc<(Mutex<HashMap<String, Turn>>, Condvar)>);

#[derive(Debug, Default)]
struct Turn {
    work: Option<Work>,
    /// How many wait for work that gives way.
    asked: usize,
}

/// What a container is had for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Work {
    /// To the end of it.
    Asked,
    /// Until somebody asks for the container.
    GivesWay,
}

/// A container that this job works on.
#[derive(Debug)]
pub(super) struct Working {
    container: String,
    turns: Turns,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Turn>> {
        // What it protects is whole between two statements.
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, container: &str, change: impl FnOnce(&mut Turn)) {
        let mut all = self.lock();
        let turn = all.entry(container.to_owned()).or_default();
        change(turn);
        if turn.work.is_none() && turn.asked == 0 {
            all.remove(container);
        }
        drop(all);
        self.0.1.notify_all();
    }

    /// Has a container, if nobody works on it; for work that gives way: nor asks for it.
    pub(super) fn take(&self, container: &str, work: Work) -> Option<Working> {
        let mut all = self.lock();
        if let Some(turn) = all.get(container)
            && (turn.work.is_some() || work == Work::GivesWay)
        {
            return None;
        }
        all.entry(container.to_owned()).or_default().work = Some(work);
        Some(Working {
            container: container.to_owned(),
            turns: self.clone(),
        })
    }

    /// Has a container that nobody works on, or only what gives way, which is waited for as long as
    /// `patience`.
    pub(super) fn ask(&self, container: &str, patience: Duration) -> Option<Working> {
        let deadline = Instant::now() + patience;
        self.change(container, |t| t.asked += 1);
        let working = loop {
            if let Some(working) = self.take(container, Work::Asked) {
                break Some(working);
            }
            let all = self.lock();
            let gives_way = |all: &HashMap<String, Turn>| {
                all.get(container).and_then(|t| t.work) == Some(Work::GivesWay)
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let taken = all.get(container).is_some_and(|t| t.work.is_some());
            if left.is_zero() || (taken && !gives_way(&all)) {
                break None;
            }
            let changed = &self.0.1;
            drop(changed.wait_timeout_while(all, left, |all| gives_way(all)));
        };
        self.change(container, |t| t.asked -= 1);
        working
    }
}

impl Working {
    /// Whether somebody waits for the container.
    pub(super) fn is_asked_for(&self) -> bool {
        let all = self.turns.lock();
        all.get(&self.container).is_some_and(|t| t.asked > 0)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.turns.change(&self.container, |t| t.work = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn one_works_on_a_container_at_a_time() {
        let turns = Turns::default();
        let first = turns.take("a", Work::Asked).unwrap();
        assert!(turns.take("a", Work::Asked).is_none());
        assert!(turns.take("a", Work::GivesWay).is_none());
        assert!(turns.ask("a", LONG).is_none(), "it does not give way");
        assert!(turns.take("b", Work::Asked).is_some());
        drop(first);
        drop(turns.ask("a", LONG).unwrap());
        assert!(turns.lock().is_empty());
    }

    #[test]
    fn what_gives_way_does_and_goes_on_behind_who_asked() {
        let turns = Turns::default();
        let left = turns.take("a", Work::GivesWay).unwrap();
        assert!(turns.ask("a", Duration::ZERO).is_none(), "not in time");
        let other = turns.clone();
        let asking = thread::spawn(move || other.ask("a", LONG).unwrap());
        while !left.is_asked_for() {
            thread::yield_now();
        }
        drop(left);
        // Whether he has it already or is about to.
        assert!(turns.take("a", Work::GivesWay).is_none());
        let asked = asking.join().unwrap();
        assert!(turns.take("a", Work::GivesWay).is_none());
        drop(asked);
        assert!(turns.take("a", Work::GivesWay).is_some());
        assert!(turns.lock().is_empty());
    }
}
