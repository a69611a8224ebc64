//! The 64 header bytes of an image whose header may be wrong: each field as it stands.

use ploop::format::ploop::Version;
use ploop::format::ploop::header::{HEADER_BYTES, IN_USE_EXTENSION, has_signature};

/// The header's bytes.
pub(super) type HeaderBytes = [u8; HEADER_BYTES as usize];

const TYPE: usize = 16;
const CLUSTER: usize = 28;
const ENTRIES: usize = 32;
const SIZE: usize = 36;
const IN_USE: usize = 44;
const DATA_OFFSET: usize = 48;
const FLAGS: usize = 52;
const EXTENSION: usize = 56;

/// The one value of the type field.
pub(super) const TYPE_EXPANDABLE: u32 = 2;

/// A header that nothing is promised of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fields(pub(super) HeaderBytes);

impl Fields {
    fn number(&self, at: usize) -> u32 {
        let b = &self.0;
        u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
    }

    fn put(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn long(&self, at: usize) -> u64 {
        u64::from(self.number(at)) | u64::from(self.number(at + 4)) << 32
    }

    pub(super) fn version(&self) -> Option<Version> {
        match has_signature(&self.0) {
            false => None,
            // The two differ from byte 7 on: `WithoutF…` and `WithouFr…`.
            true if self.0.starts_with(b"Without") => Some(Version::V1),
            true => Some(Version::V2),
        }
    }

    pub(super) fn kind(&self) -> u32 {
        self.number(TYPE)
    }

    pub(super) fn cluster_sectors(&self) -> u32 {
        self.number(CLUSTER)
    }

    pub(super) fn entries(&self) -> u32 {
        self.number(ENTRIES)
    }

    pub(super) fn set_entries(&mut self, entries: u32) {
        self.put(ENTRIES, entries);
    }

    /// The disk's size. v1 has no upper half.
    pub(super) fn size_sectors(&self) -> u64 {
        match self.version() {
            Some(Version::V1) => u64::from(self.number(SIZE)),
            _ => self.long(SIZE),
        }
    }

    pub(super) fn set_size_sectors(&mut self, sectors: u64) {
        self.put(SIZE, (sectors & 0xFFFF_FFFF) as u32);
        self.put(SIZE + 4, (sectors >> 32) as u32);
    }

    pub(super) fn in_use(&self) -> u32 {
        self.number(IN_USE)
    }

    pub(super) fn set_in_use(&mut self, in_use: u32) {
        self.put(IN_USE, in_use);
    }

    pub(super) fn data_offset(&self) -> u32 {
        self.number(DATA_OFFSET)
    }

    pub(super) fn set_data_offset(&mut self, sector: u32) {
        self.put(DATA_OFFSET, sector);
    }

    pub(super) fn flags(&self) -> u32 {
        self.number(FLAGS)
    }

    pub(super) fn set_flags(&mut self, flags: u32) {
        self.put(FLAGS, flags);
    }

    pub(super) fn extension(&self) -> u64 {
        self.long(EXTENSION)
    }

    pub(super) fn clear_extension(&mut self) {
        self.0[EXTENSION..].fill(0);
    }

    /// The header says that there is an extension, and that it is up to date.
    pub(super) fn extension_in_force(&self) -> bool {
        self.in_use() == IN_USE_EXTENSION && self.extension() != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop::format::ploop::Header;
    use ploop::format::ploop::header::Unchecked;

    #[test]
    fn fields_are_those_of_the_header() {
        for version in [Version::V1, Version::V2] {
            let h = Header::new(version, 128, 128 * 700).unwrap();
            let mut f = Fields(h.bytes().try_into().unwrap());
            assert_eq!(f.version(), Some(version));
            assert_eq!(f.kind(), TYPE_EXPANDABLE);
            assert_eq!((f.cluster_sectors(), f.entries()), (128, 700));
            assert_eq!(f.size_sectors(), h.size_sectors);
            f.set_entries(699);
            f.set_size_sectors(128 * 699);
            f.set_data_offset(256);
            f.set_flags(0);
            f.set_in_use(IN_USE_EXTENSION);
            let again = Unchecked::parse(&f.0).unwrap().check(1 << 20).unwrap();
            assert_eq!((again.entries, again.size_sectors), (699, 128 * 699));
            assert_eq!((again.data_start, again.flags), (256 * 512, 0));
            assert_eq!(again.in_use, IN_USE_EXTENSION);
        }
    }
}
