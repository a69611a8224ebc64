//! Locks against other programs, on the bytes that QEMU and OpenVZ's tool agree on.
//!
//! QEMU locks byte 100 + *p* of an image while it uses permission *p*, and byte 200 + *p* while it
//! lets nobody else use it; both are read locks, and each program then looks whether a write lock
//! on the opposite byte would be stopped. OpenVZ's tool takes 200–204 on the base of a disk, and
//! 300–304 during long operations. Permissions: 0 read consistently, 1 write, 3 resize.
//!
//! | we open | we lock | stopped by others on |
//! |---|---|---|
//! | the top, for writing | 100, 101, 103, 200–204 | 100–104 (they use it), 200, 201, 203 (they forbid it), 300–304 |
//! | anything else | 100, 201, 203 | 101, 103 (they write), 200 (they forbid reading), 300–304 |
//!
//! So thousands of our disks share a layer, QEMU may read it, and nobody may write it. The locks
//! are open-file-description locks: they live as long as the open file, whoever else in the process
//! opens and closes it. Ours against ours, for a whole disk, is [`DiskLock`].

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileExt as _, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fs2::FileExt;

use crate::error::{Error, Kind, Result};
use crate::store::StoreFile;

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The top of a disk, written by us alone.
    Write,
    /// Reading, shared with other readers.
    Read,
}

const WRITE_LOCKS: &[RangeInclusive<u64>] = &[100..=101, 103..=103, 200..=204];
const WRITE_STOPS: &[RangeInclusive<u64>] = &[100..=104, 200..=201, 203..=203, 300..=304];
const READ_LOCKS: &[RangeInclusive<u64>] = &[100..=100, 201..=201, 203..=203];
const READ_STOPS: &[RangeInclusive<u64>] = &[101..=101, 103..=103, 200..=200, 300..=304];

/// Takes the locks for `use_for` on an open image, with a look before and after. They are kept
/// until the file is closed. Error: `InUse`, at once.
pub fn lock_image(file: &dyn StoreFile, use_for: Use) -> Result<()> {
    let (locks, stops) = match use_for {
        Use::Write => (WRITE_LOCKS, WRITE_STOPS),
        Use::Read => (READ_LOCKS, READ_STOPS),
    };
    look(file, stops, use_for)?;
    for bytes in locks {
        file.lock_bytes(*bytes.start(), bytes.end() - bytes.start() + 1)?;
    }
    look(file, stops, use_for)
}

/// Makes a writer's locks a reader's, without an instant in which there are none.
pub fn downgrade(file: &dyn StoreFile) -> Result<()> {
    for byte in WRITE_LOCKS.iter().cloned().flatten() {
        if !READ_LOCKS.iter().any(|kept| kept.contains(&byte)) {
            file.unlock_bytes(byte, 1)?;
        }
    }
    Ok(())
}

fn look(file: &dyn StoreFile, stops: &[RangeInclusive<u64>], use_for: Use) -> Result<()> {
    for bytes in stops {
        if !file.foreign_lock(*bytes.start(), bytes.end() - bytes.start() + 1)? {
            continue;
        }
        let what = match (use_for, *bytes.start()) {
            (_, 300) => "another program (an OpenVZ tool) runs a long operation on the image",
            (Use::Write, _) => "another program has the image open",
            (Use::Read, _) => "another program has the image open for writing",
        };
        return Err(Error::new(Kind::InUse, what)
            .on(file.path())
            .fix("Close the disk there first (`lslocks` shows who holds it)"));
    }
    Ok(())
}

/// How often, and how long after another, a lock without a holder's text is tried again.
const TRIES: u32 = 1000;
const TRY_AGAIN: Duration = Duration::from_millis(2);

/// The lock on a disk among programs of ours: `flock` on `<disk>/.ploop/lock`. The file is never
/// renamed or removed; its text says who holds it, and means nothing once the lock is free.
#[derive(Debug)]
pub struct DiskLock {
    file: File,
    path: PathBuf,
}

impl DiskLock {
    /// Takes the lock of the disk in `dir`, creating `.ploop/lock` if need be. `control`: the socket
    /// on which this process answers the control API. Error: `InUse`, at once, naming the process
    /// that holds it.
    pub fn acquire(dir: &Path, control: Option<&Path>) -> Result<DiskLock> {
        let (file, path) = make_lock(dir)?;
        let mut tries = 0;
        while !try_lock(&file, &path)? {
            let holder = Holder::read(&file);
            // Who only asks for the holder has the lock for an instant, and writes no text.
            if holder.is_none() && tries < TRIES {
                tries += 1;
                std::thread::sleep(TRY_AGAIN);
                continue;
            }
            let who = holder.map_or_else(|| "an unknown process".into(), |h| h.who);
            return Err(
                Error::new(Kind::InUse, format!("the disk is in use by {who}"))
                    .on(dir)
                    .fix("Stop that process, or ask it"),
            );
        }
        let lock = DiskLock { file, path };
        // Only a hint, and a full disk keeps nobody from the disk: it must still be removable.
        drop(lock.write_holder(control));
        Ok(lock)
    }

    /// Makes the lock file of the disk in `dir`, if there is none; takes no lock.
    pub fn prepare(dir: &Path) -> Result<()> {
        make_lock(dir).map(drop)
    }

    /// Who holds the lock of the disk in `dir` now; `None` when nobody does.
    pub fn holder(dir: &Path) -> Result<Option<Holder>> {
        let side = dir.join(".ploop");
        if !side.join("lock").exists() {
            return Ok(None);
        }
        let (file, path) = open_lock(&side, false)?;
        for _ in 0..TRIES {
            if try_lock(&file, &path)? {
                return Ok(None);
            }
            if let Some(holder) = Holder::read(&file) {
                return Ok(Some(holder));
            }
            // Between taking the lock and writing its text there is none, and another who asks has
            // the lock for an instant and writes none.
            std::thread::sleep(TRY_AGAIN);
        }
        Ok(Some(Holder {
            who: "an unknown process".to_owned(),
            control: None,
        }))
    }

    fn write_holder(&self, control: Option<&Path>) -> Result<()> {
        let io = |e| Error::io("write", &self.path, e);
        let pid = std::process::id();
        let name = std::env::current_exe()
            .ok()
            .and_then(|p| Some(p.file_name()?.to_owned()));
        let name = name.map_or_else(|| "?".into(), |n| n.to_string_lossy().into_owned());
        let start = start_time(pid).unwrap_or_default();
        let mut file = &self.file;
        file.set_len(0).map_err(io)?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        let mut text = format!("process {pid} ({name}, started at tick {start})\n");
        if let Some(control) = control {
            text += &format!("control {}\n", control.display());
        }
        file.write_all(text.as_bytes()).map_err(io)
    }
}

/// Opens the lock file of a disk, made if need be.
fn make_lock(dir: &Path) -> Result<(File, PathBuf)> {
    let side = dir.join(".ploop");
    match fs::create_dir(&side) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io("create directory", &side, e));
        }
        _ => {}
    }
    open_lock(&side, true)
}

/// Opens the lock file of a disk. A disk directory can come from anybody: nothing of it may lead
/// our writes elsewhere.
fn open_lock(side: &Path, write: bool) -> Result<(File, PathBuf)> {
    let is_dir = fs::symlink_metadata(side).is_ok_and(|m| m.is_dir());
    if !is_dir {
        return Err(Error::new(Kind::Permission, "must be a directory, not a link").on(side));
    }
    let path = side.join("lock");
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(write)
        .create(write)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC);
    let file = options
        .open(&path)
        .map_err(|e| Error::io("open", &path, e))?;
    let meta = file.metadata().map_err(|e| Error::io("stat", &path, e))?;
    if !meta.is_file() || meta.nlink() != 1 {
        let what = "must be a regular file with one name";
        return Err(Error::new(Kind::Permission, what).on(path));
    }
    Ok((file, path))
}

/// False when somebody else holds it.
fn try_lock(file: &File, path: &Path) -> Result<bool> {
    match FileExt::try_lock_exclusive(file) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == fs2::lock_contended_error().raw_os_error() => Ok(false),
        Err(e) => Err(Error::io("lock", path, e)),
    }
}

/// Who holds a disk, by its own words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// For people: its process number and program.
    pub who: String,
    /// Where it answers the control API, if it does.
    pub control: Option<PathBuf>,
}

impl Holder {
    /// In one read: between two, the text may go, or become another's.
    fn read(file: &File) -> Option<Holder> {
        let mut bytes = [0; 5000];
        let len = file.read_at(&mut bytes, 0).ok()?;
        let text = std::str::from_utf8(&bytes[..len]).ok()?;
        // Whole lines only.
        let text = &text[..=text.rfind('\n')?];
        let mut lines = text.lines();
        let who = lines.next()?.to_owned();
        let control = lines.find_map(|l| l.strip_prefix("control "));
        Some(Holder {
            who,
            control: control.map(PathBuf::from),
        })
    }
}

impl Drop for DiskLock {
    fn drop(&mut self) {
        // The text is a hint.
        drop(self.file.set_len(0));
        // A process that is being started has a copy of the descriptor for an instant: closing ours
        // would leave the lock to it.
        drop(FileExt::unlock(&self.file));
    }
}

/// Field 22 of /proc/PID/stat: clock ticks between boot and the start of the process.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;
    use crate::store::real::RealStore;
    use crate::store::{Access, Store};

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let store = MemoryStore::new();
        let p = Path::new("/image");
        drop(store.create(p, 0o600).unwrap());
        let open = || store.open(p, Access::Write).unwrap();
        let (a, b) = (open(), open());
        lock_image(a.as_ref(), Use::Read).unwrap();
        lock_image(b.as_ref(), Use::Read).unwrap();
        let e = lock_image(open().as_ref(), Use::Write).unwrap_err();
        assert_eq!(e.kind(), Kind::InUse);
        drop((a, b));
        let w = open();
        lock_image(w.as_ref(), Use::Write).unwrap();
        assert_eq!(
            lock_image(open().as_ref(), Use::Write).unwrap_err().kind(),
            Kind::InUse
        );
        assert_eq!(
            lock_image(open().as_ref(), Use::Read).unwrap_err().kind(),
            Kind::InUse
        );
        drop(w);
        lock_image(open().as_ref(), Use::Write).unwrap();
    }

    /// Copies of this process's descriptors of `path`, as a process that is being started has them.
    fn copies(path: &Path) -> Vec<rustix::fd::OwnedFd> {
        use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
        let us = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        let mut copies = Vec::new();
        for entry in fs::read_dir("/proc/self/fd").unwrap().map(Result::unwrap) {
            if fs::read_link(entry.path()).is_ok_and(|to| to == path) {
                let fd = entry.file_name().to_str().unwrap().parse().unwrap();
                copies.push(pidfd_getfd(&us, fd, PidfdGetfdFlags::empty()).unwrap());
            }
        }
        assert!(!copies.is_empty());
        copies
    }

    #[test]
    fn a_lock_ends_at_its_close_whoever_copied_the_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        drop(RealStore.create(&image, 0o600).unwrap());
        let open = || RealStore.open(&image, Access::Write).unwrap();
        let first = open();
        lock_image(first.as_ref(), Use::Write).unwrap();
        let disk = DiskLock::acquire(dir.path(), None).unwrap();
        let copies = [copies(&image), copies(&dir.path().join(".ploop/lock"))];
        drop((first, disk));
        lock_image(open().as_ref(), Use::Write).unwrap();
        drop(DiskLock::acquire(dir.path(), None).unwrap());
        drop(copies);
    }

    #[test]
    fn a_lock_file_that_is_a_link_is_refused_and_its_target_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let hostile = |name: &str, plant: &dyn Fn(&Path)| {
            let disk = dir.path().join(name);
            fs::create_dir(&disk).unwrap();
            plant(&disk);
            assert!(DiskLock::acquire(&disk, None).is_err(), "{name}");
            assert_eq!(fs::read(&victim).unwrap(), b"precious", "{name}");
        };
        let link = |to: &Path, at: &Path| std::os::unix::fs::symlink(to, at);
        hostile("link", &|d| {
            fs::create_dir(d.join(".ploop")).unwrap();
            link(&victim, &d.join(".ploop/lock")).unwrap();
        });
        hostile("hard link", &|d| {
            fs::create_dir(d.join(".ploop")).unwrap();
            fs::hard_link(&victim, d.join(".ploop/lock")).unwrap();
        });
        hostile("directory", &|d| {
            let other = dir.path().join("other");
            fs::create_dir(&other).unwrap();
            link(&other, &d.join(".ploop")).unwrap();
        });
    }

    #[test]
    fn a_disk_is_held_once_and_the_second_is_told_by_whom() {
        let dir = tempfile::tempdir().unwrap();
        let held = DiskLock::acquire(dir.path(), None).unwrap();
        let e = DiskLock::acquire(dir.path(), None).unwrap_err();
        assert_eq!(e.kind(), Kind::InUse);
        assert!(
            e.to_string()
                .contains(&format!("process {}", std::process::id())),
            "{e}"
        );
        drop(held);
        DiskLock::acquire(dir.path(), None).unwrap();
    }

    #[test]
    fn who_holds_a_disk_is_read_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let control = Path::new("/run/control.sock");
        drop(DiskLock::acquire(dir.path(), Some(control)).unwrap());
        let (file, _) = open_lock(&dir.path().join(".ploop"), false).unwrap();
        let mut seen = 0;
        std::thread::scope(|s| {
            let holds = s.spawn(|| {
                for _ in 0..2000 {
                    drop(DiskLock::acquire(dir.path(), Some(control)).unwrap());
                }
            });
            while !holds.is_finished() {
                if let Some(holder) = Holder::read(&file) {
                    assert!(holder.who.ends_with(')'), "{holder:?}");
                    assert_eq!(holder.control.as_deref(), Some(control), "{holder:?}");
                    seen += 1;
                }
            }
        });
        let _held = DiskLock::acquire(dir.path(), Some(control)).unwrap();
        assert!(Holder::read(&file).is_some(), "{seen} seen before");
    }
}
