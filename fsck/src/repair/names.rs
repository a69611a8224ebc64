//! Files that are moved, replaced and made by a repair.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ploop::store::{Access, EntryKind, Store};
use ploop::{Error, Kind, Result};

use super::disk::SIDE;
use super::{Move, Plan};

/// Refuses a move whose file has gone, or whose place was taken.
pub(super) fn still_free(store: &dyn Store, step: &Move) -> Result<()> {
    let there = store.kind(&step.from)? == Some(EntryKind::File);
    let free = store.kind(&step.to)?.is_none();
    match there && free {
        true => Ok(()),
        false => Err(
            Error::invalid("it was changed since the repair was planned")
                .on(&step.from)
                .fix("Plan again"),
        ),
    }
}

/// A free name for the undo file.
pub(super) fn undo_name(store: &dyn Store, plan: &Plan, real: &Path) -> Result<PathBuf> {
    let name = real.file_name().unwrap_or_default().to_os_string();
    let dir = match plan.source.descriptor {
        true => {
            let side = plan.root.join(SIDE);
            make_dir(store, &side)?;
            side
        }
        false => plan.root.clone(),
    };
    let mut number = 0u32;
    loop {
        let mut name = name.clone();
        match number {
            0 => name.push(".undo"),
            n => name.push(format!(".undo.{n}")),
        }
        let path = dir.join(name);
        if store.kind(&path)?.is_none() {
            return Ok(path);
        }
        number += 1;
    }
}

fn make_dir(store: &dyn Store, dir: &Path) -> Result<()> {
    match store.create_dir(dir) {
        Err(e) if e.kind() == Kind::Exists => match store.kind(dir)? == Some(EntryKind::Dir) {
            true => Ok(()),
            false => Err(Error::new(Kind::Permission, "must be a directory").on(dir)),
        },
        Err(e) => Err(e),
        Ok(()) => store.sync_dir(dir.parent().unwrap_or(Path::new("/"))),
    }
}

pub(super) fn put_away(store: &dyn Store, plan: &Plan, moves: &[&Move]) -> Result<()> {
    if moves.is_empty() {
        return Ok(());
    }
    let mut dirs = BTreeSet::new();
    for step in moves {
        let to = step.to.parent().unwrap_or(&plan.root);
        make_dir(store, &plan.root.join(SIDE))?;
        make_dir(store, to)?;
        store.rename_new(&step.from, &step.to)?;
        dirs.insert(to);
        dirs.extend(step.from.parent());
    }
    dirs.iter().try_for_each(|dir| store.sync_dir(dir))
}

/// Puts `bytes` in the place of the file at `path`, in one step. Mode and owner stay.
pub(super) fn replace(store: &dyn Store, path: &Path, bytes: &[u8]) -> Result<()> {
    forget_new(store, path)?;
    let new = new_name(path);
    let rights = store.open(path, Access::Read)?.rights()?;
    let written = store.create(&new, 0o600).and_then(|file| {
        rights.iter().try_for_each(|r| file.set_rights(r))?;
        file.write_at(bytes, 0)?;
        file.sync()
    });
    let renamed = written.and_then(|()| store.rename(&new, path));
    if let Err(e) = renamed {
        drop(store.remove_file(&new));
        return Err(e);
    }
    store.sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// Where the file that takes the place of `path` is written.
fn new_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".repair");
    name.into()
}

/// Removes what a replacement that was cut short left.
pub(super) fn forget_new(store: &dyn Store, path: &Path) -> Result<()> {
    match store.remove_file(&new_name(path)) {
        Err(e) if e.kind() != Kind::NotFound => Err(e),
        _ => Ok(()),
    }
}
