//! Everything in a store, by name; each opened at its first use and closed after its last.
//!
//! | name | opens |
//! |---|---|
//! | `NAME` | the container, for writing (read-only when the server is) |
//! | `NAME@GUID` | a snapshot of it, read-only |
//! | `template:NAME` | a template, read-only |
//!
//! All connections to one name share one open disk, as long as the name means that disk: a container
//! that was removed and made anew while a read-only client held it is another one. When the last of them ends, the disk is closed
//! on that connection's thread: flushed, its in-use mark cleared. Whoever opens the same name
//! meanwhile waits for that close.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use ploop::device::{Device, Extent, ReadLease, Segment, WriteLease, WriteSegment, ZeroMode};
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, Source};
use ploop::error::{Error, Kind, Result};
use ploop::store::{Access, FileId};
use snapshots::{Root, template};

use super::{ExportInfo, Exports, OpenExport};

/// What stands before a template's name.
const TEMPLATE: &str = "template:";

/// The exports of a store.
#[derive(Debug)]
pub struct StoreExports {
    root: Root,
    read_only: bool,
    open: Arc<OpenDisks>,
}

/// The names that are open, or still closing (then the device is gone already).
#[derive(Debug, Default)]
struct OpenDisks {
    names: Mutex<HashMap<String, Entry>>,
    closed: Condvar,
}

/// Which disk a name was opened as.
#[derive(Debug)]
struct Entry {
    descriptor: FileId,
    shared: Weak<Shared>,
}

/// An open disk that closes itself when its last user lets go.
#[derive(Debug)]
struct Shared {
    /// Dropped before `freed`: the name is free when the disk's locks are.
    disk: Disk,
    freed: Freed,
}

/// Frees a name when dropped.
#[derive(Debug)]
struct Freed {
    name: String,
    descriptor: FileId,
    all: Arc<OpenDisks>,
}

impl StoreExports {
    /// The exports of `root`; with `read_only`, containers too are served read-only.
    pub fn new(root: Root, read_only: bool) -> StoreExports {
        StoreExports {
            root,
            read_only,
            open: Arc::default(),
        }
    }

    fn open_disk(&self, name: &str) -> Result<(Disk, FileId)> {
        let (bare, snapshot) = match name.split_once('@') {
            Some((bare, snapshot)) => (bare, Some(snapshot.to_owned())),
            None => (name, None),
        };
        let (source, write) = match bare.strip_prefix(TEMPLATE) {
            Some(bare) => {
                snapshots::name::check(bare)?;
                (
                    Source {
                        snapshot,
                        ..template::source(&self.root, bare)
                    },
                    false,
                )
            }
            None => {
                snapshots::name::check(bare)?;
                let write = snapshot.is_none() && !self.read_only;
                let path = self.root.container(bare).join(DESCRIPTOR);
                (
                    Source {
                        path,
                        descriptor: true,
                        snapshot,
                    },
                    write,
                )
            }
        };
        let descriptor = self.descriptor_of(name)?;
        let options = self.root.open_options(write);
        Ok((self.root.opener().open(&source, &options)?, descriptor))
    }

    /// Which descriptor a name means now. Error: `NotFound`.
    fn descriptor_of(&self, name: &str) -> Result<FileId> {
        let bare = name.split_once('@').map_or(name, |(bare, _)| bare);
        let dir = match bare.strip_prefix(TEMPLATE) {
            Some(bare) => snapshots::name::check(bare).map(|()| self.root.template(bare)),
            None => snapshots::name::check(bare).map(|()| self.root.container(bare)),
        };
        let none = || Error::new(Kind::NotFound, format!("there is no export '{name}'"));
        let path = dir.map_err(|_| none())?.join(DESCRIPTOR);
        let file = self.root.opener().store().open(&path, Access::Read);
        match file {
            Err(e) if e.kind() == Kind::NotFound => Err(none()),
            other => Ok(other?.id()),
        }
    }
}

impl OpenDisks {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // The map is whole between two statements.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exports for StoreExports {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        let names = snapshots::list::names(&self.root)?;
        let info = |name, description: &str| ExportInfo {
            name,
            description: description.into(),
        };
        let containers = names.containers.into_iter().map(|n| info(n, "container"));
        let templates = names.templates.into_iter();
        let templates = templates.map(|n| info(format!("{TEMPLATE}{n}"), "template, read-only"));
        Ok(containers.chain(templates).collect())
    }

    fn open(&self, name: &str) -> Result<OpenExport> {
        let mut names = self.open.lock();
        let device = loop {
            let now = self.descriptor_of(name)?;
            let held = names.get(name).filter(|e| e.descriptor == now);
            match held.map(|e| e.shared.upgrade()) {
                Some(Some(shared)) => break shared,
                // Its last user is closing it.
                Some(None) => {
                    names = self
                        .open
                        .closed
                        .wait(names)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                None => {
                    let (disk, descriptor) = self.open_disk(name)?;
                    let freed = Freed {
                        name: name.to_owned(),
                        descriptor,
                        all: self.open.clone(),
                    };
                    let shared = Arc::new(Shared { disk, freed });
                    let entry = Entry {
                        descriptor,
                        shared: Arc::downgrade(&shared),
                    };
                    names.insert(name.to_owned(), entry);
                    break shared;
                }
            }
        };
        Ok(OpenExport {
            device,
            name: name.to_owned(),
            description: String::new(),
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Err(e) = self.disk.close() {
            tracing::error!(export = self.freed.name, error = %e, "the disk was not closed cleanly");
        }
    }
}

impl Drop for Freed {
    fn drop(&mut self) {
        let mut names = self.all.lock();
        // The name may be another disk's by now.
        if names
            .get(&self.name)
            .is_some_and(|e| e.descriptor == self.descriptor)
        {
            names.remove(&self.name);
        }
        drop(names);
        self.all.closed.notify_all();
    }
}

impl Device for Shared {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn cluster_bytes(&self) -> u64 {
        self.disk.cluster_bytes()
    }

    fn map(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<ReadLease> {
        self.disk.map(range, segments)
    }

    fn prepare(&self, range: Range<u64>, segments: &mut Vec<WriteSegment>) -> Result<WriteLease> {
        self.disk.prepare(range, segments)
    }

    fn commit(&self, lease: WriteLease) -> Result<()> {
        self.disk.commit(lease)
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.disk.zero(range, mode)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.disk.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn allocation(&self, range: Range<u64>, limit: usize, out: &mut Vec<Extent>) -> Result<()> {
        self.disk.allocation(range, limit, out)
    }
}
