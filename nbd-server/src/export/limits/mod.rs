//! I/O limits: who may send how much to a device, and who goes next.
//!
//! ```text
//!  engine ─▶ Gate::enter ─▶ go on
//!                 └────────▶ wait: a ticket ──▶ Told::granted, when its turn has come
//! ```
//!
//! * [`limiter`]: the rule, with time as an argument.
//! * [`Throttle`]: all containers of a process under one lock, and the one thread that looks when
//!   the next of those who wait may go; it is there only while somebody waits.
//! * [`Gate`]: a container's door, shared by all connections to it and to its snapshots. While
//!   nothing limits it, asking it is one load.
//!
//! | request | counts as |
//! |---|---|
//! | READ, WRITE | one request, and its bytes |
//! | CACHE | one read, and the bytes that it reads at most |
//! | TRIM, `WRITE_ZEROES` | one write; zeros are not moved, so their bytes are not counted |
//! | `BLOCK_STATUS` | one read |
//! | FLUSH | nothing, and never waits; nor does the flush of a FUA |
//!
//! A container that has limits is remembered after its last client: coming again does not fill its
//! buckets.

mod bucket;
mod limiter;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ploop::store::FileId;
use snapshots::limits::Limits;

pub use limiter::{Cost, Totals};

use limiter::{Grant, Id, Limiter};

/// The thread sleeps no shorter than this: turns that come within it are one. A small part of the
/// shortest burst, so that no token is lost by it.
const TICK: Duration = Duration::from_millis(1);

/// The thread ends after this long with nobody waiting.
const IDLE: Duration = Duration::from_secs(2);

/// Who waits.
pub trait Told: Send + Sync {
    /// The turn of this ticket has come. Must not block.
    fn granted(&self, ticket: u64);
}

type Who = Arc<dyn Told>;

/// What [`Gate::enter`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Go on.
    Pass,
    /// Wait until [`Told::granted`] names this ticket.
    Wait(u64),
}

/// A container as seen from outside.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Its name.
    pub name: String,
    /// Its limits.
    pub limits: Limits,
    /// What they did.
    pub totals: Totals,
}

/// See the module text.
#[derive(Default)]
pub struct Throttle {
    state: Mutex<State>,
    /// The time of the next turn is another.
    changed: Condvar,
    start: OnceInstant,
}

/// The instant that times are counted from.
struct OnceInstant(Instant);

impl Default for OnceInstant {
    fn default() -> OnceInstant {
        OnceInstant(Instant::now())
    }
}

struct State {
    limiter: Limiter<Who>,
    known: HashMap<String, Entered>,
    ids: Id,
    /// How often limits were set.
    sets: u64,
    /// When the thread looks again.
    due: Option<u64>,
    running: bool,
}

impl Default for State {
    fn default() -> State {
        State {
            limiter: Limiter::new(),
            known: HashMap::new(),
            ids: 0,
            sets: 0,
            due: None,
            running: false,
        }
    }
}

/// A container that was opened.
struct Entered {
    id: Id,
    /// Which disk it is: one that was removed and made anew begins anew.
    disk: FileId,
    limits: Limits,
    binds: Arc<AtomicBool>,
    /// Gates that are there.
    gates: usize,
}

impl fmt::Debug for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttle").finish_non_exhaustive()
    }
}

impl Throttle {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between two statements, as far as anybody can tell who waits.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The door of container `name`, which is this disk. `stored` reads its limits, and is asked again
    /// where some were set meanwhile: what it had read may be from before. `None`: they cannot be read,
    /// and those that are in force stay.
    pub fn gate(
        self: &Arc<Throttle>,
        name: &str,
        disk: FileId,
        stored: impl Fn() -> Option<Limits>,
    ) -> Arc<Gate> {
        let (mut state, limits) = loop {
            let before = self.lock().sets;
            let limits = stored();
            let state = self.lock();
            if state.sets == before {
                break (state, limits);
            }
        };
        if state.known.get(name).is_some_and(|e| e.disk != disk) {
            state.forget(name);
        }
        if !state.known.contains_key(name) {
            state.ids += 1;
            let entered = Entered {
                id: state.ids,
                disk,
                limits: Limits::default(),
                binds: Arc::default(),
                gates: 0,
            };
            state.known.insert(name.to_owned(), entered);
        }
        if let Some(limits) = &limits {
            self.set_in(&mut state, name, limits);
        }
        let (mut id, mut binds) = (0, Arc::default());
        if let Some(entered) = state.known.get_mut(name) {
            entered.gates += 1;
            (id, binds) = (entered.id, entered.binds.clone());
        }
        drop(state);
        Arc::new(Gate {
            name: name.to_owned(),
            id,
            binds,
            throttle: self.clone(),
        })
    }

    /// Sets the limits of a container, in force on return. They are stored already: one that was never
    /// opened has them from there when it is.
    pub fn set(self: &Arc<Throttle>, name: &str, limits: &Limits) {
        let mut state = self.lock();
        state.sets += 1;
        self.set_in(&mut state, name, limits);
        self.turn(state);
    }

    fn set_in(&self, state: &mut State, name: &str, limits: &Limits) {
        let now = self.now();
        if let Some(entered) = state.known.get_mut(name) {
            entered.limits = limits.clone();
            let id = entered.id;
            state.limiter.set(id, limits, now);
            entered.binds.store(state.limiter.binds(id), Relaxed);
        }
    }

    /// Sets the budget that all containers share by their weights; 0 is none.
    pub fn set_store(self: &Arc<Throttle>, iops: u64, bps: u64) {
        let mut state = self.lock();
        let now = self.now();
        state.limiter.set_store(iops, bps, now);
        for entered in state.known.values() {
            let binds = state.limiter.binds(entered.id);
            entered.binds.store(binds, Relaxed);
        }
        self.turn(state);
    }

    /// The budget of all: requests and bytes per second; 0 is none.
    pub fn store(&self) -> (u64, u64) {
        self.lock().limiter.store()
    }

    /// A container that is or was open, and limited.
    pub fn known(&self, name: &str) -> Option<Known> {
        let state = self.lock();
        state.known.get(name).map(|e| state.shown(name, e))
    }

    /// All of them, by name.
    pub fn all(&self) -> Vec<Known> {
        let state = self.lock();
        let mut all: Vec<_> = state.known.iter().map(|(n, e)| state.shown(n, e)).collect();
        drop(state);
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Forgets a container that was removed.
    pub fn forget(&self, name: &str) {
        self.lock().forget(name);
    }

    /// Lets go who may, and sees to it that the others are looked after.
    fn turn(self: &Arc<Throttle>, mut state: MutexGuard<'_, State>) {
        let mut granted = Vec::new();
        let due = state.limiter.grant(self.now(), &mut granted);
        self.look_at(&mut state, due);
        drop(state);
        tell(granted);
    }

    /// Has the thread look again at `due`. False when there is no thread to be had.
    fn look_at(self: &Arc<Throttle>, state: &mut State, due: Option<u64>) -> bool {
        let Some(due) = due else { return true };
        if state.due.is_none_or(|d| due < d) {
            state.due = Some(due);
            self.changed.notify_one();
        }
        if !state.running {
            let me = self.clone();
            let thread = std::thread::Builder::new().name("limits".into());
            match thread.spawn(move || me.run()) {
                Ok(_) => state.running = true,
                Err(e) => tracing::error!(error = %e, "no thread for limits; they do not hold"),
            }
        }
        state.running
    }

    /// The life of the thread.
    fn run(self: Arc<Throttle>) {
        let mut state = self.lock();
        loop {
            let now = self.now();
            let sleep = match state.due {
                Some(due) if due <= now => {
                    let mut granted = Vec::new();
                    state.due = state.limiter.grant(now, &mut granted);
                    drop(state);
                    tell(granted);
                    state = self.lock();
                    continue;
                }
                Some(due) => Duration::from_nanos(due - now).max(TICK),
                None => IDLE,
            };
            let idle = state.due.is_none();
            let waited = self.changed.wait_timeout(state, sleep);
            let (back, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = back;
            if idle && timeout.timed_out() && state.due.is_none() {
                state.running = false;
                return;
            }
        }
    }
}

impl State {
    fn shown(&self, name: &str, entered: &Entered) -> Known {
        Known {
            name: name.to_owned(),
            limits: entered.limits.clone(),
            totals: self.limiter.totals(entered.id),
        }
    }

    fn forget(&mut self, name: &str) {
        if let Some(entered) = self.known.remove(name) {
            self.limiter.forget(entered.id);
        }
    }
}

fn tell(granted: Vec<Grant<Who>>) {
    for (ticket, who) in granted {
        who.granted(ticket);
    }
}

/// See the module text.
#[derive(Debug)]
pub struct Gate {
    name: String,
    id: Id,
    binds: Arc<AtomicBool>,
    throttle: Arc<Throttle>,
}

impl Gate {
    /// False when every request may go on without asking.
    pub fn binds(&self) -> bool {
        self.binds.load(Relaxed)
    }

    /// Asks for a request: to go on, or to wait for its turn.
    pub fn enter(&self, cost: Cost, who: &Who) -> Entry {
        let mut state = self.throttle.lock();
        let now = self.throttle.now();
        if state.limiter.pass(self.id, cost, now) {
            return Entry::Pass;
        }
        let ticket = state.limiter.wait(self.id, cost, who.clone(), now);
        let mut granted = Vec::new();
        let due = state.limiter.grant_new(self.id, now, &mut granted);
        if !self.throttle.look_at(&mut state, due) {
            state.limiter.cancel(self.id, |t| t == ticket);
            granted.retain(|(t, _)| *t != ticket);
            drop(state);
            tell(granted);
            return Entry::Pass;
        }
        drop(state);
        let passed = granted.iter().position(|(t, _)| *t == ticket);
        if let Some(at) = passed {
            granted.swap_remove(at);
        }
        tell(granted);
        passed.map_or(Entry::Wait(ticket), |_| Entry::Pass)
    }

    /// Holds back every request to the container and its snapshots, but flushes, as if its turn did
    /// not come. Those that passed before may still be under way.
    pub fn halt(&self) {
        self.set_halted(true);
    }

    /// Takes [`Gate::halt`] back: what waits goes on, within its limits.
    pub fn resume(&self) {
        self.set_halted(false);
    }

    /// Lets clients write so many bytes per second at most, beside the container's limits; 0: as those
    /// say. In force on return.
    pub fn brake(&self, rate: u64) {
        let now = self.throttle.now();
        self.change(|limiter, id| limiter.brake(id, rate, now));
    }

    fn set_halted(&self, halted: bool) {
        self.change(|limiter, id| limiter.halt(id, halted));
    }

    fn change(&self, change: impl FnOnce(&mut Limiter<Who>, Id)) {
        let mut state = self.throttle.lock();
        change(&mut state.limiter, self.id);
        self.binds.store(state.limiter.binds(self.id), Relaxed);
        self.throttle.turn(state);
    }

    /// Forgets requests that wait.
    pub fn leave(&self, tickets: impl Fn(u64) -> bool) {
        let mut state = self.throttle.lock();
        state.limiter.cancel(self.id, tickets);
        // Who came behind them may be next.
        self.throttle.turn(state);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let mut state = self.throttle.lock();
        let Some(entered) = state.known.get_mut(&self.name) else {
            return;
        };
        if entered.id != self.id {
            return state.limiter.forget(self.id);
        }
        entered.gates -= 1;
        let used = state.limiter.totals(self.id) != Totals::default();
        let keep = |e: &Entered| e.gates > 0 || !e.limits.is_default() || used;
        if !state.known.get(&self.name).is_some_and(keep) {
            state.forget(&self.name);
        }
    }
}
