//! Where the file systems of a disk are: on all of it, or in the partitions of a GPT or an MBR.
//!
//! Nothing is trusted: a partition that leaves the disk is cut, and there are 128 at most.

use std::ops::Range;

use ploop::device::Device;
use ploop::{Kind, Result};

const SECTOR: u64 = 512;
const PARTITIONS_MAX: u64 = 128;
const ENTRY_MIN: u64 = 128;
const ENTRY_MAX: u64 = 4096;
const PROTECTIVE: u8 = 0xEE;

/// A part of the guest's disk that holds something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Volume {
    /// For people.
    pub(super) name: String,
    /// Guest bytes.
    pub(super) range: Range<u64>,
    pub(super) system: System,
}

/// What it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum System {
    Ext,
    Xfs,
    /// Known by name only.
    Other(&'static str),
}

/// What is on the disk.
pub(super) fn volumes(disk: &dyn Device) -> Result<Vec<Volume>> {
    let whole = 0..disk.size();
    if let Some(system) = system_of(disk, &whole)? {
        return Ok(vec![Volume {
            name: "the disk".into(),
            range: whole,
            system,
        }]);
    }
    let mut out: Vec<Volume> = Vec::new();
    for (number, range) in partitions(disk)? {
        // Or a guest that names one range often would have it copied as often.
        let overlaps = |v: &Volume| v.range.start < range.end && range.start < v.range.end;
        let system = match out.iter().any(overlaps) {
            true => Some(System::Other("a range that a partition before it has")),
            false => system_of(disk, &range)?,
        };
        out.push(Volume {
            name: format!("partition {number}"),
            range,
            system: system.unwrap_or(System::Other("no known file system")),
        });
    }
    Ok(out)
}

/// By the magic numbers. A range that cannot be read holds nothing that is known.
fn system_of(disk: &dyn Device, range: &Range<u64>) -> Result<Option<System>> {
    let magics: [(u64, &[u8], System); 6] = [
        (0, b"XFSB", System::Xfs),
        (1024 + 56, &[0x53, 0xEF], System::Ext),
        (65_536 + 64, b"_BHRfS_M", System::Other("btrfs")),
        (4086, b"SWAPSPACE2", System::Other("swap space")),
        (
            0,
            b"LUKS\xBA\xBE",
            System::Other("an encrypted volume (LUKS)"),
        ),
        (512 + 24, b"LVM2 001", System::Other("a volume of LVM")),
    ];
    for (at, magic, system) in magics {
        let mut buf = [0; 16];
        let buf = &mut buf[..magic.len()];
        if read(disk, range.start + at, range.end, buf)? && buf == magic {
            return Ok(Some(system));
        }
    }
    Ok(None)
}

/// True when all of `buf` was read; false where there is nothing, or damage. What the host cannot read
/// now says nothing about the guest: an error.
fn read(disk: &dyn Device, at: u64, end: u64, buf: &mut [u8]) -> Result<bool> {
    if at.checked_add(buf.len() as u64).is_none_or(|to| to > end) {
        return Ok(false);
    }
    match disk.read(at, buf) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == Kind::Corrupt => Ok(false),
        Err(e) => Err(e),
    }
}

/// The number of a partition, and its bytes.
type Numbered = (u64, Range<u64>);

fn partitions(disk: &dyn Device) -> Result<Vec<Numbered>> {
    let size = disk.size();
    let mut mbr = [0; SECTOR as usize];
    let has_mbr = read(disk, 0, size, &mut mbr)? && mbr[510..] == [0x55, 0xAA];
    let old: Vec<&[u8]> = mbr[446..510].chunks(16).collect();
    let gpt = old.iter().any(|e| e[4] == PROTECTIVE) || !has_mbr;
    let last = (size / SECTOR).saturating_sub(1) * SECTOR;
    // The second copy is for a first that is lost.
    for header in [SECTOR, last] {
        if gpt && let Some(found) = gpt_at(disk, header)? {
            return Ok(found);
        }
    }
    let mut out = Vec::new();
    for (entry, number) in old.iter().zip(1..).filter(|(e, _)| has_mbr && e[4] != 0) {
        let (start, count) = (u64::from(le32(entry, 8)), u64::from(le32(entry, 12)));
        out.extend(clipped(number, start, start + count, size));
    }
    Ok(out)
}

fn gpt_at(disk: &dyn Device, header: u64) -> Result<Option<Vec<Numbered>>> {
    let size = disk.size();
    let mut head = [0; 92];
    if !read(disk, header, size, &mut head)? || &head[..8] != b"EFI PART" {
        return Ok(None);
    }
    let table = le64(&head, 72).checked_mul(SECTOR);
    let count = u64::from(le32(&head, 80)).min(PARTITIONS_MAX);
    let len = u64::from(le32(&head, 84));
    let Some(table) = table.filter(|_| (ENTRY_MIN..=ENTRY_MAX).contains(&len)) else {
        return Ok(None);
    };
    let mut out = Vec::new();
    for i in 0..count {
        let mut entry = [0; ENTRY_MIN as usize];
        let Some(at) = table.checked_add(i * len) else {
            return Ok(None);
        };
        if !read(disk, at, size, &mut entry)? {
            break;
        }
        if entry[..16].iter().any(|&b| b != 0) {
            let end = le64(&entry, 40).saturating_add(1);
            out.extend(clipped(i + 1, le64(&entry, 32), end, size));
        }
    }
    Ok(Some(out))
}

/// A partition of sectors, as far as the disk has them.
fn clipped(number: u64, start: u64, end: u64, size: u64) -> Option<(u64, Range<u64>)> {
    let start = start.checked_mul(SECTOR)?;
    let end = end.saturating_mul(SECTOR).min(size);
    (start < end).then_some((number, start..end))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use ploop::disk::open::{OpenOptions, Opener, Source};
    use ploop::store::Store;
    use ploop::store::memory::MemoryStore;
    use ploop::store::recording::{Calls, Fault, RecordingStore};

    const DISK: u64 = 8 << 20;

    fn found(bytes: &[(u64, &[u8])]) -> Vec<(String, Range<u64>, System)> {
        let store = MemoryStore::new();
        let path = Path::new("/disk.raw");
        let file = store.create(path, 0o600).unwrap();
        file.set_len(DISK).unwrap();
        for (at, bytes) in bytes {
            file.write_at(bytes, *at).unwrap();
        }
        let source = Source {
            path: path.into(),
            descriptor: false,
            snapshot: None,
        };
        let opener = Opener::on(Arc::new(store));
        let disk = opener.open(&source, &OpenOptions::default()).unwrap();
        let all = volumes(&disk).unwrap().into_iter();
        all.map(|v| (v.name, v.range, v.system)).collect()
    }

    /// Goal: what the host cannot read is not called an empty disk. Method: each call of the look for
    /// file systems fails once.
    #[test]
    fn an_error_of_the_host_is_no_answer() {
        for n in 0.. {
            let store = RecordingStore::new();
            let path = Path::new("/disk.raw");
            let file = store.store().create(path, 0o600).unwrap();
            file.set_len(DISK).unwrap();
            file.write_at(&header(2, 1, 128), DISK - SECTOR).unwrap();
            file.write_at(&entry(2048, 4095), 1024).unwrap();
            file.write_at(&[0x53, 0xEF], (1 << 20) + 1080).unwrap();
            let source = Source {
                path: path.into(),
                descriptor: false,
                snapshot: None,
            };
            let opener = Opener::on(store.store());
            let disk = opener.open(&source, &OpenOptions::default()).unwrap();
            store.count(Calls::All);
            store.fail_at(n, Fault::Eio);
            let found = volumes(&disk);
            if store.calls() <= n {
                assert_eq!(found.unwrap()[0].system, System::Ext);
                assert!(n > 10, "{n} calls");
                return;
            }
            assert_eq!(found.unwrap_err().kind(), Kind::Io, "call {n}");
        }
    }

    #[test]
    fn a_range_that_is_named_twice_is_one_file_system() {
        let twice = [
            &entry(2048, 4095)[..],
            &entry(2048, 4095),
            &entry(4000, 5000),
        ]
        .concat();
        let all = found(&[
            (SECTOR, &header(2, 128, 128)),
            (1024, &twice),
            ((1 << 20) + 1080, &[0x53, 0xEF]),
        ]);
        let other = System::Other("a range that a partition before it has");
        let systems: Vec<System> = all.into_iter().map(|v| v.2).collect();
        assert_eq!(systems, [System::Ext, other, other]);
    }

    fn header(table: u64, count: u32, len: u32) -> Vec<u8> {
        let mut head = vec![0; 92];
        head[..8].copy_from_slice(b"EFI PART");
        head[72..80].copy_from_slice(&table.to_le_bytes());
        head[80..84].copy_from_slice(&count.to_le_bytes());
        head[84..88].copy_from_slice(&len.to_le_bytes());
        head
    }

    fn entry(first: u64, last: u64) -> Vec<u8> {
        let mut entry = vec![0; 128];
        entry[0] = 1;
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        entry
    }

    #[test]
    fn file_systems_are_found_where_they_are() {
        assert_eq!(found(&[]), []);
        let ext = |at: u64| (at + 1080, &[0x53, 0xEF][..]);
        let whole = ("the disk".into(), 0..DISK, System::Ext);
        assert_eq!(found(&[ext(0)]), [whole]);
        let part = ("partition 1".into(), 1 << 20..2 << 20, System::Ext);
        for at in [SECTOR, DISK - SECTOR] {
            let table = (1024, &entry(2048, 4095)[..]);
            let gpt = found(&[(at, &header(2, 128, 128)), table, ext(1 << 20)]);
            assert_eq!(gpt, std::slice::from_ref(&part));
        }
        let mut mbr = vec![0; 66];
        mbr[4] = 0x83;
        mbr[8..12].copy_from_slice(&2048u32.to_le_bytes());
        mbr[12..16].copy_from_slice(&2048u32.to_le_bytes());
        mbr[64..].copy_from_slice(&[0x55, 0xAA]);
        assert_eq!(found(&[(446, &mbr), ext(1 << 20)]), [part]);
    }

    #[test]
    fn a_table_that_lies_leads_nowhere() {
        let max = u64::MAX;
        for (table, count, len) in [
            (2, u32::MAX, 128),
            (max, 1, 128),
            (2, 4, 1),
            (max / 512, 4, 4096),
        ] {
            for (first, last) in [
                (0, max),
                (max, 0),
                (max / 512, max),
                (2048, 2047),
                (100, max - 1),
            ] {
                let all = found(&[
                    (SECTOR, &header(table, count, len)),
                    (1024, &entry(first, last)),
                ]);
                assert!(all.len() <= 1, "{all:?}");
                assert!(all.iter().all(|v| v.1.start < v.1.end && v.1.end <= DISK));
            }
        }
    }
}
