//! Templates: sealed disks that containers are cloned from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::descriptor::{Descriptor, Guid, Volume};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, OpenOptions, Source};
use ploop::error::{Error, Kind, Result};
use ploop::format::raw::RawDelta;
use ploop::store::{Access, SECTOR};
use uuid::Uuid;

use crate::hash::Hasher;
use crate::layer::{self, NewLayer, Sealed, SealedLayer};
use crate::meta::{Meta, TemplateMeta};
use crate::place::now;
use crate::rootfs::{self, BuildOptions, RootSource};
use crate::store::{Root, Work, move_dir, write_new};
use crate::{convert, name, share, uses};

pub use crate::flatten::{Flattened, flatten};
pub use crate::hash::{Verified, verify};

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
    /// For a root filesystem: size, partition, label, quota. For a disk only `size` counts, which
    /// must be unset or no less than the disk's, and `user_quota`, which must be ext4's.
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
/// 1. in a work directory: build the filesystem, or give quota to a copy of the disk; copy it into a
///    new layer, close, sync. What is copied is hashed on its way, so verifying later compares with the source, not with what the
///    copy made of it, and nothing is read twice;
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
        created: now(),
        source: options.source_text.clone(),
        ..TemplateMeta::default()
    };
    // 1.
    let mut entries = 0;
    let from = match source {
        ImportSource::Disk(source) => {
            let disk = open_disk(root, source, options)?;
            if options.build.user_quota {
                let (disk, offset) = with_quota(root, &work, &disk, progress)?;
                meta.filesystem = Some("ext4".into());
                meta.partition_offset = offset;
                disk
            } else {
                disk
            }
        }
        ImportSource::Root(source) => {
            let room = work.path().join("build");
            root.store().create_dir(&room)?;
            let report = |p| progress(ImportStep::Build(p));
            let built = rootfs::build(source, &options.build, &room, &report)?;
            entries = built.entries;
            meta.filesystem = Some("ext4".into());
            meta.partition_offset = built.partition_offset;
            raw_disk(root, &built.image)?
        }
    };
    meta.user_quota = options.build.user_quota;
    let cluster = u64::from(options.cluster_sectors) * SECTOR;
    let size = from.size().max(options.build.size.unwrap_or(0));
    let size = size.checked_next_multiple_of(cluster);
    let size = size.ok_or_else(|| Error::invalid("the size is too large"))?;
    let layer = NewLayer::create(root, &work, options.cluster_sectors, size, None)?;
    let mut hasher = Hasher::new(size);
    let report = |done, total| progress(ImportStep::Copy(done, total));
    convert::pieces(&from, &report, &mut |offset, bytes| {
        hasher.add(offset, bytes);
        layer.disk.write(offset, bytes)
    })?;
    meta.content = Some(hasher.text());
    drop(from);
    // 2. From here on nobody may collect: the layer has a reference that no disk has yet.
    let _shared = root.lock(false)?;
    let owner = Uuid::new_v4();
    let id = layer.seal(root, owner)?;
    let image = layer::path(root, id).join(layer::IMAGE);
    let sealed = Sealed {
        shown: format!("template {name}"),
        source: self::source(root, name),
        size,
        cluster_sectors: options.cluster_sectors,
        version: layer::VERSION,
        encryption: None,
        layers: vec![SealedLayer {
            id,
            guid: Guid::from_bytes(owner.into_bytes()),
            image: image.clone(),
            limit: None,
        }],
    };
    // 3. and 4.
    if let Err(e) = publish(root, &work, name, owner, &sealed, meta) {
        if !is_free(root, name, &e) {
            return Err(e);
        }
        if let Err(left) = crate::remove::remove_layer(root, id) {
            tracing::warn!(error = %left, "a layer that nothing uses stays; it is collected later");
        }
        refuse_taken(root, name)?;
        return Err(e);
    }
    let data = data_of(root, &image)?;
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

/// A raw file as a disk.
fn raw_disk(root: &Root, image: &Path) -> Result<Disk> {
    let file = root
        .store()
        .open(&root.store().resolve(image)?, Access::Read)?;
    let chain = ploop::chain::Chain::new(vec![Arc::new(RawDelta::new(file)?)])?;
    Ok(Disk::sealed(Arc::new(chain)))
}

/// A copy of `disk` whose filesystem counts by user and group, and where that filesystem begins.
fn with_quota(
    root: &Root,
    work: &Work<'_>,
    disk: &Disk,
    progress: &dyn Fn(ImportStep),
) -> Result<(Disk, u64)> {
    let image = work.path().join("quota.raw");
    let file = root.store().create(&image, 0o600)?;
    file.set_len(disk.size())?;
    let report = |done, total| progress(ImportStep::Copy(done, total));
    // Only for the tools, by way of the page cache: what is to last is copied from it.
    convert::copy_to_file(disk, file.as_ref(), &report)?;
    let offset = rootfs::add_quota(&image)?;
    Ok((raw_disk(root, &image)?, offset))
}

/// The last steps of making a template: `sealed` is referred to by `owner` and durable.
fn publish(
    root: &Root,
    work: &Work<'_>,
    name: &str,
    owner: Uuid,
    sealed: &Sealed,
    template: TemplateMeta,
) -> Result<()> {
    let store = root.store();
    let dir = work.path().join("disk");
    store.create_dir(&dir)?;
    write_new(store, &dir.join(DESCRIPTOR), &describe(sealed)?.to_xml())?;
    let mut meta = Meta {
        id: Some(owner.to_string()),
        template: Some(template),
        sizes: sealed.limits(),
        ..Meta::default()
    };
    // The uppermost layer is the template's top.
    if sealed.shows() < sealed.size {
        meta.sizes
            .insert(layer::named(sealed.top()?.id), sealed.shows());
    }
    // Last: it makes all names in the directory durable, the descriptor's too.
    meta.write(store, &dir)?;
    // COMMIT
    move_dir(store, &dir, &root.template(name))
}

/// The descriptor of a template on `sealed`.
pub(crate) fn describe(sealed: &Sealed) -> Result<Descriptor> {
    let mut d = sealed.describe(sealed.size, None)?;
    d.volume = Some(Volume {
        read_only: true,
        ..Volume::default()
    });
    d.check()?;
    Ok(d)
}

/// True unless a template of that name may be there: then its references and layers must stay.
fn is_free(root: &Root, name: &str, e: &Error) -> bool {
    let there = root.store().kind(&root.template(name));
    e.kind() == Kind::Exists || there.is_ok_and(|kind| kind.is_none())
}

/// Makes template `name` from a snapshot of a container, at once: it stands on the snapshot's
/// layers, and nothing is copied or read. Durable on return.
///
/// 1. the snapshot's images become layers of the store ([`share::share`]);
/// 2. references to them; in a work directory the descriptor and metadata, durable;
/// 3. COMMIT: the directory is renamed to `templates/NAME`, durable.
///
/// Cut before 3: no template, and references that are collected later. Errors: `Exists`, `NotFound`,
/// and those of [`share::share`]; `InUse` while another process serves the container and the
/// snapshot is not shared yet.
pub fn from_snapshot(root: &Root, name: &str, container: &str, snapshot: &str) -> Result<Imported> {
    name::check(name)?;
    refuse_taken(root, name)?;
    // 1.
    let lock = root.lock(false)?;
    let sealed = share::snapshot(root, container, snapshot, &lock)?;
    let origin = uses::of(root, &root.container(container), false)?;
    let below = template_below(root, &sealed)?;
    let meta = TemplateMeta {
        created: now(),
        source: sealed.shown.clone(),
        origin: origin.ids.iter().next().map(Uuid::to_string),
        filesystem: below.filesystem,
        partition_offset: below.partition_offset,
        user_quota: below.user_quota,
        ..TemplateMeta::default()
    };
    // 2.
    let owner = Uuid::new_v4();
    let refer = || -> Result<()> {
        for l in &sealed.layers {
            layer::refer(root, l.id, owner)?;
        }
        for l in &sealed.layers {
            layer::sync_references(root, l.id)?;
        }
        Ok(())
    };
    // 3.
    let work = root.work()?;
    let made = refer().and_then(|()| publish(root, &work, name, owner, &sealed, meta));
    if let Err(e) = made {
        if is_free(root, name, &e) {
            for l in &sealed.layers {
                if let Err(left) = layer::release(root, l.id, owner) {
                    tracing::warn!(error = %left, "a reference to a layer stays until collected");
                }
            }
            refuse_taken(root, name)?;
        }
        return Err(e);
    }
    let data = sealed.layers.iter().map(|l| data_of(root, &l.image));
    Ok(Imported {
        dir: root.template(name),
        size: sealed.shows(),
        data: data.sum::<Result<u64>>()?,
        entries: 0,
    })
}

/// What is known of the uppermost template that a chain stands on.
fn template_below(root: &Root, sealed: &Sealed) -> Result<TemplateMeta> {
    let mut found = TemplateMeta::default();
    let mut height = 0;
    for t in uses::scan(root)?.into_iter().filter(|t| t.is_template) {
        let (name, uses) = (t.name(), t.uses);
        // A damaged template has nothing to tell.
        let (Ok(uses), Ok(template)) = (uses, open(root, &name)) else {
            continue;
        };
        let top = template.top()?.id;
        let at = sealed.layers.iter().position(|l| l.id == top);
        if let (Some(at), Some(meta)) = (at, uses.meta.template)
            && at >= height
        {
            (found, height) = (meta, at);
        }
    }
    Ok(found)
}

/// A template's directory. Error: `NotFound`.
pub(crate) fn checked(root: &Root, name: &str) -> Result<PathBuf> {
    name::check(name)?;
    let dir = root.template(name);
    if root.store().kind(&dir)?.is_some() {
        return Ok(dir);
    }
    let what = format!("there is no template {name}");
    Err(Error::new(Kind::NotFound, what)
        .on(dir)
        .fix("`ploop template list` shows what there is"))
}

/// Reads a template: its descriptor and the headers of its layers. Error: `NotFound`.
pub(crate) fn open(root: &Root, name: &str) -> Result<Sealed> {
    let dir = checked(root, name)?;
    let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
    let shown = format!("template {name}");
    Sealed::read(root, &dir, &d, d.top, shown, source(root, name))
}

/// The id of a template from before there were ids in the metadata: its base's GUID.
pub(crate) fn old_id(d: &Descriptor) -> Uuid {
    let base = d.images.first().map_or(Guid::NONE, |i| i.guid);
    Uuid::from_bytes(*base.as_bytes())
}

/// The source that opens a template read-only.
pub fn source(root: &Root, name: &str) -> Source {
    Source {
        path: root.template(name).join(DESCRIPTOR),
        descriptor: true,
        snapshot: None,
    }
}

/// Bytes of an image file that hold data (holes left out).
pub(crate) fn data_of(root: &Root, image: &Path) -> Result<u64> {
    ploop::disk::info::data_bytes(root.store().open(image, Access::Read)?.as_ref())
}
