//! Images whose data comes later: what is told of them at first, and how both sides find it then.
//!
//! The source tells of each sealed image where it has data, in runs of blocks that cross no cluster's
//! end; of a cluster without data in an image that stands on another one its first byte, and 0. The
//! destination lays the image out: every cluster in its table, its data missing
//! ([`ploop::store::arriving`]). It asks by byte of the disk, as the image alone has it: where that is
//! in a file is each side's own business.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::descriptor::Guid;
use ploop::device::{Device, Segment, SegmentPlace};
use ploop::disk::Disk;
use ploop::disk::claim::adopt;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::PloopDelta;
use ploop::format::ploop::top::Top;
use ploop::store::arriving::{self, GRANULE};
use ploop::store::{Access, SECTOR};

use crate::place::Place;
use crate::switch::is_raw;

/// Bytes of the disk that are looked at in one step.
const WINDOW: u64 = 1 << 30;

/// One image of a disk, as it is alone: no parent below it.
fn alone(place: &Place<'_>, guid: Guid) -> Result<Disk> {
    let d = place.descriptor()?;
    let none = || Error::new(Kind::NotFound, format!("no image {guid}")).on(place.dir());
    let path = place.file_of(d.image(guid).ok_or_else(none)?)?;
    let delta = match is_raw(&d, guid) {
        true => place
            .opener()
            .sealed_raw(&path, u64::from(d.cluster_sectors) * SECTOR)?,
        false => place.opener().sealed_delta(&path)?,
    };
    Ok(Disk::sealed(Arc::new(Chain::new(vec![delta])?)))
}

/// Tells `sink` of every run that image `guid` has data in, in order: byte of the disk, and length.
/// Reads tables, no data.
pub fn runs(
    place: &Place<'_>,
    guid: Guid,
    sink: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let disk = alone(place, guid)?;
    let (size, cluster) = (disk.size(), disk.cluster_bytes());
    let mut segments: Vec<Segment> = Vec::new();
    let mut at = 0;
    while at < size {
        let end = (at + WINDOW.next_multiple_of(cluster)).min(size);
        let lease = disk.map(at..end, &mut segments)?;
        for s in &segments {
            let (layer, start) = match s.place {
                SegmentPlace::Hole => continue,
                SegmentPlace::File { layer, offset } => (layer, offset),
                SegmentPlace::Through { .. } | SegmentPlace::Fault { .. } => {
                    // Its error, or what cannot be: a ploop image maps to its file.
                    lease.read(s, 0, &mut [0])?;
                    return Err(
                        Error::unsupported("an image that cannot be fetched in pieces")
                            .on(lease.file(0).path()),
                    );
                }
            };
            let file = lease.file(layer);
            let mut from = 0;
            while from < s.len {
                let to = (((s.offset + from) / cluster + 1) * cluster - s.offset).min(s.len);
                let mut told = false;
                let mut look = start + from;
                while look < start + to
                    && let Some(data) = file.next_data(look, start + to)?
                {
                    let first = (s.offset + (data.start - start)) / GRANULE * GRANULE;
                    let last = (s.offset + (data.end - start))
                        .next_multiple_of(GRANULE)
                        .min(s.offset + to);
                    sink(first, last - first)?;
                    told = true;
                    look = start + (last - s.offset);
                }
                if !told {
                    sink((s.offset + from) / cluster * cluster, 0)?;
                }
                from = to;
            }
        }
        at = end;
    }
    Ok(())
}

/// Lays out image `guid` of a disk that nobody has open, and that is empty: its data is missing from
/// then on. Durable on return. `runs` come from elsewhere. Error: `Corrupt` for what no image can have.
pub fn lay_out(place: &Place<'_>, guid: Guid, runs: &[(u64, u64)]) -> Result<()> {
    let d = place.descriptor()?;
    let wrong = |what: String| Error::corrupt(what).on(place.dir());
    let image = d.image(guid).filter(|_| guid != d.top);
    let image = image.ok_or_else(|| wrong(format!("no sealed image {guid} is to come")))?;
    if !Place::owns(image) || is_raw(&d, guid) {
        return Err(wrong(format!(
            "the image {guid} is not this container's own"
        )));
    }
    let path = place.file_of(image)?;
    if place.opener().is_arriving(&path)? {
        return Err(wrong(format!("the image {guid} was told of before")));
    }
    let top = Arc::new(Top::open(place.store().open(&path, Access::Write)?)?);
    let (size, cluster) = (top.header().size(), top.header().cluster_bytes());
    let mut missing: Vec<Range<u64>> = Vec::new();
    let (mut n, mut before) = (0, 0);
    while let Some(&(offset, _)) = runs.get(n) {
        if offset >= size {
            return Err(wrong(format!("data of image {guid} at byte {offset}")));
        }
        let k = offset / cluster;
        let of = runs[n..].iter().take_while(|r| r.0 / cluster == k).count();
        let mut failed = None;
        let taken = adopt(&top, k, |to| {
            for &(offset, len) in &runs[n..n + of] {
                let end = offset.saturating_add(len);
                let fits = offset >= before
                    && offset.is_multiple_of(GRANULE)
                    && end <= size
                    && end <= (k + 1) * cluster
                    && (len > 0 || offset.is_multiple_of(cluster) && of == 1);
                if !fits {
                    failed = Some(format!(
                        "data of image {guid}: {len} bytes at byte {offset}"
                    ));
                    return Err(Error::corrupt("data that cannot be"));
                }
                before = end.max(offset + 1);
                if len > 0 {
                    let at = to + offset % cluster;
                    missing.push(at..at + len);
                }
            }
            Ok(())
        });
        let taken = taken.map_err(|e| failed.map_or(e, &wrong))?;
        if !taken {
            return Err(wrong(format!("cluster {k} of image {guid} came twice")));
        }
        n += of;
    }
    top.close()?;
    drop(top);
    match missing.is_empty() {
        true => Ok(()),
        false => arriving::begin(place.store(), &path, &missing),
    }
}

/// Where the bytes of an image's file are on the disk: for who asks for them. `path` is not registered
/// yet.
pub fn places(place: &Place<'_>, path: &std::path::Path) -> Result<Places> {
    let file = place.store().open(path, Access::Read)?;
    let delta = PloopDelta::open(file)?;
    let disk = Disk::sealed(Arc::new(Chain::new(vec![Arc::new(delta)])?));
    let (size, mut at) = (disk.size(), 0);
    let mut found = BTreeMap::new();
    let mut segments: Vec<Segment> = Vec::new();
    while at < size {
        let end = (at + WINDOW).min(size);
        let _lease = disk.map(at..end, &mut segments)?;
        for s in &segments {
            if let SegmentPlace::File { offset, .. } = s.place {
                found.insert(offset, (s.offset, s.len));
            }
        }
        at = end;
    }
    Ok(Places(found))
}

/// By byte of the file: byte of the disk, and length.
#[derive(Debug)]
pub struct Places(BTreeMap<u64, (u64, u64)>);

impl Places {
    /// Where a piece of the file from `offset` on is on the disk, and how much of `len` bytes is there
    /// in one piece. Error: `Corrupt` for what is not of any cluster.
    pub fn find(&self, offset: u64, len: u64) -> Result<(u64, u64)> {
        let before = self.0.range(..=offset).next_back();
        let found = before.and_then(|(start, (guest, run))| {
            let skip = offset - start;
            (skip < *run).then(|| (guest + skip, len.min(run - skip)))
        });
        found.ok_or_else(|| Error::corrupt(format!("byte {offset} of the file is of no cluster")))
    }
}

/// Which images of a disk still lack bytes, with their files.
pub fn missing(place: &Place<'_>) -> Result<Vec<(Guid, PathBuf)>> {
    let d = place.descriptor()?;
    let mut found = Vec::new();
    for image in d.images.iter().filter(|i| Place::owns(i)) {
        let path = place.file_of(image)?;
        if place.opener().is_arriving(&path)? {
            found.push((image.guid, path));
        }
    }
    Ok(found)
}

/// The source's images, for who asks for their bytes.
#[derive(Debug)]
pub struct Feeder<'a> {
    place: Place<'a>,
    open: HashMap<Guid, Disk>,
}

impl<'a> Feeder<'a> {
    /// Of a disk that nobody writes to any more.
    pub fn new(place: Place<'a>) -> Feeder<'a> {
        Feeder {
            place,
            open: HashMap::new(),
        }
    }

    /// Reads what image `guid` alone has. Errors: `NotFound`; `Invalid` behind its end.
    pub fn read(&mut self, guid: Guid, offset: u64, buf: &mut [u8]) -> Result<()> {
        if !self.open.contains_key(&guid) {
            let disk = alone(&self.place, guid)?;
            self.open.insert(guid, disk);
        }
        match self.open.get(&guid) {
            Some(disk) => disk.read(offset, buf),
            None => Ok(()),
        }
    }
}
