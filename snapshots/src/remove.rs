//! `ploop rm`, `ploop template rm`, and collecting what nobody refers to.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::locks::{Use, lock_image};
use ploop::owner::{self, State};
use ploop::store::{Access, StoreFile};
use uuid::Uuid;

use crate::store::{Root, move_dir, remove_tree, sync_moves};
use crate::{layer, template, uses};

/// Removes a container and its data: [`remove_containers`] for one.
pub fn remove_container(root: &Root, name: &str) -> Result<()> {
    remove_containers(root, &[name.to_owned()])
}

/// Removes containers and their data. Durable on return.
///
/// 1. take each one's lock (`InUse` while it is served);
/// 2. COMMIT, for each: rename its directory into `tmp`. Then one sync for all;
/// 3. remove their files, then their references, then layers that nobody refers to any more.
///
/// Cut after 2: the container is gone; its files and references are collected later. None of it
/// takes room: a full host is what removing is for. One that cannot be removed keeps the others
/// from nothing; the first such error is returned at the end.
pub fn remove_containers(root: &Root, names: &[String]) -> Result<()> {
    // Before we look: who waits here with us may want to remove the same one.
    let _alone = root.lock(true)?;
    let (mut moved, mut failed) = (false, None);
    for name in names {
        match put_away(root, name) {
            Ok(()) => moved = true,
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    if moved {
        gone(root)?;
    }
    failed.map_or(Ok(()), Err)
}

/// The same for one whose owner is another service, or nobody yet, if `checked` still has nothing against
/// it when nobody else can change it any more.
pub(crate) fn remove_moved(
    root: &Root,
    name: &str,
    checked: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let _alone = root.lock(true)?;
    let dir = root.existing_container(name)?;
    let _held = root.lock_moving(&dir)?;
    let _free = lock_images(root, &dir)?;
    checked()?;
    // COMMIT
    root.store().rename_new(&dir, &away(root))?;
    gone(root)
}

/// Behind the renames: syncs them, and step 3.
fn gone(root: &Root) -> Result<()> {
    let [from, to] = ["containers", "tmp"].map(|room| root.dir().join(room));
    sync_moves(root.store(), &from, &to)?;
    // 3. Nobody works in there, so the files are collected like those of interrupted work.
    collect(root)
}

/// Steps 1 and 2 for one container; its name is not durably gone on return.
fn put_away(root: &Root, name: &str) -> Result<()> {
    let dir = root.existing_container(name)?;
    let _held = root.lock_disk(&dir)?;
    refuse_offered(root, name, &dir)?;
    let _free = lock_images(root, &dir)?;
    // COMMIT
    root.store().rename_new(&dir, &away(root))
}

/// One whose move was cut is told of first: the other side may be ready to have it.
fn refuse_offered(root: &Root, name: &str, dir: &Path) -> Result<()> {
    let record = owner::read(root.store(), dir)?;
    let Some(record) = record.filter(|r| r.state == State::Offered) else {
        return Ok(());
    };
    let what = format!(
        "{} does not know yet that {name} stays here (move {})",
        owner::shown(&record.peer),
        record.id
    );
    Err(Error::new(Kind::InUse, what).on(dir).fix(format!(
        "It is told as soon as it is there; if it is gone for good: ploop migrate {name} --resolve \
         take"
    )))
}

/// A free name in `tmp`.
fn away(root: &Root) -> PathBuf {
    root.dir().join("tmp").join(Uuid::new_v4().to_string())
}

/// Locks the container's own images against whoever has one open by its file. A container whose
/// descriptor cannot be read has none that we know, and can be removed all the same.
fn lock_images(root: &Root, dir: &Path) -> Result<Vec<Arc<dyn StoreFile>>> {
    let Ok(d) = root.opener().read_descriptor(&dir.join(DESCRIPTOR)) else {
        return Ok(Vec::new());
    };
    let mut locked = Vec::new();
    for image in d.images.iter().filter(|i| !i.file.contains('/')) {
        // For its locks only: one that is still arriving may go, too.
        match root.store().open(&dir.join(&image.file), Access::Read) {
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

/// Removes a template that no container is cloned from. A layer goes with the last disk that stands
/// on it, the template or another. Errors: `NotFound`; `InUse`, with how many use it.
///
/// 1. COMMIT: rename its directory into `tmp`, durable;
/// 2. remove its files, its references, and layers that nobody refers to any more.
pub fn remove_template(root: &Root, name: &str) -> Result<()> {
    let _alone = root.lock(true)?;
    let dir = template::checked(root, name)?;
    let disk = template::open(root, name)?;
    let own = uses::of(root, &dir, true)?;
    let mut used = 0;
    for found in uses::scan(root)?.iter().filter(|f| !f.is_template) {
        match &found.uses {
            Ok(uses) => used += usize::from(uses.is_clone_of(disk.top()?.id, &own)),
            Err(why) => {
                let what = format!("container {} may be cloned from it: {why}", found.name());
                return Err(Error::new(Kind::InUse, what).on(dir));
            }
        }
    }
    if used > 0 {
        let what = format!("{used} containers are cloned from template {name}");
        return Err(Error::new(Kind::InUse, what)
            .on(dir)
            .fix("Remove them first (`ploop list` names them)"));
    }
    // Who flattens it works on it.
    let _held = root.lock_disk(&dir)?;
    move_dir(root.store(), &dir, &away(root))?;
    collect(root)
}

/// Removes what interrupted operations left in a store: to be called now and then, and at a daemon's
/// start. Waits for the store's lock.
pub fn sweep(root: &Root) -> Result<()> {
    let _alone = root.lock(true)?;
    collect(root)
}

/// Removes references that no disk needs, layers that have none, and leftovers of interrupted
/// work. The caller holds the store's lock alone, so no disk is between its references and its
/// descriptor.
pub(crate) fn collect(root: &Root) -> Result<()> {
    root.collect_tmp()?;
    let store = root.store();
    let mut needed: HashMap<Uuid, HashSet<Uuid>> = HashMap::new();
    for found in uses::scan(root)? {
        match found.uses {
            Ok(uses) => {
                for layer in uses.layers {
                    needed.entry(layer).or_default().extend(&uses.ids);
                }
            }
            Err(e) => {
                // What a damaged disk needs cannot be known, so nothing is taken away.
                tracing::warn!(error = %e, "layers that nobody needs stay until this is mended");
                return Ok(());
            }
        }
    }
    loop {
        let mut removed = false;
        for id in layer_ids(root)? {
            for reference in layer::reference_names(root, id)? {
                let owner = reference.to_str().and_then(|n| Uuid::parse_str(n).ok());
                let keep = match owner {
                    // A layer that stands on this one, or a disk that needs it.
                    Some(owner) => {
                        needed
                            .get(&id)
                            .is_some_and(|owners| owners.contains(&owner))
                            || store.kind(&layer::path(root, owner))?.is_some() && owner != id
                    }
                    None => true,
                };
                if !keep && let Some(owner) = owner {
                    layer::release(root, id, owner)?;
                }
            }
            if layer::references(root, id)? == 0 && !needed.contains_key(&id) {
                remove_layer(root, id)?;
                removed = true;
            }
        }
        if !removed {
            return Ok(());
        }
    }
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
    let away = away(root);
    move_dir(root.store(), &layer::path(root, id), &away)?;
    for other in layer_ids(root)? {
        layer::release(root, other, id)?;
    }
    remove_tree(root.store(), &away)
}
