//! The order in which blocks are visited.

/// An order of the numbers below a limit, each once: mixing steps that can be undone permute the
/// next power of two; what falls outside is mixed again.
#[derive(Clone, Copy)]
pub(crate) struct Walk {
    below: u64,
    bits: u32,
    seed: u64,
}

impl Walk {
    pub(crate) fn new(below: u64, seed: u64) -> Walk {
        let bits = below.next_power_of_two().trailing_zeros().max(2);
        Walk { below, bits, seed }
    }

    pub(crate) fn at(&self, step: u64) -> u64 {
        let mask = (1 << self.bits) - 1;
        let half = self.bits.div_ceil(2);
        let mut x = step % self.below;
        loop {
            for odd in [0x9e37_79b9_7f4a_7c15_u64, 0xbf58_476d_1ce4_e5b9] {
                x = x.wrapping_add(self.seed).wrapping_mul(odd) & mask;
                x ^= x >> half;
            }
            if x < self.below {
                return x;
            }
        }
    }
}
