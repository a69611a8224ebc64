//! Checks of one ploop image: header against file, every entry, length, extension.

use std::ops::Range;

use super::used::Owners;
use super::{Finding, FindingKind, Used};
use crate::error::Result;
use crate::format::ploop::delta::{EntryFault, judge, read_header};
use crate::format::ploop::extension::{self, Extension};
use crate::format::ploop::header::{FLAG_CONVERTING, FLAG_EMPTY, HEADER_BYTES, Header};
use crate::store::{SECTOR, StoreFile, read_or_zero};

/// Findings kept of one image; more are counted only. A BAT of garbage must not fill memory.
const FINDINGS_MAX: usize = 1000;
/// BAT bytes read at a time.
const CHUNK: u64 = 256 * 1024;
/// BAT entries in one page of [`ImageScan::pages`].
pub const PAGE_ENTRIES: u64 = 1024;

/// What a scan of one image found.
#[derive(Debug)]
pub struct ImageScan {
    /// The checked header.
    pub header: Header,
    /// The file's length in bytes.
    pub file_len: u64,
    /// What is wrong, in file order; at most [`FINDINGS_MAX`] and a last one that counts the rest.
    pub findings: Vec<Finding>,
    /// File clusters in use.
    pub used: Used,
    /// Pages of 1024 BAT entries that have a non-zero one, in order.
    pub pages: Vec<u32>,
}

struct Scanner<'a> {
    file: &'a dyn StoreFile,
    scan: ImageScan,
    omitted: u64,
    /// Every good entry.
    owners: Owners,
}

/// Checks one ploop image. Never writes. An error means that the header cannot be used at all (or
/// the file not be read); everything else is a finding.
pub fn scan_image(file: &dyn StoreFile) -> Result<ImageScan> {
    let (header, file_len) = read_header(file)?;
    let scan = ImageScan {
        header,
        file_len,
        findings: vec![],
        used: Used::default(),
        pages: vec![],
    };
    let mut s = Scanner {
        file,
        scan,
        omitted: 0,
        owners: Owners::default(),
    };
    s.header_fields();
    s.entries()?;
    s.duplicates();
    s.length();
    s.extension()?;
    if s.omitted > 0 {
        let what = format!("… and {} more", s.omitted);
        let at = HEADER_BYTES;
        let path = file.path().to_path_buf();
        let kind = FindingKind::EntryBeyondEof;
        s.scan.findings.push(Finding {
            kind,
            path,
            offset: at,
            guest: None,
            what,
        });
    }
    Ok(s.scan)
}

impl Scanner<'_> {
    fn found(&mut self, kind: FindingKind, offset: u64, guest: Option<Range<u64>>, what: String) {
        if self.scan.findings.len() >= FINDINGS_MAX {
            self.omitted += 1;
            return;
        }
        let path = self.file.path().to_path_buf();
        self.scan.findings.push(Finding {
            kind,
            path,
            offset,
            guest,
            what,
        });
    }

    fn header_fields(&mut self) {
        let h = self.scan.header.clone();
        if h.dirty() {
            self.found(
                FindingKind::InUse,
                44,
                None,
                "the image was not closed cleanly".into(),
            );
        }
        if h.flags & FLAG_CONVERTING != 0 {
            let what = "a conversion between v1 and v2 was interrupted".into();
            self.found(FindingKind::ConversionInterrupted, 52, None, what);
        }
        let unknown = h.flags & !(FLAG_EMPTY | FLAG_CONVERTING);
        if unknown != 0 {
            let what = format!("header flags {unknown:#x} are not defined");
            self.found(FindingKind::UnknownFlags, 52, None, what);
        }
        if u64::from(h.entries) != h.clusters() {
            let what = format!(
                "the BAT has {} entries, a disk of {} sectors needs {}",
                h.entries,
                h.size_sectors,
                h.clusters()
            );
            self.found(FindingKind::EntryCountMismatch, 32, None, what);
        }
    }

    /// Every non-zero slot up to the data area, those past the last entry included.
    fn entries(&mut self) -> Result<()> {
        let end = self.scan.header.data_start;
        let mut at = HEADER_BYTES;
        let mut buf = vec![0u8; CHUNK as usize];
        while let Some(data) = self.file.next_data(at, end)? {
            let mut from = data.start.max(HEADER_BYTES) & !3;
            while from < data.end {
                let n = (data.end - from).min(CHUNK) as usize;
                read_or_zero(self.file, &mut buf[..n], from)?;
                for (i, raw) in buf[..n].chunks_exact(4).enumerate() {
                    let entry = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                    if entry != 0 {
                        self.entry((from - HEADER_BYTES) / 4 + i as u64, entry);
                    }
                }
                from += n as u64;
            }
            at = data.end.max(at + 4);
        }
        Ok(())
    }

    fn entry(&mut self, slot: u64, entry: u32) {
        let at = Header::slot_offset(slot);
        let h = &self.scan.header;
        let cluster = h.cluster_bytes();
        if slot >= h.clusters().min(u64::from(h.entries)) {
            let what = format!("BAT slot {slot}, past the last entry, is {entry:#x}, must be 0");
            return self.found(FindingKind::SlotPastEnd, at, None, what);
        }
        let guest = slot * cluster..(slot * cluster + cluster).min(h.size());
        let offset = match judge(h, self.scan.file_len, slot, entry) {
            Ok(offset) => offset,
            Err(fault) => {
                let kind = match fault {
                    EntryFault::InMetadata => FindingKind::EntryInMetadata,
                    EntryFault::Misaligned => FindingKind::MisalignedEntry,
                    EntryFault::BeyondEof => FindingKind::EntryBeyondEof,
                    EntryFault::Truncated => FindingKind::ClusterTruncated,
                };
                let what = format!(
                    "BAT entry {slot} is {entry:#x} (file offset {}): {}",
                    h.entry_offset(entry),
                    kind.name()
                );
                return self.found(kind, at, Some(guest), what);
            }
        };
        let number = (offset - h.data_start) / cluster;
        // Both fit: `judge` bounded the cluster by an entry of 32 bits, and slots by `entries`.
        self.owners.add(number as u32, slot as u32);
        let page = (slot / PAGE_ENTRIES) as u32;
        // Slots come in order: the page is new, or the last one.
        if self.scan.pages.last() != Some(&page) {
            self.scan.pages.push(page);
        }
    }

    fn duplicates(&mut self) {
        let mut pairs = Vec::new();
        let mut more = 0;
        let owners = std::mem::take(&mut self.owners);
        self.scan.used = owners.finish(&mut |first, second| match pairs.len() {
            FINDINGS_MAX.. => more += 1,
            _ => pairs.push((first, second)),
        });
        self.omitted += more;
        let cluster = self.scan.header.cluster_bytes();
        for (first, second) in pairs {
            let slot = u64::from(second);
            let what = format!("BAT entries {first} and {second} name the same file cluster");
            let guest = slot * cluster..(slot + 1) * cluster;
            let at = Header::slot_offset(slot);
            self.found(FindingKind::DuplicateEntry, at, Some(guest), what);
        }
    }

    fn length(&mut self) {
        let h = &self.scan.header;
        let cluster = h.cluster_bytes();
        let len = self.scan.file_len;
        let data = len.saturating_sub(h.data_start);
        // Clusters of a valid extension belong to nobody's entry, and are no leak.
        let extension = extension::in_force(h) && h.extension_sector * SECTOR < len;
        let used = self.scan.used.end();
        let whole = data / cluster;
        let used_end = h.data_start + used * cluster;
        let held = self.scan.used.count();
        if !data.is_multiple_of(cluster) && used_end < len {
            let what = format!("the file's length of {len} bytes is no multiple of the cluster");
            self.found(FindingKind::LengthMisaligned, len, None, what);
        }
        if extension {
            return;
        }
        if whole > used {
            let what = format!("{} clusters behind the last one in use", whole - used);
            self.found(FindingKind::LeakedTail, used_end, None, what);
        }
        if used > held {
            let what = format!(
                "{} clusters inside the file that no entry names",
                used - held
            );
            let at = self.scan.header.data_start;
            self.found(FindingKind::UnreferencedClusters, at, None, what);
        }
    }

    fn extension(&mut self) -> Result<()> {
        let h = self.scan.header.clone();
        if !extension::in_force(&h) {
            return Ok(());
        }
        let at = h.extension_sector.saturating_mul(SECTOR);
        match extension::read(self.file, &h, self.scan.file_len)? {
            Extension::Outside => {
                let what = format!("the format extension at byte {at} is outside the data area");
                self.found(FindingKind::ExtensionDangling, 56, None, what);
            }
            Extension::NoMagic => {
                let owned = self
                    .scan
                    .used
                    .contains((at - h.data_start) / h.cluster_bytes());
                let (kind, what) = if owned {
                    (
                        FindingKind::ExtensionOverlapsData,
                        "the extension's cluster holds guest data",
                    )
                } else {
                    (
                        FindingKind::ExtensionMagic,
                        "the format extension has a wrong magic",
                    )
                };
                self.found(kind, 56, None, what.into());
            }
            Extension::Sections(sections) => {
                if self
                    .scan
                    .used
                    .contains((at - h.data_start) / h.cluster_bytes())
                {
                    let what = "a BAT entry names the cluster of the format extension".into();
                    self.found(FindingKind::ExtensionOverlapsData, 56, None, what);
                }
                for s in sections.iter().filter(|s| s.forbids_writing()) {
                    let what = format!(
                        "format extension feature {:#018x} (flags {:#x}) is not known here and must \
                         be kept",
                        s.magic, s.flags
                    );
                    self.found(FindingKind::UnknownFeature, s.offset, None, what);
                }
            }
        }
        Ok(())
    }
}
