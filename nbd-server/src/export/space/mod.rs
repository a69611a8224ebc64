//! The host's room for a store: how much of it containers may take, and what is kept back.
//!
//! ```text
//!  file system of the store
//!  ├── used ──┼──────────── free ────────────┼─ reserve ─┤
//!             │ containers may take │ hard │
//!             │        plenty   │ low (soft) │
//! ```
//!
//! * What containers may take is a budget ([`ploop::host`]) that every granule they newly take is
//!   paid from, before its bytes are written. A thread looks at the file system, often while
//!   somebody takes and seldom else; who is short of room looks at once, so that nobody is refused
//!   what is there. What was overwritten in place is never asked for.
//! * The reserve is a file ([`ploop::store::reserved`]). The thread fills it, as soon as there is room
//!   and nobody has needed it for a while: before any container gets that room.
//! * Below the soft mark it is said once, in the log and in the metrics; below the hard mark, writes
//!   that need room get ENOSPC, or wait. A request that waits ([`Space::wait`]) holds nothing. It is
//!   tried again whenever a look finds room, and what the host itself refuses waits the same way.
//!
//! Several processes on one store each have a budget, from the same figures: between two looks they
//! may take beyond the hard mark together, never of the reserve.

mod level;
mod options;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use ploop::account::GRANULE;
use ploop::error::{Error, Kind, Result};
use ploop::host::{Budget, Look};
use ploop::store::Store;
use ploop::store::reserved::Reserve;

use super::limits::Told;

pub use level::{Level, Seen};
pub use options::{Amount, LEAVE_OUT, OnFull, Options};

/// Between two looks while somebody takes room, or waits for some.
const TICK: Duration = Duration::from_millis(200);

/// Between two looks else.
const IDLE: Duration = Duration::from_secs(1);

/// Tickets of those who wait are above this; those of limits are not.
const TICKETS: u64 = 1 << 63;

/// What is looked at.
#[derive(Debug)]
pub struct Host {
    /// A directory on it.
    pub dir: PathBuf,
    /// What asks it.
    pub store: Arc<dyn Store>,
    /// What is kept of it, if anything is.
    pub reserve: Option<Arc<Reserve>>,
}

/// How the host is and was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// At the last look.
    pub seen: Seen,
    /// How full that is.
    pub level: Level,
    /// How often it became low, and full.
    pub crossed: (u64, u64),
    /// Writes that got ENOSPC for it.
    pub refused: u64,
    /// Requests that wait now, and that had to, together.
    pub waiting: (u64, u64),
    /// How often some of the reserve was given up, and how many bytes together.
    pub reserve_used: (u64, u64),
}

#[derive(Default)]
struct State {
    status: Status,
    /// Whoever waits, by ticket.
    waiting: Vec<(u64, Arc<dyn Told>)>,
    tickets: u64,
    /// At the tick before: granules taken, and uses of the reserve.
    before: (u64, u64),
    /// A failed look was said.
    failed: bool,
}

/// See the module text.
pub struct Space {
    host: Host,
    options: Options,
    budget: Arc<Budget>,
    state: Mutex<State>,
    refused: AtomicU64,
    clock: Arc<Clock>,
}

/// What wakes the thread.
#[derive(Debug, Default)]
struct Clock {
    /// It is to end.
    over: Mutex<bool>,
    changed: Condvar,
    /// Somebody has come to wait.
    soon: AtomicBool,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("host", &self.host)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Space {
    /// Looks once. The reserve stays as it is before [`Space::begin`]. Error: `Invalid` for options
    /// that do not go with the host.
    pub fn of(host: Host, options: &Options) -> Result<Arc<Space>> {
        if host.reserve.is_none() && options.reserve.is_some_and(|r| r != Amount::Bytes(0)) {
            let what = "only a store has a reserve, and a container of one";
            return Err(Error::invalid(what)
                .on(&host.dir)
                .fix("Leave --reserve out"));
        }
        let space = Space::new(host, options);
        space.look();
        Ok(space)
    }

    /// Fills the reserve, and goes on looking until this is dropped. Blocks for the file system. Error:
    /// that of starting a thread.
    pub fn begin(self: &Arc<Self>) -> Result<()> {
        self.tick();
        // Only now is one cut that is too large: of two services on a store the larger one stays.
        let seen = self.lock().status.seen;
        self.refill(&seen);
        let (weak, clock) = (Arc::downgrade(self), self.clock.clone());
        std::thread::Builder::new()
            .name("space".into())
            .spawn(move || run(&weak, &clock))
            .map_err(|e| Error::new(Kind::Io, "start the watch of the host's room").caused_by(e))?;
        Ok(())
    }

    fn new(host: Host, options: &Options) -> Arc<Space> {
        let budget = Arc::new(Budget::of(&host.dir));
        Arc::new_cyclic(|me: &Weak<Space>| {
            let look: Weak<dyn Look> = me.clone();
            budget.watched_by(look);
            Space {
                host,
                options: options.clone(),
                budget,
                state: Mutex::default(),
                refused: AtomicU64::new(0),
                clock: Arc::default(),
            }
        })
    }

    /// What disks of the store are to draw on.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// The directory that it looks at.
    pub fn dir(&self) -> &Path {
        &self.host.dir
    }

    /// What becomes of writes on a full host.
    pub fn on_full(&self) -> OnFull {
        self.options.on_full.unwrap_or_default()
    }

    /// How the host is now. Blocks for its answer.
    pub fn status(&self) -> Status {
        let mut state = self.lock();
        self.look_at(&mut state);
        let reserve = self.host.reserve.as_ref();
        Status {
            waiting: (state.waiting.len() as u64, state.status.waiting.1),
            refused: self.refused.load(Relaxed),
            reserve_used: reserve.map_or((0, 0), |r| r.used()),
            ..state.status
        }
    }

    /// A client's write was answered with ENOSPC.
    pub fn note_refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// Waits until it may be worth trying again; `again`: not for the first time. The ticket is named
    /// by [`Told::granted`] then, once.
    pub fn wait(&self, who: &Arc<dyn Told>, again: bool) -> u64 {
        let mut state = self.lock();
        state.tickets += 1;
        let ticket = TICKETS + state.tickets;
        state.waiting.push((ticket, who.clone()));
        state.status.waiting.1 += u64::from(!again);
        drop(state);
        self.clock.soon.store(true, Relaxed);
        drop(self.clock.lock());
        self.clock.changed.notify_one();
        ticket
    }

    /// Forgets who waits.
    pub fn leave(&self, tickets: impl Fn(u64) -> bool) {
        self.lock().waiting.retain(|(ticket, _)| !tickets(*ticket));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One look: sets the budget, and says what changed.
    fn look_at(&self, state: &mut State) {
        let landed = self.budget.landed();
        let asked = self.host.store.space(&self.host.dir).and_then(|space| {
            let reserve = self.host.reserve.as_ref().map_or(Ok(0), |r| r.held())?;
            Ok(space.map(|space| (space, reserve)))
        });
        let asked = asked.unwrap_or_else(|e| {
            if !std::mem::replace(&mut state.failed, true) {
                tracing::error!(error = %e, "the host's room is not known: nothing is held back");
            }
            None
        });
        let Some((space, reserve)) = asked else {
            return self.budget.set(landed, None);
        };
        state.failed = false;
        let (soft, hard) = self.options.marks_of(space.total);
        let wanted = match self.host.reserve {
            Some(_) => self.options.reserve_of(space.total),
            None => 0,
        };
        let mut seen = Seen {
            total: space.total,
            free: 0,
            soft,
            hard,
            reserve,
            reserve_wanted: wanted,
        };
        seen.free = space.available.saturating_sub(seen.missing());
        self.budget.set(landed, Some(seen.allowed() / GRANULE));
        state.status.seen = seen;
        self.judge(state, false);
    }

    /// Says, once, that the host has become fuller or less full.
    fn judge(&self, state: &mut State, refused: bool) {
        let (seen, before) = (state.status.seen, state.status.level);
        let level = seen.level(before, refused);
        state.status.level = level;
        if level == before {
            return;
        }
        let crossed = &mut state.status.crossed;
        crossed.0 += u64::from(before == Level::Plenty);
        crossed.1 += u64::from(level == Level::Full);
        let dir = self.host.dir.display();
        let Seen {
            free, soft, hard, ..
        } = seen;
        match level {
            Level::Full => {
                let on_full = self.on_full();
                tracing::warn!(%dir, free, hard, %on_full, "the host is full: containers get no more room");
            }
            Level::Low if before == Level::Plenty => {
                tracing::warn!(%dir, free, soft, hard, "the host has little room left");
            }
            Level::Low => tracing::warn!(%dir, free, soft, "the host has a little room again"),
            Level::Plenty => tracing::info!(%dir, free, soft, "the host has room again"),
        }
    }

    /// What the thread does now and then; how long until the next time.
    fn tick(&self) -> Duration {
        let mut state = self.lock();
        self.look_at(&mut state);
        let seen = state.status.seen;
        let used = self.host.reserve.as_ref().map_or(0, |r| r.used().0);
        let now = (self.budget.taken(), used);
        let before = std::mem::replace(&mut state.before, now);
        let woken = match self.budget.left() {
            0 => Vec::new(),
            _ => std::mem::take(&mut state.waiting),
        };
        let busy = now != before || state.status.level != Level::Plenty || !woken.is_empty();
        let busy = busy || !state.waiting.is_empty();
        drop(state);
        for (ticket, who) in woken {
            who.granted(ticket);
        }
        // Whoever uses it now would only have to give it up again.
        let refills = used == before.1 && seen.missing() > 0;
        let short = refills && !self.refill(&seen);
        match busy || short {
            true => TICK,
            false => IDLE,
        }
    }

    /// Brings the reserve to what is wanted; false when there is not enough room for that.
    fn refill(&self, seen: &Seen) -> bool {
        let Some(reserve) = &self.host.reserve else {
            return true;
        };
        let asked = self.host.store.space(&self.host.dir);
        let Ok(Some(space)) = asked else { return true };
        let most = space.available;
        match reserve.fill(seen.reserve_wanted, most) {
            Ok(()) => most >= seen.missing(),
            Err(e) if e.kind() == Kind::NoSpace => false,
            Err(e) => {
                tracing::warn!(error = %e, "the store's reserve cannot be filled");
                false
            }
        }
    }
}

impl Look for Space {
    fn look(&self) {
        self.look_at(&mut self.lock());
    }

    fn refused(&self, _: u64) {
        self.judge(&mut self.lock(), true);
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        *self.clock.lock() = true;
        // Nobody looks any more.
        self.budget.set(self.budget.landed(), None);
        self.clock.changed.notify_one();
    }
}

impl Clock {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until `until`, or a [`TICK`] from when somebody comes to wait. False when it is over.
    fn sleep(&self, mut until: Instant) -> bool {
        let mut over = self.lock();
        while !*over {
            let now = Instant::now();
            if self.soon.swap(false, Relaxed) {
                until = until.min(now + TICK);
            }
            if now >= until {
                return true;
            }
            let waited = self.changed.wait_timeout(over, until - now);
            over = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }
}

/// The life of the thread.
fn run(space: &Weak<Space>, clock: &Clock) {
    let mut next = Instant::now() + TICK;
    while clock.sleep(next) {
        let Some(space) = space.upgrade() else {
            return;
        };
        next = Instant::now() + space.tick();
    }
}
