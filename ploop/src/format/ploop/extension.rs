//! The format extension: what stands in it, as far as opening must know.
//!
//! One cluster at `extension_sector`, valid only while `in_use` says so. It carries features, and
//! each says what a program that does not know it may do: nothing but read (NECESSARY), keep it
//! (TRANSIT), or drop it. We write none yet: known and droppable features are dropped by the first
//! write (the header's offset is cleared with the in-use mark, in one sector); the others refuse
//! writing by name.

use super::header::{Header, IN_USE_EXTENSION};
use crate::error::Result;
use crate::store::{SECTOR, StoreFile, read_or_zero};

const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
/// Bytes of magic and MD5 in front of the first section.
const SECTIONS_AT: usize = 24;
/// Bytes of a section's head: magic, flags, data size, reserved.
const SECTION_HEAD: usize = 24;
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
        self.magic != FEATURE_DIRTY_BITMAP && self.flags & (FLAG_NECESSARY | FLAG_TRANSIT) != 0
    }
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
    b[at..at + 8]
        .iter()
        .rev()
        .fold(0, |v, &byte| v << 8 | u64::from(byte))
}

/// Reads the extension that `header` names. Never more than one cluster, 1 MiB at most.
pub fn read(file: &dyn StoreFile, header: &Header, file_len: u64) -> Result<Extension> {
    let at = header.extension_sector.saturating_mul(SECTOR);
    if at < header.data_start || at >= file_len {
        return Ok(Extension::Outside);
    }
    let mut cluster = vec![0; header.cluster_bytes().min(READ_MAX).min(file_len - at) as usize];
    read_or_zero(file, &mut cluster, at)?;
    if cluster.len() < SECTIONS_AT || u64_at(&cluster, 0) != MAGIC {
        return Ok(Extension::NoMagic);
    }
    let mut sections = Vec::new();
    let mut next = SECTIONS_AT;
    while next + SECTION_HEAD <= cluster.len() {
        let magic = u64_at(&cluster, next);
        if magic == 0 {
            break;
        }
        let offset = at + next as u64;
        sections.push(Section {
            magic,
            flags: u64_at(&cluster, next + 8),
            offset,
        });
        let len = (u64_at(&cluster, next + 16) & 0xFFFF_FFFF) as usize;
        next = (next + SECTION_HEAD)
            .saturating_add(len)
            .next_multiple_of(8);
    }
    Ok(Extension::Sections(sections))
}
