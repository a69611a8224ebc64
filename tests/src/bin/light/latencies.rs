//! How long requests took, in little room.

/// Latencies, in buckets that are at most 1/32 wide of what they hold.
pub(crate) struct Latencies {
    counts: Vec<u64>,
    pub(crate) longest: u64,
}

impl Latencies {
    const FINE: u32 = 5;

    pub(crate) fn new() -> Latencies {
        Latencies {
            counts: vec![0; 64 << Self::FINE],
            longest: 0,
        }
    }

    pub(crate) fn note(&mut self, nanos: u64) {
        let exponent = (u64::BITS - nanos.leading_zeros()).saturating_sub(Self::FINE + 1);
        let bucket = (u64::from(exponent) << Self::FINE) + (nanos >> exponent);
        self.counts[bucket as usize] += 1;
        self.longest = self.longest.max(nanos);
    }

    pub(crate) fn add(&mut self, other: &Latencies) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.longest = self.longest.max(other.longest);
    }

    /// What `share` of all did not exceed, by the lower end of its bucket.
    pub(crate) fn quantile(&self, share: f64) -> u64 {
        let all: u64 = self.counts.iter().sum();
        let wanted = (all as f64 * share).ceil() as u64;
        let mut sum = 0;
        let bucket = self.counts.iter().position(|&n| {
            sum += n;
            sum >= wanted && n > 0
        });
        let bucket = bucket.unwrap_or(0) as u64;
        let exponent = (bucket >> Self::FINE).saturating_sub(1);
        (bucket - (exponent << Self::FINE)) << exponent
    }
}
