//! Bitmaps of written granules, kept in the format extension of an image that is closed: where
//! OpenVZ's tool and QEMU look for them.
//!
//! ```text
//!  … data │ bits │ bits │ … │ extension: magic, MD5, a section for each bitmap │
//!           a cluster each, named by the sections' tables     header ──────────┘
//! ```
//!
//! All of it lies behind the last cluster in use, in no BAT entry, and is durable before the header
//! that names it. The first change of the image drops it again (the header's mark, in one sector).

use md5::{Digest, Md5};

use super::extension::{
    BITMAP_HEAD, BitmapHead, FEATURE_DIRTY_BITMAP, MAGIC, SECTION_HEAD, SECTIONS_AT, SectionHead,
    in_force, word,
};
use super::header::Header;
use super::held::granules_in;
use crate::error::{Error, Result};
use crate::store::{SECTOR, StoreFile, read_exact};
use crate::tracker::bitmap::{Bitmap, check_granularity};
use crate::verify::sound_extension;

/// Bytes of bits moved at a time.
const CHUNK: usize = 64 * 1024;
/// Entries of a table that name no cluster.
const ALL_CLEAR: u64 = 0;
const ALL_SET: u64 = 1;
/// What each bit must stand for at least, so that the table fits 32 bits of sectors.
const GRANULARITY_MAX: u64 = (u32::MAX as u64 / 2 + 1) * SECTOR;

/// A bitmap, and the name that it has in the file: a UUID's bytes in textual order.
pub type Named = ([u8; 16], Bitmap);

/// The bitmaps of a closed image; `None` when it has no extension, or one that is not sound: what
/// that says cannot be believed.
pub fn load(file: &dyn StoreFile, header: &Header) -> Result<Option<Vec<Named>>> {
    if !in_force(header) || sound_extension(file)?.is_none() {
        return Ok(None);
    }
    let at = header.extension_sector * SECTOR;
    let cluster = header.cluster_bytes();
    let mut out: Vec<Named> = Vec::new();
    let mut next = SECTIONS_AT;
    while next + SECTION_HEAD <= cluster {
        let mut raw = [0; SECTION_HEAD as usize];
        read_exact(file, &mut raw, at + next)?;
        let head = SectionHead::parse(&raw);
        let data = next + SECTION_HEAD;
        match head.magic {
            0 => break,
            FEATURE_DIRTY_BITMAP => {
                let Some(named) = load_one(file, header, at + data)? else {
                    return Ok(None);
                };
                if out.iter().any(|(id, _)| *id == named.0) {
                    return Ok(None);
                }
                out.push(named);
            }
            _ => {}
        }
        next = (data + u64::from(head.bytes)).next_multiple_of(8);
    }
    Ok(Some(out))
}

fn load_one(file: &dyn StoreFile, header: &Header, at: u64) -> Result<Option<Named>> {
    let mut raw = [0; BITMAP_HEAD as usize];
    read_exact(file, &mut raw, at)?;
    let head = BitmapHead::parse(&raw);
    let mut id = [0; 16];
    id.copy_from_slice(&raw[8..24]);
    let granularity = u64::from(head.granularity) * SECTOR;
    if check_granularity(header.size(), granularity).is_err() {
        return Ok(None);
    }
    let bitmap = Bitmap::new(header.size(), granularity)?;
    let cluster = header.cluster_bytes();
    let mut bits = vec![0; CHUNK.min(cluster as usize)];
    for i in 0..u64::from(head.entries) {
        let mut entry = [0; 8];
        read_exact(file, &mut entry, at + BITMAP_HEAD + 8 * i)?;
        match word(&entry) {
            ALL_CLEAR => {}
            ALL_SET => {
                let start = i.saturating_mul(cluster * 8).saturating_mul(granularity);
                bitmap
                    .set(&(start..start.saturating_add((cluster * 8).saturating_mul(granularity))));
            }
            sector => {
                let mut done = 0;
                while done < cluster {
                    let n = (cluster - done).min(bits.len() as u64);
                    read_exact(file, &mut bits[..n as usize], sector * SECTOR + done)?;
                    bitmap.add_bytes(i * cluster + done, &bits[..n as usize]);
                    done += n;
                }
            }
        }
    }
    Ok(Some((id, bitmap)))
}

/// Granules that the extension of a closed image holds: its trackers' bits. 0 where it is not in force
/// or not sound.
pub fn granules(file: &dyn StoreFile, header: &Header) -> Result<u64> {
    if !in_force(header) {
        return Ok(0);
    }
    let places = sound_extension(file)?.unwrap_or_default().into_iter();
    places.map(|place| granules_in(file, place)).sum()
}

/// Entries of the table of a bitmap with `granularity`.
fn entries(header: &Header, granularity: u64) -> u64 {
    let bits = header.size().div_ceil(granularity);
    bits.div_ceil(8).div_ceil(header.cluster_bytes())
}

/// Refuses bitmaps that the extension of an image with `header` has no place for. Error:
/// `Unsupported`.
pub fn check_fit(header: &Header, granularities: impl Iterator<Item = u64>) -> Result<()> {
    let mut bytes = SECTIONS_AT + SECTION_HEAD;
    for granularity in granularities {
        if granularity > GRANULARITY_MAX {
            let what = format!("a granularity of {granularity} bytes in a ploop image");
            return Err(Error::unsupported(what).fix(format!("Take {GRANULARITY_MAX} or less")));
        }
        bytes += SECTION_HEAD + BITMAP_HEAD + 8 * entries(header, granularity);
    }
    if bytes > header.cluster_bytes() {
        return Err(Error::unsupported(
            "more trackers than the format extension of the image has a place for",
        )
        .fix("Stop one, or take a larger granularity"));
    }
    Ok(())
}

/// Writes `bitmaps` behind byte `end` of the file, where the last cluster in use ends; durable on
/// return. Gives the header that is to name them, which the caller writes then. Without bitmaps
/// nothing is written. Errors: those of [`check_fit`], `NoSpace`, `Io`; then what is behind `end`
/// is rubbish that nobody names.
pub fn store<'a>(
    file: &dyn StoreFile,
    header: &Header,
    end: u64,
    bitmaps: impl Iterator<Item = (&'a [u8; 16], &'a Bitmap)> + Clone,
) -> Result<Option<Header>> {
    if bitmaps.clone().next().is_none() {
        return Ok(None);
    }
    check_fit(header, bitmaps.clone().map(|(_, b)| b.granularity()))?;
    let cluster = header.cluster_bytes();
    let mut extension = vec![0; cluster as usize];
    extension[..8].copy_from_slice(&MAGIC.to_le_bytes());
    let (mut at, mut next) = (end, SECTIONS_AT as usize);
    for (id, bitmap) in bitmaps {
        let count = entries(header, bitmap.granularity());
        let data = BITMAP_HEAD + 8 * count;
        let mut put = |bytes: &[u8]| {
            extension[next..next + bytes.len()].copy_from_slice(bytes);
            next += bytes.len();
        };
        put(&FEATURE_DIRTY_BITMAP.to_le_bytes());
        put(&0u64.to_le_bytes());
        put(&(data as u32).to_le_bytes());
        put(&0u32.to_le_bytes());
        put(&(header.size() / SECTOR).to_le_bytes());
        put(id);
        put(&((bitmap.granularity() / SECTOR) as u32).to_le_bytes());
        put(&(count as u32).to_le_bytes());
        for i in 0..count {
            let entry = store_part(file, bitmap, i * cluster, cluster, &mut at)?;
            put(&entry.to_le_bytes());
        }
    }
    let sum = Md5::digest(&extension[SECTIONS_AT as usize..]);
    extension[8..SECTIONS_AT as usize].copy_from_slice(&sum);
    file.write_at(&extension, at)?;
    file.sync()?;
    Ok(Some(header.extended(at / SECTOR)))
}

/// Writes `len` bytes of bits, from byte `from` on, to byte `at` of the file unless they are all
/// alike; gives the table's entry.
fn store_part(
    file: &dyn StoreFile,
    bitmap: &Bitmap,
    from: u64,
    len: u64,
    at: &mut u64,
) -> Result<u64> {
    let granules = len * 8;
    let start = from.saturating_mul(8).saturating_mul(bitmap.granularity());
    let bytes = granules.saturating_mul(bitmap.granularity());
    let range = start..start.saturating_add(bytes).min(bitmap.size());
    match bitmap.runs(range.clone()).next() {
        Some((run, set)) if run == range => {
            return Ok(if set { ALL_SET } else { ALL_CLEAR });
        }
        None => return Ok(ALL_CLEAR),
        Some(_) => {}
    }
    let mut bits = vec![0; CHUNK.min(len as usize)];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(bits.len() as u64);
        let some = &mut bits[..n as usize];
        bitmap.copy_bytes(from + done, some);
        file.write_at(some, *at + done)?;
        done += n;
    }
    let sector = *at / SECTOR;
    *at += len;
    Ok(sector)
}
