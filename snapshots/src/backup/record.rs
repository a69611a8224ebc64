//! `FILE.json`: what a backup should be. Small; nothing is needed of it to open the file.

use std::path::{Path, PathBuf};

use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::error::{Error, Kind, Result};
use ploop::store::Store;
use serde::{Deserialize, Serialize};

use super::{Format, beside};
use crate::convert::Progress;
use crate::hash;
use crate::store::{read_small, write_new};

/// The version of these records.
pub(super) const VERSION: u32 = 1;
const BYTES_MAX: u64 = 1 << 20;

/// One backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The version of this record: 1.
    pub ploop_backup: u32,
    /// The backup's id, a UUID.
    pub id: String,
    /// The disk, as it was called.
    pub disk: String,
    /// The instant that it shows, in seconds since 1970.
    pub time: u64,
    /// Bytes that the disk showed then.
    pub size: u64,
    /// The file's format.
    pub format: Format,
    /// The tracker that was begun or cleared at that instant, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracker: Option<String>,
    /// The backup that this one is an increment on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Since>,
    /// Guest bytes that the file holds, zeros left out.
    pub data: u64,
    /// The file's length in bytes.
    pub length: u64,
    /// The hash of the file's own bytes.
    pub file: String,
    /// The hash of what the chain shows a guest, where it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// The backup before an increment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// Its id.
    pub id: String,
    /// Its file, as the increment's header names it: from the increment's directory, or absolute.
    pub file: PathBuf,
    /// That file's format.
    pub format: Format,
}

impl Record {
    /// The record of the backup `file`. Errors: `NotFound`; `Corrupt`; `Unsupported` for another
    /// version.
    pub fn read(store: &dyn Store, file: &Path) -> Result<Record> {
        let path = beside(file, ".json");
        let bytes = read_small(store, &path, BYTES_MAX)?;
        let record: Record = serde_json::from_slice(&bytes).map_err(|e| {
            Error::new(Kind::Corrupt, "not the record of a backup")
                .on(&path)
                .caused_by(e)
        })?;
        match record.ploop_backup {
            VERSION => Ok(record),
            n => Err(Error::unsupported(format!("a record of version {n}")).on(path)),
        }
    }

    /// Writes it beside `file`, in the place of what is there; durable on return but for the
    /// directory.
    pub(super) fn write(&self, store: &dyn Store, file: &Path) -> Result<()> {
        put_json(store, &beside(file, ".json"), self)
    }
}

/// Puts a small file in the place of what is there.
pub(super) fn put_json(store: &dyn Store, path: &Path, what: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(what).map_err(|e| {
        Error::invalid("what JSON cannot hold")
            .on(path)
            .caused_by(e)
    })?;
    let temporary = beside(path, ".tmp");
    forget(store, &temporary)?;
    write_new(store, &temporary, &text)?;
    store.rename(&temporary, path)
}

/// Removes a file; one that is not there is fine.
pub(super) fn forget(store: &dyn Store, path: &Path) -> Result<()> {
    match store.remove_file(path) {
        Err(e) if e.kind() != Kind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The hash of a file's own bytes, whatever they are; holes cost nothing.
pub(super) fn hash_file(opener: &Opener, file: &Path, progress: Progress<'_>) -> Result<String> {
    let source = Source {
        path: file.to_owned(),
        descriptor: false,
        snapshot: None,
    };
    let options = OpenOptions {
        format: Some(ploop::disk::open::Format::Raw),
        ..OpenOptions::default()
    };
    hash::content(&opener.open(&source, &options)?, progress)
}
