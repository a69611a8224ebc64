//! Operations on the bytes of a disk.

use std::ops::Range;

use ploop::device::{Device, ZeroMode};
use ploop::store::{SECTOR, StoreFile};

use super::oracle::{Ct, Sectors};
use super::world::{Done, Failure, World, ensure};
use super::{CLUSTER, SECTORS, SIZE, WINDOWS};

/// Sectors of a window.
const WINDOW: usize = SECTORS / WINDOWS.len();

/// The sectors of an operation: lists may be made by hand.
fn range(at: u16, len: u16) -> Range<usize> {
    let at = usize::from(at).min(SECTORS - 1);
    at..(at + usize::from(len)).min(SECTORS)
}

/// The first byte of the disk that a sector of the model is.
pub(super) fn byte(sector: usize) -> u64 {
    let window = sector / WINDOW;
    (WINDOWS[window] * CLUSTER + sector % WINDOW) as u64 * SECTOR
}

/// The pieces of a range of sectors that are one range of the disk.
fn pieces(sectors: &Range<usize>) -> Vec<(Range<usize>, Range<u64>)> {
    let mut all = Vec::new();
    let mut at = sectors.start;
    while at < sectors.end {
        let end = ((at / WINDOW + 1) * WINDOW).min(sectors.end);
        let start = byte(at);
        all.push((at..end, start..start + (end - at) as u64 * SECTOR));
        at = end;
    }
    all
}

/// A sector of this number.
fn sector(value: u32) -> [u8; SECTOR as usize] {
    let mut sector = [0; SECTOR as usize];
    for word in sector.chunks_exact_mut(4) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    sector
}

/// Sectors of these numbers.
fn written(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| sector(*v)).collect()
}

/// Makes `file` a raw image of a disk.
pub(super) fn write_raw(file: &dyn StoreFile, disk: &Sectors) -> Done {
    file.set_len(SIZE as u64 * SECTOR)?;
    for (sectors, bytes) in pieces(&(0..SECTORS)) {
        file.write_at(&written(&disk[sectors]), bytes.start)?;
    }
    Ok(())
}

/// The numbers in sectors; fails on one that is not whole.
pub(super) fn numbers(bytes: &[u8]) -> Done<Sectors> {
    let mut all = Vec::with_capacity(bytes.len() / SECTOR as usize);
    for (n, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
        let whole = sector[4..] == sector[..sector.len() - 4];
        ensure!(whole, "sector {n} is torn");
        all.push(u32::from_le_bytes([
            sector[0], sector[1], sector[2], sector[3],
        ]));
    }
    Ok(all)
}

/// All that a disk reads. What nobody ever wrote takes no space.
pub(super) fn read(disk: &dyn Device) -> Done<Sectors> {
    let size = SIZE as u64 * SECTOR;
    ensure!(
        disk.size() == size,
        "{} bytes instead of {size}",
        disk.size()
    );
    let mut extents = Vec::new();
    let mut all = Vec::with_capacity(SECTORS);
    let mut end = 0;
    for (sectors, bytes) in pieces(&(0..SECTORS)) {
        disk.allocation(end..bytes.start, 8, &mut extents)?;
        let zero = extents.iter().all(|e| e.zero);
        ensure!(
            zero,
            "bytes {end} to {} were never written: {extents:?}",
            bytes.start
        );
        let mut buf = vec![0; sectors.len() * SECTOR as usize];
        disk.read(bytes.start, &mut buf)?;
        all.append(&mut numbers(&buf)?);
        end = bytes.end;
    }
    Ok(all)
}

/// A write that is made in the middle of something.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    sectors: Range<usize>,
    stamp: u32,
}

impl Wish {
    pub(super) fn new(sector: usize, len: usize, stamp: u32) -> Wish {
        let sectors = sector % SECTORS..(sector % SECTORS + len).min(SECTORS);
        Wish { sectors, stamp }
    }

    pub(super) fn grant(&self, disk: &dyn Device, expected: &mut Sectors) -> Done {
        for (sectors, bytes) in pieces(&self.sectors) {
            disk.write(bytes.start, &written(&vec![self.stamp; sectors.len()]))?;
        }
        expected[self.sectors.clone()].fill(self.stamp);
        look(disk, expected)
    }

    /// The same in the model.
    pub(super) fn enter(&self, ct: &mut Ct) {
        self.sectors.clone().for_each(|s| ct.write(s, self.stamp));
    }
}

/// Compares a disk with what it must read.
pub(super) fn look(disk: &dyn Device, expected: &Sectors) -> Done {
    differ(&read(disk)?, expected)
}

/// Fails where the two differ.
pub(super) fn differ(found: &Sectors, expected: &Sectors) -> Done {
    let wrong: Vec<usize> = (0..expected.len())
        .filter(|&s| found[s] != expected[s])
        .collect();
    let (Some(&first), Some(last)) = (wrong.first(), wrong.last()) else {
        return Ok(());
    };
    let (is, should) = (found[first], expected[first]);
    let n = wrong.len();
    Err(Failure(format!(
        "{n} sectors differ, {first} to {last}: {first} is {is}, not {should}"
    )))
}

impl World {
    pub(super) fn write(&mut self, ct: u8, at: u16, len: u16) -> Done {
        let (name, stamp) = (self.name(ct), self.stamp());
        let disk = self.open(&name)?;
        for (sectors, bytes) in pieces(&range(at, len)) {
            disk.write(bytes.start, &written(&vec![stamp; sectors.len()]))?;
            let ct = self.ct(&name);
            sectors.for_each(|s| ct.write(s, stamp));
        }
        self.touch(&name, None);
        Ok(())
    }

    pub(super) fn zero(&mut self, ct: u8, at: u16, len: u16, keep_space: bool) -> Done {
        let name = self.name(ct);
        let disk = self.open(&name)?;
        let mode = ZeroMode {
            keep_space,
            only_if_fast: false,
        };
        for (sectors, bytes) in pieces(&range(at, len)) {
            disk.zero(bytes, mode)?;
            let ct = self.ct(&name);
            sectors.for_each(|s| ct.write(s, 0));
        }
        self.touch(&name, None);
        Ok(())
    }

    /// Each sector is what it was, or what was written.
    pub(super) fn abort(&mut self, ct: u8, at: u16, len: u16) -> Done {
        let (name, stamp) = (self.name(ct), self.stamp());
        let disk = self.open(&name)?;
        for (sectors, bytes) in pieces(&range(at, len)) {
            let mut segments = Vec::new();
            let lease = disk.prepare(bytes.clone(), &mut segments)?;
            for s in &segments {
                let values = vec![stamp; (s.len / SECTOR) as usize];
                lease.file().write_at(&written(&values), s.file_offset)?;
            }
            drop(lease);
            self.roomy = true;
            let mut buf = vec![0; sectors.len() * SECTOR as usize];
            disk.read(bytes.start, &mut buf)?;
            let ct = self.ct(&name);
            for (s, value) in sectors.zip(numbers(&buf)?) {
                let old = ct.top[s];
                ensure!(
                    value == old || value == stamp,
                    "sector {s}: {value} instead of {old}"
                );
                if value != old {
                    ct.write(s, value);
                }
            }
        }
        self.touch(&name, None);
        self.tally.add("writes that were not entered");
        Ok(())
    }

    pub(super) fn discard(&mut self, ct: u8, at: u16, len: u16) -> Done {
        let name = self.name(ct);
        let disk = self.open(&name)?;
        for (sectors, bytes) in pieces(&range(at, len)) {
            disk.discard(bytes.clone())?;
            let mut buf = vec![0; sectors.len() * SECTOR as usize];
            disk.read(bytes.start, &mut buf)?;
            discarded(self.ct(&name), sectors, &numbers(&buf)?)?;
        }
        self.touch(&name, None);
        Ok(())
    }

    pub(super) fn flush(&mut self, ct: u8) -> Done {
        let name = self.name(ct);
        self.open(&name)?.flush()?;
        self.ct(&name).flushed();
        self.touch(&name, None);
        Ok(())
    }
}

/// Whole clusters read as zeros after a discard; of a part of one each sector is what it was, or 0.
fn discarded(ct: &mut Ct, sectors: Range<usize>, found: &[u32]) -> Done {
    for (s, &value) in sectors.clone().zip(found) {
        let first = s / CLUSTER * CLUSTER;
        let whole = sectors.start <= first && first + CLUSTER <= sectors.end;
        ensure!(
            value == 0 || !whole && value == ct.top[s],
            "sector {s}: {value} after a discard, {} before",
            ct.top[s]
        );
        if value != ct.top[s] {
            ct.write(s, value);
        }
    }
    Ok(())
}
