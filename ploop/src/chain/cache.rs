//! Sealed layers and chains that are open, so that disks on the same template share one file
//! handle, one set of locks and one merged map. Holds nothing alive: what no disk uses is closed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::Chain;
use crate::error::Result;
use crate::format::Delta;
use crate::store::FileId;

/// Which file, and what it is taken for.
type LayerKey = (PathBuf, u64);
type ChainKey = Vec<(FileId, u64)>;

/// The layers and chains that this process has open.
#[derive(Debug, Default)]
pub struct LayerCache {
    layers: Mutex<HashMap<LayerKey, Weak<dyn Delta>>>,
    chains: Mutex<HashMap<ChainKey, Weak<Chain>>>,
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
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (path, cluster);
        if let Some(found) = layers.get(&key).and_then(Weak::upgrade) {
            return Ok(found);
        }
        layers.retain(|_, l| l.strong_count() > 0);
        let made = open()?;
        layers.insert(key, Arc::downgrade(&made));
        Ok(made)
    }

    /// The merged map of `deltas`, shared with whoever has the same files open.
    pub fn chain(&self, deltas: Vec<Arc<dyn Delta>>) -> Result<Arc<Chain>> {
        let key: ChainKey = deltas
            .iter()
            .map(|d| (d.file().id(), d.cluster_bytes()))
            .collect();
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = chains.get(&key).and_then(Weak::upgrade) {
            return Ok(found);
        }
        chains.retain(|_, c| c.strong_count() > 0);
        let made = Arc::new(Chain::new(deltas)?);
        chains.insert(key, Arc::downgrade(&made));
        Ok(made)
    }
}
