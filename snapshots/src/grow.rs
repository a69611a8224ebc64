//! A clone that is larger than its template: the partition and the filesystem are grown before the
//! container exists, so nothing waits for an attach.
//!
//! Once per template and size: the grown state becomes a sealed layer of its own, with only the
//! clusters that growing changed, and every container of that size stands on it. It is a cache: an
//! unreferenced one is collected like any layer, and made again when needed.

use ploop::device::Device;
use ploop::error::{Kind, Result};
use ploop::format::ploop::Header;
use ploop::store::SECTOR;
use uuid::Uuid;

use crate::layer::{self, IMAGE, NewLayer, Sealed, SealedLayer};
use crate::store::{Root, Work, read_small, write_new};
use crate::template::data_of;
use crate::{convert, resize, rootfs};

/// What growing cost.
#[derive(Clone, Debug)]
pub struct Grown {
    /// Bytes of data in the layer that growing made.
    pub data: u64,
    /// True when an earlier container of that size had made it.
    pub cached: bool,
}

/// Puts the layer that grows `disk` to `size` bytes on its chain; `None` when there is nothing in
/// the disk that we can grow (no ext4 in the first partition, or on the whole disk).
pub(crate) fn layer_for(
    root: &Root,
    disk: &mut Sealed,
    size: u64,
    owner: Uuid,
    progress: &dyn Fn(u64, u64),
) -> Result<Option<Grown>> {
    let Some(top) = disk.layers.last().cloned() else {
        return Ok(None);
    };
    let record = layer::path(root, top.id)
        .join("grown")
        .join(size.to_string());
    if let Some(found) = cached(root, &record)? {
        let image = layer::path(root, found).join(IMAGE);
        let data = data_of(root, &image)?;
        disk.layers.push(grown_layer(root, found));
        return Ok(Some(Grown { data, cached: true }));
    }
    let work = root.work()?;
    let Some(id) = make(root, disk, size, owner, &work, progress)? else {
        return Ok(None);
    };
    // A record that another process wrote meanwhile names a layer as good as this one.
    match write_new(root.store(), &record, id.to_string().as_bytes()) {
        Err(e) if e.kind() != Kind::Exists => return Err(e),
        _ => {}
    }
    let data = data_of(root, &layer::path(root, id).join(IMAGE))?;
    disk.layers.push(grown_layer(root, id));
    Ok(Some(Grown {
        data,
        cached: false,
    }))
}

fn grown_layer(root: &Root, id: Uuid) -> SealedLayer {
    let image = layer::path(root, id).join(IMAGE);
    // The node's name in every clone's tree is the layer's own id.
    SealedLayer {
        id,
        guid: ploop::descriptor::Guid::from_bytes(id.into_bytes()),
        image,
        limit: None,
    }
}

fn cached(root: &Root, record: &std::path::Path) -> Result<Option<Uuid>> {
    if root.store().kind(record)?.is_none() {
        return Ok(None);
    }
    let text = read_small(root.store(), record, 100)?;
    let id = std::str::from_utf8(&text)
        .ok()
        .and_then(|t| Uuid::parse_str(t.trim()).ok());
    // Half a record after a crash, or a layer that was collected: as if there were none.
    match id {
        Some(id)
            if root
                .store()
                .kind(&layer::path(root, id).join(IMAGE))?
                .is_some() =>
        {
            Ok(Some(id))
        }
        _ => {
            match root.store().remove_file(record) {
                // Another process saw the same and was faster.
                Err(e) if e.kind() != Kind::NotFound => Err(e),
                _ => Ok(None),
            }
        }
    }
}

fn make(
    root: &Root,
    disk: &Sealed,
    size: u64,
    owner: Uuid,
    work: &Work<'_>,
    progress: &dyn Fn(u64, u64),
) -> Result<Option<Uuid>> {
    let store = root.store();
    let before = root
        .opener()
        .open(&disk.source, &root.open_options(false))?;
    let flat = work.path().join("grown.raw");
    let file = store.create(&flat, 0o600)?;
    file.set_len(before.size())?;
    convert::copy_to_file(&before, file.as_ref(), progress)?;
    file.sync()?;
    let grown = rootfs::grow(&flat, size)?;
    if !grown.filesystem {
        let reason = grown.reason.unwrap_or_default();
        tracing::warn!(
            source = disk.shown,
            reason,
            "only the disk is larger, not what is on it"
        );
        return Ok(None);
    }
    let below = before.below();
    // Of a disk that was shrunk the images are larger than what it shows.
    let sectors = size.max(disk.size) / SECTOR;
    let header = Header::new(disk.version, disk.cluster_sectors, sectors)?;
    let new = NewLayer::with_header(root, work, &header, below)?;
    resize::copy_changes(file.as_ref(), &before, &new.disk, size)?;
    // The container to come refers to it; it refers to the layers that it stands on.
    let id = new.seal(root, owner)?;
    for l in &disk.layers {
        layer::refer(root, l.id, id)?;
        layer::sync_references(root, l.id)?;
    }
    Ok(Some(id))
}
