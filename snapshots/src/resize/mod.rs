//! `ploop resize` of a disk that nobody uses: the disk, and what is on it.
//!
//! ```text
//!   template ── top                    template ── (former top) ── new top       merged away at once
//!                │ raw copy: grown or shrunk ──── what differs ────┘
//! ```
//!
//! What is on the disk is resized in a raw copy, and what differs comes back in a new top: nothing of
//! the disk is written in place, and one rename of the descriptor makes it what it is to be.
//!
//! Larger: the new top is. Smaller: sizes must not shrink up a chain, so the images keep theirs, and
//! the new top has a size limit ([`Meta::sizes`]) and zeros behind it. A snapshot keeps the size that
//! it was made with. With [`ResizeOptions::flatten`] all that the disk shows goes into one image of the
//! new size, which stands on nothing.

mod changes;
mod commit;
mod inside;

pub(crate) use changes::copy_changes;

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::error::{Error, Result};
use ploop::format::ploop::Header;
use ploop::locks::downgrade;
use ploop::store::SECTOR;
use serde::Serialize;

use crate::delete::{self, Watch};
use crate::merge;
use crate::place::Place;
use crate::snapshot::Live;
use commit::NewTop;
use inside::Inside;

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResizeOptions {
    /// Bytes that the disk is to show; rounded up to a whole cluster.
    pub size: u64,
    /// The size is meant to be less: without this that is refused, and with it anything else.
    pub shrink: bool,
    /// Make the disk one image of its own of that size.
    pub flatten: bool,
    /// Resize what is on the disk, too. Without this a disk is cut only where it reads as zeros.
    pub filesystem: bool,
}

/// A disk that was resized, or had that size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resized {
    /// Which disk, as the caller named it.
    pub disk: String,
    /// Bytes that it showed before.
    pub before: u64,
    /// Bytes that it shows now.
    pub size: u64,
    /// Bytes of the file system on it now, if that was resized.
    pub filesystem: Option<u64>,
    /// Why that was not. A clause without final stop.
    pub reason: Option<String>,
    /// What is left to do, and when that is done.
    pub note: Option<String>,
}

/// Resizes a disk that is not open. Durable on return. Takes the disk's lock. Blocks while all data of
/// the disk is copied once (twice, where the file system is in a partition), checked, and what was the
/// top is merged; the host needs room for those copies meanwhile, in `.ploop` of the disk. `None` when
/// `watch` stopped it: nothing was changed. Stopped while it merges, it is done, and a note says that
/// the merge waits.
///
/// 1. the disk is opened and closed: its lock, its journal; what interrupted operations left is
///    swept and merged;
/// 2. in `.ploop/work`: a raw copy of what it shows, which is resized with what is on it;
/// 3. metadata: the file that is made, its size limit; durable;
/// 4. the new image with what differs (flattened: with all), and the next descriptor, durable;
/// 5. COMMIT: that descriptor is in force: what was the top is a node that is being removed;
/// 6. it is merged into the new top (flattened: its file, and the references to layers, go).
///
/// Cut before 5: the disk is as it was, and what is left is swept by the next operation, the copy of 2
/// also when it is served again. Cut after it:
/// it has its new size, and the next operation, or opening, goes on with 6. No quota refuses it.
///
/// Errors, with nothing changed: `InUse`; `Invalid` for a size that is none, or that is smaller
/// without `shrink` or not smaller with it; `NoSpace` for a full host, and for what does not fit (the text
/// says what would); `Unsupported` for a raw image, for what cannot be shrunk, and for snapshots
/// where `flatten` is wanted; those of opening.
pub fn offline(
    place: &Place<'_>,
    options: &ResizeOptions,
    watch: &dyn Watch,
) -> Result<Option<Resized>> {
    // 1.
    let disk = place.open()?;
    let done = resize(place, &disk, options, watch);
    if done.is_err() {
        // The error that came first is the one to report.
        drop(disk.close());
    }
    drop(disk);
    let Some((mut resized, is_new)) = done? else {
        return Ok(None);
    };
    // 6.
    if is_new {
        resized.note = merge_away(place, watch);
    }
    Ok(Some(resized))
}

/// Steps 1 to 5, and whether anything is new. Flattened, 6 is done, too.
fn resize(
    place: &Place<'_>,
    disk: &Disk,
    options: &ResizeOptions,
    watch: &dyn Watch,
) -> Result<Option<(Resized, bool)>> {
    let size = wanted(place, disk, options)?;
    let d = place.descriptor()?;
    if options.flatten {
        commit::refuse_tree(place, &d)?;
    }
    if !merge::waiting(place, &d)?.is_empty() {
        let live = Live { place, disk };
        if delete::run(live, watch)?.paused {
            disk.close()?;
            return Ok(None);
        }
    } else {
        place.sweep()?;
    }
    disk.close()?;
    // Nobody writes it any more; the lock is held until this is done.
    let top = disk.top()?;
    downgrade(top.file().as_ref())?;
    // 2.
    let encrypted = place.descriptor()?.encryption_key().is_some();
    let inside = Inside {
        place,
        disk,
        size,
        encrypted,
    };
    let Some(done) = inside.resize(options.filesystem, watch)? else {
        return Ok(None);
    };
    let resized = Resized {
        disk: place.shown().to_owned(),
        before: disk.size(),
        size,
        filesystem: done.filesystem,
        reason: done.reason.clone(),
        note: None,
    };
    if size == disk.size() && done.flat.is_none() && !options.flatten {
        return Ok(Some((resized, false)));
    }
    // 3. to 5.
    NewTop {
        place,
        disk,
        size,
        flat: done.flat,
    }
    .put(options.flatten)?;
    Ok(Some((resized, !options.flatten)))
}

/// The size in whole clusters, if it is one that was meant.
fn wanted(place: &Place<'_>, disk: &Disk, options: &ResizeOptions) -> Result<u64> {
    let cluster = disk.cluster_bytes().max(SECTOR);
    let size = options.size.checked_next_multiple_of(cluster);
    let size = size.filter(|&s| s > 0).ok_or_else(|| {
        Error::invalid(format!(
            "{} bytes: a disk cannot have that size",
            options.size
        ))
    })?;
    let now = disk.size();
    let refused = |what: String, fix: &str| Err(Error::invalid(what).on(place.dir()).fix(fix));
    match options.shrink {
        false if size < now => refused(
            format!("{size} bytes is less than the {now} that the disk has"),
            "If it is to be cut, say so: --shrink",
        ),
        true if size >= now => refused(
            format!("{size} bytes is not less than the {now} that the disk has"),
            "Leave --shrink out to make it larger",
        ),
        _ => {
            // What no image can be is refused before anything is copied.
            let top = disk.top()?;
            let h = top.header();
            Header::new(h.version, h.cluster_sectors, size / SECTOR)
                .map_err(|e| e.on(place.dir()))?;
            Ok(size)
        }
    }
}

/// Step 6; what is to be said of it.
fn merge_away(place: &Place<'_>, watch: &dyn Watch) -> Option<String> {
    let ran = place.open().and_then(|disk| {
        let ran = delete::run(Live { place, disk: &disk }, watch);
        let swept = place.sweep();
        disk.close().and(swept).and(ran)
    });
    let why = match ran {
        Ok(ran) if !ran.paused => return None,
        Ok(_) => "it was stopped".to_owned(),
        Err(e) => e.to_string(),
    };
    Some(format!(
        "what was the top is not merged yet ({why}): `ploop snapshot merge {} --continue` goes on, \
         or the next opening",
        place.shown()
    ))
}
