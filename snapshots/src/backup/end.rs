//! The end of a backup: done, or abandoned.

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use ploop::tracker::Id;
use ploop::tracker::bitmap::Bitmap;

use super::copy::{has_part, let_go};
use super::record::forget;
use super::{BITS, Base, Pending, beside, find};
use crate::delete;
use crate::place::Place;
use crate::snapshot::Live;

/// Backup `id` is copied: its tracker has no need of what it had, and [`remove`] may follow. Durable
/// on return.
///
/// 1. COMMIT: metadata: the tracker stands on this backup, which is done;
/// 2. the bits that the tracker had are forgotten; for good with the entry.
///
/// Error: `NotFound`.
pub fn finish(live: Live<'_>, id: &str) -> Result<()> {
    let place = live.place;
    let (node, pending) = find(place, id)?;
    {
        let _arranging = live.disk.arrange();
        let mut meta = place.meta()?;
        // 1.
        if let Some(entry) = meta.backups.get_mut(&node.to_string()) {
            entry.done = true;
        }
        let used = pending.tracker.as_ref();
        if let Some(known) = used.and_then(|u| meta.trackers.get_mut(&u.id)) {
            known.backup = Some(Base {
                id: pending.id.clone(),
                file: pending.target.clone(),
                format: pending.format,
            });
        }
        place.set_meta(&meta)?;
    }
    // 2.
    pending.bits(place).forget()
}

/// Removes the snapshot of backup `id`, which is done. Durable on return, but for what
/// [`delete::run`] has to do.
///
/// 1. the snapshot is deleted, or marked for it; 2. metadata without the backup.
///
/// Errors: `NotFound`; `InUse` while somebody reads it, and `Invalid` of one that is not done, with
/// nothing changed.
pub fn remove(live: Live<'_>, id: &str) -> Result<()> {
    let (node, pending) = find(live.place, id)?;
    if !pending.done {
        let what = format!("the backup to {} is not done", pending.target.display());
        return Err(Error::invalid(what));
    }
    pending.bits(live.place).forget()?;
    // 1.
    remove_snapshot(live, node)?;
    // 2.
    forget_entry(live, node, &pending, false)
}

/// Drops backup `id`: the tracker has its bits again, with those that came since. Durable on return,
/// but for what [`delete::run`] has to do for the snapshot.
///
/// 1. the tracker's bits are merged; one that began with the backup is ended instead;
/// 2. what they were kept in is forgotten;
/// 3. the file's part goes;
/// 4. the snapshot is deleted, or marked for it;
/// 5. metadata without the backup.
///
/// Cut anywhere, it can be abandoned again. Error: `NotFound`; those of [`delete::delete`].
pub fn abandon(live: Live<'_>, id: &str) -> Result<()> {
    let (node, pending) = find(live.place, id)?;
    if pending.done {
        return remove(live, id);
    }
    drop_cut(live, node, &pending)
}

fn drop_cut(live: Live<'_>, node: Guid, pending: &Pending) -> Result<()> {
    let place = live.place;
    {
        let _arranging = live.disk.arrange();
        // 1.
        put_back(live, pending)?;
        // 2.
        pending.bits(place).forget()?;
    }
    // 3. The target's own directory may be gone.
    let store = place.store();
    let record = super::Record::read(store, &pending.target);
    let renamed = store.kind(&pending.target)?.is_some() && store.kind(&pending.part())?.is_none();
    let ours = record.is_ok_and(|r| r.id == pending.id) && !renamed;
    let mut files = vec![pending.claim()];
    files.extend(ours.then(|| beside(&pending.target, ".json")));
    // Another disk's backup to this file keeps its part.
    let part = has_part(store, pending)?;
    files.extend(part.then(|| pending.part()));
    for file in files {
        forget(store, &file)?;
    }
    let gone = match part {
        true => let_go(store, pending),
        false => store.sync_dir(pending.dir()),
    };
    // Else it would come back, and be nobody's.
    match gone {
        Err(e) if e.kind() != Kind::NotFound => return Err(e),
        _ => {}
    }
    // 4.
    remove_snapshot(live, node)?;
    // 5.
    forget_entry(live, node, pending, true)
}

fn put_back(live: Live<'_>, pending: &Pending) -> Result<()> {
    let Live { place, disk } = live;
    let Some(used) = &pending.tracker else {
        return Ok(());
    };
    let id = Id::parse(&used.id)?;
    let Ok(tracker) = disk.tracker(id) else {
        return Ok(());
    };
    if used.begun {
        return disk.stop_tracker(id).map(drop);
    }
    let path = place.dir().join(".ploop").join(pending.bits_name());
    if place.store().kind(&path)?.is_none() {
        // It never was without them.
        return Ok(());
    }
    let bits = match pending.bits(place).kept(used.size)? {
        Some(bits) => bits,
        None => {
            tracing::warn!(file = %path.display(), "damaged, so every granule counts as written");
            let all = Bitmap::new(tracker.bits.size(), tracker.bits.granularity())?;
            all.set_all();
            all
        }
    };
    disk.add_to_tracker(id, &bits)
}

fn remove_snapshot(live: Live<'_>, node: Guid) -> Result<()> {
    match delete::delete_any(live, node) {
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        gone => gone.map(drop),
    }
}

fn forget_entry(live: Live<'_>, node: Guid, pending: &Pending, cut: bool) -> Result<()> {
    let _arranging = live.disk.arrange();
    let mut meta = live.place.meta()?;
    meta.backups.remove(&node.to_string());
    if let Some(used) = pending.tracker.as_ref().filter(|u| cut && u.begun) {
        meta.trackers.remove(&used.id);
    }
    live.place.set_meta(&meta)
}

/// Drops what is left of backups whose snapshot is not there, but of those that are done; and bits of
/// backups that are not there any more, which a power cut brought back.
pub(super) fn clean(live: Live<'_>) -> Result<()> {
    let place: &Place<'_> = live.place;
    // One that is just being begun is in the metadata, and not yet in the descriptor.
    let (meta, d) = {
        let _arranging = live.disk.arrange();
        (place.meta()?, place.descriptor()?)
    };
    for (node, pending) in &meta.backups {
        let guid = Guid::parse(node)?;
        if !pending.done && d.shot(guid).is_none() {
            drop_cut(live, guid, pending)?;
        }
    }
    let _arranging = live.disk.arrange();
    let (side, meta) = (place.dir().join(".ploop"), place.meta()?);
    let store = place.store();
    if store.kind(&side)?.is_none() {
        return Ok(());
    }
    for name in store.list(&side)? {
        let text = name.to_string_lossy();
        let Some(rest) = text.strip_prefix(BITS) else {
            continue;
        };
        let id = rest.split('.').next().unwrap_or_default();
        if !meta.backups.values().any(|p| p.id == id) {
            forget(store, &side.join(&name))?;
        }
    }
    Ok(())
}
