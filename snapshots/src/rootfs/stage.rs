//! Content on its way into an image: plain files and plain directories in a private directory.
//!
//! ```text
//! WORK/content/17   while the source is read: one file per content, under a number
//! WORK/plain/…      when it is known whole: directories and regular files under their names,
//!                   for `mke2fs -d`; hard links are hard links
//! ```
//!
//! Nothing here is a symbolic link, a node, set-user-ID, or somebody else's: modes are 0600 and
//! 0700, and the owner is whoever runs this. A content gets its name by rename, once, so the bytes
//! are written once. Only blocks that hold something are written: holes stay holes.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ploop::error::{Error, Kind, Result};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};

use super::rules::show;
use super::tree::{Content, Entry, InodeId, Kind as Node, Tree};

/// The unit of everything here: a file system block.
pub(super) const BLOCK: u64 = 4096;
/// The longest file that ext4 holds with 4 KiB blocks.
const FILE_MAX: u64 = (u32::MAX as u64) * BLOCK;

/// The staging directories of one build.
#[derive(Debug)]
pub(super) struct Stage {
    dir: PathBuf,
    content: OwnedFd,
    next: u64,
    /// Bytes of blocks staged so far.
    staged: u64,
    /// More than this cannot fit into the image.
    limit: Option<u64>,
}

impl Stage {
    /// Makes the staging directories in `work`.
    pub(super) fn new(work: &Path, limit: Option<u64>) -> Result<Stage> {
        let path = work.join("content");
        make_dir(&path)?;
        let content = open_dir(&path)?;
        Ok(Stage {
            dir: work.to_path_buf(),
            content,
            next: 0,
            staged: 0,
            limit,
        })
    }

    /// Bytes of content staged so far, without holes.
    pub(super) fn staged(&self) -> u64 {
        self.staged
    }

    /// Begins the content of the member `path`, `len` bytes long.
    pub(super) fn begin(&mut self, path: &[u8], len: u64) -> Result<Writer<'_>> {
        if len > FILE_MAX {
            return Err(Error::unsupported(format!(
                "member {} of {len} bytes is longer than a file in ext4 can be ({FILE_MAX} bytes)",
                show(path)
            )));
        }
        let id = self.next;
        self.next += 1;
        let at = self.dir.join("content").join(id.to_string());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&at)
            .map_err(|e| Error::io("create", &at, e))?;
        Ok(Writer {
            member: path.to_vec(),
            stage: self,
            file,
            at,
            last: None,
            content: Content {
                id,
                len,
                blocks: 0,
                runs: 0,
            },
        })
    }

    /// Gives up a content that no name leads to any more.
    pub(super) fn drop_content(&mut self, content: Content) -> Result<()> {
        self.staged = self.staged.saturating_sub(content.blocks * BLOCK);
        let at = self.dir.join("content").join(content.id.to_string());
        std::fs::remove_file(&at).map_err(|e| Error::io("remove", &at, e))
    }

    /// Lays the directories and files of `tree` out in `plain`, and marks each with its number:
    /// the time of modification is `mark(id)` seconds. Returns the directory's name in the work
    /// directory.
    pub(super) fn lay_out(
        self,
        tree: &Tree,
        mark: impl Fn(InodeId) -> i64,
    ) -> Result<&'static str> {
        let at = self.dir.join("plain");
        make_dir(&at)?;
        let plain = open_dir(&at)?;
        let failed = |what, path: &[u8], e: rustix::io::Errno| {
            Error::io(
                format!("{what} the staged member {}", show(path)),
                &at,
                e.into(),
            )
        };
        let mut first = std::collections::HashMap::new();
        let mut dirs = Vec::new();
        tree.walk(|e: &Entry<'_>| {
            match &e.inode.kind {
                Node::Dir(_) => {
                    rustix::fs::mkdirat(&plain, e.path, Mode::RWXU)
                        .map_err(|x| failed("create", e.path, x))?;
                    dirs.push((e.path.to_vec(), e.id));
                }
                Node::File(content) => match first.get(&e.id) {
                    None => {
                        rustix::fs::renameat(&self.content, content.id.to_string(), &plain, e.path)
                            .map_err(|x| failed("name", e.path, x))?;
                        touch(&plain, e.path, mark(e.id)).map_err(|x| failed("mark", e.path, x))?;
                        if e.inode.links > 1 {
                            first.insert(e.id, e.path.to_vec());
                        }
                    }
                    Some(old) => {
                        rustix::fs::linkat(&plain, old, &plain, e.path, AtFlags::empty())
                            .map_err(|x| failed("link", e.path, x))?;
                    }
                },
                _ => {}
            }
            Ok(())
        })?;
        // Naming touches the directory above: directories are marked when every name is there.
        for (path, id) in dirs {
            touch(&plain, &path, mark(id)).map_err(|x| failed("mark", &path, x))?;
        }
        Ok("plain")
    }
}

/// A content being written, ascending.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    stage: &'a mut Stage,
    member: Vec<u8>,
    file: File,
    at: PathBuf,
    /// The last block that was written to.
    last: Option<u64>,
    content: Content,
}

impl Writer<'_> {
    /// Puts `bytes` at `offset`, inside the length given; zeros over whole pieces of a block take
    /// no space.
    pub(super) fn put(&mut self, mut offset: u64, mut bytes: &[u8]) -> Result<()> {
        debug_assert!(offset + bytes.len() as u64 <= self.content.len);
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(piece_len(offset, bytes));
            if piece.iter().any(|&b| b != 0) {
                self.count(offset / BLOCK, (offset + piece.len() as u64 - 1) / BLOCK)?;
                self.file
                    .write_all_at(piece, offset)
                    .map_err(|e| self.failed(e))?;
            }
            offset += piece.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Ends the content.
    pub(super) fn finish(self) -> Result<Content> {
        self.file
            .set_len(self.content.len)
            .map_err(|e| self.failed(e))?;
        Ok(self.content)
    }

    fn count(&mut self, first: u64, last: u64) -> Result<()> {
        let content = &mut self.content;
        let fresh = last + 1 - first - u64::from(self.last == Some(first));
        if self.last.is_none_or(|l| l != first && l + 1 != first) {
            content.runs += 1;
        }
        self.last = Some(last);
        content.blocks += fresh;
        self.stage.staged += fresh * BLOCK;
        match self.stage.limit {
            Some(limit) if self.stage.staged > limit => Err(Error::new(
                Kind::NoSpace,
                format!("the content is larger than the disk of {limit} bytes it is for"),
            )
            .fix("Ask for a larger size, or leave the size out to have it computed")),
            _ => Ok(()),
        }
    }

    fn failed(&self, e: std::io::Error) -> Error {
        Error::io(format!("stage member {}", show(&self.member)), &self.at, e)
    }
}

/// Bytes of the next piece: up to a block's end while it is zeros, otherwise all blocks that hold
/// something, so that they go out in one write.
fn piece_len(offset: u64, bytes: &[u8]) -> usize {
    let mut len = 0;
    while len < bytes.len() {
        let room = (BLOCK - (offset + len as u64) % BLOCK) as usize;
        let end = (len + room).min(bytes.len());
        if bytes[len..end].iter().all(|&b| b == 0) {
            return if len == 0 { end } else { len };
        }
        len = end;
    }
    len
}

fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::io("create", path, e))
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Error::io("open", path, e.into()))
}

fn touch(dir: impl AsFd, path: &[u8], sec: i64) -> rustix::io::Result<()> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_NOW,
    };
    let times = Timestamps {
        last_access: now,
        last_modification: Timespec {
            tv_sec: sec,
            tv_nsec: 0,
        },
    };
    rustix::fs::utimensat(dir, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_take_no_space_and_blocks_are_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Stage::new(dir.path(), None).unwrap();
        let mut w = stage.begin(b"m", 1 << 20).unwrap();
        w.put(0, b"ab").unwrap();
        w.put(2, b"cd").unwrap();
        w.put(4, &vec![0; 3 * 4096]).unwrap();
        w.put(500_000, &[1; 5000]).unwrap();
        let c = w.finish().unwrap();
        assert_eq!((c.len, c.blocks, c.runs), (1 << 20, 1 + 2, 2));
        assert_eq!(stage.staged(), 3 * 4096);
        let bytes = std::fs::read(dir.path().join("content/0")).unwrap();
        let mut want = vec![0; 1 << 20];
        want[..4].copy_from_slice(b"abcd");
        want[500_000..505_000].fill(1);
        assert!(bytes == want);
        stage.drop_content(c).unwrap();
        assert_eq!(stage.staged(), 0);
    }

    #[test]
    fn more_than_the_disk_and_more_than_ext4_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Stage::new(dir.path(), Some(8192)).unwrap();
        let e = stage.begin(b"big", 1 << 62).unwrap_err();
        assert!(e.to_string().contains("big"), "{e}");
        let mut w = stage.begin(b"m", 1 << 20).unwrap();
        let e = w.put(0, &[1; 8193]).unwrap_err();
        assert_eq!(e.kind(), Kind::NoSpace);
    }
}
