//! What is sent: a disk's images, opened and kept as they are, and what each of them has.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::descriptor::{Descriptor, Guid, Image, Temporary};
use ploop::disk::Disk;
use ploop::disk::info::data_bytes;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::{Header, Version};
use ploop::format::{Delta, Place as At, Run};
use ploop::locks::DiskLock;
use ploop::store::{Access, SECTOR};

use super::manifest::{Image as Record, Known};
use crate::convert::pieces;
use crate::hash::Hasher;
use crate::meta::Meta;
use crate::place::Place;
use crate::snapshot::Live;
use crate::switch::is_raw;
use crate::tree::order;

/// How often a disk without its lock is looked at anew because the tree changed under it.
const TRIES: u32 = 10;
/// Clusters whose entries are looked at in one step.
const LOOK: u64 = 16 << 10;

/// Open images, by their nodes.
type Deltas = HashMap<Guid, Arc<dyn Delta>>;

/// A disk at one instant. Nobody rewrites its images while it lives.
pub(super) struct Opened {
    pub(super) d: Descriptor,
    pub(super) meta: Meta,
    deltas: Deltas,
    /// What its images have. A raw one is sent as an image of this version: a chain has one.
    version: Version,
    /// Of a disk in use: its top, of which nothing is sent.
    top: Option<Header>,
    _held: Option<DiskLock>,
}

impl Opened {
    /// Opens the chain of `node`, or the whole tree. A whole tree is read under the disk's lock.
    /// Errors: `InUse`, with what to do; `Unsupported` for what a stream has no place for.
    pub(super) fn open(place: &Place<'_>, node: Option<&str>) -> Result<Opened> {
        let held = match node {
            Some(_) => None,
            None => {
                place
                    .replay(&place.descriptor()?)
                    .map_err(|e| live(place, e))?;
                place.lock().map_err(|e| live(place, e))?
            }
        };
        let mut tries = 0;
        loop {
            let d = place.descriptor()?;
            let opened = Opened::look(place, &d, node);
            if tries < TRIES && place.descriptor()? != d {
                tries += 1;
                continue;
            }
            let (meta, deltas) = opened?;
            let version = version_of(place, &d)?;
            return Ok(Opened {
                d,
                meta,
                deltas,
                version,
                top: None,
                _held: held,
            });
        }
    }

    /// The whole tree of a disk that is open here, without what its top has. The caller keeps the tree
    /// as it is. Errors: as of [`Opened::open`].
    pub(super) fn live(live: Live<'_>) -> Result<Opened> {
        let Live { place, disk } = live;
        let _arranging = disk.arrange();
        disk.settle(place.opener())?;
        let (d, meta) = (place.descriptor()?, place.meta()?);
        refuse_encrypted(place, &d)?;
        let mut deltas = Deltas::new();
        for image in d.images.iter().filter(|i| i.guid != d.top) {
            refuse_continued(place, &d, image)?;
            deltas.insert(image.guid, open_image(place, &d, image)?);
        }
        Ok(Opened {
            version: version_of(place, &d)?,
            top: Some(disk.top()?.header().clone()),
            d,
            meta,
            deltas,
            _held: None,
        })
    }

    fn look(place: &Place<'_>, d: &Descriptor, node: Option<&str>) -> Result<(Meta, Deltas)> {
        let meta = place.meta()?;
        let images: Vec<&Image> = match node {
            Some(text) => {
                let node = place.find(d, &meta, text)?;
                if node == d.top {
                    return Err(not_a_snapshot(place));
                }
                d.chain(node)?
            }
            None => d.images.iter().collect(),
        };
        refuse_encrypted(place, d)?;
        let mut deltas = Deltas::new();
        for image in images {
            refuse(place, d, image)?;
            deltas.insert(image.guid, open_image(place, d, image)?);
        }
        Ok((meta, deltas))
    }

    /// The node that `text` names.
    pub(super) fn find(&self, place: &Place<'_>, text: &str) -> Result<Guid> {
        place.find(&self.d, &self.meta, text)
    }

    /// The nodes, parents before their children; the top last.
    pub(super) fn nodes(&self) -> Vec<Guid> {
        let all = order(&self.d).into_iter().map(|(guid, _)| guid);
        let mut nodes: Vec<Guid> = all.filter(|g| *g != self.d.top).collect();
        nodes.push(self.d.top);
        nodes
    }

    /// The nodes from the base up to `node`.
    pub(super) fn chain(&self, node: Guid) -> Result<Vec<Guid>> {
        Ok(self.d.chain(node)?.iter().map(|i| i.guid).collect())
    }

    /// The hash of what `node` shows: the recorded one, or all of it is read.
    pub(super) fn content(
        &self,
        place: &Place<'_>,
        node: Guid,
        progress: crate::convert::Progress<'_>,
    ) -> Result<String> {
        content(place, &self.meta, node, progress)
    }

    /// One image: what the nodes `own`, the uppermost last, have together. `parent`: it stands on
    /// another one.
    pub(super) fn sent(&self, own: &[Guid], parent: Option<Guid>, on_base: bool) -> Result<Sent> {
        let none = || Error::corrupt("a node without an image");
        let node = *own.last().ok_or_else(none)?;
        if let (Some(header), true) = (&self.top, node == self.d.top) {
            return Ok(Sent {
                record: self.record(node, parent, header.version, header.size()),
                deltas: Vec::new(),
                cluster: header.cluster_bytes(),
                stands: true,
            });
        }
        let mut deltas = Vec::new();
        for guid in own {
            deltas.push(self.deltas.get(guid).ok_or_else(none)?.clone());
        }
        let upper = deltas.last().ok_or_else(none)?.clone();
        let cluster = u64::from(self.d.cluster_sectors) * SECTOR;
        let (version, size) = match is_raw(&self.d, node) {
            true => {
                let size = upper.size().checked_next_multiple_of(cluster);
                let what = || Error::corrupt("the disk is too large").on(upper.file().path());
                (self.version, size.ok_or_else(what)?)
            }
            false => {
                let (header, _) = read_header(upper.file().as_ref())?;
                if header.cluster_bytes() != cluster {
                    let what = format!(
                        "an image with clusters of {} bytes in a disk with ones of {cluster}",
                        header.cluster_bytes()
                    );
                    return Err(Error::unsupported(what)
                        .on(upper.file().path())
                        .fix("Send what one snapshot shows from a copy: ploop convert"));
                }
                (header.version, header.size())
            }
        };
        Ok(Sent {
            record: self.record(node, parent, version, size),
            deltas,
            cluster,
            stands: parent.is_some() || on_base,
        })
    }

    fn record(&self, node: Guid, parent: Option<Guid>, version: Version, size: u64) -> Record {
        let is_top = node == self.d.top;
        let shot = self.d.shot(node);
        let temporary = !is_top && shot.is_some_and(|s| s.temporary != Temporary::No);
        Record {
            guid: match is_top {
                true => Guid::TOP.to_string(),
                false => node.to_string(),
            },
            parent: parent.map(|g| g.to_string()),
            version: version.number(),
            size,
            limit: self.meta.size_of(&self.d, node),
            meta: self
                .meta
                .snapshot(node)
                .filter(|_| !is_top && !temporary)
                .map(Known::from),
            temporary,
        }
    }
}

/// The hash of what `node` of a disk shows: the recorded one, or all of it is read.
pub(super) fn content(
    place: &Place<'_>,
    meta: &Meta,
    node: Guid,
    progress: crate::convert::Progress<'_>,
) -> Result<String> {
    if let Some(known) = meta.snapshot(node).and_then(|m| m.content.clone()) {
        return Ok(known);
    }
    let source = place.source(Some(node));
    let disk = place.opener().open(&source, &place.open_options(false))?;
    crate::hash::content(&disk, progress)
}

fn live(place: &Place<'_>, e: Error) -> Error {
    if e.kind() != Kind::InUse {
        return e;
    }
    let name = place.shown();
    let fix = format!(
        "Make a snapshot and send that, which is possible while it is in use: ploop snapshot \
         create {name} --name NAME; ploop send {name}@NAME"
    );
    Error::new(
        Kind::InUse,
        format!("{name} is in use, and its state changes"),
    )
    .on(place.dir())
    .caused_by(e)
    .fix(fix)
}

fn not_a_snapshot(place: &Place<'_>) -> Error {
    let what = format!("the top of {} is no snapshot", place.shown());
    Error::invalid(what).fix("Without @ the whole tree is sent, with its state")
}

/// What a stream has no place for, or what is not final.
fn refuse(place: &Place<'_>, d: &Descriptor, image: &Image) -> Result<()> {
    if d.shot(image.guid)
        .is_some_and(|s| s.temporary != Temporary::No)
    {
        let what = format!(
            "snapshot {} was deleted and is not merged yet: what is sent would need it",
            image.guid
        );
        return Err(Error::new(Kind::InUse, what)
            .on(place.dir())
            .fix("Let its merge end first"));
    }
    refuse_continued(place, d, image)
}

fn refuse_encrypted(place: &Place<'_>, d: &Descriptor) -> Result<()> {
    if d.encryption.is_none() {
        return Ok(());
    }
    let what = "the disk is encrypted, and a stream has no place for that";
    Err(Error::unsupported(what)
        .on(place.dir())
        .fix("Copy its directory: ploop export"))
}

fn refuse_continued(place: &Place<'_>, d: &Descriptor, image: &Image) -> Result<()> {
    if d.outer_parent(image.guid)?.is_some() {
        return Err(
            Error::unsupported("the disk continues another disk's directory")
                .on(place.dir())
                .fix("Copy all of it first: ploop export"),
        );
    }
    Ok(())
}

/// The version of the disk's images, those that are not sent among them: what is sent now and what
/// is sent later have to fit.
fn version_of(place: &Place<'_>, d: &Descriptor) -> Result<Version> {
    match d.images.iter().find(|i| !is_raw(d, i.guid)) {
        Some(image) => {
            let file = place.store().open(&place.file_of(image)?, Access::Read)?;
            Ok(read_header(file.as_ref())?.0.version)
        }
        None => Ok(Version::V2),
    }
}

/// Opens an image as a layer; that locks it against whoever would rewrite it.
fn open_image(place: &Place<'_>, d: &Descriptor, image: &Image) -> Result<Arc<dyn Delta>> {
    let path: PathBuf = place.file_of(image)?;
    if is_raw(d, image.guid) {
        let cluster = u64::from(d.cluster_sectors) * SECTOR;
        return place.opener().sealed_raw(&path, cluster);
    }
    let delta = place.opener().sealed_delta(&path)?;
    if image.guid == d.top {
        return Ok(delta);
    }
    let file = place.store().open(&path, Access::Read)?;
    let journal = match place.opener().home(&path) {
        Some(home) => home.is_live()?,
        None => false,
    };
    if journal || read_header(file.as_ref())?.0.dirty() {
        let what = "the image was not closed, so what it holds is not final";
        return Err(Error::new(Kind::InUse, what).on(path).fix(
            "A snapshot that was just made is closed shortly: try again; or look at it with \
             `ploop check`",
        ));
    }
    Ok(delta)
}

/// One image to send.
pub(super) struct Sent {
    pub(super) record: Record,
    deltas: Vec<Arc<dyn Delta>>,
    cluster: u64,
    /// Something is below it, so that clusters of zeros mean something.
    stands: bool,
}

/// Takes what an image has, in ascending order: runs of blocks that are not all zeros, none over
/// the end of a cluster; of a cluster without any its first byte, and nothing.
pub(super) type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<()>;

/// The same without their data, and with an empty image `guid` below the top, which comes last.
pub(super) fn hollow(mut images: Vec<Sent>, guid: Guid) -> Vec<Sent> {
    for image in &mut images {
        image.deltas.clear();
    }
    if let Some(mut top) = images.pop() {
        let below = Sent {
            record: Record {
                guid: guid.to_string(),
                limit: None,
                meta: None,
                temporary: true,
                ..top.record.clone()
            },
            deltas: Vec::new(),
            ..top
        };
        top.record.parent = Some(guid.to_string());
        images.extend([below, top]);
    }
    images
}

impl Sent {
    /// Bytes of data in its files.
    pub(super) fn data(&self) -> Result<u64> {
        self.deltas
            .iter()
            .map(|d| data_bytes(d.file().as_ref()))
            .sum()
    }

    /// Hands all of it to `sink`.
    pub(super) fn walk(&self, sink: Sink<'_>) -> Result<()> {
        walk(&self.deltas, self.cluster, self.stands, sink)
    }
}

/// Hands what `deltas` have together to `sink`. `stands`: also clusters of zeros.
pub(super) fn walk(
    deltas: &[Arc<dyn Delta>],
    cluster: u64,
    stands: bool,
    sink: Sink<'_>,
) -> Result<()> {
    if deltas.is_empty() {
        return Ok(());
    }
    let disk = Disk::sealed(Arc::new(Chain::new(deltas.to_vec())?));
    let mut present = Present::new(deltas, cluster);
    let mut last = None;
    pieces(&disk, &|_, _| (), &mut |offset, bytes| {
        let (mut at, end) = (offset, offset + bytes.len() as u64);
        while at < end {
            let k = at / cluster;
            while stands && let Some(empty) = present.below(k)? {
                if last != Some(empty) {
                    sink(empty * cluster, &[])?;
                }
            }
            let stop = ((k + 1) * cluster).min(end);
            sink(at, &bytes[(at - offset) as usize..(stop - offset) as usize])?;
            last = Some(k);
            at = stop;
        }
        Ok(())
    })?;
    while stands && let Some(empty) = present.below(u64::MAX)? {
        if last != Some(empty) {
            sink(empty * cluster, &[])?;
        }
    }
    Ok(())
}

/// The clusters that one of several deltas has, ascending.
struct Present<'a> {
    deltas: &'a [Arc<dyn Delta>],
    cluster: u64,
    end: u64,
    /// Clusters before this one were looked for.
    looked: u64,
    /// Of these, what was found and not yet given: the next one last.
    found: Vec<u64>,
}

impl<'a> Present<'a> {
    fn new(deltas: &'a [Arc<dyn Delta>], cluster: u64) -> Present<'a> {
        let end = deltas.iter().map(|d| d.mapped_end()).max().unwrap_or(0);
        Present {
            deltas,
            cluster,
            end: end.div_ceil(cluster),
            looked: 0,
            found: Vec::new(),
        }
    }

    /// The next cluster, if it comes before `k`.
    fn below(&mut self, k: u64) -> Result<Option<u64>> {
        while self.found.is_empty() && self.looked < self.end && self.looked < k {
            self.look()?;
        }
        Ok(self.found.pop_if(|next| *next < k))
    }

    fn look(&mut self) -> Result<()> {
        let stop = (self.looked + LOOK).min(self.end);
        let mut runs: Vec<Run> = Vec::new();
        for delta in self.deltas {
            let end = (stop * self.cluster).min(delta.mapped_end());
            if self.looked * self.cluster < end {
                delta.map(self.looked * self.cluster..end, &mut runs)?;
            }
        }
        for run in runs.iter().filter(|r| r.place != At::Parent) {
            let clusters = run.offset / self.cluster..(run.offset + run.len).div_ceil(self.cluster);
            self.found.extend(clusters);
        }
        self.found.sort_unstable_by(|a, b| b.cmp(a));
        self.found.dedup();
        self.looked = stop;
        Ok(())
    }
}

/// The hash of an image: of the blocks of its data as [`Hasher`] has them, and of each cluster
/// without data the offset with the highest bit set. So it is that of what a disk of this image
/// alone shows, if there are no such clusters.
pub(super) fn hash(hasher: &mut Hasher, offset: u64, bytes: &[u8]) {
    match bytes.is_empty() {
        true => hasher.mark(offset),
        false => hasher.add(offset, bytes),
    }
}
