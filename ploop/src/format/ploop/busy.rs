//! The lock on a cluster: who allocates, fills or completes the same guest cluster goes one after the
//! other; nobody else waits. A cluster is locked from the look at its entry until the entry is set.

use std::collections::HashSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

const SHARDS: usize = 16;

#[derive(Debug, Default)]
struct Shard {
    held: Mutex<HashSet<u64>>,
    freed: Condvar,
}

impl Shard {
    fn lock(&self) -> MutexGuard<'_, HashSet<u64>> {
        // A set of numbers is whole after any panic.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guest clusters that somebody is allocating. One thread that takes several takes them in
/// ascending order, so that two threads cannot wait for each other.
#[derive(Debug, Default)]
pub struct Busy {
    shards: [Shard; SHARDS],
}

impl Busy {
    fn shard(&self, cluster: u64) -> &Shard {
        &self.shards[cluster as usize % SHARDS]
    }

    /// Waits until nobody allocates `cluster`, then takes it.
    pub fn acquire(&self, cluster: u64) {
        let shard = self.shard(cluster);
        let mut held = shard.lock();
        while !held.insert(cluster) {
            held = shard
                .freed
                .wait(held)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// True while somebody has `cluster`.
    pub fn is_held(&self, cluster: u64) -> bool {
        self.shard(cluster).lock().contains(&cluster)
    }

    /// Gives a cluster back to those who wait for it.
    pub fn release(&self, cluster: u64) {
        let shard = self.shard(cluster);
        shard.lock().remove(&cluster);
        shard.freed.notify_all();
    }
}
