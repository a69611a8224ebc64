//! The handshake of one connection, with its deadline.
//!
//! The state machine asks [`crate::Exports`], which may open files and block, so every step of it
//! runs on tokio's blocking threads. The connection's slot travels with the step: an `open` that
//! hangs past the deadline still counts against the limit of connections.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::export::Exports;
use crate::session::{Handshake, Negotiated, Step};

/// What a handshake in progress owns.
pub(super) struct Greeted {
    handshake: Handshake,
    /// Received and not used; after the end, the first bytes of transmission.
    pub(super) input: Vec<u8>,
    out: Vec<u8>,
    /// The connection's place among all of them.
    pub(super) slot: OwnedSemaphorePermit,
}

/// How a handshake ended.
pub(super) enum Outcome {
    /// Transmission begins.
    Negotiated(Box<Negotiated>, Box<Greeted>),
    /// The session is over; says why.
    Closed(String),
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
    slot: OwnedSemaphorePermit,
    exports: Arc<dyn Exports>,
    deadline: Duration,
    stop: watch::Receiver<bool>,
) -> Outcome {
    let mut stopped = stop.clone();
    let last_call = async {
        // An error means that the server itself is gone.
        drop(stopped.wait_for(|s| *s).await);
        tokio::time::sleep(STOP_GRACE).await;
    };
    tokio::select! {
        outcome = negotiate(stream, slot, exports, stop) => {
            outcome.unwrap_or_else(|e| closed(format!("the socket failed: {e}")))
        }
        () = tokio::time::sleep(deadline) => {
            closed(format!("the handshake took longer than {} s", deadline.as_secs_f64()))
        }
        () = last_call => closed("the server is shutting down"),
    }
}

async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    slot: OwnedSemaphorePermit,
    exports: Arc<dyn Exports>,
    mut stop: watch::Receiver<bool>,
) -> io::Result<Outcome> {
    let mut out = Vec::new();
    let handshake = Handshake::start(&mut out);
    let mut state = Greeted {
        handshake,
        input: Vec::new(),
        out,
        slot,
    };
    let mut stopping = false;
    loop {
        // The greeting at first, then the answers to what was received.
        stream.write_all(&state.out).await?;
        state.out.clear();
        let exports = exports.clone();
        let step = tokio::task::spawn_blocking(move || state.step(exports.as_ref())).await;
        let Ok((step, back)) = step else {
            return Ok(closed("opening the export panicked"));
        };
        state = back;
        match step {
            Step::Again => {}
            Step::Negotiated(negotiated) => {
                stream.write_all(&state.out).await?;
                return Ok(Outcome::Negotiated(negotiated, Box::new(state)));
            }
            Step::Closed(why) => {
                stream.write_all(&state.out).await?;
                // The last answer must not be overtaken by a reset.
                stream.shutdown().await?;
                return Ok(Outcome::Closed(why));
            }
            Step::NeedMore => {
                state.input.reserve(RECEIVE);
                tokio::select! {
                    n = stream.read_buf(&mut state.input) => {
                        if n? == 0 {
                            return Ok(closed("the client closed the connection"));
                        }
                    }
                    _ = stop.wait_for(|s| *s), if !stopping => {
                        stopping = true;
                        state.handshake.shut_down();
                    }
                }
            }
        }
    }
}

impl Greeted {
    /// Takes one message from the input.
    fn step(mut self, exports: &dyn Exports) -> (Step, Greeted) {
        let (used, step) = self.handshake.advance(&self.input, &mut self.out, exports);
        self.input.drain(..used);
        (step, self)
    }
}
