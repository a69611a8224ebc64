//! One rate: a bucket of tokens that fills with time.
//!
//! A token is 10⁹ parts, so that `rate × nanoseconds` is parts, exactly: nothing is rounded, and no
//! remainder is lost, however often or seldom it is looked at. All values fit: a rate is below
//! 2⁵⁰, time below 2⁶⁴, a request below 2⁶⁴ tokens.
//!
//! A request passes when the bucket holds what it costs, or is full: what costs more than a full
//! bucket leaves a debt that is paid before the next passes. So in every time `w` at most
//! `rate·w + burst` passes, plus what one request is larger than the burst; and nothing starves.

use snapshots::limits::RATE_MAX;

/// Parts of a token.
const PARTS: i128 = 1_000_000_000;

/// See the module text.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    /// Tokens per second.
    rate: u64,
    /// Parts that it holds when full; at least one token.
    full: i128,
    /// Parts that it holds; below 0 is debt.
    level: i128,
    /// When that was.
    at: u64,
}

impl Bucket {
    /// A full bucket, or none for a rate of 0. `burst`: nanoseconds of the rate that it holds.
    pub(super) fn new(rate: u64, burst: u64, now: u64) -> Option<Bucket> {
        let rate = rate.min(RATE_MAX);
        let full = (i128::from(rate) * i128::from(burst)).max(PARTS);
        (rate > 0).then_some(Bucket {
            rate,
            full,
            level: full,
            at: now,
        })
    }

    /// The bucket `old` with another rate and burst. What was saved stays as far as there is room;
    /// a debt takes no longer to pay than it would have.
    pub(super) fn changed(old: Option<Bucket>, rate: u64, burst: u64, now: u64) -> Option<Bucket> {
        let mut new = Bucket::new(rate, burst, now)?;
        if let Some(mut old) = old {
            old.fill(now);
            new.level = old.level.min(new.full);
            if old.level < 0 && new.rate < old.rate {
                // A debt is of one request, so below 2⁹⁴ parts; beyond any real one it saturates.
                let scaled = old.level.saturating_mul(i128::from(new.rate));
                new.level = scaled / i128::from(old.rate);
            }
        }
        Some(new)
    }

    /// Adds what came since. Time that goes back adds nothing, and is not counted twice.
    pub(super) fn fill(&mut self, now: u64) {
        let passed = now.saturating_sub(self.at);
        self.at += passed;
        self.level = self
            .full
            .min(self.level + i128::from(self.rate) * i128::from(passed));
    }

    fn needs(&self, cost: u64) -> i128 {
        self.full.min(i128::from(cost) * PARTS)
    }

    /// True when a request may pass that costs so many tokens. It must be filled.
    pub(super) fn admits(&self, cost: u64) -> bool {
        cost == 0 || self.level >= self.needs(cost)
    }

    /// Takes what a request costs that may pass.
    pub(super) fn take(&mut self, cost: u64) {
        self.level -= i128::from(cost) * PARTS;
    }

    /// When such a request may pass, if no other does before.
    pub(super) fn due(&self, cost: u64) -> u64 {
        if self.admits(cost) {
            return self.at;
        }
        let missing = (self.needs(cost) - self.level).unsigned_abs();
        let wait = missing.div_ceil(u128::from(self.rate));
        self.at
            .saturating_add(u64::try_from(wait).unwrap_or(u64::MAX))
    }
}
