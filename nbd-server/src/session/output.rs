//! Where replies are gathered before one write sends them all.
//!
//! The buffer is kept at its initialised length and filled behind a cursor, so handing out room for
//! a read costs no memset; only growing does. Room that was handed out holds old bytes: whoever
//! takes it overwrites all of it or cuts it off again.

use crate::wire::Put;

/// Bytes kept when idle.
const KEEP: usize = 4 << 10;

/// A reusable buffer of replies.
#[derive(Debug, Default)]
pub struct Output {
    bytes: Vec<u8>,
    end: usize,
}

impl Output {
    /// An empty one; allocates at first use.
    pub fn new() -> Output {
        Output::default()
    }

    /// What is in it.
    pub fn filled(&self) -> &[u8] {
        &self.bytes[..self.end]
    }

    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.end
    }

    /// True when there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// Empties it; keeps the memory.
    pub fn clear(&mut self) {
        self.end = 0;
    }

    /// Appends `len` bytes of unspecified content and returns them for overwriting.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        let from = self.end;
        let to = from + len;
        if to > self.bytes.len() {
            let len = to.next_power_of_two().max(KEEP);
            self.bytes.reserve_exact(len - self.bytes.len());
            self.bytes.resize(len, 0);
        }
        self.end = to;
        &mut self.bytes[from..to]
    }

    /// The bytes from `from` on, for overwriting.
    pub fn tail(&mut self, from: usize) -> &mut [u8] {
        &mut self.bytes[from..self.end]
    }

    /// Takes everything from `to` on away again; `to` is at most [`Output::len`].
    pub fn cut(&mut self, to: usize) {
        debug_assert!(to <= self.end);
        self.end = to;
    }

    /// Its memory, and how much of that is in it: for filling in while it is nobody's.
    pub(crate) fn into_parts(self) -> (Vec<u8>, usize) {
        (self.bytes, self.end)
    }

    /// What [`Output::into_parts`] took apart.
    pub(crate) fn of_parts(bytes: Vec<u8>, end: usize) -> Output {
        debug_assert!(end <= bytes.len());
        Output { bytes, end }
    }

    /// True when [`Output::shrink`] would give memory back.
    pub fn is_large(&self) -> bool {
        self.bytes.len() > KEEP
    }

    /// Gives memory back; does nothing while anything is in it.
    pub fn shrink(&mut self) {
        if self.is_empty() && self.is_large() {
            self.bytes = Vec::new();
        }
    }
}

impl Put for Output {
    fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_cuts_and_shrinks() {
        let mut out = Output::new();
        out.put(b"head");
        out.room(100_000).fill(7);
        assert_eq!((out.len(), out.is_large()), (100_004, true));
        out.shrink();
        assert!(out.is_large(), "nothing that is in it may be lost");
        out.cut(4);
        assert_eq!(out.filled(), b"head");
        out.tail(2).copy_from_slice(b"rd");
        assert_eq!(out.filled(), b"herd");
        out.clear();
        out.shrink();
        assert!(out.is_empty() && !out.is_large());
    }
}
