//! Image formats. One folder each, one interface for all: [`Delta`].
//!
//! A format answers one question, *where do the bytes of this guest range live*, and nothing else:
//! stacking, sharing and caching are [`crate::chain`]'s, moving bytes is the edge's. Writing is not
//! in this interface: only one format is ever a top ([`ploop::top`]), and it says more than a trait
//! could.

pub mod ploop;
pub mod qcow2;
pub mod raw;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::store::StoreFile;

/// Where the bytes of a [`Run`] live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not in this delta: ask the one below; zeros if there is none.
    Parent,
    /// Zeros, whatever lies below.
    Zero,
    /// In this delta's file, from this byte offset on.
    File(u64),
    /// In this delta, but not as plain bytes (compressed): use [`Delta::read`].
    Through,
    /// The table entry for this range is damaged; [`Delta::fault`] says how. Reading is an error.
    Fault,
}

/// A piece of guest space with one [`Place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First guest byte.
    pub offset: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// Where they live; for [`Place::File`] the whole run is contiguous there.
    pub place: Place,
}

/// An image seen as a read-only layer of a chain.
pub trait Delta: Send + Sync + Debug {
    /// Virtual size in bytes. Guest bytes past it are not this delta's to answer.
    fn size(&self) -> u64;

    /// Allocation unit in bytes: every run starts and ends on a multiple of it or at [`Delta::size`].
    fn cluster_bytes(&self) -> u64;

    /// Guest bytes from here on are [`Place::Parent`] for certain, whatever [`Delta::size`] claims:
    /// the end of what the table in the file can name.
    fn mapped_end(&self) -> u64 {
        self.size()
    }

    /// False while the image is being rewritten: what is merged from it must not be kept for others.
    fn shareable(&self) -> bool {
        true
    }

    /// The file that [`Place::File`] offsets refer to.
    fn file(&self) -> &Arc<dyn StoreFile>;

    /// Appends the runs that cover `range` (inside `0..size`), in order and without gaps. Reads
    /// table pages; allocates in proportion to `range`, not to anything the image claims.
    fn map(&self, range: Range<u64>, runs: &mut Vec<Run>) -> Result<()>;

    /// Reads guest bytes of a [`Place::Through`] run.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// The error to give to a reader of a [`Place::Fault`] run at guest byte `offset`: names the
    /// file, the byte of the table entry, and what is wrong with it.
    fn fault(&self, offset: u64) -> crate::error::Error;
}
