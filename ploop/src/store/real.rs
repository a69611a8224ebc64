//! Files of the host.
//!
//! Every call is one blocking system call (more only after a short transfer). `punch` and `zero`
//! use `fallocate`; a file system without it gets zeros written instead, which is slower and takes
//! space, but reads the same.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rustix::fs::{FallocateFlags, OFlags, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::{Errno, ReadWriteFlags};

use super::ring::RingKey;
use super::{Access, EntryKind, FileId, FileSystem, Rights, Space, Store, StoreFile};
use crate::error::{Error, Result};

/// Syncs of files by this process.
static SYNCS: AtomicU64 = AtomicU64::new(0);

/// How often this process made a file durable (fdatasync), failures included.
pub fn syncs() -> u64 {
    SYNCS.load(Relaxed)
}

/// The host's file system. Stateless; cheap to clone and share.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealStore;

impl RealStore {
    /// The store as the trait object that the rest of the core takes.
    pub fn shared() -> Arc<dyn Store> {
        Arc::new(RealStore)
    }
}

fn open_file(path: &Path, options: &mut OpenOptions, what: &str) -> Result<Arc<dyn StoreFile>> {
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let file = options.custom_flags(flags).open(path).map_err(|e| {
        match e.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::ISDIR | Errno::LOOP | Errno::NXIO) => not_regular(path),
            _ => Error::io(what, path, e),
        }
    })?;
    let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
    if !meta.is_file() {
        return Err(not_regular(path));
    }
    Ok(Arc::new(RealFile {
        path: path.to_path_buf(),
        id: FileId {
            dev: meta.dev(),
            ino: meta.ino(),
        },
        cannot_tell: AtomicBool::new(false),
        locked: AtomicBool::new(false),
        file,
    }))
}

fn not_regular(path: &Path) -> Error {
    Error::invalid("not a regular file").on(path)
}

impl Store for RealStore {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        let write = access == Access::Write;
        open_file(path, OpenOptions::new().read(true).write(write), "open")
    }

    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode);
        open_file(path, &mut options, "create")
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        fs::rename(from, to).map_err(|e| Error::io(format!("rename to {}", to.display()), from, e))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        let cwd = rustix::fs::CWD;
        rustix::fs::renameat_with(cwd, from, cwd, to, RenameFlags::NOREPLACE)
            .map_err(|e| Error::io(format!("rename to {}", to.display()), from, e.into()))
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        fs::hard_link(from, to).map_err(|e| Error::io(format!("link to {}", to.display()), from, e))
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        fs::remove_file(path).map_err(|e| Error::io("remove", path, e))
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        let made = fs::DirBuilder::new().mode(0o700).create(path);
        made.map_err(|e| Error::io("create directory", path, e))
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        fs::remove_dir(path).map_err(|e| Error::io("remove directory", path, e))
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        let flags = i32::try_from(OFlags::DIRECTORY.bits()).unwrap_or_default();
        let dir = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let dir = dir.map_err(|e| Error::io("open directory", path, e))?;
        dir.sync_all()
            .map_err(|e| Error::io("sync directory", path, e))
    }

    fn file_system(&self, path: &Path) -> Result<Option<Box<dyn FileSystem>>> {
        let flags = i32::try_from(OFlags::DIRECTORY.bits()).unwrap_or_default();
        let dir = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let dir = dir.map_err(|e| Error::io("open directory", path, e))?;
        let kind = rustix::fs::fstatfs(&dir).map_err(|e| Error::io("statfs", path, e.into()))?;
        if kind.f_type == FUSE {
            return Ok(None);
        }
        Ok(Some(Box::new(RealFileSystem {
            path: path.to_path_buf(),
            dir,
        })))
    }

    fn space(&self, path: &Path) -> Result<Option<Space>> {
        let stat = rustix::fs::statvfs(path).map_err(|e| Error::io("statvfs", path, e.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok((stat.f_blocks > 0).then(|| Space {
            total: bytes(stat.f_blocks),
            available: bytes(stat.f_bavail),
        }))
    }

    fn list(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let io = |e| Error::io("list directory", path, e);
        let mut names = Vec::new();
        for entry in fs::read_dir(path).map_err(io)? {
            names.push(PathBuf::from(entry.map_err(io)?.file_name()));
        }
        names.sort();
        Ok(names)
    }

    fn kind(&self, path: &Path) -> Result<Option<EntryKind>> {
        let meta = match fs::symlink_metadata(path) {
            Ok(meta) => meta,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(Error::io("stat", path, e)),
        };
        let t = meta.file_type();
        Ok(Some(if t.is_file() {
            EntryKind::File
        } else if t.is_dir() {
            EntryKind::Dir
        } else if t.is_symlink() {
            EntryKind::Link
        } else {
            debug_assert!(
                t.is_block_device() || t.is_char_device() || t.is_fifo() || t.is_socket()
            );
            EntryKind::Other
        }))
    }

    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        fs::canonicalize(path).map_err(|e| Error::io("find", path, e))
    }
}

/// `f_type` of FUSE, which passes a sync of the whole on to its server only in some cases.
const FUSE: rustix::fs::FsWord = 0x6573_5546;

/// The open directory remembers which write-back errors came before it (from Linux 5.8 on).
#[derive(Debug)]
struct RealFileSystem {
    path: PathBuf,
    dir: File,
}

impl FileSystem for RealFileSystem {
    fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.dir)
            .map_err(|e| Error::io("sync the file system of", &self.path, e.into()))
    }
}

#[derive(Debug)]
struct RealFile {
    path: PathBuf,
    id: FileId,
    /// The file system does not say what is in memory.
    cannot_tell: AtomicBool,
    /// It has had locks.
    locked: AtomicBool,
    file: File,
}

impl Drop for RealFile {
    fn drop(&mut self) {
        // A process that is being started has a copy of every descriptor for an instant, and would
        // keep what is locked by closing this one only.
        if *self.locked.get_mut() {
            // To the end of all offsets.
            drop(self.unlock_bytes(0, 0));
        }
    }
}

/// Zeros to write where the file system cannot make them itself.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

impl RealFile {
    fn err(&self, what: &str, offset: u64, e: io::Error) -> Error {
        Error::io(what, &self.path, e).at(offset)
    }

    /// `fallocate` on the part of the range inside the file, zeros where it is not to be had.
    fn make_zero(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len).min(self.len()?);
        if offset >= end {
            return Ok(());
        }
        let done = loop {
            match rustix::fs::fallocate(&self.file, flags, offset, end - offset) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let mut at = offset;
                while at < end {
                    let n = (end - at).min(ZEROS.len() as u64);
                    self.write_at(&ZEROS[..n as usize], at)?;
                    at += n;
                }
                Ok(())
            }
            Err(e) => Err(self.err("zero a range", offset, e.into())),
        }
    }

    fn fcntl_lock(&self, command: i32, lock: &mut libc::flock) -> io::Result<()> {
        let lock = std::ptr::from_mut(lock);
        #[expect(
            unsafe_code,
            reason = "rustix locks whole files only; byte ranges need fcntl itself"
        )]
        // SAFETY: fcntl with a lock command reads and writes one `flock`, which `lock` points to,
        // and the descriptor is open for as long as `self` lives.
        let rc = unsafe { libc::fcntl(self.file.as_raw_fd(), command, lock) };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn flock(kind: i32, offset: u64, len: u64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset as libc::off_t,
        l_len: len as libc::off_t,
        l_pid: 0,
    }
}

/// The attribute that [`StoreFile::keep`] keeps a number in: the number, and what the file was like.
const KEPT: &str = "user.ploop.kept";
const KEPT_MAX: usize = 128;

impl RealFile {
    /// Changes with every write and every length.
    fn stamp(&self) -> Option<String> {
        let stat = rustix::fs::fstat(self.file.as_fd()).ok()?;
        let (len, s, ns) = (stat.st_size, stat.st_mtime, stat.st_mtime_nsec);
        Some(format!("{len} {s} {ns}"))
    }
}

impl StoreFile for RealFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn id(&self) -> FileId {
        self.id
    }

    fn len(&self) -> Result<u64> {
        Ok(self
            .file
            .metadata()
            .map_err(|e| Error::io("stat", &self.path, e))?
            .len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.err("read", offset + done as u64, e)),
            }
        }
        Ok(done)
    }

    fn read_now(&self, buf: &mut [u8], offset: u64) -> Result<Option<usize>> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let rest = &mut buf[done..];
            if self.cannot_tell.load(Relaxed) {
                return Ok(Some(done + self.read_at(rest, at)?));
            }
            let mut parts = [IoSliceMut::new(rest)];
            match rustix::io::preadv2(&self.file, &mut parts, at, ReadWriteFlags::NOWAIT) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                // A sandbox answers EPERM to calls that it does not know.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
                    self.cannot_tell.store(true, Relaxed);
                }
                Err(e) => return Err(self.err("read", at, e.into())),
            }
        }
        Ok(Some(done))
    }

    fn for_ring(&self, _key: &RingKey) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.file
            .write_all_at(buf, offset)
            .map_err(|e| self.err("write", offset, e))
    }

    fn sync(&self) -> Result<()> {
        SYNCS.fetch_add(1, Relaxed);
        self.file
            .sync_data()
            .map_err(|e| Error::io("sync", &self.path, e))
    }

    fn begin_sync(&self, offset: u64, len: u64) {
        let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else {
            return;
        };
        let fd = self.file.as_raw_fd();
        #[expect(unsafe_code, reason = "rustix does not have this call")]
        // SAFETY: a call on our own open descriptor; it takes numbers, and no memory of ours. It
        // may fail: then the sync has all of it to do. It takes no error from the sync: only a call
        // that waits does.
        unsafe {
            libc::sync_file_range(fd, offset, len, libc::SYNC_FILE_RANGE_WRITE)
        };
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file
            .set_len(len)
            .map_err(|e| self.err("set the length", len, e))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.make_zero(
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.make_zero(
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset, len) {
                Err(Errno::INTR) => {}
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
                Err(e) => return Err(self.err("reserve space", offset, e.into())),
            }
        }
    }

    fn set_mode(&self, mode: u32) -> Result<()> {
        let mode = rustix::fs::Mode::from_raw_mode(mode);
        rustix::fs::fchmod(&self.file, mode)
            .map_err(|e| Error::io("set the permissions", &self.path, e.into()))
    }

    fn rights(&self) -> Result<Option<Rights>> {
        let meta = self.file.metadata();
        let meta = meta.map_err(|e| Error::io("read the permissions", &self.path, e))?;
        Ok(Some(Rights {
            mode: meta.mode() & 0o7777,
            user: meta.uid(),
            group: meta.gid(),
        }))
    }

    fn set_rights(&self, rights: &Rights) -> Result<()> {
        let now = self.rights()?;
        if now.is_some_and(|now| (now.user, now.group) != (rights.user, rights.group)) {
            std::os::unix::fs::fchown(&self.file, Some(rights.user), Some(rights.group))
                .map_err(|e| Error::io("set the owner", &self.path, e))?;
        }
        self.set_mode(rights.mode)
    }

    fn next_data(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        let io = |e: Errno| self.err("seek", from, e.into());
        // pread and pwrite never use the file position, so moving it here disturbs nobody; two
        // threads that seek at once each get their own answer as the return value.
        let start = match rustix::fs::seek(self.file.as_fd(), SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL) => from,
            Err(e) => return Err(io(e)),
        };
        if start >= to {
            return Ok(None);
        }
        let end = match rustix::fs::seek(self.file.as_fd(), SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(Errno::NXIO | Errno::INVAL) => to,
            Err(e) => return Err(io(e)),
        };
        Ok(Some(start..end.clamp(start + 1, to.max(start + 1))))
    }

    fn host_bytes(&self) -> Result<u64> {
        let stat = rustix::fs::fstat(self.file.as_fd());
        let stat = stat.map_err(|e| self.err("look at", 0, e.into()))?;
        Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }

    fn keep(&self, number: u64) {
        if let Some(stamp) = self.stamp() {
            let text = format!("{number} {stamp}");
            // Where there are no such attributes, or none may be set, it is counted again.
            let fd = self.file.as_fd();
            let _ = rustix::fs::fsetxattr(fd, KEPT, text.as_bytes(), XattrFlags::empty());
        }
    }

    fn recall(&self) -> Option<u64> {
        let mut buf = [0; KEPT_MAX];
        let len = rustix::fs::fgetxattr(self.file.as_fd(), KEPT, &mut buf[..]).ok()?;
        let text = std::str::from_utf8(buf.get(..len)?).ok()?;
        let (number, stamp) = text.split_once(' ')?;
        (stamp == self.stamp()?).then(|| number.parse().ok())?
    }

    fn lock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        self.locked.store(true, Relaxed);
        let mut lock = flock(libc::F_RDLCK, offset, len);
        self.fcntl_lock(libc::F_OFD_SETLK, &mut lock)
            .map_err(|e| self.err("lock bytes", offset, e))
    }

    fn unlock_bytes(&self, offset: u64, len: u64) -> Result<()> {
        let mut lock = flock(libc::F_UNLCK, offset, len);
        self.fcntl_lock(libc::F_OFD_SETLK, &mut lock)
            .map_err(|e| self.err("unlock bytes", offset, e))
    }

    fn foreign_lock(&self, offset: u64, len: u64) -> Result<bool> {
        let mut lock = flock(libc::F_WRLCK, offset, len);
        let asked = self.fcntl_lock(libc::F_OFD_GETLK, &mut lock);
        asked.map_err(|e| self.err("look for locks", offset, e))?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    }
}

#[cfg(test)]
#[path = "real_tests.rs"]
mod tests;
