//! Sealed layers: image files that any number of disks stand on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::disk::Disk;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create};
use ploop::store::SECTOR;
use uuid::Uuid;

use crate::store::{Root, Work, move_dir};

/// The image's name in its layer directory.
pub(crate) const IMAGE: &str = "image.hds";

/// A layer in the making: a writable disk over `below`, in the work directory.
pub(crate) struct NewLayer {
    id: Uuid,
    dir: PathBuf,
    /// What to fill.
    pub(crate) disk: Disk,
}

impl NewLayer {
    /// An empty image of `size` bytes (a multiple of the cluster) in `work`.
    pub(crate) fn create(
        root: &Root,
        work: &Work<'_>,
        cluster_sectors: u32,
        size: u64,
        below: Option<Arc<Chain>>,
    ) -> Result<NewLayer> {
        let store = root.store();
        let dir = work.path().join("layer");
        store.create_dir(&dir)?;
        store.create_dir(&dir.join("refs"))?;
        store.create_dir(&dir.join("grown"))?;
        let header = Header::new(Version::V2, cluster_sectors, size / SECTOR)?;
        // Sealed from birth: only this open file can write it.
        let file = create(store, &dir.join(IMAGE), &header, 0o400)?;
        let disk = Disk::writable(below, Top::open(file)?, None)?;
        Ok(NewLayer {
            id: Uuid::new_v4(),
            dir,
            disk,
        })
    }

    /// Closes the image and moves the layer into the store with a reference from `owner`; both are
    /// durable on return. Until something durable names it, it is garbage for [`collect`].
    pub(crate) fn seal(self, root: &Root, owner: Uuid) -> Result<Uuid> {
        let store = root.store();
        self.disk.close()?;
        drop(self.disk);
        // The name is all there is to a reference.
        drop(store.create(&self.dir.join("refs").join(owner.to_string()), 0o600)?);
        store.sync_dir(&self.dir.join("refs"))?;
        store.sync_dir(&self.dir)?;
        move_dir(store, &self.dir, &path(root, self.id))?;
        Ok(self.id)
    }
}

/// The directory of a layer.
pub(crate) fn path(root: &Root, id: Uuid) -> PathBuf {
    root.layers().join(id.to_string())
}

/// The layer that an image file of this store is in.
pub(crate) fn id_of(root: &Root, image: &Path) -> Result<Uuid> {
    let dir = image
        .parent()
        .filter(|d| d.parent() == Some(&root.layers()));
    let name = dir.and_then(|d| d.file_name()?.to_str());
    name.and_then(|n| Uuid::parse_str(n).ok()).ok_or_else(|| {
        Error::new(
            Kind::Corrupt,
            "a template's image is not in the store's layers",
        )
        .on(image)
    })
}

/// Adds a reference; one that is there already is fine. Not durable before [`sync_references`].
pub(crate) fn refer(root: &Root, layer: Uuid, owner: Uuid) -> Result<()> {
    let file = path(root, layer).join("refs").join(owner.to_string());
    match root.store().create(&file, 0o600) {
        Err(e) if e.kind() != Kind::Exists => Err(e),
        _ => Ok(()),
    }
}

/// Makes the references to a layer durable.
pub(crate) fn sync_references(root: &Root, layer: Uuid) -> Result<()> {
    root.store().sync_dir(&path(root, layer).join("refs"))
}

/// Drops a reference; one that is not there is fine.
pub(crate) fn release(root: &Root, layer: Uuid, owner: Uuid) -> Result<()> {
    let file = path(root, layer).join("refs").join(owner.to_string());
    match root.store().remove_file(&file) {
        Err(e) if e.kind() != Kind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The names of the references to `layer`. None where a crash left half of a layer that was being
/// removed.
pub(crate) fn reference_names(root: &Root, layer: Uuid) -> Result<Vec<PathBuf>> {
    match root.store().list(&path(root, layer).join("refs")) {
        Err(e) if e.kind() == Kind::NotFound => Ok(Vec::new()),
        names => names,
    }
}

/// How many disks and layers stand on `layer`.
pub(crate) fn references(root: &Root, layer: Uuid) -> Result<usize> {
    Ok(reference_names(root, layer)?.len())
}
