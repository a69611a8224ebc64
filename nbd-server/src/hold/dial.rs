//! Reaching servers, as often as it takes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::hold::agree::Failed;
use crate::hold::line::{Address, Line};

/// Pauses between two tries to reach a server.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(10);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long a server may take for a connection and what is said at first, before another is tried.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(60);

/// How long after a move a server that has no such export is not believed.
const SETTLES: Duration = Duration::from_secs(60);

/// Reaches servers.
#[derive(Clone, Debug)]
pub(super) struct Dialer {
    pub(super) to: watch::Receiver<Address>,
    /// How long a client waits for a server; `None`: for ever.
    pub(super) patience: Option<Duration>,
    /// When the server became another one.
    pub(super) moved: Moved,
}

/// When the server became another one, if it did.
pub(super) type Moved = Arc<Mutex<Option<Instant>>>;

/// Asks one server; says in the log, once, that it is not there.
struct Tries {
    pause: Duration,
    said: bool,
}

impl Dialer {
    /// Tries servers until `greet` succeeds with one. Error: `Ended`, or why patience is over.
    pub(super) async fn until_there<T>(
        &self,
        greet: impl AsyncFn(Line) -> Result<T, Failed>,
    ) -> Result<T, String> {
        let found = self.tries(greet);
        let Some(patience) = self.patience else {
            return found.await;
        };
        let late = format!("no server for {} s", patience.as_secs());
        tokio::time::timeout(patience, found)
            .await
            .unwrap_or(Err(late))
    }

    fn moved_lately(&self) -> bool {
        let moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        moved.is_some_and(|at| at.elapsed() < SETTLES)
    }

    async fn tries<T>(&self, greet: impl AsyncFn(Line) -> Result<T, Failed>) -> Result<T, String> {
        let mut tries = Tries {
            pause: PAUSE_MIN,
            said: false,
        };
        let mut to = self.to.clone();
        loop {
            let address = to.borrow_and_update().clone();
            let tried = async { greet(address.connect().await?).await };
            let tried = tokio::select! {
                tried = tokio::time::timeout(HANDSHAKE, tried) => tried,
                // Whatever this one would have said.
                _ = to.changed() => continue,
            };
            match tried {
                // One that was left meanwhile is no server, though it came to an end first: nobody is
                // told again that it was left.
                Ok(Ok(_)) if to.has_changed().unwrap_or(false) => continue,
                Ok(Ok(found)) => return Ok(found),
                // The disk is on its way there, or comes back.
                Ok(Err(Failed::Gone(why))) if self.moved_lately() => tries.say(&address, &why),
                Ok(Err(Failed::Gone(why) | Failed::Ended(why))) => return Err(why),
                Ok(Err(Failed::Lost(e))) => tries.say(&address, &e.to_string()),
                Ok(Err(Failed::Refused(why))) => tries.say(&address, &why),
                Err(_) => tries.say(&address, "it does not answer"),
            }
            tokio::select! {
                () = tokio::time::sleep(tries.pause) => {}
                // A new address is tried at once.
                _ = to.changed() => tries.pause = PAUSE_MIN,
            }
            tries.pause = (tries.pause * 2).min(PAUSE_MAX);
        }
    }
}

impl Tries {
    fn say(&mut self, address: &Address, why: &str) {
        if !std::mem::replace(&mut self.said, true) {
            tracing::info!(server = %address, why, "no server; trying again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hold::line::Address;
    use tokio::net::UnixListener;

    /// However the handshake with the server of before ends beside the move.
    #[test]
    fn a_server_that_was_left_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            let place = |name: &str| dir.path().join(name);
            let _servers = ["old", "new"].map(|n| UnixListener::bind(place(n)).unwrap());
            for _ in 0..32 {
                let moves = watch::Sender::new(Address::Unix(place("old")));
                let dialer = Dialer {
                    to: moves.subscribe(),
                    patience: None,
                    moved: Moved::default(),
                };
                let found = dialer.until_there(async |_| {
                    let at = moves.borrow().clone();
                    moves.send_if_modified(|to| {
                        let moved = *to == Address::Unix(place("old"));
                        *to = Address::Unix(place("new"));
                        moved
                    });
                    Ok(at)
                });
                assert_eq!(found.await, Ok(Address::Unix(place("new"))));
            }
        });
    }
}
