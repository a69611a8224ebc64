//! Whether the rounds of a move come to an end, and what is done where they do not.

use std::time::Duration;

/// Rounds in a row that leave more than half of what the best one did; then it does not converge.
const STUBBORN: u32 = 2;
/// Clients are let write as many bytes per second at least.
pub(super) const BRAKE_MIN: u64 = 256 << 10;
/// As [`STUBBORN`], where clients can be slowed down no further.
const LAST_TRIES: u32 = 8;

/// What follows a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The hand-over: what is left fits the downtime.
    Fits,
    /// Another round.
    Again,
    /// Another one, and clients write so many bytes per second at most.
    Brake(u64),
    /// It does not come to an end.
    Never,
}

/// How the rounds went. Whatever they leave, there is an end to them.
#[derive(Debug)]
pub(super) struct Course {
    may_brake: bool,
    /// What the best round left.
    least: u64,
    /// Rounds in a row that were no better.
    stubborn: u32,
    /// What clients are let write; 0: what they like.
    brake: u64,
}

impl Course {
    /// Before the first round; `may_brake`: whether clients may be slowed down.
    pub(super) fn new(may_brake: bool) -> Course {
        Course {
            may_brake,
            least: u64::MAX,
            stubborn: 0,
            brake: 0,
        }
    }

    /// What follows a round that left `left` bytes, and sent `rate` a second.
    pub(super) fn after(&mut self, left: u64, rate: u64, downtime: Duration) -> Then {
        // A part of it is for the rest of the hand-over.
        if left as f64 <= rate as f64 * downtime.as_secs_f64() * 0.75 {
            return Then::Fits;
        }
        self.stubborn = match left < self.least / 2 {
            true => 0,
            false => self.stubborn + 1,
        };
        self.least = self.least.min(left);
        let tries = match self.brake == BRAKE_MIN {
            true => LAST_TRIES,
            false => STUBBORN,
        };
        if self.stubborn < tries {
            return Then::Again;
        }
        if !self.may_brake || self.brake == BRAKE_MIN {
            return Then::Never;
        }
        // What can be sent is what may be written, and less each time that it is not enough.
        let from = match self.brake {
            0 => rate,
            brake => brake,
        };
        self.brake = (from / 2).max(BRAKE_MIN);
        self.stubborn = STUBBORN - 1;
        Then::Brake(self.brake)
    }
}
