//! The handshake of one connection, with its deadline.
//!
//! The state machine asks [`crate::Exports`], which may open files and block, so every step of it
//! runs on tokio's blocking threads. The connection's slot travels with the step: an `open` that
//! hangs past the deadline still counts against the limit of connections. Where a handshake ends
//! early, what it holds is let go on such a thread too: that may close a disk.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::hall::{Seat, Watched};
use crate::export::Exports;
use crate::session::{Handshake, Negotiated, Step};

/// What a handshake in progress owns. The order is that of letting go: the export before the seat.
pub(super) struct Greeted {
    handshake: Option<Handshake>,
    /// Received and not used; after the end, the first bytes of transmission.
    pub(super) input: Vec<u8>,
    out: Vec<u8>,
    /// The connection's place among all of them.
    pub(super) seat: Seat,
}

/// How a handshake ended.
pub(super) enum Outcome {
    /// Transmission begins. The export goes before what was greeted.
    Negotiated(Box<Later<(Box<Negotiated>, Greeted)>>),
    /// The session is over; says why.
    Closed(String),
}

/// What may block when it is dropped, and so is dropped where that hurts nobody else.
pub(super) struct Later<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Later<T> {
    fn new(value: T) -> Later<T> {
        Later(Some(value))
    }

    pub(super) fn get(&self) -> &T {
        self.0.as_ref().expect("only take and drop empty it")
    }

    fn get_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("only take and drop empty it")
    }

    /// The value; from now on it drops as usual.
    pub(super) fn take(mut self) -> T {
        self.0.take().expect("only take and drop empty it")
    }
}

impl<T: Send + 'static> Drop for Later<T> {
    fn drop(&mut self) {
        if let (Some(value), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            // A runtime that is ending drops it here and now.
            drop(runtime.spawn_blocking(move || drop(value)));
        }
    }
}

const RECEIVE: usize = 4 << 10;

/// Time that a handshake has to come to an end when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(1);

fn closed(why: impl Into<String>) -> Outcome {
    Outcome::Closed(why.into())
}

/// Runs a handshake on `stream` to its end, at most `deadline` long.
pub(super) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    seat: Seat,
    exports: Arc<dyn Exports>,
    deadline: Duration,
    stop: watch::Receiver<bool>,
) -> Outcome {
    let mut stopped = stop.clone();
    let cut = seat.cut.clone();
    let last_call = async {
        // An error means that the server itself is gone.
        drop(stopped.wait_for(|s| *s).await);
        tokio::time::sleep(STOP_GRACE).await;
    };
    tokio::select! {
        outcome = negotiate(stream, seat, exports, stop) => {
            outcome.unwrap_or_else(|e| closed(format!("the socket failed: {e}")))
        }
        () = tokio::time::sleep(deadline) => {
            closed(format!("the handshake took longer than {} s", deadline.as_secs_f64()))
        }
        () = last_call => closed("the server is shutting down"),
        () = cut.wait() => closed("it was ended on request"),
    }
}

async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    seat: Seat,
    exports: Arc<dyn Exports>,
    mut stop: watch::Receiver<bool>,
) -> io::Result<Outcome> {
    let mut out = Vec::new();
    let handshake = Some(Handshake::start(&mut out));
    stream.write_all(&out).await?;
    let mut state = Later::new(Greeted {
        handshake,
        input: Vec::new(),
        out: Vec::new(),
        seat,
    });
    let mut stopping = false;
    loop {
        let exports = exports.clone();
        let step = move || {
            let (step, greeted) = state.take().step(exports.as_ref());
            (step, Later::new(greeted))
        };
        let stepped = tokio::task::spawn_blocking(move || Later::new(step())).await;
        let Ok(stepped) = stepped else {
            return Ok(closed("opening the export panicked"));
        };
        let (step, back) = stepped.take();
        state = back;
        let mut answers = std::mem::take(&mut state.get_mut().out);
        match step {
            Step::Negotiated(negotiated) => {
                let guest = Later::new((negotiated, state.take()));
                stream.write_all(&answers).await?;
                return Ok(Outcome::Negotiated(Box::new(guest)));
            }
            Step::Closed(why) => {
                stream.write_all(&answers).await?;
                // The last answer must not be overtaken by a reset.
                stream.shutdown().await?;
                return Ok(Outcome::Closed(why));
            }
            Step::Again | Step::NeedMore => stream.write_all(&answers).await?,
        }
        answers.clear();
        state.get_mut().out = answers;
        if matches!(step, Step::Again) {
            continue;
        }
        let Greeted {
            handshake, input, ..
        } = state.get_mut();
        input.reserve(RECEIVE);
        tokio::select! {
            n = stream.read_buf(input) => {
                if n? == 0 {
                    return Ok(closed("the client closed the connection"));
                }
            }
            _ = stop.wait_for(|s| *s), if !stopping => {
                stopping = true;
                handshake.as_mut().map(Handshake::shut_down);
            }
        }
    }
}

impl Greeted {
    /// Takes one message from the input.
    fn step(mut self, exports: &dyn Exports) -> (Step, Greeted) {
        let watched = Watched {
            exports,
            seat: &self.seat,
        };
        let Some(handshake) = &mut self.handshake else {
            return (Step::Closed("the handshake is over".into()), self);
        };
        let (used, step) = handshake.advance(&self.input, &mut self.out, &watched);
        self.input.drain(..used);
        (step, self)
    }

    /// Lets go of what the handshake may still hold.
    pub(super) fn without_handshake(mut self) -> Greeted {
        self.handshake = None;
        self
    }
}
