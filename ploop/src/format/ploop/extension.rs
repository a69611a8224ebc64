//! The format extension: what stands in it, as far as opening must know.
//!
//! One cluster at `extension_sector`, valid only while `in_use` says so. It carries features, and
//! each says what a program that does not know it may do: nothing but read (NECESSARY), keep it
//! (TRANSIT), or drop it. Known and droppable features are dropped by the first write (the header's
//! offset is cleared with the in-use mark, in one sector), and the one that we know is written again
//! at close ([`super::bitmaps`]); the others refuse writing by name. Reading minds nothing of it. Whether its content is sound is judged by
//! [`crate::verify::check_image`], with the layout from here.

use md5::{Digest, Md5};

use super::header::{Header, IN_USE_EXTENSION};
use crate::error::Result;
use crate::store::{SECTOR, StoreFile, read_or_zero};

pub(crate) const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
/// Bytes of magic and MD5 in front of the first section.
pub(crate) const SECTIONS_AT: u64 = 24;
/// Bytes of a section's head: magic, flags, data size, reserved.
pub(crate) const SECTION_HEAD: u64 = 24;
/// Bytes in front of a bitmap's table: disk size, id, granularity, number of entries.
pub(crate) const BITMAP_HEAD: u64 = 32;
/// Entries of a bitmap's table that name no cluster: all bits 0, all bits 1.
pub(crate) const BITMAP_WORDS: [u64; 2] = [0, 1];
/// Bytes summed at a time.
const CHUNK: u64 = 256 * 1024;
/// Of a larger cluster only this much is looked at; no known writer comes near it.
const READ_MAX: u64 = 1 << 20;

/// The change-tracking bitmap: known, and dropped by the first write.
pub const FEATURE_DIRTY_BITMAP: u64 = 0x2038_5FAE_252C_B34A;
const FLAG_NECESSARY: u64 = 1;
const FLAG_TRANSIT: u64 = 2;

/// One feature section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Which feature.
    pub magic: u64,
    /// NECESSARY = 1, TRANSIT = 2.
    pub flags: u64,
    /// File offset of the section's head.
    pub offset: u64,
}

impl Section {
    /// True when a program that does not know the feature must not write the image.
    pub fn forbids_writing(&self) -> bool {
        forbids_writing(self.magic, self.flags)
    }
}

fn forbids_writing(magic: u64, flags: u64) -> bool {
    magic != FEATURE_DIRTY_BITMAP && flags & (FLAG_NECESSARY | FLAG_TRANSIT) != 0
}

/// What is where the header says the extension is.
#[derive(Debug)]
pub enum Extension {
    /// Not inside the data area of the file.
    Outside,
    /// Something else than an extension.
    NoMagic,
    /// An extension with these features.
    Sections(Vec<Section>),
}

/// True when the header says that there is an extension and that it is up to date.
pub fn in_force(header: &Header) -> bool {
    header.in_use == IN_USE_EXTENSION && header.extension_sector != 0
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    word(&b[at..at + 8])
}

/// The little-endian number in these bytes, eight at most.
pub(crate) fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |v, &byte| v << 8 | u64::from(byte))
}

/// The head of a section, as it stands in the file.
pub(crate) struct SectionHead {
    pub(crate) magic: u64,
    pub(crate) flags: u64,
    /// Bytes behind the head.
    pub(crate) bytes: u32,
}

impl SectionHead {
    /// See [`Section::forbids_writing`].
    pub(crate) fn forbids_writing(&self) -> bool {
        forbids_writing(self.magic, self.flags)
    }

    pub(crate) fn parse(raw: &[u8; SECTION_HEAD as usize]) -> SectionHead {
        SectionHead {
            magic: word(&raw[..8]),
            flags: word(&raw[8..16]),
            bytes: word(&raw[16..20]) as u32,
        }
    }
}

/// What stands in front of a bitmap's table.
pub(crate) struct BitmapHead {
    pub(crate) size_sectors: u64,
    /// Sectors for a bit.
    pub(crate) granularity: u32,
    /// Entries of the table.
    pub(crate) entries: u32,
}

impl BitmapHead {
    pub(crate) fn parse(raw: &[u8; BITMAP_HEAD as usize]) -> BitmapHead {
        BitmapHead {
            size_sectors: word(&raw[..8]),
            granularity: word(&raw[24..28]) as u32,
            entries: word(&raw[28..]) as u32,
        }
    }
}

/// True when an extension begins at file byte `at`.
pub(crate) fn has_magic(file: &dyn StoreFile, at: u64) -> Result<bool> {
    let mut magic = [0; 8];
    read_or_zero(file, &mut magic, at)?;
    Ok(word(&magic) == MAGIC)
}

/// True when the MD5 of the extension in the `cluster` bytes at file byte `at` is that of its
/// content. Reads all of it, a piece at a time.
pub(crate) fn sum_is_right(file: &dyn StoreFile, at: u64, cluster: u64) -> Result<bool> {
    let mut sum = [0; 16];
    read_or_zero(file, &mut sum, at + 8)?;
    let mut md5 = Md5::new();
    let mut buf = vec![0; CHUNK.min(cluster) as usize];
    let mut next = SECTIONS_AT;
    while next < cluster {
        let n = (cluster - next).min(CHUNK) as usize;
        read_or_zero(file, &mut buf[..n], at + next)?;
        md5.update(&buf[..n]);
        next += n as u64;
    }
    Ok(md5.finalize()[..] == sum)
}

/// Reads the extension that `header` names. Never more than one cluster, 1 MiB at most.
pub fn read(file: &dyn StoreFile, header: &Header, file_len: u64) -> Result<Extension> {
    let at = header.extension_sector.saturating_mul(SECTOR);
    if at < header.data_start || at >= file_len {
        return Ok(Extension::Outside);
    }
    let mut cluster = vec![0; header.cluster_bytes().min(READ_MAX).min(file_len - at) as usize];
    read_or_zero(file, &mut cluster, at)?;
    if cluster.len() < SECTIONS_AT as usize || u64_at(&cluster, 0) != MAGIC {
        return Ok(Extension::NoMagic);
    }
    let mut sections = Vec::new();
    let mut next = SECTIONS_AT as usize;
    while let Some(raw) = cluster.get(next..).and_then(<[u8]>::first_chunk) {
        let SectionHead {
            magic,
            flags,
            bytes,
        } = SectionHead::parse(raw);
        if magic == 0 {
            break;
        }
        let offset = at + next as u64;
        sections.push(Section {
            magic,
            flags,
            offset,
        });
        next = (next + SECTION_HEAD as usize)
            .saturating_add(bytes as usize)
            .next_multiple_of(8);
    }
    Ok(Extension::Sections(sections))
}
