//! Moves by which a store took a disk that has moved on, kept until their sources know.
//!
//! A destination's record goes when the source is known to know. Where the disk moves on before that, the
//! record stays as `.ploop/taken-MOVE` of the store: a source that comes back and asks is told that the
//! disk was taken, and lets go of it too. One that never asks costs a file. Of a disk that is removed
//! nothing is kept: who asks then may have the last of it.

use std::path::{Path, PathBuf};

use super::{Record, SIDE, parse};
use crate::descriptor::Guid;
use crate::error::{Kind, Result};
use crate::store::{Access, Store, replace};

fn name(id: Guid) -> String {
    format!("taken-{id}")
}

fn path(dir: &Path, id: Guid) -> PathBuf {
    dir.join(SIDE).join(name(id))
}

/// Keeps the record of a disk that was taken and is about to move on, in the store at `dir`. Durable on
/// return.
pub fn keep(store: &dyn Store, dir: &Path, record: &Record) -> Result<()> {
    replace(store, dir, SIDE, &name(record.id), &record.encode()?)
}

/// That of the move `id`; `None` where none is kept. Error: `Corrupt`.
pub fn read(store: &dyn Store, dir: &Path, id: Guid) -> Result<Option<Record>> {
    match store.open(&path(dir, id), Access::Read) {
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        file => parse(file?.as_ref()).map(Some),
    }
}

/// The source of the move `id` knows. Durable on return. Nothing where none is kept.
pub fn forget(store: &dyn Store, dir: &Path, id: Guid) -> Result<()> {
    match store.remove_file(&path(dir, id)) {
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => store.sync_dir(&dir.join(SIDE)),
    }
}
