//! Who owns a disk that moves from one service to another: a durable record beside its descriptor.
//!
//! | state | of the disk at | may be opened for writing |
//! |---|---|---|
//! | no record | | yes |
//! | `offered` | the source | yes; the other side may be ready, and must be told how the move ended |
//! | `given` | the source | no: the other side may have it, or has it |
//! | `arriving` | the destination | no: not all of it is there |
//! | `ready` | the destination | no: all of it is there, and the source may still have it |
//! | `taken` | the destination | yes; the source may not know yet |
//!
//! `.ploop/owner` is one sector, so a change of state is one write and one sync: the old state or the
//! new one. It is refused, and with it every open for writing, where its checksum is wrong.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `PLOOPOWN` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | the state: 1 to 5, as above |
//! | 16 | 16 | the move |
//! | 32 | 8 | the epoch: one more with every owner |
//! | 40 | 4 | bytes of the peer's address |
//! | 44 | 400 | the peer's address, UTF-8; the rest 0 |
//! | 508 | 4 | CRC-32 of the 508 bytes before |
//!
//! All numbers are little-endian. Which state may follow which is the mover's business.

pub mod past;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::descriptor::Guid;
use crate::error::{Error, Kind, Result};
use crate::store::{Access, SECTOR, Store, StoreFile, read_exact, replace};

/// Bytes of a peer's address, at most.
pub const PEER_MAX: usize = 400;

const SIDE: &str = ".ploop";
const FILE: &str = "owner";
const MAGIC: &[u8; 8] = b"PLOOPOWN";
const VERSION: u32 = 1;
const SUM_AT: usize = SECTOR as usize - 4;
const PEER_AT: usize = 44;
/// How often, and after how long, a record that seems damaged is read again.
const LOOK_AGAIN: u32 = 5;
const PAUSE: Duration = Duration::from_millis(1);

/// Held while a record comes in place of another, or goes because it is of a move that has ended. Between
/// processes the disk's lock has it.
static CHANGES: Mutex<()> = Mutex::new(());

/// See the module text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// At the source, which has it.
    Offered,
    /// At the source, which has it no more.
    Given,
    /// At the destination, in parts.
    Arriving,
    /// At the destination, whole.
    Ready,
    /// At the destination, which has it.
    Taken,
}

impl State {
    const ALL: [State; 5] = [
        State::Offered,
        State::Given,
        State::Arriving,
        State::Ready,
        State::Taken,
    ];

    /// Whether the disk may be opened for writing here.
    pub fn owns(self) -> bool {
        matches!(self, State::Offered | State::Taken)
    }

    /// `offered`, `given` …
    pub fn name(self) -> &'static str {
        match self {
            State::Offered => "offered",
            State::Given => "given",
            State::Arriving => "arriving",
            State::Ready => "ready",
            State::Taken => "taken",
        }
    }

    fn number(self) -> u32 {
        match self {
            State::Offered => 1,
            State::Given => 2,
            State::Arriving => 3,
            State::Ready => 4,
            State::Taken => 5,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// How far the move is, as this side knows.
    pub state: State,
    /// The move; no other one has its name.
    pub id: Guid,
    /// One more with every owner.
    pub epoch: u64,
    /// Where the other side is, for people and for who asks it; [`PEER_MAX`] bytes at most.
    pub peer: String,
}

impl Record {
    fn encode(&self) -> Result<[u8; SECTOR as usize]> {
        let peer = self.peer.as_bytes();
        if peer.len() > PEER_MAX {
            let what = format!(
                "an address of {} bytes; {PEER_MAX} are possible",
                peer.len()
            );
            return Err(Error::invalid(what));
        }
        let mut out = [0; SECTOR as usize];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.state.number().to_le_bytes());
        out[16..32].copy_from_slice(self.id.as_bytes());
        out[32..40].copy_from_slice(&self.epoch.to_le_bytes());
        out[40..44].copy_from_slice(&(peer.len() as u32).to_le_bytes());
        out[PEER_AT..PEER_AT + peer.len()].copy_from_slice(peer);
        let sum = crc32fast::hash(&out[..SUM_AT]);
        out[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
        Ok(out)
    }

    fn decode(bytes: &[u8; SECTOR as usize]) -> Result<Record, &'static str> {
        let number = |at: usize| {
            let mut four = [0; 4];
            four.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(four)
        };
        if &bytes[..8] != MAGIC {
            return Err("it does not begin as one");
        }
        if number(SUM_AT) != crc32fast::hash(&bytes[..SUM_AT]) {
            return Err("its checksum is wrong");
        }
        if number(8) != VERSION {
            return Err("it is of another version");
        }
        let state = State::ALL.into_iter().find(|s| s.number() == number(12));
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[16..32]);
        let mut epoch = [0; 8];
        epoch.copy_from_slice(&bytes[32..40]);
        let peer = bytes[PEER_AT..SUM_AT].get(..number(40) as usize);
        let peer = peer.and_then(|p| std::str::from_utf8(p).ok());
        Ok(Record {
            state: state.ok_or("its state is none that is known")?,
            id: Guid::from_bytes(id),
            epoch: u64::from_le_bytes(epoch),
            peer: peer.ok_or("its peer is no text")?.to_owned(),
        })
    }
}

/// The other side, as a record has it, for people: a source's says what the disk is called there, then
/// the address.
pub fn shown(peer: &str) -> String {
    match peer.split_once(' ') {
        // No name has a colon, and every address has one.
        Some((name, address)) if !name.contains(':') => format!("{address} (as {name})"),
        _ => peer.to_owned(),
    }
}

/// Where the record of the disk in `dir` is.
pub fn path(dir: &Path) -> PathBuf {
    dir.join(SIDE).join(FILE)
}

/// The record of the disk in `dir`; `None` where it does not move. Error: `Corrupt`.
pub fn read(store: &dyn Store, dir: &Path) -> Result<Option<Record>> {
    let path = path(dir);
    let mut again = 0;
    loop {
        let read = match store.open(&path, Access::Read) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            file => file.and_then(|file| parse(file.as_ref())),
        };
        match read {
            // It is written in place, and whoever reads meanwhile may see half of either state.
            Err(e) if e.kind() == Kind::Corrupt && again < LOOK_AGAIN => {
                again += 1;
                std::thread::sleep(PAUSE);
            }
            read => return read.map(Some),
        }
    }
}

fn parse(file: &dyn StoreFile) -> Result<Record> {
    let refused = |why: &str| {
        let what = format!("the record of who owns the disk is damaged: {why}");
        Error::corrupt(what).on(file.path()).fix(
            "Find out whether the service that the disk was moved from or to has it; if it has not, \
             and never will: ploop migrate --resolve take",
        )
    };
    let mut bytes = [0; SECTOR as usize];
    if file.len()? != SECTOR {
        return Err(refused("its length is another"));
    }
    read_exact(file, &mut bytes, 0)?;
    Record::decode(&bytes).map_err(refused)
}

/// Refuses a disk that is not to be opened for writing here. Errors: `InUse`, with what to do;
/// `Corrupt` where the record cannot be read.
pub fn check(store: &dyn Store, dir: &Path) -> Result<()> {
    let Some(record) = read(store, dir)? else {
        return Ok(());
    };
    let (id, peer) = (record.id, shown(&record.peer));
    let (what, fix) = match record.state {
        State::Offered | State::Taken => return Ok(()),
        State::Given => (
            format!("the disk was given to {peer} (move {id})"),
            "It is there. If that service is gone for good: ploop migrate --resolve take, which says \
             what may be lost",
        ),
        State::Arriving => (
            format!("the disk is arriving from {peer} (move {id}): not all of it is here"),
            "Wait for the move to end; what is left of one that was cut goes when ploopd starts",
        ),
        State::Ready => (
            format!("the disk came from {peer}, which has not given it up yet (move {id})"),
            "It is opened as soon as that service says so. If that is gone for good: ploop migrate \
             --resolve take, which says what may be lost",
        ),
    };
    Err(Error::new(Kind::InUse, what).on(dir).fix(fix))
}

/// A record that is open, to change its state.
#[derive(Debug)]
pub struct Owner {
    file: Arc<dyn StoreFile>,
    record: Record,
}

impl Owner {
    /// Writes the record of the disk in `dir`, in place of one that is there. Durable on return.
    pub fn write(store: &dyn Store, dir: &Path, record: Record) -> Result<Owner> {
        let _one = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        replace(store, dir, SIDE, FILE, &record.encode()?)?;
        let file = store.open(&path(dir), Access::Write)?;
        Ok(Owner { file, record })
    }

    /// The one that is there. Errors: as [`read`].
    pub fn open(store: &dyn Store, dir: &Path) -> Result<Option<Owner>> {
        let path = path(dir);
        let file = match store.open(&path, Access::Write) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            file => file?,
        };
        let record = parse(file.as_ref())?;
        Ok(Some(Owner { file, record }))
    }

    /// What it says.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The next state; durable on return. After an error it is the old one or the new one.
    pub fn set(&mut self, state: State, epoch: u64) -> Result<()> {
        let next = Record {
            state,
            epoch,
            ..self.record.clone()
        };
        self.file.write_at(&next.encode()?, 0)?;
        self.file.sync()?;
        self.record = next;
        Ok(())
    }
}

/// The move `id` of the disk in `dir` has ended, and the disk is here: its record goes, and the one that was
/// kept meanwhile ([`past`]) is in its place. Durable on return; false where the record is of another
/// move. Error: `Corrupt`.
pub fn remove_of(store: &dyn Store, dir: &Path, id: Guid) -> Result<bool> {
    let _one = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    match read(store, dir)? {
        Some(record) if record.id == id => {
            if !past::put_back(store, dir, id)? {
                remove(store, dir)?;
            }
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Removes the record of the disk in `dir`; durable on return. Nothing where there is none.
pub fn remove(store: &dyn Store, dir: &Path) -> Result<()> {
    match store.remove_file(&path(dir)) {
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => store.sync_dir(&dir.join(SIDE)),
    }
}

#[cfg(test)]
mod tests;
