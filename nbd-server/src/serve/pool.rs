//! A few threads for work that waits for the disk where no ring can.
//!
//! Threads come with the work, at most [`THREADS`], and go after [`IDLE`] without any. What one
//! connection may have here at once is bounded by [`super::line`], so none takes all of them.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Threads of one server at most. They wait for disks, not for a processor: enough for several
/// connections with [`super::line::AT_POOL`] each, few enough to cost nothing that counts.
pub(super) const THREADS: usize = 64;

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
}

impl Hands {
    /// Has a thread do `work`, now or when one is free. Gives it back when no thread is to be had.
    pub(super) fn run(&self, work: Work) -> Result<(), Work> {
        let mut state = self.0.state();
        if state.idle <= state.queue.len() && state.threads < THREADS && !state.closed {
            let shared = self.0.clone();
            let thread = std::thread::Builder::new().name("nbd-disk".into());
            match thread.stack_size(STACK).spawn(move || shared.work()) {
                Ok(handle) => {
                    state.threads += 1;
                    state.handles.retain(|h| !h.is_finished());
                    state.handles.push(handle);
                }
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

    #[test]
    fn work_that_waits_holds_up_no_other_and_the_threads_are_bounded() {
        let pool = Pool::default();
        let all = Arc::new(Barrier::new(THREADS + 1));
        for _ in 0..THREADS {
            let all = all.clone();
            assert!(
                pool.hands()
                    .run(Box::new(move || {
                        all.wait();
                    }))
                    .is_ok()
            );
        }
        let (late, done) = mpsc::channel();
        assert!(
            pool.hands()
                .run(Box::new(move || late.send(()).unwrap()))
                .is_ok()
        );
        assert_eq!(pool.0.0.state().threads, THREADS);
        assert!(done.try_recv().is_err());
        all.wait();
        done.recv().unwrap();
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
