//! Where a stream is received into until all of it is there.
//!
//! ```text
//!  tmp/UUID/           gone with whoever receives: an error, a cut
//!  tmp/receive-NAME/   kept when the stream is cut, until it goes on or is given up
//!     0, 1, 2 …        the images
//!     records.json     what is received
//!     state.json       how far it is
//! ```
//!
//! What `state.json` says was received is durable: whole images with their hashes, and one that was
//! closed in its middle. An image that is being written is not said to be there.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ploop::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Position;
use super::manifest::{Manifest, json};
use crate::name;
use crate::store::{Root, Work, move_dir, read_small, remove_tree, write_new};

/// How the directory of a stream that may go on begins; nobody collects those.
pub(crate) const PREFIX: &str = "receive-";

const RECORDS: &str = "records.json";
const STATE: &str = "state.json";
const TEMPORARY: &str = "state.json.tmp";
/// Bytes of one of these files, at most.
const BYTES_MAX: u64 = 64 << 20;

/// Where a stream goes on, for its sender: one word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    records: String,
    position: Position,
}

impl Token {
    /// The hash of the records that it is of.
    pub fn records(&self) -> &str {
        &self.records
    }

    /// What lies before it was received.
    pub fn position(&self) -> Position {
        self.position
    }

    fn body(&self) -> String {
        let Position { image, offset } = self.position;
        format!("1-{}-{image}-{offset}", self.records)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = self.body();
        write!(f, "{body}-{:08x}", crc32fast::hash(body.as_bytes()))
    }
}

impl FromStr for Token {
    type Err = Error;

    fn from_str(text: &str) -> Result<Token> {
        let parts: Vec<&str> = text.trim().split('-').collect();
        let token = match parts[..] {
            ["1", records, image, offset, _] => Some(Token {
                records: records.to_owned(),
                position: Position {
                    image: image.parse().unwrap_or(usize::MAX),
                    offset: offset.parse().unwrap_or(u64::MAX),
                },
            }),
            _ => None,
        };
        token
            .filter(|t| t.to_string() == text.trim())
            .ok_or_else(|| {
                Error::invalid(format!("{text:?} is no token of a stream that was cut"))
                    .fix("`ploop receive --resume-token NAME` prints it")
            })
    }
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    pub(super) position: Position,
    /// Of the images before it.
    pub(super) hashes: Vec<String>,
}

/// A stream that was cut, and may go on.
#[derive(Clone, Debug, Serialize)]
pub struct Partial {
    /// What it is received as.
    pub name: String,
    /// What it is of, as the sender called it.
    pub of: String,
    /// Images that are whole.
    pub done: usize,
    /// Images in all.
    pub images: usize,
    /// Where it goes on; empty where that is not known.
    pub token: String,
    /// Why it is not: then it can only be given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The directory.
#[derive(Debug)]
pub(super) enum Room<'a> {
    /// For one try.
    Once(Work<'a>),
    /// To be kept when the stream is cut.
    Kept {
        root: &'a Root,
        path: PathBuf,
        /// Whether it stays.
        keep: bool,
        _lock: Option<File>,
    },
}

impl<'a> Room<'a> {
    /// A new one. Error: `Exists` where a stream of that name was cut.
    pub(super) fn new(
        root: &'a Root,
        name: &str,
        manifest: &Manifest,
        resumable: bool,
    ) -> Result<Room<'a>> {
        let path = dir(root, name);
        if root.store().kind(&path)?.is_some() {
            let what = format!("a stream that was to be {name} was cut, and may go on");
            return Err(Error::new(Kind::Exists, what).on(path).fix(format!(
                "Go on: ploop send … --resume \"$(ploop receive --resume-token {name})\"; or give \
                 it up: ploop receive --forget {name}"
            )));
        }
        if !resumable {
            return Ok(Room::Once(root.work()?));
        }
        root.store().create_dir(&path)?;
        let room = Room::Kept {
            root,
            _lock: lock(root, &path)?,
            path,
            keep: false,
        };
        let store = root.store();
        write_new(store, &room.path().join(RECORDS), &json(manifest)?)?;
        room.note(&State::default())?;
        Ok(room)
    }

    /// The one of a stream that was cut, which stays unless all goes well. Errors: `NotFound`, `InUse`, and `Invalid` where
    /// `manifest` is of another disk.
    pub(super) fn again(
        root: &'a Root,
        name: &str,
        manifest: &Manifest,
    ) -> Result<(Room<'a>, State)> {
        let path = existing(root, name)?;
        let lock = lock(root, &path)?;
        let (records, state) = read(root, &path)?;
        if records != *manifest {
            let what = format!("the stream goes on with another disk than {name} was begun with");
            return Err(Error::invalid(what).on(path));
        }
        let room = Room::Kept {
            root,
            path,
            keep: true,
            _lock: lock,
        };
        Ok((room, state))
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Room::Once(work) => work.path(),
            Room::Kept { path, .. } => path,
        }
    }

    /// Writes down how far it is; durable on return. Nothing to do where it is not kept.
    pub(super) fn note(&self, state: &State) -> Result<()> {
        let Room::Kept { root, path, .. } = self else {
            return Ok(());
        };
        let (store, temporary) = (root.store(), path.join(TEMPORARY));
        // The images that it speaks of, first.
        store.sync_dir(path)?;
        match store.remove_file(&temporary) {
            Err(e) if e.kind() != Kind::NotFound => return Err(e),
            _ => {}
        }
        write_new(store, &temporary, &json(state)?)?;
        store.rename(&temporary, &path.join(STATE))?;
        store.sync_dir(path)
    }

    /// Whether it stays when this is dropped, if it is one to be kept.
    pub(super) fn keep(&mut self, stays: bool) {
        if let Room::Kept { keep, .. } = self {
            *keep = stays;
        }
    }

    /// It stays, and is durable on return: what was noted is found again.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.keep(true);
        match self {
            Room::Kept { root, .. } => root.store().sync_dir(&root.dir().join("tmp")),
            Room::Once(_) => Ok(()),
        }
    }

    pub(super) fn is_kept(&self) -> bool {
        matches!(self, Room::Kept { .. })
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if let Room::Kept {
            root,
            path,
            keep: false,
            ..
        } = self
            && let Err(e) = give_up(root, path)
        {
            tracing::warn!(error = %e, "what was received stays; `ploop receive --forget` removes it");
        }
    }
}

fn dir(root: &Root, name: &str) -> PathBuf {
    root.dir().join("tmp").join(format!("{PREFIX}{name}"))
}

fn existing(root: &Root, name: &str) -> Result<PathBuf> {
    name::check(name)?;
    let path = dir(root, name);
    if root.store().kind(&path)?.is_some() {
        return Ok(path);
    }
    let what = format!("no stream that was to be {name} was cut");
    Err(Error::new(Kind::NotFound, what)
        .on(path)
        .fix("`ploop receive --list-cut` shows those that may go on"))
}

fn lock(root: &Root, path: &Path) -> Result<Option<File>> {
    root.lock_room(path)?
        .ok_or_else(|| Error::new(Kind::InUse, "somebody receives into it right now").on(path))
}

fn read(root: &Root, path: &Path) -> Result<(Manifest, State)> {
    fn file<T: for<'de> Deserialize<'de>>(root: &Root, path: &Path) -> Result<T> {
        let bytes = read_small(root.store(), path, BYTES_MAX)?;
        serde_json::from_slice(&bytes).map_err(|e| {
            let what = "not what was written when the stream was cut";
            Error::new(Kind::Corrupt, what).on(path).caused_by(e)
        })
    }
    Ok((
        file(root, &path.join(RECORDS))?,
        file(root, &path.join(STATE))?,
    ))
}

/// The stream that was cut and is to be `name`. Error: `NotFound`.
pub fn partial(root: &Root, name: &str) -> Result<Partial> {
    let path = existing(root, name)?;
    let (manifest, state) = read(root, &path)?;
    let token = Token {
        records: manifest.hash()?,
        position: state.position,
    };
    Ok(Partial {
        name: name.to_owned(),
        of: manifest.disk.name,
        done: state.hashes.len(),
        images: manifest.images.len(),
        token: token.to_string(),
        error: None,
    })
}

/// Every stream that was cut and may go on, and what is left of those that cannot.
pub fn partials(root: &Root) -> Result<Vec<Partial>> {
    let names = root.store().list(&root.dir().join("tmp"))?;
    let names = names
        .iter()
        .filter_map(|n| n.to_str()?.strip_prefix(PREFIX));
    let one = |name: &str| match partial(root, name) {
        Ok(found) => found,
        Err(e) => Partial {
            name: name.to_owned(),
            of: String::new(),
            done: 0,
            images: 0,
            token: String::new(),
            error: Some(e.to_string()),
        },
    };
    Ok(names.map(one).collect())
}

/// Gives a stream up that was cut: removes what came of it. Errors: `NotFound`; `InUse` while it
/// goes on.
pub fn forget(root: &Root, name: &str) -> Result<()> {
    let path = existing(root, name)?;
    let _lock = lock(root, &path)?;
    give_up(root, &path)
}

/// Removes it. Half of it is never taken for all of it: it gets a name that everybody collects first.
fn give_up(root: &Root, path: &Path) -> Result<()> {
    let away = root.dir().join("tmp").join(Uuid::new_v4().to_string());
    move_dir(root.store(), path, &away)?;
    remove_tree(root.store(), &away)
}
