//! What can be done.

use super::{CLUSTER, SECTORS};

/// One operation. `ct` and `node` are taken modulo of what there is; where there is nothing to work
/// on, nothing is done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the fields are what an operation is called for"
)]
pub enum Op {
    /// Writes `len` sectors from `at` on.
    Write { ct: u8, at: u16, len: u16 },
    /// The same by a client that dies before the write is entered.
    Abort { ct: u8, at: u16, len: u16 },
    /// Zeroes them.
    Zero {
        ct: u8,
        at: u16,
        len: u16,
        keep: bool,
    },
    /// Discards them.
    Discard { ct: u8, at: u16, len: u16 },
    /// Makes what was answered durable.
    Flush { ct: u8 },
    /// Closes a disk in order.
    Close { ct: u8 },
    /// Drops a disk as it is, as a killed process does.
    Kill { ct: u8 },
    /// Makes a snapshot; of a disk that is closed when `offline`.
    Snapshot { ct: u8, named: bool, offline: bool },
    /// Makes one of several disks at one instant.
    Group { ct: u8, more: u8 },
    /// Gives a snapshot another name, or takes it away.
    Rename { ct: u8, node: u16, named: bool },
    /// Collects what interrupted operations left of one container, or of the store.
    Sweep { ct: u8, store: bool },
    /// Goes back to a snapshot; `open`: tried while the disk is open, first.
    Switch {
        ct: u8,
        node: u16,
        discard: bool,
        named: bool,
        open: bool,
    },
    /// Deletes a snapshot (or the top, which is refused); with `run`, all that waits goes too.
    Delete { ct: u8, node: u16, run: bool },
    /// The same on a disk that is at rest: what it frees is what was foretold.
    DeleteForetold { ct: u8, node: u16 },
    /// Goes on with all that waits, and pauses after so many steps.
    Run { ct: u8, steps: u8 },
    /// Merges the chain of the top, or of a node, down as far as that goes, or one.
    MergeDown { ct: u8, node: u16, all: bool },
    /// Begins to merge a node with its child, `budget` clusters at a time. What follows happens in
    /// the middle of it, until the merge is done, paused, or cut off.
    Merge { ct: u8, node: u16, budget: u8 },
    /// So many steps of the merge under way.
    Step { steps: u8 },
    /// Pauses it.
    Pause,
    /// Forgets it without a word, and closes the disk in order.
    Abandon,
    /// Makes containers from a snapshot.
    Clone { ct: u8, node: u16, count: u8 },
    /// Removes a container.
    Remove { ct: u8 },
    /// A container of its own, with a raw base or a ploop one of either version.
    New { raw: bool, v1: bool },
    /// Opens a snapshot for reading, and keeps it open.
    Hold { ct: u8, node: u16 },
    /// Closes the snapshot that is open for longest.
    Release,
}

/// A source of numbers that a seed fixes.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Of this seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5851_F42D_4C95_7F2D)
    }

    /// A number below `below`.
    pub fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % below
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.below(256) as u8
    }

    pub(super) fn word(&mut self) -> u16 {
        self.below(1 << 16) as u16
    }

    /// A range of sectors: a few, or whole clusters, or much.
    pub(super) fn range(&mut self) -> (u16, u16) {
        let sectors = SECTORS as u64;
        let cluster = CLUSTER as u64;
        let (at, len) = match self.below(8) {
            0..=3 => (self.below(sectors), 1 + self.below(16)),
            4 | 5 => {
                let at = self.below(sectors / cluster) * cluster;
                (at, cluster * (1 + self.below(3)))
            }
            6 => (self.below(sectors), 1 + self.below(6 * cluster)),
            // Near the start: the same clusters again and again.
            _ => (self.below(6 * cluster), 1 + self.below(2 * cluster)),
        };
        (at as u16, len.min(sectors - at) as u16)
    }
}
