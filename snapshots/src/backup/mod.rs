//! Backups: files that need nothing of ours to be read, whole or as increments on each other.
//!
//! ```text
//!  begin ── snapshot + tracker cleared, one barrier ──▶ copy ──▶ TARGET ──▶ finish
//!    │  the bits it had: .ploop/backup-ID.bits           │  TARGET.part        the snapshot goes
//!    └────────────────────────── abandon ◀───────────────┘
//!                       the bits go back into the tracker
//! ```
//!
//! A backup is what the disk was at one instant: that of a snapshot which is made for it, and which
//! is deleted when it is done. A tracker that goes with it is begun or cleared at that same
//! instant. What it had until then is what the increment holds, and is kept until the increment is
//! whole: in the tracker itself until the snapshot is durable, then in a file beside the disk. So
//! there is no instant at which a power cut leaves a written granule in neither.
//!
//! A backup that was cut is listed in the disk's metadata ([`Pending`]) and goes on from the last
//! mark of its `TARGET.part`; or it is abandoned, which merges the bits back.
//!
//! | format | alone | on another |
//! |---|---|---|
//! | qcow2 | yes | yes: its backing file is the file before it, and that one's format is recorded |
//! | raw, ploop | yes | no: they have no word for it |
//!
//! An increment is qcow2 with clusters no larger than the tracker's granules (4 KiB to 64 KiB). What
//! reads as zeros in it is said to: the file below may have something there. Beside each file is
//! `FILE.json` ([`Record`]), for [`verify`]; the images open without it.

mod begin;
mod copy;
mod end;
mod record;
mod restore;
mod verify;

use std::path::{Path, PathBuf};

use ploop::descriptor::Guid;
use ploop::disk::open;
use ploop::error::{Error, Result};
use ploop::tracker::side::Home;
use serde::{Deserialize, Serialize};

use crate::place::Place;

pub use begin::{Begun, Request, begin, pending};
pub use copy::copy;
pub use end::{abandon, finish, remove};
pub use record::{Record, Since};
pub use restore::{Restored, restore};
pub use verify::{Checked, Verified, verify};

/// Before a backup's id, in the name of the file in `.ploop` that has its tracker's bits.
const BITS: &str = "backup-";

/// The format of a backup's file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// What QEMU calls so.
    #[default]
    Qcow2,
    /// The guest's bytes.
    Raw,
    /// ploop v2; QEMU calls it `parallels`.
    Ploop,
}

impl Format {
    /// As metadata and QEMU have it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
            Format::Ploop => "ploop",
        }
    }

    fn to_open(self) -> open::Format {
        match self {
            Format::Qcow2 => open::Format::Qcow2,
            Format::Raw => open::Format::Raw,
            Format::Ploop => open::Format::Ploop,
        }
    }
}

/// A backup that has begun and has not ended, as the disk's metadata has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The backup's id, a UUID.
    pub id: String,
    /// The file that it becomes; absolute.
    pub target: PathBuf,
    /// Its format.
    pub format: Format,
    /// The instant that it shows, in seconds since 1970.
    pub time: u64,
    /// The tracker that was begun or cleared at that instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracker: Option<Used>,
    /// The backup that it is an increment on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// The content of its chain is to be hashed, however much that is.
    #[serde(default)]
    pub content: bool,
    /// The file is whole and has its name.
    #[serde(default)]
    pub done: bool,
}

/// What a backup has of a tracker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    /// The tracker's id.
    pub id: String,
    /// Its name then.
    pub name: String,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Bytes that its bits are of.
    pub size: u64,
    /// It began with this backup.
    pub begun: bool,
}

/// A backup that others stand on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its id.
    pub id: String,
    /// Where its file was; absolute.
    pub file: PathBuf,
    /// That file's format.
    pub format: Format,
}

impl Pending {
    /// The file while it is not whole.
    pub fn part(&self) -> PathBuf {
        beside(&self.target, ".part")
    }

    /// The target's directory.
    fn dir(&self) -> &Path {
        self.target.parent().unwrap_or(Path::new("/"))
    }

    /// How far it is, and whose the part is.
    fn state(&self) -> PathBuf {
        beside(&self.target, ".part.json")
    }

    /// What becomes that.
    fn claim(&self) -> PathBuf {
        beside(&self.state(), &format!(".{}", self.id))
    }

    /// Where the bits are that its tracker had.
    fn bits(&self, place: &Place<'_>) -> Home {
        let home = Home::new(place.opener().store(), place.dir().join(".ploop"));
        home.called(&self.bits_name())
    }

    fn bits_name(&self) -> String {
        format!("{BITS}{}.bits", self.id)
    }

    /// What its snapshot is called.
    fn snapshot_name(&self) -> String {
        format!("backup-{}", self.id.get(..8).unwrap_or(&self.id))
    }
}

/// `path` with more at its end.
fn beside(path: &Path, more: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(more);
    name.into()
}

/// The snapshot of the pending backup `id`; `None` when it is gone. Error: `NotFound` for the backup.
pub fn snapshot_of(place: &Place<'_>, id: &str) -> Result<Option<Guid>> {
    let (node, _) = find(place, id)?;
    Ok(place.descriptor()?.shot(node).map(|_| node))
}

/// The node and the entry of the pending backup with this id.
fn find(place: &Place<'_>, id: &str) -> Result<(Guid, Pending)> {
    let meta = place.meta()?;
    let mut all = meta.backups.iter();
    let found = all.find(|(_, p)| p.id == id);
    let (guid, pending) = found.ok_or_else(|| {
        let what = format!("{} has no unfinished backup {id}", place.shown());
        Error::new(ploop::error::Kind::NotFound, what)
    })?;
    Ok((Guid::parse(guid)?, pending.clone()))
}
