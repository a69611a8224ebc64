//! `ploop rm`, `ploop template rm`, and collecting what nobody refers to.

use std::collections::HashSet;
use std::path::Path;

use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
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
    remove_disk(root, &dir)
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
                        needed.contains(&owner)
                            || store.kind(&layer::path(root, owner))?.is_some() && owner != id
                    }
                    None => true,
                };
                if !keep && let Some(owner) = owner {
                    layer::release(root, id, owner)?;
                }
            }
            if layer::references(root, id)? == 0 {
                remove_layer(root, id)?;
                removed = true;
            }
        }
        if !removed {
            return Ok(());
        }
    }
}

/// The owners of references that disks need: the id of each template and of each container.
fn needed(root: &Root) -> Result<HashSet<Uuid>> {
    let mut owners = HashSet::new();
    for room in ["templates", "containers"] {
        for name in root.names(room)? {
            let dir = root.dir().join(room).join(name);
            let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
            for image in &d.images {
                // A container's id is in the name of its own image, a template's is its GUID.
                owners.insert(Uuid::from_bytes(*image.guid.as_bytes()));
                let ending = image
                    .file
                    .rsplit_once(".{")
                    .map(|(_, id)| id.trim_end_matches('}'));
                owners.extend(ending.and_then(|id| Uuid::parse_str(id).ok()));
            }
        }
    }
    Ok(owners)
}

fn layer_ids(root: &Root) -> Result<Vec<Uuid>> {
    let names = root.store().list(&root.layers())?;
    Ok(names
        .iter()
        .filter_map(|n| Uuid::parse_str(n.to_str()?).ok())
        .collect())
}

/// Removes a layer and its references to others.
pub(crate) fn remove_layer(root: &Root, id: Uuid) -> Result<()> {
    for other in layer_ids(root)? {
        if other != id {
            layer::release(root, other, id)?;
        }
    }
    remove_tree(root.store(), &layer::path(root, id))
}
