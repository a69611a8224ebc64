//! Whether a backup, and all that it stands on, is what was written.
//!
//! Each file of the chain is read and compared with its record: a byte that changed is found,
//! wherever it is. The records name each other by id, so a file that was exchanged for another backup
//! is found, too. Where the last one has the hash of what the chain shows, that is compared as well.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::error::{Error, Kind, Result};
use ploop::format::qcow2::{BackingFormat, Qcow2Delta};
use ploop::store::{Access, Store};
use serde::Serialize;

use super::record::{Record, hash_file};
use super::{Format, Since};
use crate::convert::Progress;
use crate::hash;

/// Files of a chain at most.
const CHAIN_MAX: usize = 4096;

/// One file of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The file.
    pub file: PathBuf,
    /// Its backup's id.
    pub id: String,
    /// The instant that it shows, in seconds since 1970.
    pub time: u64,
    /// Its length in bytes.
    pub length: u64,
    /// What is wrong with it.
    pub wrong: Option<String>,
}

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// The chain, base first.
    pub files: Vec<Checked>,
    /// The hash of what it shows, where one was recorded and the files are sound.
    pub content: Option<String>,
    /// Nothing is wrong.
    pub ok: bool,
}

/// Reads the backup `file` and all that it stands on. What is wrong is in the answer. Errors: of what
/// cannot be read at all, a record among that. `progress`: bytes done, and in all.
pub fn verify(opener: &Opener, file: &Path, progress: Progress<'_>) -> Result<Verified> {
    let store = opener.store().as_ref();
    let chain = records(store, file)?;
    let last = chain.last().map(|(_, r)| r.clone());
    let hashes = last.as_ref().and_then(|r| r.content.clone());
    let shown = last
        .as_ref()
        .filter(|_| hashes.is_some())
        .map_or(0, |r| r.size);
    // Of records that say anything.
    let lengths = chain.iter().map(|(_, r)| r.length);
    let total = lengths.fold(shown, u64::saturating_add);
    let mut done = 0_u64;
    let mut files = Vec::new();
    let mut expected: Option<&Since> = None;
    for (path, record) in chain.iter().rev() {
        let wrong = look(opener, path, record, expected, &|at, _| {
            progress(done.saturating_add(at.min(record.length)), total);
        })?;
        done = done.saturating_add(record.length);
        files.push(Checked {
            file: path.clone(),
            id: record.id.clone(),
            time: record.time,
            length: record.length,
            wrong,
        });
        expected = record.since.as_ref();
    }
    files.reverse();
    let mut ok = files.iter().all(|f| f.wrong.is_none());
    let mut content = None;
    if let (true, Some(recorded), Some((path, _))) = (ok, hashes, chain.last()) {
        let disk = open(opener, &chain)?;
        let found = hash::content(&disk, &|at, _| progress(done.saturating_add(at), total))?;
        if found != recorded {
            ok = false;
            if let Some(last) = files.last_mut() {
                last.wrong = Some(format!("the chain shows {found}, recorded is {recorded}"));
            }
            tracing::warn!(file = %path.display(), "a backup shows something else than was recorded");
        }
        content = Some(found);
    }
    Ok(Verified { files, content, ok })
}

/// What is wrong with one file.
pub(super) fn look(
    opener: &Opener,
    path: &Path,
    record: &Record,
    expected: Option<&Since>,
    progress: Progress<'_>,
) -> Result<Option<String>> {
    if let Some(since) = expected.filter(|s| s.id != record.id) {
        return Ok(Some(format!(
            "it is backup {}, and what stands on it was made on {}",
            record.id, since.id
        )));
    }
    let store = opener.store().as_ref();
    let length = store.open(path, Access::Read)?.len()?;
    if length != record.length {
        return Ok(Some(format!(
            "it has {length} bytes, and should have {}",
            record.length
        )));
    }
    let found = hash_file(opener, path, progress)?;
    if found != record.file {
        let what = format!("its bytes are {found}, recorded is {}", record.file);
        return Ok(Some(what));
    }
    if record.format != Format::Qcow2 {
        return Ok(None);
    }
    let named = backing(store, path)?;
    let recorded = record.since.as_ref().map(|s| s.file.clone());
    Ok((named != recorded).then(|| "its header names another file than its record".to_owned()))
}

/// The backing file that a qcow2 image names.
fn backing(store: &dyn Store, path: &Path) -> Result<Option<PathBuf>> {
    let delta = Qcow2Delta::open(store.open(path, Access::Read)?)?;
    Ok(delta.backing().map(|b| b.name.into()))
}

/// The files that `file` stands on, and itself, with their records; base first.
fn records(store: &dyn Store, file: &Path) -> Result<Vec<(PathBuf, Record)>> {
    let mut out: Vec<(PathBuf, Record)> = Vec::new();
    let mut seen = HashSet::new();
    let mut path = store.resolve(file)?;
    loop {
        if !seen.insert(path.clone()) || out.len() == CHAIN_MAX {
            let what = "the records of this chain name each other for ever";
            return Err(Error::corrupt(what).on(file));
        }
        let record = Record::read(store, &path).map_err(|e| match e.kind() {
            Kind::NotFound => e.fix("Without its record a backup can be opened, and not verified"),
            _ => e,
        })?;
        let next = record.since.as_ref().map(|s| s.file.clone());
        let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
        out.push((path, record));
        match next {
            Some(next) => path = store.resolve(&dir.join(next))?,
            None => break,
        }
    }
    out.reverse();
    Ok(out)
}

/// Opens a chain.
fn open(opener: &Opener, chain: &[(PathBuf, Record)]) -> Result<Disk> {
    let (file, record) = chain.last().ok_or_else(|| Error::invalid("no backup"))?;
    let dirs = chain.iter().filter_map(|(path, _)| path.parent());
    open_file(
        opener,
        file,
        Some(record.format),
        dirs.map(Path::to_owned).collect(),
    )
}

/// Opens a file, with what it stands on in `allow`.
pub(super) fn open_file(
    opener: &Opener,
    file: &Path,
    format: Option<Format>,
    allow: Vec<PathBuf>,
) -> Result<Disk> {
    let source = Source {
        path: file.to_owned(),
        descriptor: false,
        snapshot: None,
    };
    let options = OpenOptions {
        format: format.map(Format::to_open),
        allow,
        ..OpenOptions::default()
    };
    opener.open(&source, &options)
}

/// The files that an image stands on, and itself, base first, as their headers say. `format`: its
/// own, where that is known; a raw file is never asked. All lie in `allow`, or beside the file that
/// names them; else `Permission`.
pub(super) fn headers(
    store: &dyn Store,
    file: &Path,
    format: Option<Format>,
    allow: &[PathBuf],
) -> Result<Vec<PathBuf>> {
    let mut path = store.resolve(file)?;
    let mut qcow2 = match format {
        Some(format) => format == Format::Qcow2,
        None => is_qcow2(store, &path)?,
    };
    let mut out = Vec::new();
    while qcow2 {
        if out.len() == CHAIN_MAX || out.contains(&path) {
            let what = "the images of this chain name each other for ever";
            return Err(Error::corrupt(what).on(file));
        }
        let delta = Qcow2Delta::open(store.open(&path, Access::Read)?)?;
        let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
        out.push(path);
        let Some(backing) = delta.backing() else {
            out.reverse();
            return Ok(out);
        };
        qcow2 = !matches!(backing.format, Some(BackingFormat::Raw));
        path = store.resolve(&dir.join(&backing.name))?;
        let inside = |dir: &PathBuf| path.starts_with(dir);
        if !inside(&dir) && !allow.iter().any(inside) {
            let what = format!("stands on {}, which was not named", path.display());
            return Err(Error::new(Kind::Permission, what)
                .on(file)
                .fix("Name all files of the chain, base first"));
        }
    }
    out.push(path);
    out.reverse();
    Ok(out)
}

fn is_qcow2(store: &dyn Store, path: &Path) -> Result<bool> {
    if path.extension().is_some_and(|e| e == "raw") {
        return Ok(false);
    }
    let mut head = [0; 16];
    let got = store.open(path, Access::Read)?.read_at(&mut head, 0)?;
    Ok(ploop::format::qcow2::is_qcow2(&head[..got]))
}
