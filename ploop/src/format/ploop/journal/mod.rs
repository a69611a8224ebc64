//! The journal of a writable image: what was flushed and has no BAT entry yet.
//!
//! A cluster in parts ([`super::parts`]) has no entry on disk until it is complete. So that a flush
//! need not complete it, the flush writes down here which of its granules are in the file.
//!
//! ```text
//!  flush   image: sync ─▶ journal: record, sync ─▶ answered;  image: BAT entries, no sync
//!  open    journal there? ─▶ does it explain the image? ─┬─▶ replayed in memory
//!                                                        └─▶ refused: another program was there
//! ```
//!
//! * It is `.ploop/journal.NAME` beside the image `NAME`; by name, because a snapshot changes whose
//!   GUID an image has. It is made by the first flush that finds parts, and ended by a clean
//!   close, *before* the mark is cleared: a clean image that has a journal is not ours.
//! * Its first records, the *base*, hold the image's header and a checksum of every page of its BAT
//!   as they are on disk, and all parts. Every BAT entry is written here, durable, before it is
//!   written to the image. So a BAT that is neither the base's nor made of it by entries that are
//!   here was changed by somebody else, and nothing here may be used.
//! * A record is appended by a flush and made durable by it. When they have become long, a new base
//!   takes the place of all (temporary file, sync, rename, sync of the directory). Opening after a
//!   crash only reads; the first flush after it writes a new base.
//! * Clusters never change owner while the image is open ([`super::top`]), so what is here stays
//!   true, however old it is, until the next record about the same cluster.
//! * While there is a journal, the file's length is [`TAIL`] bytes off the grid of clusters. QEMU cuts
//!   an image that was not closed behind the last cluster that has an entry, when it opens it for
//!   writing, and then takes clusters in parts for free ones: whatever it wrote, if it was killed in
//!   turn, the length tells.
//! * A flush must not need room. Where the host has none for a record, clusters are completed (their
//!   room was taken when they were begun), their entries written, and the journal ends.

mod record;
mod replay;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::header::{HEADER_BYTES, Header};
use super::held::{Held, granules_in};
use super::parts::{GRANULE, Part};
use crate::descriptor::Guid;
use crate::error::{Error, Kind, Result};
use crate::store::{Access, EntryKind, SECTOR, Store, StoreFile, read_exact};
use record::{Items, Tag, encode, part_bytes, per_record};

pub use record::LoggedPart;
pub use replay::{Log, Replay, find, is_stale, read};

/// The directory beside an image that journals are in.
const SIDE: &str = ".ploop";
/// Stands before the image's file name.
pub const JOURNAL: &str = "journal.";
/// Stands behind it while a new base is written.
pub const NEW: &str = ".new";
/// Bytes of records behind the base that ask for a new one, unless [`Home::with_limit`] says so.
pub const LIMIT: u64 = 1 << 20;
/// Bytes behind the last cluster of the file, while there is a journal.
pub const TAIL: u64 = SECTOR;
/// Zeros are written ahead of the records, this many bytes at a time, so that most syncs find the
/// file's length and extents as they were.
const AHEAD: u64 = 64 * 1024;

/// Journals made durable by this process.
static SYNCS: AtomicU64 = AtomicU64::new(0);

/// How often this process made a journal durable for a flush, failures included.
pub fn syncs() -> u64 {
    SYNCS.load(Ordering::Relaxed)
}

/// Where the journal of an image is, if it has one.
#[derive(Clone, Debug)]
pub struct Home {
    store: Arc<dyn Store>,
    path: PathBuf,
    begins: bool,
    limit: u64,
}

impl Home {
    /// For the image at `image` in its disk's directory.
    pub fn of(store: &Arc<dyn Store>, image: &Path) -> Option<Home> {
        let name = image.file_name()?;
        let mut file = std::ffi::OsString::from(JOURNAL);
        file.push(name);
        Some(Home {
            store: store.clone(),
            path: image.parent()?.join(SIDE).join(file),
            begins: true,
            limit: LIMIT,
        })
    }

    /// With a new base after `limit` bytes of records, [`LIMIT`] at most.
    #[must_use]
    pub fn with_limit(self, limit: u64) -> Home {
        let limit = limit.min(LIMIT);
        Home { limit, ..self }
    }

    /// The same for an image that may be in anybody's directory: no directory is made there.
    pub fn if_there(mut self) -> Result<Home> {
        self.begins = self.has_side()?;
        Ok(self)
    }

    /// True when a journal may be begun.
    pub(super) fn begins(&self) -> bool {
        self.begins
    }

    /// The journal's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn side(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    fn new_path(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(NEW);
        path.into()
    }

    /// True when the journal's file is there; it may have ended.
    fn exists(&self) -> Result<bool> {
        Ok(self.store.kind(&self.path)?.is_some())
    }

    /// True when the journal is there and has not ended: a close ends it first, and the removal of
    /// its name may be lost with the power.
    pub fn is_live(&self) -> Result<bool> {
        Ok(self.state()? == Some(false))
    }

    /// True when it is there and has ended.
    pub fn has_ended(&self) -> Result<bool> {
        Ok(self.state()? == Some(true))
    }

    /// Whether it has ended; `None` when it is not there.
    fn state(&self) -> Result<Option<bool>> {
        match self.store.open(&self.path, Access::Read) {
            Ok(file) => replay::has_ended(file.as_ref()).map(Some),
            Err(e) if e.kind() == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// True when its directory is.
    fn has_side(&self) -> Result<bool> {
        Ok(self.store.kind(self.side())? == Some(EntryKind::Dir))
    }

    /// Removes the journal, and what the writing of one left. One that is not there is fine. Only
    /// when its image is gone.
    pub fn forget(&self) -> Result<()> {
        for path in [&self.new_path(), &self.path] {
            match self.store.remove_file(path) {
                Err(e) if e.kind() != Kind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Ends the journal that is there; durable on return: what says so is in the file. Errors after
    /// which it may have ended or not go to `broken`, too.
    fn end(&self, broken: impl FnOnce(&Error)) -> Result<()> {
        if self.exists()? {
            let mut end = Vec::new();
            encode(&Tag::default(), &Items::End, &mut end);
            let file = self.store.open(&self.path, Access::Write)?;
            let ended = file.write_at(&end, 0).and_then(|()| file.sync());
            ended.inspect_err(broken)?;
        }
        Ok(())
    }

    /// Puts a copy in the place of the journal; durable on return. A killed process may have left it
    /// in the page cache only, or its name, and may have failed to make that durable. Where there is
    /// no room for a copy, the journal itself is synced.
    fn renew(&self) -> Result<()> {
        let (file, copied) = match self.copy() {
            Ok(copy) => (copy, true),
            Err(e) if e.kind() == Kind::NoSpace => {
                (self.store.open(&self.path, Access::Write)?, false)
            }
            Err(e) => return Err(e),
        };
        file.sync()?;
        if copied {
            self.store.rename(&self.new_path(), &self.path)?;
        }
        self.store.sync_dir(self.side())
    }

    fn copy(&self) -> Result<Arc<dyn StoreFile>> {
        let old = self.store.open(&self.path, Access::Read)?;
        let len = old.len()?;
        let new = self.create_new()?;
        let mut bytes = vec![0; AHEAD as usize];
        let mut at = 0;
        while at < len {
            let some = &mut bytes[..AHEAD.min(len - at) as usize];
            read_exact(old.as_ref(), some, at)?;
            new.write_at(some, at)?;
            at += some.len() as u64;
        }
        Ok(new)
    }

    /// The file that is to become the journal.
    fn create_new(&self) -> Result<Arc<dyn StoreFile>> {
        let new = self.new_path();
        match self.store.remove_file(&new) {
            Err(e) if e.kind() != Kind::NotFound => return Err(e),
            _ => {}
        }
        self.store.create(&new, 0o600)
    }
}

/// What was taken for a flush, before its sync.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Slots and their entries.
    pub(super) entries: Vec<(u32, u32)>,
    /// Guest clusters in parts; all of them where a base is to be written.
    pub(super) parts: Vec<(u64, Part)>,
}

#[derive(Debug)]
enum State {
    /// There is none.
    None,
    /// One was found at open: these slots are in it.
    Found(Vec<u32>),
    Open(Open),
}

#[derive(Debug)]
struct Open {
    file: Arc<dyn StoreFile>,
    tag: Tag,
    /// Where the next record goes.
    at: u64,
    /// Up to here there are bytes on the host.
    ahead: u64,
    base_end: u64,
    /// Slots that are in it, some of them several times.
    logged: Vec<u32>,
}

/// The journal of one image.
#[derive(Debug)]
pub(super) struct Journal {
    home: Option<Home>,
    state: State,
    /// Granules of it that are charged.
    held: u64,
}

impl Journal {
    /// For an image that has none, or none that was looked for.
    pub(super) fn new(home: Option<Home>) -> Journal {
        Journal {
            home,
            state: State::None,
            held: 0,
        }
    }

    /// Where it is, or would be.
    pub(super) fn home(&self) -> Option<Home> {
        self.home.clone()
    }

    /// For an image whose journal was replayed.
    pub(super) fn found(home: Home, slots: Vec<u32>) -> Journal {
        Journal {
            home: Some(home),
            state: State::Found(slots),
            held: 0,
        }
    }

    /// True when there is one on disk.
    pub(super) fn is_there(&self) -> bool {
        !matches!(self.state, State::None)
    }

    /// True when the next record must be a base.
    pub(super) fn wants_base(&self) -> bool {
        match &self.state {
            State::None | State::Found(_) => true,
            State::Open(open) => self
                .home
                .as_ref()
                .is_none_or(|home| open.at - open.base_end > home.limit),
        }
    }

    /// Writes `batch` down, as a `base` when it was taken for one ([`Journal::wants_base`]); durable
    /// on return. The image was synced since the batch was taken. `Some`: it could not be written,
    /// and what was there before still holds. Error: nothing may be assumed.
    pub(super) fn log(
        &mut self,
        image: &Image<'_>,
        batch: &Batch,
        base: bool,
    ) -> Result<Option<Error>> {
        let Some(home) = &self.home else {
            let what = "this image may have no journal";
            return Ok(Some(Error::new(Kind::Permission, what)));
        };
        SYNCS.fetch_add(1, Ordering::Relaxed);
        if let State::Open(open) = &mut self.state
            && !base
        {
            // It was opened by another name.
            let appended = open.append(image, batch);
            return appended.map_err(|e| e.on(&home.path));
        }
        let new = prepare(home, image, batch).and_then(|open| {
            home.store.rename(&home.new_path(), &home.path)?;
            Ok(open)
        });
        let open = match new {
            Ok(open) => open,
            Err(e) => {
                // What cannot be removed the next base replaces, and the next close removes.
                drop(home.store.remove_file(&home.new_path()));
                return Ok(Some(e));
            }
        };
        home.store.sync_dir(home.side())?;
        self.state = State::Open(open);
        Ok(None)
    }

    /// For an image that was found marked, before a change that a journal must explain: the end of
    /// one may be in the page cache of a killed process only. Errors of the sync go to `broken`, too.
    pub(super) fn end_again(&self, broken: impl FnOnce(&Error)) -> Result<()> {
        match (&self.home, &self.state) {
            (Some(home), State::None) => {
                home.end(broken)?;
                home.forget()
            }
            _ => Ok(()),
        }
    }

    /// Makes the journal that was found durable as it could be read: from here on the image's BAT
    /// may need it.
    pub(super) fn settle(&self) -> Result<()> {
        match (&self.home, &self.state) {
            (Some(home), State::Found(_)) => home.renew(),
            _ => Ok(()),
        }
    }

    /// The slots that are in it, ascending.
    pub(super) fn slots(&self) -> Vec<u32> {
        let mut slots = match &self.state {
            State::None => Vec::new(),
            State::Found(slots) => slots.clone(),
            State::Open(open) => open.logged.clone(),
        };
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    /// Charges what it takes now, whatever the limit: no flush may fail for it.
    pub(super) fn charge(&mut self, held: &Held) -> Result<()> {
        let now = match (&self.state, &self.home) {
            (State::Open(open), _) => open.ahead.div_ceil(GRANULE),
            (State::Found(_), Some(home)) => {
                let file = home.store.open(&home.path, Access::Read)?;
                granules_in(file.as_ref(), 0..file.len()?)?
            }
            _ => 0,
        };
        held.note(now);
        held.back(std::mem::replace(&mut self.held, now));
        Ok(())
    }

    /// Ends it; durable on return. Its slots have their entries on disk. After an error it is there
    /// as before, or has ended ([`Journal::is_there`]); where that cannot be told, `broken` is told.
    pub(super) fn end(&mut self, broken: impl FnOnce(&Error)) -> Result<()> {
        let Some(home) = &self.home else {
            self.state = State::None;
            return Ok(());
        };
        home.end(broken)?;
        self.state = State::None;
        home.forget()
    }
}

/// The image that a journal is of.
pub(super) struct Image<'a> {
    pub(super) file: &'a dyn StoreFile,
    pub(super) header: &'a Header,
}

impl Image<'_> {
    fn logged(&self, slot: u64, part: &Part) -> Result<LoggedPart> {
        let entry = self.header.entry_for(part.offset);
        let entry = entry.ok_or_else(|| Error::new(Kind::Io, "a part that no entry can name"))?;
        Ok(LoggedPart {
            // Clusters of an image are below its entries, which are 32 bits.
            slot: slot as u32,
            entry,
            present: part.present.clone(),
        })
    }

    fn granules(&self) -> u64 {
        self.header.cluster_bytes() / GRANULE
    }
}

/// Appends `items` as records of as many as fit one.
fn split<T: Clone>(
    tag: &mut Tag,
    items: &[T],
    size: usize,
    out: &mut Vec<u8>,
    wrap: impl Fn(Vec<T>) -> Items,
) {
    for some in items.chunks(per_record(size)) {
        encode(tag, &wrap(some.to_vec()), out);
        tag.number += 1;
    }
}

fn encode_batch(tag: &mut Tag, image: &Image<'_>, batch: &Batch, out: &mut Vec<u8>) -> Result<()> {
    let words = image.granules().div_ceil(64) as usize;
    let parts = batch.parts.iter().map(|(k, part)| image.logged(*k, part));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    split(tag, &parts, part_bytes(words), out, Items::Parts);
    // Behind the parts: of a cluster that is in both the entry is what came later.
    split(tag, &batch.entries, 8, out, Items::Entries);
    tag.group += 1;
    Ok(())
}

/// Slots of a batch.
fn slots_of(batch: &Batch) -> impl Iterator<Item = u32> {
    let parts = batch.parts.iter().map(|(k, _)| *k as u32);
    parts.chain(batch.entries.iter().map(|(slot, _)| *slot))
}

/// Writes a new journal beside the one that may be there; its bytes are durable on return.
fn prepare(home: &Home, image: &Image<'_>, batch: &Batch) -> Result<Open> {
    let mut header = [0; HEADER_BYTES as usize];
    read_exact(image.file, &mut header, 0)?;
    let sums = replay::sums(image.file, image.header, &[])?;
    let mut tag = Tag {
        nonce: *Guid::new_v4().as_bytes(),
        number: 1,
        group: 0,
    };
    let mut pages = Vec::new();
    split(&mut tag, &sums, 8, &mut pages, Items::Sums);
    let mut bytes = Vec::new();
    let first = Items::Base {
        header,
        sums: tag.number - 1,
    };
    encode(&Tag { number: 0, ..tag }, &first, &mut bytes);
    bytes.append(&mut pages);
    encode_batch(&mut tag, image, batch, &mut bytes)?;
    let at = bytes.len() as u64;
    bytes.resize((at + SECTOR).next_multiple_of(AHEAD) as usize, 0);

    if !home.has_side()? {
        home.store.create_dir(home.side())?;
        home.store
            .sync_dir(home.side().parent().unwrap_or(Path::new("/")))?;
    }
    let file = home.create_new()?;
    file.write_at(&bytes, 0)?;
    file.sync()?;
    Ok(Open {
        file,
        tag,
        at,
        ahead: bytes.len() as u64,
        base_end: at,
        logged: slots_of(batch).collect(),
    })
}

impl Open {
    fn append(&mut self, image: &Image<'_>, batch: &Batch) -> Result<Option<Error>> {
        let mut tag = self.tag;
        let mut bytes = Vec::new();
        encode_batch(&mut tag, image, batch, &mut bytes)?;
        let end = self.at + bytes.len() as u64;
        if end > self.ahead {
            bytes.resize(bytes.len() + AHEAD as usize, 0);
        }
        debug_assert!(self.at.is_multiple_of(SECTOR));
        match self.file.write_at(&bytes, self.at) {
            Err(e) if e.kind() == Kind::NoSpace => return Ok(Some(e)),
            other => other?,
        }
        self.file.sync()?;
        self.ahead = self.ahead.max(self.at + bytes.len() as u64);
        self.at = end;
        self.tag = tag;
        self.logged.extend(slots_of(batch));
        Ok(None)
    }
}
