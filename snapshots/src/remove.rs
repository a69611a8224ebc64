//! `ploop rm`, `ploop template rm`, and collecting what nobody refers to.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::locks::{Use, lock_image};
use ploop::store::{Access, EntryKind, StoreFile};
use uuid::Uuid;

use crate::store::{Root, move_dir, remove_tree};
use crate::{layer, list, name, template};

/// Removes a container and its data.
///
/// 1. take its lock (`InUse` while it is served);
/// 2. COMMIT: rename its directory into `tmp`, durable;
/// 3. remove its files, then its references, then layers that nobody refers to any more.
///
/// Cut after 2: the container is gone; its files and references are collected later. None of it
/// takes room: a full host is what removing is for.
pub fn remove_container(root: &Root, name: &str) -> Result<()> {
    name::check(name)?;
    let dir = root.container(name);
    if root.store().kind(&dir)?.is_none() {
        let what = format!("there is no container {name}");
        return Err(Error::new(Kind::NotFound, what)
            .on(dir)
            .fix("`ploop list` shows what there is"));
    }
    let _alone = root.lock(true)?;
    let _held = root.lock_disk(&dir)?;
    let _free = lock_images(root, &dir)?;
    remove_disk(root, &dir)
}

/// Locks the container's own images against whoever has one open by its file. A container whose
/// descriptor cannot be read has none that we know, and can be removed all the same.
fn lock_images(root: &Root, dir: &Path) -> Result<Vec<Arc<dyn StoreFile>>> {
    let Ok(d) = root.opener().read_descriptor(&dir.join(DESCRIPTOR)) else {
        return Ok(Vec::new());
    };
    let mut locked = Vec::new();
    for image in d.images.iter().filter(|i| !i.file.contains('/')) {
        match root.store().open(&dir.join(&image.file), Access::Write) {
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e),
            Ok(file) => {
                lock_image(file.as_ref(), Use::Write)?;
                locked.push(file);
            }
        }
    }
    Ok(locked)
}

/// Removes a template. Containers that were cloned from it keep its layer; the layer itself goes
/// with the last of them.
pub fn remove_template(root: &Root, name: &str) -> Result<()> {
    let _alone = root.lock(true)?;
    let disk = template::open(root, name)?;
    let mut used = 0;
    for c in list::containers(root)? {
        if let Some(why) = c.error {
            let what = format!("container {} may be cloned from it: {why}", c.name);
            return Err(Error::new(Kind::InUse, what).on(root.template(name)));
        }
        used += usize::from(c.template.as_deref() == Some(name));
    }
    if used > 0 {
        let what = format!("{used} containers are cloned from template {name}");
        return Err(Error::new(Kind::InUse, what)
            .on(root.template(name))
            .fix("Remove them first (`ploop list` names them)"));
    }
    remove_disk(root, &root.template(&disk.name))
}

fn remove_disk(root: &Root, dir: &Path) -> Result<()> {
    // 2. COMMIT
    let away = root.dir().join("tmp").join(Uuid::new_v4().to_string());
    move_dir(root.store(), dir, &away)?;
    // 3. Nobody works in there, so the files are collected like those of interrupted work.
    collect(root)
}

/// Removes references that no disk needs, layers that have none, and leftovers of interrupted
/// work. The caller holds the store's lock alone.
pub(crate) fn collect(root: &Root) -> Result<()> {
    root.collect_tmp()?;
    let store = root.store();
    let needed = match needed(root) {
        Ok(needed) => needed,
        Err(e) => {
            // What a damaged disk needs cannot be known, so nothing is taken away.
            tracing::warn!(error = %e, "layers that nobody needs stay until this is mended");
            return Ok(());
        }
    };
    loop {
        let mut removed = false;
        for id in layer_ids(root)? {
            for reference in layer::reference_names(root, id)? {
                let owner = reference.to_str().and_then(|n| Uuid::parse_str(n).ok());
                let keep = match owner {
                    // A layer that stands on this one, or a disk that needs it.
                    Some(owner) => {
                        needed.owners.contains(&owner)
                            || store.kind(&layer::path(root, owner))?.is_some() && owner != id
                    }
                    None => true,
                };
                if !keep && let Some(owner) = owner {
                    layer::release(root, id, owner)?;
                }
            }
            if layer::references(root, id)? == 0 && !needed.layers.contains(&id) {
                remove_layer(root, id)?;
                removed = true;
            }
        }
        if !removed {
            return Ok(());
        }
    }
}

/// What the disks of a store need.
#[derive(Default)]
struct Needed {
    /// Owners of references: the id of each template and of each container.
    owners: HashSet<Uuid>,
    /// Layers that a descriptor names, whatever the references say.
    layers: HashSet<Uuid>,
}

/// Reads every descriptor, also of directories whose names are none of ours.
fn needed(root: &Root) -> Result<Needed> {
    let mut needed = Needed::default();
    for room in ["templates", "containers"] {
        let room = root.dir().join(room);
        for name in root.store().list(&room)? {
            let dir = room.join(name);
            if root.store().kind(&dir)? != Some(EntryKind::Dir) {
                continue;
            }
            let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
            for image in &d.images {
                // A container's id is in the name of its own image, a template's is its GUID.
                needed
                    .owners
                    .insert(Uuid::from_bytes(*image.guid.as_bytes()));
                let ending = image.file.rsplit_once(".{");
                let ending = ending.map(|(_, id)| id.trim_end_matches('}'));
                needed
                    .owners
                    .extend(ending.and_then(|id| Uuid::parse_str(id).ok()));
                let parts = image.file.split('/');
                needed
                    .layers
                    .extend(parts.filter_map(|part| Uuid::parse_str(part).ok()));
            }
        }
    }
    Ok(needed)
}

fn layer_ids(root: &Root) -> Result<Vec<Uuid>> {
    let names = root.store().list(&root.layers())?;
    Ok(names
        .iter()
        .filter_map(|n| Uuid::parse_str(n.to_str()?).ok())
        .collect())
}

/// Removes a layer and its references to others. It goes in one step; files and references that a
/// crash leaves are collected later.
pub(crate) fn remove_layer(root: &Root, id: Uuid) -> Result<()> {
    let away = root.dir().join("tmp").join(Uuid::new_v4().to_string());
    move_dir(root.store(), &layer::path(root, id), &away)?;
    for other in layer_ids(root)? {
        layer::release(root, other, id)?;
    }
    remove_tree(root.store(), &away)
}
