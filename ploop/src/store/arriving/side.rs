//! The durable record of what an image lacks: `.ploop/missing-NAME` beside the image `NAME`.
//!
//! | sector | offset | bytes | what |
//! |---|---|---|---|
//! | 0 | 0 | 8 | `PLOOPMIS` |
//! | | 8 | 4 | version: 1 |
//! | | 12 | 4 | bytes of a granule: 4096 |
//! | | 16 | 8 | bytes of the image |
//! | | 24 | 4 | 1: the image bears the in-use mark because of this; else 0 |
//! | | 28 | 64 | its header as it is without that mark; else 0 |
//! | | 508 | 4 | CRC-32 of the 508 bytes before |
//! | n > 0 | 0 | 504 | page n - 1: one bit per granule, 1 is missing, the lowest bit first |
//! | | 504 | 4 | n - 1 |
//! | | 508 | 4 | CRC-32 of the 508 bytes before |
//!
//! All numbers are little-endian. What lies behind the fields of sector 0, and bits behind the image's
//! last granule, are 0. A page is a sector, so a write of one leaves the old one or the new one.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::GRANULE;
use super::bits::{Bits, PER_PAGE, Page};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::header::HEADER_BYTES;
use crate::store::{Access, SECTOR, Store, StoreFile, read_exact};

/// 64-bit words of a page.
pub(super) const WORDS: usize = 63;

const SIDE: &str = ".ploop";
const NAME: &str = "missing-";
const TEMPORARY: &str = "temporary.";
const MAGIC: &[u8; 8] = b"PLOOPMIS";
const VERSION: u32 = 1;
const SUM_AT: usize = SECTOR as usize - 4;
const HEADER_AT: usize = 28;
const HEADER_END: usize = HEADER_AT + HEADER_BYTES as usize;
/// Sectors read or written at a time.
const CHUNK: usize = 128;

type Sector = [u8; SECTOR as usize];
/// The first bytes of an image.
pub(super) type Head = [u8; HEADER_BYTES as usize];

/// Where the record of the image at `image` is, if it has one. Error: `Invalid` for what is no file.
pub(super) fn path_of(image: &Path) -> Result<PathBuf> {
    let parts = image.parent().zip(image.file_name());
    let (dir, name) = parts.ok_or_else(|| Error::invalid("not the name of a file").on(image))?;
    let mut file = std::ffi::OsString::from(NAME);
    file.push(name);
    Ok(dir.join(SIDE).join(file))
}

/// The images in `dir` that have a record, complete or not.
pub(super) fn images(store: &dyn Store, dir: &Path) -> Result<Vec<PathBuf>> {
    let side = dir.join(SIDE);
    if store.kind(&side)?.is_none() {
        return Ok(Vec::new());
    }
    let image = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.strip_prefix(NAME)?.to_owned();
        Some(dir.join(name))
    };
    Ok(store.list(&side)?.into_iter().filter_map(image).collect())
}

/// The granules of `len` bytes.
pub(super) fn granules(len: u64) -> u64 {
    len.div_ceil(GRANULE)
}

fn sealed(mut sector: Sector) -> Sector {
    let sum = crc32fast::hash(&sector[..SUM_AT]);
    sector[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
    sector
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn encode_page(n: u64, page: &Page) -> Sector {
    let mut out = [0; SECTOR as usize];
    for (to, word) in out.chunks_exact_mut(8).zip(page) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    // The lower half: a page that another file had there by a mistake of the disk's is told all the
    // same, 64 GiB of image away at least.
    out[WORDS * 8..SUM_AT].copy_from_slice(&(n as u32).to_le_bytes());
    sealed(out)
}

fn decode_page(n: u64, bytes: &[u8]) -> Result<Page, &'static str> {
    if number(bytes, SUM_AT) != crc32fast::hash(&bytes[..SUM_AT]) {
        return Err("the checksum of a page is wrong");
    }
    if number(bytes, WORDS * 8) != n as u32 {
        return Err("a page is in another's place");
    }
    let mut page = [0; WORDS];
    for (word, from) in page.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut eight = [0; 8];
        eight.copy_from_slice(from);
        *word = u64::from_le_bytes(eight);
    }
    Ok(page)
}

fn encode_first(len: u64, head: Option<&Head>) -> Sector {
    let mut out = [0; SECTOR as usize];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&(GRANULE as u32).to_le_bytes());
    out[16..24].copy_from_slice(&len.to_le_bytes());
    if let Some(head) = head {
        out[24..28].copy_from_slice(&1_u32.to_le_bytes());
        out[HEADER_AT..HEADER_END].copy_from_slice(head);
    }
    sealed(out)
}

fn decode_first(bytes: &Sector) -> Result<(u64, Option<Head>), &'static str> {
    if &bytes[..8] != MAGIC {
        return Err("it does not begin as one");
    }
    if number(bytes, SUM_AT) != crc32fast::hash(&bytes[..SUM_AT]) {
        return Err("its checksum is wrong");
    }
    if number(bytes, 8) != VERSION || u64::from(number(bytes, 12)) != GRANULE {
        return Err("it is of another version");
    }
    let mut len = [0; 8];
    len.copy_from_slice(&bytes[16..24]);
    let mut head = [0; HEADER_BYTES as usize];
    head.copy_from_slice(&bytes[HEADER_AT..HEADER_END]);
    match number(bytes, 24) {
        0 => Ok((u64::from_le_bytes(len), None)),
        1 => Ok((u64::from_le_bytes(len), Some(head))),
        _ => Err("its mark is none that is known"),
    }
}

/// The record of one image, open.
#[derive(Debug)]
pub(super) struct Side {
    file: Arc<dyn StoreFile>,
    /// The image's header without the mark that it bears because of this.
    pub(super) head: Option<Head>,
}

impl Side {
    /// Writes one that says that `ranges` of the image's bytes are missing, in place of one that is
    /// there. Durable on return.
    ///
    /// Order: the new file, its sync, its name, the sync of the directory.
    pub(super) fn create(
        store: &dyn Store,
        image: &Path,
        len: u64,
        ranges: &[Range<u64>],
        head: Option<&Head>,
    ) -> Result<()> {
        let mut bits = Bits::new(granules(len));
        for range in ranges {
            if range.start >= range.end || range.end > len {
                let what = format!("bytes {}..{} are no range of {len}", range.start, range.end);
                return Err(Error::invalid(what).on(image));
            }
            bits.set(range.start / GRANULE, granules(range.end));
        }
        let path = path_of(image)?;
        let side = path.parent().unwrap_or(Path::new("/"));
        if store.kind(side)?.is_none() {
            store.create_dir(side)?;
            store.sync_dir(side.parent().unwrap_or(Path::new("/")))?;
        }
        let mut temporary = std::ffi::OsString::from(TEMPORARY);
        temporary.push(path.file_name().unwrap_or_default());
        let temporary = side.join(temporary);
        match store.remove_file(&temporary) {
            Err(e) if e.kind() != Kind::NotFound => return Err(e),
            _ => {}
        }
        let file = store.create(&temporary, 0o600)?;
        file.write_at(&encode_first(len, head), 0)?;
        let mut page = 0;
        while page < bits.pages() {
            let end = bits.pages().min(page + CHUNK as u64);
            let bytes: Vec<u8> = (page..end)
                .flat_map(|n| encode_page(n, &bits.page(n)))
                .collect();
            file.write_at(&bytes, (page + 1) * SECTOR)?;
            page = end;
        }
        file.sync()?;
        drop(file);
        store.rename(&temporary, &path)?;
        store.sync_dir(side)
    }

    /// The record of the image at `image`, which has `len` bytes, to be changed where `access` says so;
    /// with the granules that are missing. `None` where there is none. Error: `Corrupt`.
    pub(super) fn open(
        store: &dyn Store,
        image: &Path,
        len: u64,
        access: Access,
    ) -> Result<Option<(Side, Bits)>> {
        let file = match store.open(&path_of(image)?, access) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            file => file?,
        };
        let refused = |why: &str| {
            let what = format!("the record of what has not arrived of an image is damaged: {why}");
            Error::corrupt(what).on(file.path()).fix(
                "What the image lacks cannot be told any more: move the container again, from the \
                 service that it came from, or restore it",
            )
        };
        let pages = granules(len).div_ceil(PER_PAGE);
        let there = file.len()?;
        if there < SECTOR {
            return Err(refused("it is cut"));
        }
        let mut first = [0; SECTOR as usize];
        read_exact(file.as_ref(), &mut first, 0)?;
        let (said, head) = decode_first(&first).map_err(refused)?;
        if first != encode_first(said, head.as_ref()) {
            return Err(refused("there is something where nothing may be"));
        }
        if said != len {
            return Err(refused("it is of an image of another length"));
        }
        if there != (pages + 1) * SECTOR {
            return Err(refused("its length is another"));
        }
        let (mut bits, mut chunk) = (Bits::default(), vec![0; CHUNK * SECTOR as usize]);
        while bits.pages() < pages {
            let n = (pages - bits.pages()).min(CHUNK as u64);
            let some = &mut chunk[..(n * SECTOR) as usize];
            read_exact(file.as_ref(), some, (bits.pages() + 1) * SECTOR)?;
            for bytes in some.chunks_exact(SECTOR as usize) {
                let page = decode_page(bits.pages(), bytes).map_err(refused)?;
                if !bits.push(&page, granules(len)) {
                    return Err(refused("it says that more is missing than the image has"));
                }
            }
        }
        Ok(Some((Side { file, head }, bits)))
    }

    /// Writes a page; not durable before [`Side::sync`].
    pub(super) fn write(&self, n: u64, page: &Page) -> Result<()> {
        self.file.write_at(&encode_page(n, page), (n + 1) * SECTOR)
    }

    /// Makes the pages that were written durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync()
    }
}

/// Removes the record of the image at `image`; durable on return. One that is not there is fine.
pub(super) fn remove(store: &dyn Store, image: &Path) -> Result<()> {
    let path = path_of(image)?;
    match store.remove_file(&path) {
        Err(e) if e.kind() != Kind::NotFound => return Err(e),
        _ => {}
    }
    let side = path.parent().unwrap_or(Path::new("/"));
    match store.kind(side)? {
        Some(_) => store.sync_dir(side),
        None => Ok(()),
    }
}
