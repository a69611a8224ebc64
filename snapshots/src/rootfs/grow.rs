//! Growing what is on a disk: the partition table, partition 1 and the ext4 file system in it.
//!
//! What is not known stays as it is, and the answer says so: the disk is larger then, and what is
//! on it is for its owner to grow.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt};
use std::path::Path;

use ploop::error::{Error, Kind, Result};

use rustix::fs::{FallocateFlags, SeekFrom as Seek, fallocate, seek};
use rustix::io::Errno;

use super::ext4::Superblock;
use super::gpt::Gpt;
use super::tool;
use crate::store::refuse_full;

/// What [`grow`] did. The disk is larger in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grown {
    /// The file system, and the partition where there is one, are larger, too.
    pub filesystem: bool,
    /// Bytes of the file system now; of the disk, if only that is larger.
    pub bytes: u64,
    /// Why only the disk is larger: what is on it, or in the way. A clause without final stop.
    pub reason: Option<String>,
}

/// Makes the raw disk in the file `image` `new_size` bytes long, and what is on it as far as it is
/// known: a GPT gets its backup moved to the end and partition 1 extended, if it is the last one;
/// ext4 in that partition, or on the whole disk, is checked (`e2fsck -fp`) and grown
/// (`resize2fs`). Blocking; durable on return. Needs no privilege but to write the file, which
/// nobody else may use. A file system in a partition is copied next to `image` (`NAME.fs`) while it
/// is grown. After an error the file is to be thrown away.
///
/// Errors: `Invalid` for a size below the present one or no multiple of 512, `Corrupt` for a
/// damaged partition table or file system, `NoSpace`.
pub fn grow(image: &Path, new_size: u64) -> Result<Grown> {
    let (file, old_size) = open(image)?;
    if new_size < old_size || !new_size.is_multiple_of(512) {
        return Err(Error::invalid(format!(
            "a disk of {old_size} bytes cannot be grown to {new_size} bytes: the size must be a \
             multiple of 512 and no smaller"
        ))
        .on(image));
    }
    let gpt = Gpt::read(&file, image)?;
    file.set_len(new_size)
        .map_err(|e| Error::io("extend", image, e))?;
    let grown = match gpt {
        Some(gpt) => grow_partition(&file, image, gpt, old_size, new_size)?,
        None => grow_ext4(&file, image, (0, new_size), new_size)?,
    };
    file.sync_all().map_err(|e| Error::io("sync", image, e))?;
    Ok(grown)
}

/// The raw disk in a file, to be changed, and its bytes.
pub(super) fn open(image: &Path) -> Result<(File, u64)> {
    let file = OpenOptions::new().read(true).write(true).open(image);
    let file = file.map_err(|e| Error::io("open", image, e))?;
    let about = file.metadata().map_err(|e| Error::io("stat", image, e))?;
    Ok((file, about.len()))
}

fn grow_partition(
    file: &File,
    image: &Path,
    mut gpt: Gpt,
    old_size: u64,
    new_size: u64,
) -> Result<Grown> {
    if !gpt.fits(new_size) {
        let what = "the partition table: a partition ends behind the disk";
        return Err(Error::corrupt(what)
            .on(image)
            .fix("Mend it inside first: sgdisk -v DEVICE says what is wrong"));
    }
    let extendable = gpt.partition(0).is_some() && gpt.is_last(0);
    // Of a disk that was grown alone before, the table is still that of the smaller one.
    let made_for = gpt.disk_bytes();
    if new_size > made_for.min(old_size) {
        gpt.span(new_size);
        if extendable {
            gpt.extend(0);
        }
        gpt.write(file, image)?;
        Gpt::erase_backup(file, image, made_for.min(old_size))?;
    }
    match gpt.partition(0) {
        Some(part) if extendable => grow_ext4(file, image, (part.offset, part.bytes), new_size),
        Some(_) => Ok(only("another partition lies behind partition 1", new_size)),
        None => Ok(only("the partition table has no partition 1", new_size)),
    }
}

fn only(reason: &str, bytes: u64) -> Grown {
    Grown {
        filesystem: false,
        bytes,
        reason: Some(reason.to_owned()),
    }
}

/// Grows the file system at `place` (offset, bytes) of a disk of `disk` bytes.
fn grow_ext4(file: &File, image: &Path, place: (u64, u64), disk: u64) -> Result<Grown> {
    let (offset, bytes) = place;
    let Some(sb) = Superblock::read(file, image, offset)? else {
        let found = what_is_there(file, offset);
        return Ok(only(
            &format!("it holds no ext4 file system but {found}"),
            disk,
        ));
    };
    let old = sb.bytes_in(bytes, image, offset)?;
    let blocks = bytes / sb.block_size;
    if blocks > sb.blocks {
        if offset == 0 {
            resize(image, blocks)?;
            // resize2fs cuts the file at the file system's end.
            file.set_len(disk)
                .map_err(|e| Error::io("extend", image, e))?;
        } else {
            aside(file, image, offset, old, |alone| resize(alone, blocks))?;
        }
    }
    let now = Superblock::read(file, image, offset)?
        .ok_or_else(|| Error::corrupt("the file system is gone after growing").on(image))?;
    if now.blocks < sb.blocks {
        let what = format!(
            "of {} blocks {} are left after growing",
            sb.blocks, now.blocks
        );
        return Err(Error::corrupt(what).on(image).at(offset));
    }
    Ok(Grown {
        filesystem: true,
        bytes: now.bytes_in(bytes, image, offset)?,
        reason: None,
    })
}

/// Checks the file system that the file is, and makes it `blocks` long.
pub(super) fn resize(image: &Path, blocks: u64) -> Result<()> {
    check(image)?;
    let (dir, name) = split(image)?;
    let out = tool::run_on(image, "resize2fs", &[name, &blocks.to_string()], dir)?;
    if out.code != Some(0) {
        return Err(tool::failed("resize2fs", image, &out));
    }
    let file = File::open(image).map_err(|e| Error::io("open", image, e))?;
    match Superblock::read(&file, image, 0)? {
        // resize2fs charges nobody for the blocks of an extent tree that it makes or drops.
        Some(sb) if sb.quota => check(image),
        _ => Ok(()),
    }
}

/// Checks the file system that the file is; what can be repaired without asking is.
pub(super) fn check(image: &Path) -> Result<()> {
    let (dir, name) = split(image)?;
    let out = tool::run_on(image, "e2fsck", &["-fp", name], dir)?;
    // 1: what was found was repaired.
    if matches!(out.code, Some(0 | 1)) {
        return Ok(());
    }
    let error = tool::failed("e2fsck", image, &out);
    Err(match error.kind() {
        Kind::Io => Error::corrupt(error.what())
            .on(image)
            .fix("Attach the disk that it comes from, and check that: e2fsck -f DEVICE"),
        _ => error,
    })
}

/// Lets `change` work on a file of its own that holds what `file` has from `offset` on, `len`
/// bytes, and brings the result back. resize2fs can be told an offset, but at its end it cuts the
/// file as if there were none, and with it the last blocks of the file system.
pub(super) fn aside(
    file: &File,
    image: &Path,
    offset: u64,
    len: u64,
    change: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let (dir, name) = split(image)?;
    let data = file.metadata().map_err(|e| Error::io("stat", image, e))?;
    let left = fs2::available_space(dir).map_err(|e| Error::io("statvfs", dir, e))?;
    refuse_full(dir, data.blocks() * 512, left)?;
    let at = dir.join(format!("{name}.fs"));
    let own = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&at)
        .map_err(|e| Error::io("create", &at, e))?;
    let done = (|| {
        own.set_len(len).map_err(|e| Error::io("extend", &at, e))?;
        copy(file, offset, &own, 0, len).map_err(|e| Error::io("copy to", &at, e))?;
        change(&at)?;
        let len = own.metadata().map_err(|e| Error::io("stat", &at, e))?.len();
        copy(&own, 0, file, offset, len).map_err(|e| Error::io("copy back to", image, e))
    })();
    let removed = std::fs::remove_file(&at).map_err(|e| Error::io("remove", &at, e));
    done.and(removed)
}

/// Copies `len` bytes; what is a hole in `from` becomes one in `to`.
fn copy(from: &File, start: u64, to: &File, target: u64, len: u64) -> io::Result<()> {
    let (mut from, mut to) = (from, to);
    let end = start + len;
    let mut at = start;
    while at < end {
        let data = data_from(from, at, end)?;
        if data.start > at {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(to, mode, target + (at - start), data.start - at)?;
        }
        from.seek(SeekFrom::Start(data.start))?;
        to.seek(SeekFrom::Start(target + (data.start - start)))?;
        let want = data.end - data.start;
        if io::copy(&mut from.take(want), &mut to)? != want {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = data.end;
    }
    Ok(())
}

/// The first data at or after `at`; empty at `end` when there is none.
pub(super) fn data_from(file: &File, at: u64, end: u64) -> io::Result<Range<u64>> {
    let start = match seek(file, Seek::Data(at)) {
        Ok(start) if start < end => start,
        Ok(_) | Err(Errno::NXIO) => return Ok(end..end),
        // A file system that cannot tell has data everywhere.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(at..end),
        Err(e) => return Err(e.into()),
    };
    Ok(start..seek(file, Seek::Hole(start))?.min(end))
}

/// The directory and the name that e2fsprogs will take.
pub(super) fn split(image: &Path) -> Result<(&Path, &str)> {
    let dir = match image.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let name = image.file_name().and_then(|n| n.to_str());
    match name {
        Some(name) if !name.contains('?') && !name.starts_with('-') => Ok((dir, name)),
        _ => Err(Error::invalid("e2fsprogs cannot take a file of this name").on(image)),
    }
}

/// What is known by its first bytes and is not ext4.
pub(super) fn what_is_there(file: &File, offset: u64) -> &'static str {
    use std::os::unix::fs::FileExt;
    let begins = |at: u64, magic: &[u8]| {
        let mut buf = vec![0; magic.len()];
        file.read_exact_at(&mut buf, offset + at).is_ok() && buf == magic
    };
    if begins(0, b"XFSB") {
        "XFS"
    } else if begins(0x10040, b"_BHRfS_M") {
        "Btrfs"
    } else if begins(0, b"LUKS\xba\xbe") {
        "LUKS"
    } else if begins(512, b"LABELONE") {
        "LVM"
    } else if begins(510, b"\x55\xaa") {
        "an MBR or a boot sector"
    } else {
        "something unknown"
    }
}
