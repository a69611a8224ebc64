//! A ploop image: header, table, extension, the backup of a conversion.
//!
//! | byte | |
//! |---|---|
//! | 0 | u16, length of the file in sectors; the upper four bits are not used |
//! | 2 | u8, bytes more |
//! | 3 | bit 0: the extension gets its right checksum; bit 1: a backup, not an extension |
//! | 4 | u16, bytes of the head |
//! | 6 | head: the file's first bytes; then what is put where its header says the extension is |
//!
//! Clusters hold a few bytes each that are no other's.

use std::path::Path;

use md5::{Digest, Md5};
use ploop::store::memory::MemoryStore;
use ploop::store::{SECTOR, Store, StoreFile, read_or_zero};

use super::{LOOK, image_at, store, u16_at};
use crate::trial::Trial;

const IMAGE: &str = "/d/image.hds";
/// Bytes in front of the head.
pub const PREFIX: usize = 6;
const SUM_IT: u8 = 1;
const BACKUP: u8 = 2;
/// Bytes from one filled place to the next.
const STRIDE: usize = 16 * 1024;

/// An input of which [`split`] makes these.
pub fn input(len: u64, flags: u8, head: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut out = ((len / SECTOR) as u16).to_le_bytes().to_vec();
    out.extend([(len % SECTOR) as u8, flags]);
    out.extend((head.len() as u16).to_le_bytes());
    out.extend(head);
    out.extend(rest);
    out
}

/// Length of the file, flags, head, the rest.
fn split(input: &[u8]) -> Option<(u64, u8, &[u8], &[u8])> {
    let (prefix, body) = input.split_at_checked(PREFIX)?;
    let len = (u16_at(prefix, 0) & 0xfff) * SECTOR + u64::from(prefix[2]);
    let head = (u16_at(prefix, 4) as usize).min(body.len());
    let (head, rest) = body.split_at(head);
    Some((len, prefix[3], head, rest))
}

fn build(input: &[u8]) -> Option<MemoryStore> {
    let (len, flags, head, rest) = split(input)?;
    let store = store();
    let file = store.create(Path::new(IMAGE), 0o600).unwrap();
    for at in (STRIDE..len as usize).step_by(STRIDE) {
        let mark = (at as u64) << 8 | 0xC7;
        file.write_at(&mark.to_le_bytes(), at as u64).unwrap();
    }
    file.write_at(head, 0).unwrap();
    file.set_len(len).unwrap();
    if flags & BACKUP != 0 {
        let backup = store.create(Path::new("/d/image.hds.idx"), 0o600).unwrap();
        backup.write_at(rest, 0).unwrap();
    } else if !rest.is_empty() {
        place(file.as_ref(), rest, flags & SUM_IT != 0, len);
    }
    Some(store)
}

fn number(file: &dyn StoreFile, at: u64) -> u64 {
    let mut raw = [0; 4];
    read_or_zero(file, &mut raw, at).unwrap();
    u64::from(u32::from_le_bytes(raw))
}

/// Puts the extension where the header says it is, if that is in the file.
fn place(file: &dyn StoreFile, bytes: &[u8], sum_it: bool, len: u64) {
    let at = number(file, 56) * SECTOR;
    let cluster = number(file, 28) * SECTOR;
    if at >= len {
        return;
    }
    let kept = bytes.len().min((len - at) as usize);
    file.write_at(&bytes[..kept], at).unwrap();
    if sum_it && cluster >= 24 && at + cluster <= len {
        let mut content = vec![0; cluster as usize - 24];
        read_or_zero(file, &mut content, at + 24).unwrap();
        file.write_at(&Md5::digest(&content), at + 8).unwrap();
    }
}

fn judge(input: &[u8]) {
    let Some(store) = build(input) else { return };
    let trial = Trial {
        store: &store,
        source: &image_at(IMAGE),
        look: LOOK,
        about: "an image",
    };
    trial.check();
    trial.repair();
}

/// Header and table: checked, read, repaired, taken back.
pub fn bat(input: &[u8]) {
    judge(input);
}

/// The same with an extension, or with a backup. Another target, so that its inputs are others.
pub fn extension(input: &[u8]) {
    judge(input);
}
