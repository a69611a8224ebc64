//! A stage that counts what passes through it, for logs and metrics.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ploop::device::{
    Depth, Device, Extent, ReadLease, Segment, WriteLease, WriteSegment, ZeroMode,
};
use ploop::error::Result;
use ploop::tracker::Tracker;

/// Running totals. Each is exact; read together they are of nearly the same instant.
#[derive(Debug, Default)]
pub struct Counters {
    /// Ranges mapped for reading.
    pub reads: AtomicU64,
    /// Bytes in them.
    pub read_bytes: AtomicU64,
    /// Writes committed.
    pub writes: AtomicU64,
    /// Bytes in writes that were prepared.
    pub write_bytes: AtomicU64,
    /// Ranges zeroed.
    pub zeroes: AtomicU64,
    /// Ranges discarded.
    pub discards: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Calls that failed, of any kind.
    pub errors: AtomicU64,
}

impl Counters {
    fn note<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.errors.fetch_add(1, Relaxed);
        }
        result
    }
}

/// A device in front of another that counts.
#[derive(Debug)]
pub struct Counted {
    inner: Arc<dyn Device>,
    counters: Arc<Counters>,
    waits: bool,
}

impl Counted {
    /// Counts what goes to `inner` in `counters`.
    pub fn new(inner: Arc<dyn Device>, counters: Arc<Counters>) -> Counted {
        Counted {
            inner,
            counters,
            waits: false,
        }
    }

    /// The same; a change that the host has no room for has not failed: it is tried again.
    #[must_use]
    pub fn waiting_for_room(mut self, waits: bool) -> Counted {
        self.waits = waits;
        self
    }

    fn note_change<T>(&self, result: Result<T>) -> Result<T> {
        match &result {
            Err(e) if self.waits && e.is_host_full() => result,
            _ => self.counters.note(result),
        }
    }
}

fn count(calls: &AtomicU64) {
    calls.fetch_add(1, Relaxed);
}

fn count_bytes(calls: &AtomicU64, range: &Range<u64>) {
    calls.fetch_add(range.end.saturating_sub(range.start), Relaxed);
}

impl Device for Counted {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn cluster_bytes(&self) -> u64 {
        self.inner.cluster_bytes()
    }

    fn map(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<ReadLease> {
        count(&self.counters.reads);
        count_bytes(&self.counters.read_bytes, &range);
        self.counters.note(self.inner.map(range, segments))
    }

    fn prepare(&self, range: Range<u64>, segments: &mut Vec<WriteSegment>) -> Result<WriteLease> {
        let bytes = range.end.saturating_sub(range.start);
        let lease = self.note_change(self.inner.prepare(range, segments))?;
        self.counters.write_bytes.fetch_add(bytes, Relaxed);
        Ok(lease)
    }

    fn commit(&self, lease: WriteLease) -> Result<()> {
        count(&self.counters.writes);
        self.counters.note(self.inner.commit(lease))
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        count(&self.counters.zeroes);
        self.note_change(self.inner.zero(range, mode))
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        count(&self.counters.discards);
        self.counters.note(self.inner.discard(range))
    }

    fn flush(&self) -> Result<()> {
        count(&self.counters.flushes);
        self.counters.note(self.inner.flush())
    }

    fn depths(&self, range: Range<u64>, limit: usize, depths: &mut Vec<Depth>) -> Result<()> {
        self.counters.note(self.inner.depths(range, limit, depths))
    }

    fn bitmaps(&self) -> Vec<Tracker> {
        self.inner.bitmaps()
    }

    fn allocation(&self, range: Range<u64>, limit: usize, extents: &mut Vec<Extent>) -> Result<()> {
        self.counters
            .note(self.inner.allocation(range, limit, extents))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FileDevice;

    #[test]
    fn two_stages_on_one_device_both_count_and_change_nothing() {
        let device = FileDevice::temporary(1 << 20);
        let (outer, inner) = (Arc::new(Counters::default()), Arc::new(Counters::default()));
        let stage = Arc::new(Counted::new(device.clone(), inner.clone()));
        let stage = Counted::new(stage, outer.clone());
        stage.write(4096, &[7; 512]).unwrap();
        stage.flush().unwrap();
        let mut buf = [0; 512];
        stage.read(4096, &mut buf).unwrap();
        assert_eq!(buf, [7; 512]);
        assert!(stage.read(1 << 20, &mut buf).is_err());
        stage.zero(0..4096, ZeroMode::default()).unwrap();
        stage.discard(0..4096).unwrap();
        for c in [&outer, &inner] {
            assert_eq!(c.writes.load(Relaxed), 1);
            assert_eq!(c.write_bytes.load(Relaxed), 512);
            assert_eq!(c.reads.load(Relaxed), 2);
            assert_eq!(c.flushes.load(Relaxed), 1);
            assert_eq!((c.zeroes.load(Relaxed), c.discards.load(Relaxed)), (1, 1));
            assert_eq!(c.errors.load(Relaxed), 1);
        }
        assert_eq!(stage.size(), device.size());
    }
}
