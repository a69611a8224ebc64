//! What a user may name, and how it is to be opened.

use std::path::{Path, PathBuf};

use super::open::DESCRIPTOR;
use crate::error::{Error, Kind, Result};
use crate::store::{EntryKind, Store};

/// The format of one image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes.
    Raw,
    /// ploop v1 or v2.
    Ploop,
    /// qcow2, read-only.
    Qcow2,
}

impl Format {
    /// `raw`, `ploop`, `qcow2`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Ploop => "ploop",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// What a user may name: a disk or an image, and perhaps one of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// A descriptor, or one image file.
    pub path: PathBuf,
    /// True for a descriptor.
    pub descriptor: bool,
    /// The GUID (or name) after `@`.
    pub snapshot: Option<String>,
}

impl Source {
    /// Reads `PATH` or `PATH@SNAPSHOT`. A path that exists as it is written wins. Error: `NotFound`.
    pub fn parse(store: &dyn Store, text: &str) -> Result<Source> {
        if let Some(source) = Source::at(store, Path::new(text), None)? {
            return Ok(source);
        }
        if let Some((path, snapshot)) = text.rsplit_once('@')
            && !snapshot.is_empty()
            && let Some(source) = Source::at(store, Path::new(path), Some(snapshot.to_owned()))?
        {
            return Ok(source);
        }
        Err(Error::new(
            Kind::NotFound,
            "no such image, disk directory or descriptor",
        )
        .on(text))
    }

    fn at(store: &dyn Store, path: &Path, snapshot: Option<String>) -> Result<Option<Source>> {
        let real = match store.resolve(path) {
            Err(e) if e.kind() == Kind::Permission => return Err(e),
            Err(_) => return Ok(None),
            Ok(real) => real,
        };
        let is_xml = path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("xml"));
        match store.kind(&real)? {
            Some(EntryKind::Dir) => {
                let path = path.join(DESCRIPTOR);
                match store.kind(&path)? {
                    None => {
                        let what = format!("the directory has no {DESCRIPTOR}: it is no disk");
                        return Err(Error::new(Kind::NotFound, what).on(real));
                    }
                    // It would make another directory the one that files may lie in.
                    Some(EntryKind::Link) => {
                        let what = "the descriptor is a link to another disk's";
                        return Err(Error::new(Kind::Permission, what)
                            .on(path)
                            .fix("If that is meant, name the disk that it leads to"));
                    }
                    Some(_) => {}
                }
                Ok(Some(Source {
                    path,
                    descriptor: true,
                    snapshot,
                }))
            }
            Some(_) if is_xml && store.kind(path)? == Some(EntryKind::Link) => {
                let what = "the descriptor is a link to another disk's";
                Err(Error::new(Kind::Permission, what)
                    .on(path)
                    .fix("If that is meant, name the file that it leads to"))
            }
            Some(_) => Ok(Some(Source {
                path: path.to_owned(),
                descriptor: is_xml,
                snapshot,
            })),
            None => Ok(None),
        }
    }
}

/// How a disk is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For writing: the top of a disk, or one ploop image.
    pub write: bool,
    /// Take an image file for this format instead of looking at its first bytes.
    pub format: Option<Format>,
    /// Further directories that files named by files may lie in.
    pub allow: Vec<PathBuf>,
    /// Refuse a qcow2 image that names a backing file, wherever that is: for images that somebody
    /// else made.
    pub alone: bool,
}
