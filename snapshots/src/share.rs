//! Snapshots that other disks stand on: their images become layers of the store, which belong to
//! nobody and stay for as long as a descriptor names them.
//!
//! ```text
//!  containers/A/root.hds.{…} ──hard link──► layers/UUID/image.hds, refs/ID-OF-A
//!       │ A's descriptor names the layer: COMMIT
//!       └─ the old name goes
//! ```
//!
//! Names change, bytes don't: whoever has A open, this process too, goes on with the same files.

use std::path::Path;

use ploop::descriptor::{Descriptor, Guid, Image, Shot, Temporary};
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::delta::read_header;
use ploop::locks::{Use, lock_image};
use ploop::store::Access;
use uuid::Uuid;

use crate::layer::{self, Sealed};
use crate::meta::Meta;
use crate::place::Place;
use crate::remove::remove_layer;
use crate::store::{Root, StoreLock};
use crate::uses::{self, Found};

/// The container's id in its store, which its references on layers bear. The caller holds the
/// disk's lock: a container that has none yet is given one, durable on return.
pub fn id(place: &Place<'_>) -> Result<Uuid> {
    let mut meta = place.meta()?;
    if let Some(id) = uses::id_in(&meta).map_err(|e| e.on(place.dir()))? {
        return Ok(id);
    }
    let root = store_of(place)?;
    let d = place.descriptor()?;
    // A container from before there were ids in the metadata has references under the id that is
    // in its first image's name.
    let names: Vec<Uuid> = uses::ids_in_names(&d).collect();
    let layers = uses::layers_in(&d);
    let referred = |id: &Uuid| {
        let file = id.to_string();
        let mut refs = layers.iter().map(|l| layer::path(root, *l).join("refs"));
        refs.any(|refs| matches!(root.store().kind(&refs.join(&file)), Ok(Some(_))))
    };
    let old = names
        .iter()
        .copied()
        .find(referred)
        .or(names.first().copied());
    let id = old.unwrap_or_else(Uuid::new_v4);
    meta.id = Some(id.to_string());
    place.set_meta(&meta)?;
    Ok(id)
}

/// Moves the images of snapshot `node` into the store's layers, so that other disks can stand on
/// them. Durable on return; does nothing where they are there already. The caller holds the disk's
/// lock, and no lock of the store. A descriptor that the caller has read before is out of date
/// afterwards in the names of those files, and in nothing else.
///
/// 1. the container's id, and in its metadata the names that are to go;
/// 2. in a work directory: each image under a second name, with a reference from the container;
/// 3. move them to `layers/UUID`, durable;
/// 4. COMMIT: one descriptor of the container that names the layers;
/// 5. mode 0400; the old names go.
///
/// Cut before 4: layers that no descriptor names, collected later. Cut after it: old names that are
/// swept when the container is changed next. Errors: `Invalid` for the top, `InUse` while
/// a merge or a foreign program works on the chain, or some of it is still to come; `Corrupt` for an image that is not closed.
pub fn share(place: &Place<'_>, node: Guid) -> Result<()> {
    let lock = store_of(place)?.lock(false)?;
    share_locked(place, node, &lock)
}

/// The same for a caller that holds the store's lock.
pub(crate) fn share_locked(place: &Place<'_>, node: Guid, _lock: &StoreLock) -> Result<()> {
    let root = store_of(place)?;
    let mut d = place.descriptor()?;
    refuse_unfit(place, &d, node)?;
    let chain = d.chain(node)?;
    let own: Vec<Image> = chain
        .into_iter()
        .filter(|i| Place::owns(i))
        .cloned()
        .collect();
    for image in d.chain(node)? {
        refuse_unclosed(root, place, image)?;
    }
    if own.is_empty() {
        return Ok(());
    }
    // 1.
    let owner = id(place)?;
    let mut meta = place.meta()?;
    meta.files.extend(own.iter().map(|i| i.file.clone()));
    meta.charged.extend(own.iter().map(|i| i.guid.to_string()));
    place.set_meta(&meta)?;
    // 2. and 3.
    let mut made = Vec::new();
    let staged = link_all(root, place, &own, owner, &mut made).and_then(|()| {
        for (image, id) in own.iter().zip(&made) {
            for named in d.images.iter_mut().filter(|i| i.guid == image.guid) {
                named.file = layer::named(*id);
            }
        }
        place.stage(&d)
    });
    if let Err(e) = staged {
        for id in made {
            if let Err(left) = remove_layer(root, id) {
                tracing::warn!(error = %left, "a layer that nothing uses stays until collected");
            }
        }
        return Err(e);
    }
    // 4. COMMIT
    place.commit()?;
    // 5.
    seal_and_forget(root, place, &own, &made, meta)
}

/// Steps 2 and 3; pushes to `made` what is in the store.
fn link_all(
    root: &Root,
    place: &Place<'_>,
    own: &[Image],
    owner: Uuid,
    made: &mut Vec<Uuid>,
) -> Result<()> {
    let work = root.work()?;
    for (n, image) in own.iter().enumerate() {
        let dir = work.path().join(n.to_string());
        layer::make_rooms(root, &dir)?;
        let from = place.dir().join(&image.file);
        root.store().hard_link(&from, &dir.join(layer::IMAGE))?;
        let id = Uuid::new_v4();
        layer::publish(root, &dir, id, owner)?;
        made.push(id);
    }
    Ok(())
}

fn seal_and_forget(
    root: &Root,
    place: &Place<'_>,
    own: &[Image],
    made: &[Uuid],
    mut meta: Meta,
) -> Result<()> {
    for id in made {
        let image = layer::path(root, *id).join(layer::IMAGE);
        root.store().open(&image, Access::Read)?.set_mode(0o400)?;
    }
    for image in own {
        place.forget_file(&image.file)?;
    }
    root.store().sync_dir(place.dir())?;
    for image in own {
        meta.files.remove(&image.file);
    }
    place.set_meta(&meta)
}

fn store_of<'a>(place: &Place<'a>) -> Result<&'a Root> {
    place.root().ok_or_else(|| {
        Error::unsupported("only snapshots of a container of a store can be shared")
            .on(place.dir())
            .fix("Import the disk as a template: ploop template import NAME DISK")
    })
}

fn refuse_unfit(place: &Place<'_>, d: &Descriptor, node: Guid) -> Result<()> {
    if node == d.top {
        let what = format!(
            "the top of {} is written to: only a snapshot can be shared",
            place.shown()
        );
        return Err(Error::invalid(what)
            .on(place.dir())
            .fix("Make a snapshot first (`ploop snapshot create`)"));
    }
    if d.base_is_raw() {
        return Err(
            Error::unsupported("the disk's base is a raw image, which is no layer")
                .on(place.dir())
                .fix("Convert it: ploop convert SOURCE TARGET --to ploop"),
        );
    }
    if d.outer_parent(node)?.is_some() {
        return Err(
            Error::unsupported("the disk continues another disk's directory")
                .on(place.dir())
                .fix("Import it as a template: ploop template import NAME DISK"),
        );
    }
    for (n, image) in d.chain(node)?.into_iter().enumerate() {
        let marked = |s: &Shot| s.temporary != Temporary::No;
        if d.shot(image.guid).is_some_and(marked) && may_be_rewritten(place, d, node, n)? {
            let what = format!(
                "snapshot {} of {} is being merged",
                image.guid,
                place.shown()
            );
            return Err(Error::new(Kind::InUse, what)
                .on(place.dir())
                .fix("Wait for the merge, or finish it, and try again"));
        }
    }
    Ok(())
}

/// Whether a merge of the `n`th image of the chain with the next one may be at work: it rewrites one
/// of the two, which it can only where no other disk stands on that.
fn may_be_rewritten(place: &Place<'_>, d: &Descriptor, node: Guid, n: usize) -> Result<bool> {
    let root = store_of(place)?;
    for image in d.chain(node)?.into_iter().skip(n).take(2) {
        let used = match layer::of(root, &place.file_of(image)?) {
            Some(id) => used_besides(root, id, &|found| found.dir == place.dir())?,
            None => false,
        };
        if !used {
            return Ok(true);
        }
    }
    Ok(false)
}

/// An image of the chain must be the disk's own or a layer, and closed.
fn refuse_unclosed(root: &Root, place: &Place<'_>, image: &Image) -> Result<()> {
    let path = place.file_of(image)?;
    if layer::of(root, &path).is_none() && path != place.dir().join(&image.file) {
        let what = "an image of the snapshot is neither a file in the disk's directory nor a layer";
        return Err(Error::unsupported(what).on(path));
    }
    place.opener().refuse_arriving(&path)?;
    let file = root.store().open(&path, Access::Read)?;
    lock_image(file.as_ref(), Use::Read)?;
    let (header, _) = read_header(file.as_ref())?;
    if header.dirty() {
        let what = "the image was not closed cleanly, so what it holds is not final";
        return Err(Error::new(Kind::Corrupt, what).on(path).fix(
            "Look at it with `ploop check`; a snapshot that is being made is closed shortly",
        ));
    }
    Ok(())
}

/// The chain of snapshot `text` of container `container`, shared. Takes the container's lock only
/// where its images are not layers yet.
pub(crate) fn snapshot(
    root: &Root,
    container: &str,
    text: &str,
    lock: &StoreLock,
) -> Result<Sealed> {
    let place = Place::container(root, container)?;
    let look = || -> Result<(Descriptor, Guid)> {
        let d = place.descriptor()?;
        let node = place.find(&d, &place.meta()?, text)?;
        refuse_unfit(&place, &d, node)?;
        for image in d.chain(node)? {
            refuse_unclosed(root, &place, image)?;
        }
        Ok((d, node))
    };
    let (mut d, mut node) = look()?;
    if d.chain(node)?.into_iter().any(Place::owns) {
        let _held = place.lock()?;
        place.sweep()?;
        (_, node) = look()?;
        share_locked(&place, node, lock)?;
        d = place.descriptor()?;
    }
    let shown = format!("{container}@{text}");
    Sealed::read(root, place.dir(), &d, node, shown, place.source(Some(node)))
}

/// True when only the container with the id `by` stands on the image file `image` (resolved): it
/// may then be rewritten or dropped. True for files that are no layers of the store.
///
/// The caller holds the store's lock alone, and keeps it until a descriptor is in force that marks
/// what it does (or no longer names the layer): a clone that comes later refuses that mark.
pub fn exclusive(root: &Root, image: &Path, by: Uuid) -> Result<bool> {
    let Some(id) = layer::of(root, image) else {
        return Ok(true);
    };
    let is_own = |found: &Found| found.uses.as_ref().is_ok_and(|u| u.ids.contains(&by));
    if used_besides(root, id, &is_own)? {
        return Ok(false);
    }
    // Cached layers that stand on it, which no disk needs to name.
    let own = by.to_string();
    let names = layer::reference_names(root, id)?;
    Ok(names
        .iter()
        .all(|n| n.to_str() == Some(&own) || !stands(root, n)))
}

/// Whether the descriptor of another disk than the own one names `layer`.
fn used_besides(root: &Root, layer: Uuid, is_own: &dyn Fn(&Found) -> bool) -> Result<bool> {
    for found in uses::scan(root)? {
        let is_own = is_own(&found);
        if found.uses?.layers.contains(&layer) && !is_own {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a reference belongs to a layer that is there.
fn stands(root: &Root, reference: &Path) -> bool {
    let id = reference.to_str().and_then(|n| Uuid::parse_str(n).ok());
    // What cannot be known counts.
    id.is_none_or(|id| !matches!(root.store().kind(&layer::path(root, id)), Ok(None)))
}

/// Gives up the references of the container with the id `by` on layers that its descriptor no
/// longer names, and removes those that then nobody stands on. Image files (resolved) that are no
/// layers are left alone. A reference that a power cut brings back is collected later. Waits for the
/// store's lock, which the caller must not hold. Returns whether each of `images` was removed.
pub fn release(root: &Root, images: &[impl AsRef<Path>], by: Uuid) -> Result<Vec<bool>> {
    let _alone = root.lock(true)?;
    let mut named = std::collections::HashSet::new();
    let mut mine = std::collections::HashSet::new();
    for found in uses::scan(root)? {
        let uses = found.uses?;
        if uses.ids.contains(&by) {
            mine.extend(uses.layers.iter().copied());
        }
        named.extend(uses.layers);
    }
    let mut removed = Vec::new();
    for image in images {
        let id = layer::of(root, image.as_ref());
        let Some(id) = id.filter(|id| !mine.contains(id)) else {
            removed.push(false);
            continue;
        };
        layer::release(root, id, by)?;
        let there = root.store().kind(&layer::path(root, id))?.is_some();
        let free = there && !named.contains(&id) && layer::references(root, id)? == 0;
        if free {
            remove_layer(root, id)?;
        }
        removed.push(free);
    }
    Ok(removed)
}
