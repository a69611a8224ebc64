//! A disk: a sealed chain, and perhaps a writable image on top of it, as one device.
//!
//! ```text
//!        Disk ── Stack ─┬─ Top              this disk's own map; reads and writes
//!                       └─ Chain (shared)   merged map of everything below; reads only
//! ```
//!
//! | a cluster is | read | write | zero, discard |
//! |---|---|---|---|
//! | in the top | its file range | in place | punched where it is |
//! | in the top in part | each granule where it is | in place; the rest stays below | completed from below, then punched |
//! | below only | the lower file's range | new cluster, this part of it ([`write`]) | whole: new cluster, nothing written; part: completed from below (discard: left) |
//! | nowhere | a hole | new cluster, rest sparse | nothing to do |
//!
//! A stack is a *version*: it never changes, and whoever rearranges the layers ([`live`]) publishes
//! the next one. A [`ReadLease`] holds the version that it was given on; what only old versions
//! name is freed when the last of them is gone.

pub mod claim;
pub mod compact;
mod depth;
mod differ;
mod erase;
mod files;
pub mod grow;
pub mod info;
mod limit;
pub mod live;
mod moving;
pub mod open;
mod source;
mod track;
mod write;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use arc_swap::ArcSwap;

use crate::account::Account;
use crate::chain::{Chain, push_segment};
use crate::device::{
    Depth, Device, Extent, Layers, ReadLease, Segment, SegmentPlace, WriteLease, WriteSegment,
    ZeroMode, check_range,
};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::parts::{GRANULE, Part};
use crate::format::ploop::top::{Found, Top};
use crate::gate::Gate;
use crate::locks::DiskLock;
use crate::store::{StoreFile, Trail};
use crate::tracker::{self, Tracker, Tracking};
use live::Seal;

/// Guest bytes mapped at a time where a range may be the whole disk.
const WINDOW: u64 = 256 << 20;

/// The most guest bytes that one [`Device::allocation`] call looks at.
const ALLOCATION_MAX: u64 = 1 << 40;

/// One version of what a disk is made of. A lease holds the version that it was given on.
#[derive(Debug)]
pub(crate) struct Stack {
    pub(crate) below: Option<Arc<Chain>>,
    /// The top until the last barrier, on its way to being a part of the chain: reads only.
    pub(crate) sealing: Option<Arc<Seal>>,
    pub(crate) top: Option<Arc<Top>>,
    pub(crate) size: u64,
    pub(crate) cluster: u64,
    /// The trackers in force, if there are any.
    pub(crate) tracked: Option<Arc<tracker::Set>>,
    /// Last: while it lives, what is above may; once it is gone, all of that was let go.
    pub(crate) alive: Arc<()>,
}

impl Stack {
    fn depth(&self) -> u32 {
        self.below.as_ref().map_or(0, |c| c.deltas().len() as u32)
    }

    /// The layer number of the top: above the chain's, and that of the one being sealed.
    fn top_layer(&self) -> u32 {
        self.depth() + u32::from(self.sealing.is_some())
    }

    /// How many layers there are.
    fn layers(&self) -> u32 {
        self.top_layer() + u32::from(self.top.is_some())
    }

    pub(crate) fn top(&self) -> Result<&Arc<Top>> {
        self.top
            .as_ref()
            .ok_or_else(|| Error::new(Kind::ReadOnly, "the disk is open read-only").on(self.path()))
    }

    fn path(&self) -> &Path {
        let top_layer = self.top_layer();
        let layer = if self.top.is_some() {
            top_layer
        } else {
            top_layer - 1
        };
        self.file(layer).path()
    }

    /// Guest bytes from here on are a hole.
    fn mapped_end(&self) -> u64 {
        match (&self.top, &self.below) {
            (Some(top), _) => top.header().size(),
            (None, Some(chain)) => chain.mapped_end(),
            (None, None) => 0,
        }
    }

    /// Appends the segments of `range` as they are below the top.
    pub(crate) fn map_below(&self, range: Range<u64>, out: &mut Vec<Segment>) -> Result<()> {
        match &self.sealing {
            Some(seal) => map_over(&seal.top, self.depth(), range, out, &|range, out| {
                self.map_chain(range, out)
            }),
            None => self.map_chain(range, out),
        }
    }

    fn map_chain(&self, range: Range<u64>, out: &mut Vec<Segment>) -> Result<()> {
        let Some(chain) = &self.below else {
            let len = range.end - range.start;
            push_segment(out, range.start, len, SegmentPlace::Hole);
            return Ok(());
        };
        chain.map(range, out)
    }

    fn map(&self, range: Range<u64>, out: &mut Vec<Segment>) -> Result<()> {
        match &self.top {
            Some(top) => map_over(top, self.top_layer(), range, out, &|range, out| {
                self.map_below(range, out)
            }),
            None => self.map_below(range, out),
        }
    }
}

type MapBelow<'a> = &'a dyn Fn(Range<u64>, &mut Vec<Segment>) -> Result<()>;

/// Appends the segments of `range` as `top`, at `layer`, and what is below it have them.
fn map_over(
    top: &Top,
    layer: u32,
    range: Range<u64>,
    out: &mut Vec<Segment>,
    below: MapBelow<'_>,
) -> Result<()> {
    let cluster = top.header().cluster_bytes();
    let mut at = range.start;
    while at < range.end {
        let run = unmapped_run(top, at..range.end)?;
        if run > at {
            below(at..run, out)?;
            at = run;
            continue;
        }
        let stop = ((at / cluster + 1) * cluster).min(range.end);
        match top.find(at / cluster)? {
            Found::At(offset) => {
                let offset = offset + at % cluster;
                push_segment(out, at, stop - at, SegmentPlace::File { layer, offset });
            }
            Found::Part => match top.parts().get(at / cluster) {
                Some(part) => map_part(&part, cluster, layer, at..stop, out, below)?,
                // Completed since: look again.
                None => continue,
            },
            // `unmapped_run` saw something here, and what a top has never goes away.
            Found::Below => below(at..stop, out)?,
        }
        at = stop;
    }
    Ok(())
}

/// Appends the segments of `range`, in a cluster that is there in part.
fn map_part(
    part: &Part,
    cluster: u64,
    layer: u32,
    range: Range<u64>,
    out: &mut Vec<Segment>,
    below: MapBelow<'_>,
) -> Result<()> {
    let start = range.start / cluster * cluster;
    let last = (range.end - start).div_ceil(GRANULE);
    let mut at = range.start;
    while at < range.end {
        let (here, end) = part.present.run((at - start) / GRANULE, last);
        let end = (start + end * GRANULE).min(range.end);
        if here {
            let offset = part.offset + (at - start);
            push_segment(out, at, end - at, SegmentPlace::File { layer, offset });
        } else {
            below(at..end, out)?;
        }
        at = end;
    }
    Ok(())
}

/// The end of the run of bytes, from the start of `range` on, that the top does not have.
fn unmapped_run(top: &Top, range: Range<u64>) -> Result<u64> {
    let cluster = top.header().cluster_bytes();
    let end = range.end.div_ceil(cluster);
    let mut at = range.start / cluster;
    loop {
        at = top.next_page_with_entries(at, end);
        if at >= end || top.find(at)? != Found::Below {
            return Ok((at * cluster).clamp(range.start, range.end));
        }
        at += 1;
    }
}

impl Layers for Stack {
    fn file(&self, layer: u32) -> &Arc<dyn StoreFile> {
        match (&self.below, &self.sealing, &self.top) {
            (Some(chain), _, _) if layer < self.depth() => chain.file(layer),
            (_, Some(seal), _) if layer == self.depth() => seal.top.file(),
            (_, _, Some(top)) => top.file(),
            (Some(chain), _, None) => chain.file(layer),
            (None, _, None) => unreachable!("a stack has a chain or a top"),
        }
    }

    fn read_through(&self, layer: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        match &self.below {
            Some(chain) => chain.read_through(layer, offset, buf),
            None => Err(self.fault(layer, offset)),
        }
    }

    fn fault(&self, layer: u32, offset: u64) -> Error {
        match &self.below {
            Some(chain) => chain.fault(layer, offset),
            None => Error::corrupt("damaged entry")
                .on(self.file(layer).path())
                .at(offset),
        }
    }
}

/// An open disk. Dropping it without [`Disk::close`] is what a crash does: flushed data is safe,
/// and the image stays marked in use.
#[derive(Debug)]
pub struct Disk {
    /// Every change passes it; a barrier closes it.
    gate: Arc<Gate>,
    current: ArcSwap<Stack>,
    /// Versions that were current and that leases may still hold.
    past: Mutex<Vec<Weak<()>>>,
    /// Held by whoever rearranges the layers.
    arranging: Mutex<()>,
    /// That of the version in force: changes after it, and only upwards.
    size: AtomicU64,
    cluster: u64,
    writable: bool,
    tracking: Arc<Tracking>,
    _lock: Option<DiskLock>,
}

impl Disk {
    fn new(mut stack: Stack, lock: Option<DiskLock>) -> Disk {
        let tracking = stack.top.as_ref().and_then(|top| top.tracking());
        let tracking = tracking.unwrap_or_else(|| {
            let tracking = Arc::new(Tracking::new(None, stack.size, Vec::new()));
            if let Some(top) = &stack.top {
                top.track(Some(tracking.clone()));
            }
            tracking
        });
        stack.tracked = tracking.set();
        Disk {
            gate: Arc::default(),
            past: Mutex::default(),
            arranging: Mutex::default(),
            size: AtomicU64::new(stack.size),
            cluster: stack.cluster,
            writable: stack.top.is_some(),
            tracking,
            current: ArcSwap::from_pointee(stack),
            _lock: lock,
        }
    }

    /// The same, showing `limit` bytes at most: what is behind them is out of reach.
    #[must_use]
    pub(crate) fn limited(mut self, limit: Option<u64>) -> Disk {
        let size = self.size.get_mut();
        *size = limit.unwrap_or(u64::MAX).min(*size);
        self
    }

    /// A read-only disk of a sealed chain.
    pub fn sealed(chain: Arc<Chain>) -> Disk {
        let stack = Stack {
            size: chain.size(),
            cluster: chain.unit(),
            below: Some(chain),
            sealing: None,
            top: None,
            tracked: None,
            alive: Arc::default(),
        };
        Disk::new(stack, None)
    }

    /// A writable disk: `top` over `below`. Error: `Invalid` when what is below is larger, or its
    /// clusters are.
    pub fn writable(below: Option<Arc<Chain>>, top: Top, lock: Option<DiskLock>) -> Result<Disk> {
        let (size, cluster) = (top.header().size(), top.header().cluster_bytes());
        if let Some(chain) = &below {
            if chain.size() > size {
                let what = format!(
                    "this image of {size} bytes lies on a chain of {} bytes; sizes must not shrink \
                     upwards",
                    chain.size()
                );
                return Err(Error::corrupt(what).on(top.file().path()));
            }
            if !cluster.is_multiple_of(chain.unit()) {
                let what = format!(
                    "clusters of {cluster} bytes on a chain with clusters of {} bytes",
                    chain.unit()
                );
                return Err(Error::corrupt(what).on(top.file().path()));
            }
        }
        let stack = Stack {
            below,
            sealing: None,
            top: Some(Arc::new(top)),
            size,
            cluster,
            tracked: None,
            alive: Arc::default(),
        };
        Ok(Disk::new(stack, lock))
    }

    /// The version in force.
    pub(crate) fn stack(&self) -> Arc<Stack> {
        self.current.load_full()
    }

    /// The version in force, once the descriptor names its top: what a flush must cover may lie in a
    /// top that is not named yet.
    fn committed(&self) -> Result<Arc<Stack>> {
        loop {
            let stack = self.stack();
            match &stack.sealing {
                Some(seal) if !seal.wait()? => {}
                _ => return Ok(stack),
            }
        }
    }

    /// What lies below the top; of a read-only disk, all of it.
    pub fn below(&self) -> Option<Arc<Chain>> {
        self.stack().below.clone()
    }

    /// What its own files take, and may take; of the top only from its first change on, or after
    /// [`Top::count`]. Error: `ReadOnly`.
    pub fn account(&self) -> Result<Arc<Account>> {
        Ok(self.stack().top()?.held().account().clone())
    }

    /// The file of the uppermost layer.
    pub fn path(&self) -> PathBuf {
        self.stack().path().to_path_buf()
    }

    /// Clusters of the top that are not complete: how many, and the age that the next one gets.
    pub fn parts(&self) -> (usize, u64) {
        let stack = self.stack();
        let parts = stack.top.as_ref().map(|top| top.parts());
        parts.map_or((0, 0), |parts| (parts.count(), parts.next_seq()))
    }

    /// Completes clusters of the top that were begun before age `before` ([`Disk::parts`]), `limit`
    /// at most. Blocks for copies of them, and holds up nobody who does not write to the one at hand.
    /// Not durable before a flush. A read-only disk has none.
    pub fn complete(&self, before: u64, limit: usize) -> Result<()> {
        // A version is held, not its top alone: who waits for the last lease must see it.
        let clusters = {
            let stack = self.stack();
            let Some(top) = &stack.top else {
                return Ok(());
            };
            top.check_latch()?;
            top.parts().older_than(before, limit)
        };
        let mut trail = Trail::default();
        for cluster in clusters {
            let _pass = self.gate.enter();
            let stack = self.stack();
            if let Some(at) = stack.complete_part(cluster, &(0..0))?
                && let Some(top) = &stack.top
            {
                trail.wrote(top.file().as_ref(), at, stack.cluster);
            }
        }
        Ok(())
    }

    /// Completes one guest cluster, if it is there in part.
    pub fn complete_cluster(&self, cluster: u64) -> Result<()> {
        let _pass = self.gate.enter();
        self.stack().complete_part(cluster, &(0..0)).map(drop)
    }

    /// Closes the disk: flushes, gives unused space at the end of the top back, clears its in-use
    /// mark; all durable on return. The caller has stopped all requests. Fails, and leaves the mark,
    /// when an earlier failure latched the disk. Idempotent.
    pub fn close(&self) -> Result<()> {
        let stack = self.committed()?;
        self.complete(u64::MAX, usize::MAX)?;
        stack.top.as_ref().map_or(Ok(()), |top| top.close())
    }
}

impl Device for Disk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn cluster_bytes(&self) -> u64 {
        self.cluster
    }

    fn map(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<ReadLease> {
        segments.clear();
        check_range(&range, self.size())?;
        let stack = self.stack();
        stack.map(range, segments)?;
        Ok(ReadLease::new(stack))
    }

    fn prepare(&self, range: Range<u64>, segments: &mut Vec<WriteSegment>) -> Result<WriteLease> {
        segments.clear();
        check_range(&range, self.size())?;
        // Inside first: the version that is current then stays so until the lease ends.
        let pass = self.gate.enter();
        let stack = self.stack();
        let mark = match &stack.tracked {
            Some(set) => self.tracking.before(set, &range)?,
            None => false,
        };
        match stack.prepare_write(range.clone(), segments) {
            Ok(mut lease) => {
                lease.keep(pass);
                if let Some(set) = stack.tracked.as_ref().filter(|_| mark) {
                    set.mark(&range);
                }
                Ok(lease)
            }
            Err(e) => {
                // What it had charged of clusters that are there stays.
                if let Some(top) = &stack.top {
                    top.held().doubt();
                }
                Err(e)
            }
        }
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        check_range(&range, self.size())?;
        if mode.only_if_fast {
            let _pass = self.gate.enter();
            self.stack().refuse_slow(&range)?;
        }
        self.erase(range, erase::How::Zero(mode))
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        check_range(&range, self.size())?;
        self.erase(range, erase::How::Discard)
    }

    fn flush(&self) -> Result<()> {
        // Only complete clusters get an entry; the others a journal keeps, where there can be one.
        // What a barrier comes in between of, it completes.
        if !self.stack().top.as_ref().is_some_and(|top| top.journals()) {
            self.complete(u64::MAX, usize::MAX)?;
        }
        let stack = self.committed()?;
        let top = stack.top.as_ref();
        top.map_or(Ok(()), |top| top.flush_or(&|| stack.complete_parts()))
    }

    fn depths(&self, range: Range<u64>, limit: usize, out: &mut Vec<Depth>) -> Result<()> {
        self.depths_of(range, limit, out)
    }

    fn bitmaps(&self) -> Vec<Tracker> {
        self.trackers()
    }

    fn allocation(&self, range: Range<u64>, limit: usize, out: &mut Vec<Extent>) -> Result<()> {
        out.clear();
        check_range(&range, self.size())?;
        let mut segments = Vec::new();
        let mut at = range.start;
        // Of an absurdly large disk one call answers a part: ending early is allowed.
        let end = range.end.min(range.start.saturating_add(ALLOCATION_MAX));
        let mapped = self.stack().mapped_end();
        while at < end && out.len() <= limit {
            if at >= mapped {
                push_extent(out, range.end - at, true);
                break;
            }
            let stop = at.saturating_add(WINDOW).min(end);
            let lease = self.map(at..stop, &mut segments)?;
            for s in &segments {
                self.extents_of(&lease, s, limit, out)?;
                if out.len() > limit {
                    break;
                }
            }
            at = stop;
        }
        out.truncate(limit);
        Ok(())
    }
}

impl Disk {
    /// The extents of one segment: a mapped file range may be sparse.
    fn extents_of(
        &self,
        lease: &ReadLease,
        s: &Segment,
        limit: usize,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        let (layer, start) = match s.place {
            SegmentPlace::Hole => {
                push_extent(out, s.len, true);
                return Ok(());
            }
            SegmentPlace::File { layer, offset } => (layer, offset),
            SegmentPlace::Through { .. } | SegmentPlace::Fault { .. } => {
                push_extent(out, s.len, false);
                return Ok(());
            }
        };
        let end = start + s.len;
        let mut at = start;
        while at < end && out.len() <= limit {
            let data = lease.file(layer).next_data(at, end)?.unwrap_or(end..end);
            let (from, to) = (data.start.clamp(at, end), data.end.clamp(at, end));
            push_extent(out, from - at, true);
            push_extent(out, to - from, false);
            at = to;
        }
        Ok(())
    }
}

fn push_extent(out: &mut Vec<Extent>, len: u64, hole: bool) {
    if len == 0 {
        return;
    }
    match out.last_mut() {
        Some(last) if last.hole == hole => last.len += len,
        _ => out.push(Extent {
            len,
            hole,
            zero: hole,
        }),
    }
}
