//! A few threads for work that waits for the disk where no ring can.
//!
//! Threads come with the work, at most [`THREADS`], and go after [`IDLE`] without any. What one
//! connection may have here at once is bounded by [`super::line`], so none takes all of them. Where many
//! wait for what hangs (a disk; another host that has the bytes), others need not wait with them: while
//! nothing has begun for [`STUCK`], more threads come, up to [`MOST`].

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Threads of one server at most. They wait for disks, not for a processor: enough for several
/// connections with [`super::line::AT_POOL`] each, few enough to cost nothing that counts.
pub(super) const THREADS: usize = 64;

/// Threads of one server where all of those wait.
const MOST: usize = 1024;

/// Work that waits for so long while none begins gets more threads.
const STUCK: Duration = Duration::from_millis(100);

/// A thread without work ends after this long.
const IDLE: Duration = Duration::from_secs(2);

/// As for a connection's thread; what runs here runs there, too.
const STACK: usize = 512 << 10;

/// Something to be done.
pub(super) type Work = Box<dyn FnOnce() + Send>;

/// The pool: who drops it waits for its threads.
#[derive(Debug, Default)]
pub(super) struct Pool(Hands);

/// A way to the pool, from its own threads, too.
#[derive(Clone, Debug, Default)]
pub(super) struct Hands(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    come: Condvar,
    closing: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} threads", self.state().threads)
    }
}

#[derive(Default)]
struct State {
    queue: VecDeque<Work>,
    threads: usize,
    /// Those that wait for work.
    idle: usize,
    closed: bool,
    /// Work that has begun, ever.
    begun: u64,
    /// Somebody looks whether all of them wait.
    watched: bool,
    handles: Vec<JoinHandle<()>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of one thread.
    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(work) = state.queue.pop_front() {
                state.begun += 1;
                drop(state);
                // Who waits for the work is told by what it drops.
                if catch_unwind(AssertUnwindSafe(work)).is_err() {
                    tracing::error!("a request's work panicked; please report it");
                }
                state = self.state();
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let waited = self.come.wait_timeout(state, IDLE);
            let (back, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = back;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }

    /// Adds threads while none begins anything and there is work, until there is none.
    fn watch(self: &Arc<Shared>) {
        let mut state = self.state();
        let mut seen = state.begun;
        loop {
            let waited = self.closing.wait_timeout(state, STUCK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.closed || state.queue.is_empty() {
                break;
            }
            if state.begun == seen {
                let more = state.queue.len().min(THREADS);
                for _ in 0..more.min(MOST.saturating_sub(state.threads)) {
                    if self.hire(&mut state).is_err() {
                        break;
                    }
                }
            }
            seen = state.begun;
        }
        state.watched = false;
    }

    /// One thread more.
    fn hire(self: &Arc<Shared>, state: &mut State) -> io::Result<()> {
        let shared = self.clone();
        state.keep("nbd-disk", move || shared.work())?;
        state.threads += 1;
        Ok(())
    }
}

impl State {
    fn keep(&mut self, name: &str, life: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new().name(name.into());
        let handle = thread.stack_size(STACK).spawn(life)?;
        self.handles.retain(|h| !h.is_finished());
        self.handles.push(handle);
        Ok(())
    }
}

impl Hands {
    /// Has a thread do `work`, now or when one is free. Gives it back when no thread is to be had.
    pub(super) fn run(&self, work: Work) -> Result<(), Work> {
        let mut state = self.0.state();
        if state.idle <= state.queue.len() && state.threads < THREADS && !state.closed {
            match self.0.hire(&mut state) {
                Ok(()) => {}
                Err(e) if state.threads == 0 => {
                    drop(state);
                    tracing::error!(error = %e, "no thread for the work of requests");
                    return Err(work);
                }
                // Those that are there do it.
                Err(_) => {}
            }
        }
        if state.threads == 0 {
            return Err(work);
        }
        state.queue.push_back(work);
        if state.threads >= THREADS && state.idle == 0 && !state.watched && !state.closed {
            let shared = self.0.clone();
            let watch = state.keep("nbd-watch", move || shared.watch());
            // Without it they wait.
            state.watched = watch.is_ok();
        }
        drop(state);
        self.0.come.notify_one();
        Ok(())
    }
}

impl Pool {
    pub(super) fn hands(&self) -> &Hands {
        &self.0
    }

    /// Waits until everything is done and every thread has ended.
    pub(super) fn close(&self) {
        let shared = &self.0.0;
        let handles = {
            let mut state = shared.state();
            state.closed = true;
            std::mem::take(&mut state.handles)
        };
        shared.come.notify_all();
        shared.closing.notify_all();
        for handle in handles {
            // A thread catches what its work does.
            drop(handle.join());
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::sync::mpsc;

    /// Goal: work goes on beside any number of others that wait; threads are bounded, and go.
    #[test]
    fn work_that_waits_holds_up_no_other_and_the_threads_are_bounded() {
        let pool = Pool::default();
        let waiting = 2 * THREADS;
        let all = Arc::new(Barrier::new(waiting + 1));
        for _ in 0..waiting {
            let all = all.clone();
            let work = move || {
                all.wait();
            };
            assert!(pool.hands().run(Box::new(work)).is_ok());
        }
        let (late, done) = mpsc::channel();
        let work = move || late.send(()).unwrap();
        assert!(pool.hands().run(Box::new(work)).is_ok());
        done.recv().unwrap();
        assert!(pool.0.0.state().threads <= MOST);
        all.wait();
        pool.close();
        assert_eq!(pool.0.0.state().threads, 0);
    }

    #[test]
    fn closing_waits_for_what_was_taken_and_a_panic_ends_no_thread() {
        let pool = Pool::default();
        let count = Arc::new(AtomicUsize::new(0));
        for i in 0..100 {
            let count = count.clone();
            let work = move || {
                count.fetch_add(1, SeqCst);
                assert!(i % 10 != 3, "a panic that the test asked for");
            };
            assert!(pool.hands().run(Box::new(work)).is_ok());
        }
        pool.close();
        assert_eq!(count.load(SeqCst), 100);
        assert_eq!(pool.0.0.state().threads, 0);
        assert!(pool.hands().run(Box::new(|| ())).is_err());
    }
}
