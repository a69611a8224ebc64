//! What is held: an open disk closes itself, a name becomes free, a door opens, when the last user
//! lets go.

use ploop::device::Depth;
use ploop::tracker::Tracker;
use snapshots::life::{self, Life};

use super::*;

impl OpenDisk {
    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    pub(super) fn unwatch(&self) {
        self.watched.store(false, Ordering::SeqCst);
    }

    /// True when nobody else did.
    pub(super) fn watch_again(&self) -> bool {
        !self.watched.swap(true, Ordering::SeqCst)
    }
}

impl OpenDisk {
    /// This disk, where it has a life to tell of.
    pub(super) fn lives(self: &Arc<Self>) -> Option<Arc<dyn Lives>> {
        self.home.as_ref()?;
        Some(self.clone())
    }

    /// The disk goes on elsewhere, and its life with it: here that is never ended.
    pub fn leave_life(&self) {
        if let Some(home) = &self.home {
            *home.life.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// It lives the life that it lived elsewhere: see [`life::carry_on`].
    pub fn carry_on(&self, life: Life) -> Result<()> {
        let Some(home) = &self.home else {
            return Err(Error::unsupported("it has no life to go on with"));
        };
        let mut told = home.life.lock().unwrap_or_else(PoisonError::into_inner);
        life::carry_on(home.store.as_ref(), &home.dir, life)?;
        *told = Some(life);
        Ok(())
    }

    /// Where its requests are asked for.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Order: the disk is closed, then its life ended.
    fn end(&self) -> Result<()> {
        self.disk.close()?;
        let Some(home) = &self.home else {
            return Ok(());
        };
        match home.life.lock() {
            Ok(told) => told.map_or(Ok(()), |life| {
                life::end(home.store.as_ref(), &home.dir, life)
            }),
            // Left open: a new life for who comes next.
            Err(_) => Ok(()),
        }
    }
}

impl Lives for OpenDisk {
    fn life(&self) -> Result<String> {
        let Some(home) = &self.home else {
            return Err(Error::unsupported("it has no life to tell of"));
        };
        let mut told = home.life.lock().unwrap_or_else(PoisonError::into_inner);
        let life = match *told {
            Some(life) => life,
            None => *told.insert(life::begin(home.store.as_ref(), &home.dir)?),
        };
        Ok(life.to_string())
    }
}

impl Drop for OpenDisk {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            tracing::error!(export = self.freed.key, error = %e, "the disk was not closed cleanly");
        }
    }
}

impl Drop for Freed {
    fn drop(&mut self) {
        let mut names = self.table.lock();
        // The name may be another disk's by now.
        if names.open.get(&self.key).is_some_and(|e| e.id == self.id) {
            names.open.remove(&self.key);
        }
        drop(names);
        self.table.changed.notify_all();
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let mut names = self.table.lock();
        if let Some(count) = names.doors.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                names.doors.remove(&self.name);
            }
        }
        drop(names);
        self.table.changed.notify_all();
    }
}

impl Device for OpenDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn cluster_bytes(&self) -> u64 {
        self.disk.cluster_bytes()
    }

    fn map(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<ReadLease> {
        self.disk.map(range, segments)
    }

    fn prepare(&self, range: Range<u64>, segments: &mut Vec<WriteSegment>) -> Result<WriteLease> {
        self.disk.prepare(range, segments)
    }

    fn commit(&self, lease: WriteLease) -> Result<()> {
        let allocates = lease.allocates();
        self.disk.commit(lease)?;
        if allocates
            && !self.watched.load(Ordering::SeqCst)
            && self.disk.parts().0 > 0
            && self.watch_again()
        {
            self.freed.table.completer.watch(self.me.clone());
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.disk.zero(range, mode)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.disk.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn depths(&self, range: Range<u64>, limit: usize, out: &mut Vec<Depth>) -> Result<()> {
        self.disk.depths(range, limit, out)
    }

    fn bitmaps(&self) -> Vec<Tracker> {
        self.disk.bitmaps()
    }

    fn allocation(&self, range: Range<u64>, limit: usize, out: &mut Vec<Extent>) -> Result<()> {
        self.disk.allocation(range, limit, out)
    }
}
