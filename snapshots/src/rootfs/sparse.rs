//! Sparse members: which ranges of a content the archive holds. Four dialects, one answer:
//! `(length, [(start, bytes)…])`.
//!
//! | dialect | map | written by |
//! |---|---|---|
//! | old GNU | in the header (type `S`) and in blocks after it | `tar -S --format=gnu` |
//! | PAX 0.0 | a pair of records per range | tar 1.14 |
//! | PAX 0.1 | one record | tar 1.15 |
//! | PAX 1.0 | decimal lines before the data, padded to a block | `tar -S --format=posix` |
//!
//! A map grows with what was read of it, never by the count that it claims.

use std::io::Read;

use ploop::error::{Error, Result};
use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::members::{BLOCK, Members};
use super::pax::{Records, decimal};

/// Most ranges of one content.
const RANGES_MAX: usize = 1 << 20;
/// A number in the map of PAX 1.0 is not longer than this.
const DIGITS_MAX: usize = 20;

type Sparse = (u64, Vec<(u64, u64)>);

/// The map of a type `S` header, and of the blocks after it.
pub(super) fn old_gnu<R: Read>(
    stream: &mut Members<R>,
    header: &Header,
    at: u64,
) -> Result<Sparse> {
    let damaged = |e: std::io::Error| {
        Error::corrupt("the map of a sparse member")
            .at(at)
            .caused_by(e)
    };
    let gnu = header
        .as_gnu()
        .ok_or_else(|| Error::corrupt("a sparse member whose header is not GNU's").at(at))?;
    let mut map = Vec::new();
    let mut add = |list: &[GnuSparseHeader]| -> Result<()> {
        for range in list.iter().filter(|range| !range.is_empty()) {
            let start = range.offset().map_err(damaged)?;
            push(&mut map, start, range.length().map_err(damaged)?)?;
        }
        Ok(())
    };
    add(&gnu.sparse)?;
    let mut more = gnu.is_extended();
    while more {
        let mut block = GnuExtSparseHeader::new();
        *block.as_mut_bytes() = stream.extra_block()?;
        add(&block.sparse)?;
        more = block.is_extended();
    }
    Ok((gnu.real_size().map_err(damaged)?, map))
}

/// The map that PAX records tell of; `None` for a member that is not sparse.
pub(super) fn pax<R: Read>(stream: &mut Members<R>, pax: &Records) -> Result<Option<Sparse>> {
    let version = (
        pax.number(b"GNU.sparse.major")?,
        pax.number(b"GNU.sparse.minor")?,
    );
    match version {
        (Some(1), Some(0)) => {
            let len = pax.number(b"GNU.sparse.realsize")?;
            let len = len.ok_or_else(|| Error::corrupt("a sparse member without its real size"))?;
            Ok(Some((len, map_in_data(stream)?)))
        }
        (None | Some(0), _) => {
            let Some(len) = pax.number(b"GNU.sparse.size")? else {
                return Ok(None);
            };
            Ok(Some((len, map_in_records(pax)?)))
        }
        (major, minor) => Err(Error::unsupported(format!(
            "sparse members of version {}.{}",
            major.unwrap_or(0),
            minor.unwrap_or(0)
        ))),
    }
}

/// Ranges must ascend, stay inside of `len`, and hold no more data than the member has.
pub(super) fn check(len: u64, map: &[(u64, u64)], data: u64) -> Result<()> {
    let (mut end, mut sum) = (0, 0u64);
    for &(start, bytes) in map {
        let stop = start
            .checked_add(bytes)
            .filter(|&stop| start >= end && stop <= len);
        end = stop.ok_or_else(|| {
            Error::corrupt(format!(
                "the map of a sparse member has {bytes} bytes at {start}, out of order or past \
                 its length {len}"
            ))
        })?;
        sum += bytes;
    }
    if sum > data {
        return Err(Error::corrupt(format!(
            "a sparse member's map needs {sum} bytes of data, and it has {data}"
        )));
    }
    Ok(())
}

fn push(map: &mut Vec<(u64, u64)>, start: u64, bytes: u64) -> Result<()> {
    if map.len() >= RANGES_MAX {
        return Err(Error::unsupported(format!(
            "a sparse member of more than {RANGES_MAX} ranges"
        )));
    }
    // The last entry is often an empty one that stands for the length.
    if bytes > 0 {
        map.push((start, bytes));
    }
    Ok(())
}

fn map_in_records(pax: &Records) -> Result<Vec<(u64, u64)>> {
    let bad = || Error::corrupt("the map of a sparse member is no list of pairs");
    let mut numbers = Vec::new();
    for (key, value) in pax.iter() {
        match key {
            b"GNU.sparse.map" => {
                numbers.clear();
                for text in value.split(|&b| b == b',').filter(|t| !t.is_empty()) {
                    numbers.push(decimal(text).ok_or_else(bad)?);
                }
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let offset = key.ends_with(b"offset");
                if offset != numbers.len().is_multiple_of(2) {
                    return Err(bad());
                }
                numbers.push(decimal(value).ok_or_else(bad)?);
            }
            _ => {}
        }
    }
    let (pairs, []) = numbers.as_chunks::<2>() else {
        return Err(bad());
    };
    let mut map = Vec::new();
    for &[start, bytes] in pairs {
        push(&mut map, start, bytes)?;
    }
    Ok(map)
}

fn map_in_data<R: Read>(stream: &mut Members<R>) -> Result<Vec<(u64, u64)>> {
    let mut lines = Lines {
        stream,
        block: [0; BLOCK],
        used: BLOCK,
    };
    let count = lines.number()?;
    let mut map = Vec::new();
    for _ in 0..count {
        let start = lines.number()?;
        push(&mut map, start, lines.number()?)?;
    }
    Ok(map)
}

/// Decimal lines in whole blocks of the member's data.
struct Lines<'a, R> {
    stream: &'a mut Members<R>,
    block: [u8; BLOCK],
    used: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> Result<u64> {
        let bad = || Error::corrupt("the map before a sparse member's data is no list of numbers");
        let mut text = Vec::new();
        loop {
            if self.used == BLOCK {
                self.stream.data(&mut self.block)?;
                self.used = 0;
            }
            let byte = self.block[self.used];
            self.used += 1;
            if byte == b'\n' {
                return decimal(&text).ok_or_else(bad);
            }
            text.push(byte);
            if text.len() > DIGITS_MAX {
                return Err(bad());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_lie_are_refused() {
        assert!(check(100, &[(0, 10), (10, 90)], 100).is_ok());
        assert!(check(100, &[(0, 10), (5, 10)], 100).is_err(), "overlap");
        assert!(check(100, &[(50, 51)], 100).is_err(), "past the length");
        assert!(check(100, &[(u64::MAX, 2)], 100).is_err(), "overflow");
        assert!(check(100, &[(0, 100)], 99).is_err(), "more than there is");
    }

    #[test]
    fn maps_in_records() {
        let mut r = Records::default();
        r.extend(b"27 GNU.sparse.map=0,4,10,2\n", 0).unwrap();
        assert_eq!(map_in_records(&r).unwrap(), [(0, 4), (10, 2)]);
        let mut r = Records::default();
        r.extend(b"23 GNU.sparse.offset=1\n25 GNU.sparse.numbytes=2\n", 0)
            .unwrap();
        assert_eq!(map_in_records(&r).unwrap(), [(1, 2)]);
        r.extend(b"23 GNU.sparse.offset=1\n23 GNU.sparse.offset=2\n", 0)
            .unwrap();
        assert!(map_in_records(&r).is_err());
    }
}
