//! What a disk is charged for, and what it may be.
//!
//! The charge is the granules of 4 KiB that hold data in the disk's own images and in the journal of
//! its top. Images in the store's layers are nobody's, with one exception: one that this disk made,
//! and that became shared, stays charged to it until its snapshot is deleted.
//!
//! A limit refuses writes that need more (`NoSpace`). It refuses no snapshot, merge, deletion or
//! flush, and takes nothing away. What waits to be merged away is charged, and not held against who
//! writes over it meanwhile: so much more may be charged until then.

use std::path::Path;

use ploop::account::GRANULE;
use ploop::descriptor::{Descriptor, Guid, Image, Temporary};
use ploop::disk::Disk;
use ploop::error::{Kind, Result};
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::held::granules_in;
use ploop::store::{Access, EntryKind};
use serde::Serialize;

use crate::meta::Meta;
use crate::place::Place;

/// What a disk takes, and may take, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Charge {
    /// What is charged.
    pub used: u64,
    /// What may be.
    pub limit: Option<u64>,
    /// What the host has given its files: room taken ahead, too, and what the file system adds.
    pub host: u64,
}

/// Puts a disk that was just opened for writing under its limit. Asks the files of sealed images
/// that have one what they hold; where nothing was written since they were closed, that is known.
pub fn arm(place: &Place<'_>, disk: &Disk) -> Result<()> {
    let limit = place.meta()?.quota;
    if limit.is_some() {
        disk.top()?.count()?;
        recount(place, disk)?;
    }
    disk.account()?.set_limit(limit);
    Ok(())
}

/// [`recount`], where anybody asks, after a change that is done: what fails here undoes nothing, and
/// the charge of before stays.
pub(crate) fn recount_limited(place: &Place<'_>, disk: &Disk) {
    let counted = disk.account().and_then(|account| match account.limit() {
        Some(_) => recount(place, disk),
        None => Ok(()),
    });
    if let Err(e) = counted {
        tracing::warn!(disk = place.shown(), error = %e, "the charge was not counted anew");
    }
}

/// Counts the sealed images of an open disk anew, after its tree has changed. The caller is the only
/// one who rearranges it.
pub fn recount(place: &Place<'_>, disk: &Disk) -> Result<()> {
    let (d, meta) = (place.descriptor()?, place.meta()?);
    let account = disk.account()?;
    account.set_sealed(sealed(place, &d, &meta, true, &|_| true)?);
    let goes = |node| {
        let mut marked = d.shots.iter().filter(|s| s.temporary != Temporary::No);
        marked.any(|s| s.guid == node)
    };
    account.set_spare(sealed(place, &d, &meta, true, &goes)?);
    Ok(())
}

/// The charge of an open disk. Counts first what was not counted yet; then the charge costs nothing,
/// and only what the host has given is asked file by file.
pub fn of_open(place: &Place<'_>, disk: &Disk) -> Result<Charge> {
    let account = disk.account()?;
    let _arranging = disk.arrange();
    disk.top()?.count()?;
    if account.limit().is_none() {
        recount(place, disk)?;
    }
    Ok(Charge {
        used: account.used(),
        limit: account.limit(),
        host: host(place)?,
    })
}

/// The charge of a disk that is not open, or whose process is gone, from its files.
pub fn of_closed(place: &Place<'_>) -> Result<Charge> {
    let (d, meta) = (place.descriptor()?, place.meta()?);
    let mut granules = sealed(place, &d, &meta, false, &|_| true)?;
    if let Some(top) = d.image(d.top).filter(|i| is_charged(&meta, i)) {
        let path = place.file_of(top)?;
        granules += of_image(place, &path, false)?;
        if let Some(home) = place.opener().home(&path)
            && place.store().kind(home.path())? == Some(EntryKind::File)
        {
            let journal = place.store().open(home.path(), Access::Read)?;
            granules += granules_in(journal.as_ref(), 0..journal.len()?)?;
        }
    }
    Ok(Charge {
        used: granules * GRANULE,
        limit: meta.quota,
        host: host(place)?,
    })
}

/// Sets the limit of a disk, open here or not; durable on return, and in force for the next write.
/// The caller holds the disk's lock, or is the only one who rearranges it.
pub fn set_limit(place: &Place<'_>, disk: Option<&Disk>, limit: Option<u64>) -> Result<()> {
    // What can fail comes before it is stored.
    if let Some(disk) = disk {
        disk.top()?.count()?;
        recount(place, disk)?;
    }
    let mut meta = place.meta()?;
    meta.quota = limit;
    place.set_meta(&meta)?;
    disk.map_or(Ok(()), |disk| {
        disk.account()?.set_limit(limit);
        Ok(())
    })
}

/// Bytes that the host has given the files that are charged.
fn host(place: &Place<'_>) -> Result<u64> {
    let (d, meta) = (place.descriptor()?, place.meta()?);
    let mut sum = 0;
    for image in d.images.iter().filter(|i| is_charged(&meta, i)) {
        let path = place.file_of(image)?;
        let mut paths = vec![path.clone()];
        if image.guid == d.top {
            paths.extend(place.opener().home(&path).map(|h| h.path().to_path_buf()));
        }
        for path in paths {
            match place.store().open(&path, Access::Read) {
                Ok(file) => sum += file.host_bytes()?,
                Err(e) if e.kind() == Kind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(sum)
}

fn is_charged(meta: &Meta, image: &Image) -> bool {
    Place::owns(image) || meta.charged.contains(&image.guid.to_string())
}

/// Granules of the images but the top that `which` says; `keep`: what was counted is kept with its file.
fn sealed(
    place: &Place<'_>,
    d: &Descriptor,
    meta: &Meta,
    keep: bool,
    which: &dyn Fn(Guid) -> bool,
) -> Result<u64> {
    let below = |i: &&Image| i.guid != d.top && which(i.guid);
    let images = d.images.iter().filter(below);
    let mut sum = 0;
    for image in images.filter(|i| is_charged(meta, i)) {
        match place
            .file_of(image)
            .and_then(|path| of_image(place, &path, keep))
        {
            Ok(granules) => sum += granules,
            // It takes nothing, and what it lacks the check says.
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(sum)
}

/// Granules that an image file holds.
fn of_image(place: &Place<'_>, path: &Path, keep: bool) -> Result<u64> {
    let file = place.store().open(path, Access::Read)?;
    let closed = read_header(file.as_ref()).is_ok_and(|(h, _)| !h.dirty());
    if let Some(granules) = file.recall().filter(|_| closed) {
        return Ok(granules);
    }
    let granules = granules_in(file.as_ref(), 0..file.len()?)?;
    if keep && closed {
        file.keep(granules);
    }
    Ok(granules)
}
