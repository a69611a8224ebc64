//! A file that gets its name only when it is whole.

use std::path::{Path, PathBuf};

use ploop::store::Store;
use ploop::{Error, Kind, Result};
use uuid::Uuid;

use super::taken;

/// A new file under a temporary name beside its target. Dropped before [`Staged::publish`], it
/// takes the file along.
#[derive(Debug)]
pub(super) struct Staged<'a> {
    store: &'a dyn Store,
    target: PathBuf,
    dir: PathBuf,
    temp: PathBuf,
    made: bool,
}

impl<'a> Staged<'a> {
    /// For a target that must be free. Makes nothing yet.
    pub(super) fn new(store: &'a dyn Store, target: PathBuf) -> Result<Staged<'a>> {
        let Some(name) = target.file_name() else {
            return Err(Error::invalid("not the name of a file").on(target));
        };
        if store.kind(&target)?.is_some() {
            return Err(taken(&target));
        }
        let mut temp = name.to_os_string();
        temp.push(format!(".tmp-{}", Uuid::new_v4()));
        let dir = match target.parent() {
            Some(dir) if dir != Path::new("") => dir.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let temp = dir.join(temp);
        Ok(Staged {
            store,
            target,
            dir,
            temp,
            made: false,
        })
    }

    pub(super) fn store(&self) -> &'a dyn Store {
        self.store
    }

    /// The name that the file will get.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// The name that it has until then.
    pub(super) fn temp(&self) -> &Path {
        &self.temp
    }

    /// The file exists from here on, and is this one's to remove.
    pub(super) fn made(&mut self) {
        self.made = true;
    }

    /// Gives the file, whose bytes are durable, its name, and makes that durable. On error neither
    /// name is left.
    pub(super) fn publish(mut self) -> Result<()> {
        let renamed = self.store.rename_new(&self.temp, &self.target);
        renamed.map_err(|e| match e.kind() {
            Kind::Exists => taken(&self.target),
            _ => e,
        })?;
        self.made = false;
        let synced = self.store.sync_dir(&self.dir);
        if synced.is_err() {
            // The first error is the one to report.
            drop(self.store.remove_file(&self.target));
        }
        synced
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if self.made {
            // On the way out with an error, which is the one to report.
            drop(self.store.remove_file(&self.temp));
        }
    }
}
