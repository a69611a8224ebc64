//! The record of a disk that was taken, while the disk moves on and its source may not know yet.
//!
//! A destination's record goes when the source is known to know. Where the disk moves on before that, there
//! is a record of the next move in its place. The first is kept meanwhile:
//!
//! * as `.ploop/came` of the disk while the next move goes on; it is the record again when that ends and
//!   the disk stays ([`super::remove_of`]);
//! * as `.ploop/taken-MOVE` of the store when the disk has left: a source that asks is told that it was
//!   taken, and lets go of it too. One that never asks costs a file.
//!
//! Of a disk that is removed nothing is kept: who asks then may have the last of it.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::{CHANGES, FILE, Record, SIDE, State, parse};
use crate::descriptor::Guid;
use crate::error::{Kind, Result};
use crate::store::{Access, Store, replace};

const CAME: &str = "came";

fn name(id: Guid) -> String {
    format!("taken-{id}")
}

fn path(dir: &Path, id: Guid) -> PathBuf {
    dir.join(SIDE).join(name(id))
}

fn open(store: &dyn Store, path: &Path) -> Result<Option<Record>> {
    match store.open(path, Access::Read) {
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        file => parse(file?.as_ref()).map(Some),
    }
}

fn remove(store: &dyn Store, path: &Path) -> Result<()> {
    match store.remove_file(path) {
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => path.parent().map_or(Ok(()), |side| store.sync_dir(side)),
    }
}

/// Before the disk in `dir` moves on: keeps its record, if it was taken. Durable on return.
pub fn set_aside(store: &dyn Store, dir: &Path) -> Result<()> {
    let _one = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    match super::read(store, dir)? {
        Some(record) if record.state == State::Taken => {
            replace(store, dir, SIDE, CAME, &record.encode()?)
        }
        // What is left of a move that ended.
        _ => remove(store, &dir.join(SIDE).join(CAME)),
    }
}

/// What is kept beside the record of the disk in `dir`. Error: `Corrupt`.
pub fn aside(store: &dyn Store, dir: &Path) -> Result<Option<Record>> {
    open(store, &dir.join(SIDE).join(CAME))
}

/// The source of the move `id`, by which the disk in `dir` was taken, knows: nothing needs to be kept of it,
/// whether it moves on or not. Durable on return. Error: `Corrupt`.
pub fn confirm(store: &dyn Store, dir: &Path, id: Guid) -> Result<()> {
    let _one = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    if aside(store, dir)?.is_some_and(|r| r.id == id) {
        remove(store, &dir.join(SIDE).join(CAME))?;
    }
    match super::read(store, dir)? {
        Some(record) if record.id == id && record.state == State::Taken => {
            super::remove(store, dir)
        }
        _ => Ok(()),
    }
}

/// The record that was kept, if one was, is that of the disk in `dir` again, whatever move has ended since.
/// False where there is none. The caller holds [`CHANGES`].
pub(super) fn put_back(store: &dyn Store, dir: &Path, ended: Guid) -> Result<bool> {
    let came = dir.join(SIDE).join(CAME);
    match aside(store, dir)? {
        None => Ok(false),
        Some(record) if record.id == ended => remove(store, &came).map(|()| false),
        Some(_) => {
            store.rename(&came, &dir.join(SIDE).join(FILE))?;
            store.sync_dir(&dir.join(SIDE)).map(|()| true)
        }
    }
}

/// The disk in `dir` leaves: what is kept of it is kept by the store at `root`. Durable on return.
pub fn leave(store: &dyn Store, dir: &Path, root: &Path) -> Result<()> {
    let _one = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    match aside(store, dir)? {
        None => Ok(()),
        Some(record) => {
            replace(store, root, SIDE, &name(record.id), &record.encode()?)?;
            remove(store, &dir.join(SIDE).join(CAME))
        }
    }
}

/// What the store at `root` keeps of the move `id`. Error: `Corrupt`.
pub fn read(store: &dyn Store, root: &Path, id: Guid) -> Result<Option<Record>> {
    open(store, &path(root, id))
}

/// The source of the move `id` knows. Durable on return. Nothing where nothing is kept.
pub fn forget(store: &dyn Store, root: &Path, id: Guid) -> Result<()> {
    remove(store, &path(root, id))
}
