//! Records: bytes ↔ values, nothing else.
//!
//! A record begins on a border of 512 bytes; all numbers are little-endian.
//!
//! | byte | |
//! |---|---|
//! | 0 | `ploopjrn` |
//! | 8 | u32, CRC-32 of the record from byte 12 to its length |
//! | 12 | u32, its length, without the zeros up to the next border |
//! | 16 | 16 bytes, the journal's nonce |
//! | 32 | u64, its number, from 0 |
//! | 40 | u64, the flush that wrote it, from 0 |
//! | 48 | u32, its kind |
//! | 52 | u32, 64-bit words of granules in each part; 0 in other kinds |
//! | 56 | 8 zeros |
//! | 64 | items |
//!
//! | kind | items |
//! |---|---|
//! | 1 base | the image's 64 header bytes, u64 records of kind 2 that follow it |
//! | 2 sums | u32 page of 1024 BAT entries, u32 CRC-32 of it |
//! | 3 entries | u32 slot, u32 BAT entry |
//! | 4 parts | u32 slot, u32 what its BAT entry will be, a bit per granule |
//! | 5 end | none; in the place of the base: there is no journal |

use crate::format::ploop::header::HEADER_BYTES;
use crate::format::ploop::parts::Granules;
use crate::store::SECTOR;

/// Bytes of a record, at most.
pub(super) const RECORD_MAX: usize = 64 * 1024;
/// Bytes before the items.
pub(super) const HEAD: usize = 64;

const MAGIC: &[u8; 8] = b"ploopjrn";
const SUM: usize = 8;
const SUMMED: usize = 12;
const NONCE: usize = 16;
const NUMBER: usize = 32;
const GROUP: usize = 40;
const KIND: usize = 48;
const WORDS: usize = 52;
const ZEROS: usize = 56;

const BASE: u32 = 1;
const SUMS: u32 = 2;
const ENTRIES: u32 = 3;
const PARTS: u32 = 4;
const END: u32 = 5;

/// The header bytes of an image.
pub(super) type HeaderBytes = [u8; HEADER_BYTES as usize];

/// A cluster that has a place in the file and not all of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedPart {
    /// Guest cluster.
    pub slot: u32,
    /// What its BAT entry will be.
    pub entry: u32,
    /// The granules whose bytes are in the file.
    pub present: Granules,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Items {
    Base { header: HeaderBytes, sums: u64 },
    Sums(Vec<(u32, u32)>),
    Entries(Vec<(u32, u32)>),
    Parts(Vec<LoggedPart>),
    End,
}

/// Whose record it is, and which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) nonce: [u8; 16],
    pub(super) number: u64,
    pub(super) group: u64,
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

fn pairs(bytes: &[u8]) -> Option<Vec<(u32, u32)>> {
    let (all, []) = bytes.as_chunks::<8>() else {
        return None;
    };
    Some(all.iter().map(|b| (u32_at(b, 0), u32_at(b, 4))).collect())
}

/// How many items of `size` bytes fit a record.
pub(super) fn per_record(size: usize) -> usize {
    (RECORD_MAX - HEAD) / size
}

/// Bytes of a part with `words` words.
pub(super) fn part_bytes(words: usize) -> usize {
    8 + 8 * words
}

/// Appends a record to `out`, filled up to the next border.
pub(super) fn encode(tag: &Tag, items: &Items, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + HEAD, 0);
    let (kind, words) = match items {
        Items::Base { header, sums } => {
            out.extend_from_slice(header);
            out.extend_from_slice(&sums.to_le_bytes());
            (BASE, 0)
        }
        Items::Sums(pairs) | Items::Entries(pairs) => {
            for (a, b) in pairs {
                out.extend_from_slice(&a.to_le_bytes());
                out.extend_from_slice(&b.to_le_bytes());
            }
            match items {
                Items::Sums(_) => (SUMS, 0),
                _ => (ENTRIES, 0),
            }
        }
        Items::End => (END, 0),
        Items::Parts(parts) => {
            for part in parts {
                out.extend_from_slice(&part.slot.to_le_bytes());
                out.extend_from_slice(&part.entry.to_le_bytes());
                for word in part.present.words() {
                    out.extend_from_slice(&word.to_le_bytes());
                }
            }
            (PARTS, parts.first().map_or(0, |p| p.present.words().len()))
        }
    };
    let record = &mut out[start..];
    let len = record.len();
    debug_assert!(len <= RECORD_MAX);
    record[..SUM].copy_from_slice(MAGIC);
    record[SUMMED..NONCE].copy_from_slice(&(len as u32).to_le_bytes());
    record[NONCE..NUMBER].copy_from_slice(&tag.nonce);
    record[NUMBER..GROUP].copy_from_slice(&tag.number.to_le_bytes());
    record[GROUP..KIND].copy_from_slice(&tag.group.to_le_bytes());
    record[KIND..WORDS].copy_from_slice(&kind.to_le_bytes());
    record[WORDS..ZEROS].copy_from_slice(&(words as u32).to_le_bytes());
    let sum = crc32fast::hash(&record[SUMMED..]);
    record[SUM..SUMMED].copy_from_slice(&sum.to_le_bytes());
    out.resize(start + len.next_multiple_of(SECTOR as usize), 0);
}

/// The length that a record claims which begins with `head` (64 bytes); `None` when it is none.
pub(super) fn claimed_len(head: &[u8]) -> Option<usize> {
    let len = u32_at(head, SUMMED) as usize;
    (head.starts_with(MAGIC) && (HEAD..=RECORD_MAX).contains(&len)).then_some(len)
}

/// The record in `bytes`, which are as long as it claims. `granules` is how many a part has. `None`
/// when its sum, or anything in it, is wrong.
pub(super) fn decode(bytes: &[u8], granules: u64) -> Option<(Tag, Items)> {
    if bytes.len() < HEAD
        || claimed_len(bytes)? != bytes.len()
        || crc32fast::hash(&bytes[SUMMED..]) != u32_at(bytes, SUM)
    {
        return None;
    }
    let mut nonce = [0; 16];
    nonce.copy_from_slice(&bytes[NONCE..NUMBER]);
    let tag = Tag {
        nonce,
        number: u64_at(bytes, NUMBER),
        group: u64_at(bytes, GROUP),
    };
    let body = &bytes[HEAD..];
    let items = match u32_at(bytes, KIND) {
        BASE => {
            let (header, rest) = body.split_first_chunk()?;
            let sums = u64::from_le_bytes(rest.try_into().ok()?);
            let header = *header;
            Items::Base { header, sums }
        }
        SUMS => Items::Sums(pairs(body)?),
        ENTRIES => Items::Entries(pairs(body)?),
        END if body.is_empty() => Items::End,
        PARTS => {
            let words = granules.div_ceil(64) as usize;
            if u32_at(bytes, WORDS) as usize != words
                || !body.len().is_multiple_of(part_bytes(words))
            {
                return None;
            }
            let mut parts = Vec::new();
            for b in body.chunks_exact(part_bytes(words)) {
                let bits = b[8..].as_chunks::<8>().0;
                let bits = bits.iter().map(|w| u64::from_le_bytes(*w)).collect();
                parts.push(LoggedPart {
                    slot: u32_at(b, 0),
                    entry: u32_at(b, 4),
                    present: Granules::from_words(bits, granules)?,
                });
            }
            Items::Parts(parts)
        }
        _ => return None,
    };
    Some((tag, items))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_comes_back_and_no_flipped_bit_does() {
        let tag = Tag {
            nonce: [7; 16],
            number: 3,
            group: 2,
        };
        let mut present = Granules::none(100);
        present.set(3..70);
        let part = LoggedPart {
            slot: 9,
            entry: 17,
            present,
        };
        let kinds = [
            Items::Base {
                header: [5; 64],
                sums: 4,
            },
            Items::Sums(vec![(1, 2), (3, u32::MAX)]),
            Items::Entries(vec![]),
            Items::End,
            Items::Parts(vec![part.clone(), part]),
        ];
        for items in kinds {
            let mut out = vec![1; 512];
            encode(&tag, &items, &mut out);
            assert_eq!(out.len() % 512, 0);
            let mut record = out.split_off(512);
            let len = claimed_len(&record).unwrap();
            record.truncate(len);
            assert_eq!(decode(&record, 100), Some((tag, items)));
            for byte in 0..len {
                record[byte] ^= 4;
                assert_eq!(decode(&record, 100), None, "byte {byte}");
                record[byte] ^= 4;
            }
            assert_eq!(decode(&record[..len - 1], 100), None);
        }
    }
}
