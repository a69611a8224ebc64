//! Where the bytes are that a disk, or a store, takes of its host.
//!
//! ```text
//!  host = data + snapshots + unnamed + metadata + room
//!         │      │           │         │          └ taken ahead, and what the file system adds
//!         │      │           │         └ headers, tables, journal, descriptor, names and limits
//!         │      │           └ no entry names it: `ploop compact` gives it back
//!         │      └ only snapshots show it
//!         └ the live disk shows it
//! ```
//!
//! Data is counted in granules of 4 KiB that hold some. Of files that are shared nothing is in the
//! sum: what of them the live disk shows is told beside it.

use std::collections::HashMap;
use std::path::Path;

use ploop::account::GRANULE;
use ploop::descriptor::Image;
use ploop::device::{Device, Segment, SegmentPlace};
use ploop::disk::Disk;
use ploop::error::{Kind, Result};
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::held::granules_in;
use ploop::format::ploop::{PloopDelta, bitmaps};
use ploop::format::{Delta, Place as At};
use ploop::store::{Access, EntryKind, FileId, Store, StoreFile};
use serde::Serialize;

use crate::place::Place;
use crate::store::Root;

/// Guest bytes looked at in one step.
const WINDOW: u64 = 1 << 30;

/// What a disk takes, in bytes. See the module text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Space {
    /// All that the host has given its own files.
    pub host: u64,
    /// What the live disk shows of them.
    pub data: u64,
    /// What only snapshots show.
    pub snapshots: u64,
    /// What no entry names.
    pub unnamed: u64,
    /// Headers, tables, journal, descriptor.
    pub metadata: u64,
    /// Taken ahead, and what the host's file system adds.
    pub room: u64,
    /// What the live disk shows of files that are shared, and not its own.
    pub shared: u64,
}

/// What a store takes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoreSpace {
    /// All of its files.
    pub host: u64,
    /// Those of containers.
    pub containers: u64,
    /// Layers, which containers and templates share.
    pub layers: u64,
    /// What templates have beside layers.
    pub templates: u64,
    /// What is being made, or was left by a crash: the next operation clears it up.
    pub work: u64,
    /// The rest: the reserve, locks, hidden names.
    pub other: u64,
}

/// The space of a disk: open here for writing, or by nobody. Blocks: reads the tables of all images
/// and asks the host where their data is, not the data. Of a disk that is being written it is a
/// moment's picture, part by part. Error: `InUse` when another process has it open for writing.
pub fn of(place: &Place<'_>, open: Option<&Disk>) -> Result<Space> {
    let d = place.descriptor()?;
    let closed;
    let disk = match open {
        Some(disk) => disk,
        None => {
            closed = place
                .opener()
                .open(&place.source(None), &place.open_options(false))?;
            &closed
        }
    };
    let mut space = Space::default();
    let shown = shown(disk)?;
    let (mut own, mut images) = (Vec::new(), 0);
    for image in d.images.iter().filter(|i| Place::owns(i)) {
        let file = place.store().open(&place.file_of(image)?, Access::Read)?;
        own.push(file.id());
        images += file.host_bytes()?;
        let top = open.filter(|_| image.guid == d.top);
        add_image(&mut space, place, image, file, top, &shown)?;
    }
    let others = shown.iter().filter(|(id, _)| !own.contains(id));
    space.shared = others.map(|(_, granules)| granules * GRANULE).sum();
    let beside = of_files(place.store(), place.dir())?.saturating_sub(images);
    space.metadata += beside;
    space.host += beside;
    Ok(space)
}

/// Granules that a disk shows, by file.
pub(crate) fn shown(disk: &Disk) -> Result<HashMap<FileId, u64>> {
    let mut shown = HashMap::new();
    let mut segments: Vec<Segment> = Vec::new();
    let mut at = 0;
    while at < disk.size() {
        let end = at.saturating_add(WINDOW).min(disk.size());
        let lease = disk.map(at..end, &mut segments)?;
        for s in &segments {
            if let SegmentPlace::File { layer, offset } = s.place {
                let file = lease.file(layer);
                let granules = granules_in(file.as_ref(), offset..offset + s.len)?;
                *shown.entry(file.id()).or_default() += granules;
            }
        }
        at = end;
    }
    Ok(shown)
}

fn add_image(
    space: &mut Space,
    place: &Place<'_>,
    image: &Image,
    file: std::sync::Arc<dyn StoreFile>,
    top: Option<&Disk>,
    shown: &HashMap<FileId, u64>,
) -> Result<()> {
    let (host, len) = (file.host_bytes()?, file.len()?);
    // Room that was taken ahead is no data, whatever of it is cached.
    let end = match top {
        Some(disk) if disk.top()?.is_marked() => disk.top()?.handed_end().min(len),
        _ => len,
    };
    let all = granules_in(file.as_ref(), 0..end)?;
    // A raw base has no header.
    let start = read_header(file.as_ref()).map_or(0, |(h, _)| h.data_start);
    let bits = match read_header(file.as_ref()) {
        Ok((h, _)) => bitmaps::granules(file.as_ref(), &h)?,
        Err(_) => 0,
    };
    let metadata = granules_in(file.as_ref(), 0..start.min(len))? + bits;
    let shows = shown.get(&file.id()).copied().unwrap_or(0);
    let unnamed = match top {
        Some(disk) => disk.top()?.spare()?,
        None if start == 0 => 0,
        None => {
            let home = place.opener().home(&place.file_of(image)?);
            all.saturating_sub(metadata)
                .saturating_sub(named(&PloopDelta::open_at(file, home)?)?)
        }
    };
    let named = all.saturating_sub(metadata).saturating_sub(unnamed);
    // Writers go on while one after the other is counted.
    let data = shows.min(named);
    space.data += data * GRANULE;
    space.snapshots += (named - data) * GRANULE;
    space.unnamed += unnamed.min(all - metadata) * GRANULE;
    space.metadata += metadata * GRANULE;
    // Blocks that the host has not given yet are counted as given.
    let counted = all * GRANULE;
    space.room += host.saturating_sub(counted);
    space.host += host.max(counted);
    Ok(())
}

/// Granules that the entries of an image name.
fn named(delta: &PloopDelta) -> Result<u64> {
    let (mut sum, mut at, mut runs) = (0, 0, Vec::new());
    while at < delta.size() {
        let end = at.saturating_add(WINDOW).min(delta.size());
        runs.clear();
        delta.map(at..end, &mut runs)?;
        for run in &runs {
            if let At::File(offset) = run.place {
                sum += granules_in(delta.file().as_ref(), offset..offset + run.len)?;
            }
        }
        at = end;
    }
    Ok(sum)
}

/// The space of a store. Blocks: asks for each file.
pub fn of_store(root: &Root) -> Result<StoreSpace> {
    let (store, dir) = (root.store(), root.dir());
    let part = |name: &str| of_files(store, &dir.join(name));
    let mut space = StoreSpace {
        host: of_files(store, dir)?,
        containers: part("containers")?,
        layers: of_files(store, &root.layers())?,
        templates: part("templates")?,
        work: part("tmp")?,
        other: 0,
    };
    let known = space.containers + space.layers + space.templates + space.work;
    space.other = space.host.saturating_sub(known);
    Ok(space)
}

/// Bytes that the host has given all files below `dir`; directories themselves are not counted.
fn of_files(store: &dyn Store, dir: &Path) -> Result<u64> {
    let (mut sum, mut todo) = (0, vec![dir.to_path_buf()]);
    while let Some(dir) = todo.pop() {
        let names = match store.list(&dir) {
            Ok(names) => names,
            // Removed meanwhile.
            Err(e) if e.kind() == Kind::NotFound => continue,
            Err(e) => return Err(e),
        };
        for path in names.into_iter().map(|name| dir.join(name)) {
            match store.kind(&path)? {
                Some(EntryKind::Dir) => todo.push(path),
                Some(EntryKind::File) => match store.open(&path, Access::Read) {
                    Ok(file) => sum += file.host_bytes()?,
                    Err(e) if e.kind() == Kind::NotFound => {}
                    Err(e) => return Err(e),
                },
                _ => {}
            }
        }
    }
    Ok(sum)
}
