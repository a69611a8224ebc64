//! Giving back the space that a disk does not need ([`ploop::disk::compact`]).
//!
//! The top is compacted under its clients. Sealed images are read by whoever has them in a chain, so
//! they are compacted only while nobody has: each for itself, the lower ones first, since what reads
//! the same below is given up. What it shows stays the same at every instant, for each node. A crash
//! leaves an image marked in use, all of whose entries are complete; the next run closes it. A run
//! that was ended goes on where there is still something to do.

use ploop::descriptor::{Descriptor, Guid, Image, Temporary};
use ploop::disk::Disk;
use ploop::disk::compact::{Compacted, Spare};
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::top::Top;
use ploop::locks::{Use, lock_image};
use ploop::store::Access;

use crate::delete::Watch;
use crate::merge::Progress;
use crate::place::Place;
use crate::snapshot::Live;

/// What was given back, or would be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Bytes of 4 KiB granules that held data.
    pub freed: Spare,
    /// Clusters that were moved.
    pub moved: u64,
    /// Bytes that the files are shorter.
    pub shorter: u64,
    /// The longest time that a client's write was held up, in seconds.
    pub pause: f64,
    /// It was told to stop before the end.
    pub paused: bool,
    /// What was left as it is, and why.
    pub left: Vec<String>,
}

impl Report {
    fn add(&mut self, done: &Compacted) {
        self.add_spare(&done.freed);
        self.moved += done.moved;
        self.shorter += done.from.saturating_sub(done.to);
        self.pause = self.pause.max(done.pause.as_secs_f64());
    }

    fn add_spare(&mut self, spare: &Spare) {
        self.freed.same += spare.same;
        self.freed.zeros += spare.zeros;
        self.freed.unnamed += spare.unnamed;
    }

    /// With what another run did.
    pub fn join(&mut self, other: Report) {
        self.add_spare(&other.freed);
        self.moved += other.moved;
        self.shorter += other.shorter;
        self.pause = self.pause.max(other.pause);
        self.paused |= other.paused;
        self.left.extend(other.left);
    }
}

/// What compacting the top of an open disk would give back now. Blocks: reads all of its data.
pub fn foretell(live: Live<'_>) -> Result<Report> {
    let mut report = Report::default();
    report.add_spare(&live.disk.spare()?);
    Ok(report)
}

/// Compacts the top of an open disk, beside its clients. Snapshots come in between steps. Errors
/// leave the disk as it was, or a part of the way. Blocks.
pub fn top(live: Live<'_>, watch: &dyn Watch) -> Result<Report> {
    let Live { place, disk } = live;
    let settle = || disk.settle(place.opener());
    run(disk, &settle, watch)
}

fn run(disk: &Disk, settle: &dyn Fn() -> Result<()>, watch: &dyn Watch) -> Result<Report> {
    let mut compaction = disk.compaction()?;
    let (mut report, mut before) = (Report::default(), 0);
    loop {
        let (done, total) = compaction.progress(ploop::device::Device::cluster_bytes(disk));
        watch.progress(Progress { done, total });
        if !watch.go_on(done - before) {
            report.paused = true;
            break;
        }
        before = done;
        let _arranging = disk.arrange();
        settle()?;
        if !disk.compact_step(&mut compaction)? {
            break;
        }
    }
    report.add(compaction.done());
    Ok(report)
}

/// Compacts the sealed images that are this disk's own; with `look`, only says what that would give
/// back. The caller holds the disk's lock, and nobody has the disk open here. Images that somebody
/// reads are left, and so are raw ones and nodes that are being merged. Blocks.
pub fn sealed(place: &Place<'_>, look: bool, watch: &dyn Watch) -> Result<Report> {
    let d = place.descriptor()?;
    let mut report = Report::default();
    for image in own(&d)? {
        let one = sealed_image(place, &d, image, look, watch);
        match one {
            Ok(done) => report.join(done),
            Err(e) if e.kind() == Kind::InUse || e.kind() == Kind::Unsupported => {
                report
                    .left
                    .push(format!("{}: {}", image.guid, e.what().trim_end()));
            }
            Err(e) => return Err(e),
        }
        if report.paused {
            break;
        }
    }
    Ok(report)
}

/// The sealed images of the disk's own, the lower ones first.
fn own(d: &Descriptor) -> Result<Vec<&Image>> {
    let mut all = Vec::new();
    for image in &d.images {
        if image.guid != d.top && Place::owns(image) {
            all.push((d.chain(image.guid)?.len(), image));
        }
    }
    all.sort_by_key(|(depth, _)| *depth);
    Ok(all.into_iter().map(|(_, image)| image).collect())
}

fn sealed_image(
    place: &Place<'_>,
    d: &Descriptor,
    image: &Image,
    look: bool,
    watch: &dyn Watch,
) -> Result<Report> {
    if d.base_is_raw() && d.chain(image.guid)?.len() == 1 {
        return Err(Error::unsupported("a raw image is not compacted"));
    }
    if merges(d, image.guid) {
        return Err(Error::new(Kind::InUse, "is being merged"));
    }
    let below = match parent_of(d, image.guid) {
        Some(parent) => {
            let source = place.source(Some(parent));
            let opened = place.opener().open(&source, &place.open_options(false))?;
            opened.below()
        }
        None => None,
    };
    let path = place.file_of(image)?;
    place.opener().refuse_arriving(&path)?;
    let file = place.store().open(&path, Access::Write)?;
    lock_image(file.as_ref(), Use::Write)?;
    let disk = Disk::writable(below, Top::open(file)?, None)?;
    if look {
        let mut report = Report::default();
        report.add_spare(&disk.spare()?);
        return Ok(report);
    }
    let report = run(&disk, &|| Ok(()), watch)?;
    disk.close()?;
    Ok(report)
}

fn parent_of(d: &Descriptor, node: Guid) -> Option<Guid> {
    let shot = d.shot(node)?;
    (shot.parent != Guid::NONE).then_some(shot.parent)
}

/// A merge rewrites a node, or what it stands on.
fn merges(d: &Descriptor, node: Guid) -> bool {
    let marked = |guid: Guid| d.shot(guid).is_some_and(|s| s.temporary != Temporary::No);
    marked(node) || parent_of(d, node).is_some_and(marked)
}
