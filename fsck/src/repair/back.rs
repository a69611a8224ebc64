//! Undo: the bytes, lengths and names from before a repair.
//!
//! ```text
//!  1  the whole undo file is read and judged           a damaged or foreign one changes nothing
//!  2  every file it names is locked, and compared      each word old or new, each length one of three
//!  3  bytes, then lengths; files back; descriptor      durable, file by file
//! ```
//!
//! What step 2 accepts is every state that a repair, or an undo, can leave when it is cut short: so
//! both can be taken back, any number of times. A file that anything else changed since, in its
//! tables, is refused. What a guest wrote in place since then is not looked at and stays.
//!
//! An undo file may come from anybody. It can reach ploop images, a descriptor, and names in
//! `.ploop/lost+found`, all in the one directory that it names, and no link is followed there.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::disk::open::{DESCRIPTOR, Opener};
use ploop::format::ploop::header::has_signature;
use ploop::locks::{Use, lock_image};
use ploop::store::{Access, EntryKind, Store, StoreFile, read_or_zero};
use ploop::{Error, Kind, Result};

use super::disk::{LOST, SIDE};
use super::names::{forget_new, replace};
use super::record::{Reader, Record};
use super::save::{sum, tail_of};

/// What an undo did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undone {
    /// The directory that it is about.
    pub root: PathBuf,
    /// Files that are again what they were.
    pub files: Vec<PathBuf>,
}

/// Takes back the repair that wrote the undo file at `path`, also one that was cut short. May be
/// repeated; the undo file stays.
///
/// Errors: `Corrupt` for a damaged undo file or one that was not finished (nothing was changed
/// then); `Invalid` when a file is not what the repair left; `InUse`.
pub fn undo(opener: &Opener, path: &Path) -> Result<Undone> {
    let store = opener.store();
    let file = store.open(&store.resolve(path)?, Access::Read)?;
    let scope = Scope::read(store.as_ref(), &file)?;
    let has_descriptor = store.kind(&scope.root.join(DESCRIPTOR))?.is_some();
    let _lock = match has_descriptor && opener.locks_disks() {
        true => Some(opener.lock_disk(&scope.root)?),
        false => None,
    };
    let images = scope.open(store.as_ref())?;
    judge(store.as_ref(), &scope, &images, &file)?;
    restore(store.as_ref(), &scope, &images, &file)?;
    let names = scope
        .files
        .iter()
        .chain(&scope.moved)
        .chain(&scope.replaced);
    Ok(Undone {
        files: names.map(|n| scope.root.join(n)).collect(),
        root: scope.root.clone(),
    })
}

/// What an undo file is about.
#[derive(Debug, Default)]
struct Scope {
    root: PathBuf,
    files: Vec<PathBuf>,
    moved: Vec<PathBuf>,
    replaced: Vec<PathBuf>,
}

fn foreign(file: &Arc<dyn StoreFile>, what: &str) -> Error {
    Error::corrupt(what).on(file.path())
}

impl Scope {
    /// Reads all records, and keeps the names.
    fn read(store: &dyn Store, file: &Arc<dyn StoreFile>) -> Result<Scope> {
        let mut reader = Reader::new(file)?;
        let Some(Record::Root(root)) = reader.next()? else {
            return Err(foreign(file, "the undo file names no directory"));
        };
        let mut scope = Scope {
            root: store.resolve(&root)?,
            ..Scope::default()
        };
        // It was written resolved: a link on the way now leads elsewhere.
        if scope.root != root {
            let what = "the directory of the undo file is another one now";
            return Err(Error::invalid(what).on(root));
        }
        let mut end = None;
        let mut len = 0;
        while let Some(record) = reader.next()? {
            match record {
                Record::Root(_) => {
                    return Err(foreign(file, "the undo file names two directories"));
                }
                Record::End { .. } => {}
                Record::File { name, lens, .. } => {
                    end = Some(0);
                    len = lens[0];
                    scope.files.push(name);
                }
                Record::Bytes {
                    offset, ref old, ..
                } => match &mut end {
                    // What was there lay inside of what was the file.
                    Some(end) if *end <= offset && offset + old.len() as u64 <= len => {
                        *end = offset + old.len() as u64;
                    }
                    _ => return Err(foreign(file, "the undo file is out of order")),
                },
                Record::Move { from, to } => {
                    let lost = Path::new(SIDE).join(LOST);
                    if to.parent() != Some(&lost) {
                        let what = "the undo file moves what no repair moved";
                        return Err(foreign(file, what));
                    }
                    scope.moved.push(from);
                }
                Record::Replace { name, .. } => {
                    let xml = name
                        .extension()
                        .is_some_and(|e| e.eq_ignore_ascii_case("xml"));
                    if !xml || name.components().count() != 1 {
                        let what = "the undo file replaces what no repair replaced";
                        return Err(foreign(file, what));
                    }
                    scope.replaced.push(name);
                }
            }
        }
        Ok(scope)
    }

    /// The images, open and locked.
    fn open(&self, store: &dyn Store) -> Result<Vec<Arc<dyn StoreFile>>> {
        let open = |name: &PathBuf| {
            let path = self.root.join(name);
            if store.resolve(&path)? != path {
                let what = "a link, where the repaired image was";
                return Err(Error::new(Kind::Permission, what).on(path));
            }
            let file = store.open(&path, Access::Write)?;
            lock_image(file.as_ref(), Use::Write)?;
            let mut head = [0; 16];
            let got = file.read_at(&mut head, 0)?;
            match has_signature(&head[..got]) {
                true => Ok(file),
                false => Err(changed(&path)),
            }
        };
        self.files.iter().map(open).collect()
    }
}

fn changed(path: &Path) -> Error {
    Error::invalid("it is not what the repair left: it was changed since")
        .on(path)
        .fix("Undo would damage it now. Check it: ploop check")
}

/// Refuses unless everything is in a state between before and after the repair.
fn judge(
    store: &dyn Store,
    scope: &Scope,
    images: &[Arc<dyn StoreFile>],
    file: &Arc<dyn StoreFile>,
) -> Result<()> {
    let mut reader = Reader::new(file)?;
    let mut at = None;
    let mut now: Option<Patient> = None;
    while let Some(record) = reader.next()? {
        match record {
            Record::File {
                lens,
                table_end,
                rest,
                tail,
                ..
            } => {
                if let Some(patient) = now.take() {
                    patient.judge(image_of(images, at)?)?;
                }
                let next = at.map_or(0, |at| at + 1);
                at = Some(next);
                now = Some(Patient {
                    lens,
                    table: (table_end, rest),
                    tail,
                    recorded: Vec::new(),
                    done: true,
                });
                let image = image_of(images, at)?;
                if !lens.contains(&image.len()?) {
                    return Err(changed(image.path()));
                }
            }
            Record::Bytes { offset, old, new } => {
                let image = image_of(images, at)?;
                let end = offset + old.len() as u64;
                let Some(patient) = &mut now else {
                    return Err(changed(image.path()));
                };
                match patient.recorded.last_mut() {
                    Some(last) if last.end == offset => last.end = end,
                    _ => patient.recorded.push(offset..end),
                }
                if !new.is_empty() {
                    match between(image, offset, &old, &new)? {
                        State::New => {}
                        State::Between => patient.done = false,
                        State::Foreign => return Err(changed(image.path()).at(offset)),
                    }
                }
            }
            Record::Move { from, to } => {
                let here = kind_here(store, &scope.root.join(&from))?;
                let there = kind_here(store, &scope.root.join(to))?;
                let one = match (here, there) {
                    (None, Some(kind)) | (Some(kind), None) => kind == EntryKind::File,
                    _ => false,
                };
                if !one {
                    return Err(changed(&scope.root.join(from)));
                }
            }
            Record::Replace { name, old, new } => {
                let path = scope.root.join(name);
                let now = contents(store, &path, old.len().max(new.len()))?;
                if now.as_ref() != Some(&old) && now.as_ref() != Some(&new) {
                    return Err(changed(&path));
                }
            }
            Record::Root(_) | Record::End { .. } => {}
        }
    }
    match now {
        Some(patient) => patient.judge(image_of(images, at)?),
        None => Ok(()),
    }
}

/// What is there under a name. Error: `Permission` when a link leads to its directory.
fn kind_here(store: &dyn Store, path: &Path) -> Result<Option<EntryKind>> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    match store.resolve(dir) {
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
        Ok(real) if real == dir => store.kind(path),
        Ok(_) => {
            let what = "a link, where a directory of the repair was";
            Err(Error::new(Kind::Permission, what).on(dir))
        }
    }
}

/// What the undo file says of the image at hand.
struct Patient {
    lens: [u64; 3],
    /// Where the table ends, and the checksum of what the repair had no business with in it.
    table: (u64, u32),
    /// The checksum of what the repair put behind the old end.
    tail: u32,
    recorded: Vec<Range<u64>>,
    /// Nothing of it is as it was before the repair.
    done: bool,
}

impl Patient {
    /// Judges the sectors of the table that were not recorded, and what would be cut off. The
    /// second only of a repair that was done: nobody uses the image before.
    fn judge(self, image: &dyn StoreFile) -> Result<()> {
        let ([old, _, end], (table_end, rest)) = (self.lens, self.table);
        let table = sum(image, 0..table_end, &self.recorded)? == rest;
        let tail =
            !self.done || image.len()? != end || sum(image, tail_of(old, end), &[])? == self.tail;
        match table && tail {
            true => Ok(()),
            false => Err(changed(image.path())),
        }
    }
}

fn image_of(images: &[Arc<dyn StoreFile>], at: Option<usize>) -> Result<&dyn StoreFile> {
    let image = at.and_then(|at| images.get(at));
    // `Scope::read` saw that bytes follow a file.
    let image = image.ok_or_else(|| Error::corrupt("the undo file changed while it was read"))?;
    Ok(image.as_ref())
}

/// How bytes of an image stand to those before and after the repair.
enum State {
    New,
    /// Every word is its old or its new one.
    Between,
    Foreign,
}

/// The state of the bytes at `offset`. What the file does not have any more is fine.
fn between(file: &dyn StoreFile, offset: u64, old: &[u8], new: &[u8]) -> Result<State> {
    let mut now = vec![0; old.len()];
    let got = file.read_at(&mut now, offset)?;
    let mut state = State::New;
    for ((n, o), w) in now[..got].chunks(4).zip(old.chunks(4)).zip(new.chunks(4)) {
        if n == &w[..n.len()] {
            continue;
        }
        if n != &o[..n.len()] {
            return Ok(State::Foreign);
        }
        state = State::Between;
    }
    Ok(state)
}

/// The bytes of a file that has `max` at most; `None` for a longer one.
fn contents(store: &dyn Store, path: &Path, max: usize) -> Result<Option<Vec<u8>>> {
    let file = store.open(path, Access::Read)?;
    let len = file.len()?;
    if len > max as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; len as usize];
    read_or_zero(file.as_ref(), &mut bytes, 0)?;
    Ok(Some(bytes))
}

fn restore(
    store: &dyn Store,
    scope: &Scope,
    images: &[Arc<dyn StoreFile>],
    file: &Arc<dyn StoreFile>,
) -> Result<()> {
    // The files that an image was repaired from come back before the image needs them again.
    let mut reader = Reader::new(file)?;
    let mut dirs = std::collections::BTreeSet::new();
    while let Some(record) = reader.next()? {
        if let Record::Move { from, to } = record {
            let (from, to) = (scope.root.join(from), scope.root.join(to));
            if store.kind(&from)?.is_none() {
                store.rename_new(&to, &from)?;
            }
            let parents = [from, to].map(|p| p.parent().map(Path::to_path_buf));
            dirs.extend(parents.into_iter().flatten());
        }
    }
    for dir in dirs {
        // An undo that went this far has removed it.
        if store.kind(&dir)?.is_some() {
            store.sync_dir(&dir)?;
        }
    }
    let mut reader = Reader::new(file)?;
    let mut current: Option<(usize, u64)> = None;
    let finish = |current: Option<(usize, u64)>| -> Result<()> {
        let Some((at, len)) = current else {
            return Ok(());
        };
        let image = image_of(images, Some(at))?;
        image.set_len(len)?;
        image.sync()
    };
    while let Some(record) = reader.next()? {
        match record {
            Record::File { lens, .. } => {
                finish(current)?;
                let next = current.map_or(0, |(at, _)| at + 1);
                current = Some((next, lens[0]));
                let image = image_of(images, Some(next))?;
                if image.len()? < lens[0] {
                    image.set_len(lens[0])?;
                }
            }
            Record::Bytes { offset, old, .. } => {
                let at = current.map(|(at, _)| at);
                image_of(images, at)?.write_at(&old, offset)?;
            }
            Record::Replace { name, old, .. } => {
                let path = scope.root.join(name);
                forget_new(store, &path)?;
                if contents(store, &path, old.len())?.as_ref() != Some(&old) {
                    replace(store, &path, &old)?;
                }
            }
            Record::Root(_) | Record::Move { .. } | Record::End { .. } => {}
        }
    }
    finish(current)?;
    // Nothing else may be in them.
    let lost = scope.root.join(SIDE).join(LOST);
    if !scope.moved.is_empty() && store.list(&lost).is_ok_and(|names| names.is_empty()) {
        store.remove_dir(&lost)?;
    }
    Ok(())
}
