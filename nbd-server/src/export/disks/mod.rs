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

mod arriving;
mod completer;
mod descriptors;
mod exports;
mod held;
mod names;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use ploop::account::Account;
use ploop::descriptor::{Guid, Temporary};
use ploop::device::{Device, Extent, ReadLease, Segment, WriteLease, WriteSegment, ZeroMode};
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::error::{Error, Kind, Result};
use ploop::store::{FileId, Store};
use snapshots::life::Life;
use snapshots::limits::Limits;
use snapshots::place::Place;
use snapshots::{Root, quota};

use crate::export::{ExportInfo, Exports, Gate, Lives, OpenExport, Space, Throttle, space};
use crate::migrate::listen::Leaving;
pub use arriving::Arriving;
use completer::Completer;
use descriptors::{explain_limit, keep_reserve};
pub use names::TEMPLATE;
use names::{Meant, no_export};

/// For a close to end: of what is to be made complete and durable there may be much.
const CLOSES: Duration = Duration::from_secs(300);

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
    throttle: Arc<Throttle>,
    space: OnceLock<Arc<Space>>,
    /// The one disk is open as long as it is served.
    kept: AtomicBool,
    leaving: Leaving,
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
    /// What is charged to it, where it is open for writing. Not asked of the disk: whoever holds that
    /// may be the last, and closes it.
    account: Option<Arc<Account>>,
}

/// An open disk that closes itself when its last user lets go.
#[derive(Debug)]
pub struct OpenDisk {
    /// Dropped before `freed`: the name is free when the disk's locks are.
    disk: Disk,
    gate: Arc<Gate>,
    freed: Freed,
    me: Weak<OpenDisk>,
    /// The completer looks after it.
    watched: AtomicBool,
    /// Where its life is recorded, if it is a disk directory that is open for writing.
    home: Option<Home>,
}

/// Where a disk is, and the life that was told of it.
#[derive(Debug)]
struct Home {
    store: Arc<dyn Store>,
    dir: PathBuf,
    life: Mutex<Option<Life>>,
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
            throttle: Arc::default(),
            space: OnceLock::new(),
            kept: AtomicBool::new(false),
            leaving: Leaving::default(),
        }
    }

    /// The containers that leave this service right now.
    pub fn leaving(&self) -> &Leaving {
        &self.leaving
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

    /// The limits of what is open here.
    pub fn throttle(&self) -> &Arc<Throttle> {
        &self.throttle
    }

    /// Looks after the host's room for what is opened from now on, once whoever calls this calls
    /// [`Space::begin`]. Nothing where nothing is written. Errors: those of [`Space::of`];
    /// `Unsupported` for options where nothing is written.
    pub fn watch_space(&self, options: &space::Options) -> Result<()> {
        if self.read_only {
            return match options.is_default() {
                true => Ok(()),
                false => {
                    let what = "what is served read-only takes no room on the host";
                    Err(Error::unsupported(what).fix(space::LEAVE_OUT))
                }
            };
        }
        let (dir, reserve) = match &self.catalog {
            Catalog::Store(root) | Catalog::Container { root, .. } => {
                (root.dir().to_path_buf(), Some(root.reserve().clone()))
            }
            Catalog::One(_) => (self.place("")?.dir().to_path_buf(), None),
        };
        let host = space::Host {
            dir,
            store: self.opener().store().clone(),
            reserve,
        };
        drop(self.space.set(Space::of(host, options)?));
        Ok(())
    }

    /// The host's room, where it is looked after.
    pub fn space(&self) -> Option<&Arc<Space>> {
        self.space.get()
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
        self.refuse_read_only(container)?;
        self.hold(container)
    }

    /// The one disk, open as long as it is served: for the caller to hold. Errors: as [`Disks::live`].
    pub fn keep_open(&self) -> Result<Arc<OpenDisk>> {
        self.kept.store(true, Ordering::Relaxed);
        self.live(self.only_name())
    }

    /// True when the one disk does not close with its last client.
    pub fn is_kept_open(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// Error: `ReadOnly` where containers are.
    pub fn refuse_read_only(&self, container: &str) -> Result<()> {
        match self.read_only {
            true => {
                let what = format!("{container} is served read-only here");
                Err(Error::new(Kind::ReadOnly, what))
            }
            false => Ok(()),
        }
    }

    /// How many disks are open.
    pub fn open_count(&self) -> usize {
        let names = self.table.lock();
        let open = |e: &&Entry| e.disk.as_ref().is_some_and(|d| d.strong_count() > 0);
        names.open.values().filter(open).count()
    }

    /// The accounts of the containers that are open for writing, by name. Memory only.
    pub fn accounts(&self) -> Vec<(String, Arc<Account>)> {
        let names = self.table.lock();
        let of = |(name, e): (&String, &Entry)| Some((name.clone(), e.account.clone()?));
        let mut all: Vec<_> = names.open.iter().filter_map(of).collect();
        drop(names);
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// True when the export of that name is open.
    pub fn is_open(&self, name: &str) -> bool {
        let Ok(meant) = self.meaning(name) else {
            return false;
        };
        self.table.lock().open.contains_key(&meant.key)
    }

    /// The container's live disk, if it is open. Waits while it is being opened or closed.
    pub fn open_disk(&self, container: &str) -> Option<Arc<OpenDisk>> {
        let meant = self.meaning(container).ok()?;
        let mut names = self.table.lock();
        loop {
            let entry = names.open.get(&meant.key)?;
            if let Some(disk) = entry.disk.as_ref().and_then(Weak::upgrade) {
                return Some(disk);
            }
            let waited = self.table.changed.wait(names);
            names = waited.unwrap_or_else(PoisonError::into_inner);
        }
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
        let open = |names: &mut Names| names.open.contains_key(&door.name);
        let (names, changed) = (self.table.lock(), &self.table.changed);
        let waited = changed.wait_timeout_while(names, patience, open);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits until every disk is closed: for a service that ends, and lets go of none itself behind this.
    /// Whoever looks at a disk in the background (the completer) may be the last to let go of it, and
    /// closes it then. Error: `InUse` when one is open five minutes later.
    pub fn wait_all_closed(&self) -> Result<()> {
        let open = |names: &mut Names| !names.open.is_empty();
        let (names, changed) = (self.table.lock(), &self.table.changed);
        let waited = changed.wait_timeout_while(names, CLOSES, open);
        let (names, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if !waited.timed_out() {
            return Ok(());
        }
        let open: Vec<&str> = names.open.keys().map(String::as_str).collect();
        let what = format!(
            "still open at the end of the service: {}. What its clients were answered and did not flush \
             may be lost",
            open.join(", ")
        );
        Err(Error::new(Kind::InUse, what))
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
                        account: None,
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
        let open = self.open(&meant)?;
        self.publish(&meant.key, &open);
        Ok(open)
    }

    /// Opens what has an entry in the table.
    fn open(&self, meant: &Meant) -> Result<Arc<OpenDisk>> {
        let freed = Freed {
            key: meant.key.clone(),
            id: meant.id,
            table: self.table.clone(),
        };
        // On an error `freed` takes the entry out again.
        keep_reserve()?;
        let disk = self.opener().open(&meant.source, &meant.options);
        let disk = disk.map_err(explain_limit)?;
        if let Some(space) = self.space.get().filter(|_| meant.write) {
            disk.account()?.draw_on(space.budget().clone());
        }
        if meant.write && meant.source.descriptor {
            let place = self.place(&meant.key)?;
            if let Err(e) = place.clear_room() {
                tracing::warn!(container = meant.key, error = %e, "a work copy is left");
            }
            if !meant.options.moving {
                quota::arm(&place, &disk)?;
            }
        }
        let home = match meant.write && meant.source.descriptor {
            true => Some(Home {
                store: self.opener().store().clone(),
                dir: self.place(&meant.container)?.dir().to_owned(),
                life: Mutex::default(),
            }),
            false => None,
        };
        let stored = || self.stored_limits(&meant.container);
        let gate = self.throttle.gate(&meant.container, meant.id, stored);
        Ok(Arc::new_cyclic(|me| OpenDisk {
            disk,
            gate,
            freed,
            me: me.clone(),
            watched: AtomicBool::new(false),
            home,
        }))
    }

    /// Has somebody merge what waits for it in a container, some time.
    pub fn go_on_merging(&self, container: &str) {
        if self.waits_for_merge(container)
            && let Some(hook) = self.unfinished.get()
        {
            hook(container);
        }
    }

    /// Lets others have what was opened.
    fn publish(&self, key: &str, open: &Arc<OpenDisk>) {
        {
            let mut names = self.table.lock();
            let id = open.freed.id;
            if let Some(entry) = names.open.get_mut(key).filter(|e| e.id == id) {
                entry.disk = Some(Arc::downgrade(open));
                entry.account = open.disk.account().ok();
            }
        }
        self.table.changed.notify_all();
        tracing::debug!(export = key, "opened");
        if !open.disk.read_only() && self.waits_for_merge(key) {
            tracing::info!(container = key, "has unfinished merges");
            if let Some(hook) = self.unfinished.get() {
                hook(key);
            }
        }
    }

    /// The limits that are stored with a container; a template has none. `None`: they cannot be read.
    fn stored_limits(&self, container: &str) -> Option<Limits> {
        if container.starts_with(TEMPLATE) {
            return Some(Limits::default());
        }
        let meta = self.place(container).and_then(|p| p.meta());
        let limits = meta.and_then(|m| m.limits.check().map(|()| m.limits));
        limits
            .inspect_err(|e| {
                let what = "its limits cannot be read; it has those of before, or none";
                tracing::error!(container, error = %e, what);
            })
            .ok()
    }

    fn waits_for_merge(&self, container: &str) -> bool {
        let waiting = self
            .place(container)
            .and_then(|p| snapshots::merge::waiting(&p, &p.descriptor()?));
        waiting.is_ok_and(|nodes| !nodes.is_empty())
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Names> {
        // Both maps are whole between two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
