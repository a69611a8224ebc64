//! A chain of backups becomes a new container.

use std::path::{Path, PathBuf};

use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device as _;
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, Opener};
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create};
use ploop::store::SECTOR;
use serde::Serialize;
use uuid::Uuid;

use super::record::Record;
use super::verify::{headers, look, open_file};
use crate::convert::{Progress, pieces};
use crate::hash::Hasher;
use crate::meta::Meta;
use crate::name;
use crate::store::{Root, sync_moves, write_new};

const IMAGE: &str = "root.hds";
/// Cluster of the new image, in sectors: 64 KiB.
const CLUSTER_SECTORS: u32 = 128;

/// A container that was made.
#[derive(Clone, Debug, Serialize)]
pub struct Restored {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Bytes that it shows.
    pub size: u64,
    /// Bytes of data.
    pub data: u64,
    /// The files that it is of, base first.
    pub files: Vec<PathBuf>,
    /// The hash of what it shows.
    pub content: String,
    /// It was compared with what was recorded.
    pub verified: bool,
}

/// Makes container `name` of the last of `files`; the others, if they are named, must be what it stands
/// on, base first. Durable on return. Needs no record; where there are records, what they say is held
/// to.
///
/// 1. the chain is looked at, and verified where that cannot be done on the way;
/// 2. in a work directory: its content, in one image; closed, synced;
/// 3. metadata and descriptor, durable;
/// 4. COMMIT: the directory is renamed to `containers/NAME`, durable.
///
/// Cut before 4: nothing, but a work directory that is collected. Errors: `Exists`; `Invalid` for files
/// that are not that chain; `Corrupt` for what is not as it was recorded.
pub fn restore(
    root: &Root,
    name: &str,
    files: &[PathBuf],
    progress: Progress<'_>,
) -> Result<Restored> {
    name::check(name)?;
    let store = root.store();
    refuse_name(root, name)?;
    let work = {
        let _alone = root.lock(true)?;
        root.collect_tmp()?;
        root.work()?
    };
    // 1.
    let last = files.last();
    let last = last.ok_or_else(|| Error::invalid("no file to restore from"))?;
    let record = match Record::read(store, last) {
        Err(e) if e.kind() == Kind::NotFound => None,
        record => Some(record?),
    };
    let format = record.as_ref().map(|r| r.format);
    // What a file names is followed into the directories of those that the user named.
    let parents = files.iter().map(|f| {
        let dir = f.parent().filter(|p| *p != Path::new(""));
        store.resolve(dir.unwrap_or(Path::new(".")))
    });
    let allow: Vec<PathBuf> = parents.collect::<Result<_>>()?;
    let chain = headers(store, last, format, &allow)?;
    refuse_others(root, files, &chain)?;
    let expected = record.as_ref().and_then(|r| r.content.clone());
    let verified = expected.is_some() || as_recorded(root.opener(), &chain)?;
    let from = open_file(root.opener(), last, format, allow)?;
    // 2.
    let dir = work.path().join("disk");
    let side = dir.join(".ploop");
    store.create_dir(&dir)?;
    store.create_dir(&side)?;
    let cluster = u64::from(CLUSTER_SECTORS) * SECTOR;
    let padded = from.size().checked_next_multiple_of(cluster);
    let padded = padded.ok_or_else(|| Error::invalid("the size is too large").on(last))?;
    let header = Header::new(Version::V2, CLUSTER_SECTORS, padded / SECTOR)?;
    let image = create(store, &dir.join(IMAGE), &header, 0o600)?;
    let disk = Disk::writable(None, Top::open(image)?, None)?;
    let (mut hasher, mut data) = (Hasher::new(from.size()), 0);
    pieces(&from, progress, &mut |offset, bytes| {
        hasher.add(offset, bytes);
        data += bytes.len() as u64;
        disk.write(offset, bytes)
    })?;
    disk.close()?;
    let content = hasher.text();
    if expected.is_some_and(|e| e != content) {
        return Err(damaged(format!("the chain shows {content}"), last));
    }
    // 3.
    let mut meta = Meta {
        id: Some(Uuid::new_v4().to_string()),
        ..Meta::default()
    };
    if from.size() < padded {
        meta.sizes.insert(IMAGE.to_owned(), from.size());
    }
    let d = Descriptor::new_single(
        padded / SECTOR,
        CLUSTER_SECTORS,
        false,
        Guid::TOP,
        IMAGE.to_owned(),
    )?;
    drop(store.create(&side.join("lock"), 0o600)?);
    write_new(store, &Meta::path(&dir), &meta.to_json()?)?;
    write_new(store, &dir.join(DESCRIPTOR), &d.to_xml())?;
    store.sync_dir(&side)?;
    store.sync_dir(&dir)?;
    // 4. COMMIT
    let _shared = root.lock(false)?;
    let target = root.container(name);
    store
        .rename_new(&dir, &target)
        .map_err(|e| match e.kind() {
            Kind::Exists => refuse_name(root, name).err().unwrap_or(e),
            _ => e,
        })?;
    sync_moves(store, work.path(), &root.dir().join("containers"))?;
    Ok(Restored {
        name: name.to_owned(),
        dir: target,
        size: from.size(),
        data,
        files: chain,
        content,
        verified,
    })
}

/// Compares those files of `chain`, base first, that have records with them; true when all have.
fn as_recorded(opener: &Opener, chain: &[PathBuf]) -> Result<bool> {
    let (mut all, mut above) = (true, None);
    for file in chain.iter().rev() {
        let record = match Record::read(opener.store().as_ref(), file) {
            Err(e) if e.kind() == Kind::NotFound => {
                (all, above) = (false, None);
                continue;
            }
            record => record?,
        };
        if let Some(wrong) = look(opener, file, &record, above.as_ref(), &|_, _| ())? {
            return Err(damaged(wrong, file));
        }
        above = record.since;
    }
    Ok(all)
}

fn damaged(what: String, file: &Path) -> Error {
    Error::corrupt(format!("the backup is damaged: {what}"))
        .on(file)
        .fix("`ploop backup verify` says which file of the chain it is; restore an earlier one")
}

fn refuse_name(root: &Root, name: &str) -> Result<()> {
    let target = root.container(name);
    if root.store().kind(&target)?.is_none() {
        return Ok(());
    }
    let what = format!("there is a container {name} already");
    Err(Error::new(Kind::Exists, what)
        .on(target)
        .fix("Choose another name; nothing is restored over a container"))
}

/// Refuses files that are not the chain, in its order.
fn refuse_others(root: &Root, files: &[PathBuf], chain: &[PathBuf]) -> Result<()> {
    if files.len() == 1 {
        return Ok(());
    }
    let store = root.store();
    let named: Vec<PathBuf> = files
        .iter()
        .map(|f| store.resolve(f))
        .collect::<Result<_>>()?;
    if named == chain {
        return Ok(());
    }
    let list = chain.iter().map(|p| p.display().to_string());
    let what = format!(
        "these files are not one chain: the last stands on {}",
        list.collect::<Vec<_>>().join(", ")
    );
    Err(Error::invalid(what).fix("Name the last one alone, or all of them, base first"))
}
