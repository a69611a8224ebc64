//! Templates: sealed disks that containers are cloned from.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ploop::descriptor::{Descriptor, Guid, Volume};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, OpenOptions, Source};
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::{PloopDelta, Version};
use ploop::format::{Delta, raw::RawDelta};
use ploop::store::{Access, SECTOR};
use uuid::Uuid;

use crate::layer::{self, IMAGE, NewLayer};
use crate::meta::{Meta, TemplateMeta};
use crate::rootfs::{self, BuildOptions, RootSource};
use crate::store::{Root, Work, move_dir, write_new};
use crate::{convert, name};

/// Cluster size of new templates in sectors: 64 KiB. Every first write to a cluster of a clone
/// copies the cluster, so small ones win until that copy is gone.
pub const DEFAULT_CLUSTER_SECTORS: u32 = 128;

/// What a template is made from.
#[derive(Clone, Debug)]
pub enum ImportSource {
    /// A root filesystem: a directory, or a tar archive (plain, gzip, zstd).
    Root(RootSource),
    /// A disk: an image or a disk directory.
    Disk(Source),
}

/// How a template is made.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// Cluster size in sectors; a power of two from 64 to 131072.
    pub cluster_sectors: u32,
    /// For a root filesystem: size, partition, label. For a disk only `size` counts, and must be
    /// unset or no less than the disk's.
    pub build: BuildOptions,
    /// For a disk: how to open it.
    pub open: OpenOptions,
    /// The source as the user wrote it.
    pub source_text: String,
}

/// A template that was made.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Its directory.
    pub dir: PathBuf,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of data in its layer.
    pub data: u64,
    /// Files and directories that came from a root filesystem.
    pub entries: u64,
}

/// What an import reports while it works.
#[derive(Clone, Copy, Debug)]
pub enum ImportStep {
    /// The filesystem is being built.
    Build(rootfs::Progress),
    /// The disk is copied into the layer: bytes done, bytes in total.
    Copy(u64, u64),
}

/// Makes template `name`. Durable on return.
///
/// 1. in a work directory: build the filesystem, copy it into a new layer, close, sync;
/// 2. move the layer to `layers/UUID`, with the template's reference in it, durable;
/// 3. in the work directory: the descriptor and metadata, durable;
/// 4. COMMIT: the directory is renamed to `templates/NAME`, durable.
///
/// Cut before 4: no template; work and layer are collected later. On error nothing is left.
pub fn import(
    root: &Root,
    name: &str,
    source: &ImportSource,
    options: &ImportOptions,
    progress: &dyn Fn(ImportStep),
) -> Result<Imported> {
    name::check(name)?;
    refuse_taken(root, name)?;
    let work = {
        let _alone = root.lock(true)?;
        root.collect_tmp()?;
        root.work()?
    };
    let mut meta = TemplateMeta {
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs()),
        source: options.source_text.clone(),
        ..TemplateMeta::default()
    };
    // 1.
    let mut entries = 0;
    let from = match source {
        ImportSource::Disk(source) => open_disk(root, source, options)?,
        ImportSource::Root(source) => {
            let room = work.path().join("build");
            root.store().create_dir(&room)?;
            let report = |p| progress(ImportStep::Build(p));
            let built = rootfs::build(source, &options.build, &room, &report)?;
            entries = built.entries;
            meta.filesystem = Some("ext4".into());
            meta.partition_offset = built.partition_offset;
            let file = root
                .store()
                .open(&root.store().resolve(&built.image)?, Access::Read)?;
            let chain = ploop::chain::Chain::new(vec![Arc::new(RawDelta::new(file)?)])?;
            Disk::sealed(Arc::new(chain))
        }
    };
    let cluster = u64::from(options.cluster_sectors) * SECTOR;
    let size = from.size().max(options.build.size.unwrap_or(0));
    let size = size.checked_next_multiple_of(cluster);
    let size = size.ok_or_else(|| Error::invalid("the size is too large"))?;
    let layer = NewLayer::create(root, &work, options.cluster_sectors, size, None)?;
    convert::copy(&from, &layer.disk, &|done, total| {
        progress(ImportStep::Copy(done, total))
    })?;
    drop(from);
    // 2. From here on nobody may collect: the layer has a reference that no disk has yet.
    let _shared = root.lock(false)?;
    let owner = Uuid::new_v4();
    let id = layer.seal(root, owner)?;
    let made = publish(
        root,
        &work,
        name,
        id,
        owner,
        size,
        options.cluster_sectors,
        meta,
    );
    if let Err(e) = made {
        let free = root.store().kind(&root.template(name));
        if e.kind() != Kind::Exists && !free.is_ok_and(|kind| kind.is_none()) {
            // It was renamed, and may stay so: its layer must.
            return Err(e);
        }
        if let Err(left) = crate::remove::remove_layer(root, id) {
            tracing::warn!(error = %left, "a layer that nothing uses stays; it is collected later");
        }
        refuse_taken(root, name)?;
        return Err(e);
    }
    let data = layer_data(root, id)?;
    Ok(Imported {
        dir: root.template(name),
        size,
        data,
        entries,
    })
}

fn refuse_taken(root: &Root, name: &str) -> Result<()> {
    let dir = root.template(name);
    if root.store().kind(&dir)?.is_none() {
        return Ok(());
    }
    let fix = format!("Remove it first: ploop template rm {name}");
    let what = format!("there is a template {name} already");
    Err(Error::new(Kind::Exists, what).on(dir).fix(fix))
}

fn open_disk(root: &Root, source: &Source, options: &ImportOptions) -> Result<Disk> {
    let open = OpenOptions {
        alone: true,
        write: false,
        ..options.open.clone()
    };
    let disk = root.opener().open(source, &open)?;
    if options.build.size.is_some_and(|s| s < disk.size()) {
        let what = format!(
            "the disk has {} bytes, more than the size asked for",
            disk.size()
        );
        return Err(Error::invalid(what).on(&source.path));
    }
    Ok(disk)
}

#[expect(
    clippy::too_many_arguments,
    reason = "one caller, and each is one fact"
)]
fn publish(
    root: &Root,
    work: &Work<'_>,
    name: &str,
    id: Uuid,
    owner: Uuid,
    size: u64,
    cluster_sectors: u32,
    meta: TemplateMeta,
) -> Result<()> {
    let store = root.store();
    // 3.
    let dir = work.path().join("disk");
    store.create_dir(&dir)?;
    let file = format!("../../layers/{id}/{IMAGE}");
    let guid = Guid::from_bytes(owner.into_bytes());
    let mut d = Descriptor::new_single(size / SECTOR, cluster_sectors, false, guid, file)?;
    d.volume = Some(Volume {
        read_only: true,
        ..Volume::default()
    });
    d.check()?;
    write_new(store, &dir.join(DESCRIPTOR), &d.to_xml())?;
    Meta {
        template: Some(meta),
    }
    .write_new(store, &dir)?;
    store.sync_dir(&dir)?;
    // 4. COMMIT
    move_dir(store, &dir, &root.template(name))
}

/// One layer of a template's chain.
#[derive(Clone, Debug)]
pub(crate) struct TemplateLayer {
    pub(crate) id: Uuid,
    pub(crate) guid: Guid,
    pub(crate) image: PathBuf,
}

/// A template as a clone sees it.
#[derive(Clone, Debug)]
pub(crate) struct TemplateDisk {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) cluster_sectors: u32,
    pub(crate) version: Version,
    /// Base first.
    pub(crate) layers: Vec<TemplateLayer>,
}

/// Reads a template: its descriptor and the headers of its layers. Error: `NotFound`.
pub(crate) fn open(root: &Root, name: &str) -> Result<TemplateDisk> {
    name::check(name)?;
    let dir = root.template(name);
    if root.store().kind(&dir)?.is_none() {
        let what = format!("there is no template {name}");
        return Err(Error::new(Kind::NotFound, what)
            .on(dir)
            .fix("`ploop template list` shows what there is"));
    }
    let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
    let mut disk = TemplateDisk {
        name: name.to_owned(),
        size: 0,
        cluster_sectors: d.cluster_sectors,
        version: crate::clone::LAYER_VERSION,
        layers: Vec::new(),
    };
    for image in d.chain(d.top)? {
        let path = root.store().resolve(&dir.join(&image.file))?;
        let id = layer::id_of(root, &path)?;
        let delta = PloopDelta::open(root.store().open(&path, Access::Read)?)?;
        disk.size = delta.size();
        disk.version = delta.header().version;
        disk.layers.push(TemplateLayer {
            id,
            guid: image.guid,
            image: path,
        });
    }
    Ok(disk)
}

/// The source that opens a template read-only.
pub fn source(root: &Root, name: &str) -> Source {
    Source {
        path: root.template(name).join(DESCRIPTOR),
        descriptor: true,
        snapshot: None,
    }
}

fn layer_data(root: &Root, id: Uuid) -> Result<u64> {
    data_of(root, &layer::path(root, id).join(IMAGE))
}

/// Bytes of an image file that hold data (holes left out).
pub(crate) fn data_of(root: &Root, image: &Path) -> Result<u64> {
    ploop::disk::info::data_bytes(root.store().open(image, Access::Read)?.as_ref())
}
