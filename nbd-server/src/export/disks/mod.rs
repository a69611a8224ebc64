//! Disks by name: all of a store, or one disk directory; each opened at its first use and closed
//! after its last.
//!
//! | name | opens |
//! |---|---|
//! | `NAME` | the container, for writing (read-only when the server is) |
//! | `NAME@SNAPSHOT` | a snapshot of it by name or GUID, read-only |
//! | `template:NAME` | a template, read-only |
//!
//! All users of one name share one open disk, as long as the name means that disk: a container that
//! was removed and made anew while a read-only client held it is another one. When the last of them
//! lets go, the disk is closed on its thread: flushed, its in-use mark cleared. Whoever opens the
//! same name meanwhile waits for that close, and nobody waits for the opening of another name.
//!
//! Operations on a container use the same open disk as its clients ([`Disks::live`]), or close its
//! [`Door`] and have it for themselves.

mod completer;
mod held;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use ploop::descriptor::{Guid, Temporary};
use ploop::device::{Device, Extent, ReadLease, Segment, WriteLease, WriteSegment, ZeroMode};
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, OpenOptions, Opener, Source};
use ploop::error::{Error, Kind, Result};
use ploop::store::{Access, FileId};
use snapshots::place::Place;
use snapshots::{Root, template};

use crate::export::{ExportInfo, Exports, OpenExport};
use completer::Completer;

/// What stands before a template's name.
pub const TEMPLATE: &str = "template:";

/// Where disks are.
#[derive(Debug)]
enum Catalog {
    Store(Root),
    /// One container of a store, under a name of its own.
    Container {
        root: Root,
        container: String,
        name: String,
    },
    One(Box<One>),
}

/// A disk directory that is served under a name of its own.
#[derive(Debug)]
struct One {
    name: String,
    opener: Opener,
    source: Source,
    options: OpenOptions,
}

/// Told of a container that was opened and has nodes that wait for a merge.
type Hook = Box<dyn Fn(&str) + Send + Sync>;

/// See the module text.
pub struct Disks {
    catalog: Catalog,
    read_only: bool,
    table: Arc<Table>,
    unfinished: OnceLock<Hook>,
}

impl fmt::Debug for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disks")
            .field("catalog", &self.catalog)
            .finish_non_exhaustive()
    }
}

/// The names that are open, being opened, or still closing.
#[derive(Debug, Default)]
struct Table {
    state: Mutex<Names>,
    changed: Condvar,
    completer: Arc<Completer>,
}

#[derive(Debug, Default)]
struct Names {
    open: HashMap<String, Entry>,
    /// Names that only who closed the door may open.
    doors: HashMap<String, usize>,
}

/// Which disk a name was opened as.
#[derive(Debug)]
struct Entry {
    id: FileId,
    /// `None` while it is being opened; gone while it is being closed.
    disk: Option<Weak<OpenDisk>>,
}

/// An open disk that closes itself when its last user lets go.
#[derive(Debug)]
pub struct OpenDisk {
    /// Dropped before `freed`: the name is free when the disk's locks are.
    disk: Disk,
    freed: Freed,
    me: Weak<OpenDisk>,
    /// The completer looks after it.
    watched: AtomicBool,
}

/// Frees a name when dropped.
#[derive(Debug)]
struct Freed {
    key: String,
    id: FileId,
    table: Arc<Table>,
}

/// A name that nobody opens until this is dropped.
#[derive(Debug)]
pub struct Door {
    name: String,
    table: Arc<Table>,
}

/// What a name means.
struct Meant {
    /// The same for every way to write the same thing.
    key: String,
    source: Source,
    write: bool,
    options: OpenOptions,
    id: FileId,
}

impl Disks {
    /// Everything in `root`; with `read_only`, containers too are served read-only.
    pub fn new(root: Root, read_only: bool) -> Disks {
        Disks::with(Catalog::Store(root), read_only)
    }

    /// One disk directory, as export `name` (and `name@SNAPSHOT`).
    pub fn of_disk(
        opener: Opener,
        name: impl Into<String>,
        source: Source,
        options: OpenOptions,
    ) -> Disks {
        let read_only = !options.write;
        let one = One {
            name: name.into(),
            opener,
            source,
            options,
        };
        Disks::with(Catalog::One(Box::new(one)), read_only)
    }

    /// One container of a store, as export `name` (and `name@SNAPSHOT`). Error: `NotFound`.
    pub fn of_container(root: Root, container: &str, name: impl Into<String>) -> Result<Disks> {
        Place::container(&root, container)?;
        let catalog = Catalog::Container {
            root,
            container: container.to_owned(),
            name: name.into(),
        };
        Ok(Disks::with(catalog, false))
    }

    /// The one name that it has, where it is one disk; else the empty one.
    pub fn only_name(&self) -> &str {
        match &self.catalog {
            Catalog::Store(_) => "",
            Catalog::Container { name, .. } => name,
            Catalog::One(one) => &one.name,
        }
    }

    fn with(catalog: Catalog, read_only: bool) -> Disks {
        Disks {
            catalog,
            read_only,
            table: Arc::default(),
            unfinished: OnceLock::new(),
        }
    }

    /// Calls `hook` with the name of each container that is opened for writing while nodes of it
    /// wait for a merge, on a thread of its own. Only the first hook counts.
    pub fn on_unfinished(&self, hook: impl Fn(&str) + Send + Sync + 'static) {
        drop(self.unfinished.set(Box::new(hook)));
    }

    /// The store, where it is one.
    pub fn root(&self) -> Option<&Root> {
        match &self.catalog {
            Catalog::Store(root) => Some(root),
            Catalog::Container { .. } | Catalog::One(_) => None,
        }
    }

    /// True when containers are served read-only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The disk that `container` names, as a place whose tree can be changed. Error: `NotFound`.
    pub fn place(&self, container: &str) -> Result<Place<'_>> {
        match &self.catalog {
            Catalog::Store(root) => Place::container(root, container),
            Catalog::Container {
                root,
                container: inside,
                name,
            } if container == name || container.is_empty() => {
                Ok(Place::container(root, inside)?.called(name.clone()))
            }
            Catalog::One(one) if container == one.name || container.is_empty() => {
                Ok(
                    Place::disk(&one.opener, &one.source, &one.options.allow, true)?
                        .called(one.name.clone()),
                )
            }
            Catalog::Container { .. } | Catalog::One(_) => Err(no_export(container)),
        }
    }

    /// The container's open disk, opened if need be. Error: `ReadOnly` where containers are.
    pub fn live(&self, container: &str) -> Result<Arc<OpenDisk>> {
        if self.read_only {
            let what = format!("{container} is served read-only here");
            return Err(Error::new(Kind::ReadOnly, what));
        }
        self.hold(container)
    }

    /// How many disks are open.
    pub fn open_count(&self) -> usize {
        let names = self.table.lock();
        let open = |e: &&Entry| e.disk.as_ref().is_some_and(|d| d.strong_count() > 0);
        names.open.values().filter(open).count()
    }

    /// True when the export of that name is open.
    pub fn is_open(&self, name: &str) -> bool {
        let Ok(meant) = self.meaning(name) else {
            return false;
        };
        self.table.lock().open.contains_key(&meant.key)
    }

    /// The snapshots of a container whose exports are open.
    pub fn open_snapshots(&self, place: &Place<'_>) -> Vec<Guid> {
        let of = |key: &String| {
            let snapshot = key.strip_prefix(place.shown())?.strip_prefix('@')?;
            Guid::parse(snapshot).ok()
        };
        self.table.lock().open.keys().filter_map(of).collect()
    }

    /// Keeps everybody from opening `container`'s live disk.
    pub fn close_door(&self, container: &str) -> Door {
        let name = match self.only_name() {
            "" => container.to_owned(),
            name => name.to_owned(),
        };
        *self.table.lock().doors.entry(name.clone()).or_default() += 1;
        Door {
            name,
            table: self.table.clone(),
        }
    }

    /// Waits until `container`'s live disk is closed, `patience` at most: false when it is not.
    pub fn wait_closed(&self, door: &Door, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut names = self.table.lock();
        while names.open.contains_key(&door.name) {
            let now = Instant::now();
            if now >= end {
                return false;
            }
            let waited = self.table.changed.wait_timeout(names, end - now);
            names = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn meaning(&self, name: &str) -> Result<Meant> {
        let (bare, snapshot) = match name.split_once('@') {
            Some((bare, snapshot)) => (bare, Some(snapshot)),
            None => (name, None),
        };
        if let Some(template) = bare.strip_prefix(TEMPLATE) {
            return self.template(template, snapshot, name);
        }
        let place = match self.place(bare) {
            Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Invalid) => {
                return Err(no_export(name));
            }
            place => place?,
        };
        let guid = match snapshot {
            None => None,
            Some(text) => Some(place.find(&place.descriptor()?, &place.meta()?, text)?),
        };
        let write = guid.is_none() && !self.read_only;
        let options = match &self.catalog {
            Catalog::Store(root) | Catalog::Container { root, .. } => root.open_options(write),
            Catalog::One(one) => OpenOptions {
                write,
                ..one.options.clone()
            },
        };
        Ok(Meant {
            key: match guid {
                None => place.shown().to_owned(),
                Some(guid) => format!("{}@{guid}", place.shown()),
            },
            source: match (&self.catalog, guid) {
                // A disk that is served at one of its snapshots stays there.
                (Catalog::One(one), None) => one.source.clone(),
                _ => place.source(guid),
            },
            write,
            options,
            id: identity(place.opener(), place.dir())?,
        })
    }

    fn template(&self, template: &str, snapshot: Option<&str>, name: &str) -> Result<Meant> {
        let (Some(root), None) = (self.root(), snapshot) else {
            return Err(no_export(name));
        };
        if snapshots::name::check(template).is_err() || !root.template(template).exists() {
            return Err(no_export(name));
        }
        Ok(Meant {
            key: name.to_owned(),
            source: template::source(root, template),
            write: false,
            options: root.open_options(false),
            id: identity(root.opener(), &root.template(template))?,
        })
    }

    fn opener(&self) -> &Opener {
        match &self.catalog {
            Catalog::Store(root) | Catalog::Container { root, .. } => root.opener(),
            Catalog::One(one) => &one.opener,
        }
    }

    fn hold(&self, name: &str) -> Result<Arc<OpenDisk>> {
        let meant = loop {
            let meant = self.meaning(name).map_err(explain_limit)?;
            let mut names = self.table.lock();
            let held = names.open.get(&meant.key).filter(|e| e.id == meant.id);
            let held = held.map(|e| e.disk.as_ref().and_then(Weak::upgrade));
            match held {
                Some(Some(disk)) => return Ok(disk),
                None if !names.doors.contains_key(&meant.key) => {
                    let entry = Entry {
                        id: meant.id,
                        disk: None,
                    };
                    names.open.insert(meant.key.clone(), entry);
                    break meant;
                }
                // Somebody opens it, its last user closes it, or its door is closed. What it means
                // may be another disk afterwards.
                _ => drop(
                    self.table
                        .changed
                        .wait(names)
                        .unwrap_or_else(PoisonError::into_inner),
                ),
            }
        };
        let freed = Freed {
            key: meant.key.clone(),
            id: meant.id,
            table: self.table.clone(),
        };
        // On an error `freed` takes the entry out again.
        keep_reserve()?;
        let disk = self.opener().open(&meant.source, &meant.options);
        let disk = disk.map_err(explain_limit)?;
        let open = Arc::new_cyclic(|me| OpenDisk {
            disk,
            freed,
            me: me.clone(),
            watched: AtomicBool::new(false),
        });
        {
            let mut names = self.table.lock();
            if let Some(entry) = names.open.get_mut(&meant.key).filter(|e| e.id == meant.id) {
                entry.disk = Some(Arc::downgrade(&open));
            }
        }
        self.table.changed.notify_all();
        tracing::debug!(export = meant.key, "opened");
        if meant.write && self.waits_for_merge(&meant.key) {
            tracing::info!(container = meant.key, "has unfinished merges");
            if let Some(hook) = self.unfinished.get() {
                hook(&meant.key);
            }
        }
        Ok(open)
    }

    fn waits_for_merge(&self, container: &str) -> bool {
        let waiting = self
            .place(container)
            .and_then(|p| snapshots::merge::waiting(&p, &p.descriptor()?));
        waiting.is_ok_and(|nodes| !nodes.is_empty())
    }
}

fn no_export(name: &str) -> Error {
    Error::new(Kind::NotFound, format!("there is no export '{name}'"))
}

/// Says what to do where the operating system gives no descriptor.
fn explain_limit(e: Error) -> Error {
    const EMFILE: i32 = 24;
    match e.raw_os_error() {
        Some(EMFILE) => e
            .while_doing("the service may not have more open files")
            .fix(RAISE),
        _ => e,
    }
}

/// What to do about a full table of open files.
const RAISE: &str = "Raise the limit of open files of the service (LimitNOFILE=)";

/// Descriptors that opening a disk leaves for new connections and for the control API.
const RESERVE: u64 = 64;

/// Refuses to open another disk while few descriptors are left. The lowest free number says how
/// many are taken.
fn keep_reserve() -> Result<()> {
    use rustix::process::{Resource, getrlimit};
    let Some(limit) = getrlimit(Resource::Nofile).current else {
        return Ok(());
    };
    let full = || {
        let what = "the service may not have more open files";
        Error::new(Kind::Io, format!("{what} ({limit} are allowed)")).fix(RAISE)
    };
    let free = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), 0).map_err(|_| full())?;
    let taken = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&free)).unwrap_or(limit);
    match taken + RESERVE.min(limit / 6) >= limit {
        true => Err(full()),
        false => Ok(()),
    }
}

/// Which disk a directory is: its lock file, which is never replaced, or where it has none its
/// descriptor.
fn identity(opener: &Opener, dir: &std::path::Path) -> Result<FileId> {
    let lock: PathBuf = dir.join(".ploop/lock");
    match opener.store().open(&lock, Access::Read) {
        Ok(file) => Ok(file.id()),
        Err(_) => Ok(opener
            .store()
            .open(&dir.join(DESCRIPTOR), Access::Read)?
            .id()),
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Names> {
        // Both maps are whole between two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exports for Disks {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        let info = |name, description: &str| ExportInfo {
            name,
            description: description.into(),
        };
        let mut all = Vec::new();
        let (containers, templates) = match &self.catalog {
            Catalog::Store(root) => {
                let names = snapshots::list::names(root)?;
                (names.containers, names.templates)
            }
            Catalog::Container { .. } | Catalog::One(_) => {
                (vec![self.only_name().to_owned()], Vec::new())
            }
        };
        for name in containers {
            let snapshots = self.place(&name).and_then(|p| snapshot_names(&p));
            all.push(info(name.clone(), "container"));
            // Of a damaged one, or one that was just removed, there are none.
            for snapshot in snapshots.unwrap_or_default() {
                all.push(info(format!("{name}@{snapshot}"), "snapshot, read-only"));
            }
        }
        let template = |n| info(format!("{TEMPLATE}{n}"), "template, read-only");
        all.extend(templates.into_iter().map(template));
        Ok(all)
    }

    fn open(&self, name: &str) -> Result<OpenExport> {
        let name = match name {
            "" => self.only_name(),
            name => name,
        };
        let opened = self.hold(name);
        if let Err(e) = &opened
            && e.kind() != Kind::NotFound
        {
            tracing::warn!(export = name, error = %e, "an export could not be opened");
        }
        Ok(OpenExport {
            device: opened?,
            name: name.to_owned(),
            description: String::new(),
        })
    }
}

/// The snapshots of a disk by the names that open them.
fn snapshot_names(place: &Place<'_>) -> Result<Vec<String>> {
    let d = place.descriptor()?;
    if d.shots.len() == 1 {
        return Ok(Vec::new());
    }
    let meta = place.meta()?;
    let of = |g: Guid| meta.name_of(g).map_or_else(|| g.to_string(), str::to_owned);
    let shots = d.shots.iter();
    Ok(shots
        .filter(|s| s.guid != d.top && s.temporary == Temporary::No)
        // A layer of the store is not this container's snapshot.
        .filter(|s| d.image(s.guid).is_some_and(Place::owns) || meta.snapshot(s.guid).is_some())
        .map(|s| of(s.guid))
        .collect())
}
