//! `ploop export` to a disk directory: a disk that needs nothing of this store any more.
//!
//! ```text
//!  DIR/DiskDescriptor.xml      DIR/root.hds (a base)      DIR/root.hds.{GUID} (the others)
//! ```
//!
//! Without a node: the whole tree. With one: the disk as it was at the instant of that snapshot.
//! The image that is the snapshot now was the top then, so it is the top again, and there is no empty
//! delta on it: the directory has one image per ancestor, as an OpenVZ operator would have got by
//! copying the stopped container at that time. Snapshots below it keep their GUIDs, and their names
//! in `.ploop/meta.json`, which other tools do not look at.
//!
//! Layers and parent volumes are copied like the rest, holes stay holes, and every path is a plain
//! name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::descriptor::{Descriptor, Encryption, Guid, Image, ImageKind, Temporary};
use ploop::disk::info::data_bytes;
use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::top::Top;
use ploop::locks::{DiskLock, Use, lock_image};
use ploop::store::{Access, SECTOR, Store, StoreFile, Trail, read_or_zero};
use ploop::verify::{Class, class_of, scan_image};
use serde::Serialize;
use uuid::Uuid;

use crate::convert::Progress;
use crate::meta::{Meta, SnapshotMeta};
use crate::place::Place;
use crate::store::{move_dir, remove_tree, write_new};
use crate::switch::is_raw;
use crate::tree::{order, volumes};

/// The base's file; the others' begin with it.
const BASE: &str = "root.hds";
/// Bytes copied at a time.
const BUFFER: u64 = 1 << 20;
/// How often an export without the disk's lock is planned anew because the tree changed under it.
const TRIES: u32 = 10;

/// A disk directory that was made.
#[derive(Clone, Debug, Serialize)]
pub struct Exported {
    /// The directory.
    pub dir: PathBuf,
    /// Images in it.
    pub images: usize,
    /// Bytes of data in them.
    pub data: u64,
    /// Virtual size in bytes.
    pub size: u64,
}

/// Copies a disk, or what it was at snapshot `node`, to the new directory `target`. Durable on
/// return. Blocks while it copies; `progress` gets bytes of data done and total.
///
/// 1. where the top is copied: one that was not closed and has a journal is closed; the disk's lock;
///    every image is opened, and locked as by a reader,
///    so that nobody rewrites it meanwhile;
/// 2. in a directory beside the target: each image's data, synced; one that was not closed cleanly
///    is closed there; the metadata, the descriptor; the directory synced;
/// 3. COMMIT: the directory is renamed to `target`, durable.
///
/// Cut before 3: a directory `.NAME.tmp-…` is left, which nobody needs. Errors: `Exists` (target);
/// `InUse` for the top of a disk that is in use, for a snapshot that is still being sealed, and for
/// one that an unfinished merge needs; `NotFound`; `Corrupt` for an image that is damaged.
pub fn export_disk(
    place: &Place<'_>,
    node: Option<Guid>,
    target: &Path,
    progress: Progress<'_>,
) -> Result<Exported> {
    let store = place.store();
    let staged = Staged::new(store, target)?;
    let target = staged.target.as_path();
    // 1.
    let (plan, files, _held) = open(place, node)?;
    let mut total = 0;
    for file in &files {
        total += data_bytes(file.as_ref())?;
    }
    // 2.
    store.create_dir(&staged.temp)?;
    let copied = plan.write(store, &files, &staged.temp, &mut |done| {
        progress(done, total)
    });
    let exported = copied.and_then(|size| {
        // 3. COMMIT
        staged.publish(store)?;
        Ok(Exported {
            dir: target.to_path_buf(),
            images: files.len(),
            data: total,
            size,
        })
    });
    if exported.is_err()
        && let Err(e) = remove_tree(store, &staged.temp)
    {
        tracing::warn!(error = %e, "an unfinished export stays");
    }
    exported
}

fn taken(target: &Path) -> Error {
    Error::new(Kind::Exists, "there is something of that name already")
        .on(target)
        .fix("Choose another target, or remove it")
}

/// Where the directory is until it is whole.
struct Staged {
    target: PathBuf,
    temp: PathBuf,
}

impl Staged {
    fn new(store: &dyn Store, target: &Path) -> Result<Staged> {
        let name = target
            .file_name()
            .ok_or_else(|| Error::invalid("not the name of a directory").on(target))?;
        let above = target.parent().filter(|p| *p != Path::new(""));
        let target = store.resolve(above.unwrap_or(Path::new(".")))?.join(name);
        if store.kind(&target)?.is_some() {
            return Err(taken(&target));
        }
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".tmp-{}", Uuid::new_v4()));
        Ok(Staged {
            temp: target.with_file_name(hidden),
            target,
        })
    }

    fn publish(&self, store: &dyn Store) -> Result<()> {
        let moved = move_dir(store, &self.temp, &self.target);
        let Err(e) = moved else { return Ok(()) };
        if e.kind() == Kind::Exists {
            return Err(taken(&self.target));
        }
        if matches!(store.kind(&self.temp), Ok(None)) {
            // It was renamed, and whether for good is not known: nothing is what is said.
            remove_tree(store, &self.target)?;
        }
        Err(e)
    }
}

type Files = Vec<Arc<dyn StoreFile>>;

/// Step 1. What is sealed can be copied while the disk is live; should the tree change between
/// reading the descriptor and locking the last image, all of it is done again.
fn open(place: &Place<'_>, node: Option<Guid>) -> Result<(Plan, Files, Option<DiskLock>)> {
    let d = place.descriptor()?;
    let with_top = node.is_none_or(|node| node == d.top);
    let held = match with_top {
        true => {
            place.replay(&d)?;
            place.lock()?
        }
        false => None,
    };
    let mut tries = 0;
    loop {
        let d = place.descriptor()?;
        let opened = Plan::make(place, &d, node).and_then(|plan| Ok((plan.open(place)?, plan)));
        if tries < TRIES && place.descriptor()? != d {
            tries += 1;
            continue;
        }
        let (files, plan) = opened?;
        return Ok((plan, files, held));
    }
}

/// What is copied, and what it will be.
struct Plan {
    nodes: Vec<Planned>,
    cluster_sectors: u32,
    raw: bool,
    encryption: Option<Encryption>,
}

/// One image. Parents come before their children.
struct Planned {
    guid: Guid,
    parent: Guid,
    path: PathBuf,
    file: String,
    raw: bool,
    meta: Option<SnapshotMeta>,
    /// What it shows at most, if it was shrunk.
    limit: Option<u64>,
}

impl Planned {
    /// Its size limit, as the metadata of the copy has it.
    fn size(&self) -> Option<(String, u64)> {
        let key = match self.guid {
            Guid::TOP => self.file.clone(),
            guid => guid.to_string(),
        };
        Some((key, self.limit?))
    }
}

impl Plan {
    fn make(place: &Place<'_>, d: &Descriptor, node: Option<Guid>) -> Result<Plan> {
        let top = node.unwrap_or(d.top);
        let volumes = volumes(place, d, top)?;
        let mut plan = Plan {
            nodes: Vec::new(),
            cluster_sectors: d.cluster_sectors,
            raw: volumes.last().map_or(d, |v| &v.descriptor).base_is_raw(),
            encryption: d.encryption.clone(),
        };
        for volume in volumes.iter().rev() {
            let meta = Meta::read(place.store(), &volume.dir)?;
            let chain = volume.descriptor.chain(volume.node)?;
            for image in chain {
                plan.add(place, &volume.dir, &volume.descriptor, &meta, image)?;
            }
        }
        let meta = place.meta()?;
        if node.is_some() {
            for image in d.chain(top)? {
                plan.add(place, place.dir(), d, &meta, image)?;
            }
        } else {
            let images: HashMap<Guid, &Image> = d.images.iter().map(|i| (i.guid, i)).collect();
            for (guid, _) in order(d) {
                if let Some(image) = images.get(&guid) {
                    plan.add(place, place.dir(), d, &meta, image)?;
                }
            }
        }
        plan.name(top)?;
        Ok(plan)
    }

    fn add(
        &mut self,
        place: &Place<'_>,
        dir: &Path,
        d: &Descriptor,
        meta: &Meta,
        image: &Image,
    ) -> Result<()> {
        let shot = d.shot(image.guid);
        if shot.is_some_and(|s| s.temporary != Temporary::No) {
            let what = format!(
                "snapshot {} was deleted and is not merged yet: what is exported would need it",
                image.guid
            );
            return Err(Error::new(Kind::InUse, what)
                .on(dir)
                .fix("Let its merge end first"));
        }
        let file = dir.join(&image.file);
        let file = file
            .to_str()
            .ok_or_else(|| Error::invalid("not UTF-8").on(&file))?;
        let options = place.open_options(false);
        self.nodes.push(Planned {
            guid: image.guid,
            parent: shot.map_or(Guid::NONE, |s| s.parent),
            path: place.opener().confine(place.dir(), file, &options)?,
            file: String::new(),
            raw: is_raw(d, image.guid),
            meta: meta.snapshot(image.guid).cloned(),
            limit: meta.size_of(d, image.guid),
        });
        Ok(())
    }

    /// Gives each image its GUID and its file name: the usual one to the top, another to a snapshot
    /// that has the usual one (the top of a parent volume, say).
    fn name(&mut self, top: Guid) -> Result<()> {
        let mut named: HashMap<Guid, Guid> = HashMap::new();
        for node in &self.nodes {
            let new = match node.guid {
                g if g == top => Guid::TOP,
                Guid::TOP => Guid::new_v4(),
                g => g,
            };
            if named.insert(node.guid, new).is_some() {
                let what = format!("two images of the chain have the GUID {}", node.guid);
                return Err(Error::unsupported(what).on(&node.path));
            }
        }
        for (n, node) in self.nodes.iter_mut().enumerate() {
            node.guid = named.get(&node.guid).copied().unwrap_or(node.guid);
            node.parent = named.get(&node.parent).copied().unwrap_or(Guid::NONE);
            node.file = match node.guid {
                _ if n == 0 => BASE.to_owned(),
                Guid::TOP => format!("{BASE}.{}", Guid::new_v4()),
                guid => format!("{BASE}.{guid}"),
            };
        }
        Ok(())
    }

    fn open(&self, place: &Place<'_>) -> Result<Files> {
        let open = |node: &Planned| {
            place.opener().refuse_missing(&node.path)?;
            let file = place.store().open(&node.path, Access::Read)?;
            lock_image(file.as_ref(), Use::Read)?;
            let home = place.opener().home(&node.path);
            if let Some(home) = home.filter(|_| !node.raw)
                && home.is_live()?
            {
                let what = "the image was not closed, and what was flushed last is in its journal";
                let fix = match node.guid {
                    Guid::TOP => "Serve that disk once and stop the server, then export",
                    _ => "Copy what it shows: ploop convert DISK@SNAPSHOT TARGET --to ploop",
                };
                return Err(Error::new(Kind::InUse, what).on(&node.path).fix(fix));
            }
            Ok(file)
        };
        self.nodes.iter().map(open).collect()
    }

    /// Step 2. Returns the virtual size.
    fn write(
        &self,
        store: &dyn Store,
        files: &Files,
        dir: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<u64> {
        let mut done = 0;
        let mut size = 0;
        for (node, from) in self.nodes.iter().zip(files) {
            let to = store.create(&dir.join(&node.file), 0o600)?;
            copy(from.as_ref(), to.as_ref(), &mut |n| {
                done += n;
                progress(done);
            })?;
            to.sync()?;
            let own_size = match node.raw {
                true => to.len()?,
                false => {
                    let scan = scan_image(to.as_ref())?;
                    if class_of(&scan.findings) > Class::Leak {
                        mend(to)?;
                    }
                    scan.header.size()
                }
            };
            if node.guid == Guid::TOP {
                size = own_size;
            }
        }
        let meta = self.meta();
        if meta != Meta::default() {
            meta.write(store, dir)?;
        }
        write_new(store, &dir.join(DESCRIPTOR), &self.describe(size)?.to_xml())?;
        store.sync_dir(dir)?;
        let top = self.nodes.iter().find(|n| n.guid == Guid::TOP);
        Ok(top.and_then(|n| n.limit).unwrap_or(u64::MAX).min(size))
    }

    fn meta(&self) -> Meta {
        let known = self.nodes.iter().filter(|n| n.guid != Guid::TOP);
        let known = known.filter_map(|n| Some((n.guid.to_string(), n.meta.clone()?)));
        Meta {
            snapshots: known.collect(),
            sizes: self.nodes.iter().filter_map(Planned::size).collect(),
            ..Meta::default()
        }
    }

    fn describe(&self, size: u64) -> Result<Descriptor> {
        let Some((base, others)) = self.nodes.split_first() else {
            return Err(Error::corrupt("the disk has no images"));
        };
        let sectors = size / SECTOR;
        let file = base.file.clone();
        let cluster = self.cluster_sectors;
        let mut d = Descriptor::new_single(sectors, cluster, self.raw, base.guid, file)?;
        for node in others {
            let kind = match node.raw {
                true => ImageKind::Plain,
                false => ImageKind::Compressed,
            };
            d.push_node(node.guid, node.parent, kind, node.file.clone());
        }
        d.top = Guid::TOP;
        d.encryption.clone_from(&self.encryption);
        d.check()?;
        Ok(d)
    }
}

/// Closes the copy of an image that was not closed cleanly, or that has a format extension which
/// says nothing. Error: `Corrupt` for one that is damaged.
fn mend(copy: Arc<dyn StoreFile>) -> Result<()> {
    let top = Top::open(copy)?;
    top.before_change()?;
    top.close()
}

/// Copies a file's data and length; holes stay holes.
fn copy(from: &dyn StoreFile, to: &dyn StoreFile, moved: &mut dyn FnMut(u64)) -> Result<()> {
    let len = from.len()?;
    to.set_len(len)?;
    let mut buf = vec![0; BUFFER.min(len) as usize];
    let mut trail = Trail::default();
    let mut at = 0;
    while at < len
        && let Some(data) = from.next_data(at, len)?
    {
        at = data.start;
        while at < data.end {
            let n = BUFFER.min(data.end - at);
            let piece = &mut buf[..n as usize];
            read_or_zero(from, piece, at)?;
            to.write_at(piece, at)?;
            trail.wrote(to, at, n);
            at += n;
            moved(n);
        }
    }
    Ok(())
}
