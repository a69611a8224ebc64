//! What is asked of a move, and what is seen of it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ploop::error::{Error, Result};

use crate::migrate::clients::Holder;

/// What is asked of a move.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the container is to be called at the destination.
    pub name: String,
    /// How long clients may wait at the hand-over.
    pub downtime: Duration,
    /// The holder of the clients, which is sent to the destination.
    pub holder: Option<Holder>,
    /// The disk's files stay here; nobody opens them.
    pub keep: bool,
    /// The destination takes it at once; its data follows.
    pub later: bool,
    /// Whether clients may be slowed down where they write faster than can be sent.
    pub brake: bool,
}

/// Where a move is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// 0: the tree; then the rounds.
    pub round: u32,
    /// Bytes of the disk that were sent.
    pub sent: u64,
    /// Bytes that are still to be sent, as far as is known.
    pub left: u64,
    /// Bytes per second that are sent.
    pub rate: u64,
    /// Bytes per second that are written.
    pub dirty_rate: u64,
    /// Bytes per second that clients are let write; 0: as many as they like.
    pub brake: u64,
}

/// Who watches a move, and steers it.
pub trait Watch: Sync {
    /// True when it is to end.
    fn cancelled(&self) -> bool;
    /// So many bytes more were sent: may sleep to hold a rate.
    fn pace(&self, bytes: u64);
    /// Where it is.
    fn progress(&self, progress: Progress);
    /// Before the last rounds: whoever is inside makes the disk's content consistent, and keeps it so
    /// until the destination has it. Where that takes long, `ping` is called every few seconds: the
    /// destination is there, and hears that we are. An error ends the move.
    fn freeze(&self, ping: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    /// The destination has it; its data follows.
    fn fed(&self);
}

/// What a move came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// Rounds after the tree.
    pub rounds: u32,
    /// Bytes that went over the link.
    pub bytes: u64,
    /// Bytes of data of the tree: what had to move in any case.
    pub data: u64,
    /// Bytes of the granules that were written since: once each, they had to move, too.
    pub written: u64,
    /// From the first request that was held back until the destination had the disk, in seconds.
    pub gap: f64,
    /// Bytes that were sent in that time.
    pub last: u64,
}

/// How a move ended that did not come to its end.
#[derive(Debug)]
pub enum Failed {
    /// The disk is here, and its clients go on.
    Here(Error),
    /// It was given, and the destination has not said that it has it.
    Given(Error),
    /// The destination has it, and the link broke before all of its data was there.
    Fed(Error),
}

/// Until when what is under way may take; the move's own end is its watch's.
#[derive(Debug, Default)]
pub struct Deadline(Mutex<Option<Instant>>);

impl Deadline {
    pub(super) fn set(&self, from_now: Option<Duration>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            from_now.map(|d| Instant::now() + d);
    }

    /// How much time is left, at most `most`.
    pub(super) fn left(&self, most: Duration) -> Duration {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.map_or(most, |until| {
            until.saturating_duration_since(Instant::now()).min(most)
        })
    }

    /// Whether the link is to break, of a move that `cancelled` says is to end: in the hand-over it does
    /// not, but that takes no longer than this.
    pub fn is_over(&self, cancelled: bool) -> bool {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.map_or(cancelled, |until| Instant::now() >= until)
    }
}
