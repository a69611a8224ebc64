//! Sealed layers and chains that are open, so that disks on the same template share one file
//! handle, one set of locks and one merged map. Holds nothing alive: what no disk uses is closed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Chain;
use crate::error::Result;
use crate::format::Delta;
use crate::store::FileId;

/// Which file, and what it is taken for.
type LayerKey = (PathBuf, u64);
type ChainKey = Vec<(FileId, u64)>;

/// A place for one open layer. Whoever opens it holds its lock and nobody else's.
type Slot = Arc<Mutex<Option<Weak<dyn Delta>>>>;

/// The layers and chains that this process has open.
#[derive(Debug, Default)]
pub struct LayerCache {
    layers: Mutex<HashMap<LayerKey, Slot>>,
    chains: Mutex<HashMap<ChainKey, Weak<Chain>>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True for a slot that somebody uses, or is about to.
fn in_use(slot: &Slot) -> bool {
    Arc::strong_count(slot) > 1
        || slot
            .try_lock()
            .is_ok_and(|s| s.as_ref().is_some_and(|l| l.strong_count() > 0))
}

impl LayerCache {
    /// The open layer at `path` (resolved), or the one that `open` makes. `cluster` tells apart two
    /// readings of one raw file.
    pub fn layer(
        &self,
        path: PathBuf,
        cluster: u64,
        open: impl FnOnce() -> Result<Arc<dyn Delta>>,
    ) -> Result<Arc<dyn Delta>> {
        let slot = {
            let mut layers = lock(&self.layers);
            if !layers.contains_key(&(path.clone(), cluster)) {
                layers.retain(|_, slot| in_use(slot));
            }
            layers.entry((path, cluster)).or_default().clone()
        };
        let mut place = lock(&slot);
        if let Some(found) = place.as_ref().and_then(Weak::upgrade) {
            return Ok(found);
        }
        let made = open()?;
        *place = Some(Arc::downgrade(&made));
        Ok(made)
    }

    /// The merged map of `deltas`, shared with whoever has the same files open.
    pub fn chain(&self, deltas: Vec<Arc<dyn Delta>>) -> Result<Arc<Chain>> {
        let shareable = deltas.iter().all(|d| d.shareable());
        let key = key(&deltas);
        self.shared(key, shareable, || Chain::new(deltas))
    }

    /// The merged map of `delta` over `below`, as [`LayerCache::chain`].
    pub fn over(&self, below: &Chain, delta: Arc<dyn Delta>) -> Result<Arc<Chain>> {
        let mut deltas = below.deltas().to_vec();
        deltas.push(delta.clone());
        let shareable = deltas.iter().all(|d| d.shareable());
        self.shared(key(&deltas), shareable, || Chain::over(below, delta))
    }

    fn shared(
        &self,
        key: ChainKey,
        shareable: bool,
        make: impl FnOnce() -> Result<Chain>,
    ) -> Result<Arc<Chain>> {
        if !shareable {
            return Ok(Arc::new(make()?));
        }
        if let Some(found) = lock(&self.chains).get(&key).and_then(Weak::upgrade) {
            return Ok(found);
        }
        let made = Arc::new(make()?);
        let mut chains = lock(&self.chains);
        // Somebody may have been faster.
        if let Some(found) = chains.get(&key).and_then(Weak::upgrade) {
            return Ok(found);
        }
        chains.retain(|_, c| c.strong_count() > 0);
        chains.insert(key, Arc::downgrade(&made));
        Ok(made)
    }
}

fn key(deltas: &[Arc<dyn Delta>]) -> ChainKey {
    let key = |d: &Arc<dyn Delta>| (d.file().id(), d.cluster_bytes());
    deltas.iter().map(key).collect()
}
