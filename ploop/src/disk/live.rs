//! Rearranging the layers of an open disk under its clients.
//!
//! ```text
//!  barrier            seal: flush, close        descriptor's rename      committed
//!  ───┬───────────────────┬───────────────────────────┬──────────────────────┬──▶
//!     │ writes go to the new top; no flush is answered until ────────────────┘
//! ```
//!
//! A barrier closes the disk's gate, exchanges one pointer and opens the gate: no I/O happens
//! inside. What was the top is *sealing*: it serves reads where it is, and becomes a layer of the
//! chain once its bytes and the descriptor that says so are durable. When that fails, both tops
//! latch: what clients wrote since the barrier was never flushed, and is lost as in a crash.
//!
//! [`Disk::publish`] puts another version in force; [`Disk::drain`] waits until nobody holds an
//! earlier one, which is when space that only those name may be freed.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::open::Opener;
use super::{Disk, Stack};
use crate::chain::Chain;
use crate::error::{Error, Kind, Result};
use crate::format::ploop::top::Top;
use crate::gate::Closed;
use crate::locks;

/// Between two looks for the last lease.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// The top until the last barrier.
#[derive(Debug)]
pub(crate) struct Seal {
    pub(crate) top: Arc<Top>,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug)]
enum State {
    Sealing,
    Committed,
    /// Taken back while the gate was still closed: the old top is the top again.
    Pulled,
    Failed(String),
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seal {
    fn new(top: Arc<Top>) -> Seal {
        Seal {
            top,
            state: Mutex::new(State::Sealing),
            ended: Condvar::new(),
        }
    }

    /// Waits until the barrier is committed (true) or was taken back (false, and another version is
    /// in force). Error: `Latched` when it failed.
    pub(crate) fn wait(&self) -> Result<bool> {
        let mut state = lock(&self.state);
        loop {
            match &*state {
                State::Sealing => {
                    state = self
                        .ended
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                State::Committed => return Ok(true),
                State::Pulled => return Ok(false),
                State::Failed(why) => {
                    let what = format!("a snapshot failed half-way ({why})");
                    return Err(Error::new(Kind::Latched, what)
                        .on(self.top.file().path())
                        .fix(
                            "Stop the service, check the disk with `ploop check`, open it again",
                        ));
                }
            }
        }
    }

    fn end(&self, state: State) {
        *lock(&self.state) = state;
        self.ended.notify_all();
    }
}

/// A closed gate: no change is under way, and none begins. Opens when dropped.
#[derive(Debug)]
pub struct Barrier<'a> {
    pub(super) disk: &'a Disk,
    _alone: Closed<'a>,
}

/// A barrier that was passed and is not committed yet.
#[derive(Debug)]
pub struct Sealing {
    seal: Arc<Seal>,
    /// The version whose top is the old one: what its clusters are completed from.
    before: Arc<Stack>,
    new: Arc<Top>,
    done: bool,
}

impl Disk {
    /// Closes the gate, once all changes under way have ended. For an instant only: no I/O, and no
    /// waiting for anything but other barriers, while the result lives.
    pub fn barrier(&self) -> Barrier<'_> {
        Barrier {
            _alone: self.gate.close(),
            disk: self,
        }
    }

    /// The file of the writable top. Error: `ReadOnly`.
    pub fn top_file(&self) -> Result<std::path::PathBuf> {
        Ok(self.stack().top()?.file().path().to_path_buf())
    }

    /// The writable top. Error: `ReadOnly`.
    pub fn top(&self) -> Result<Arc<Top>> {
        self.stack().top().cloned()
    }

    /// Waits until nobody else rearranges this disk, and keeps others from it. Whoever wants several
    /// disks takes them in one order.
    pub fn arrange(&self) -> MutexGuard<'_, ()> {
        lock(&self.arranging)
    }

    /// Puts `stack` in force, with the trackers that are. The caller is the only one who rearranges
    /// this disk.
    pub(super) fn publish_stack(&self, mut stack: Stack) {
        // Who drains sees the version of before, or comes before this.
        let mut past = lock(&self.past);
        stack.tracked = self.tracking.set();
        self.replace(&mut past, stack);
    }

    /// The trackers were changed; the gate is closed. Others may rearrange the disk meanwhile.
    pub(super) fn publish_trackers(&self) {
        let mut past = lock(&self.past);
        let now = self.stack();
        let stack = Stack {
            below: now.below.clone(),
            sealing: now.sealing.clone(),
            top: now.top.clone(),
            size: now.size,
            cluster: now.cluster,
            tracked: self.tracking.set(),
            alive: Arc::default(),
        };
        drop(now);
        self.replace(&mut past, stack);
    }

    fn replace(&self, past: &mut Vec<Weak<()>>, stack: Stack) {
        let old = self.current.swap(Arc::new(stack));
        past.retain(|v| v.strong_count() > 0);
        past.push(Arc::downgrade(&old.alive));
    }

    /// Puts another chain under the top, which must read the same. Not between a barrier and its
    /// commit.
    pub fn publish(&self, below: Option<Arc<Chain>>) {
        let now = self.stack();
        debug_assert!(now.sealing.is_none());
        self.publish_stack(Stack {
            below,
            sealing: None,
            top: now.top.clone(),
            size: now.size,
            cluster: now.cluster,
            tracked: None,
            alive: Arc::default(),
        });
    }

    /// Waits until no lease holds a version but the one in force, and what only those held is
    /// closed. Leases end when their bytes are moved, whatever the client does.
    pub fn drain(&self) {
        loop {
            {
                let mut past = lock(&self.past);
                past.retain(|v| v.strong_count() > 0);
                if past.is_empty() {
                    // What the last holders did is done before what the caller does next.
                    fence(Ordering::Acquire);
                    return;
                }
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Runs `change` as a change of the disk: a barrier waits for it.
    pub fn inside<T>(&self, change: impl FnOnce() -> T) -> T {
        let _pass = self.gate.enter();
        change()
    }
}

impl Barrier<'_> {
    /// From here on writes go to `new`, an empty image that is marked in use and durable but for
    /// its place in the descriptor. Only while no other barrier of this disk waits for its commit.
    /// The caller holds [`Disk::arrange`]. Errors, with nothing changed: `ReadOnly`; `Latched`; `InUse` after a barrier that was not
    /// settled ([`Disk::settle`]).
    pub fn push_top(&self, new: Arc<Top>) -> Result<Sealing> {
        let now = self.disk.stack();
        let old = now.top()?;
        old.check_latch()?;
        if now.sealing.is_some() {
            let what = "the snapshot before this one is not sealed yet";
            return Err(Error::new(Kind::InUse, what).on(old.file().path()));
        }
        let seal = Arc::new(Seal::new(old.clone()));
        new.track(old.track(None));
        self.disk.publish_stack(Stack {
            below: now.below.clone(),
            sealing: Some(seal.clone()),
            top: Some(new.clone()),
            size: now.size,
            cluster: now.cluster,
            tracked: None,
            alive: Arc::default(),
        });
        Ok(Sealing {
            seal,
            before: now,
            new,
            done: false,
        })
    }
}

impl Barrier<'_> {
    /// Takes back a [`Barrier::push_top`] of this same barrier.
    pub fn pull_top(&self, mut sealing: Sealing) {
        let now = self.disk.stack();
        sealing.seal.top.track(sealing.new.track(None));
        self.disk.publish_stack(Stack {
            below: now.below.clone(),
            sealing: None,
            top: Some(sealing.seal.top.clone()),
            size: now.size,
            cluster: now.cluster,
            tracked: None,
            alive: Arc::default(),
        });
        sealing.done = true;
        sealing.seal.end(State::Pulled);
    }
}

impl Sealing {
    /// Completes what was the top, makes it durable and closes it. Blocks for its dirty data.
    pub fn seal(&self) -> Result<()> {
        self.before.complete_parts()?;
        self.seal.top.close()?;
        let held = self.seal.top.held();
        held.account().seal(held.own());
        Ok(())
    }

    /// The descriptor that makes the new top one is durable: lets flushes go on.
    pub fn committed(mut self) {
        self.done = true;
        self.seal.end(State::Committed);
    }
}

impl Disk {
    /// Makes the top of before the last barrier a layer of the chain. After an error it stays where
    /// it is, and the next call tries again; clients notice nothing.
    pub fn settle(&self, opener: &Opener) -> Result<()> {
        let now = self.stack();
        let Some(seal) = &now.sealing else {
            return Ok(());
        };
        if !seal.wait()? {
            return Ok(());
        }
        let old = seal.top.file();
        // The others may read it from now on; that we do is seen all the time.
        locks::downgrade(old.as_ref())?;
        let delta = opener.sealed_delta(old.path())?;
        let below = opener.chain_over(now.below.as_ref(), delta)?;
        self.publish_stack(Stack {
            below: Some(below),
            sealing: None,
            top: now.top.clone(),
            size: now.size,
            cluster: now.cluster,
            tracked: None,
            alive: Arc::default(),
        });
        Ok(())
    }
}

impl Drop for Sealing {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let why = Error::new(Kind::Io, "a snapshot was not committed");
        self.new.latch(&why);
        self.seal.top.latch(&why);
        self.seal.end(State::Failed(why.what().to_owned()));
    }
}
