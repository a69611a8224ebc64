//! `ploop template flatten`: a template of several layers becomes one of a single layer with the
//! same content. Disks that stand on the old layers keep them.

use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::Header;
use ploop::store::SECTOR;

use crate::convert::{Progress, pieces};
use crate::hash::Hasher;
use crate::layer::{self, IMAGE, NewLayer, Sealed, SealedLayer};
use crate::place::Place;
use crate::store::Root;
use crate::{remove, template, uses};

/// What flattening did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flattened {
    /// Layers that the template had.
    pub layers: usize,
    /// Bytes that were copied; 0 when there was one layer only.
    pub copied: u64,
}

/// Flattens template `name`. Durable on return. Blocks while it copies all data of the template;
/// `cancelled` is asked between pieces of 64 KiB.
///
/// 1. take the template's lock; give it an id if it has none;
/// 2. in a work directory: copy its content into a new layer, close, sync;
/// 3. move the layer to `layers/UUID` with the template's reference; record the hash; stage the
///    descriptor that names the one layer;
/// 4. COMMIT: that descriptor replaces the template's;
/// 5. collect the old layers that nobody stands on.
///
/// Cut before 4, failed or cancelled (`None`): the template is as it was. Errors: `NotFound`, `InUse`
/// (it is being flattened), `Corrupt` (it reads other bytes than were recorded when it was made).
pub fn flatten(
    root: &Root,
    name: &str,
    progress: Progress<'_>,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Flattened>> {
    // 1.
    let _busy = root.lock_disk(template::checked(root, name)?.as_path())?;
    let (sealed, disk) = {
        let _shared = root.lock(false)?;
        let sealed = template::open(root, name)?;
        let disk = root
            .opener()
            .open(&sealed.source, &root.open_options(false))?;
        (sealed, disk)
    };
    let layers = sealed.layers.len();
    if layers == 1 {
        return Ok(Some(Flattened { layers, copied: 0 }));
    }
    let place = Place::disk(
        root.opener(),
        &sealed.source,
        &[root.layers()],
        root.has_locks(),
    )?;
    place.sweep()?;
    // 2.
    let work = root.work()?;
    // Of one that was shrunk, the one layer needs no more than it shows.
    let header = Header::new(sealed.version, sealed.cluster_sectors, disk.size() / SECTOR)?;
    let new = NewLayer::with_header(root, &work, &header, None)?;
    let (mut copied, mut hasher) = (0, Hasher::new(disk.size()));
    let mut stopped = false;
    let done = pieces(&disk, progress, &mut |offset, bytes| {
        if cancelled() {
            stopped = true;
            return Err(Error::invalid("cancelled"));
        }
        hasher.add(offset, bytes);
        copied += bytes.len() as u64;
        new.disk.write(offset, bytes)
    });
    if stopped {
        return Ok(None);
    }
    done?;
    drop(disk);
    {
        // Until the descriptor names the new layer nobody may collect.
        let _shared = root.lock(false)?;
        replace(root, &place, &sealed, new, hasher.text())?;
    }
    drop(work);
    // 5.
    let _alone = root.lock(true)?;
    remove::collect(root)?;
    Ok(Some(Flattened { layers, copied }))
}

/// Steps 3 and 4.
fn replace(
    root: &Root,
    place: &Place<'_>,
    sealed: &Sealed,
    new: NewLayer,
    content: String,
) -> Result<()> {
    let mut meta = place.meta()?;
    let recorded = meta.template.as_ref().and_then(|t| t.content.as_ref());
    if recorded.is_some_and(|r| *r != content) {
        let what = format!("{} reads other bytes than were recorded", sealed.shown);
        return Err(Error::new(Kind::Corrupt, what)
            .on(place.dir())
            .fix("`ploop template verify` compares; import the template anew"));
    }
    let owner = match uses::id_in(&meta)? {
        Some(id) => id,
        None => template::old_id(&place.descriptor()?),
    };
    meta.id = Some(owner.to_string());
    if let Some(template) = &mut meta.template {
        template.content = Some(content);
    }
    let id = new.seal(root, owner)?;
    let flat = Sealed {
        layers: vec![SealedLayer {
            id,
            guid: Guid::new_v4(),
            image: layer::path(root, id).join(IMAGE),
            limit: None,
        }],
        size: sealed.shows(),
        ..sealed.clone()
    };
    let staged = place
        .set_meta(&meta)
        .and_then(|()| template::describe(&flat))
        .and_then(|d| place.stage(&d));
    if let Err(e) = staged {
        if let Err(left) = remove::remove_layer(root, id) {
            tracing::warn!(error = %left, "a layer that nothing uses stays until collected");
        }
        return Err(e);
    }
    // 4. COMMIT
    place.commit()
}
