//! The device interface: what an export is made of, and what every stage in front of it speaks.
//!
//! *The core maps, the edge moves.* Reading is two steps: [`Device::map`] says where the bytes of a
//! range live and hands out a [`ReadLease`]; the caller moves them. Writing is three:
//! [`Device::prepare`] (allocates, orders on the cluster, returns where to write), the caller
//! writes, [`Device::commit`] (enters the map). Dropping a [`WriteLease`] aborts.
//!
//! A segment is a lease, not an address: while the lease lives, no cluster that its segments name is
//! freed, punched by maintenance, moved or reused, and no file is closed.
//!
//! | call | waits for | durable on return |
//! |---|---|---|
//! | `map` | a table page from disk, at most | – |
//! | `prepare` | writers allocating the same cluster | nothing |
//! | `commit` | nothing | nothing |
//! | `zero`, `discard` | writers allocating the same clusters | nothing |
//! | `flush` | disk syncs | everything answered before the call |

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::gate::Pass;
use crate::host::Paid;
use crate::store::{StoreFile, read_or_zero};
use crate::tracker::Tracker;

/// A piece of a guest range and where its bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First guest byte.
    pub offset: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// Where they are.
    pub place: SegmentPlace,
}

/// Where the bytes of a [`Segment`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentPlace {
    /// Nowhere: they are zeros, and take no space.
    Hole,
    /// In the file of `layer`, from `offset` on, contiguous. Past its end the file reads as zeros.
    File {
        /// Index for [`ReadLease::file`].
        layer: u32,
        /// Byte offset in that file.
        offset: u64,
    },
    /// In `layer`, but only through its format (compressed); use [`ReadLease::read`].
    Through {
        /// Index of the layer.
        layer: u32,
    },
    /// Unknowable: the table entry is damaged. [`ReadLease::read`] gives the error.
    Fault {
        /// Index of the layer with the damage.
        layer: u32,
    },
}

/// The layers behind a lease.
pub trait Layers: Send + Sync + Debug {
    /// The file of `layer`.
    fn file(&self, layer: u32) -> &Arc<dyn StoreFile>;
    /// Reads guest bytes through the format of `layer`.
    fn read_through(&self, layer: u32, offset: u64, buf: &mut [u8]) -> Result<()>;
    /// The error for a damaged entry of `layer` at guest byte `offset`.
    fn fault(&self, layer: u32, offset: u64) -> Error;
}

/// Keeps the segments of one `map` call true.
#[derive(Clone, Debug)]
pub struct ReadLease {
    layers: Arc<dyn Layers>,
}

impl ReadLease {
    /// A lease on `layers`.
    pub fn new(layers: Arc<dyn Layers>) -> ReadLease {
        ReadLease { layers }
    }

    /// The file of a [`SegmentPlace::File`].
    pub fn file(&self, layer: u32) -> &Arc<dyn StoreFile> {
        self.layers.file(layer)
    }

    /// Moves the bytes of `segment` from `skip` on into `buf` (`skip + buf.len() <= segment.len`).
    pub fn read(&self, segment: &Segment, skip: u64, buf: &mut [u8]) -> Result<()> {
        debug_assert!(skip + buf.len() as u64 <= segment.len);
        match segment.place {
            SegmentPlace::Hole => {
                buf.fill(0);
                Ok(())
            }
            SegmentPlace::File { layer, offset } => {
                read_or_zero(self.layers.file(layer).as_ref(), buf, offset + skip)
            }
            SegmentPlace::Through { layer } => {
                self.layers.read_through(layer, segment.offset + skip, buf)
            }
            SegmentPlace::Fault { layer } => Err(self.layers.fault(layer, segment.offset + skip)),
        }
    }
}

/// A piece of a guest range and where to write its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteSegment {
    /// Byte offset in the file of the lease.
    pub file_offset: u64,
    /// Bytes; never 0.
    pub len: u64,
}

/// What a prepared write must do at its end.
pub trait Pending: Send + Debug {
    /// Enters the written clusters into the map. Not called twice.
    fn commit(&mut self) -> Result<()>;
}

/// What must be told that bytes were written in place.
pub trait Written: Send + Sync + Debug {
    /// Bytes of the file changed: the next flush must sync.
    fn wrote(&self);

    /// A write was given up: some of its bytes may be there, or none.
    fn given_up(&self);
}

/// A prepared write: permission to write to the segments, and the duty to commit. Dropping it
/// without commit gives the new clusters back; the guest range then reads as before, except for
/// bytes that were overwritten in place.
#[derive(Debug)]
pub struct WriteLease {
    file: Arc<dyn StoreFile>,
    pending: Option<Box<dyn Pending>>,
    written: Option<Arc<dyn Written>>,
    paid: Paid,
    /// Last, so that a barrier waits for all of the above.
    pass: Option<Pass>,
}

impl WriteLease {
    /// A write in place: nothing to enter at commit.
    pub fn in_place(file: Arc<dyn StoreFile>) -> WriteLease {
        WriteLease {
            file,
            pending: None,
            written: None,
            paid: Paid::default(),
            pass: None,
        }
    }

    /// A write that ends in `pending.commit()`.
    pub fn allocating(file: Arc<dyn StoreFile>, pending: Box<dyn Pending>) -> WriteLease {
        let mut lease = WriteLease::in_place(file);
        lease.pending = Some(pending);
        lease
    }

    /// It tells `written` at its end.
    pub(crate) fn tell(&mut self, written: Arc<dyn Written>) {
        self.written = Some(written);
    }

    /// It has room of the host that its bytes are to take.
    pub(crate) fn pay(&mut self, paid: Paid) {
        self.paid = paid;
    }

    /// It is inside of a gate until its end.
    pub(crate) fn keep(&mut self, pass: Pass) {
        self.pass = Some(pass);
    }

    /// The file that the segments of this write are in.
    pub fn file(&self) -> &dyn StoreFile {
        self.file.as_ref()
    }

    /// True when something is entered at commit: the write is not in place only.
    pub fn allocates(&self) -> bool {
        self.pending.is_some()
    }

    /// Enters the write. For [`Device::commit`] implementations only.
    pub fn finish(mut self) -> Result<()> {
        if let Some(mut pending) = self.pending.take() {
            pending.commit()?;
        }
        if let Some(written) = self.written.take() {
            written.wrote();
        }
        Ok(())
    }
}

impl Drop for WriteLease {
    fn drop(&mut self) {
        if let Some(written) = &self.written {
            written.given_up();
        }
    }
}

/// How [`Device::zero`] may work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// Keep or take the space, so that a later write to the range cannot run out of it
    /// (`NBD_CMD_FLAG_NO_HOLE`).
    pub keep_space: bool,
    /// Refuse (`Unsupported`) rather than write or copy data (`NBD_CMD_FLAG_FAST_ZERO`).
    pub only_if_fast: bool,
}

/// The allocation state of a piece of guest space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never 0.
    pub len: u64,
    /// Takes no space, here or below.
    pub hole: bool,
    /// Reads as zeros.
    pub zero: bool,
}

/// Which layer has a piece of guest space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Bytes; never 0.
    pub len: u64,
    /// 0: none has it. 1: the uppermost. n: the one n - 1 below that.
    pub depth: u32,
}

/// A block device of bytes `0..size`. Ranges past the size are `Invalid`. Zero-length ranges do
/// nothing. All methods may be called from many threads at once; what one call wrote and returned
/// from, every later call on any thread sees.
pub trait Device: Send + Sync + Debug {
    /// Bytes.
    fn size(&self) -> u64;

    /// True when every write is refused.
    fn read_only(&self) -> bool;

    /// Allocation unit in bytes: the preferred size and alignment of large requests.
    fn cluster_bytes(&self) -> u64;

    /// Says where the bytes of `range` are: clears `segments` and fills it in order, without gaps.
    fn map(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<ReadLease>;

    /// Prepares a write of the whole of `range`: clears `segments` and fills it in order. The caller
    /// writes every segment, then calls [`Device::commit`]. A thread may hold one lease at a time.
    /// Errors: `ReadOnly`, `NoSpace`, `Latched`, `Io`.
    fn prepare(&self, range: Range<u64>, segments: &mut Vec<WriteSegment>) -> Result<WriteLease>;

    /// Enters a prepared write whose bytes are all written.
    fn commit(&self, lease: WriteLease) -> Result<()> {
        lease.finish()
    }

    /// Makes `range` read as zeros.
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()>;

    /// Gives the space of `range` back where that is cheap. Each byte then reads as it did or as
    /// zero.
    fn discard(&self, range: Range<u64>) -> Result<()>;

    /// Makes every write, zero and discard that returned before this call durable. After an error
    /// the device is latched: every later change and flush fails with `Latched`.
    fn flush(&self) -> Result<()>;

    /// The allocation state of `range`, from its start, in at most `limit` extents (so it may end
    /// early). Clears `extents` first; neighbours differ.
    fn allocation(&self, range: Range<u64>, limit: usize, extents: &mut Vec<Extent>) -> Result<()>;

    /// Which layer has the bytes of `range`, as [`Device::allocation`]: what it has may be zeros that
    /// take no space. A device without layers is one. Reads tables, no data.
    fn depths(&self, range: Range<u64>, limit: usize, depths: &mut Vec<Depth>) -> Result<()> {
        let mut extents = Vec::new();
        self.allocation(range, limit, &mut extents)?;
        depths.clear();
        depths.extend(extents.iter().map(|e| Depth {
            len: e.len,
            depth: u32::from(!e.hole),
        }));
        Ok(())
    }

    /// The trackers of what is written here, with their bits as they are.
    fn bitmaps(&self) -> Vec<Tracker> {
        Vec::new()
    }

    /// Reads a whole range: `map` and move.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut segments = Vec::new();
        let lease = self.map(offset..offset + buf.len() as u64, &mut segments)?;
        let mut at = 0usize;
        for s in &segments {
            let len = s.len as usize;
            lease.read(s, 0, &mut buf[at..at + len])?;
            at += len;
        }
        Ok(())
    }

    /// Writes a whole range: `prepare`, move, `commit`. Not durable before [`Device::flush`].
    fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let mut segments = Vec::new();
        let lease = self.prepare(offset..offset + buf.len() as u64, &mut segments)?;
        let mut at = 0usize;
        for s in &segments {
            let len = s.len as usize;
            lease.file().write_at(&buf[at..at + len], s.file_offset)?;
            at += len;
        }
        self.commit(lease)
    }
}

/// Checks that `range` lies inside a device of `size` bytes.
pub fn check_range(range: &Range<u64>, size: u64) -> Result<()> {
    if range.start <= range.end && range.end <= size {
        return Ok(());
    }
    Err(Error::new(
        Kind::Invalid,
        format!(
            "bytes {}..{} are not inside the disk of {size} bytes",
            range.start, range.end
        ),
    ))
}
