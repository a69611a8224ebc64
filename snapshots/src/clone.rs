//! `ploop create`: containers from a template or a snapshot. Each is one small image and a
//! descriptor, whatever the size of what it is cloned from.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use ploop::descriptor::Guid;
use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::{Header, create, create_unsynced};
use ploop::store::SECTOR;
use uuid::Uuid;

use crate::layer::{self, Sealed};
use crate::meta::Meta;
use crate::store::{Root, Work, sync_moves};
use crate::{grow, name, share, template};

/// Containers made in one call that are made durable one by one. With more of them one sync of the
/// whole file system is cheaper than four for each, though it waits for everybody's dirty data.
const ONE_BY_ONE: usize = 32;

/// Containers that one call makes at most.
pub const COUNT_MAX: u32 = 100_000;

/// What containers are cloned from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloneSource {
    /// A template of the store.
    Template(String),
    /// A snapshot of a container of the store.
    Snapshot {
        /// The container.
        container: String,
        /// The snapshot's name or GUID.
        snapshot: String,
    },
}

/// How a container is made.
#[derive(Clone, Debug, Default)]
pub struct CreateOptions {
    /// Virtual size in bytes, rounded up to a whole cluster; the template's when not given.
    pub size: Option<u64>,
}

/// How new containers are made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// A few syncs for each.
    OneByOne,
    /// One sync of the file system, where that can be trusted.
    Together,
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

/// Makes container `name` from template `template`: [`create_containers`] for one.
pub fn create_container(
    root: &Root,
    name: &str,
    template: &str,
    options: &CreateOptions,
    progress: &dyn Fn(u64, u64),
) -> Result<Created> {
    let from = CloneSource::Template(template.to_owned());
    let mut made = create_containers(root, &[name.to_owned()], &from, options, progress)?;
    made.pop()
        .ok_or_else(|| Error::invalid("no container was asked for"))
}

/// Makes a container of each name, all from one source. Durable on return.
///
/// 1. references to the source's layers; in a work directory: descriptors, metadata, images;
/// 2. make all of it durable. Everything of a container is written before its first sync, so that a
///    journaling file system needs few commits; many containers share one sync of everything;
/// 3. COMMIT, for each: its directory is renamed to `containers/NAME`. Then one sync for all.
///
/// Cut before 3: there is no container, and references or a work directory that are collected
/// later. Cut in 3: each is there and whole, or not there at all. On error none is left, but when
/// the last sync fails: then they are there, and may be gone after a power cut. `progress`: bytes
/// done and in total while a filesystem is grown.
///
/// Errors: `Exists` (a name is taken: nothing was made), `NotFound` (source), `Invalid` (a name,
/// or one twice; a size below the source's), and those of [`share::share`], `InUse` among them: where
/// the source is served, share it there first.
pub fn create_containers(
    root: &Root,
    names: &[String],
    from: &CloneSource,
    options: &CreateOptions,
    progress: &dyn Fn(u64, u64),
) -> Result<Vec<Created>> {
    let durable = match names.len() > ONE_BY_ONE {
        true => Durable::Together,
        false => Durable::OneByOne,
    };
    create_containers_by(root, names, from, options, durable, progress)
}

/// The same with the way in which they become durable.
pub fn create_containers_by(
    root: &Root,
    names: &[String],
    from: &CloneSource,
    options: &CreateOptions,
    durable: Durable,
    progress: &dyn Fn(u64, u64),
) -> Result<Vec<Created>> {
    refuse_names(root, names)?;
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let lock = root.lock(false)?;
    let mut disk = match from {
        CloneSource::Template(name) => template::open(root, name)?,
        CloneSource::Snapshot {
            container,
            snapshot,
        } => share::snapshot(root, container, snapshot, &lock)?,
    };
    let size = wanted_size(&disk, options.size)?;
    let clones: Vec<Planned> = names.iter().map(|name| Planned::new(root, name)).collect();
    let limits = disk.limits();
    let grown = match size > disk.shows() {
        true => grow::layer_for(root, &mut disk, size, clones[0].id, progress)?,
        false => None,
    };
    let batch = Batch {
        root,
        disk,
        size,
        limits,
        clones,
    };
    batch.make(durable)?;
    let created = batch
        .clones
        .into_iter()
        .enumerate()
        .map(|(n, clone)| Created {
            dir: clone.target,
            size,
            grown: grown.clone().map(|grown| grow::Grown {
                cached: grown.cached || n > 0,
                ..grown
            }),
        });
    Ok(created.collect())
}

/// The names `PREFIX-0001` to that of `count`. Errors: `Invalid` for 0, for more than
/// [`COUNT_MAX`], and for a prefix that makes no name.
pub fn numbered(prefix: &str, count: u32) -> Result<Vec<String>> {
    if count == 0 || count > COUNT_MAX {
        let what = format!("{count} containers: 1 to {COUNT_MAX} can be made at once");
        return Err(Error::invalid(what));
    }
    let digits = count.to_string().len().max(4);
    let names: Vec<String> = (1..=count)
        .map(|n| format!("{prefix}-{n:0digits$}"))
        .collect();
    name::check(&names[0])?;
    Ok(names)
}

fn refuse_names(root: &Root, names: &[String]) -> Result<()> {
    let mut seen = HashSet::new();
    for name in names {
        name::check(name)?;
        if !seen.insert(name) {
            return Err(Error::invalid(format!("the name {name} is given twice")));
        }
    }
    for name in names {
        let target = root.container(name);
        if root.store().kind(&target)?.is_some() {
            return Err(taken(name, &target));
        }
    }
    Ok(())
}

fn taken(name: &str, target: &Path) -> Error {
    let what = format!("there is a container {name} already");
    Error::new(Kind::Exists, what)
        .on(target)
        .fix(format!("Remove it: ploop rm {name}"))
}

fn wanted_size(disk: &Sealed, size: Option<u64>) -> Result<u64> {
    let Some(size) = size else {
        return Ok(disk.shows());
    };
    if size < disk.shows() {
        return Err(Error::invalid(format!(
            "{size} bytes is less than the {} of {}: a disk cannot be smaller than what it is \
             cloned from",
            disk.shows(),
            disk.shown
        )));
    }
    let cluster = u64::from(disk.cluster_sectors) * SECTOR;
    size.checked_next_multiple_of(cluster)
        .ok_or_else(|| Error::invalid("the size is too large"))
}

/// A container in the making.
struct Planned {
    id: Uuid,
    name: String,
    target: PathBuf,
}

impl Planned {
    fn new(root: &Root, name: &str) -> Planned {
        Planned {
            id: Uuid::new_v4(),
            name: name.to_owned(),
            target: root.container(name),
        }
    }
}

struct Batch<'a> {
    root: &'a Root,
    disk: Sealed,
    /// What the clones show; their images may have more.
    size: u64,
    /// Size limits of the layers.
    limits: BTreeMap<String, u64>,
    clones: Vec<Planned>,
}

impl Batch<'_> {
    fn make(&self, durable: Durable) -> Result<()> {
        let work = self.root.work()?;
        let written = self.write(&work, durable);
        if let Err(e) = written {
            self.release();
            return Err(e);
        }
        // 3. COMMIT, for each
        let store = self.root.store();
        for (n, clone) in self.clones.iter().enumerate() {
            let Err(e) = store.rename_new(&dir_of(&work, n), &clone.target) else {
                continue;
            };
            match self.take_back(&work) {
                Ok(()) => self.release(),
                // They stay, and so do their references.
                Err(e) => tracing::warn!(error = %e, "new containers stay although others failed"),
            }
            return Err(match e.kind() {
                Kind::Exists => taken(&clone.name, &clone.target),
                _ => e,
            });
        }
        sync_moves(store, work.path(), &self.root.dir().join("containers"))
    }

    /// Steps 1 and 2.
    fn write(&self, work: &Work<'_>, durable: Durable) -> Result<()> {
        let store = self.root.store();
        // Watched from before the first write on, so that no failed write-back goes unseen.
        let all = match durable {
            Durable::Together => store.file_system(self.root.dir())?,
            Durable::OneByOne => None,
        };
        for (l, clone) in self
            .disk
            .layers
            .iter()
            .flat_map(|l| self.clones.iter().map(move |c| (l, c)))
        {
            layer::refer(self.root, l.id, clone.id)?;
        }
        for (n, clone) in self.clones.iter().enumerate() {
            self.write_one(&dir_of(work, n), clone, all.is_none())?;
        }
        if let Some(all) = all {
            return all.sync();
        }
        for l in &self.disk.layers {
            layer::sync_references(self.root, l.id)?;
        }
        Ok(())
    }

    /// The directory of one container; with `sync`, durable on return but for its name.
    fn write_one(&self, dir: &Path, clone: &Planned, sync: bool) -> Result<()> {
        let store = self.root.store();
        let size = self.size.max(self.disk.size);
        let header = Header::new(self.disk.version, self.disk.cluster_sectors, size / SECTOR)?;
        let top = format!("root.hds.{}", Guid::from_bytes(clone.id.into_bytes()));
        let descriptor = self.disk.describe(size, Some(&top))?;
        let mut meta = Meta {
            id: Some(clone.id.to_string()),
            sizes: self.limits.clone(),
            ..Meta::default()
        };
        if self.size < size {
            meta.sizes.insert(top.clone(), self.size);
        }
        let side = dir.join(".ploop");
        store.create_dir(dir)?;
        store.create_dir(&side)?;
        let write = |path: PathBuf, bytes: &[u8]| {
            let file = store.create(&path, 0o600)?;
            file.write_at(bytes, 0)?;
            Ok(file)
        };
        let xml = write(dir.join(DESCRIPTOR), &descriptor.to_xml())?;
        // Its lock file is there from the start: serving and removing it take no room on a full
        // host.
        drop(store.create(&side.join("lock"), 0o600)?);
        let meta = write(Meta::path(dir), &meta.to_json()?)?;
        if !sync {
            return create_unsynced(store, &dir.join(&top), &header, 0o600).map(drop);
        }
        drop(create(store, &dir.join(&top), &header, 0o600)?);
        xml.sync()?;
        meta.sync()?;
        store.sync_dir(&side)?;
        store.sync_dir(dir)
    }

    /// Takes the containers that were renamed back into the work directory, durably.
    fn take_back(&self, work: &Work<'_>) -> Result<()> {
        let store = self.root.store();
        for (n, clone) in self.clones.iter().enumerate() {
            let dir = dir_of(work, n);
            if store.kind(&dir)?.is_some() {
                continue;
            }
            // Whoever opened it already keeps it.
            let _held = self.root.lock_disk(&clone.target)?;
            store.rename_new(&clone.target, &dir)?;
        }
        sync_moves(store, &self.root.dir().join("containers"), work.path())
    }

    /// Gives up the references of containers that are not there.
    fn release(&self) {
        for (l, clone) in self
            .disk
            .layers
            .iter()
            .flat_map(|l| self.clones.iter().map(move |c| (l, c)))
        {
            if let Err(e) = layer::release(self.root, l.id, clone.id) {
                tracing::warn!(error = %e, "a reference to a layer stays; it is collected later");
            }
        }
    }
}

fn dir_of(work: &Work<'_>, n: usize) -> PathBuf {
    work.path().join(n.to_string())
}
