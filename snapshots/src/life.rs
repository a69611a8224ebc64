//! The life of a disk: what a client's holder asks for, to know whether the service that went away
//! took answered writes with it.
//!
//! A life is unbroken as long as no answered write was lost. It is told to nobody before the disk is
//! durably marked as living it, and the mark is taken back only after a clean close:
//!
//! | `.ploop/life` says | the next one who opens the disk for writing and is asked |
//! |---|---|
//! | nothing, there is none | begins the first life |
//! | closed | goes on with that life: all that was answered in it was made durable |
//! | open | begins a new life: whoever lived the last one never closed the disk |
//!
//! The mark is this file's own, not the image's in-use mark: a repair, or another tool, clears that
//! one and loses what was not flushed all the same. Who is never asked writes nothing. The file also
//! has a name for the disk, made with its first life: a container that is removed and made anew is
//! another one, a clone has none yet, and one that was made to show something else is another, too:
//! what a client has in memory is of what it showed before.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use ploop::error::{Error, Kind, Result};
use ploop::store::{Store, replace};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::store::read_small;

const SIDE: &str = ".ploop";
const FILE: &str = "life";
const BYTES_MAX: u64 = 4096;

/// A life that is being lived; shown as `DISK/LIFE`, two UUIDs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    disk: Uuid,
    life: Uuid,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.disk, self.life)
    }
}

impl FromStr for Life {
    type Err = Error;

    fn from_str(text: &str) -> Result<Life> {
        let wrong = || Error::invalid(format!("{text:?} is no life of a disk"));
        let (disk, life) = text.split_once('/').ok_or_else(wrong)?;
        let id = |text: &str| Uuid::try_parse(text).map_err(|e| wrong().caused_by(e));
        Ok(Life {
            disk: id(disk)?,
            life: id(life)?,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct Record {
    disk: String,
    life: String,
    open: bool,
}

/// The life of the disk in `dir`, which the caller has open for writing: the one before when it was
/// ended, else a new one. Durable on return, as one that was not ended. Error: `Corrupt`.
pub fn begin(store: &dyn Store, dir: &Path) -> Result<Life> {
    let new = Uuid::new_v4;
    let life = match read(store, dir)? {
        None => Life {
            disk: new(),
            life: new(),
        },
        Some((last, true)) => Life {
            life: new(),
            ..last
        },
        Some((last, false)) => last,
    };
    write(store, dir, life, true)?;
    Ok(life)
}

/// The disk in `dir`, which the caller has open for writing, lives the life that it lived elsewhere: all
/// that was answered in it is here. Durable on return, as one that was not ended.
pub fn carry_on(store: &dyn Store, dir: &Path, life: Life) -> Result<()> {
    write(store, dir, life, true)
}

/// Marks the life as ended in order. The caller has closed the disk, cleanly and durably, and still
/// has its lock. Durable on return.
pub fn end(store: &dyn Store, dir: &Path, life: Life) -> Result<()> {
    write(store, dir, life, false)
}

/// The disk, which nobody has open, is about to show something else: who asks next is told of another
/// disk. Durable on return, so before the commit point of what changes it. Without a record nothing is
/// written.
pub fn forget(store: &dyn Store, dir: &Path) -> Result<()> {
    let side = dir.join(SIDE);
    let path = side.join(FILE);
    if store.kind(&path)?.is_none() {
        return Ok(());
    }
    store.remove_file(&path)?;
    store.sync_dir(&side)
}

/// The life that is recorded, and whether it was left open.
fn read(store: &dyn Store, dir: &Path) -> Result<Option<(Life, bool)>> {
    let path = dir.join(SIDE).join(FILE);
    if store.kind(&path)?.is_none() {
        return Ok(None);
    }
    let refused = || {
        Error::new(Kind::Corrupt, "not the record of a disk's life")
            .on(&path)
            .fix("Remove it: clients' holders then send again what was not flushed")
    };
    let bytes = read_small(store, &path, BYTES_MAX)?;
    let record: Record = serde_json::from_slice(&bytes).map_err(|e| refused().caused_by(e))?;
    let id = |text: &str| Uuid::parse_str(text).map_err(|e| refused().caused_by(e));
    let life = Life {
        disk: id(&record.disk)?,
        life: id(&record.life)?,
    };
    Ok(Some((life, record.open)))
}

fn write(store: &dyn Store, dir: &Path, life: Life, open: bool) -> Result<()> {
    let record = Record {
        disk: life.disk.to_string(),
        life: life.life.to_string(),
        open,
    };
    let text = serde_json::to_vec(&record);
    let text = text.map_err(|e| Error::invalid("a life that JSON cannot hold").caused_by(e))?;
    replace(store, dir, SIDE, FILE, &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::write_new;
    use ploop::store::memory::MemoryStore;
    use ploop::store::recording::{Budget, RecordingStore};

    const DISK: &str = "/disk";

    fn store() -> MemoryStore {
        let store = MemoryStore::new();
        store.create_dir(Path::new(DISK)).unwrap();
        store
    }

    #[test]
    fn a_life_is_kept_by_a_clean_close_and_lost_without_one() {
        let (store, dir) = (store(), Path::new(DISK));
        let first = begin(&store, dir).unwrap();
        end(&store, dir, first).unwrap();
        assert_eq!(begin(&store, dir).unwrap(), first, "closed in order");
        let second = begin(&store, dir).unwrap();
        assert_ne!(second.life, first.life, "never closed");
        assert_eq!(second.disk, first.disk, "the same disk");
    }

    #[test]
    fn a_life_goes_on_elsewhere() {
        let (here, there, dir) = (store(), store(), Path::new(DISK));
        let life = begin(&here, dir).unwrap();
        let told: Life = life.to_string().parse().unwrap();
        carry_on(&there, dir, told).unwrap();
        end(&there, dir, told).unwrap();
        assert_eq!(begin(&there, dir).unwrap(), life);
        for text in ["", "/", "a/b", &life.to_string()[1..]] {
            assert!(text.parse::<Life>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_record_that_is_none_is_refused_by_name() {
        let (store, dir) = (store(), Path::new(DISK));
        store.create_dir(&dir.join(SIDE)).unwrap();
        let path = dir.join(SIDE).join(FILE);
        write_new(&store, &path, b"{\"disk\":7}").unwrap();
        let e = begin(&store, dir).unwrap_err();
        assert_eq!((e.kind(), e.path()), (Kind::Corrupt, Some(path.as_path())));
    }

    /// What the next open is told wherever the power is cut after `lived` has returned.
    fn next_lives(lived: impl Fn(&dyn Store, &Path) -> Life) -> (Life, Vec<Life>) {
        const RETURNED: u64 = 1;
        let dir = Path::new(DISK);
        let recorded = RecordingStore::on(&store());
        let life = lived(recorded.store().as_ref(), dir);
        recorded.mark(RETURNED);
        let mut next = Vec::new();
        for point in recorded.crash_points() {
            let returned = recorded.marks_before(point).contains(&RETURNED);
            for state in recorded.states_at(point, &Budget::default()) {
                let told = begin(&state.build(), dir).unwrap();
                if returned {
                    next.push(told);
                }
            }
        }
        assert!(!next.is_empty());
        (life, next)
    }

    #[test]
    fn a_life_that_was_told_is_durably_open() {
        let (life, next) = next_lives(|store, dir| begin(store, dir).unwrap());
        let renewed = |n: &Life| n.life != life.life && n.disk == life.disk;
        assert!(next.iter().all(renewed), "{life}: {next:?}");
        let again = |store: &dyn Store, dir: &Path| {
            let first = begin(store, dir).unwrap();
            end(store, dir, first).unwrap();
            begin(store, dir).unwrap()
        };
        let (life, next) = next_lives(again);
        let renewed = |n: &Life| n.life != life.life && n.disk == life.disk;
        assert!(next.iter().all(renewed), "{life}: {next:?}");
    }

    #[test]
    fn a_disk_that_shows_something_else_is_another() {
        let (store, dir) = (store(), Path::new(DISK));
        forget(&store, dir).unwrap();
        assert!(store.kind(&dir.join(SIDE)).unwrap().is_none(), "no record");
        let (life, next) = next_lives(|store, dir| {
            let life = begin(store, dir).unwrap();
            end(store, dir, life).unwrap();
            forget(store, dir).unwrap();
            life
        });
        assert!(next.iter().all(|n| n.disk != life.disk), "{life}: {next:?}");
    }

    #[test]
    fn a_life_that_was_ended_goes_on() {
        let (life, next) = next_lives(|store, dir| {
            let life = begin(store, dir).unwrap();
            end(store, dir, life).unwrap();
            life
        });
        assert!(next.iter().all(|n| *n == life), "{life}: {next:?}");
    }
}
