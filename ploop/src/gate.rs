//! The gate that every change of a disk passes, and that a barrier closes for an instant.
//!
//! Passing costs two atomic additions. Whoever closes the gate waits until all who passed have left
//! and is then alone; those who come meanwhile wait for the gate to open. There is one closer at a
//! time. Inside a closed gate there is no I/O, with three exceptions that say how much: a cluster that
//! is moved or compared ([`crate::disk`], `moving`, `compact`), the end of growing, and the check of a
//! damaged open image.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Set while somebody closes; the rest counts those inside.
const CLOSED: u64 = 1 << 63;

/// See the module text.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: AtomicU64,
    moved: Mutex<()>,
    changed: Condvar,
    closer: Mutex<()>,
}

/// Being inside; leaves when dropped.
#[derive(Debug)]
pub(crate) struct Pass(Arc<Gate>);

/// Being alone; opens the gate when dropped.
#[derive(Debug)]
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
    _closer: MutexGuard<'a, ()>,
}

fn lock(m: &Mutex<()>) -> MutexGuard<'_, ()> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// Goes in; waits while the gate is closed.
    pub(crate) fn enter(self: &Arc<Gate>) -> Pass {
        while self.state.fetch_add(1, Ordering::Acquire) & CLOSED != 0 {
            self.leave();
            let mut moved = lock(&self.moved);
            while self.state.load(Ordering::Acquire) & CLOSED != 0 {
                moved = self
                    .changed
                    .wait(moved)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        Pass(self.clone())
    }

    fn leave(&self) {
        let before = self.state.fetch_sub(1, Ordering::Release);
        if before == CLOSED | 1 {
            let _moved = lock(&self.moved);
            self.changed.notify_all();
        }
    }

    /// Closes the gate and waits until everybody has left.
    pub(crate) fn close(&self) -> Closed<'_> {
        let closer = lock(&self.closer);
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
        let mut moved = lock(&self.moved);
        while self.state.load(Ordering::Acquire) != CLOSED {
            moved = self
                .changed
                .wait(moved)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Closed {
            gate: self,
            _closer: closer,
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.state.fetch_and(!CLOSED, Ordering::Release);
        let _moved = lock(&self.gate.moved);
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;

    #[test]
    fn a_closed_gate_waits_for_those_inside_and_lets_nobody_in() {
        let gate = Arc::new(Gate::default());
        let inside = gate.enter();
        let (closed, late) = (AtomicBool::new(false), AtomicBool::new(false));
        let (go, gone) = mpsc::channel::<()>();
        std::thread::scope(|s| {
            let (gate, closed, late) = (&gate, &closed, &late);
            let closer = s.spawn(move || {
                let alone = gate.close();
                closed.store(true, Ordering::SeqCst);
                gone.recv().unwrap();
                assert!(!late.load(Ordering::SeqCst));
                drop(alone);
            });
            while gate.state.load(Ordering::SeqCst) & CLOSED == 0 {
                std::thread::yield_now();
            }
            assert!(!closed.load(Ordering::SeqCst));
            let latecomer = s.spawn(|| {
                let _pass = gate.enter();
                late.store(true, Ordering::SeqCst);
            });
            drop(inside);
            while !closed.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            go.send(()).unwrap();
            closer.join().unwrap();
            latecomer.join().unwrap();
        });
        assert!(late.load(Ordering::SeqCst));
        assert_eq!(gate.state.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn many_passes_and_closers_never_meet_inside() {
        let gate = Arc::new(Gate::default());
        let (inside, alone) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..5_000 {
                        let _pass = gate.enter();
                        inside.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(alone.load(Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..2 {
                s.spawn(|| {
                    for _ in 0..500 {
                        let _closed = gate.close();
                        assert_eq!(alone.fetch_add(1, Ordering::SeqCst), 0);
                        assert_eq!(inside.load(Ordering::SeqCst), 0);
                        alone.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
    }
}
