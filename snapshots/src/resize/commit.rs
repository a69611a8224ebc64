//! The new top, and the one rename that makes it the disk's.

use std::sync::Arc;

use ploop::chain::Chain;
use ploop::descriptor::{Descriptor, Guid, Image, ImageKind, Shot, Temporary};
use ploop::device::{Device, ZeroMode};
use ploop::disk::Disk;
use ploop::error::{Error, Result};
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, create};
use ploop::format::raw::RawDelta;
use ploop::store::{SECTOR, StoreFile};
use ploop::tracker::bitmap::Bitmap;

use super::copy_changes;
use crate::convert::pieces;
use crate::layer;
use crate::place::Place;
use crate::share;
use crate::tracker;

/// A top in the making, on a closed disk whose lock is held.
pub(super) struct NewTop<'a> {
    pub(super) place: &'a Place<'a>,
    pub(super) disk: &'a Disk,
    /// Bytes that the disk is to show.
    pub(super) size: u64,
    /// What it is to show; what it shows now, if there is none.
    pub(super) flat: Option<Arc<dyn StoreFile>>,
}

impl NewTop<'_> {
    /// Steps 3 to 5, and flattened 6.
    pub(super) fn put(&self, flatten: bool) -> Result<()> {
        let (place, top) = (self.place, self.disk.top()?);
        let now = place.descriptor()?;
        let file = Place::new_file_name(&now);
        let h = top.header();
        let size = match flatten {
            true => self.size,
            false => self.size.max(h.size()),
        };
        let header = Header::new(h.version, h.cluster_sectors, size / SECTOR)?;
        let mut next = now.clone();
        let mut meta = place.meta()?;
        meta.files.insert(file.clone());
        if self.size < size {
            meta.sizes.insert(file.clone(), self.size);
        }
        match flatten {
            true => {
                let own = now.images.iter().filter(|i| Place::owns(i));
                meta.files.extend(own.map(|i| i.file.clone()));
                stand_alone(&mut next, &file);
            }
            false => {
                let former = Guid::new_v4();
                next.push_overlay(former, file.clone())
                    .map_err(|e| e.on(place.dir()))?;
                if let Some(shot) = next.shot_mut(former) {
                    shot.temporary = Temporary::Temporary;
                }
            }
        }
        next.set_disk_sectors(header.size_sectors);
        // 3.
        let made = place.set_meta(&meta).and_then(|()| {
            // 4.
            place.stage(&next)?;
            self.fill(&file, &header, flatten)?;
            place.store().sync_dir(place.dir())
        });
        if let Err(e) = made {
            self.take_back(&file);
            return Err(e);
        }
        // 5. COMMIT
        place.commit()?;
        // 6.
        if flatten && let Err(e) = self.let_go(&now) {
            tracing::warn!(disk = place.shown(), error = %e, "swept by the next operation");
        }
        Ok(())
    }

    /// The new image, closed and durable but for its name.
    fn fill(&self, file: &str, header: &Header, flatten: bool) -> Result<()> {
        let place = self.place;
        let image = create(place.store(), &place.dir().join(file), header, 0o600)?;
        let below = match flatten {
            true => None,
            false => Some(self.chain()?),
        };
        let top = Top::open(image)?;
        // What is flattened is written without its zeros: no write says where they came to be.
        let unsaid = flatten && self.flat.is_some();
        let set = |bits: &Bitmap| {
            if unsaid {
                bits.set_all();
            }
        };
        let carry = |top: &Top| tracker::carry(&self.disk.trackers(), top, &set);
        if self.flat.is_some() {
            carry(&top)?;
        }
        let after = Disk::writable(below, top, None)?;
        match (flatten, &self.flat) {
            (true, Some(flat)) => copy_all(&raw(flat.clone())?, &after)?,
            (true, None) => copy_all(self.disk, &after)?,
            (false, Some(flat)) => copy_changes(flat.as_ref(), self.disk, &after, self.size)?,
            (false, None) => {}
        }
        // Behind the limit there are zeros, also when it is raised again.
        let end = self.disk.size().min(after.size());
        if self.size < end {
            after.zero(self.size..end, ZeroMode::default())?;
        }
        if self.flat.is_none() {
            // It shows what the disk did.
            carry(after.top()?.as_ref())?;
        }
        after.close()
    }

    /// What the disk is made of now, sealed.
    fn chain(&self) -> Result<Arc<Chain>> {
        let opener = self.place.opener();
        let sealed = opener.sealed_delta(self.disk.top()?.file().path())?;
        opener.chain_over(self.disk.below().as_ref(), sealed)
    }

    /// Nothing of it was put in force.
    fn take_back(&self, file: &str) {
        let place = self.place;
        // Its room first: the host may be full.
        let undone = place.forget_file(file).and_then(|()| place.sweep());
        if let Err(e) = undone {
            tracing::warn!(disk = place.shown(), error = %e, "swept by the next operation");
        }
    }

    /// Step 6 of a disk that stands alone: the files of before, and the references to layers, go.
    fn let_go(&self, before: &Descriptor) -> Result<()> {
        let place = self.place;
        // The metadata lists the files, which the descriptor names no more.
        place.sweep()?;
        let Some(root) = place.root() else {
            return Ok(());
        };
        let mut layers = Vec::new();
        for image in before.images.iter().filter(|i| !Place::owns(i)) {
            let path = place.file_of(image)?;
            layers.extend(layer::of(root, &path).map(|_| path));
        }
        if layers.is_empty() {
            return Ok(());
        }
        share::release(root, &layers, share::id(place)?).map(drop)
    }
}

/// Copies all but zeros. What `to` is too small for are zeros, or was cut off `from`.
fn copy_all(from: &dyn Device, to: &dyn Device) -> Result<()> {
    pieces(from, &|_, _| (), &mut |offset, bytes| {
        to.write(offset, bytes)
    })
}

/// A raw file as a disk.
fn raw(file: Arc<dyn StoreFile>) -> Result<Disk> {
    let chain = Chain::new(vec![Arc::new(RawDelta::new(file)?)])?;
    Ok(Disk::sealed(Arc::new(chain)))
}

/// Makes `file` the only image of the disk.
fn stand_alone(d: &mut Descriptor, file: &str) {
    let guid = d.top;
    d.images = vec![Image {
        guid,
        kind: ImageKind::Compressed,
        file: file.to_owned(),
    }];
    d.shots = vec![Shot {
        guid,
        parent: Guid::NONE,
        temporary: Temporary::No,
    }];
    d.preallocated = false;
}

/// Refuses to flatten a disk with snapshots: they would lose what they stand on.
pub(super) fn refuse_tree(place: &Place<'_>, d: &Descriptor) -> Result<()> {
    if d.volume.as_ref().is_some_and(|v| v.parent.is_some()) {
        let what = "flattening a volume that stands on another";
        return Err(Error::unsupported(what)
            .on(place.dir())
            .fix("Export it first: ploop export DISK TARGET"));
    }
    let meta = place.meta()?;
    let is_one = |s: &&Shot| {
        let own = d.image(s.guid).is_some_and(Place::owns);
        s.guid != d.top && s.temporary == Temporary::No && (own || meta.snapshot(s.guid).is_some())
    };
    let named = |s: &Shot| {
        let name = meta.name_of(s.guid);
        name.map_or_else(|| s.guid.to_string(), str::to_owned)
    };
    let all: Vec<String> = d.shots.iter().filter(is_one).map(named).collect();
    if all.is_empty() {
        return Ok(());
    }
    let what = format!(
        "{} has snapshots, which flattening would take away: {}",
        place.shown(),
        all.join(", ")
    );
    Err(Error::unsupported(what)
        .on(place.dir())
        .fix("Delete them first, or leave --flatten out"))
}
