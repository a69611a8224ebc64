//! Which clusters of the file are free.
//!
//! File clusters are numbered from the start of the data area.
//!
//! ```text
//!   0 ............ next ........ grown          (clusters)
//!   │ used or free │ never used  │ end of file, rounded down
//! ```
//!
//! Clusters that are to be completed later need their room at once. It is taken for several in one
//! call, ahead: from `next` to `roomy`. Any other that comes upon those is to be punched first, so a
//! sparse one keeps no room; and none is passed over, which would leave a gap in a closed image.
//!
//! Invariants: everything from `next` on reads as zeros (the file was cut there before it grew).
//! A range in `free` may hold anything, and is named by no entry, in memory or on disk: it was free at
//! open, was handed out and given back before any entry named it, or its cluster was moved and the
//! entry that says so is durable.

use std::collections::BTreeMap;
use std::ops::Range;

use super::header::Header;
use crate::error::{Error, Kind, Result};
use crate::store::StoreFile;
use crate::verify::Used;

/// The file grows by an eighth of itself, this many bytes at most, one cluster at least.
const STEP_MAX: u64 = 128 << 20;

/// Room is taken ahead for an eighth of what needed it so far, between these. Small at first: a
/// thousand disks that are written to once hold little that they do not need.
const AHEAD_MIN: u64 = 256 << 10;
const AHEAD_MAX: u64 = 4 << 20;

/// The free clusters of one image.
#[derive(Debug)]
pub struct Alloc {
    data_start: u64,
    cluster: u64,
    /// Clusters that an entry can name.
    limit: u64,
    next: u64,
    grown: u64,
    /// Bytes of the file behind `grown` ([`Alloc::set_tail`]).
    tail: u64,
    /// start → end, not touching each other, all below `next`.
    free: BTreeMap<u64, u64>,
    /// From `next` to here room is taken; nowhere when this is not above `next`.
    roomy: u64,
    /// For how many clusters room was taken so far.
    ahead: u64,
}

/// Clusters that were handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Which, contiguous, never empty.
    pub clusters: Range<u64>,
    /// They may hold anything and must be punched before use.
    pub stale: bool,
}

impl Alloc {
    /// For an image whose entries name `used`. The caller cuts the file
    /// behind the last of them before the first [`Alloc::take`].
    pub fn new(header: &Header, used: &Used) -> Alloc {
        let cluster = header.cluster_bytes();
        let mut free = BTreeMap::new();
        let mut next = 0u64;
        for range in used.ranges() {
            if u64::from(range.start) > next {
                free.insert(next, u64::from(range.start));
            }
            next = u64::from(range.end);
        }
        let per_entry = match header.version {
            super::Version::V1 => u64::from(header.cluster_sectors),
            super::Version::V2 => 1,
        };
        let first = header
            .entry_for(header.data_start)
            .map_or(u64::MAX, u64::from);
        let limit = (u64::from(u32::MAX).saturating_sub(first)) / per_entry;
        Alloc {
            data_start: header.data_start,
            cluster,
            limit,
            next,
            grown: next,
            tail: 0,
            free,
            roomy: 0,
            ahead: 0,
        }
    }

    /// From now on every length that the file is given has `tail` bytes more than its clusters.
    /// Nothing else is there before the file grows or is cut.
    pub fn set_tail(&mut self, tail: u64) {
        self.tail = tail;
    }

    /// Those bytes.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// The file's length now, as far as it was given by [`Alloc::take`].
    pub fn grown_len(&self) -> u64 {
        self.offset(self.grown) + self.tail
    }

    /// Hands out no cluster below `first` any more; returns those that were free there, and those
    /// that were never used, for [`Alloc::give_back`] should they be handed out again. Makes the
    /// file long enough for all of them. Error: `NoSpace`, with nothing changed.
    pub fn keep_off(
        &mut self,
        first: u64,
        file: &dyn StoreFile,
    ) -> Result<(Vec<Range<u64>>, Range<u64>)> {
        if first > self.limit {
            let what = "every cluster that a BAT entry can name is taken";
            return Err(Error::new(Kind::NoSpace, what).on(file.path()));
        }
        self.grow(first, file)?;
        let mut kept = Vec::new();
        while let Some((&start, &end)) = self.free.first_key_value()
            && start < first
        {
            self.free.remove(&start);
            kept.push(start..end.min(first));
            if end > first {
                self.free.insert(first, end);
            }
        }
        let fresh = self.next..first.max(self.next);
        self.next = fresh.end;
        Ok((kept, fresh))
    }

    /// The clusters that are free, below the last one that is not.
    pub fn free(&self) -> impl Iterator<Item = Range<u64>> {
        let all = self.free.iter().map(|(&start, &end)| start..end);
        all.filter(|r| r.end < self.next)
    }

    /// The file offset behind the last cluster that is not free.
    pub fn named_end(&self) -> u64 {
        self.used_len() - self.tail
    }

    /// The file offset behind the last cluster that was ever handed out.
    pub fn handed_end(&self) -> u64 {
        self.offset(self.next)
    }

    /// The file offset behind as many clusters as are not free.
    pub fn packed_end(&self) -> u64 {
        let free: u64 = self.free.iter().map(|(start, end)| end - start).sum();
        self.offset(self.next - free)
    }

    /// Hands out all clusters that are free.
    pub fn take_free(&mut self) -> Vec<Range<u64>> {
        let free = std::mem::take(&mut self.free);
        free.into_iter().map(|(start, end)| start..end).collect()
    }

    /// The file offset of a cluster.
    pub fn offset(&self, cluster: u64) -> u64 {
        self.data_start + cluster * self.cluster
    }

    /// The file's length when it is cut behind the last cluster in use.
    pub fn used_len(&self) -> u64 {
        let end = match self.free.last_key_value() {
            Some((&start, &end)) if end == self.next => start,
            _ => self.next,
        };
        self.offset(end) + self.tail
    }

    /// The file was cut at [`Alloc::used_len`].
    pub fn cut(&mut self) {
        if let Some((&start, &end)) = self.free.last_key_value()
            && end == self.next
        {
            self.free.remove(&start);
            self.next = start;
        }
        (self.grown, self.roomy) = (self.next, 0);
    }

    /// Hands out up to `want` contiguous clusters, one at least: free ones first, then new ones at
    /// the end, growing the file in steps. Error: `NoSpace` when the file cannot grow or no entry
    /// could name the cluster.
    pub fn take(&mut self, want: u64, file: &dyn StoreFile) -> Result<Taken> {
        debug_assert!(want > 0);
        if let Some((&start, &end)) = self.free.first_key_value() {
            let stop = end.min(start + want);
            self.free.remove(&start);
            if stop < end {
                self.free.insert(stop, end);
            }
            return Ok(Taken {
                clusters: start..stop,
                stale: true,
            });
        }
        let stop = (self.next + want).min(self.limit);
        if stop <= self.next {
            return Err(Error::new(
                Kind::NoSpace,
                "every cluster that a BAT entry can name is taken",
            )
            .on(file.path())
            .fix("Compact the image, or convert it to larger clusters"));
        }
        let roomy = self.next < self.roomy;
        let stop = if roomy { stop.min(self.roomy) } else { stop };
        self.grow(stop, file)?;
        let start = std::mem::replace(&mut self.next, stop);
        Ok(Taken {
            clusters: start..stop,
            stale: roomy,
        })
    }

    /// Hands out one cluster; true when its room is taken, too. Takes room for more at once, unless
    /// the host is short of it, or free clusters are there.
    pub fn take_roomy(&mut self, file: &dyn StoreFile) -> Result<(Taken, bool)> {
        if self.free.is_empty() && self.next >= self.roomy {
            self.make_room(file)?;
        }
        if !self.free.is_empty() || self.next >= self.roomy {
            return Ok((self.take(1, file)?, false));
        }
        let cluster = self.next;
        self.next += 1;
        let taken = Taken {
            clusters: cluster..cluster + 1,
            stale: false,
        };
        Ok((taken, true))
    }

    fn make_room(&mut self, file: &dyn StoreFile) -> Result<()> {
        let bytes = (self.ahead * self.cluster / 8).clamp(AHEAD_MIN, AHEAD_MAX);
        let want = (bytes / self.cluster).max(1);
        let stop = (self.next + want).min(self.limit);
        if stop <= self.next {
            return Ok(());
        }
        self.grow(stop, file)?;
        let (offset, len) = (self.offset(self.next), (stop - self.next) * self.cluster);
        match file.reserve(offset, len) {
            Ok(()) => {
                self.ahead += stop - self.next;
                self.roomy = stop;
                Ok(())
            }
            // What it got of the room goes back: others need it as much.
            Err(e) if e.kind() == Kind::NoSpace => file.punch(offset, len),
            Err(e) => Err(e),
        }
    }

    /// Makes the file long enough for clusters up to `stop`.
    fn grow(&mut self, stop: u64, file: &dyn StoreFile) -> Result<()> {
        if stop > self.grown {
            let step = (self.offset(self.grown) / 8).min(STEP_MAX) / self.cluster;
            let target = stop.max(self.grown + step.max(1)).min(self.limit.max(stop));
            file.set_len(self.offset(target) + self.tail)?;
            self.grown = target;
        }
        Ok(())
    }

    /// Takes back clusters that no entry ever named.
    pub fn give_back(&mut self, clusters: Range<u64>) {
        let Range { mut start, mut end } = clusters;
        if let Some((&before, &stop)) = self.free.range(..start).next_back()
            && stop == start
        {
            start = before;
        }
        if let Some(stop) = self.free.remove(&end) {
            end = stop;
        }
        self.free.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::store::memory::MemoryStore;
    use std::path::Path;

    fn header() -> Header {
        Header::new(super::super::Version::V2, 64, 64 * 1000).unwrap()
    }

    #[test]
    fn holes_are_reused_before_the_file_grows_and_are_marked_stale() {
        let store = MemoryStore::new();
        let file = store.create(Path::new("/i"), 0o600).unwrap();
        let mut a = Alloc::new(&header(), &Used::from_iter([0, 1, 4, 6]));
        assert_eq!(
            a.take(5, &*file).unwrap(),
            Taken {
                clusters: 2..4,
                stale: true
            }
        );
        assert_eq!(
            a.take(5, &*file).unwrap(),
            Taken {
                clusters: 5..6,
                stale: true
            }
        );
        let t = a.take(3, &*file).unwrap();
        assert_eq!(
            t,
            Taken {
                clusters: 7..10,
                stale: false
            }
        );
        assert!(file.len().unwrap() >= a.offset(10));
        a.give_back(8..9);
        a.give_back(9..10);
        assert_eq!(a.used_len(), a.offset(8));
        a.give_back(7..8);
        assert_eq!(a.used_len(), a.offset(7));
        assert_eq!(
            a.take(9, &*file).unwrap(),
            Taken {
                clusters: 7..10,
                stale: true
            }
        );
        assert_eq!(a.used_len(), a.offset(10));
    }

    #[test]
    fn after_a_cut_nothing_behind_the_end_is_handed_out_without_growing() {
        let store = MemoryStore::new();
        let file = store.create(Path::new("/i"), 0o600).unwrap();
        let mut a = Alloc::new(&header(), &Used::from_iter([0]));
        a.take(4, &*file).unwrap();
        a.give_back(3..5);
        file.set_len(a.used_len()).unwrap();
        a.cut();
        assert_eq!(
            a.take(2, &*file).unwrap(),
            Taken {
                clusters: 3..5,
                stale: false
            }
        );
        assert!(file.len().unwrap() >= a.offset(5));
    }

    #[test]
    fn room_is_taken_ahead_and_a_sparse_cluster_keeps_none_of_it() {
        let store = MemoryStore::new();
        let file = store.create(Path::new("/i"), 0o600).unwrap();
        let mut a = Alloc::new(&header(), &Used::default());
        let (taken, room) = a.take_roomy(&*file).unwrap();
        assert_eq!((taken.clusters, taken.stale, room), (0..1, false, true));
        assert_eq!(a.roomy * a.cluster, AHEAD_MIN);
        assert!(file.len().unwrap() >= a.offset(a.roomy));
        let sparse = a.take(1, &*file).unwrap();
        assert_eq!((sparse.clusters, sparse.stale), (1..2, true));
        a.give_back(1..2);
        let (again, room) = a.take_roomy(&*file).unwrap();
        assert_eq!((again.clusters, again.stale, room), (1..2, true, false));
        let rest = a.take(99, &*file).unwrap();
        assert_eq!((rest.clusters, rest.stale), (2..a.roomy, true));
        let new = a.take(1, &*file).unwrap();
        assert_eq!((new.clusters.start, new.stale), (a.roomy, false));
        assert_eq!(a.used_len(), a.offset(a.roomy + 1));
        a.ahead = 1 << 30;
        let before = a.next;
        a.take_roomy(&*file).unwrap();
        assert_eq!((a.roomy - before) * a.cluster, AHEAD_MAX);
    }

    #[test]
    fn what_is_kept_off_is_not_handed_out_until_it_is_given_back() {
        let store = MemoryStore::new();
        let file = store.create(Path::new("/i"), 0o600).unwrap();
        let mut a = Alloc::new(&header(), &Used::from_iter([0, 3, 8]));
        assert_eq!(a.keep_off(6, &*file).unwrap(), (vec![1..3, 4..6], 9..9));
        assert_eq!(a.take(9, &*file).unwrap().clusters, 6..8);
        assert_eq!(a.take(1, &*file).unwrap().clusters, 9..10);
        assert_eq!(a.keep_off(12, &*file).unwrap(), (vec![], 10..12));
        assert!(file.len().unwrap() >= a.offset(12));
        assert_eq!(a.take(1, &*file).unwrap().clusters, 12..13);
        for range in [1..3, 4..6, 10..12] {
            a.give_back(range);
        }
        let again = a.take(9, &*file).unwrap();
        assert_eq!((again.clusters, again.stale), (1..3, true));
        assert!(a.keep_off(u64::MAX, &*file).is_err());
    }

    #[test]
    fn an_entry_never_overflows_its_32_bits() {
        let store = MemoryStore::new();
        let file = store.create(Path::new("/i"), 0o600).unwrap();
        let h = Header::new(super::super::Version::V1, 131_072, 131_072 * 2).unwrap();
        let mut a = Alloc::new(&h, &Used::default());
        a.next = a.limit - 1;
        a.grown = a.next;
        let t = a.take(9, &*file).unwrap();
        assert_eq!(t.clusters.end - t.clusters.start, 1);
        assert!(h.entry_for(a.offset(t.clusters.start)).is_some());
        assert_eq!(a.take(1, &*file).unwrap_err().kind(), Kind::NoSpace);
    }
}
