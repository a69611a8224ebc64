//! Bytes on their way out: small ones gathered, large ones passed on as they are.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

use crate::wire::Put;

/// Payloads from this length on are not copied.
pub(super) const LARGE: usize = 32 << 10;

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    parts: VecDeque<Bytes>,
    tail: BytesMut,
    len: usize,
}

impl Put for Outbox {
    fn put(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        self.tail.extend_from_slice(bytes);
    }
}

impl Outbox {
    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends bytes, copied only when they are few.
    pub(super) fn pass(&mut self, bytes: &Bytes) {
        if bytes.len() < LARGE {
            return self.put(bytes);
        }
        self.seal();
        self.len += bytes.len();
        self.parts.push_back(bytes.clone());
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.parts.push_back(self.tail.split().freeze());
        }
    }

    /// The first of what waits, as slices; how many were filled.
    pub(super) fn slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.seal();
        let mut filled = 0;
        for (slice, part) in slices.iter_mut().zip(&self.parts) {
            *slice = IoSlice::new(part);
            filled += 1;
        }
        filled
    }

    /// The first `bytes` are gone.
    pub(super) fn advance(&mut self, mut bytes: usize) {
        self.seal();
        self.len -= bytes.min(self.len);
        while let Some(first) = self.parts.front_mut() {
            if bytes < first.len() {
                first.advance(bytes);
                return;
            }
            bytes -= first.len();
            self.parts.pop_front();
        }
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        *self = Outbox::default();
    }

    /// All of it, for tests.
    #[cfg(test)]
    pub(super) fn take(&mut self) -> Vec<u8> {
        self.seal();
        let all = self.parts.iter().flat_map(|p| p.to_vec()).collect();
        self.clear();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_in_order_however_it_is_taken() {
        let large = Bytes::from(vec![7; LARGE]);
        let small = Bytes::from_static(b"small");
        for step in [1, 3, 4096, LARGE * 2] {
            let mut outbox = Outbox::default();
            outbox.put(b"head");
            outbox.pass(&large);
            outbox.pass(&small);
            let whole = [b"head", &large[..], b"small"].concat();
            assert_eq!(outbox.len(), whole.len());
            let mut got = Vec::new();
            while outbox.len() > 0 {
                let mut slices = [IoSlice::new(&[]); 2];
                let filled = outbox.slices(&mut slices);
                let mut bytes: Vec<u8> = slices[..filled].iter().flat_map(|s| s.to_vec()).collect();
                bytes.truncate(step);
                outbox.advance(bytes.len());
                got.extend(bytes);
            }
            assert_eq!(got, whole, "{step}");
        }
    }
}
