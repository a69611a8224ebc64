//! What the name of an export means: which disk, opened how.

use std::path::PathBuf;

use ploop::disk::open::{DESCRIPTOR, OpenOptions, Opener, Source};
use ploop::error::{Error, Kind, Result};
use ploop::locks::DiskLock;
use ploop::owner::{self, State};
use ploop::store::{Access, FileId};
use snapshots::template;

use super::{Catalog, Disks};

/// What stands before a template's name.
pub const TEMPLATE: &str = "template:";

/// What a name means.
pub(super) struct Meant {
    /// The same for every way to write the same thing.
    pub(super) key: String,
    pub(super) source: Source,
    pub(super) write: bool,
    pub(super) options: OpenOptions,
    pub(super) id: FileId,
    /// Whose limits hold for it.
    pub(super) container: String,
}

impl Disks {
    /// What `name` means now. Errors: `NotFound`; `InUse` for a live disk that is another service's, or
    /// has not come.
    pub(super) fn meaning(&self, name: &str) -> Result<Meant> {
        let meant = self.meaning_of(name)?;
        if meant.source.descriptor && meant.source.snapshot.is_none() && !is_template(name) {
            let dir = self.place(&meant.container)?.dir().to_owned();
            let store = self.opener().store().as_ref();
            match owner::read(store, &dir)? {
                // The other side has said nothing yet, or just now: whoever opens it waits for that, as
                // long as its mover has it.
                Some(record) if record.state == State::Ready && self.moves(&meant.key) => {}
                Some(_) => owner::check(store, &dir)?,
                None => {}
            }
        }
        Ok(meant)
    }

    /// True while somebody opens it, or has it to himself.
    fn moves(&self, key: &str) -> bool {
        let names = self.table.lock();
        names.open.get(key).is_some_and(|e| e.disk.is_none())
    }

    /// The same, whoever has it.
    pub(super) fn meaning_of(&self, name: &str) -> Result<Meant> {
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
            id: {
                if write && place.opener().locks_disks() {
                    // Opening makes it, and what the disk is must be the same before and after.
                    DiskLock::prepare(place.dir())?;
                }
                identity(place.opener(), place.dir())?
            },
            container: place.shown().to_owned(),
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
            container: name.to_owned(),
        })
    }
}

fn is_template(name: &str) -> bool {
    name.starts_with(TEMPLATE)
}

pub(super) fn no_export(name: &str) -> Error {
    Error::new(Kind::NotFound, format!("there is no export '{name}'"))
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
