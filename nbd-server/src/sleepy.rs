//! A device whose disk takes its time, for tests: what is *cold* is not in memory, and reads of it,
//! and flushes, wait while the test holds them.

#![allow(
    dead_code,
    reason = "not every test that includes this file needs all of it"
)]

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};

use ploop::device::{
    Device, Extent, Layers, ReadLease, Segment, SegmentPlace, WriteLease, WriteSegment, ZeroMode,
};
use ploop::error::{Error, Result};
use ploop::store::StoreFile;
use ploop::store::ring::RingKey;

use super::testing::FileDevice;

/// See the module text.
#[derive(Debug)]
pub(crate) struct Sleepy {
    pub(crate) inner: Arc<FileDevice>,
    pub(crate) mood: Arc<Mood>,
}

/// What a test says of a [`Sleepy`] device, and what it saw.
#[derive(Debug, Default)]
pub(crate) struct Mood {
    /// Bytes of the file that are not in memory.
    pub(crate) cold: Mutex<Vec<Range<u64>>>,
    /// One of the reads that wait fails.
    pub(crate) broken: Mutex<Option<Range<u64>>>,
    /// A ring may read the file; it does not wait for the test.
    pub(crate) rings: AtomicBool,
    /// The host has no room for anything.
    pub(crate) full: AtomicBool,
    /// The next flush panics.
    pub(crate) panics: AtomicBool,
    held: Mutex<bool>,
    changed: Condvar,
    /// Leases that live.
    pub(crate) leases: AtomicUsize,
    /// Reads of cold bytes that began, and flushes.
    pub(crate) begun: AtomicUsize,
}

impl Mood {
    fn refuse_full(&self) -> Result<()> {
        const ENOSPC: i32 = 28;
        let full = || Error::io("write", "/", std::io::Error::from_raw_os_error(ENOSPC));
        match self.full.load(SeqCst) {
            true => Err(full()),
            false => Ok(()),
        }
    }

    /// From now on cold reads and flushes wait.
    pub(crate) fn hold(&self) {
        *self.held.lock().unwrap() = true;
    }

    /// They go on.
    pub(crate) fn release(&self) {
        *self.held.lock().unwrap() = false;
        self.changed.notify_all();
    }

    /// Waits until `count` of them have begun.
    pub(crate) fn until_begun(&self, count: usize) {
        let mut held = self.held.lock().unwrap();
        while self.begun.load(SeqCst) < count {
            held = self.changed.wait(held).unwrap();
        }
    }

    fn sleep(&self) {
        let mut held = self.held.lock().unwrap();
        self.begun.fetch_add(1, SeqCst);
        self.changed.notify_all();
        while *held {
            held = self.changed.wait(held).unwrap();
        }
    }

    fn is_cold(&self, offset: u64, len: usize) -> bool {
        let cold = self.cold.lock().unwrap();
        cold.iter()
            .any(|r| r.start < offset + len as u64 && offset < r.end)
    }
}

impl Sleepy {
    /// `size` bytes of holes, all warm.
    pub(crate) fn new(size: u64) -> Arc<Sleepy> {
        Arc::new(Sleepy {
            inner: FileDevice::temporary(size),
            mood: Arc::default(),
        })
    }
}

#[derive(Debug)]
struct SleepyFile {
    inner: Arc<dyn StoreFile>,
    mood: Arc<Mood>,
}

#[derive(Debug)]
struct SleepyLayers {
    inner: ReadLease,
    file: Arc<dyn StoreFile>,
    mood: Arc<Mood>,
}

impl Drop for SleepyLayers {
    fn drop(&mut self) {
        self.mood.leases.fetch_sub(1, SeqCst);
    }
}

impl Layers for SleepyLayers {
    fn file(&self, _: u32) -> &Arc<dyn StoreFile> {
        &self.file
    }

    fn read_through(&self, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Err(Error::unsupported("this device has plain files only"))
    }

    fn fault(&self, layer: u32, offset: u64) -> Error {
        let segment = Segment {
            offset,
            len: 1,
            place: SegmentPlace::Fault { layer },
        };
        self.inner.read(&segment, 0, &mut [0]).unwrap_err()
    }
}

impl StoreFile for SleepyFile {
    ploop::delegate! {
        path, id, len, write_at, sync, set_len, punch, zero, reserve, set_mode, next_data,
        lock_bytes, unlock_bytes, foreign_lock,
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        if self.mood.is_cold(offset, buf.len()) {
            self.mood.sleep();
            let broken = self.mood.broken.lock().unwrap().clone();
            if broken.is_some_and(|b| b.start < offset + buf.len() as u64 && offset < b.end) {
                return Err(Error::corrupt("a read that the test broke").at(offset));
            }
        }
        self.inner.read_at(buf, offset)
    }

    fn read_now(&self, buf: &mut [u8], offset: u64) -> Result<Option<usize>> {
        if self.mood.is_cold(offset, buf.len()) {
            // What is there afterwards is nobody's.
            buf.fill(0xdd);
            return Ok(None);
        }
        self.inner.read_at(buf, offset).map(Some)
    }

    fn for_ring(&self, key: &RingKey) -> Option<BorrowedFd<'_>> {
        let may = self.mood.rings.load(SeqCst);
        self.inner.for_ring(key).filter(|_| may)
    }
}

impl Device for Sleepy {
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
        let inner = self.inner.map(range, segments)?;
        let file = Arc::new(SleepyFile {
            inner: inner.file(0).clone(),
            mood: self.mood.clone(),
        });
        self.mood.leases.fetch_add(1, SeqCst);
        Ok(ReadLease::new(Arc::new(SleepyLayers {
            inner,
            file,
            mood: self.mood.clone(),
        })))
    }

    fn prepare(&self, range: Range<u64>, segments: &mut Vec<WriteSegment>) -> Result<WriteLease> {
        self.mood.refuse_full()?;
        self.inner.prepare(range, segments)
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.mood.refuse_full()?;
        self.inner.zero(range, mode)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.inner.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.mood.sleep();
        assert!(
            !self.mood.panics.swap(false, SeqCst),
            "a panic that the test asked for"
        );
        self.inner.flush()
    }

    fn allocation(&self, range: Range<u64>, limit: usize, extents: &mut Vec<Extent>) -> Result<()> {
        self.inner.allocation(range, limit, extents)
    }
}
