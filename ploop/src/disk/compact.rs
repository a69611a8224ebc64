//! Giving back what an open disk's top does not need, under its clients.
//!
//! | what | becomes |
//! |---|---|
//! | a cluster that reads the same below, or is zeros over nothing | no entry; its place is free |
//! | a cluster of zeros over data | a hole that keeps its entry: it hides what is below |
//! | a place that no entry names | a hole |
//! | a cluster at the end of the file, while a place before it is free | moved there ([`super::moving`]) |
//! | what lies behind the last place in use | cut |
//!
//! In steps of some clusters: looked at beside the writers, looked at again with the gate closed and
//! done; then one flush. So it may end after any of them, and begin anew: what is done is done, and
//! what was written meanwhile is as it was written. Images below the top are not touched.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::write::is_zero;
use super::{Disk, Stack};
use crate::account::GRANULE;
use crate::device::{Layers, ReadLease, Segment, SegmentPlace};
use crate::error::Result;
use crate::format::ploop::held::granules_in;
use crate::format::ploop::top::Top;
use crate::store::FileId;

/// Bytes compared at a time.
const PIECE: u64 = 64 * 1024;
/// A step looks at so many bytes of the disk, one cluster at least: as long as its flushes last, no
/// journal is kept.
const STEP: u64 = 64 << 20;
/// And moves so many at most.
const MOVED: u64 = 16 << 20;

/// What is given back, in bytes of 4 KiB granules that held data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spare {
    /// Of clusters that read the same without.
    pub same: u64,
    /// Of clusters of zeros.
    pub zeros: u64,
    /// Of places that no entry names.
    pub unnamed: u64,
}

impl Spare {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.same + self.zeros + self.unnamed
    }
}

/// What [`Disk::compact`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// What was given back.
    pub freed: Spare,
    /// Clusters that were moved.
    pub moved: u64,
    /// Bytes of the top's file before.
    pub from: u64,
    /// Bytes of the file now.
    pub to: u64,
    /// The longest time that writes were held up.
    pub pause: Duration,
}

/// What a disk's compaction has done and what it still has to look at.
#[derive(Clone, Debug)]
pub struct Compaction {
    steps: VecDeque<Vec<u64>>,
    /// The top's.
    file: FileId,
    /// Clusters of the top when it began.
    most: u64,
    looked: u64,
    emptied: bool,
    done: Compacted,
}

impl Compaction {
    /// What was done so far.
    pub fn done(&self) -> &Compacted {
        &self.done
    }

    /// Bytes of clusters that were looked at or moved, and how many there were to look at.
    pub fn progress(&self, cluster: u64) -> (u64, u64) {
        (self.looked, (self.most * cluster).max(self.looked))
    }
}

/// What can be done with a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Worth {
    Needed,
    /// Reads the same below.
    Same,
    /// Zeros over something.
    Zeros,
}

impl Disk {
    /// What [`Disk::compact`] would give back now. Changes nothing. Blocks: reads all of the top's
    /// data, and what is below it. Error: `ReadOnly`.
    pub fn spare(&self) -> Result<Spare> {
        let top = self.top()?;
        let mut spare = Spare {
            unnamed: top.spare()? * GRANULE,
            ..Spare::default()
        };
        for step in self.steps(&top)?.iter() {
            // No longer: who rearranges the layers waits for whoever has a version.
            let stack = self.stack();
            for &cluster in step {
                match stack.worth(cluster)? {
                    Worth::Needed => {}
                    Worth::Same => spare.same += stack.granules(cluster)? * GRANULE,
                    Worth::Zeros => spare.zeros += stack.granules(cluster)? * GRANULE,
                }
            }
        }
        Ok(spare)
    }

    /// Begins to give back what the top does not need: [`Disk::compact_step`] goes on. Changes
    /// nothing yet. Error: `ReadOnly`.
    pub fn compaction(&self) -> Result<Compaction> {
        let top = self.top()?;
        let len = top.file().len()?;
        let steps: VecDeque<_> = self.steps(&top)?.into();
        Ok(Compaction {
            most: steps.iter().map(|s| s.len() as u64).sum(),
            looked: 0,
            steps,
            file: top.file().id(),
            emptied: false,
            done: Compacted {
                from: len,
                to: len,
                ..Compacted::default()
            },
        })
    }

    /// Does a step: gives back some of what the top does not need, and in the end makes its file as
    /// short as it can be; durable on return. False when it was the last one. Clients notice pauses
    /// of a cluster's comparison or copy, and of a cut. Between two steps a disk may get another
    /// top, or be left as it is.
    ///
    /// The caller holds [`Disk::arrange`] and has settled the last barrier. Errors, with the disk going
    /// on and all of its content there: `ReadOnly`; `NoSpace`; `InUse` before a barrier is settled;
    /// `Io`; `Latched` after a failed sync.
    pub fn compact_step(&self, c: &mut Compaction) -> Result<bool> {
        let top = self.top()?;
        if top.file().id() != c.file {
            // The file of before is a snapshot's now, and as long as it was.
            c.file = top.file().id();
            c.done.from = top.file().len()?;
        }
        if let Some(step) = c.steps.pop_front() {
            self.release_some(&step, &mut c.done)?;
            c.looked += step.len() as u64 * self.cluster;
            c.done.to = top.file().len()?;
            return Ok(true);
        }
        if !c.emptied {
            let spare = top.spare()?;
            if spare > 0 {
                top.before_change()?;
                top.empty_free()?;
                c.done.freed.unnamed += spare * GRANULE;
            }
            c.emptied = true;
        }
        // Writers who take places meanwhile do not keep it going for ever.
        let moved = match c.done.moved > c.most {
            true => 0,
            false => self.pack_some(&mut c.done)?,
        };
        c.looked += moved * self.cluster;
        if moved == 0 {
            self.cut(&top, &mut c.done)?;
            self.flush_top(&top)?;
        }
        c.done.to = top.file().len()?;
        Ok(moved > 0)
    }

    /// All steps. The caller holds [`Disk::arrange`] and has settled the last barrier. Errors: as
    /// [`Disk::compact_step`].
    pub fn compact(&self) -> Result<Compacted> {
        let mut compaction = self.compaction()?;
        while self.compact_step(&mut compaction)? {}
        Ok(compaction.done)
    }

    /// The clusters of the top, as many together as are looked at in one step.
    fn steps(&self, top: &Top) -> Result<Vec<Vec<u64>>> {
        let all = top.clusters_in(0..u64::MAX)?;
        let steps = all.chunks((STEP / self.cluster).max(1) as usize);
        Ok(steps.map(<[u64]>::to_vec).collect())
    }

    /// Gives back what of `clusters` is not needed.
    fn release_some(&self, clusters: &[u64], done: &mut Compacted) -> Result<()> {
        let (mut same, mut zeros) = (Vec::new(), Vec::new());
        let top = self.top()?;
        {
            let stack = self.stack();
            for &cluster in clusters {
                match stack.worth(cluster)? {
                    Worth::Same => same.push(cluster),
                    Worth::Zeros if stack.granules(cluster)? > 0 => zeros.push(cluster),
                    Worth::Zeros | Worth::Needed => {}
                }
            }
        }
        if zeros.iter().any(|&k| top.keeps_room(k)) {
            self.flush_top(&top)?;
        }
        for cluster in zeros {
            let freed = self.alone(&mut done.pause, |stack| {
                if top.keeps_room(cluster) || stack.worth(cluster)? != Worth::Zeros {
                    return Ok(0);
                }
                top.before_change()?;
                top.hollow(cluster)
            })?;
            done.freed.zeros += freed * GRANULE;
        }
        if same.is_empty() {
            return Ok(());
        }
        let mut moving = self.begin_moving()?;
        for cluster in same {
            let is_same = |stack: &Arc<Stack>| Ok(stack.worth(cluster)? == Worth::Same);
            let charged = moving.unname(cluster, is_same)?.unwrap_or(0);
            done.freed.same += charged * GRANULE;
        }
        moving.vacate()?;
        done.pause = done.pause.max(moving.pause);
        Ok(())
    }

    /// Moves some clusters from the end of the file to free places; how many.
    fn pack_some(&self, done: &mut Compacted) -> Result<u64> {
        let top = self.top()?;
        let end = top.packed_end();
        let mut behind = top.clusters_in(end..u64::MAX)?;
        behind.truncate((MOVED / self.cluster).max(1) as usize);
        if behind.is_empty() {
            return Ok(0);
        }
        let mut moving = self.begin_moving()?;
        let mut moved = 0;
        for cluster in behind {
            // A writer may have taken the place meanwhile.
            moved += u64::from(moving.shift(cluster, end)?);
        }
        moving.vacate()?;
        done.pause = done.pause.max(moving.pause);
        done.moved += moved;
        Ok(moved)
    }

    fn cut(&self, top: &Top, done: &mut Compacted) -> Result<()> {
        self.alone(&mut done.pause, |_| {
            if !top.is_longer()? {
                return Ok(());
            }
            top.before_change()?;
            top.cut()
        })
    }

    fn flush_top(&self, top: &Top) -> Result<()> {
        let stack = self.stack();
        top.flush_or(&|| stack.complete_parts())
    }
}

impl Stack {
    /// Granules that a complete cluster of the top holds.
    fn granules(&self, cluster: u64) -> Result<u64> {
        let top = self.top()?;
        match top.lookup(cluster)? {
            Some(at) => granules_in(top.file().as_ref(), at..at + self.cluster),
            None => Ok(0),
        }
    }

    /// What a cluster of the top is worth. Clusters that are not complete are needed, and so is what
    /// cannot be compared because it is damaged below.
    fn worth(self: &Arc<Self>, cluster: u64) -> Result<Worth> {
        let top = self.top()?;
        let Some(offset) = top.lookup(cluster)? else {
            return Ok(Worth::Needed);
        };
        let guest = self.extent(cluster);
        let lease = ReadLease::new(self.clone() as Arc<dyn Layers>);
        let (mut same, mut zeros, mut at) = (true, true, guest.start);
        let (mut here, mut below) = (Vec::new(), Vec::new());
        while at < guest.end && (same || zeros) {
            let piece = at..(at + PIECE).min(guest.end);
            read_top(top, offset + (at - guest.start), &piece, &mut here)?;
            zeros &= is_zero(&here);
            if same {
                same = self.read_below(&lease, &piece, &mut below)? && here == below;
            }
            at = piece.end;
        }
        Ok(match (same, zeros) {
            (true, _) => Worth::Same,
            (false, true) => Worth::Zeros,
            (false, false) => Worth::Needed,
        })
    }

    /// The bytes of `range` as they are below the top; false for what is damaged there.
    fn read_below(&self, lease: &ReadLease, range: &Range<u64>, out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        out.resize((range.end - range.start) as usize, 0);
        let mut segments: Vec<Segment> = Vec::new();
        self.map_below(range.clone(), &mut segments)?;
        for s in &segments {
            let start = (s.offset - range.start) as usize;
            match s.place {
                SegmentPlace::Hole => {}
                SegmentPlace::Fault { .. } => return Ok(false),
                SegmentPlace::File { .. } | SegmentPlace::Through { .. } => {
                    lease.read(s, 0, &mut out[start..start + s.len as usize])?;
                }
            }
        }
        Ok(true)
    }
}

/// The bytes of the top's file from `offset` on, as many as `range` has; holes are not read.
fn read_top(top: &Top, offset: u64, range: &Range<u64>, out: &mut Vec<u8>) -> Result<()> {
    let len = range.end - range.start;
    out.clear();
    out.resize(len as usize, 0);
    let file = top.file();
    let mut at = offset;
    while at < offset + len
        && let Some(data) = file.next_data(at, offset + len)?
    {
        let (from, to) = ((data.start - offset) as usize, (data.end - offset) as usize);
        crate::store::read_or_zero(file.as_ref(), &mut out[from..to], data.start)?;
        at = data.end;
    }
    Ok(())
}
