//! GPT: two copies of a partition table around the disk, and an old-style one that says hands off.
//!
//! ```text
//! sector 0      protective MBR
//!        1      header ──▶ 2..34   128 entries of 128 bytes
//!        2048…  partition 1, in whole MiB
//!     −33..−1   the entries again
//!        −1     the backup header
//! ```
//!
//! Checksums are CRC-32 (IEEE) over header and entries. Fields that this module does not know are
//! kept on rewrite. A table that fails its checksum is refused, never guessed at.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ploop::error::{Error, Result};
use uuid::Uuid;

const SECTOR: u64 = 512;
const ALIGN: u64 = 1 << 20;
const SIGNATURE: &[u8; 8] = b"EFI PART";
const HEADER_BYTES: usize = 92;
const ENTRY: usize = 128;
const ENTRIES: usize = 128;
const TABLE_BYTES: usize = ENTRY * ENTRIES;
const TABLE_SECTORS: u64 = TABLE_BYTES as u64 / SECTOR;
/// What the backup takes at the end of the disk.
pub(super) const BACKUP: u64 = (TABLE_SECTORS + 1) * SECTOR;
/// "Linux filesystem data".
const LINUX: Uuid = Uuid::from_u128(0x0fc63daf_8483_4772_8e79_3d69d8477de4);

/// A valid table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gpt {
    /// The primary header, 92 bytes; its checksums are made when it is written.
    header: [u8; HEADER_BYTES],
    /// All entries, as on disk.
    table: Vec<u8>,
}

/// A partition, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Gpt {
    /// A table for a disk of `bytes` with one Linux partition over all of it, in whole MiB.
    pub(super) fn with_one_partition(bytes: u64) -> Result<Gpt> {
        let end = Gpt::last_end(bytes);
        if end <= ALIGN {
            return Err(Error::invalid(format!(
                "a disk of {bytes} bytes is too small for a partition"
            )));
        }
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(SIGNATURE);
        put32(&mut header, 8, 0x0001_0000);
        put32(&mut header, 12, HEADER_BYTES as u32);
        put64(&mut header, 24, 1);
        put64(&mut header, 40, 2 + TABLE_SECTORS);
        header[56..72].copy_from_slice(&Uuid::new_v4().to_bytes_le());
        put64(&mut header, 72, 2);
        put32(&mut header, 80, ENTRIES as u32);
        put32(&mut header, 84, ENTRY as u32);
        let mut table = vec![0; TABLE_BYTES];
        table[..16].copy_from_slice(&LINUX.to_bytes_le());
        table[16..32].copy_from_slice(&Uuid::new_v4().to_bytes_le());
        put64(&mut table, 32, ALIGN / SECTOR);
        put64(&mut table, 40, end / SECTOR - 1);
        for (at, unit) in (56..).step_by(2).zip("root".encode_utf16()) {
            table[at..at + 2].copy_from_slice(&unit.to_le_bytes());
        }
        let mut gpt = Gpt { header, table };
        gpt.span(bytes);
        Ok(gpt)
    }

    /// Reads the table of a disk; `None` when there is none. A damaged one is `Corrupt`.
    pub(super) fn read(file: &File, path: &Path) -> Result<Option<Gpt>> {
        let mut sector = [0; SECTOR as usize];
        if read_at(file, path, &mut sector, SECTOR)? < sector.len()
            || !sector.starts_with(SIGNATURE)
        {
            return Ok(None);
        }
        let bad = |what: &str| {
            Error::corrupt(format!("the partition table: {what}"))
                .on(path)
                .at(SECTOR)
                .fix(format!(
                    "If the backup table at the end is whole, restore it: sgdisk -e '{}'",
                    path.display()
                ))
        };
        let size = get32(&sector, 12) as usize;
        if !(HEADER_BYTES..=sector.len()).contains(&size) {
            return Err(bad("a header of impossible size"));
        }
        let stored = get32(&sector, 16);
        let mut zeroed = sector;
        zeroed[16..20].fill(0);
        if crc32fast::hash(&zeroed[..size]) != stored || get64(&sector, 24) != 1 {
            return Err(bad("the header fails its checksum"));
        }
        if get32(&sector, 80) as usize != ENTRIES || get32(&sector, 84) as usize != ENTRY {
            return Err(Error::unsupported(
                "a partition table that is not 128 entries of 128 bytes",
            )
            .on(path)
            .at(SECTOR));
        }
        let mut table = vec![0; TABLE_BYTES];
        let at = get64(&sector, 72)
            .checked_mul(SECTOR)
            .ok_or_else(|| bad("no place"))?;
        if read_at(file, path, &mut table, at)? < table.len()
            || crc32fast::hash(&table) != get32(&sector, 88)
        {
            return Err(bad("its entries fail their checksum"));
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&sector[..HEADER_BYTES]);
        let gpt = Gpt { header, table };
        for n in 0..ENTRIES {
            let (first, last) = gpt.sectors(n);
            if gpt.used(n) && (first > last || last >= 1 << 54) {
                return Err(bad(&format!("partition {} ends before it begins", n + 1)));
            }
        }
        Ok(Some(gpt))
    }

    /// Partition `n`, counted from 0.
    pub(super) fn partition(&self, n: usize) -> Option<Partition> {
        if n >= ENTRIES || !self.used(n) {
            return None;
        }
        let (first, last) = self.sectors(n);
        Some(Partition {
            offset: first * SECTOR,
            bytes: (last + 1 - first) * SECTOR,
        })
    }

    /// True when no partition begins after partition `n`.
    pub(super) fn is_last(&self, n: usize) -> bool {
        let end = self.sectors(n).1;
        (0..ENTRIES).all(|i| i == n || !self.used(i) || self.sectors(i).0 < end)
    }

    /// True when a disk of `bytes` holds all partitions, and the backup behind them.
    pub(super) fn fits(&self, bytes: u64) -> bool {
        let end = bytes.saturating_sub(BACKUP) / SECTOR;
        (0..ENTRIES).all(|n| !self.used(n) || self.sectors(n).1 < end)
    }

    /// Makes the table one for a disk of `bytes`, which holds all partitions.
    pub(super) fn span(&mut self, bytes: u64) {
        let sectors = bytes / SECTOR;
        put64(&mut self.header, 32, sectors - 1);
        put64(&mut self.header, 48, sectors - TABLE_SECTORS - 2);
    }

    /// Bytes of the disk that the table was made for: its backup is their end.
    pub(super) fn disk_bytes(&self) -> u64 {
        get64(&self.header, 32)
            .saturating_add(1)
            .saturating_mul(SECTOR)
    }

    /// First byte of the backup: its entries, then its header.
    pub(super) fn backup_offset(&self) -> u64 {
        self.disk_bytes().saturating_sub(BACKUP)
    }

    /// Where a partition over the rest of a disk of `bytes` ends: at the last whole MiB.
    pub(super) fn last_end(bytes: u64) -> u64 {
        bytes.saturating_sub(BACKUP) / ALIGN * ALIGN
    }

    /// The smallest disk, in whole MiB, whose last partition may end at `end`.
    pub(super) fn disk_for(end: u64) -> u64 {
        end.next_multiple_of(ALIGN) + BACKUP.next_multiple_of(ALIGN)
    }

    /// Makes partition `n` end before `end`, a multiple of the sector behind its first byte.
    pub(super) fn end_at(&mut self, n: usize, end: u64) {
        put64(&mut self.table, n * ENTRY + 40, end / SECTOR - 1);
    }

    /// Makes partition `n` end at the last whole MiB; never smaller than it is.
    pub(super) fn extend(&mut self, n: usize) {
        let end = (get64(&self.header, 48) + 1) * SECTOR / ALIGN * ALIGN;
        let last = (end / SECTOR).saturating_sub(1).max(self.sectors(n).1);
        put64(&mut self.table, n * ENTRY + 40, last);
    }

    /// Writes both copies, the backup first: until the primary is there, the old one holds. The
    /// protective MBR is written around the boot code that is there.
    pub(super) fn write(&self, file: &File, path: &Path) -> Result<()> {
        let put = |bytes: &[u8], at: u64| {
            file.write_all_at(bytes, at)
                .map_err(|e| Error::io("write", path, e).at(at))
        };
        let last = get64(&self.header, 32);
        let backup_table = last - TABLE_SECTORS;
        put(&self.table, backup_table * SECTOR)?;
        put(&self.sealed(last, 1, backup_table), last * SECTOR)?;
        put(&self.table, get64(&self.header, 72) * SECTOR)?;
        put(&self.sealed(1, last, get64(&self.header, 72)), SECTOR)?;
        let mut mbr = [0; SECTOR as usize];
        let _ = read_at(file, path, &mut mbr, 0)?;
        mbr[446..].fill(0);
        mbr[447..450].copy_from_slice(&[0x00, 0x02, 0x00]);
        mbr[450] = 0xee;
        mbr[451..454].fill(0xff);
        put32(&mut mbr, 454, 1);
        put32(&mut mbr, 458, u32::try_from(last).unwrap_or(u32::MAX));
        mbr[510..].copy_from_slice(&[0x55, 0xaa]);
        put(&mbr, 0)
    }

    /// Erases the backup copy of a disk that was `bytes` long, so that nobody finds two.
    pub(super) fn erase_backup(file: &File, path: &Path, bytes: u64) -> Result<()> {
        let at = (bytes / SECTOR).saturating_sub(1) * SECTOR;
        let mut sector = [0; SECTOR as usize];
        if read_at(file, path, &mut sector, at)? == sector.len() && sector.starts_with(SIGNATURE) {
            let zeros = [0; SECTOR as usize];
            file.write_all_at(&zeros, at)
                .map_err(|e| Error::io("write", path, e).at(at))?;
        }
        Ok(())
    }

    fn sealed(&self, own: u64, other: u64, table: u64) -> [u8; SECTOR as usize] {
        let mut out = [0; SECTOR as usize];
        out[..HEADER_BYTES].copy_from_slice(&self.header);
        put32(&mut out, 12, HEADER_BYTES as u32);
        put32(&mut out, 16, 0);
        put64(&mut out, 24, own);
        put64(&mut out, 32, other);
        put64(&mut out, 72, table);
        put32(&mut out, 88, crc32fast::hash(&self.table));
        let crc = crc32fast::hash(&out[..HEADER_BYTES]);
        put32(&mut out, 16, crc);
        out
    }

    fn used(&self, n: usize) -> bool {
        self.table[n * ENTRY..n * ENTRY + 16]
            .iter()
            .any(|&b| b != 0)
    }

    fn sectors(&self, n: usize) -> (u64, u64) {
        (
            get64(&self.table, n * ENTRY + 32),
            get64(&self.table, n * ENTRY + 40),
        )
    }
}

/// Reads until `buf` is full or the file ends.
fn read_at(file: &File, path: &Path, buf: &mut [u8], at: u64) -> Result<usize> {
    let mut got = 0;
    while got < buf.len() {
        match file.read_at(&mut buf[got..], at.saturating_add(got as u64)) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", path, e).at(at)),
        }
    }
    Ok(got)
}

fn get32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn get64(b: &[u8], at: usize) -> u64 {
    u64::from(get32(b, at)) | u64::from(get32(b, at + 4)) << 32
}

fn put32(b: &mut [u8], at: usize, value: u32) {
    b[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put64(b: &mut [u8], at: usize, value: u64) {
    b[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn disk(bytes: u64) -> tempfile::NamedTempFile {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(bytes).unwrap();
        Gpt::with_one_partition(bytes)
            .unwrap()
            .write(f.as_file(), f.path())
            .unwrap();
        f
    }

    fn sgdisk(path: &Path) -> String {
        let out = std::process::Command::new("sgdisk")
            .args(["-v", "-p"])
            .arg(path)
            .output();
        let out = out.expect("sgdisk is needed: apt-get install gdisk");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(
            out.status.success() && text.contains("No problems found"),
            "{text}"
        );
        text
    }

    #[test]
    fn sgdisk_finds_no_fault_and_reading_gives_back_what_was_written() {
        let f = disk(64 * MIB);
        let text = sgdisk(f.path());
        assert!(text.contains("8300") && text.contains("root"), "{text}");
        let gpt = Gpt::read(f.as_file(), f.path()).unwrap().unwrap();
        assert_eq!(
            gpt.partition(0),
            Some(Partition {
                offset: MIB,
                bytes: 62 * MIB
            })
        );
        assert_eq!(gpt.partition(1), None);
        let before = std::fs::read(f.path()).unwrap();
        gpt.write(f.as_file(), f.path()).unwrap();
        assert!(std::fs::read(f.path()).unwrap() == before);
    }

    #[test]
    fn a_grown_table_is_one_of_the_larger_disk() {
        let f = disk(64 * MIB);
        let mut gpt = Gpt::read(f.as_file(), f.path()).unwrap().unwrap();
        f.as_file().set_len(100 * MIB + 512).unwrap();
        gpt.span(100 * MIB + 512);
        gpt.extend(0);
        gpt.write(f.as_file(), f.path()).unwrap();
        Gpt::erase_backup(f.as_file(), f.path(), 64 * MIB).unwrap();
        sgdisk(f.path());
        let gpt = Gpt::read(f.as_file(), f.path()).unwrap().unwrap();
        assert_eq!(
            gpt.partition(0),
            Some(Partition {
                offset: MIB,
                bytes: 98 * MIB
            })
        );
        let found = std::fs::read(f.path()).unwrap();
        assert_eq!(
            found
                .windows(8)
                .step_by(512)
                .filter(|w| w == SIGNATURE)
                .count(),
            2
        );
    }

    #[test]
    fn a_shrunk_table_is_one_of_the_smaller_disk() {
        for bytes in [40 * MIB, 40 * MIB + 32 * 512, 40 * MIB + 33 * 512] {
            let f = disk(64 * MIB);
            let mut gpt = Gpt::read(f.as_file(), f.path()).unwrap().unwrap();
            assert_eq!(gpt.disk_bytes(), 64 * MIB);
            gpt.span(bytes);
            let end = Gpt::last_end(bytes);
            gpt.end_at(0, end);
            gpt.write(f.as_file(), f.path()).unwrap();
            f.as_file().set_len(bytes).unwrap();
            sgdisk(f.path());
            let gpt = Gpt::read(f.as_file(), f.path()).unwrap().unwrap();
            let part = gpt.partition(0).unwrap();
            assert_eq!((part.offset, part.offset + part.bytes), (MIB, end));
            assert_eq!(gpt.disk_bytes(), bytes);
            // Nothing smaller in whole MiB would do.
            assert_eq!(Gpt::last_end(Gpt::disk_for(end)), end);
            assert!(Gpt::last_end(Gpt::disk_for(end) - MIB) < end);
        }
    }

    #[test]
    fn every_damaged_byte_of_the_primary_is_noticed() {
        let f = disk(8 * MIB);
        for at in (512..512 + HEADER_BYTES as u64).chain([1024, 1100, 17_000]) {
            let mut b = [0];
            f.as_file().read_exact_at(&mut b, at).unwrap();
            f.as_file().write_all_at(&[b[0] ^ 0x40], at).unwrap();
            let got = Gpt::read(f.as_file(), f.path());
            assert!(matches!(got, Ok(None) | Err(_)), "byte {at}");
            assert_eq!(got.is_ok(), (512..520).contains(&at), "byte {at}");
            f.as_file().write_all_at(&b, at).unwrap();
        }
        assert!(Gpt::read(f.as_file(), f.path()).unwrap().is_some());
    }

    #[test]
    fn a_table_made_by_sgdisk_keeps_its_names_and_other_partitions() {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(32 * MIB).unwrap();
        let made = std::process::Command::new("sgdisk")
            .args([
                "-n",
                "2:2048:6143",
                "-n",
                "1:8192:16383",
                "-c",
                "1:data",
                "-A",
                "1:set:2",
            ])
            .arg(f.path())
            .output()
            .expect("sgdisk is needed: apt-get install gdisk");
        assert!(made.status.success());
        let mut gpt = Gpt::read(f.as_file(), f.path()).unwrap().unwrap();
        assert!(gpt.is_last(0) && !gpt.is_last(1));
        f.as_file().set_len(64 * MIB).unwrap();
        gpt.span(64 * MIB);
        gpt.extend(0);
        gpt.write(f.as_file(), f.path()).unwrap();
        let text = sgdisk(f.path());
        assert!(text.contains("data"), "{text}");
        assert_eq!(
            gpt.partition(1),
            Some(Partition {
                offset: MIB,
                bytes: 2 * MIB
            })
        );
        assert_eq!(
            gpt.partition(0),
            Some(Partition {
                offset: 4 * MIB,
                bytes: 59 * MIB
            })
        );
    }

    #[test]
    fn too_small_a_disk_is_refused() {
        assert!(Gpt::with_one_partition(MIB).is_err());
        assert!(Gpt::with_one_partition(2 * MIB).is_err());
        assert!(Gpt::with_one_partition(3 * MIB).is_ok());
    }
}
