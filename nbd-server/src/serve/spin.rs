//! Waiting for the next request without going to sleep, while that is worth it.
//!
//! To be woken takes longer than to read a page of the page cache, and it costs the client too, which
//! does the waking. So a connection whose requests follow each other quickly is looked at again and
//! again for a moment before its thread sleeps; other threads that want the processor get it in
//! between. Nobody spins for a client that is slow: one wait that was not short, and the next ones
//! are slept through until several in a row have been short. Nor do more than half of the processors.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A wait that is shorter is a short one; nobody spins for longer.
const SHORT: Duration = Duration::from_micros(100);
/// So many short waits in a row make it worth while.
const ENOUGH: u8 = 8;

/// Threads of this process that spin now.
static SPINNING: AtomicUsize = AtomicUsize::new(0);

/// What is waited for.
pub(super) trait Source {
    /// Takes what is there; `None` when nothing is.
    fn receive_now(&self, buf: &mut [u8]) -> io::Result<Option<usize>>;
    /// Sleeps until something is there.
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize>;
}

/// How the waits of one connection went.
#[derive(Debug, Default)]
pub(super) struct Spin {
    short: u8,
}

impl Spin {
    /// Waits for `source` and takes what comes. Blocks.
    pub(super) fn receive(&mut self, source: &impl Source, buf: &mut [u8]) -> io::Result<usize> {
        let began = Instant::now();
        if self.short == ENOUGH
            && let Some(_place) = Place::take()
        {
            while began.elapsed() < SHORT {
                if let Some(n) = source.receive_now(buf)? {
                    return Ok(n);
                }
                std::thread::yield_now();
            }
        }
        let got = source.receive(buf);
        self.short = match began.elapsed() < SHORT {
            true => ENOUGH.min(self.short + 1),
            false => 0,
        };
        got
    }
}

/// One of the places for those who spin.
struct Place;

impl Place {
    fn take() -> Option<Place> {
        static PLACES: OnceLock<usize> = OnceLock::new();
        let places = *PLACES.get_or_init(|| {
            let processors = std::thread::available_parallelism();
            processors.map_or(0, |n| n.get() / 2)
        });
        let taken = SPINNING.fetch_add(1, Ordering::Relaxed);
        // Given back at once where there was none.
        let place = Place;
        (taken < places).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        SPINNING.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Answers each look with nothing until some time after the first.
    struct Late {
        after: Cell<Duration>,
        first: Cell<Option<Instant>>,
        slept: Cell<u32>,
    }

    impl Late {
        fn at(&self, after: Duration) {
            self.after.set(after);
            self.first.set(None);
        }
    }

    impl Source for Late {
        fn receive_now(&self, _: &mut [u8]) -> io::Result<Option<usize>> {
            let first = self.first.get().unwrap_or_else(Instant::now);
            self.first.set(Some(first));
            Ok((first.elapsed() >= self.after.get()).then_some(1))
        }

        fn receive(&self, _: &mut [u8]) -> io::Result<usize> {
            self.slept.set(self.slept.get() + 1);
            while self.receive_now(&mut [])?.is_none() {}
            Ok(1)
        }
    }

    #[test]
    fn a_slow_client_is_slept_for_and_everything_is_received_once() {
        let source = Late {
            after: Cell::default(),
            first: Cell::default(),
            slept: Cell::default(),
        };
        let mut spin = Spin::default();
        let wait = |spin: &mut Spin, after| {
            source.at(after);
            assert_eq!(spin.receive(&source, &mut []).unwrap(), 1);
        };
        for _ in 0..100 {
            wait(&mut spin, 2 * SHORT);
        }
        assert_eq!((source.slept.get(), spin.short), (100, 0));
        // However noisy the machine: a wait is slept through or it is not, and never lost.
        for _ in 0..1000 {
            wait(&mut spin, Duration::ZERO);
        }
        assert!(spin.short <= ENOUGH);
        wait(&mut spin, 3 * SHORT);
        assert_eq!(spin.short, 0);
    }
}
