//! Reading ext4: the superblock, and the inode tables of an image of our own making.
//!
//! This is how a build knows which inode a member became, and how it proves at the end that every
//! one is as it should be: what the tools report is not all that can go wrong.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ploop::error::{Error, Result};

use super::tree::{Device, Time};

/// Offset of the superblock in the file system.
const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xef53;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const RO_COMPAT_QUOTA: u32 = 0x100;
/// Group flag: no inode of the group was ever used.
const INODE_UNINIT: u16 = 0x1;

/// What the superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) block_size: u64,
    pub(super) blocks: u64,
    pub(super) inodes: u32,
    /// It counts what users and groups have.
    pub(super) quota: bool,
    inodes_per_group: u32,
    inode_size: u16,
    desc_size: u16,
    first_data_block: u32,
    incompat: u32,
}

impl Superblock {
    /// Reads the superblock of a file system that starts at `base`; `None` when there is none.
    pub(super) fn read(file: &File, path: &Path, base: u64) -> Result<Option<Superblock>> {
        let mut sb = [0; 1024];
        let got = file.read_at(&mut sb, base + SUPERBLOCK);
        if got.map_err(|e| Error::io("read", path, e).at(base + SUPERBLOCK))? < sb.len()
            || le16(&sb, 56) != MAGIC
        {
            return Ok(None);
        }
        let incompat = le32(&sb, 96);
        let wide = incompat & INCOMPAT_64BIT != 0;
        let log = le32(&sb, 24);
        let out = Superblock {
            block_size: 1024 << log.min(6),
            blocks: u64::from(le32(&sb, 4))
                | if wide {
                    u64::from(le32(&sb, 336)) << 32
                } else {
                    0
                },
            inodes: le32(&sb, 0),
            quota: le32(&sb, 100) & RO_COMPAT_QUOTA != 0,
            inodes_per_group: le32(&sb, 40),
            inode_size: le16(&sb, 88),
            desc_size: if wide { le16(&sb, 254) } else { 32 },
            first_data_block: le32(&sb, 20),
            incompat,
        };
        let sane = log <= 6
            && out.inodes_per_group > 0
            && (128..=1024).contains(&out.inode_size)
            && out.inode_size.is_power_of_two()
            && (32..=1024).contains(&out.desc_size);
        if !sane {
            return Err(Error::corrupt("an ext4 superblock that contradicts itself")
                .on(path)
                .at(base + SUPERBLOCK));
        }
        Ok(Some(out))
    }

    /// Bytes of the file system at `base`, which has `place` bytes to be in. Error: `Corrupt` when it
    /// says that it has more.
    pub(super) fn bytes_in(&self, place: u64, path: &Path, base: u64) -> Result<u64> {
        let bytes = self.blocks.saturating_mul(self.block_size);
        if bytes <= place {
            return Ok(bytes);
        }
        let what = format!("an ext4 file system that says it has {bytes} bytes, in {place}");
        Err(Error::corrupt(what)
            .on(path)
            .at(base)
            .fix("Attach the disk that it comes from, and check that: e2fsck -f DEVICE"))
    }
}

/// The fields of an inode that a build sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raw {
    /// Type and permissions.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) links: u16,
    /// Low half of the time, and the extra word: epoch in 2 bits, nanoseconds above.
    pub(super) mtime: u32,
    pub(super) mtime_extra: u32,
    /// The first two words of the block map: a node's number.
    pub(super) block: [u32; 2],
}

impl Raw {
    fn decode(b: &[u8]) -> Raw {
        let half = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        // Bytes past 128 count only as far as the inode says that it has them.
        let extra = b.len() >= 256 && le16(b, 128) >= 12;
        Raw {
            mode: le16(b, 0),
            uid: half(le16(b, 2), le16(b, 120)),
            gid: half(le16(b, 24), le16(b, 122)),
            size: u64::from(le32(b, 4)) | u64::from(le32(b, 108)) << 32,
            links: le16(b, 26),
            mtime: le32(b, 16),
            mtime_extra: if extra { le32(b, 136) } else { 0 },
            block: [le32(b, 40), le32(b, 44)],
        }
    }
}

/// The two words that hold `time`, which is in range.
pub(super) fn time_words(time: Time) -> (u32, u32) {
    let low = time.sec as u32;
    let epoch = (time.sec - i64::from(low.cast_signed())) >> 32;
    (low, time.nsec << 2 | (epoch as u32 & 3))
}

/// The two words that hold a node's number, as Linux writes them.
pub(super) fn device_words(d: Device) -> [u32; 2] {
    if d.major < 256 && d.minor < 256 {
        [d.major << 8 | d.minor, 0]
    } else {
        [0, (d.minor & 0xff) | d.major << 8 | (d.minor & !0xff) << 12]
    }
}

/// Calls `visit` for every inode in use of the file system at `base`.
pub(super) fn inodes(
    file: &File,
    path: &Path,
    base: u64,
    mut visit: impl FnMut(u32, Raw) -> Result<()>,
) -> Result<()> {
    let sb = Superblock::read(file, path, base)?
        .ok_or_else(|| Error::corrupt("no ext4 file system").on(path).at(base))?;
    if sb.incompat & INCOMPAT_META_BG != 0 {
        return Err(Error::unsupported("an ext4 file system with meta block groups").on(path));
    }
    let groups = sb.inodes.div_ceil(sb.inodes_per_group);
    let table = base + (u64::from(sb.first_data_block) + 1) * sb.block_size;
    let size = usize::from(sb.inode_size);
    let mut desc = vec![0; usize::from(sb.desc_size)];
    let mut buf = vec![0; 64 << 10];
    for group in 0..groups {
        let at = table + u64::from(group) * u64::from(sb.desc_size);
        read_exact(file, path, &mut desc, at)?;
        let used = used_inodes(&desc, sb.inodes_per_group);
        let high = if desc.len() >= 64 { le32(&desc, 40) } else { 0 };
        let start = u64::from(le32(&desc, 8)) | u64::from(high) << 32;
        let mut at = base + start * sb.block_size;
        let mut ino = group * sb.inodes_per_group + 1;
        let mut left = used as usize;
        while left > 0 {
            let count = left.min(buf.len() / size);
            read_exact(file, path, &mut buf[..count * size], at)?;
            for bytes in buf[..count * size].chunks_exact(size) {
                let raw = Raw::decode(bytes);
                if raw.links > 0 {
                    visit(ino, raw)?;
                }
                ino += 1;
            }
            at += (count * size) as u64;
            left -= count;
        }
    }
    Ok(())
}

/// Inodes at the start of a group's table that may be in use.
fn used_inodes(desc: &[u8], per_group: u32) -> u32 {
    if le16(desc, 18) & INODE_UNINIT != 0 {
        return 0;
    }
    let high = if desc.len() >= 64 { le16(desc, 50) } else { 0 };
    per_group.saturating_sub(u32::from(le16(desc, 28)) | u32::from(high) << 16)
}

fn read_exact(file: &File, path: &Path, buf: &mut [u8], at: u64) -> Result<()> {
    file.read_exact_at(buf, at)
        .map_err(|e| Error::io("read", path, e).at(at))
}

fn le16(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn le32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_at_the_edges() {
        let words = |sec, nsec| time_words(Time { sec, nsec });
        assert_eq!(words(0, 0), (0, 0));
        assert_eq!(words(-1, 999_999_999), (u32::MAX, 999_999_999 << 2));
        assert_eq!(words(-(1 << 31), 0), (0x8000_0000, 0));
        assert_eq!(words(i64::from(i32::MAX), 0), (0x7fff_ffff, 0));
        assert_eq!(words(1 << 31, 1), (0x8000_0000, 4 | 1));
        assert_eq!(words((1 << 34) - (1 << 31) - 1, 0), (0x7fff_ffff, 3));
    }

    #[test]
    fn device_numbers_small_and_large() {
        assert_eq!(device_words(Device { major: 5, minor: 1 }), [0x501, 0]);
        assert_eq!(
            device_words(Device {
                major: 259,
                minor: 0x12345
            }),
            [0, 0x1231_0345]
        );
    }
}
