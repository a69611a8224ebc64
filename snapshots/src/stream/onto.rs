//! What was received becomes a snapshot on one that a container has already.
//!
//! ```text
//!   base ── a ── top (empty)        base ── a ── b ── top (empty)      the state goes along
//!   base ── a ── top (written)      base ── a ── top                   the state stays, as it does
//!                                           └─── b                     where writes are tracked
//! ```

use std::path::Path;

use ploop::descriptor::{Descriptor, Guid, ImageKind};
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::create;
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::top::Top;
use ploop::locks::{DiskLock, Use, lock_image};
use ploop::store::Access;

use super::commit::guid_key;
use super::manifest::{Image, Manifest};
use super::source::content;
use crate::life;
use crate::meta::{Meta, SnapshotMeta};
use crate::place::Place;
use crate::snapshot::refuse_name;
use crate::store::Root;
use crate::switch::is_raw;

/// A container that nobody uses, and its snapshot that the stream is on. Nothing of it changes
/// while this lives.
#[derive(Debug)]
pub(super) struct Onto<'a> {
    place: Place<'a>,
    on: Guid,
    /// The hash of what that shows.
    content: String,
    _held: Option<DiskLock>,
}

impl<'a> Onto<'a> {
    /// Opens container `name`, for a stream that stands on its snapshot `guid`. Reads all of that
    /// snapshot, unless its hash is recorded. Errors: `NotFound`; `Exists` for a
    /// snapshot that is there already; `InUse`; `Invalid` where the snapshot shows other data than
    /// the sender's.
    pub(super) fn open(
        root: &'a Root,
        name: &str,
        manifest: &Manifest,
        guid: &str,
        expected: &str,
    ) -> Result<Onto<'a>> {
        let place = Place::container(root, name)?;
        place.replay(&place.descriptor()?)?;
        let held = place.lock()?;
        place.sweep()?;
        let (d, meta) = (place.descriptor()?, place.meta()?);
        let on = place.find(&d, &meta, guid).map_err(|e| {
            e.fix(format!(
                "The stream is what came after that snapshot: send that one to {name} first"
            ))
        })?;
        let image = only(manifest)?;
        refuse(&place, &d, &meta, on, image, manifest)?;
        let found = content(&place, &meta, on, &|_, _| ())?;
        if found != expected {
            let what = format!("snapshot {guid} of {name} shows other data than the sender's");
            return Err(Error::invalid(what)
                .on(place.dir())
                .fix("Send without --from, as another container"));
        }
        Ok(Onto {
            place,
            on,
            content: found,
            _held: held,
        })
    }

    /// Puts the image in `room`, which is durable, on the snapshot. Gives what the container shows
    /// in bytes, the new snapshot, and whether the container shows that.
    ///
    /// 1. metadata: its name, the files that are made or dropped, the hash of the snapshot; durable;
    /// 2. the image under a second name, a new top if the one that is there holds nothing, the next
    ///    descriptor; durable;
    /// 3. COMMIT: that descriptor is in force;
    /// 4. the old top, if it was replaced, is removed.
    pub(super) fn commit(
        &self,
        room: &Path,
        manifest: &Manifest,
    ) -> Result<(u64, Option<String>, bool)> {
        let place = &self.place;
        let before = place.meta()?;
        let image = only(manifest)?;
        let guid = Guid::parse(&image.guid)?;
        let mut next = place.descriptor()?;
        let mut meta = before.clone();
        // The next difference need not read it again.
        let below = meta.snapshots.entry(self.on.to_string()).or_default();
        below.content = Some(self.content.clone());
        let file = Place::new_file_name(&next);
        meta.files.insert(file.clone());
        let known = image
            .meta
            .as_ref()
            .map(SnapshotMeta::from)
            .unwrap_or_default();
        meta.snapshots.insert(guid_key(image)?, known);
        if let Some(limit) = image.limit {
            meta.sizes.insert(guid_key(image)?, limit);
        }
        let old = self.empty_top(&next, &before)?;
        let top = Place::new_file_name(&next);
        next.push_node(guid, self.on, ImageKind::Compressed, file.clone());
        if let Some(old) = &old {
            meta.files.extend([top.clone(), old.clone()]);
            if let Some(limit) = image.limit {
                meta.sizes.insert(top.clone(), limit);
            }
            next.replace_top(guid, top.clone())?;
        }
        // 1.
        let staged = place.set_meta(&meta).and_then(|()| {
            // 2.
            let store = place.store();
            place.stage(&next)?;
            store.hard_link(&room.join("0"), &place.dir().join(&file))?;
            if old.is_some() {
                let header = image.header(manifest.disk.cluster_sectors)?;
                drop(create(store, &place.dir().join(&top), &header, 0o600)?);
            }
            store.sync_dir(place.dir())?;
            match old.is_some() {
                true => life::forget(store, place.dir()),
                false => Ok(()),
            }
        });
        if let Err(e) = staged {
            self.sweep();
            return Err(e);
        }
        // 3. COMMIT
        place.commit()?;
        // 4.
        if old.is_some() {
            self.sweep();
        }
        let size = match old.is_some() {
            true => image.limit.unwrap_or(image.size),
            false => self.shown_size(&next)?,
        };
        Ok((size, Some(image.guid.clone()), old.is_some()))
    }

    /// The file of the top, if that stands on the snapshot and holds nothing, and nobody counts on
    /// hearing of every change of what it shows.
    fn empty_top(&self, d: &Descriptor, meta: &Meta) -> Result<Option<String>> {
        let on = d.shot(d.top).map(|s| s.parent);
        let Some(image) = d
            .image(d.top)
            .filter(|i| on == Some(self.on) && Place::owns(i))
        else {
            return Ok(None);
        };
        let place = &self.place;
        let tracked = !meta.trackers.is_empty();
        if tracked || is_raw(d, d.top) || d.volume.as_ref().is_some_and(|v| v.read_only) {
            return Ok(None);
        }
        let file = place.store().open(&place.file_of(image)?, Access::Write)?;
        lock_image(file.as_ref(), Use::Write)?;
        let home = place.opener().home(file.path());
        let top = Top::open_at(file, home)?;
        let entries = u64::from(top.header().entries);
        let empty = top.parts().count() == 0 && top.next_page_with_entries(0, entries) == entries;
        Ok(empty.then(|| image.file.clone()))
    }

    /// Removes what the descriptor in force does not name.
    fn sweep(&self) {
        if let Err(e) = self.place.sweep() {
            tracing::warn!(disk = self.place.shown(), error = %e, "swept by the next operation");
        }
    }

    fn shown_size(&self, d: &Descriptor) -> Result<u64> {
        let (size, _) = size_of(&self.place, d, d.top)?;
        let limit = self.place.meta()?.size_of(d, d.top);
        Ok(limit.unwrap_or(u64::MAX).min(size))
    }
}

fn only(manifest: &Manifest) -> Result<&Image> {
    let none = || Error::corrupt("the stream has no images");
    manifest.images.last().ok_or_else(none)
}

/// Bytes that the image of `node` shows, and its format's version, which a raw one does not have.
fn size_of(place: &Place<'_>, d: &Descriptor, node: Guid) -> Result<(u64, Option<u32>)> {
    let none = || Error::corrupt(format!("snapshot {node} has no image")).on(place.dir());
    let image = d.image(node).ok_or_else(none)?;
    let file = place.store().open(&place.file_of(image)?, Access::Read)?;
    match is_raw(d, node) {
        true => Ok((file.len()?, None)),
        false => {
            let header = read_header(file.as_ref())?.0;
            Ok((header.size(), Some(header.version.number())))
        }
    }
}

fn refuse(
    place: &Place<'_>,
    d: &Descriptor,
    meta: &Meta,
    on: Guid,
    image: &Image,
    manifest: &Manifest,
) -> Result<()> {
    let name = place.shown();
    if on == d.top {
        let what = format!("{on} is the top of {name}, and no snapshot");
        return Err(Error::invalid(what).on(place.dir()));
    }
    if d.image(Guid::parse(&image.guid)?).is_some() {
        let what = format!("{name} has the snapshot {} already", image.guid);
        return Err(Error::new(Kind::Exists, what).on(place.dir()));
    }
    let known = image.meta.as_ref().and_then(|m| m.name.as_deref());
    refuse_name(place, d, meta, known)?;
    if d.cluster_sectors != manifest.disk.cluster_sectors {
        let what = format!(
            "{name} has clusters of {} sectors, and the stream ones of {}",
            d.cluster_sectors, manifest.disk.cluster_sectors
        );
        return Err(Error::unsupported(what).on(place.dir()));
    }
    let (below, version) = size_of(place, d, on)?;
    if version.is_some_and(|v| v != image.version) {
        let what = format!("an image of version {} on one of another", image.version);
        return Err(Error::corrupt(what).on(place.dir()));
    }
    if image.size < below {
        let what = format!("an image of {} bytes on one of {below}", image.size);
        return Err(Error::corrupt(what).on(place.dir()));
    }
    Ok(())
}
