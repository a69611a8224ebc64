//! Files of a disk, opened once each and kept locked.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::Result;
use ploop::locks::{Use, lock_image};
use ploop::store::arriving::Missing;
use ploop::store::{Access, Store, StoreFile};

/// See the module text.
#[derive(Debug)]
pub(super) struct Files<'a> {
    store: &'a Arc<dyn Store>,
    /// Files that are to be written.
    written: BTreeSet<PathBuf>,
    held: BTreeMap<PathBuf, Arc<dyn StoreFile>>,
}

impl<'a> Files<'a> {
    /// All for reading.
    pub(super) fn new(store: &'a Arc<dyn Store>) -> Files<'a> {
        Files::writing(store, BTreeSet::new())
    }

    /// Those named for writing, by us alone.
    pub(super) fn writing(store: &'a Arc<dyn Store>, written: BTreeSet<PathBuf>) -> Files<'a> {
        Files {
            store,
            written,
            held: BTreeMap::new(),
        }
    }

    /// An image, locked until this is dropped. Errors: `InUse`; those of opening.
    pub(super) fn image(&mut self, path: &Path) -> Result<Arc<dyn StoreFile>> {
        if let Some(file) = self.held.get(path) {
            return Ok(file.clone());
        }
        // Its mark says that some of it is still to come: nothing here may clear that.
        Missing::refuse(self.store.as_ref(), path)?;
        let (access, use_for) = match self.written.contains(path) {
            true => (Access::Write, Use::Write),
            false => (Access::Read, Use::Read),
        };
        let file = self.store.open(path, access)?;
        lock_image(file.as_ref(), use_for)?;
        self.held.insert(path.to_path_buf(), file.clone());
        Ok(file)
    }
}
