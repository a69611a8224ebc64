//! Where files live: the only door from the core to the operating system.
//!
//! ```text
//!   core, snapshots, serve
//!          │  Store (names)   StoreFile (bytes)
//!   ┌──────┼───────────────┐
//!  real   memory        recording
//! ```
//! [`reserved`] stands in front of one of them, for the files of a store of disks, and [`arriving`] for
//! images whose bytes are still to come. What such a store passes on as it is, it names
//! ([`crate::delegate`]).
//!
//! * [`real`]: files of the host. Blocking system calls on the caller's thread, or reads on a
//!   [`ring`].
//! * [`memory`]: a file system in memory, for unit and model tests.
//! * [`recording`]: a memory store that keeps a log of every change and every sync, and can replay
//!   each state that a power cut could legally leave behind. Crash tests run the shipped code on it.
//!
//! Two rules make the recording store honest: nothing else in the workspace that touches image or
//! descriptor bytes opens files, and no raw descriptor leaves a store.
//!
//! Durability, for every store: a change of a file's bytes or length is durable after
//! [`StoreFile::sync`] on that file has returned; a name (create, rename, remove) is durable after
//! [`Store::sync_dir`] on its directory has returned. Before that any subset, in any order, may be
//! lost, sector (512 bytes) by sector. [`FileSystem::sync`] is both for everything at once.

pub mod arriving;
mod delegate;
pub mod memory;
pub mod real;
pub mod recording;
mod replace;
pub mod reserved;
pub mod ring;

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Kind, Result};

pub use real::RealStore;
pub use replace::replace;

/// Bytes of a sector: the unit of the on-disk format and of atomic writes.
pub const SECTOR: u64 = 512;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only; every change is refused by the operating system.
    Read,
    /// Reading and writing.
    Write,
}

/// The kind of a directory entry; symbolic links are not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A device, pipe or socket.
    Other,
}

/// Who may do what with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Permissions.
    pub mode: u32,
    /// User that owns it.
    pub user: u32,
    /// Group that owns it.
    pub group: u32,
}

/// The room of a file system, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// What may still be taken: without what the file system keeps for the superuser.
    pub available: u64,
}

/// Which file, whatever name it was opened by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// Device number of the file system.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

/// Names: a directory tree. All methods block. Paths are used as given (relative ones against the
/// process's working directory).
pub trait Store: Send + Sync + Debug {
    /// Opens an existing regular file. A final symbolic link is followed only by [`Store::resolve`],
    /// never here. Errors: `NotFound`, `Permission`, `Invalid` for anything but a regular file.
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>>;

    /// Creates a file that must not exist, mode `mode`, open for writing. Error: `Exists`.
    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>>;

    /// Renames a file or directory, replacing a file of that name in one step.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Renames a file or directory to a name that must be free. Error: `Exists`.
    fn rename_new(&self, from: &Path, to: &Path) -> Result<()>;

    /// Gives a file a second name, which must be free. Error: `Exists`. Both names must be on one
    /// file system.
    fn hard_link(&self, from: &Path, to: &Path) -> Result<()>;

    /// Removes a file or symbolic link.
    fn remove_file(&self, path: &Path) -> Result<()>;

    /// Creates a directory that must not exist, with mode 0700. Error: `Exists`.
    fn create_dir(&self, path: &Path) -> Result<()>;

    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> Result<()>;

    /// The file system that the directory `path` is on, to be synced as a whole later. `None` where
    /// that cannot be trusted: then sync each file and directory.
    fn file_system(&self, path: &Path) -> Result<Option<Box<dyn FileSystem>>>;

    /// The names in a directory, sorted.
    fn list(&self, path: &Path) -> Result<Vec<PathBuf>>;

    /// What is there under that name, without following a link; `None` when nothing is.
    fn kind(&self, path: &Path) -> Result<Option<EntryKind>>;

    /// The room of the file system that the directory `path` is on; `None` where that cannot be told.
    fn space(&self, _path: &Path) -> Result<Option<Space>> {
        Ok(None)
    }

    /// The absolute path with all links and `..` resolved. Error: `NotFound`.
    fn resolve(&self, path: &Path) -> Result<PathBuf>;
}

/// A whole file system, watched since [`Store::file_system`] returned it.
pub trait FileSystem: Send + Sync + Debug {
    /// Makes every byte, length and name that was changed on it before the call durable, other
    /// programs' too: right for very many files, and as slow as everybody's dirty data. Fails also
    /// when a write-back failed since it is watched; then nothing may be assumed.
    fn sync(&self) -> Result<()>;
}

/// Bytes: one open file. All methods block; all are safe to call from many threads at once.
pub trait StoreFile: Send + Sync + Debug {
    /// The path that it was opened by.
    fn path(&self) -> &Path;

    /// Which file it is.
    fn id(&self) -> FileId;

    /// Length in bytes.
    fn len(&self) -> Result<u64>;

    /// True when the length is 0.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads until `buf` is full or the file ends; returns the bytes read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize>;

    /// The same, without waiting for the disk: `None` when some of it is not in memory, and `buf`
    /// then holds anything. A store that cannot tell what is in memory waits.
    fn read_now(&self, buf: &mut [u8], offset: u64) -> Result<Option<usize>> {
        self.read_at(buf, offset).map(Some)
    }

    /// The descriptor, for the [`ring::Ring`] that has the key; `None` when a ring cannot read this
    /// file.
    fn for_ring(&self, _key: &ring::RingKey) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The same file for what clients write, where that may not use what a store has in reserve
    /// ([`reserved`]); `None` where it is this one.
    fn for_guests(&self) -> Option<Arc<dyn StoreFile>> {
        None
    }

    /// Writes all of `buf`, extending the file where needed. Error: `NoSpace` among others; then
    /// any prefix may have been written. Not durable before [`StoreFile::sync`].
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes every byte written and every length set before the call durable (fdatasync). After an
    /// error nothing may be assumed, and a second call must not be believed.
    fn sync(&self) -> Result<()>;

    /// Asks the disk to begin with what was written in the range, so that a sync later waits for
    /// less. A hint: it never fails, and nothing is durable by it. What it does wrong, the sync says.
    fn begin_sync(&self, _offset: u64, _len: u64) {}

    /// Cuts or extends the file; new bytes read as zeros and take no space.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Makes the range read as zeros and gives its space back. Never changes the length. Falls back
    /// to writing zeros where the file system cannot punch.
    fn punch(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes the range read as zeros and keeps (or takes) its space, so that a later write to it
    /// does not need any. Never changes the length.
    fn zero(&self, offset: u64, len: u64) -> Result<()>;

    /// Takes the space of the range, and changes no byte and no length: a later write there does not
    /// need any. Safe beside any other call. Does nothing where the file system cannot.
    fn reserve(&self, offset: u64, len: u64) -> Result<()>;

    /// Sets the permissions. Not durable before the file system's own next commit.
    fn set_mode(&self, mode: u32) -> Result<()>;

    /// Who may do what with it; `None` in a store that keeps no such thing.
    fn rights(&self) -> Result<Option<Rights>> {
        Ok(None)
    }

    /// Makes them these. Error: `Permission` where another owner may not be set. Durable like the
    /// mode.
    fn set_rights(&self, _rights: &Rights) -> Result<()> {
        Ok(())
    }

    /// The first range at or after `from` that may hold anything but zeros, cut to `to`; `None` when
    /// there is none. A store that cannot tell answers the whole range.
    fn next_data(&self, from: u64, to: u64) -> Result<Option<std::ops::Range<u64>>>;

    /// Bytes that the host has given the file: data, room that was taken ahead, and what the file
    /// system adds. A store that cannot tell answers the data.
    fn host_bytes(&self) -> Result<u64> {
        let (mut at, end, mut sum) = (0, self.len()?, 0);
        while at < end
            && let Some(data) = self.next_data(at, end)?
        {
            sum += data.end - data.start;
            at = data.end;
        }
        Ok(sum)
    }

    /// Keeps `number` with the file, for [`StoreFile::recall`]. A hint: not durable, and nothing
    /// where the file system has no place for it. Changes neither bytes nor length nor their times.
    fn keep(&self, _number: u64) {}

    /// The number that was kept, unless bytes were written or the length changed since.
    fn recall(&self) -> Option<u64> {
        None
    }

    /// Takes advisory byte locks and keeps them until the file is dropped; see [`crate::locks`].
    fn lock_bytes(&self, offset: u64, len: u64) -> Result<()>;

    /// Gives back what [`StoreFile::lock_bytes`] took of the range.
    fn unlock_bytes(&self, offset: u64, len: u64) -> Result<()>;

    /// True when a foreign lock would stop an exclusive lock on the range.
    fn foreign_lock(&self, offset: u64, len: u64) -> Result<bool>;
}

/// What a long copy has written, given to the disk piece by piece ([`StoreFile::begin_sync`]) while
/// the copy goes on: copying and the disk work at once instead of in turn. The last piece is the
/// sync's.
#[derive(Debug, Default)]
pub struct Trail {
    range: std::ops::Range<u64>,
}

impl Trail {
    /// Bytes that the disk is given at a time.
    const PIECE: u64 = 1 << 20;

    /// `len` bytes of `file` at `offset` were written.
    pub fn wrote(&mut self, file: &dyn StoreFile, offset: u64, len: u64) {
        if self.range.end != offset {
            self.give(file);
            self.range = offset..offset;
        }
        self.range.end = offset + len;
        if self.range.end - self.range.start >= Self::PIECE {
            self.give(file);
        }
    }

    fn give(&mut self, file: &dyn StoreFile) {
        if !self.range.is_empty() {
            file.begin_sync(self.range.start, self.range.end - self.range.start);
        }
        self.range.start = self.range.end;
    }
}

/// Reads exactly `buf.len()` bytes; a short file is `Corrupt`, naming both numbers.
pub fn read_exact(file: &dyn StoreFile, buf: &mut [u8], offset: u64) -> Result<()> {
    let got = file.read_at(buf, offset)?;
    if got == buf.len() {
        return Ok(());
    }
    Err(Error::new(
        Kind::Corrupt,
        format!(
            "the file ends after {got} of {} bytes needed here",
            buf.len()
        ),
    )
    .on(file.path())
    .at(offset))
}

/// Reads `buf.len()` bytes; what lies past the end of the file reads as zeros.
pub fn read_or_zero(file: &dyn StoreFile, buf: &mut [u8], offset: u64) -> Result<()> {
    let got = file.read_at(buf, offset)?;
    buf[got..].fill(0);
    Ok(())
}
