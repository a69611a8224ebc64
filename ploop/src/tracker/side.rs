//! The trackers' file while the disk is in use: their bits at one instant, and where writes may have
//! gone since.
//!
//! ```text
//!  0   8  magic                      16  8  disk, bytes
//!  8   4  version                    24  8  region, bytes
//!  12  4  trackers                   32  8  nonce
//!  40  for each: id 16, granularity 8, pages 4, zero 4;
//!      for each page that is not all clear: number 4, kind 4 (1: all set, 2: 4096 bytes follow)
//!      CRC-32 of all that; zeros up to a sector
//!      announcements, 16 bytes each: first region 8, regions 4, CRC-32 of nonce and these 4
//! ```
//!
//! Little-endian. A new file takes the place of the old one by a rename. An announcement is durable
//! before the first write to its regions; one that is torn was never waited for, and ends the list.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::bitmap::{Bitmap, Content, PAGE_BITS, PAGE_BYTES, check_granularity};
use crate::error::{Kind, Result};
use crate::store::{EntryKind, SECTOR, Store, StoreFile, read_or_zero};

/// The file's name in the side directory.
pub const FILE: &str = "trackers";
const MAGIC: &[u8; 8] = b"PLOOPTRK";
const VERSION: u32 = 1;
const HEAD: usize = 40;
const TRACKER: usize = 32;
const RECORD: usize = 16;
const PAGE_SET: u32 = 1;
const PAGE_BYTES_FOLLOW: u32 = 2;
/// Bytes of announcements that have room on the host at a time.
const AHEAD: u64 = 4096;
/// A file that is longer is none of ours: all bits of as many trackers as an image can keep.
const BYTES_MAX: u64 = 8 << 30;
/// Regions of a disk are no smaller.
const REGION_MIN: u64 = 16 << 20;
/// And no more.
const REGIONS_MAX: u64 = 1 << 20;

/// Bytes of a region of a disk of `size` bytes.
pub(super) fn region_bytes(size: u64) -> u64 {
    size.div_ceil(REGIONS_MAX)
        .next_power_of_two()
        .max(REGION_MIN)
}

/// Where the file is.
#[derive(Clone, Debug)]
pub struct Home {
    store: Arc<dyn Store>,
    /// The side directory of a disk.
    dir: PathBuf,
    /// The file's name.
    name: String,
}

/// One tracker in the file.
pub(super) struct Stored {
    pub(super) id: [u8; 16],
    pub(super) bits: Bitmap,
}

/// The file, open for announcements.
#[derive(Debug)]
pub(super) struct Side {
    file: Arc<dyn StoreFile>,
    nonce: u64,
    at: u64,
    ahead: u64,
}

fn sum(nonce: u64, record: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&nonce.to_le_bytes());
    crc.update(record);
    crc.finalize()
}

fn record(nonce: u64, regions: &Range<u64>) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..8].copy_from_slice(&regions.start.to_le_bytes());
    // No disk has more of them ([`REGIONS_MAX`]).
    let count = (regions.end - regions.start) as u32;
    record[8..12].copy_from_slice(&count.to_le_bytes());
    let crc = sum(nonce, &record[..12]);
    record[12..].copy_from_slice(&crc.to_le_bytes());
    record
}

impl Home {
    /// In `dir`, the side directory of a disk.
    pub fn new(store: &Arc<dyn Store>, dir: PathBuf) -> Home {
        Home {
            store: store.clone(),
            dir,
            name: FILE.to_owned(),
        }
    }

    /// The same for a file of another name, which no disk looks at: to keep bits in.
    #[must_use]
    pub fn called(mut self, name: &str) -> Home {
        name.clone_into(&mut self.name);
        self
    }

    /// Puts `bits` in the file; durable on return.
    pub fn keep(&self, bits: &Bitmap) -> Result<()> {
        let kept = std::iter::once((&[0; 16], bits));
        self.write(bits.size(), kept, &[]).map(drop)
    }

    /// The bits that [`Home::keep`] put there, of a disk of `size` bytes then; `None` when there is no
    /// file, or none that can be believed.
    pub fn kept(&self, size: u64) -> Result<Option<Bitmap>> {
        let found = self.read(size)?.and_then(|mut all| all.pop());
        Ok(found.map(|s| s.bits))
    }

    /// Removes the file with what is kept; one that is not there is fine. Not durable.
    pub fn forget(&self) -> Result<()> {
        self.remove()
    }

    /// True when the directory is there: without it no tracker of ours is known.
    pub(super) fn is_there(&self) -> Result<bool> {
        Ok(self.store.kind(&self.dir)? == Some(EntryKind::Dir))
    }

    fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// Puts a file with these bits and announcements in the place of the one that is there; durable on
    /// return. Whoever sets a bit meanwhile must be announced.
    pub(super) fn write<'a>(
        &self,
        size: u64,
        trackers: impl Iterator<Item = (&'a [u8; 16], &'a Bitmap)>,
        announced: &[Range<u64>],
    ) -> Result<Side> {
        let temporary = self.dir.join(format!("{}.tmp", self.name));
        match self.store.remove_file(&temporary) {
            Err(e) if e.kind() != Kind::NotFound => return Err(e),
            _ => {}
        }
        let file = self.store.create(&temporary, 0o600)?;
        let nonce = uuid::Uuid::new_v4().as_u64_pair().0;
        let mut out = Writer {
            file: file.as_ref(),
            crc: crc32fast::Hasher::new(),
            buf: Vec::with_capacity(4 * PAGE_BYTES),
            at: 0,
        };
        let trackers: Vec<_> = trackers.collect();
        out.put(MAGIC)?;
        out.put(&VERSION.to_le_bytes())?;
        out.put(&(trackers.len() as u32).to_le_bytes())?;
        out.put(&size.to_le_bytes())?;
        out.put(&region_bytes(size).to_le_bytes())?;
        out.put(&nonce.to_le_bytes())?;
        for (id, bits) in trackers {
            out.tracker(id, bits)?;
        }
        let (at, ahead) = out.end(nonce, announced)?;
        file.sync()?;
        self.store.rename(&temporary, &self.path())?;
        self.store.sync_dir(&self.dir)?;
        Ok(Side {
            file,
            nonce,
            at,
            ahead,
        })
    }

    /// Removes the file, which is not in force; one that is not there is fine. Not durable.
    pub(super) fn remove(&self) -> Result<()> {
        match self.store.remove_file(&self.path()) {
            Err(e) if e.kind() != Kind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The bits of a disk of `size` bytes, with every granule that may have been written since;
    /// `None` when there is no file, or none that can be believed.
    pub(super) fn read(&self, size: u64) -> Result<Option<Vec<Stored>>> {
        let file = match self.store.open(&self.path(), crate::store::Access::Read) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            file => file?,
        };
        let len = file.len()?;
        if len > BYTES_MAX {
            return Ok(None);
        }
        let mut from = Reader {
            file: file.as_ref(),
            crc: crc32fast::Hasher::new(),
            at: 0,
            len,
        };
        let Some(head) = from.take::<HEAD>()? else {
            return Ok(None);
        };
        let known = head[..8] == *MAGIC
            && u32_at(&head, 8) == VERSION
            && u64_at(&head, 16) == size
            && u64_at(&head, 24) == region_bytes(size);
        if !known {
            return Ok(None);
        }
        let (count, nonce) = (u32_at(&head, 12), u64_at(&head, 32));
        let mut trackers = Vec::new();
        for _ in 0..count {
            match from.tracker(size)? {
                Some(tracker) => trackers.push(tracker),
                None => return Ok(None),
            }
        }
        let crc = from.crc.clone().finalize();
        match from.take::<4>()? {
            Some(found) if u32::from_le_bytes(found) == crc => {}
            _ => return Ok(None),
        }
        from.at = from.at.next_multiple_of(SECTOR);
        while let Some(record) = from.take::<RECORD>()? {
            let (first, regions) = (u64_at(&record, 0), u32_at(&record, 8));
            if sum(nonce, &record[..12]) != u32_at(&record, 12) {
                break;
            }
            let start = first.saturating_mul(region_bytes(size));
            let bytes = u64::from(regions).saturating_mul(region_bytes(size));
            for tracker in &trackers {
                tracker.bits.set(&(start..start.saturating_add(bytes)));
            }
        }
        Ok(Some(trackers))
    }
}

impl Side {
    /// Announces writes to `regions`; durable on return.
    pub(super) fn announce(&mut self, regions: Range<u64>) -> Result<()> {
        if self.at + RECORD as u64 > self.ahead {
            self.file.write_at(&[0; AHEAD as usize], self.ahead)?;
            self.ahead += AHEAD;
        }
        self.file.write_at(&record(self.nonce, &regions), self.at)?;
        self.file.sync()?;
        self.at += RECORD as u64;
        Ok(())
    }
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

struct Writer<'a> {
    file: &'a dyn StoreFile,
    crc: crc32fast::Hasher,
    buf: Vec<u8>,
    at: u64,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.crc.update(bytes);
        self.buf.extend_from_slice(bytes);
        match self.buf.len() >= 4 * PAGE_BYTES {
            true => self.give(),
            false => Ok(()),
        }
    }

    fn give(&mut self) -> Result<()> {
        self.file.write_at(&self.buf, self.at)?;
        self.at += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }

    fn tracker(&mut self, id: &[u8; 16], bits: &Bitmap) -> Result<()> {
        let pages = (0..bits.pages()).filter(|&p| bits.page(p) != Content::Zeros);
        let pages: Vec<u64> = pages.collect();
        self.put(id)?;
        self.put(&bits.granularity().to_le_bytes())?;
        self.put(&(pages.len() as u32).to_le_bytes())?;
        self.put(&[0; 4])?;
        for page in pages {
            self.put(&(page as u32).to_le_bytes())?;
            match bits.page(page) {
                Content::Bits(bytes) => {
                    self.put(&PAGE_BYTES_FOLLOW.to_le_bytes())?;
                    self.put(&bytes)?;
                }
                // Nobody clears a page.
                Content::Ones | Content::Zeros => self.put(&PAGE_SET.to_le_bytes())?,
            }
        }
        Ok(())
    }

    /// Ends the bits with a sum, and adds announcements; gives the place of the next one, and where
    /// the zeros for more end.
    fn end(mut self, nonce: u64, announced: &[Range<u64>]) -> Result<(u64, u64)> {
        let crc = self.crc.clone().finalize();
        self.buf.extend_from_slice(&crc.to_le_bytes());
        let end = self.at + self.buf.len() as u64;
        let pad = end.next_multiple_of(SECTOR) - end;
        self.buf.resize(self.buf.len() + pad as usize, 0);
        for regions in announced {
            self.buf.extend_from_slice(&record(nonce, regions));
        }
        let at = self.at + self.buf.len() as u64;
        self.buf.resize(self.buf.len() + AHEAD as usize, 0);
        self.give()?;
        Ok((at, self.at))
    }
}

struct Reader<'a> {
    file: &'a dyn StoreFile,
    crc: crc32fast::Hasher,
    at: u64,
    len: u64,
}

impl Reader<'_> {
    /// The next bytes; `None` where the file has no more.
    fn take<const N: usize>(&mut self) -> Result<Option<[u8; N]>> {
        let mut out = [0; N];
        if self.at + N as u64 > self.len {
            return Ok(None);
        }
        read_or_zero(self.file, &mut out, self.at)?;
        self.at += N as u64;
        self.crc.update(&out);
        Ok(Some(out))
    }

    fn tracker(&mut self, size: u64) -> Result<Option<Stored>> {
        let Some(head) = self.take::<TRACKER>()? else {
            return Ok(None);
        };
        let mut id = [0; 16];
        id.copy_from_slice(&head[..16]);
        let granularity = u64_at(&head, 16);
        if check_granularity(size, granularity).is_err() {
            return Ok(None);
        }
        let bits = Bitmap::new(size, granularity)?;
        for _ in 0..u32_at(&head, 24) {
            let Some(page) = self.take::<8>()? else {
                return Ok(None);
            };
            let (number, kind) = (u64::from(u32_at(&page, 0)), u32_at(&page, 4));
            match kind {
                PAGE_SET => {
                    let start = number * PAGE_BITS;
                    let bytes = |bit: u64| bit.saturating_mul(granularity);
                    bits.set(&(bytes(start)..bytes(start + PAGE_BITS)));
                }
                PAGE_BYTES_FOLLOW => match self.take::<PAGE_BYTES>()? {
                    Some(bytes) => bits.add_bytes(number * PAGE_BYTES as u64, &bytes),
                    None => return Ok(None),
                },
                _ => return Ok(None),
            }
        }
        Ok(Some(Stored { id, bits }))
    }
}
