//! What can be read of a disk: sector by sector, and where it is unknowable.

use std::ops::Range;
use std::sync::Arc;

use ploop::descriptor::Guid;
use ploop::device::{Device, Segment, SegmentPlace};
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::store::memory::MemoryStore;
use ploop::store::{SECTOR, read_or_zero};

/// Guest bytes that [`read`] looks at, from the start of a disk.
pub const LOOK: u64 = 512 << 20;

/// A piece of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Zeros,
    Bytes(Vec<u8>),
    Unknown,
}

/// One reading of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    size: u64,
    /// Ascending, without gaps.
    pieces: Vec<(Range<u64>, Piece)>,
}

/// Reads a disk, or one node of it; `None` when it does not open.
pub fn read(store: &MemoryStore, source: &Source, node: Option<Guid>) -> Option<Reading> {
    read_to(store, source, node, LOOK)
}

/// The same, `look` bytes at most.
pub fn read_to(
    store: &MemoryStore,
    source: &Source,
    node: Option<Guid>,
    look: u64,
) -> Option<Reading> {
    let source = Source {
        snapshot: node.map(|n| n.to_string()),
        ..source.clone()
    };
    let opener = Opener::on(Arc::new(store.clone()));
    let disk = opener.open(&source, &OpenOptions::default()).ok()?;
    let mut segments: Vec<Segment> = Vec::new();
    let end = disk.size().min(look);
    let lease = disk.map(0..end, &mut segments).ok()?;
    let mut pieces: Vec<(Range<u64>, Piece)> = Vec::new();
    for s in &segments {
        let range = s.offset..s.offset + s.len;
        let piece = match s.place {
            SegmentPlace::Hole => Piece::Zeros,
            SegmentPlace::File { layer, offset } => {
                let mut bytes = vec![0; s.len as usize];
                read_or_zero(lease.file(layer).as_ref(), &mut bytes, offset).unwrap();
                Piece::Bytes(bytes)
            }
            _ => Piece::Unknown,
        };
        match pieces.last_mut() {
            Some((last, was)) if *was == piece && !matches!(piece, Piece::Bytes(_)) => {
                last.end = range.end;
            }
            _ => pieces.push((range, piece)),
        }
    }
    Some(Reading {
        size: disk.size(),
        pieces,
    })
}

impl Reading {
    /// True when every byte looked at is known.
    pub fn is_whole(&self) -> bool {
        self.pieces.iter().all(|(_, p)| *p != Piece::Unknown)
    }

    /// The first byte that could be read and reads otherwise in `later`, outside of `excepted`.
    pub fn lost_in(&self, later: Option<&Reading>, excepted: &[Range<u64>]) -> Option<u64> {
        if self.size == 0 {
            return None;
        }
        let Some(later) = later else {
            return Some(0);
        };
        let mut theirs = later.pieces.iter().peekable();
        for (range, piece) in &self.pieces {
            let mut at = range.start;
            while at < range.end {
                while theirs.next_if(|(r, _)| r.end <= at).is_some() {}
                let Some((other, now)) = theirs.peek() else {
                    return Some(at);
                };
                let end = range.end.min(other.end);
                let same = |at: u64, end: u64| {
                    let bytes = |p: &Piece, start: u64| match p {
                        Piece::Bytes(b) => {
                            Some(b[(at - start) as usize..(end - start) as usize].to_vec())
                        }
                        Piece::Zeros => Some(vec![0; (end - at) as usize]),
                        Piece::Unknown => None,
                    };
                    match (piece, now) {
                        (Piece::Unknown, _) | (Piece::Zeros, Piece::Zeros) => true,
                        _ => bytes(piece, range.start) == bytes(now, other.start),
                    }
                };
                if !same(at, end) {
                    let sectors = (at..end).step_by(SECTOR as usize);
                    let named = |s: u64| excepted.iter().any(|r| r.start < s + SECTOR && s < r.end);
                    for s in sectors {
                        if !named(s) && !same(s, (s + SECTOR).min(end)) {
                            return Some(s);
                        }
                    }
                }
                at = end;
            }
        }
        None
    }
}
