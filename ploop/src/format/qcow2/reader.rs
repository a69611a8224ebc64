//! Compressed clusters, inflated by the crate `qcow2-rs`: the only place that calls it.
//!
//! The crate trusts an image that it is given, so it is never given one. For each cluster it gets
//! an image made here, in memory, of one guest cluster:
//!
//! ```text
//!   cluster 0      1          2                3          4…
//!   header │ L1: [3] │ refcounts: zeros │ L2: [4, packed] │ the compressed bytes
//! ```
//!
//! Every byte of it is ours but the last part, which [`super::vet`] has bounded and our own store
//! has read. So the crate opens no file, follows no backing name, believes no foreign number, and
//! allocates less than six clusters. It runs on the caller's thread, polled once, as its I/O is
//! always ready; a panic in it is caught.
//!
//! It inflates into a ring and does not say how far it came, so a damaged stream can leave bytes
//! of the buffer as they were, or copy them about. Each cluster is therefore inflated twice, over
//! ones and over zeros: bytes that no stream wrote differ between the two.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::error::Qcow2Result;
use qcow2_rs::meta::Qcow2Header;
use qcow2_rs::ops::Qcow2IoOps;

use super::header::MAGIC;
use super::vet::{Packed, packed_entry};
use crate::error::{Error, Result};
use crate::store::{SECTOR, StoreFile, read_or_zero};

/// Reads the cluster at `packed` of `file` into `out`, which is one cluster long.
pub(super) fn inflate(
    file: &dyn StoreFile,
    cluster_bits: u32,
    packed: Packed,
    out: &mut [u8],
) -> Result<()> {
    let damaged = |what: String| {
        Error::corrupt(format!("the compressed cluster here {what}"))
            .on(file.path())
            .at(packed.start)
            .fix("Restore it from a backup: what it held cannot be known")
    };
    let image = OneCluster::load(file, cluster_bits, packed)?;
    let mut again = vec![0xff; out.len()];
    out.fill(0);
    for buf in [&mut *out, &mut again] {
        let run = || poll_once(image.read(buf));
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Some(Ok(n))) if n == 1 << cluster_bits => {}
            Ok(Some(Ok(n))) => return Err(damaged(format!("inflates to {n} bytes only"))),
            Ok(Some(Err(e))) => return Err(damaged("does not inflate".into()).caused_by(e)),
            Ok(None) => return Err(damaged("stopped the inflating library".into())),
            Err(_) => return Err(damaged("made the inflating library panic".into())),
        }
    }
    if out != again {
        return Err(damaged("ends before the cluster is full".into()));
    }
    Ok(())
}

/// The result of a future that never waits; `None` if it would.
fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// An image of one compressed guest cluster, as the crate sees it through [`Qcow2IoOps`].
struct OneCluster {
    cluster_bits: u32,
    /// Whole sectors; the stream begins `lead` bytes into the first.
    payload: Vec<u8>,
    lead: u64,
}

/// The clusters of the made image.
const L1_AT: u64 = 1;
const REFTABLE_AT: u64 = 2;
const L2_AT: u64 = 3;
const PAYLOAD_AT: u64 = 4;

impl OneCluster {
    fn load(file: &dyn StoreFile, cluster_bits: u32, packed: Packed) -> Result<OneCluster> {
        let lead = packed.start % SECTOR;
        let start = packed.start - lead;
        let mut payload = vec![0; (packed.end - start) as usize];
        read_or_zero(file, &mut payload, start)?;
        Ok(OneCluster {
            cluster_bits,
            payload,
            lead,
        })
    }

    /// The whole guest cluster into `buf`; returns the bytes that the crate says it read.
    async fn read(&self, buf: &mut [u8]) -> Qcow2Result<usize> {
        let header = Qcow2Header::from_buf(&self.header())?;
        // The smallest caches that the crate takes, in slices of one sector, which fit every
        // cluster size; read-only; no direct I/O.
        let cache = Some((9, 2 * SECTOR as usize));
        let params = Qcow2DevParams::new(9, cache, cache, true, false);
        let dev = Qcow2Dev::new(Path::new("one-cluster"), header, &params, self)?;
        dev.qcow2_prep_io().await?;
        dev.read_at(buf, 0).await
    }

    /// File offset of one of the clusters above.
    fn at(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    fn header(&self) -> [u8; SECTOR as usize] {
        let mut raw = [0; SECTOR as usize];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &3u32.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.at(1).to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &self.at(L1_AT).to_be_bytes());
        put(48, &self.at(REFTABLE_AT).to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        raw
    }
}

/// Copies to `buf`, which stands for the file from `offset` on, what `bytes` at `at` has for it.
fn overlay(buf: &mut [u8], offset: u64, bytes: &[u8], at: u64) {
    let start = offset.max(at);
    let end = (offset + buf.len() as u64).min(at + bytes.len() as u64);
    if start < end {
        let n = (end - start) as usize;
        let (to, from) = ((start - offset) as usize, (start - at) as usize);
        buf[to..to + n].copy_from_slice(&bytes[from..from + n]);
    }
}

impl Qcow2IoOps for &OneCluster {
    async fn read_to(&self, offset: u64, buf: &mut [u8]) -> Qcow2Result<usize> {
        let len = self.at(PAYLOAD_AT) + self.payload.len() as u64;
        if offset
            .checked_add(buf.len() as u64)
            .is_none_or(|end| end > len)
        {
            return Err("a read outside the cluster's own bytes".into());
        }
        let sectors = self.payload.len() as u64 / SECTOR;
        let entry = packed_entry(self.cluster_bits, self.at(PAYLOAD_AT) + self.lead, sectors);
        buf.fill(0);
        overlay(buf, offset, &self.header(), 0);
        overlay(buf, offset, &self.at(L2_AT).to_be_bytes(), self.at(L1_AT));
        overlay(buf, offset, &entry.to_be_bytes(), self.at(L2_AT));
        overlay(buf, offset, &self.payload, self.at(PAYLOAD_AT));
        Ok(buf.len())
    }

    async fn write_from(&self, _: u64, _: &[u8]) -> Qcow2Result<()> {
        Err("a write to a read-only image".into())
    }

    async fn fallocate(&self, _: u64, _: usize, _: u32) -> Qcow2Result<()> {
        Err("a write to a read-only image".into())
    }

    async fn fsync(&self, _: u64, _: usize, _: u32) -> Qcow2Result<()> {
        Err("a write to a read-only image".into())
    }
}
