//! A device over one sparse file, for tests: trivially right, and able to fail on demand.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use ploop::device::{
    Device, Extent, Layers, ReadLease, Segment, SegmentPlace, WriteLease, WriteSegment, ZeroMode,
    check_range,
};
use ploop::error::{Error, Kind, Result};
use ploop::store::{RealStore, Store, StoreFile};

/// Allocation unit of a [`FileDevice`].
pub(crate) const CLUSTER: u64 = 64 << 10;

/// See the module text.
#[derive(Debug)]
pub(crate) struct FileDevice {
    file: Arc<dyn StoreFile>,
    size: u64,
    read_only: bool,
    allocated: Mutex<Vec<bool>>,
    /// Guest bytes whose reading fails.
    pub(crate) damaged: Mutex<Range<u64>>,
    /// Failures for the next changes, first to last.
    pub(crate) failures: Mutex<VecDeque<Kind>>,
    /// Failures for the next flushes, first to last.
    pub(crate) flush_failures: Mutex<VecDeque<Kind>>,
    /// A defect: the last segment or extent of every answer is left out.
    pub(crate) forgetful: AtomicBool,
    /// Flushes that came.
    pub(crate) flushes: AtomicU64,
    _dir: tempfile::TempDir,
}

#[derive(Debug)]
struct OneFile(Arc<dyn StoreFile>);

impl Layers for OneFile {
    fn file(&self, _: u32) -> &Arc<dyn StoreFile> {
        &self.0
    }

    fn read_through(&self, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Err(Error::unsupported("this device has plain files only"))
    }

    fn fault(&self, _: u32, offset: u64) -> Error {
        Error::corrupt("this range was damaged by the test").at(offset)
    }
}

fn fail_if_asked(failures: &Mutex<VecDeque<Kind>>) -> Result<()> {
    match failures.lock().unwrap().pop_front() {
        Some(kind) => Err(Error::new(kind, "a failure that the test asked for")),
        None => Ok(()),
    }
}

impl FileDevice {
    /// `size` bytes of holes in a temporary file.
    pub(crate) fn temporary(size: u64) -> Arc<FileDevice> {
        Arc::new(FileDevice::make(size, false))
    }

    /// The same, with every byte a hole and no change allowed.
    #[allow(dead_code, reason = "not every test that includes this file needs it")]
    pub(crate) fn read_only(size: u64) -> Arc<FileDevice> {
        Arc::new(FileDevice::make(size, true))
    }

    fn make(size: u64, read_only: bool) -> FileDevice {
        let dir = tempfile::tempdir().unwrap();
        let file = RealStore.create(&dir.path().join("disk"), 0o600).unwrap();
        file.set_len(size).unwrap();
        FileDevice {
            file,
            size,
            read_only,
            allocated: Mutex::new(vec![false; size.div_ceil(CLUSTER) as usize]),
            damaged: Mutex::new(0..0),
            failures: Mutex::default(),
            flush_failures: Mutex::default(),
            forgetful: AtomicBool::new(false),
            flushes: AtomicU64::new(0),
            _dir: dir,
        }
    }

    fn may_change(&self, range: &Range<u64>) -> Result<()> {
        check_range(range, self.size)?;
        if self.read_only {
            return Err(Error::new(Kind::ReadOnly, "the device is read-only"));
        }
        fail_if_asked(&self.failures)
    }

    /// Allocates every second cluster.
    #[allow(dead_code, reason = "not every test that includes this file needs it")]
    pub(crate) fn make_checkered(&self) {
        let mut allocated = self.allocated.lock().unwrap();
        allocated.iter_mut().step_by(2).for_each(|a| *a = true);
    }

    fn forget<T>(&self, answer: &mut Vec<T>) {
        if self.forgetful.load(SeqCst) {
            answer.pop();
        }
    }

    fn place(&self, at: u64) -> SegmentPlace {
        if self.damaged.lock().unwrap().contains(&at) {
            SegmentPlace::Fault { layer: 0 }
        } else if self.allocated.lock().unwrap()[(at / CLUSTER) as usize] {
            SegmentPlace::File {
                layer: 0,
                offset: at,
            }
        } else {
            SegmentPlace::Hole
        }
    }

    fn whole_clusters(range: &Range<u64>) -> Range<u64> {
        let start = range.start.next_multiple_of(CLUSTER);
        start..(range.end / CLUSTER * CLUSTER).max(start)
    }

    fn drop_clusters(&self, range: &Range<u64>) -> Result<()> {
        let whole = Self::whole_clusters(range);
        if whole.is_empty() {
            return Ok(());
        }
        self.file.punch(whole.start, whole.end - whole.start)?;
        let clusters = (whole.start / CLUSTER) as usize..(whole.end / CLUSTER) as usize;
        self.allocated.lock().unwrap()[clusters].fill(false);
        Ok(())
    }
}

impl Device for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn cluster_bytes(&self) -> u64 {
        CLUSTER
    }

    fn map(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<ReadLease> {
        segments.clear();
        check_range(&range, self.size)?;
        let mut at = range.start;
        while at < range.end {
            let mut end = (at / CLUSTER + 1) * CLUSTER;
            let damaged = self.damaged.lock().unwrap().clone();
            for border in [damaged.start, damaged.end, range.end] {
                if border > at {
                    end = end.min(border);
                }
            }
            segments.push(Segment {
                offset: at,
                len: end - at,
                place: self.place(at),
            });
            at = end;
        }
        self.forget(segments);
        Ok(ReadLease::new(Arc::new(OneFile(self.file.clone()))))
    }

    fn prepare(&self, range: Range<u64>, segments: &mut Vec<WriteSegment>) -> Result<WriteLease> {
        segments.clear();
        self.may_change(&range)?;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / CLUSTER + 1) * CLUSTER);
            segments.push(WriteSegment {
                file_offset: at,
                len: end - at,
            });
            self.allocated.lock().unwrap()[(at / CLUSTER) as usize] = true;
            at = end;
        }
        self.forget(segments);
        Ok(WriteLease::in_place(self.file.clone()))
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.may_change(&range)?;
        let slow = mode.keep_space || Self::whole_clusters(&range) != range;
        if mode.only_if_fast && slow {
            return Err(Error::unsupported("zeroing part of a cluster is not fast"));
        }
        self.file.zero(range.start, range.end - range.start)?;
        if mode.keep_space {
            let clusters = range.start / CLUSTER..range.end.div_ceil(CLUSTER);
            let clusters = clusters.start as usize..clusters.end as usize;
            self.allocated.lock().unwrap()[clusters].fill(true);
            return Ok(());
        }
        self.drop_clusters(&range)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.may_change(&range)?;
        self.drop_clusters(&range)
    }

    fn flush(&self) -> Result<()> {
        self.flushes.fetch_add(1, SeqCst);
        fail_if_asked(&self.flush_failures)?;
        self.file.sync()
    }

    fn allocation(&self, range: Range<u64>, limit: usize, extents: &mut Vec<Extent>) -> Result<()> {
        extents.clear();
        check_range(&range, self.size)?;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / CLUSTER + 1) * CLUSTER);
            let hole = !self.allocated.lock().unwrap()[(at / CLUSTER) as usize];
            let full = extents.len() == limit;
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.len += end - at,
                _ if full => break,
                _ => extents.push(Extent {
                    len: end - at,
                    hole,
                    zero: hole,
                }),
            }
            at = end;
        }
        self.forget(extents);
        Ok(())
    }
}
