//! A store: the directory that templates, containers and their layers live in.
//!
//! ```text
//! ROOT/
//!   lock                      flock: shared to create a container, alone to import and remove
//!   templates/NAME/           DiskDescriptor.xml → ../../layers/…, .ploop/meta.json
//!   containers/NAME/          DiskDescriptor.xml → ../../layers/…, root.hds.{GUID}, .ploop/
//!   layers/UUID/image.hds     sealed, mode 0400, owned by nobody
//!   layers/UUID/refs/UUID     one empty file for each disk or layer that stands on it
//!   layers/UUID/grown/BYTES   names the cached layer that grows this one to that size
//!   tmp/UUID/                 work in progress; whoever works there holds a flock on it
//!   tmp/receive-NAME/         a stream that was cut and may go on
//!   reserve                   room that is kept for what must not fail ([`ploop::store::reserved`])
//! ```
//!
//! A disk appears and disappears by one rename of its directory: out of `tmp`, into `tmp`. A
//! reference is durable before the descriptor that needs it and removed after it is gone, so the
//! references are always a superset, and [`Root::collect`] removes what nobody refers to.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs2::FileExt;
use ploop::disk::open::{OpenOptions, Opener};
use ploop::error::{Error, Kind, Result};
use ploop::locks::DiskLock;
use ploop::store::reserved::Reserve;
use ploop::store::{EntryKind, Store};
use uuid::Uuid;

use crate::stream::PREFIX;

/// Where a store is when nothing else is said.
pub const DEFAULT_ROOT: &str = "/var/lib/ploop";

/// What to do when this is not the store that was meant.
const CHOOSE: &str = "--root or PLOOP_ROOT chooses another store";

const ROOMS: [&str; 4] = ["templates", "containers", "layers", "tmp"];

/// An open store.
#[derive(Debug)]
pub struct Root {
    dir: PathBuf,
    opener: Opener,
    reserve: Arc<Reserve>,
    locks: bool,
}

/// The store's lock; gone when dropped.
#[derive(Debug)]
pub struct StoreLock(#[expect(dead_code, reason = "held for its flock")] Option<File>);

impl Root {
    /// Opens the store at `dir`. With `create`, makes what is missing of it.
    pub fn open(dir: &Path, create: bool) -> Result<Root> {
        if create {
            make_dirs(dir)?;
        }
        Root::on(Opener::host(), dir, create, true)
    }

    /// The store at `dir` of any [`Store`]; `locks` only where files are the host's.
    pub fn on(opener: Opener, dir: &Path, create: bool, locks: bool) -> Result<Root> {
        let store = opener.store().clone();
        let dir = match store.resolve(dir) {
            Ok(dir) => dir,
            Err(e) if e.kind() != Kind::NotFound => return Err(e.fix(CHOOSE)),
            Err(_) => {
                return Err(Error::new(Kind::NotFound, "there is no store here")
                    .on(dir)
                    .fix(format!("`ploop template import` makes one; {CHOOSE}")));
            }
        };
        let mut made = false;
        for room in ROOMS {
            let path = dir.join(room);
            match store.kind(&path)? {
                Some(EntryKind::Dir) => {}
                Some(_) => return Err(Error::invalid("is no directory").on(path)),
                None if create => match store.create_dir(&path) {
                    Err(e) if e.kind() != Kind::Exists => return Err(e),
                    _ => made = true,
                },
                None => {
                    let what = format!("this is no store: it has no {room}/");
                    return Err(Error::new(Kind::NotFound, what)
                        .on(dir)
                        .fix(format!("`ploop template import` makes one; {CHOOSE}")));
                }
            }
        }
        if made {
            store.sync_dir(&dir)?;
        }
        let (opener, reserve) = opener.reserving(&dir);
        Ok(Root {
            dir,
            opener,
            reserve,
            locks,
        })
    }

    /// The store's directory, resolved.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What opens disks of this store, and shares their layers.
    pub fn opener(&self) -> &Opener {
        &self.opener
    }

    /// The store's reserve. Whoever serves the store fills it.
    pub fn reserve(&self) -> &Arc<Reserve> {
        &self.reserve
    }

    /// Where its files are.
    pub fn store(&self) -> &dyn Store {
        self.opener.store().as_ref()
    }

    /// Options that let a disk of this store reach its layers.
    pub fn open_options(&self, write: bool) -> OpenOptions {
        OpenOptions {
            write,
            allow: vec![self.layers()],
            ..OpenOptions::default()
        }
    }

    /// The directory of a container.
    pub fn container(&self, name: &str) -> PathBuf {
        self.dir.join("containers").join(name)
    }

    /// The directory of a container that must be there. Errors: `Invalid` for no name, `NotFound`.
    pub fn existing_container(&self, name: &str) -> Result<PathBuf> {
        crate::name::check(name)?;
        let dir = self.container(name);
        if self.store().kind(&dir)?.is_none() {
            let what = format!("there is no container {name}");
            return Err(Error::new(Kind::NotFound, what)
                .on(dir)
                .fix("`ploop list` shows what there is"));
        }
        Ok(dir)
    }

    /// The directory of a template.
    pub fn template(&self, name: &str) -> PathBuf {
        self.dir.join("templates").join(name)
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.dir.join("layers")
    }

    /// Waits for the store's lock: shared, or alone.
    pub fn lock(&self, alone: bool) -> Result<StoreLock> {
        if !self.locks {
            return Ok(StoreLock(None));
        }
        let path = self.dir.join("lock");
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options
            .open(&path)
            .map_err(|e| Error::io("open", &path, e))?;
        let locked = match alone {
            true => FileExt::lock_exclusive(&file),
            false => FileExt::lock_shared(&file),
        };
        locked.map_err(|e| Error::io("lock", &path, e))?;
        Ok(StoreLock(Some(file)))
    }

    /// True when locks are taken.
    pub(crate) fn has_locks(&self) -> bool {
        self.locks
    }

    /// The lock on a disk of this store, where there are locks. Error: `InUse`.
    pub(crate) fn lock_disk(&self, dir: &Path) -> Result<Option<DiskLock>> {
        self.locks.then(|| self.opener.lock_disk(dir)).transpose()
    }

    /// The same, whoever owns the disk ([`ploop::owner`]).
    pub(crate) fn lock_moving(&self, dir: &Path) -> Result<Option<DiskLock>> {
        self.locks.then(|| self.opener.lock_moving(dir)).transpose()
    }

    /// A fresh directory in `tmp`, removed with all in it when dropped.
    pub(crate) fn work(&self) -> Result<Work<'_>> {
        let path = self.dir.join("tmp").join(Uuid::new_v4().to_string());
        self.store().create_dir(&path)?;
        let lock = match self.locks {
            true => Some(lock_dir(&path)?.ok_or_else(|| {
                Error::new(Kind::InUse, "somebody else took our work directory").on(&path)
            })?),
            false => None,
        };
        Ok(Work {
            root: self,
            path,
            _lock: lock,
        })
    }

    /// The flock on a directory of `tmp`, where there are locks; the outer `None` when somebody
    /// holds it.
    pub(crate) fn lock_room(&self, path: &Path) -> Result<Option<Option<File>>> {
        match self.locks {
            true => Ok(lock_dir(path)?.map(Some)),
            false => Ok(Some(None)),
        }
    }

    /// The names in a room, those that are no valid name left out.
    pub(crate) fn names(&self, room: &str) -> Result<Vec<String>> {
        let list = self.store().list(&self.dir.join(room))?;
        let names = list.iter().filter_map(|n| n.to_str());
        Ok(names
            .filter(|n| crate::name::check(n).is_ok())
            .map(str::to_owned)
            .collect())
    }

    /// Removes what crashed work left in `tmp`. Errors of single entries are logged: they cost
    /// space, nothing else.
    pub(crate) fn collect_tmp(&self) -> Result<()> {
        for name in self.store().list(&self.dir.join("tmp"))? {
            // Not interrupted: it may go on.
            if name.to_str().is_some_and(|n| n.starts_with(PREFIX)) {
                continue;
            }
            let path = self.dir.join("tmp").join(name);
            // Without locks there is nobody else, and who calls this is not at work yet.
            if let Ok(Some(_lock)) = self.lock_room(&path)
                && let Err(e) = remove_tree(self.store(), &path)
            {
                tracing::warn!(error = %e, "a leftover of interrupted work stays");
            }
        }
        Ok(())
    }
}

/// Makes a directory of the host and those above it that are missing, durably: a template that was
/// imported into it must not vanish with it.
fn make_dirs(dir: &Path) -> Result<()> {
    if dir.as_os_str().is_empty() || dir.exists() {
        return Ok(());
    }
    let above = dir.parent().unwrap_or(Path::new("/"));
    make_dirs(above)?;
    let failed = |e| Error::io("create the store", dir, e);
    match std::fs::create_dir(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    let above = if above.as_os_str().is_empty() {
        Path::new(".")
    } else {
        above
    };
    File::open(above)
        .and_then(|above| above.sync_all())
        .map_err(failed)
}

/// The flock on a directory, or `None` when somebody holds it.
fn lock_dir(path: &Path) -> Result<Option<File>> {
    let dir = File::open(path).map_err(|e| Error::io("open", path, e))?;
    match FileExt::try_lock_exclusive(&dir) {
        Ok(()) => Ok(Some(dir)),
        Err(e) if e.raw_os_error() == fs2::lock_contended_error().raw_os_error() => Ok(None),
        Err(e) => Err(Error::io("lock", path, e)),
    }
}

/// A directory for work in progress.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    root: &'a Root,
    path: PathBuf,
    _lock: Option<File>,
}

impl Work<'_> {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        if let Err(e) = remove_tree(self.root.store(), &self.path) {
            tracing::warn!(error = %e, "a work directory stays; the next import collects it");
        }
    }
}

/// Removes a file, or a directory with all in it; links are not followed. Nothing there is fine.
pub(crate) fn remove_tree(store: &dyn Store, path: &Path) -> Result<()> {
    match store.kind(path)? {
        None => Ok(()),
        Some(EntryKind::Dir) => {
            for name in store.list(path)? {
                remove_tree(store, &path.join(name))?;
            }
            store.remove_dir(path)
        }
        Some(_) => store.remove_file(path),
    }
}

/// Moves a directory to a name that must be free, durable on return: that takes both directories
/// that the name is in. After an error other than `Exists` it may be there or here.
pub(crate) fn move_dir(store: &dyn Store, from: &Path, to: &Path) -> Result<()> {
    store.rename_new(from, to)?;
    let above = |path: &'_ Path| path.parent().unwrap_or(Path::new("/")).to_path_buf();
    sync_moves(store, &above(from), &above(to))
}

/// Makes renames from one directory to another durable.
pub(crate) fn sync_moves(store: &dyn Store, from: &Path, to: &Path) -> Result<()> {
    for dir in [to, from] {
        store.sync_dir(dir)?;
    }
    Ok(())
}

/// Refuses to begin a copy of `bytes` that would fill the file system of `dir`, which has `available`
/// left: others write there meanwhile. Error: `NoSpace`.
pub(crate) fn refuse_full(dir: &Path, bytes: u64, available: u64) -> Result<()> {
    /// One part in so many is left.
    const SPARE: u64 = 20;
    if bytes <= available - available / SPARE {
        return Ok(());
    }
    let what = format!("a copy of the data needs {bytes} bytes, and the host has {available} left");
    Err(Error::new(Kind::NoSpace, what)
        .on(dir)
        .fix("Make room on the host: it is needed only meanwhile"))
}

/// Writes a new small file and makes its bytes durable.
pub(crate) fn write_new(store: &dyn Store, path: &Path, bytes: &[u8]) -> Result<()> {
    let file = store.create(path, 0o600)?;
    file.write_at(bytes, 0)?;
    file.sync()
}

/// Reads a small file, `max` bytes at most.
pub(crate) fn read_small(store: &dyn Store, path: &Path, max: u64) -> Result<Vec<u8>> {
    let file = store.open(path, ploop::store::Access::Read)?;
    let len = file.len()?;
    if len > max {
        let what = format!("{len} bytes; {max} is the limit");
        return Err(Error::new(Kind::Corrupt, what).on(path));
    }
    let mut bytes = vec![0; len as usize];
    ploop::store::read_exact(file.as_ref(), &mut bytes, 0)?;
    Ok(bytes)
}
