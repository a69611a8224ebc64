//! The header and its extensions: bytes to values, and every reason to refuse an image.
//!
//! [`Unchecked`] holds bytes as read; [`Unchecked::check`] is the only way to a [`Header`], whose
//! numbers are then safe to compute with: tables lie inside the file, nothing overflows, and every
//! feature in use is one that the reader handles. Pure: no I/O in the checks.

use std::ops::Range;

use super::backing::Backing;
use crate::error::{Error, Result};
use crate::store::{SECTOR, StoreFile};

/// The first bytes of every qcow2 image, whatever its version.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

const VERSION: usize = 4;
const BACKING_OFFSET: usize = 8;
const BACKING_LEN: usize = 16;
const CLUSTER_BITS: usize = 20;
const SIZE: usize = 24;
const CRYPT: usize = 32;
const L1_ENTRIES: usize = 36;
const L1_OFFSET: usize = 40;
const SNAPSHOTS: usize = 60;
const SNAPSHOTS_OFFSET: usize = 64;
const REFTABLE_OFFSET: usize = 48;
const REFTABLE_CLUSTERS: usize = 56;
const INCOMPATIBLE: usize = 72;
const AUTOCLEAR: usize = 88;
const REFCOUNT_ORDER: usize = 96;
const HEADER_LEN: usize = 100;
const COMPRESSION: usize = 104;

/// Bytes of a version 2 header, and the least of a version 3 one.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;

/// Largest L1 table that any known tool accepts.
const L1_MAX_BYTES: u64 = 32 << 20;

const BIT_DIRTY: u32 = 0;
const BIT_CORRUPT: u32 = 1;
const BIT_DATA_FILE: u32 = 2;
const BIT_COMPRESSION: u32 = 3;
const BIT_EXTENDED_L2: u32 = 4;

/// Autoclear feature: the bitmaps are up to date.
const BIT_BITMAPS: u64 = 0;

const EXT_END: u32 = 0;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// One row of the feature name table: kind, bit, 46 bytes of name.
const FEATURE_ROW: usize = 48;

/// A header that passed every check. All byte numbers fit the file that it was read from.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Guest bytes; a multiple of the sector.
    pub(super) size: u64,
    /// The L1 table in the file, as long as the header says.
    pub(super) l1: Range<u64>,
    /// The refcount table in the file; empty when the header's numbers for it cannot be right.
    /// Reading needs no refcounts, so that alone is no reason to refuse.
    pub(super) reftable: Range<u64>,
    /// The writer did not close the image; refcounts are stale, the tables are not.
    pub(super) dirty: bool,
    pub(super) backing: Option<Backing>,
    /// What reading has no use for.
    pub(super) rest: Rest,
}

/// Fields that only an audit follows. Not judged yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Rest {
    /// Refcount table: its byte, and how many clusters it has.
    pub(super) reftable: (u64, u32),
    /// A refcount has `1 << refcount_order` bits; 6 at most.
    pub(super) refcount_order: u32,
    /// Internal snapshots, and the byte of their table.
    pub(super) snapshots: (u32, u64),
    /// Bitmaps that are in force.
    pub(super) bitmaps: Option<Bitmaps>,
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bitmaps {
    pub(super) count: u32,
    pub(super) directory: u64,
    pub(super) directory_bytes: u64,
}

impl Header {
    /// Reads and checks the header of `file`.
    pub(super) fn read(file: &dyn StoreFile) -> Result<Header> {
        let file_len = file.len()?;
        let on = |e: Error| e.on(file.path());
        let mut fixed = [0; COMPRESSION + 8];
        let got = file.read_at(&mut fixed, 0)?;
        let bits = Unchecked(&fixed[..got]).cluster_bits().map_err(on)?;
        // Extensions and the backing name lie in the first cluster: at most 2 MiB, and no more
        // than the file has.
        let mut area = vec![0; (1u64 << bits).min(file_len) as usize];
        let got = file.read_at(&mut area, 0)?;
        Unchecked(&area[..got]).check(file_len).map_err(on)
    }

    /// Guest bytes that one L1 entry stands for.
    pub(super) fn span(&self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }

    /// L1 entries that the disk's size needs; the table has at least these.
    pub(super) fn l1_needed(&self) -> u64 {
        self.size.div_ceil(self.span())
    }
}

/// The first bytes of a file, up to one cluster, as they came from disk.
#[derive(Clone, Copy)]
pub(super) struct Unchecked<'a>(pub(super) &'a [u8]);

impl Unchecked<'_> {
    fn be32(&self, at: usize) -> u32 {
        let raw = self.0.get(at..at + 4).and_then(|b| b.try_into().ok());
        u32::from_be_bytes(raw.unwrap_or_default())
    }

    fn be64(&self, at: usize) -> u64 {
        let raw = self.0.get(at..at + 8).and_then(|b| b.try_into().ok());
        u64::from_be_bytes(raw.unwrap_or_default())
    }

    /// What must be known before the rest can be read: that it is qcow2, whole, of a version we
    /// know, and how large its first cluster is.
    fn cluster_bits(&self) -> Result<u32> {
        if !self.0.starts_with(&MAGIC) {
            return Err(Error::corrupt("not a qcow2 image: it does not begin with QFI\\xfb").at(0));
        }
        let version = self.be32(VERSION);
        let need = match version {
            _ if self.0.len() < VERSION + 4 => V2_BYTES,
            2 => V2_BYTES,
            3 => V3_BYTES,
            _ => {
                let what = format!("qcow2 version {version}; this program reads 2 and 3");
                return Err(Error::unsupported(what).at(VERSION as u64));
            }
        };
        if self.0.len() < need {
            let what = format!(
                "the file ends inside the header: {} of {need} bytes",
                self.0.len()
            );
            return Err(Error::corrupt(what).at(self.0.len() as u64));
        }
        let bits = self.be32(CLUSTER_BITS);
        if !(9..=21).contains(&bits) {
            let what = format!("cluster_bits is {bits}; valid are 9 (512 bytes) to 21 (2 MiB)");
            return Err(Error::corrupt(what).at(CLUSTER_BITS as u64));
        }
        Ok(bits)
    }

    /// Judges everything. `file_len` is the length of the file. Errors carry the byte, not the
    /// path.
    pub(super) fn check(self, file_len: u64) -> Result<Header> {
        let cluster_bits = self.cluster_bits()?;
        let header_len = self.header_len(cluster_bits)?;
        let dirty = self.check_features(header_len)?;
        self.check_encryption()?;
        let size = self.be64(SIZE);
        if !size.is_multiple_of(SECTOR) {
            let what = format!("the disk size {size} is not a multiple of {SECTOR}");
            return Err(Error::corrupt(what).at(SIZE as u64));
        }
        let mut header = Header {
            version: self.be32(VERSION),
            cluster_bits,
            size,
            l1: 0..0,
            reftable: self.reftable(cluster_bits, file_len),
            dirty,
            backing: None,
            rest: self.rest(header_len)?,
        };
        header.l1 = self.check_l1(&header, file_len)?;
        header.backing = self.check_backing(header_len)?;
        Ok(header)
    }

    fn header_len(&self, cluster_bits: u32) -> Result<usize> {
        if self.be32(VERSION) == 2 {
            return Ok(V2_BYTES);
        }
        let len = self.be32(HEADER_LEN);
        let fits = (V3_BYTES as u32..=1 << cluster_bits).contains(&len) && len.is_multiple_of(8);
        if !fits || len as usize > self.0.len() {
            let what = format!("the header says it is {len} bytes long, which cannot be");
            return Err(Error::corrupt(what).at(HEADER_LEN as u64));
        }
        let order = self.be32(REFCOUNT_ORDER);
        if order > 6 {
            let what = format!("the refcount order is {order}; the largest is 6 (64 bits)");
            return Err(Error::corrupt(what).at(REFCOUNT_ORDER as u64));
        }
        Ok(len as usize)
    }

    /// Refuses every incompatible feature but the dirty bit, by name. Returns the dirty bit.
    fn check_features(&self, header_len: usize) -> Result<bool> {
        if self.be32(VERSION) == 2 {
            return Ok(false);
        }
        let bits = self.be64(INCOMPATIBLE);
        let has = |bit: u32| bits & (1 << bit) != 0;
        let at = INCOMPATIBLE as u64;
        if has(BIT_CORRUPT) {
            let what = "the image is marked corrupt (incompatible feature bit 1)";
            return Err(Error::corrupt(what)
                .at(at)
                .fix("Repair a copy with qemu-img check -r all"));
        }
        let compression = if header_len > COMPRESSION {
            self.0[COMPRESSION]
        } else {
            0
        };
        if has(BIT_COMPRESSION) != (compression != 0) {
            let what = format!("compression type {compression} contradicts its feature bit");
            return Err(Error::corrupt(what).at(COMPRESSION as u64));
        }
        let other = (0..u64::BITS).find(|&bit| bit != BIT_DIRTY && has(bit));
        let name = match other {
            None => return Ok(has(BIT_DIRTY)),
            Some(BIT_DATA_FILE) => "an external data file".to_owned(),
            Some(BIT_COMPRESSION) if compression == 1 => "zstd compression".to_owned(),
            Some(BIT_COMPRESSION) => format!("compression type {compression}"),
            Some(BIT_EXTENDED_L2) => "extended L2 entries (subclusters)".to_owned(),
            Some(bit) => match self.feature_name(header_len, bit) {
                Some(name) => format!("a feature that it calls {name:?}, incompatible bit {bit}"),
                None => format!("an unknown feature, incompatible bit {bit}"),
            },
        };
        Err(Error::unsupported(format!("the image uses {name}"))
            .at(at)
            .fix("Rewrite it with qemu-img convert"))
    }

    fn check_encryption(&self) -> Result<()> {
        let name = match self.be32(CRYPT) {
            0 => return Ok(()),
            1 => "AES".to_owned(),
            2 => "LUKS".to_owned(),
            other => format!("unknown method {other}"),
        };
        Err(
            Error::unsupported(format!("the image is encrypted ({name})"))
                .at(CRYPT as u64)
                .fix("Rewrite it without encryption with qemu-img convert"),
        )
    }

    /// The L1 table must cover the disk, lie inside the file, and be no other structure.
    fn check_l1(&self, header: &Header, file_len: u64) -> Result<Range<u64>> {
        let entries = u64::from(self.be32(L1_ENTRIES));
        let start = self.be64(L1_OFFSET);
        let bad = |what: String, at: usize| Err(Error::corrupt(what).at(at as u64));
        let bytes = entries * 8;
        if bytes > L1_MAX_BYTES {
            let what = format!("the L1 table has {entries} entries, more than any valid image");
            return bad(what, L1_ENTRIES);
        }
        if entries < header.l1_needed() {
            let (size, need) = (header.size, header.l1_needed());
            let what =
                format!("the L1 table has {entries} entries; a disk of {size} bytes needs {need}");
            return bad(what, L1_ENTRIES);
        }
        if entries == 0 {
            return Ok(0..0);
        }
        let cluster = 1u64 << header.cluster_bits;
        if start < cluster || !start.is_multiple_of(cluster) {
            return bad(
                format!("the L1 table at {start} is not on a cluster boundary"),
                L1_OFFSET,
            );
        }
        let Some(end) = start.checked_add(bytes).filter(|&end| end <= file_len) else {
            let what = format!("the L1 table ({bytes} bytes at {start}) is not inside the file");
            return bad(what, L1_OFFSET);
        };
        if overlap(&(start..end), &header.reftable) {
            return bad(
                format!("the L1 table at {start} lies on the refcount table"),
                L1_OFFSET,
            );
        }
        Ok(start..end)
    }

    fn rest(&self, header_len: usize) -> Result<Rest> {
        let v3 = self.be32(VERSION) >= 3;
        let mut bitmaps = None;
        // Version 2 has no autoclear bits: nothing says that its bitmaps are up to date.
        if v3 && self.be64(AUTOCLEAR) & (1 << BIT_BITMAPS) != 0 {
            for ext in self.extensions(header_len) {
                let ext = ext?;
                if ext.kind == EXT_BITMAPS && ext.data.len() >= 24 {
                    let data = Unchecked(ext.data);
                    bitmaps = Some(Bitmaps {
                        count: data.be32(0),
                        directory_bytes: data.be64(8),
                        directory: data.be64(16),
                    });
                }
            }
        }
        Ok(Rest {
            reftable: (self.be64(REFTABLE_OFFSET), self.be32(REFTABLE_CLUSTERS)),
            refcount_order: if v3 { self.be32(REFCOUNT_ORDER) } else { 4 },
            snapshots: (self.be32(SNAPSHOTS), self.be64(SNAPSHOTS_OFFSET)),
            bitmaps,
        })
    }

    fn reftable(&self, cluster_bits: u32, file_len: u64) -> Range<u64> {
        let start = self.be64(REFTABLE_OFFSET);
        let bytes = u64::from(self.be32(REFTABLE_CLUSTERS)) << cluster_bits;
        let aligned = start != 0 && start.is_multiple_of(1 << cluster_bits);
        match start.checked_add(bytes) {
            Some(end) if aligned && end <= file_len => start..end,
            _ => 0..0,
        }
    }

    fn check_backing(&self, header_len: usize) -> Result<Option<Backing>> {
        let offset = self.be64(BACKING_OFFSET);
        if offset == 0 {
            // The extensions are walked all the same: a broken list is a broken header.
            self.extensions(header_len).try_for_each(|e| e.map(drop))?;
            return Ok(None);
        }
        let len = self.be32(BACKING_LEN);
        let name = usize::try_from(offset)
            .ok()
            .filter(|&start| start >= header_len && (1..=1023).contains(&len))
            .and_then(|start| self.0.get(start..start.checked_add(len as usize)?));
        let Some(name) = name else {
            let what = format!(
                "the backing file name ({len} bytes at {offset}) is not in the first cluster, \
                 behind the header, 1 to 1023 bytes long"
            );
            return Err(Error::corrupt(what).at(BACKING_OFFSET as u64));
        };
        let mut format = None;
        for ext in self.extensions(header_len) {
            let ext = ext?;
            if ext.kind == EXT_BACKING_FORMAT && format.replace(ext.data).is_some() {
                return Err(Error::corrupt("two backing formats are given").at(ext.at as u64));
            }
        }
        Backing::parse(name, format)
            .map(Some)
            .map_err(|e| e.at(offset))
    }

    fn extensions(&self, header_len: usize) -> Extensions<'_> {
        let name = usize::try_from(self.be64(BACKING_OFFSET)).unwrap_or(usize::MAX);
        let end = if name == 0 {
            self.0.len()
        } else {
            name.min(self.0.len())
        };
        Extensions {
            area: &self.0[..end],
            at: header_len,
        }
    }

    /// The image's own name for an incompatible feature bit.
    fn feature_name(&self, header_len: usize, bit: u32) -> Option<String> {
        let known = self.extensions(header_len).map_while(Result::ok);
        let table = known.into_iter().find(|e| e.kind == EXT_FEATURE_NAMES)?;
        let row = table
            .data
            .chunks_exact(FEATURE_ROW)
            .find(|row| row[0] == 0 && u32::from(row[1]) == bit)?;
        let name = row[2..].split(|&b| b == 0).next().unwrap_or_default();
        Some(String::from_utf8_lossy(name).into_owned())
    }
}

/// One header extension.
struct Extension<'a> {
    kind: u32,
    /// Byte in the file of its type field.
    at: usize,
    data: &'a [u8],
}

/// Walks the extensions up to the end mark, or to where no further one fits.
struct Extensions<'a> {
    area: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Extensions<'a> {
    type Item = Result<Extension<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let area = self.area;
        let head: [u8; 8] = area
            .get(self.at..self.at.checked_add(8)?)?
            .try_into()
            .ok()?;
        let [a, b, c, d, len @ ..] = head;
        let (kind, len) = (
            u32::from_be_bytes([a, b, c, d]),
            u32::from_be_bytes(len) as usize,
        );
        if kind == EXT_END {
            return None;
        }
        let at = self.at;
        let Some(data) = area.get(at + 8..).and_then(|rest| rest.get(..len)) else {
            self.at = usize::MAX;
            let what = format!("header extension {kind:#x} ({len} bytes) leaves its place");
            return Some(Err(Error::corrupt(what).at(at as u64)));
        };
        self.at = at + 8 + len.next_multiple_of(8);
        Some(Ok(Extension { kind, at, data }))
    }
}

/// True when two byte ranges share a byte; an empty one shares none.
pub(super) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}
