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
    /// Open a disk for writing that another service still has, or has again: for who moves it, and
    /// lets nobody write to it before it is this one's ([`crate::owner`]).
    pub moving: bool,
}

/// The rooms of a store that tell it from any other directory.
const ROOMS: [&str; 3] = ["containers", "templates", "layers"];

impl OpenOptions {
    /// The same; a disk that lies in a store (`STORE/containers/NAME`, `STORE/templates/NAME`) may use
    /// that store's layers, too.
    pub fn of_store(mut self, store: &dyn Store, source: &Source) -> OpenOptions {
        let real = store.resolve(&source.path).unwrap_or_default();
        let mut up = real.ancestors().skip(2);
        let (Some(room), Some(home)) = (up.next(), up.next()) else {
            return self;
        };
        let is_dir = |r: &&str| {
            store
                .kind(&home.join(r))
                .is_ok_and(|k| k == Some(EntryKind::Dir))
        };
        if source.descriptor
            && ROOMS[..2].iter().any(|r| room.ends_with(r))
            && ROOMS.iter().all(is_dir)
        {
            self.allow.push(home.join(ROOMS[2]));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    #[test]
    fn only_a_disk_of_a_store_may_use_its_layers() {
        let store = MemoryStore::new();
        for dir in [
            "/s",
            "/s/containers",
            "/s/templates",
            "/s/layers",
            "/s/tmp",
            "/s/containers/ct",
            "/s/tmp/ct",
            "/o",
            "/o/containers",
            "/o/containers/ct",
        ] {
            store.create_dir(Path::new(dir)).unwrap();
        }
        let allowed = |dir: &str, descriptor: bool| {
            let path = Path::new(dir).join(DESCRIPTOR);
            if store.kind(&path).unwrap().is_none() {
                store.create(&path, 0o600).unwrap();
            }
            let source = Source {
                path,
                descriptor,
                snapshot: None,
            };
            OpenOptions::default().of_store(&store, &source).allow
        };
        assert_eq!(allowed("/s/containers/ct", true), [Path::new("/s/layers")]);
        for (dir, descriptor) in [
            ("/s/containers/ct", false),
            ("/s/tmp/ct", true),
            ("/s/containers", true),
            ("/o/containers/ct", true),
        ] {
            assert_eq!(allowed(dir, descriptor), Vec::<PathBuf>::new(), "{dir}");
        }
    }
}
