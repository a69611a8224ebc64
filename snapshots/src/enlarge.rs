//! A larger disk, while it is in use.
//!
//! The image grows first ([`ploop::disk::grow`]), then the descriptor says so. A crash between the two
//! leaves a descriptor that says less than the image is: readers go by the images, and the next
//! call, with the same size, mends it.

use std::time::Duration;

use ploop::descriptor::Descriptor;
use ploop::device::Device;
use ploop::disk::grow::Growth;
use ploop::disk::open::size_key;
use ploop::error::Result;
use ploop::store::SECTOR;

use crate::meta::Meta;
use crate::snapshot::Live;

/// Makes an open disk `size` bytes large, rounded up to a cluster; durable on return. Its snapshots
/// keep their size, and so do clients that are connected: each reads the new size when it connects
/// again. Blocks: copies the clusters that lie where the table grows to. The file system inside is
/// for whoever has it mounted.
///
/// Errors, with the disk as it was: `Invalid` for a size below the present one, or one that the
/// format cannot hold; `ReadOnly`; `NoSpace`. After any other the disk has the old size or the new
/// one, and a second call is safe.
pub fn enlarge(live: Live<'_>, size: u64) -> Result<Growth> {
    let Live { place, disk } = live;
    let _arranging = disk.arrange();
    disk.settle(place.opener())?;
    let mut d = place.descriptor()?;
    let meta = place.meta()?;
    // What overflows is refused below.
    let size = size
        .checked_next_multiple_of(disk.cluster_bytes())
        .unwrap_or(size);
    let growth = match meta.size_of(&d, d.top) {
        Some(from) if size == from => unchanged(from),
        Some(from) if size > from => raise_limit(live, &d, &meta, size)?,
        _ => disk.grow(size)?,
    };
    let sectors = disk.top()?.header().size() / SECTOR;
    if d.disk_sectors != Some(sectors) {
        d.set_disk_sectors(sectors);
        place.stage(&d)?;
        place.commit()?;
    }
    tracing::info!(
        disk = place.shown(),
        from = growth.from,
        to = growth.to,
        moved = growth.moved,
        pause = growth.pause.as_secs_f64(),
        "the disk was made larger"
    );
    Ok(growth)
}

fn unchanged(size: u64) -> Growth {
    Growth {
        from: size,
        to: size,
        moved: 0,
        pause: Duration::ZERO,
    }
}

/// Of a disk that was shrunk, the images have room already, and zeros in it: the limit goes up, or
/// goes. It is durable before anybody can write behind it. Where the images cannot grow as far, it
/// comes back: until they have grown nobody sees that it was gone.
fn raise_limit(live: Live<'_>, d: &Descriptor, before: &Meta, size: u64) -> Result<Growth> {
    let Live { place, disk } = live;
    let (from, images) = (disk.size(), disk.top()?.header().size());
    let (mut meta, key) = (before.clone(), size_key(d, d.top));
    match size < images {
        true => meta.sizes.insert(key, size),
        false => meta.sizes.remove(&key),
    };
    place.set_meta(&meta)?;
    if size <= images {
        disk.raise_limit(size);
        return Ok(Growth {
            to: size,
            ..unchanged(from)
        });
    }
    let grown = disk.grow(size).inspect_err(|_| {
        if let Err(e) = place.set_meta(before) {
            tracing::warn!(disk = place.shown(), error = %e, "the disk is larger when it is opened next");
        }
    });
    Ok(Growth { from, ..grown? })
}
