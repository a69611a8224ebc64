//! Writing: in place, or into new clusters.
//!
//! A new cluster is locked (guest cluster, [`Top::busy`]) from the look at its entry to its commit
//! or abort; it is completed from below before the caller writes its part, and no reader sees it
//! before the commit. So a failure in the middle leaves the guest range as it was.

use std::ops::Range;
use std::sync::Arc;

use super::Stack;
use crate::device::{Layers, Pending, ReadLease, Segment, SegmentPlace, WriteLease, WriteSegment};
use crate::error::Result;
use crate::format::ploop::top::Top;

/// Bytes copied at a time when a cluster is completed from below. Small pieces on purpose: on ext4
/// with large folios, data written in large ones is several times slower to overwrite later.
const COPY: usize = 64 * 1024;
/// A copy leaves out blocks of this size that are all zeros.
const BLOCK: usize = 4096;

/// New clusters of one prepared write.
#[derive(Debug)]
pub(super) struct NewClusters {
    top: Arc<Top>,
    /// (guest cluster, file offset), not yet committed.
    entries: Vec<(u64, u64)>,
    /// Guest clusters whose lock is held.
    locked: Vec<u64>,
}

impl NewClusters {
    pub(super) fn new(top: &Arc<Top>) -> NewClusters {
        NewClusters {
            top: top.clone(),
            entries: Vec::new(),
            locked: Vec::new(),
        }
    }

    /// Locks a guest cluster and looks again: `Some` when another writer has mapped it meanwhile,
    /// and then it is not kept locked.
    pub(super) fn lock(&mut self, cluster: u64) -> Result<Option<u64>> {
        self.top.busy.acquire(cluster);
        self.locked.push(cluster);
        let found = self.top.lookup(cluster)?;
        if found.is_some() {
            self.locked.pop();
            self.top.busy.release(cluster);
        }
        Ok(found)
    }

    /// Allocates for `count` locked guest clusters from `cluster` on.
    pub(super) fn allocate(&mut self, cluster: u64, count: u64) -> Result<()> {
        self.top.make_room(cluster..cluster + count)?;
        let bytes = self.top.header().cluster_bytes();
        let mut done = 0;
        while done < count {
            let (offset, n) = self.top.allocate(count - done)?;
            for i in 0..n {
                self.entries.push((cluster + done + i, offset + i * bytes));
            }
            done += n;
        }
        Ok(())
    }

    /// Allocates for one locked guest cluster; gives its file offset.
    pub(super) fn allocate_one(&mut self, cluster: u64) -> Result<u64> {
        self.top.make_room(cluster..cluster + 1)?;
        let (offset, count) = self.top.allocate(1)?;
        debug_assert_eq!(count, 1);
        self.entries.push((cluster, offset));
        Ok(offset)
    }

    fn offset_of(&self, cluster: u64) -> Option<u64> {
        let found = self.entries.binary_search_by_key(&cluster, |e| e.0).ok()?;
        Some(self.entries[found].1)
    }
}

impl Pending for NewClusters {
    fn commit(&mut self) -> Result<()> {
        // From the back, so that what an error leaves in `entries` is given back by `drop`.
        while let Some(&(cluster, offset)) = self.entries.last() {
            self.top.commit(cluster, offset)?;
            self.entries.pop();
        }
        Ok(())
    }
}

impl Drop for NewClusters {
    fn drop(&mut self) {
        for &(_, offset) in &self.entries {
            self.top.give_back(offset, 1);
        }
        for &cluster in &self.locked {
            self.top.busy.release(cluster);
        }
    }
}

/// Gives `top` a guest cluster that it does not have: allocates, lets `fill` write to the file
/// offset that it is given (what it leaves reads as zeros), and enters it. False when the image has
/// the cluster already; then nothing is done. Not durable before a flush.
pub fn adopt(top: &Arc<Top>, cluster: u64, fill: impl FnOnce(u64) -> Result<()>) -> Result<bool> {
    top.before_change()?;
    let mut new = NewClusters::new(top);
    if new.lock(cluster)?.is_some() {
        return Ok(false);
    }
    let offset = new.allocate_one(cluster)?;
    fill(offset)?;
    new.commit()?;
    Ok(true)
}

/// The part of a guest range that lies in `cluster`.
pub(super) fn part(range: &Range<u64>, cluster: u64, bytes: u64) -> Range<u64> {
    range.start.max(cluster * bytes)..range.end.min((cluster + 1) * bytes)
}

impl Stack {
    pub(super) fn prepare_write(
        self: &Arc<Self>,
        range: Range<u64>,
        segments: &mut Vec<WriteSegment>,
    ) -> Result<WriteLease> {
        let top = self.top()?;
        top.before_change()?;
        let bytes = self.cluster;
        let clusters = range.start / bytes..range.end.div_ceil(bytes);
        for cluster in clusters.clone() {
            let Some(offset) = top.lookup(cluster)? else {
                return self.prepare_new(&range, clusters, segments);
            };
            push(segments, offset, &part(&range, cluster, bytes), bytes);
        }
        Ok(WriteLease::in_place(top.file().clone()).telling(top.clone()))
    }

    fn prepare_new(
        self: &Arc<Self>,
        range: &Range<u64>,
        clusters: Range<u64>,
        segments: &mut Vec<WriteSegment>,
    ) -> Result<WriteLease> {
        segments.clear();
        let top = self.top()?;
        let bytes = self.cluster;
        let mut new = NewClusters::new(top);
        let mut found = Vec::with_capacity((clusters.end - clusters.start) as usize);
        for cluster in clusters.clone() {
            let offset = match top.lookup(cluster)? {
                None => new.lock(cluster)?,
                some => some,
            };
            found.push(offset);
        }
        let mut at = 0;
        while at < found.len() {
            let run = found[at..].iter().take_while(|f| f.is_none()).count();
            new.allocate(clusters.start + at as u64, run as u64)?;
            at += run.max(1);
        }
        for (cluster, offset) in clusters.zip(found) {
            let covered = part(range, cluster, bytes);
            let offset = match offset {
                Some(offset) => offset,
                None => {
                    // Every cluster that was not found was just allocated.
                    let Some(offset) = new.offset_of(cluster) else {
                        continue;
                    };
                    self.complete(cluster, offset, &covered)?;
                    offset
                }
            };
            push(segments, offset, &covered, bytes);
        }
        Ok(WriteLease::allocating(top.file().clone(), Box::new(new)).telling(top.clone()))
    }

    /// Copies what lies below a new cluster into it, except for the part that is `covered` by the
    /// write to come. The cluster reads as zeros before.
    pub(super) fn complete(
        self: &Arc<Self>,
        cluster: u64,
        offset: u64,
        covered: &Range<u64>,
    ) -> Result<()> {
        let start = cluster * self.cluster;
        let end = (start + self.cluster).min(self.size);
        let top = self.top()?;
        for rest in [start..covered.start, covered.end..end] {
            if rest.start < rest.end {
                copy_below(self, top, rest.clone(), offset + (rest.start - start))?;
            }
        }
        Ok(())
    }
}

fn push(segments: &mut Vec<WriteSegment>, cluster_at: u64, part: &Range<u64>, bytes: u64) {
    let (file_offset, len) = (cluster_at + part.start % bytes, part.end - part.start);
    match segments.last_mut() {
        Some(last) if last.file_offset + last.len == file_offset => last.len += len,
        _ => segments.push(WriteSegment { file_offset, len }),
    }
}

fn copy_below(stack: &Arc<Stack>, top: &Top, range: Range<u64>, file_offset: u64) -> Result<()> {
    let mut segments = Vec::new();
    stack.map_below(range.clone(), &mut segments)?;
    let lease = ReadLease::new(stack.clone() as Arc<dyn Layers>);
    let mut buf = Vec::new();
    for s in segments.iter().filter(|s| s.place != SegmentPlace::Hole) {
        buf.resize(COPY.min(s.len as usize), 0);
        copy_segment(
            &lease,
            s,
            top,
            file_offset + (s.offset - range.start),
            &mut buf,
        )?;
    }
    Ok(())
}

fn copy_segment(
    lease: &ReadLease,
    s: &Segment,
    top: &Top,
    file_offset: u64,
    buf: &mut [u8],
) -> Result<()> {
    let mut done = 0;
    while done < s.len {
        let n = (s.len - done).min(buf.len() as u64) as usize;
        let piece = &mut buf[..n];
        lease.read(s, done, piece)?;
        let mut at = 0;
        while at < n {
            let run = |zero: bool| {
                piece[at..]
                    .chunks(BLOCK)
                    .take_while(|b| is_zero(b) == zero)
                    .map(<[u8]>::len)
                    .sum()
            };
            let data: usize = run(false);
            if data > 0 {
                top.file()
                    .write_at(&piece[at..at + data], file_offset + done + at as u64)?;
                at += data;
            } else {
                at += run(true);
            }
        }
        done += n as u64;
    }
    Ok(())
}

/// True when every byte is 0.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, tail) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| *c == [0; 64]) && tail.iter().all(|&b| b == 0)
}
