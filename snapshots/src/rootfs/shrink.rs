//! Shrinking what is on a disk: the ext4 file system, partition 1 that it is in, the partition table.
//!
//! ```text
//!  before  GPT │ partition 1: file system ………………… │ gap │ GPT
//!  after   GPT │ partition 1: file system │ gap │ GPT       (the rest is cut off)
//! ```
//!
//! What is cut off must be known to be empty: the file system's own free space, once resize2fs has
//! moved everything out of it, or zeros. Anything else is refused, by name, before anything changes.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ploop::error::{Error, Kind, Result};
use rustix::fs::{FallocateFlags, fallocate};

use super::ext4::Superblock;
use super::gpt::{BACKUP, Gpt, Partition};
use super::grow::{aside, check, data_from, open, resize, split, what_is_there};
use super::tool;

const MIB: u64 = 1 << 20;
/// Bytes looked at in one read.
const BUFFER: usize = 256 << 10;

/// What [`shrink`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shrunk {
    /// Bytes of the file system now.
    pub filesystem: u64,
}

/// Makes the raw disk in the file `image` `new_size` bytes long, and what is on it first: ext4 in
/// partition 1 of a GPT that is the last one, or on the whole disk, is checked (`e2fsck -fp`),
/// shrunk (`resize2fs`) as far as it must be, and checked again; the partition ends at the last whole
/// MiB, and the table's backup moves to the new end. Blocking; durable on return. Needs no privilege
/// but to write the file, which nobody else may use. A file system in a partition is copied next to
/// `image` (`NAME.fs`) meanwhile.
///
/// Errors, with nothing changed: `Invalid` for a size that is not below the present one or no
/// multiple of 512; `Unsupported` for anything but ext4, for a partition behind partition 1, and for
/// data behind the new end that is not the file system's; `Corrupt` for a damaged partition table.
/// With the file to be thrown away: `NoSpace` when the files do not fit (the text says the smallest
/// size that resize2fs thinks would do) or the host is full, `Corrupt` for a damaged file system.
pub fn shrink(image: &Path, new_size: u64) -> Result<Shrunk> {
    let (file, old_size) = open(image)?;
    if new_size >= old_size || !new_size.is_multiple_of(512) {
        return Err(Error::invalid(format!(
            "a disk of {old_size} bytes cannot be shrunk to {new_size} bytes: the size must be a \
             multiple of 512 and smaller"
        ))
        .on(image));
    }
    let disk = Shrink {
        file: &file,
        image,
        old_size,
        new_size,
    };
    let filesystem = match Gpt::read(&file, image)? {
        Some(gpt) => disk.partition(gpt)?,
        None => disk.whole()?,
    };
    file.set_len(new_size)
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::io("shorten", image, e))?;
    Ok(Shrunk { filesystem })
}

/// A raw disk that is to be shorter.
struct Shrink<'a> {
    file: &'a File,
    image: &'a Path,
    old_size: u64,
    new_size: u64,
}

impl Shrink<'_> {
    /// A file system on the whole disk; returns its bytes.
    fn whole(&self) -> Result<u64> {
        let sb = self.superblock(0)?;
        let bytes = sb.bytes_in(self.old_size, self.image, 0)?;
        self.refuse_data(bytes.max(self.new_size)..self.old_size)?;
        let target = self.new_size / sb.block_size;
        if target < sb.blocks {
            fit(self.image, target, &|need| need.next_multiple_of(MIB))?;
        }
        self.prove(0)
    }

    /// A file system in partition 1; returns its bytes.
    fn partition(&self, mut gpt: Gpt) -> Result<u64> {
        let Some(part) = gpt.partition(0) else {
            return Err(self.refused("a partition table without partition 1"));
        };
        if !gpt.is_last(0) {
            return Err(self.refused("a disk with a partition behind partition 1"));
        }
        let sb = self.superblock(part.offset)?;
        let end = Gpt::last_end(self.new_size);
        let smallest = |need: u64| Gpt::disk_for(part.offset + need);
        let place = part.bytes.min(self.old_size.saturating_sub(part.offset));
        let bytes = sb.bytes_in(place, self.image, part.offset)?;
        self.refuse_rest(&gpt, &part, bytes, end)?;
        let target = end.saturating_sub(part.offset) / sb.block_size;
        if target == 0 {
            return Err(no_room(self.image, smallest(sb.block_size)));
        }
        if target < sb.blocks {
            aside(self.file, self.image, part.offset, bytes, |alone| {
                fit(alone, target, &smallest)
            })
            .map_err(|e| match e.kind() {
                Kind::NotFound => e,
                _ => e.on(self.image),
            })?;
            // What resize2fs moved away is not to be found behind the file system's end.
            let now = self.superblock(part.offset)?;
            self.punch(part.offset + now.blocks * now.block_size..part.offset + part.bytes)?;
        }
        // The table is written last, its backup first: until then the old one holds.
        gpt.span(self.new_size);
        gpt.end_at(0, end.min(part.offset + part.bytes));
        gpt.write(self.file, self.image)?;
        self.prove(part.offset)
    }

    /// Refuses data behind `end` that is neither the file system's nor the partition table's.
    fn refuse_rest(&self, gpt: &Gpt, part: &Partition, filesystem: u64, end: u64) -> Result<()> {
        let backup = gpt.backup_offset();
        let behind = part.offset.saturating_add(part.bytes).max(end);
        self.refuse_data(part.offset.saturating_add(filesystem).max(end)..behind)?;
        self.refuse_data(behind..backup)?;
        self.refuse_data(backup.saturating_add(BACKUP).max(end)..self.old_size)
    }

    fn superblock(&self, offset: u64) -> Result<Superblock> {
        let found = Superblock::read(self.file, self.image, offset)?;
        found.ok_or_else(|| match what_is_there(self.file, offset) {
            "XFS" => self.refused("XFS, which cannot shrink"),
            found => self.refused(found),
        })
    }

    fn refused(&self, found: &str) -> Error {
        Error::unsupported(format!("shrinking {found}; what can is ext4"))
            .on(self.image)
            .fix(
                "Make what is on the disk smaller yourself; then --no-filesystem cuts off what reads \
                 as zeros",
            )
    }

    /// Errors: `Unsupported` when any byte of `range` is not zero.
    fn refuse_data(&self, range: Range<u64>) -> Result<()> {
        let Some(at) = first_data(self.file, &range)
            .map_err(|e| Error::io("read", self.image, e).at(range.start))?
        else {
            return Ok(());
        };
        let what = "shrinking a disk with data behind the new end that no known file system has";
        Err(Error::unsupported(what)
            .on(self.image)
            .at(at)
            .fix("Look what it is (a second file system, RAID or swap?), and remove it inside"))
    }

    fn punch(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(self.file, mode, range.start, range.end - range.start)
            .map_err(|e| Error::io("punch", self.image, e.into()).at(range.start))
    }

    /// The file system at `offset` lies inside the new end and is sound; returns its bytes.
    fn prove(&self, offset: u64) -> Result<u64> {
        let sb = Superblock::read(self.file, self.image, offset)?;
        let bytes = sb.map_or(0, |sb| sb.blocks.saturating_mul(sb.block_size));
        if bytes == 0 || offset.saturating_add(bytes) > self.new_size {
            let what = format!("the file system has {bytes} bytes after shrinking");
            return Err(Error::corrupt(what).on(self.image).at(offset));
        }
        let (dir, name) = split(self.image)?;
        let name = format!("{name}?offset={offset}");
        let out = tool::run_on(self.image, "e2fsck", &["-fn", &name], dir)?;
        match out.code {
            Some(0) => Ok(bytes),
            _ => Err(tool::failed("e2fsck", self.image, &out)),
        }
    }
}

/// Checks the file system that the file is, and makes it `blocks` long, if that holds it.
/// `smallest`: the disk that holds so many bytes of it.
fn fit(image: &Path, blocks: u64, smallest: &dyn Fn(u64) -> u64) -> Result<()> {
    check(image)?;
    let need = least(image)?;
    if need.blocks > blocks {
        return Err(no_room(image, smallest(need.blocks * need.block_size)));
    }
    resize(image, blocks)
}

fn no_room(image: &Path, smallest: u64) -> Error {
    let what = format!("what is on the disk does not fit: {smallest} bytes are the least it needs");
    Error::new(Kind::NoSpace, what).on(image).fix(format!(
        "Ask for {}M or more, or remove files",
        smallest / MIB
    ))
}

/// Blocks that the checked file system can be shrunk to, as resize2fs reckons.
struct Least {
    blocks: u64,
    block_size: u64,
}

fn least(image: &Path) -> Result<Least> {
    let file = File::open(image).map_err(|e| Error::io("open", image, e))?;
    let sb = Superblock::read(&file, image, 0)?;
    let (dir, name) = split(image)?;
    let out = tool::run_on(image, "resize2fs", &["-P", name], dir)?;
    let text = String::from_utf8_lossy(&out.stdout);
    let blocks = text.lines().find_map(|l| {
        let (words, number) = l.rsplit_once(": ")?;
        let number = number.trim().parse::<u64>();
        number.ok().filter(|_| words.contains("minimum size"))
    });
    match (out.code, blocks, sb) {
        (Some(0), Some(blocks), Some(sb)) => Ok(Least {
            blocks,
            block_size: sb.block_size,
        }),
        _ => Err(tool::failed("resize2fs", image, &out)),
    }
}

/// The first byte of `range` that is not zero.
fn first_data(file: &File, range: &Range<u64>) -> std::io::Result<Option<u64>> {
    let mut at = range.start;
    let mut buf = vec![0; BUFFER];
    while at < range.end {
        let data = data_from(file, at, range.end)?;
        at = data.start;
        while at < data.end {
            let n = (data.end - at).min(BUFFER as u64) as usize;
            file.read_exact_at(&mut buf[..n], at)?;
            if let Some(i) = buf[..n].iter().position(|&b| b != 0) {
                return Ok(Some(at + i as u64));
            }
            at += n as u64;
        }
    }
    Ok(None)
}
