//! A directory as a source: everything below it, other file systems mounted there too.
//!
//! No symbolic link is followed below the root of the source, also if someone puts one there while
//! this runs (`openat2`, beneath and without links). A file that changes while it is read is an
//! error that names it: an image of half a change is worse than none.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ploop::error::{Error, Result};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::rules::{refused, show};
use super::stage::Stage;
use super::tree::{Content, Device, InodeId, Kind, Meta, ROOT, Time, Tree};
use super::{Progress, Step};

const CHUNK: usize = 256 << 10;
/// Linux's limit for the value of an attribute, and for the list of names.
const XATTR_MAX: usize = 64 << 10;

/// Reads the directory `root` into `tree` and `stage`. `work` may not be inside of it.
pub(super) fn read(
    root: &Path,
    work: &Path,
    tree: &mut Tree,
    stage: &mut Stage,
    progress: &dyn Fn(Progress),
) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(root, flags, Mode::empty())
        .map_err(|e| Error::io("open the directory", root, e.into()))?;
    let stat = rustix::fs::stat(work).map_err(|e| Error::io("stat", work, e.into()))?;
    let walk = Walk {
        root: root.to_path_buf(),
        top,
        work: (stat.st_dev, stat.st_ino),
        progress,
    };
    walk.run(tree, stage)
}

struct Walk<'a> {
    root: PathBuf,
    top: OwnedFd,
    /// The builder's own directory.
    work: (u64, u64),
    progress: &'a dyn Fn(Progress),
}

impl Walk<'_> {
    fn run(&self, tree: &mut Tree, stage: &mut Stage) -> Result<()> {
        let mut seen = HashMap::new();
        let stat = rustix::fs::fstat(&self.top).map_err(|e| self.failed("stat", b".", e))?;
        let meta = self.meta(&self.top, b".", &stat)?;
        tree.insert(b".", Kind::dir(), meta)?;
        let mut todo = vec![Vec::new()];
        while let Some(dir) = todo.pop() {
            let fd = self.open_dir(&dir)?;
            for name in self.list(&fd, &dir)? {
                let mut path = dir.clone();
                path.extend_from_slice(name.to_bytes());
                if self.entry(&fd, &name, &path, tree, stage, &mut seen)? {
                    path.push(b'/');
                    todo.push(path);
                }
            }
            (self.progress)(Progress {
                step: Step::Read,
                done: stage.staged(),
                total: None,
            });
        }
        Ok(())
    }

    /// Takes one name; true when it is a directory.
    fn entry(
        &self,
        dir: &OwnedFd,
        name: &CStr,
        path: &[u8],
        tree: &mut Tree,
        stage: &mut Stage,
        seen: &mut HashMap<(u64, u64), InodeId>,
    ) -> Result<bool> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty())
            .map_err(|e| self.failed("open", path, e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.failed("stat", path, e))?;
        let key = (stat.st_dev, stat.st_ino);
        if key == self.work {
            return Err(
                Error::invalid("the directory holds the one that the image is built in")
                    .on(&self.root)
                    .fix("Take a source outside of the store"),
            );
        }
        let kind = FileType::from_raw_mode(stat.st_mode);
        if let Some(&id) = seen.get(&key) {
            tree.link_inode(path, id)?;
            return Ok(false);
        }
        let meta = self.meta(&fd, path, &stat)?;
        let device = Device {
            major: rustix::fs::major(stat.st_rdev),
            minor: rustix::fs::minor(stat.st_rdev),
        };
        let node = match kind {
            FileType::Directory => Kind::dir(),
            FileType::RegularFile => Kind::File(self.content(dir, name, path, &stat, stage)?),
            FileType::Symlink => Kind::Symlink(
                rustix::fs::readlinkat(dir, name, Vec::new())
                    .map_err(|e| self.failed("read the link", path, e))?
                    .into_bytes(),
            ),
            FileType::CharacterDevice => Kind::Char(device),
            FileType::BlockDevice => Kind::Block(device),
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::Unknown => return Err(refused(path, "its type is unknown").on(&self.root)),
        };
        let (id, _) = tree
            .insert(path, node, meta)
            .map_err(|e| e.on(&self.root))?;
        if stat.st_nlink > 1 && kind != FileType::Directory {
            seen.insert(key, id);
        }
        Ok(kind == FileType::Directory && id != ROOT)
    }

    fn open_dir(&self, path: &[u8]) -> Result<OwnedFd> {
        let at = if path.is_empty() { &b"."[..] } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(&self.top, at, flags, Mode::empty(), resolve)
            .map_err(|e| self.failed("open", at, e))
    }

    fn list(&self, fd: &OwnedFd, path: &[u8]) -> Result<Vec<std::ffi::CString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(fd).map_err(|e| self.failed("list", path, e))? {
            let entry = entry.map_err(|e| self.failed("list", path, e))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn meta(&self, fd: &OwnedFd, path: &[u8], stat: &Stat) -> Result<Meta> {
        // The link in /proc leads to this very inode, whatever its type, and no further; the calls
        // on descriptors refuse one that was not opened for reading.
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let mut buf = Vec::with_capacity(XATTR_MAX);
        let mut xattrs = std::collections::BTreeMap::new();
        match rustix::fs::listxattr(&link, rustix::buffer::spare_capacity(&mut buf)) {
            Ok(_) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(self.failed("list the extended attributes of", path, e)),
        }
        for name in buf.split(|&b| b == 0).filter(|name| !name.is_empty()) {
            let mut value = Vec::with_capacity(XATTR_MAX);
            rustix::fs::getxattr(&link, name, rustix::buffer::spare_capacity(&mut value)).map_err(
                |e| self.failed(&format!("read the attribute {} of", show(name)), path, e),
            )?;
            xattrs.insert(name.to_vec(), value);
        }
        Ok(Meta {
            mode: (stat.st_mode & 0o7777) as u16,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: mtime(stat),
            xattrs,
        })
    }

    /// Stages a regular file, its holes as holes.
    fn content(
        &self,
        dir: &OwnedFd,
        name: &CStr,
        path: &[u8],
        before: &Stat,
        stage: &mut Stage,
    ) -> Result<Content> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty())
            .map_err(|e| self.failed("open", path, e))?;
        let file = File::from(fd);
        let len = before.st_size.cast_unsigned();
        let mut writer = stage.begin(path, len)?;
        let mut buf = vec![0; len.clamp(1, CHUNK as u64) as usize];
        let mut at = 0;
        while let Some((start, end)) = self.next_data(&file, path, at, len)? {
            at = start;
            while at < end {
                let want = (end - at).min(CHUNK as u64) as usize;
                let got = self.read_at(&file, path, &mut buf[..want], at)?;
                if got == 0 {
                    return Err(self.changed(path));
                }
                writer.put(at, &buf[..got])?;
                at += got as u64;
            }
        }
        let after = rustix::fs::fstat(&file).map_err(|e| self.failed("stat", path, e))?;
        let state = |s: &Stat| {
            (
                s.st_dev,
                s.st_ino,
                s.st_size,
                mtime(s),
                s.st_ctime,
                s.st_ctime_nsec,
            )
        };
        // A file of /proc has a length of 0 and content all the same.
        if state(&after) != state(before) || self.read_at(&file, path, &mut buf[..1], len)? != 0 {
            return Err(self.changed(path));
        }
        writer.finish()
    }

    /// The next range that is no hole, cut to `len`.
    fn next_data(&self, file: &File, path: &[u8], at: u64, len: u64) -> Result<Option<(u64, u64)>> {
        if at >= len {
            return Ok(None);
        }
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // Not every file system can tell holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, len))),
            Err(e) => return Err(self.failed("seek in", path, e)),
        };
        match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) if start < len => Ok(Some((start, end.min(len)))),
            Ok(_) | Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(self.failed("seek in", path, e)),
        }
    }

    fn read_at(&self, file: &File, path: &[u8], buf: &mut [u8], at: u64) -> Result<usize> {
        loop {
            match file.read_at(buf, at) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                other => {
                    return other.map_err(|e| {
                        Error::io(format!("read {}", show(path)), &self.root, e).at(at)
                    });
                }
            }
        }
    }

    fn changed(&self, path: &[u8]) -> Error {
        Error::new(
            ploop::error::Kind::InUse,
            format!("{} changed while it was read", show(path)),
        )
        .on(&self.root)
        .fix("Stop what writes to it, or import a snapshot of it")
    }

    fn failed(&self, what: &str, path: &[u8], e: Errno) -> Error {
        let error = Error::io(format!("{what} {}", show(path)), &self.root, e.into());
        match e {
            Errno::ACCESS | Errno::PERM => {
                error.fix("Run the import as root, or from a tar archive")
            }
            _ => error,
        }
    }
}

fn mtime(stat: &Stat) -> Time {
    // The kernel counts nanoseconds forward from the second, also before 1970.
    Time {
        sec: stat.st_mtime,
        nsec: stat.st_mtime_nsec as u32,
    }
}
