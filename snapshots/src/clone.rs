//! `ploop create`: a container from a template. One small image and a descriptor.

use std::path::{Path, PathBuf};

use ploop::descriptor::{Descriptor, Guid, Image, ImageKind, Shot, Temporary};
use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::SECTOR;
use uuid::Uuid;

use crate::layer;
use crate::store::{Root, move_dir};
use crate::template::{self, TemplateDisk};
use crate::{grow, name};

/// How a container is made.
#[derive(Clone, Debug, Default)]
pub struct CreateOptions {
    /// Virtual size in bytes, rounded up to a whole cluster; the template's when not given.
    pub size: Option<u64>,
}

/// A container that was made.
#[derive(Clone, Debug)]
pub struct Created {
    /// Its directory.
    pub dir: PathBuf,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of the layer that holds the grown partition and filesystem, when the size needed one;
    /// shared by all containers of that template and size.
    pub grown: Option<grow::Grown>,
}

/// Makes container `name` from template `template`. Durable on return.
///
/// 1. references to the template's layers; in a work directory: the descriptor, the top image;
/// 2. make them durable. Everything is written before the first sync, so that a journaling file
///    system needs few commits for all of it;
/// 3. COMMIT: the directory is renamed to `containers/NAME`, durable.
///
/// Cut before 3: there is no container, and a reference or a work directory that is collected
/// later. Errors: `NotFound` (template), `Exists`, `Invalid` (name; size below the template's).
pub fn create_container(
    root: &Root,
    name: &str,
    template: &str,
    options: &CreateOptions,
    progress: &dyn Fn(u64, u64),
) -> Result<Created> {
    name::check(name)?;
    let target = root.container(name);
    let taken = || {
        let what = format!("there is a container {name} already");
        Err(Error::new(Kind::Exists, what)
            .on(&target)
            .fix(format!("Remove it: ploop rm {name}")))
    };
    if root.store().kind(&target)?.is_some() {
        return taken();
    }
    let _shared = root.lock(false)?;
    let mut disk = template::open(root, template)?;
    let size = wanted_size(&disk, options.size)?;
    let owner = Uuid::new_v4();
    let grown = match size > disk.size {
        true => grow::layer_for(root, &mut disk, size, owner, progress)?,
        false => None,
    };
    let made = build(root, &disk, size, owner, &target);
    if let Err(e) = made {
        let free = root.store().kind(&target);
        if e.kind() != Kind::Exists && !free.is_ok_and(|kind| kind.is_none()) {
            // It was renamed, and may stay so: its references must.
            return Err(e);
        }
        for l in &disk.layers {
            if let Err(e) = layer::release(root, l.id, owner) {
                tracing::warn!(error = %e, "a reference to a layer stays; it is collected later");
            }
        }
        return match e.kind() {
            Kind::Exists if root.store().kind(&target)?.is_some() => taken(),
            _ => Err(e),
        };
    }
    Ok(Created {
        dir: target,
        size,
        grown,
    })
}

fn wanted_size(disk: &TemplateDisk, size: Option<u64>) -> Result<u64> {
    let Some(size) = size else {
        return Ok(disk.size);
    };
    if size < disk.size {
        return Err(Error::invalid(format!(
            "{size} bytes is less than the template's {}: a disk cannot be smaller than what it is \
             cloned from",
            disk.size
        )));
    }
    let cluster = u64::from(disk.cluster_sectors) * SECTOR;
    size.checked_next_multiple_of(cluster)
        .ok_or_else(|| Error::invalid("the size is too large"))
}

fn build(root: &Root, disk: &TemplateDisk, size: u64, owner: Uuid, target: &Path) -> Result<()> {
    let store = root.store();
    let version = disk.version;
    let header = Header::new(version, disk.cluster_sectors, size / SECTOR)?;
    let file = format!("root.hds.{}", Guid::from_bytes(owner.into_bytes()));
    let descriptor = describe(disk, size, &file)?;
    // 1.
    for l in &disk.layers {
        layer::refer(root, l.id, owner)?;
    }
    let work = root.work()?;
    let dir = work.path().join("disk");
    store.create_dir(&dir)?;
    let xml = store.create(&dir.join(DESCRIPTOR), 0o600)?;
    xml.write_at(&descriptor.to_xml(), 0)?;
    // Its lock file is there from the start: serving and removing it take no room on a full host.
    store.create_dir(&dir.join(".ploop"))?;
    drop(store.create(&dir.join(".ploop/lock"), 0o600)?);
    // 2.
    drop(create(store, &dir.join(&file), &header, 0o600)?);
    xml.sync()?;
    store.sync_dir(&dir)?;
    for l in &disk.layers {
        layer::sync_references(root, l.id)?;
    }
    // 3. COMMIT
    move_dir(store, &dir, target)
}

/// The clone's descriptor: the template's layers, and one top that stands on them.
fn describe(disk: &TemplateDisk, size: u64, file: &str) -> Result<Descriptor> {
    let layers = &disk.layers;
    let Some(base) = layers.first() else {
        return Err(Error::new(Kind::Corrupt, "the template has no layer"));
    };
    let path = |id: Uuid| format!("../../layers/{id}/{}", layer::IMAGE);
    let sectors = size / SECTOR;
    let cluster = disk.cluster_sectors;
    let mut d = Descriptor::new_single(sectors, cluster, false, base.guid, path(base.id))?;
    let mut parent = base.guid;
    for l in &layers[1..] {
        d.images.push(Image {
            guid: l.guid,
            kind: ImageKind::Compressed,
            file: path(l.id),
        });
        d.shots.push(Shot {
            guid: l.guid,
            parent,
            temporary: Temporary::No,
        });
        parent = l.guid;
    }
    let kind = ImageKind::Compressed;
    d.images.push(Image {
        guid: Guid::TOP,
        kind,
        file: file.to_owned(),
    });
    d.shots.push(Shot {
        guid: Guid::TOP,
        parent,
        temporary: Temporary::No,
    });
    d.top = Guid::TOP;
    d.check()?;
    Ok(d)
}

/// Which versions a template may have: we only seal v2.
pub(crate) const LAYER_VERSION: Version = Version::V2;
