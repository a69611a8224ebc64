//! A root file system as a disk: from a directory or a tar archive to a raw image, without
//! privilege and without putting a member on the host's own tree.
//!
//! ```text
//!  Dir ─ dir.rs ──────────────┐                       ┌─ tree.rs   names, attributes
//!  Tar ─ members.rs, tar.rs ──┴─▶ one model of it all ┤
//!                                                     └─ stage.rs  bytes, in WORK, under numbers
//!                  │
//!                  ▼
//!   gpt.rs  a partition, or none      make.rs  mke2fs -d, debugfs -w -f, and proof
//! ```
//!
//! Promises:
//!
//! * The image holds what the source holds: type, mode, owner, extended attributes, hard links,
//!   device numbers, modification times to the nanosecond, and content. What it cannot hold is an
//!   error that names the member. `lost+found` is there also if the source has none.
//! * Root and anybody else make the same tree of one archive. A directory is read as far as the
//!   caller may read it; what he may not read is an error, except `trusted.*` attributes, which
//!   Linux hides from all but root.
//! * Members that leave the root (absolute names, `..`, behind a symbolic link) are refused before
//!   anything is built. Files are made below the work directory only.
//! * Directories that an archive leaves out are root's, mode 0755, of 1970.

mod acl;
mod dir;
mod ext4;
mod gpt;
mod grow;
mod make;
mod members;
mod pax;
mod quota;
mod rules;
mod script;
mod shrink;
mod size;
mod sparse;
mod stage;
mod tar;
mod tool;
mod tree;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ploop::error::{Error, Result};

pub use grow::{Grown, grow};
pub use quota::add_quota;
pub use shrink::{Shrunk, shrink};

use stage::{BLOCK, Stage};
use tree::Tree;

/// The image's name in the work directory.
const IMAGE: &str = "disk.raw";
/// What a partition table takes before and behind the partition.
const FRAME: u64 = 2 * size::MIB;

/// Where a root file system comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootSource {
    /// A directory, with everything that is mounted in it.
    Dir(PathBuf),
    /// A tar archive (ustar, GNU or PAX), plain or compressed with gzip or zstd; which one its
    /// first bytes say. Pipes are read, too.
    Tar(PathBuf),
}

/// How the image is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildOptions {
    /// Bytes of the disk, a multiple of 4096; `None` computes it: content and metadata and a
    /// quarter more, at least 64 MiB, in whole MiB.
    pub size: Option<u64>,
    /// A GPT with one partition that starts at 1 MiB; otherwise the file system is the disk.
    pub partition: bool,
    /// The file system's label, at most 16 bytes.
    pub label: Option<String>,
    /// Bytes that the file system can grow to while it is mounted, as far as ext4 can keep room
    /// for it (8 TiB).
    pub fs_reserve_max: u64,
    /// User and group quota, counted in the file system. A kernel without quota mounts it
    /// read-only, if at all.
    pub user_quota: bool,
}

impl Default for BuildOptions {
    fn default() -> BuildOptions {
        BuildOptions {
            size: None,
            partition: true,
            label: None,
            fs_reserve_max: 16 << 40,
            user_quota: false,
        }
    }
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The source is read; counted in bytes: of the archive's file, or of content.
    Read,
    /// mke2fs fills the file system; from here on counted in inodes.
    Make,
    /// Links, nodes, owners, modes, times and attributes are set.
    Attributes,
    /// The result is compared with the source, and checked.
    Check,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub step: Step,
    /// Done of this step, in its unit.
    pub done: u64,
    /// All of this step; `None` where that is not known.
    pub total: Option<u64>,
}

/// A finished image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The raw disk, a sparse file in the work directory, synced.
    pub image: PathBuf,
    /// Its bytes.
    pub bytes: u64,
    /// Offset of the file system: 0 without partition.
    pub partition_offset: u64,
    /// Bytes of the partition, or of the disk without one.
    pub partition_bytes: u64,
    /// Files, directories, links and nodes, a hard-linked one once, with the root.
    pub entries: u64,
    /// Bytes of the blocks that files have content in.
    pub content_bytes: u64,
}

/// Builds a raw disk image from `source` in the directory `work`, which must be there, empty and
/// private to the caller, who removes it after an error. Blocking; the image is durable on return.
///
/// Needs mke2fs, debugfs, e2fsck and tune2fs (e2fsprogs 1.47). Errors: `Invalid` for a member or size that
/// is refused, `Corrupt` for a damaged archive, `Unsupported` for what ext4 or this program does
/// not know, `NoSpace` for a full host or a size that does not hold the content, `Permission` for
/// a directory that the caller may not read.
pub fn build(
    source: &RootSource,
    options: &BuildOptions,
    work: &Path,
    progress: &dyn Fn(Progress),
) -> Result<Built> {
    if let Some(label) = &options.label {
        make::check_label(label)?;
    }
    if let Some(size) = options.size {
        check_size(size)?;
    }
    let mut tree = Tree::new();
    let mut stage = Stage::new(work, options.size)?;
    match source {
        RootSource::Dir(path) => dir::read(path, work, &mut tree, &mut stage, progress)?,
        RootSource::Tar(path) => tar::read(path, &mut tree, &mut stage, progress)?,
    }
    let needs = size::needs(&tree, options.user_quota);
    let content_bytes = stage.staged();
    let frame = if options.partition { FRAME } else { 0 };
    let bytes = match options.size {
        Some(size) => size,
        None => frame + size::computed(&needs, options.fs_reserve_max, frame),
    };
    let (partition_offset, partition_bytes) = frame_disk(work, bytes, options.partition)?;
    let target = make::Target {
        work,
        image: IMAGE,
        offset: partition_offset,
        bytes: partition_bytes,
        label: options.label.as_deref(),
        reserve: options.fs_reserve_max,
        user_quota: options.user_quota,
    };
    make::make(&target, &tree, stage, &needs, progress)?;
    let image = work.join(IMAGE);
    seal(&image, bytes)?;
    let entries = tree.inodes().count() as u64;
    Ok(Built {
        image,
        bytes,
        partition_offset,
        partition_bytes,
        entries,
        content_bytes,
    })
}

fn check_size(size: u64) -> Result<()> {
    /// What the tables, a journal and a few files need.
    const SMALLEST: u64 = 16 * size::MIB;
    /// Blocks are counted in 32 bits by the tools for files like this one's.
    const LARGEST: u64 = (u32::MAX as u64) * BLOCK;
    if size.is_multiple_of(BLOCK) && (SMALLEST..=LARGEST).contains(&size) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "a disk of {size} bytes: the size must be a multiple of 4096, at least 16 MiB and below \
         16 TiB"
    )))
}

/// Makes the empty disk, and its partition table if it is to have one; returns the place of the
/// file system.
fn frame_disk(work: &Path, bytes: u64, partition: bool) -> Result<(u64, u64)> {
    let path = work.join(IMAGE);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| Error::io("create", &path, e))?;
    file.set_len(bytes)
        .map_err(|e| Error::io("extend", &path, e))?;
    if !partition {
        return Ok((0, bytes));
    }
    let gpt = gpt::Gpt::with_one_partition(bytes)?;
    gpt.write(&file, &path)?;
    let part = gpt.partition(0).map(|p| (p.offset, p.bytes));
    part.ok_or_else(|| Error::invalid("a partition table without a partition").on(&path))
}

/// The tools must have left the length alone; then the bytes are made durable.
fn seal(image: &Path, bytes: u64) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .open(image)
        .map_err(|e| Error::io("open", image, e))?;
    let len = file
        .metadata()
        .map_err(|e| Error::io("stat", image, e))?
        .len();
    if len != bytes {
        let what = format!("e2fsprogs left a disk of {len} bytes that must have {bytes}");
        return Err(Error::corrupt(what).on(image));
    }
    file.sync_all().map_err(|e| Error::io("sync", image, e))
}
