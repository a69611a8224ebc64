//! A larger disk, under its clients.
//!
//! The BAT lies before the data. Where it needs more room, the first clusters of the data move out of
//! its way ([`super::moving`]):
//!
//! ```text
//!   header BAT │ a b c d e f             from here on nobody is given a, b
//!   header BAT │ a b c d e f a' b'       copied one by one, the gate closed for each; flush
//!   header BAT │ 0 0 c d e f a' b'       nobody reads a, b any more: gate closed; zeros; sync
//!   header  B  A  T │ c d e f a' b'      one sector, the commit; sync; opened anew
//! ```
//!
//! Until the header is written the image is one of the old size that was not closed, whole at every
//! instant; from then on one of the new size that was. Images below stay as they are: sizes may
//! increase up a chain. Clients of before go on with the size that they were told.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Disk, Stack};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::top::Top;
use crate::store::SECTOR;

/// What [`Disk::grow`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// Bytes of the disk before.
    pub from: u64,
    /// Bytes of the disk now.
    pub to: u64,
    /// Clusters that were moved.
    pub moved: u64,
    /// The longest time that writes were held up.
    pub pause: Duration,
}

impl Disk {
    /// Makes the disk `size` bytes large, rounded up to a cluster; durable on return. What is new
    /// reads as zeros. Reads go on; a write waits for one cluster to be copied, and at the end for a
    /// flush and two syncs. Snapshots, and what is below, stay as they are. An allocation limit
    /// refuses it nothing.
    ///
    /// The caller holds [`Disk::arrange`] and has settled the last barrier. Errors, with the disk
    /// going on as it was: `Invalid` for a smaller size, or one that the format cannot hold;
    /// `ReadOnly`; `NoSpace`; `InUse` before a barrier is settled. Error that stops all writing:
    /// `Latched` after a failed sync; then the disk has the old size or the new one when it is opened
    /// next.
    pub fn grow(&self, size: u64) -> Result<Growth> {
        let old = self.top()?;
        let rounded = size.checked_next_multiple_of(self.cluster);
        let sectors = match size < old.header().size() {
            // The disk may end within its last cluster.
            true => size / SECTOR,
            false => rounded.map_or(u64::MAX, |bytes| bytes / SECTOR),
        };
        let mut done = Growth {
            from: old.header().size(),
            to: old.header().size(),
            moved: 0,
            pause: Duration::ZERO,
        };
        if size == done.from {
            return Ok(done);
        }
        let header = old.header().grown(sectors);
        let header = header.map_err(|e| e.on(old.file().path()))?;
        drop(old);
        self.check_trackers(header.size())?;

        let mut moving = self.begin_moving()?;
        moving.keep_off(header.data_start)?;
        let clusters = moving.top().clusters_in(0..header.data_start)?;
        for &cluster in &clusters {
            if !moving.shift(cluster, u64::MAX)? {
                return Err(Error::new(Kind::NoSpace, "no place for a cluster"));
            }
        }
        moving.vacate()?;
        // What is left for the closed gate is little.
        self.complete(u64::MAX, usize::MAX)?;
        moving.alone(|stack, top| {
            stack.complete_parts()?;
            self.resize_trackers(header.size())?;
            if let Err(e) = top.close_as(&header) {
                self.resize_trackers(top.header().size())?;
                return Err(e);
            }
            // From here on the file is another image than `top` knows.
            let new = top.opened_anew().inspect_err(|e| top.latch(e))?;
            new.track(top.track(None));
            self.put_in_place(stack, new);
            Ok(())
        })?;
        done.to = header.size();
        done.moved = clusters.len() as u64;
        done.pause = moving.replaced();
        Ok(done)
    }

    /// Shows more of a disk that was shrunk: `size` bytes, but no more than its images have. That it
    /// does must be durable already: clients may write there from now on.
    pub fn raise_limit(&self, size: u64) {
        self.size
            .fetch_max(size.min(self.stack().size), Ordering::AcqRel);
    }

    /// Puts `new` in the place of the top; gate closed.
    fn put_in_place(&self, stack: &Stack, new: Top) {
        let size = new.header().size();
        self.publish_stack(Stack {
            below: stack.below.clone(),
            sealing: None,
            top: Some(Arc::new(new)),
            size,
            cluster: stack.cluster,
            tracked: None,
            alive: Arc::default(),
        });
        self.size.store(size, Ordering::Release);
    }
}
