//! Sealed layers: image files that any number of disks stand on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::descriptor::{Descriptor, Encryption, Guid, ImageKind};
use ploop::disk::Disk;
use ploop::disk::open::Source;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create};
use ploop::store::{Access, SECTOR};
use uuid::Uuid;

use crate::meta::Meta;
use crate::store::{Root, Work, move_dir};

/// The image's name in its layer directory.
pub(crate) const IMAGE: &str = "image.hds";

/// The version of images that we make: v2. Layers that were a container's snapshot may be v1.
pub(crate) const VERSION: Version = Version::V2;

/// A layer in the making: a writable disk over `below`, in the work directory.
pub(crate) struct NewLayer {
    id: Uuid,
    dir: PathBuf,
    /// What to fill.
    pub(crate) disk: Disk,
}

impl NewLayer {
    /// An empty image of `size` bytes (a multiple of the cluster) in `work`.
    pub(crate) fn create(
        root: &Root,
        work: &Work<'_>,
        cluster_sectors: u32,
        size: u64,
        below: Option<Arc<Chain>>,
    ) -> Result<NewLayer> {
        let header = Header::new(VERSION, cluster_sectors, size / SECTOR)?;
        NewLayer::with_header(root, work, &header, below)
    }

    /// An empty image with `header`.
    pub(crate) fn with_header(
        root: &Root,
        work: &Work<'_>,
        header: &Header,
        below: Option<Arc<Chain>>,
    ) -> Result<NewLayer> {
        let store = root.store();
        let dir = work.path().join("layer");
        make_rooms(root, &dir)?;
        // Sealed from birth: only this open file can write it.
        let file = create(store, &dir.join(IMAGE), header, 0o400)?;
        let disk = Disk::writable(below, Top::open(file)?, None)?;
        Ok(NewLayer {
            id: Uuid::new_v4(),
            dir,
            disk,
        })
    }

    /// Closes the image and moves the layer into the store with a reference from `owner`; both are
    /// durable on return. Until something durable names it, it is garbage for [`collect`].
    ///
    /// [`collect`]: crate::remove::collect
    pub(crate) fn seal(self, root: &Root, owner: Uuid) -> Result<Uuid> {
        self.disk.close()?;
        drop(self.disk);
        publish(root, &self.dir, self.id, owner)?;
        Ok(self.id)
    }
}

/// Makes a layer's directory with all that is in it besides the image.
pub(crate) fn make_rooms(root: &Root, dir: &Path) -> Result<()> {
    for room in [dir.to_path_buf(), dir.join("refs"), dir.join("grown")] {
        root.store().create_dir(&room)?;
    }
    Ok(())
}

/// Moves a layer whose image is durable from a work directory into the store, with a reference from
/// `owner`; durable on return.
pub(crate) fn publish(root: &Root, dir: &Path, id: Uuid, owner: Uuid) -> Result<()> {
    let store = root.store();
    // The name is all there is to a reference.
    drop(store.create(&dir.join("refs").join(owner.to_string()), 0o600)?);
    store.sync_dir(&dir.join("refs"))?;
    store.sync_dir(dir)?;
    move_dir(store, dir, &path(root, id))
}

/// The directory of a layer.
pub(crate) fn path(root: &Root, id: Uuid) -> PathBuf {
    root.layers().join(id.to_string())
}

/// A layer's image, as a descriptor of a disk of the store names it.
pub(crate) fn named(id: Uuid) -> String {
    format!("../../layers/{id}/{IMAGE}")
}

/// The layer that a resolved image file is in; `None` for a file anywhere else.
pub(crate) fn of(root: &Root, image: &Path) -> Option<Uuid> {
    let dir = image.parent()?;
    if dir.parent() != Some(&root.layers()) {
        return None;
    }
    Uuid::parse_str(dir.file_name()?.to_str()?).ok()
}

/// Adds a reference; one that is there already is fine. Not durable before [`sync_references`].
pub(crate) fn refer(root: &Root, layer: Uuid, owner: Uuid) -> Result<()> {
    let file = path(root, layer).join("refs").join(owner.to_string());
    match root.store().create(&file, 0o600) {
        Err(e) if e.kind() != Kind::Exists => Err(e),
        _ => Ok(()),
    }
}

/// Makes the references to a layer durable.
pub(crate) fn sync_references(root: &Root, layer: Uuid) -> Result<()> {
    root.store().sync_dir(&path(root, layer).join("refs"))
}

/// Drops a reference; one that is not there is fine.
pub(crate) fn release(root: &Root, layer: Uuid, owner: Uuid) -> Result<()> {
    let file = path(root, layer).join("refs").join(owner.to_string());
    match root.store().remove_file(&file) {
        Err(e) if e.kind() != Kind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The names of the references to `layer`. None where a crash left half of a layer that was being
/// removed.
pub(crate) fn reference_names(root: &Root, layer: Uuid) -> Result<Vec<PathBuf>> {
    match root.store().list(&path(root, layer).join("refs")) {
        Err(e) if e.kind() == Kind::NotFound => Ok(Vec::new()),
        names => names,
    }
}

/// How many disks and layers stand on `layer`.
pub(crate) fn references(root: &Root, layer: Uuid) -> Result<usize> {
    Ok(reference_names(root, layer)?.len())
}

/// One layer of a [`Sealed`] chain.
#[derive(Clone, Debug)]
pub(crate) struct SealedLayer {
    pub(crate) id: Uuid,
    /// Its node's name, in every tree that it is in.
    pub(crate) guid: Guid,
    pub(crate) image: PathBuf,
    /// What it shows at most, if it was shrunk.
    pub(crate) limit: Option<u64>,
}

/// A chain of layers: what a template is, what a shared snapshot is, and what is cloned.
#[derive(Clone, Debug)]
pub(crate) struct Sealed {
    /// How people call it.
    pub(crate) shown: String,
    /// What opens it.
    pub(crate) source: Source,
    /// Virtual size of its images in bytes; [`Sealed::shows`] may be less.
    pub(crate) size: u64,
    pub(crate) cluster_sectors: u32,
    pub(crate) version: Version,
    pub(crate) encryption: Option<Encryption>,
    /// Base first; never empty.
    pub(crate) layers: Vec<SealedLayer>,
}

impl Sealed {
    /// Reads the chain of `node` of the disk in `dir`, whose descriptor is `d`. Error: `Corrupt`
    /// when an image of it is none of the store's layers.
    pub(crate) fn read(
        root: &Root,
        dir: &Path,
        d: &Descriptor,
        node: Guid,
        shown: String,
        source: Source,
    ) -> Result<Sealed> {
        let mut sealed = Sealed {
            shown,
            source,
            size: 0,
            cluster_sectors: d.cluster_sectors,
            version: VERSION,
            encryption: d.encryption.clone(),
            layers: Vec::new(),
        };
        let meta = Meta::read(root.store(), dir)?;
        for image in d.chain(node)? {
            let path = root.store().resolve(&dir.join(&image.file))?;
            let id = of(root, &path).ok_or_else(|| {
                let what = "an image of a sealed chain is not in the store's layers";
                Error::new(Kind::Corrupt, what).on(&path)
            })?;
            let (header, _) = read_header(root.store().open(&path, Access::Read)?.as_ref())?;
            sealed.size = header.size();
            sealed.version = header.version;
            sealed.layers.push(SealedLayer {
                id,
                guid: image.guid,
                image: path,
                limit: meta.size_of(d, image.guid),
            });
        }
        Ok(sealed)
    }

    /// What it shows as its size, in bytes.
    pub(crate) fn shows(&self) -> u64 {
        let limit = self.layers.last().and_then(|l| l.limit);
        limit.unwrap_or(u64::MAX).min(self.size)
    }

    /// The size limits of its layers, as the metadata of a disk on them has them.
    pub(crate) fn limits(&self) -> BTreeMap<String, u64> {
        let limits = self.layers.iter().filter_map(|l| Some((l.guid, l.limit?)));
        limits.map(|(g, bytes)| (g.to_string(), bytes)).collect()
    }

    /// The uppermost layer.
    pub(crate) fn top(&self) -> Result<&SealedLayer> {
        let none = || Error::new(Kind::Corrupt, format!("{} has no layer", self.shown));
        self.layers.last().ok_or_else(none)
    }

    /// The descriptor of a disk of `size` bytes on this chain: with a top of its own in
    /// `top_file`, or with the uppermost layer for its top.
    pub(crate) fn describe(&self, size: u64, top_file: Option<&str>) -> Result<Descriptor> {
        let mut nodes: Vec<(Guid, String)> =
            self.layers.iter().map(|l| (l.guid, named(l.id))).collect();
        nodes.extend(top_file.map(|file| (Guid::TOP, file.to_owned())));
        let mut nodes = nodes.into_iter();
        let none = || Error::new(Kind::Corrupt, format!("{} has no layer", self.shown));
        let (mut parent, file) = nodes.next().ok_or_else(none)?;
        let sectors = size / SECTOR;
        let mut d = Descriptor::new_single(sectors, self.cluster_sectors, false, parent, file)?;
        for (guid, file) in nodes {
            d.push_node(guid, parent, ImageKind::Compressed, file);
            parent = guid;
        }
        d.top = parent;
        d.encryption = self.encryption.clone();
        d.check()?;
        Ok(d)
    }
}
