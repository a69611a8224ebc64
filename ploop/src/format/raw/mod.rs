//! A raw image: the guest's bytes, at the guest's offsets. Only ever the base of a chain, and
//! read-only here; OpenVZ calls it `Plain`.
//!
//! A raw file says nothing about itself, so it is never recognised by its content: the descriptor,
//! the command line or the qcow2 header above it says that it is raw. Guest bytes that look like
//! another format stay guest bytes. Holes of the file are reported by the store, not here.

use std::ops::Range;
use std::sync::Arc;

use super::{Delta, Place, Run};
use crate::error::{Error, Result};
use crate::store::StoreFile;

/// A raw file has no clusters; the map wants some. The largest that a qcow2 overlay can have.
const CLUSTER: u64 = 2 << 20;

/// A raw file as the base of a chain.
#[derive(Debug)]
pub struct RawDelta {
    file: Arc<dyn StoreFile>,
    size: u64,
    cluster_bytes: u64,
}

impl RawDelta {
    /// The whole file, for a chain whose other members have clusters of a power of two.
    pub fn new(file: Arc<dyn StoreFile>) -> Result<RawDelta> {
        RawDelta::with_cluster(file, CLUSTER)
    }

    /// The whole file, in clusters of `cluster_bytes` (a raw base gets the cluster size of the
    /// overlays on it).
    pub fn with_cluster(file: Arc<dyn StoreFile>, cluster_bytes: u64) -> Result<RawDelta> {
        let size = file.len()?;
        Ok(RawDelta {
            file,
            size,
            cluster_bytes,
        })
    }
}

impl Delta for RawDelta {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    fn file(&self) -> &Arc<dyn StoreFile> {
        &self.file
    }

    fn map(&self, range: Range<u64>, runs: &mut Vec<Run>) -> Result<()> {
        if range.start < range.end {
            let len = range.end - range.start;
            runs.push(Run {
                offset: range.start,
                len,
                place: Place::File(range.start),
            });
        }
        Ok(())
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        crate::store::read_exact(self.file.as_ref(), buf, offset)
    }

    fn fault(&self, offset: u64) -> Error {
        Error::corrupt("a raw image has no table to be damaged")
            .on(self.file.path())
            .at(offset)
    }
}
