//! What a connection has received and not yet executed.
//!
//! The buffer grows by what the client really sent, not by what it claims: it doubles when a
//! receive fills it, up to [`BATCH`], and past that only for one request that needs it, to at most
//! twice what has come of it. It is kept at its initialised length, so a receive costs no memset.

/// Most bytes of requests that are taken at once; with the smallest requests (28 bytes) this is
/// also the bound on requests in flight on one connection.
pub(super) const BATCH: usize = 256 << 10;

const START: usize = 4 << 10;

/// A buffer of received bytes.
#[derive(Debug, Default)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// The last receive filled all the room there was.
    was_full: bool,
}

impl Input {
    /// A buffer that holds `bytes` already.
    pub(super) fn holding(bytes: Vec<u8>) -> Input {
        Input {
            start: 0,
            end: bytes.len(),
            bytes,
            was_full: false,
        }
    }

    /// What was received and not used.
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Takes the first `n` of [`Input::filled`] away.
    pub(super) fn used(&mut self, n: usize) {
        debug_assert!(n <= self.end - self.start);
        self.start += n;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room to receive into, when the request at the start has at least `need` bytes; never empty.
    /// For a large request it ends where the request ends, so that nothing of the next one has to
    /// be moved afterwards.
    pub(super) fn room(&mut self, need: usize) -> &mut [u8] {
        let have = self.end - self.start;
        let need = need.max(have + 1);
        let mut size = self.bytes.len().max(START);
        if self.was_full && size < BATCH {
            size *= 2;
        }
        let size = size.max(need.min((2 * have).max(BATCH)));
        if self.start > 0 && self.start + need > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, have);
        }
        if size > self.bytes.len() {
            self.bytes.reserve_exact(size - self.bytes.len());
            self.bytes.resize(size, 0);
        }
        self.was_full = false;
        let to = if need > BATCH {
            self.start + need
        } else {
            usize::MAX
        };
        let to = to.min(self.bytes.len());
        &mut self.bytes[self.end..to]
    }

    /// Notes that `n` bytes were received into the room of the last call.
    pub(super) fn received(&mut self, n: usize) {
        self.end += n;
        self.was_full = self.end == self.bytes.len();
    }

    /// True when [`Input::shrink`] would give memory back.
    pub(super) fn is_large(&self) -> bool {
        self.bytes.len() > START && self.filled().is_empty()
    }

    /// Gives memory back; does nothing while anything is in it.
    pub(super) fn shrink(&mut self) {
        if self.filled().is_empty() {
            *self = Input::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Receives `bytes` through the buffer, using `step` of them at a time.
    fn pass(bytes: &[u8], need: usize, take: usize) -> Vec<u8> {
        let (mut input, mut sent, mut got) = (Input::default(), 0, Vec::new());
        while got.len() < bytes.len() {
            let room = input.room(need.min(bytes.len() - got.len()));
            assert!(!room.is_empty());
            let n = room.len().min(bytes.len() - sent).min(take);
            room[..n].copy_from_slice(&bytes[sent..sent + n]);
            sent += n;
            input.received(n);
            let ready = input.filled();
            let use_up = if sent == bytes.len() {
                ready.len()
            } else {
                ready.len() / need * need
            };
            got.extend_from_slice(&ready[..use_up]);
            input.used(use_up);
        }
        got
    }

    #[test]
    fn nothing_is_lost_or_reordered() {
        let bytes: Vec<u8> = (0..700_000u32).map(|i| (i ^ (i >> 8)) as u8).collect();
        for need in [1, 28, 4124, 65_564, 600_000] {
            for take in [1000, 4096, usize::MAX] {
                assert!(pass(&bytes, need, take) == bytes, "{need} {take}");
            }
        }
    }

    #[test]
    fn memory_follows_what_is_received_not_what_is_claimed() {
        let mut input = Input::default();
        assert_eq!(input.room(28).len(), START);
        input.received(28);
        assert_eq!(input.room(28 + 1000).len(), START - 28);
        for _ in 0..20 {
            let n = input.room(1).len();
            input.received(n);
            let n = input.filled().len();
            input.used(n);
        }
        assert_eq!(
            input.room(1).len(),
            BATCH,
            "doubling ends at the batch size"
        );
        input.shrink();
        assert_eq!(input.room(1).len(), START);
    }

    #[test]
    fn a_large_request_ends_where_the_buffer_ends() {
        let (mut input, need) = (Input::default(), 28 + (1 << 20));
        input.room(28)[..28].fill(1);
        input.received(28);
        assert_eq!(
            input.room(need).len(),
            BATCH - 28,
            "a claim alone takes no more than a batch"
        );
        while input.filled().len() < need {
            let n = input.room(need).len();
            input.received(n);
            assert!(input.bytes.len() <= (2 * input.filled().len()).max(BATCH));
        }
        assert_eq!(input.filled().len(), need);
    }
}
