//! What was received becomes a container.

use std::collections::BTreeMap;
use std::path::Path;

use ploop::descriptor::{Descriptor, Guid, ImageKind, Temporary};
use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::create;
use ploop::owner::{Owner, Record};
use ploop::store::SECTOR;
use uuid::Uuid;

use super::manifest::{Base, Image, Manifest, What};
use crate::layer::{self, Sealed};
use crate::meta::{Meta, SnapshotMeta};
use crate::store::{Root, remove_tree, sync_moves, write_new};

/// The base's file; the others' begin with it.
const BASE: &str = "root.hds";

/// Refuses a name that a container has. Error: `Exists`.
pub(super) fn refuse_taken(root: &Root, name: &str) -> Result<()> {
    let target = root.container(name);
    if root.store().kind(&target)?.is_none() {
        return Ok(());
    }
    let what = format!("there is a container {name} already");
    Err(Error::new(Kind::Exists, what).on(target).fix(format!(
        "Choose another name, or remove it: ploop rm {name}"
    )))
}

/// Makes container `name` of the images in `room`, which are durable. Gives what it shows in bytes,
/// the snapshot of a stream of one, and that the container shows it.
///
/// 1. references to the layers that it stands on, durable;
/// 2. in `room`: the images under a second name each, a top on a single state, metadata, descriptor;
///    durable. Cut here, the room is as it was;
/// 3. COMMIT: the directory is renamed to `containers/NAME`, durable.
pub(super) fn container(
    root: &Root,
    name: &str,
    room: &Path,
    manifest: &Manifest,
    hashes: &[String],
    arriving: Option<&Record>,
) -> Result<(u64, Option<String>, bool)> {
    let lock = root.lock(false)?;
    refuse_taken(root, name)?;
    let below = match &manifest.disk.base {
        Some(Base::Template { content, size }) => {
            Some(super::base::find(root, manifest, content, *size)?)
        }
        _ => None,
    };
    let made = Made {
        root,
        manifest,
        arriving,
        below,
        id: Uuid::new_v4(),
        top: format!("{BASE}.{}", Guid::new_v4()),
    };
    let dir = room.join("disk");
    let done = made.write(room, &dir, hashes).and_then(|()| {
        // 3. COMMIT
        let target = root.container(name);
        root.store().rename_new(&dir, &target)?;
        Ok(sync_moves(
            root.store(),
            room,
            &root.dir().join("containers"),
        ))
    });
    match done {
        // It is there; whether for good is not known.
        Ok(synced) => synced?,
        Err(e) => {
            made.release();
            return Err(match e.kind() {
                Kind::Exists => refuse_taken(root, name).err().unwrap_or(e),
                _ => e,
            });
        }
    }
    drop(lock);
    let last = manifest.images.last();
    let size = last.map_or(0, |i| i.limit.unwrap_or(i.size));
    let state = last.filter(|_| manifest.disk.what == What::State);
    Ok((size, state.map(|i| i.guid.clone()), true))
}

struct Made<'a> {
    root: &'a Root,
    manifest: &'a Manifest,
    /// It is this service's only when a move says so.
    arriving: Option<&'a Record>,
    below: Option<Sealed>,
    id: Uuid,
    /// The file of the top.
    top: String,
}

impl Made<'_> {
    /// Steps 1 and 2.
    fn write(&self, room: &Path, dir: &Path, hashes: &[String]) -> Result<()> {
        let store = self.root.store();
        let layers = self.below.iter().flat_map(|b| &b.layers);
        for layer in layers.clone() {
            layer::refer(self.root, layer.id, self.id)?;
        }
        for layer in layers {
            layer::sync_references(self.root, layer.id)?;
        }
        let d = self.describe()?;
        let side = dir.join(".ploop");
        // Of a try that was cut.
        remove_tree(store, dir)?;
        store.create_dir(dir)?;
        store.create_dir(&side)?;
        for (n, image) in self.manifest.images.iter().enumerate() {
            store.hard_link(&room.join(n.to_string()), &dir.join(self.file(n, image)))?;
        }
        if self.manifest.disk.what == What::State {
            let image = self.last()?;
            let header = image.header(self.manifest.disk.cluster_sectors)?;
            drop(create(store, &dir.join(&self.top), &header, 0o600)?);
        }
        drop(store.create(&side.join("lock"), 0o600)?);
        if let Some(record) = self.arriving {
            drop(Owner::write(store, dir, record.clone())?);
        }
        write_new(store, &Meta::path(dir), &self.meta(hashes)?.to_json()?)?;
        write_new(store, &dir.join(DESCRIPTOR), &d.to_xml())?;
        store.sync_dir(&side)?;
        store.sync_dir(dir)
    }

    fn last(&self) -> Result<&Image> {
        let none = || Error::corrupt("the stream has no images");
        self.manifest.images.last().ok_or_else(none)
    }

    fn file(&self, n: usize, image: &Image) -> String {
        match (n, &self.below) {
            (0, None) => BASE.to_owned(),
            _ if image.guid == Guid::TOP.to_string() => self.top.clone(),
            _ => format!("{BASE}.{}", image.guid),
        }
    }

    fn describe(&self) -> Result<Descriptor> {
        let disk = &self.manifest.disk;
        let size = self.last()?.size;
        let mut nodes = Vec::new();
        for (n, image) in self.manifest.images.iter().enumerate() {
            let parent = match &image.parent {
                Some(parent) => Some(Guid::parse(parent)?),
                None => match &self.below {
                    Some(below) => Some(below.top()?.guid),
                    None => None,
                },
            };
            nodes.push((Guid::parse(&image.guid)?, parent, self.file(n, image)));
        }
        if disk.what == What::State {
            let on = Guid::parse(&self.last()?.guid)?;
            nodes.push((Guid::TOP, Some(on), self.top.clone()));
        }
        let marked: Vec<Guid> = self
            .manifest
            .images
            .iter()
            .filter(|i| i.temporary)
            .map(|i| Guid::parse(&i.guid))
            .collect::<Result<_>>()?;
        let mut nodes = nodes.into_iter();
        let mut d = match &self.below {
            Some(below) => below.describe(size, None)?,
            None => {
                let none = || Error::corrupt("the stream has no images");
                let (guid, _, file) = nodes.next().ok_or_else(none)?;
                Descriptor::new_single(size / SECTOR, disk.cluster_sectors, false, guid, file)?
            }
        };
        for (guid, parent, file) in nodes {
            let parent = parent.unwrap_or(Guid::NONE);
            d.push_node(guid, parent, ImageKind::Compressed, file);
        }
        for guid in marked {
            if let Some(shot) = d.shot_mut(guid) {
                shot.temporary = Temporary::Temporary;
            }
        }
        d.top = Guid::TOP;
        d.check()?;
        Ok(d)
    }

    fn meta(&self, hashes: &[String]) -> Result<Meta> {
        let disk = &self.manifest.disk;
        let mut meta = Meta {
            id: Some(self.id.to_string()),
            quota: disk.quota,
            limits: disk.limits.clone(),
            sizes: match &self.below {
                Some(below) => below.limits(),
                None => BTreeMap::new(),
            },
            ..Meta::default()
        };
        for (n, image) in self.manifest.images.iter().enumerate() {
            let is_top = image.guid == Guid::TOP.to_string();
            let key = if is_top {
                self.file(n, image)
            } else {
                guid_key(image)?
            };
            if let Some(limit) = image.limit {
                meta.sizes.insert(key.clone(), limit);
            }
            let mut known = image
                .meta
                .as_ref()
                .map(SnapshotMeta::from)
                .unwrap_or_default();
            known.content = hashes.get(n).filter(|_| shows_itself(disk, image)).cloned();
            if !is_top && known != SnapshotMeta::default() {
                meta.snapshots.insert(key, known);
            }
        }
        let last = self.last()?;
        if let (What::State, Some(limit)) = (disk.what, last.limit) {
            meta.sizes.insert(self.top.clone(), limit);
        }
        Ok(meta)
    }

    /// Gives up the references of a container that is not there.
    fn release(&self) {
        for layer in self.below.iter().flat_map(|b| &b.layers) {
            if let Err(e) = layer::release(self.root, layer.id, self.id) {
                tracing::warn!(error = %e, "a reference to a layer stays; it is collected later");
            }
        }
    }
}

/// The GUID of an image as metadata spells it.
pub(super) fn guid_key(image: &Image) -> Result<String> {
    Ok(Guid::parse(&image.guid)?.to_string())
}

/// True when the hash of the image is that of what its node shows.
fn shows_itself(disk: &super::Disk, image: &Image) -> bool {
    disk.base.is_none() && image.parent.is_none() && image.limit.is_none()
}
