//! One sync for many flushes.
//!
//! A flush may share only a sync that *started* after the flush arrived: a sync under way may have
//! passed the very bytes that the flush must cover. So whoever arrives while run *k* is under way
//! waits for run *k + 1*; all who wait for it share it.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::error::{Error, Kind, Result};

#[derive(Debug, Default)]
struct State {
    started: u64,
    finished: u64,
    running: bool,
    failed: Option<String>,
}

/// The gate that all flushes of one image go through. Latches: after one failed sync every later
/// flush fails, until the image is opened anew.
#[derive(Debug, Default)]
pub struct FlushGate {
    state: Mutex<State>,
    ended: Condvar,
}

impl FlushGate {
    /// Runs `sync`, or waits for a run of another thread that starts after this call. Its error
    /// latches; the error inside its `Ok` does not: nobody shares that, and the next flush tries
    /// anew.
    pub fn run(&self, sync: impl FnOnce() -> Result<Result<()>>) -> Result<()> {
        let lock = |s| self.ended.wait(s).unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let need = state.started + 1;
        loop {
            if let Some(why) = &state.failed {
                return Err(latched(why));
            }
            if state.finished >= need {
                return Ok(());
            }
            if !state.running {
                break;
            }
            state = lock(state);
        }
        state.running = true;
        state.started += 1;
        drop(state);

        let result = sync();

        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running = false;
        match &result {
            Ok(Ok(())) => state.finished = state.started,
            // Who waits for this run has one of its own.
            Ok(Err(_)) => {}
            Err(e) => state.failed = Some(e.to_string()),
        }
        drop(state);
        self.ended.notify_all();
        result?
    }

    /// Latches from outside: a failure that makes every later flush a lie.
    pub fn latch(&self, why: &Error) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.failed.get_or_insert_with(|| why.to_string());
        drop(state);
        self.ended.notify_all();
    }

    /// The error that latched the image, if one did.
    pub fn check(&self) -> Result<()> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state
            .failed
            .as_deref()
            .map_or(Ok(()), |why| Err(latched(why)))
    }
}

fn latched(why: &str) -> Error {
    Error::new(
        Kind::Latched,
        format!("writing was stopped by an earlier failure ({why})"),
    )
    .fix("Stop the service, check the disk with `ploop check`, and open it again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc;

    #[test]
    fn a_flush_never_shares_a_sync_that_began_before_it_and_shares_the_next() {
        let gate = FlushGate::default();
        let runs = AtomicU64::new(0);
        let (in_first, wait_first) = mpsc::channel();
        let (go, gone) = mpsc::channel::<()>();
        std::thread::scope(|s| {
            let (gate, runs) = (&gate, &runs);
            s.spawn(move || {
                gate.run(|| {
                    in_first.send(()).unwrap();
                    gone.recv().unwrap();
                    runs.fetch_add(1, Ordering::SeqCst);
                    Ok(Ok(()))
                })
            });
            wait_first.recv().unwrap();
            let late: Vec<_> = (0..4)
                .map(|_| {
                    s.spawn(move || {
                        gate.run(|| {
                            runs.fetch_add(1, Ordering::SeqCst);
                            Ok(Ok(()))
                        })
                    })
                })
                .collect();
            go.send(()).unwrap();
            for t in late {
                t.join().unwrap().unwrap();
            }
        });
        let runs = runs.into_inner();
        assert!(
            (2..=5).contains(&runs),
            "{runs}: none of the late ones may use the first run"
        );
    }

    #[test]
    fn a_flush_that_could_not_be_done_is_no_reason_to_stop() {
        let gate = FlushGate::default();
        let full = || Ok(Err(Error::new(Kind::NoSpace, "full")));
        assert_eq!(gate.run(full).unwrap_err().kind(), Kind::NoSpace);
        let mut ran = false;
        gate.run(|| {
            ran = true;
            Ok(Ok(()))
        })
        .unwrap();
        assert!(ran);
    }

    #[test]
    fn after_a_failed_sync_no_flush_succeeds_again() {
        let gate = FlushGate::default();
        assert!(
            gate.run(|| Err(Error::new(Kind::Io, "disk on fire")))
                .is_err()
        );
        let e = gate.run(|| Ok(Ok(()))).unwrap_err();
        assert_eq!(e.kind(), Kind::Latched);
        assert!(e.to_string().contains("disk on fire"), "{e}");
        assert!(gate.check().is_err());
    }
}
