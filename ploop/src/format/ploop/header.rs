//! The 64-byte header, mirrored field by field (FORMAT.md §2; `ploop-format` fact sheet §1.1).
//!
//! Bytes fresh from disk are an [`Unchecked`]; only [`Unchecked::check`], which also knows the
//! file's length, yields a [`Header`]. All 64 bytes are kept, so a rewrite changes only the fields
//! it means to change.

use crate::error::{Error, Result};
use crate::store::SECTOR;

/// Bytes of the header; the BAT begins here.
pub const HEADER_BYTES: u64 = 64;

const SIGNATURE: usize = 0;
const TYPE: usize = SIGNATURE + 16;
const HEADS: usize = TYPE + 4;
const CYLINDERS: usize = HEADS + 4;
const CLUSTER_SECTORS: usize = CYLINDERS + 4;
const ENTRIES: usize = CLUSTER_SECTORS + 4;
const SIZE_SECTORS: usize = ENTRIES + 4;
const IN_USE: usize = SIZE_SECTORS + 8;
const DATA_OFFSET: usize = IN_USE + 4;
const FLAGS: usize = DATA_OFFSET + 4;
const EXTENSION_OFFSET: usize = FLAGS + 4;
const _: () = assert!(EXTENSION_OFFSET + 8 == HEADER_BYTES as usize);

const SIGNATURE_V1: &[u8; 16] = b"WithoutFreeSpace";
const SIGNATURE_V2: &[u8; 16] = b"WithouFreSpacExt";
const TYPE_EXPANDABLE: u32 = 2;

/// `in_use` of an image that is open for writing, or was not closed cleanly ("Ynot").
pub const IN_USE_DIRTY: u32 = 0x746F_6E59;
/// `in_use` of an image closed with a valid format extension ("v2.1").
pub const IN_USE_EXTENSION: u32 = 0x312E_3276;
/// `in_use` of an image closed without one.
pub const IN_USE_CLOSED: u32 = 0;

/// Header flag: nothing was ever written. Unreliable; never used to skip reading.
pub const FLAG_EMPTY: u32 = 1;
/// Header flag: a conversion between v1 and v2 was interrupted.
pub const FLAG_CONVERTING: u32 = 2;

/// The largest cluster that QEMU opens, in sectors (INT32_MAX / 513).
pub const CLUSTER_SECTORS_MAX: u32 = 4_186_127;
/// The range of cluster sizes, in sectors, that OpenVZ's tools accept (powers of two only).
pub const CLUSTER_SECTORS_OPENVZ: std::ops::RangeInclusive<u32> = 64..=131_072;

/// The two on-disk versions. They differ in the unit of a BAT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `WithoutFreeSpace`: entries are sector numbers; sizes below 2 TiB.
    V1,
    /// `WithouFreSpacExt`: entries are cluster numbers.
    V2,
}

impl Version {
    /// 1 or 2.
    pub fn number(self) -> u32 {
        match self {
            Version::V1 => 1,
            Version::V2 => 2,
        }
    }
}

/// True when `head` begins with one of the two signatures.
pub fn has_signature(head: &[u8]) -> bool {
    head.starts_with(SIGNATURE_V1) || head.starts_with(SIGNATURE_V2)
}

/// Header bytes that nothing is known about yet.
#[derive(Clone, Copy, Debug)]
pub struct Unchecked([u8; HEADER_BYTES as usize]);

/// A header whose fields agree with each other and with the length of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; HEADER_BYTES as usize],
    /// Which signature.
    pub version: Version,
    /// Cluster size in sectors, `1..=CLUSTER_SECTORS_MAX`.
    pub cluster_sectors: u32,
    /// Number of BAT entries.
    pub entries: u32,
    /// Virtual size in sectors; its byte count fits an `i64`.
    pub size_sectors: u64,
    /// The open/closed marker; any value.
    pub in_use: u32,
    /// First byte of the data area, `HEADER_BYTES + 4 * entries` at least. Inside the file, except
    /// in a v1 image without clusters that ends right behind its BAT.
    pub data_start: u64,
    /// Header flags; unknown bits are kept.
    pub flags: u32,
    /// Format extension, in sectors from the start of the file; 0 = none. Not judged here.
    pub extension_sector: u64,
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

fn damaged(at: usize, what: String) -> Error {
    Error::corrupt(what).at(at as u64)
}

impl Unchecked {
    /// The header in `head`, which is what could be read of the file's first 64 bytes.
    pub fn parse(head: &[u8]) -> Result<Unchecked> {
        let Some(bytes) = head.first_chunk() else {
            let what = format!("the file has {} bytes, a ploop header needs 64", head.len());
            return Err(damaged(0, what));
        };
        Ok(Unchecked(*bytes))
    }

    /// Checks every field that reading depends on. `file_len` is the file's length in bytes.
    /// Errors name the byte of the field; the caller adds the path.
    pub fn check(self, file_len: u64) -> Result<Header> {
        let b = &self.0;
        let version = match &b[SIGNATURE..TYPE] {
            s if s == SIGNATURE_V1 => Version::V1,
            s if s == SIGNATURE_V2 => Version::V2,
            _ => {
                return Err(damaged(
                    SIGNATURE,
                    "this is no ploop image: bad signature".into(),
                ));
            }
        };
        let kind = u32_at(b, TYPE);
        if kind != TYPE_EXPANDABLE {
            return Err(damaged(
                TYPE,
                format!("header type is {kind}, must be 2 (expandable)"),
            ));
        }
        let cluster_sectors = u32_at(b, CLUSTER_SECTORS);
        if cluster_sectors == 0 || cluster_sectors > CLUSTER_SECTORS_MAX {
            let what = format!(
                "cluster size is {cluster_sectors} sectors, must be 1..={CLUSTER_SECTORS_MAX}"
            );
            return Err(damaged(CLUSTER_SECTORS, what));
        }
        let entries = u32_at(b, ENTRIES);
        let size_sectors = match version {
            // The upper half of the field does not exist in v1: readers mask it.
            Version::V1 => u64::from(u32_at(b, SIZE_SECTORS)),
            Version::V2 => u64_at(b, SIZE_SECTORS),
        };
        if size_sectors > i64::MAX as u64 / SECTOR {
            let what = format!("disk size of {size_sectors} sectors overflows 64-bit bytes");
            return Err(damaged(SIZE_SECTORS, what));
        }
        let data_start = check_layout(b, version, cluster_sectors, entries, file_len)?;
        Ok(Header {
            bytes: self.0,
            version,
            cluster_sectors,
            entries,
            size_sectors,
            in_use: u32_at(b, IN_USE),
            data_start,
            flags: u32_at(b, FLAGS),
            extension_sector: u64_at(b, EXTENSION_OFFSET),
        })
    }
}

/// The BAT must lie in front of the data area and inside the file. Returns the data area's start.
fn check_layout(
    b: &[u8],
    version: Version,
    cluster_sectors: u32,
    entries: u32,
    file_len: u64,
) -> Result<u64> {
    let bat_end = HEADER_BYTES + 4 * u64::from(entries);
    let field = u32_at(b, DATA_OFFSET);
    let data_start = u64::from(field) * SECTOR;
    if bat_end > file_len {
        let what =
            format!("{entries} BAT entries end at byte {bat_end}, the file has {file_len} bytes");
        return Err(damaged(ENTRIES, what));
    }
    if version == Version::V1 && field == 0 {
        // Legal for QEMU only: the data area begins at the next sector after the BAT.
        return Ok(bat_end.next_multiple_of(SECTOR));
    }
    if version == Version::V2 && (field == 0 || !field.is_multiple_of(cluster_sectors)) {
        let what = format!(
            "the data area starts at sector {field}, must be a non-zero multiple of the cluster \
             ({cluster_sectors} sectors)"
        );
        return Err(damaged(DATA_OFFSET, what));
    }
    if data_start < bat_end {
        let what = format!(
            "the data area starts at byte {data_start}, inside the BAT of {entries} entries, \
             which ends at {bat_end}"
        );
        return Err(damaged(DATA_OFFSET, what));
    }
    if data_start > file_len {
        let what = format!(
            "the data area starts at byte {data_start}, past the end of the file ({file_len} bytes)"
        );
        return Err(damaged(DATA_OFFSET, what));
    }
    Ok(data_start)
}

impl Header {
    /// A new, empty, closed image: exactly what `ploop init` and its acceptance list ask for.
    /// `size_sectors` must be a non-zero multiple of the cluster.
    pub fn new(version: Version, cluster_sectors: u32, size_sectors: u64) -> Result<Header> {
        check_new(version, cluster_sectors, size_sectors)?;
        let count = size_sectors / u64::from(cluster_sectors);
        let entries = u32::try_from(count).map_err(|_| too_big(size_sectors, cluster_sectors))?;
        let cluster_bytes = u64::from(cluster_sectors) * SECTOR;
        let data_start = (HEADER_BYTES + 4 * u64::from(entries)).next_multiple_of(cluster_bytes);
        let data_offset = u32::try_from(data_start / SECTOR)
            .map_err(|_| too_big(size_sectors, cluster_sectors))?;
        let (heads, cylinders) = chs(size_sectors);

        let mut bytes = [0; HEADER_BYTES as usize];
        bytes[SIGNATURE..TYPE].copy_from_slice(match version {
            Version::V1 => SIGNATURE_V1,
            Version::V2 => SIGNATURE_V2,
        });
        let mut put = |at: usize, v: u32| bytes[at..at + 4].copy_from_slice(&v.to_le_bytes());
        put(TYPE, TYPE_EXPANDABLE);
        put(HEADS, heads);
        put(CYLINDERS, cylinders);
        put(CLUSTER_SECTORS, cluster_sectors);
        put(ENTRIES, entries);
        put(SIZE_SECTORS, (size_sectors & 0xFFFF_FFFF) as u32);
        put(SIZE_SECTORS + 4, (size_sectors >> 32) as u32);
        put(IN_USE, IN_USE_CLOSED);
        put(DATA_OFFSET, data_offset);
        put(FLAGS, FLAG_EMPTY);
        Unchecked(bytes).check(data_start)
    }

    /// The 64 bytes as they are on disk.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The same header with another open/closed marker. The extension offset is cleared: it is only
    /// meaningful with [`IN_USE_EXTENSION`], and a stale one makes QEMU refuse the image.
    #[must_use]
    pub fn marked(&self, in_use: u32) -> Header {
        let mut h = self.clone();
        h.in_use = in_use;
        h.extension_sector = 0;
        h.bytes[IN_USE..IN_USE + 4].copy_from_slice(&in_use.to_le_bytes());
        h.bytes[EXTENSION_OFFSET..].fill(0);
        h
    }

    /// The same header, closed, naming an extension that is in force.
    #[must_use]
    pub fn extended(&self, extension_sector: u64) -> Header {
        let mut h = self.marked(IN_USE_EXTENSION);
        h.extension_sector = extension_sector;
        h.bytes[EXTENSION_OFFSET..].copy_from_slice(&extension_sector.to_le_bytes());
        h
    }

    /// The header of this image when its disk has `size_sectors`, closed and without an extension.
    /// The data area moves up only if the BAT needs its room. Error: `Invalid` unless that is a
    /// multiple of the cluster, no less than now, and fits the version.
    pub fn grown(&self, size_sectors: u64) -> Result<Header> {
        let cluster = u64::from(self.cluster_sectors);
        let too_big = || too_big(size_sectors, self.cluster_sectors);
        if size_sectors < self.size_sectors || !size_sectors.is_multiple_of(cluster) {
            return Err(Error::invalid(format!(
                "a disk of {} sectors cannot grow to {size_sectors}: must be a multiple of the \
                 cluster ({cluster} sectors), and no less",
                self.size_sectors
            )));
        }
        if self.version == Version::V1 && size_sectors > u64::from(u32::MAX) {
            return Err(too_big().fix("A v1 image ends at 2 TiB: convert the disk to v2"));
        }
        let needed = u32::try_from(size_sectors / cluster).map_err(|_| too_big())?;
        let entries = needed.max(self.entries);
        let bat_end = HEADER_BYTES + 4 * u64::from(entries);
        let data_start = bat_end
            .next_multiple_of(self.cluster_bytes())
            .max(self.data_start);
        let data_offset = u32::try_from(data_start / SECTOR).map_err(|_| too_big())?;
        let (heads, cylinders) = chs(size_sectors);
        let mut bytes = self.marked(IN_USE_CLOSED).bytes;
        let mut put = |at: usize, v: u32| bytes[at..at + 4].copy_from_slice(&v.to_le_bytes());
        put(HEADS, heads);
        put(CYLINDERS, cylinders);
        put(ENTRIES, entries);
        put(SIZE_SECTORS, (size_sectors & 0xFFFF_FFFF) as u32);
        put(SIZE_SECTORS + 4, (size_sectors >> 32) as u32);
        put(DATA_OFFSET, data_offset);
        put(FLAGS, self.flags & !FLAG_EMPTY);
        Unchecked(bytes).check(data_start)
    }

    /// Cluster size in bytes.
    pub fn cluster_bytes(&self) -> u64 {
        u64::from(self.cluster_sectors) * SECTOR
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size_sectors * SECTOR
    }

    /// Not closed cleanly.
    pub fn dirty(&self) -> bool {
        self.in_use == IN_USE_DIRTY
    }

    /// The number of clusters that the virtual size needs: `ceil(size / cluster)`.
    pub fn clusters(&self) -> u64 {
        self.size_sectors.div_ceil(u64::from(self.cluster_sectors))
    }

    /// The file offset that a non-zero BAT entry means.
    pub fn entry_offset(&self, entry: u32) -> u64 {
        match self.version {
            Version::V1 => u64::from(entry) * SECTOR,
            Version::V2 => u64::from(entry) * self.cluster_bytes(),
        }
    }

    /// The BAT entry for a file offset in the data area; `None` when it does not fit 32 bits.
    pub fn entry_for(&self, offset: u64) -> Option<u32> {
        let unit = match self.version {
            Version::V1 => SECTOR,
            Version::V2 => self.cluster_bytes(),
        };
        u32::try_from(offset / unit).ok()
    }

    /// The byte of the file that BAT entry `slot` is at.
    pub fn slot_offset(slot: u64) -> u64 {
        HEADER_BYTES + 4 * slot
    }
}

fn too_big(size_sectors: u64, cluster_sectors: u32) -> Error {
    Error::invalid(format!(
        "{size_sectors} sectors do not fit a ploop image with clusters of {cluster_sectors} \
         sectors; take larger clusters"
    ))
}

fn check_new(version: Version, cluster_sectors: u32, size_sectors: u64) -> Result<()> {
    if !cluster_sectors.is_power_of_two() || !CLUSTER_SECTORS_OPENVZ.contains(&cluster_sectors) {
        return Err(Error::invalid(format!(
            "cluster size of {cluster_sectors} sectors: must be a power of two from 64 (32 KiB) to \
             131072 (64 MiB)"
        )));
    }
    if size_sectors == 0 || !size_sectors.is_multiple_of(u64::from(cluster_sectors)) {
        return Err(Error::invalid(format!(
            "disk size of {size_sectors} sectors: must be a non-zero multiple of the cluster \
             ({cluster_sectors} sectors)"
        )));
    }
    if version == Version::V1 && size_sectors > u64::from(u32::MAX) {
        return Err(Error::invalid(format!(
            "{size_sectors} sectors do not fit a v1 image (2 TiB at most); use v2"
        )));
    }
    Ok(())
}

/// The informational CHS fields as OpenVZ's tool computes them: (heads, cylinders).
fn chs(size_sectors: u64) -> (u32, u32) {
    if size_sectors > 1_032_192 && size_sectors < 16_777_216 {
        return (16, (size_sectors / 1008) as u32);
    }
    for per_track in [63, 32, 16, 8] {
        if !size_sectors.is_multiple_of(per_track) {
            continue;
        }
        let tracks = size_sectors / per_track;
        for heads in [16u32, 8, 4, 2] {
            if tracks.is_multiple_of(u64::from(heads)) {
                return (heads, (tracks / u64::from(heads)) as u32);
            }
        }
    }
    (1, size_sectors as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chs_fields_are_those_of_openvz() {
        assert_eq!(chs(20_480), (16, 40));
        assert_eq!(chs(2_097_152), (16, 2080));
        assert_eq!(chs(64), (2, 1));
        assert_eq!(chs(109_521_666_048), (16, 213_909_504));
    }

    #[test]
    fn a_new_header_passes_its_own_check_and_round_trips() {
        for (version, cluster, size) in [
            (Version::V1, 64, 64 * 3),
            (Version::V2, 2048, 2048 * 300_000),
            (Version::V2, 128, 128),
        ] {
            let h = Header::new(version, cluster, size).unwrap();
            let again = Unchecked::parse(h.bytes())
                .unwrap()
                .check(h.data_start)
                .unwrap();
            assert_eq!(h, again);
            assert_eq!((h.in_use, h.flags, h.extension_sector), (0, FLAG_EMPTY, 0));
            assert_eq!(h.data_start % h.cluster_bytes(), 0);
            assert!(h.data_start - h.cluster_bytes() < Header::slot_offset(u64::from(h.entries)));
        }
    }

    #[test]
    fn sizes_that_a_format_cannot_hold_are_refused() {
        assert!(Header::new(Version::V1, 2048, 1 << 33).is_err());
        assert!(Header::new(Version::V2, 64, 64 << 32).is_err());
        assert!(Header::new(Version::V2, 96, 96).is_err());
        assert!(Header::new(Version::V2, 64, 65).is_err());
    }

    #[test]
    fn a_grown_header_is_that_of_a_new_image_of_that_size_but_for_a_data_area_that_has_room() {
        for (version, cluster, old, new) in [
            (Version::V2, 64, 64 * 10, 64 * 8_200),
            (Version::V2, 64, 64 * 10, 64 * 11),
            (Version::V1, 2048, 2048, 2048 * 300_000),
            (Version::V2, 2048, 2048 * 7, 2048 * 7),
        ] {
            let h = Header::new(version, cluster, old).unwrap();
            let mut fresh = Header::new(version, cluster, new).unwrap();
            fresh.bytes[FLAGS..FLAGS + 4].fill(0);
            fresh.flags = 0;
            assert_eq!(h.grown(new).unwrap(), fresh);
        }
        // Entries and room that nobody needs stay as they are.
        let mut wide = Header::new(Version::V2, 64, 64 * 20_000).unwrap();
        wide.size_sectors = 64 * 3 + 1;
        let grown = wide.grown(64 * 19).unwrap();
        assert_eq!((grown.entries, grown.data_start), (20_000, wide.data_start));
        for bad in [64 * 3, 64 * 4 + 1, u64::MAX / 64 * 64] {
            assert!(wide.grown(bad).is_err(), "{bad}");
        }
        let v1 = Header::new(Version::V1, 64, 640).unwrap();
        assert!(v1.grown(1 << 32).is_err());
    }

    #[test]
    fn marking_changes_only_the_marker_and_the_extension() {
        let mut h = Header::new(Version::V2, 64, 640).unwrap();
        h.bytes[FLAGS + 3] = 0x80;
        h.bytes[EXTENSION_OFFSET] = 9;
        let m = h.marked(IN_USE_DIRTY);
        assert!(m.dirty());
        assert_eq!(m.bytes[FLAGS + 3], 0x80, "unknown bits stay");
        assert_eq!(m.bytes[EXTENSION_OFFSET], 0);
        assert_eq!(m.bytes[..IN_USE], h.bytes[..IN_USE]);
    }

    #[test]
    fn no_header_bytes_panic_whatever_the_length() {
        let good = *Header::new(Version::V2, 64, 640)
            .unwrap()
            .bytes()
            .first_chunk::<64>()
            .unwrap();
        for at in 0..64 {
            for bit in 0..8 {
                let mut b = good;
                b[at] ^= 1 << bit;
                for len in [0, 63, 64, 104, 512, 32_768, u64::MAX / 2, u64::MAX] {
                    drop(Unchecked(b).check(len));
                }
            }
        }
        for len in 0..64 {
            assert!(Unchecked::parse(&good[..len]).is_err());
        }
    }
}
