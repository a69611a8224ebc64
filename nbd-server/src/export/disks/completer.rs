//! Completes clusters that clients wrote in part ([`Disk::complete`]), once they were left alone
//! for a while. One thread for all disks, there only while a disk has such clusters.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::ploop::parts;

use super::OpenDisk;

/// Between two looks. A cluster is completed after it was there at two of them: what is written in
/// one go gets its chance to fill it first.
const TICK: Duration = Duration::from_millis(500);
/// Clusters between two looks at whether the disk is still wanted.
const BATCH: usize = 64;

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Completer {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    watched: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    disk: Weak<OpenDisk>,
    /// Ages up to which parts were there one look ago, and two.
    seen: [u64; 2],
}

impl Completer {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on until it has no more parts.
    pub(super) fn watch(self: &Arc<Self>, disk: Weak<OpenDisk>) {
        let mut state = self.lock();
        state.watched.push(Watched { disk, seen: [0; 2] });
        if state.running {
            return;
        }
        let me = self.clone();
        let thread = std::thread::Builder::new().name("completer".into());
        match thread.spawn(move || me.run()) {
            Ok(_) => state.running = true,
            // A flush or the close completes them too.
            Err(e) => {
                tracing::warn!(error = %e, "no thread to complete clusters in the background")
            }
        }
    }

    fn run(&self) {
        loop {
            std::thread::sleep(TICK);
            let mut watched = std::mem::take(&mut self.lock().watched);
            watched.retain_mut(look);
            let mut state = self.lock();
            state.watched.append(&mut watched);
            if state.watched.is_empty() {
                state.running = false;
                return;
            }
        }
    }
}

/// Completes what is due of one disk. False when it need not be watched any more.
fn look(watched: &mut Watched) -> bool {
    let due = watched.seen[1];
    let Some(open) = watched.disk.upgrade() else {
        return false;
    };
    watched.seen = [open.disk.parts().1, watched.seen[0]];
    drop(open);
    loop {
        // Taken anew for each batch: the last user closes the disk, and may be this.
        let Some(open) = watched.disk.upgrade() else {
            return false;
        };
        let disk = &open.disk;
        let before = match disk.parts().0 > parts::most(disk.cluster_bytes()) / 2 {
            // Writers are about to complete clusters themselves.
            true => u64::MAX,
            false => due,
        };
        match step(disk, before) {
            Ok(true) => {}
            Ok(false) => {
                if disk.parts().0 > 0 {
                    return true;
                }
                open.unwatch();
                // Whoever made one before it saw that.
                return disk.parts().0 > 0 && open.watch_again();
            }
            Err(e) => {
                let export = open.freed.key.as_str();
                tracing::warn!(export, error = %e, "clusters could not be completed");
                return false;
            }
        }
    }
}

/// True when more may be due.
fn step(disk: &Disk, before: u64) -> ploop::Result<bool> {
    let had = disk.parts().0;
    if had == 0 {
        return Ok(false);
    }
    disk.complete(before, BATCH)?;
    Ok(disk.parts().0 + BATCH <= had)
}
