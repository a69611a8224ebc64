//! Checks of one ploop image: header against file, every entry, length, extension.

use std::collections::HashMap;
use std::ops::Range;

use super::used::Owners;
use super::{Finding, FindingKind, Used};
use crate::error::Result;
use crate::format::ploop::delta::{EntryFault, judge, read_header};
use crate::format::ploop::extension;
use crate::format::ploop::header::{
    CLUSTER_SECTORS_OPENVZ, FLAG_CONVERTING, FLAG_EMPTY, HEADER_BYTES, Header,
};
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

pub(super) struct Scanner<'a> {
    pub(super) file: &'a dyn StoreFile,
    pub(super) scan: ImageScan,
    /// Findings of a kind that were counted only.
    omitted: Vec<(FindingKind, u64)>,
    /// Every good entry.
    owners: Owners,
}

/// Checks one ploop image as far as reading and writing its disk needs. Never writes. An error means
/// that the header cannot be used at all (or the file not be read); everything else is a finding.
pub fn scan_image(file: &dyn StoreFile) -> Result<ImageScan> {
    let mut s = Scanner::entries_of(file)?;
    s.extension_found()?;
    s.length(None);
    Ok(s.finish())
}

/// Checks all of one ploop image: what [`scan_image`] does, and the whole of its extension.
pub fn check_image(file: &dyn StoreFile) -> Result<ImageScan> {
    let mut s = Scanner::entries_of(file)?;
    s.header_notes();
    s.extension_found()?;
    let held = s.extension_content()?;
    s.length(held.as_deref());
    Ok(s.finish())
}

/// The bytes of the file that the image's extension has, a cluster each; `None` unless it is in force
/// and sound. Reads the BAT, and the extension's clusters but for bits.
pub fn sound_extension(file: &dyn StoreFile) -> Result<Option<Vec<Range<u64>>>> {
    let mut s = Scanner::entries_of(file)?;
    let before = s.scan.findings.len();
    s.extension_found()?;
    // What else is in it, and may not be dropped, says nothing against the rest.
    let mut found = s.scan.findings.iter().skip(before);
    let overlaps = found.any(|f| f.kind != FindingKind::UnknownFeature);
    let clusters = s.extension_content()?.filter(|_| !overlaps);
    let (start, bytes) = (s.scan.header.data_start, s.scan.header.cluster_bytes());
    let place = |cluster: u32| {
        let at = start + u64::from(cluster) * bytes;
        at..at + bytes
    };
    Ok(clusters.map(|all| all.into_iter().map(place).collect()))
}

impl Scanner<'_> {
    fn entries_of(file: &dyn StoreFile) -> Result<Scanner<'_>> {
        let (header, file_len) = read_header(file)?;
        let data = file_len.saturating_sub(header.data_start);
        let owners = Owners::below(data.div_ceil(header.cluster_bytes()));
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
            omitted: vec![],
            owners,
        };
        s.header_fields();
        let end = s.scan.header.data_start;
        slots(file, HEADER_BYTES..end, &mut |slot, entry| {
            s.entry(slot, entry)
        })?;
        s.duplicates()?;
        Ok(s)
    }

    fn finish(mut self) -> ImageScan {
        for (kind, count) in std::mem::take(&mut self.omitted) {
            self.scan.findings.push(Finding {
                kind,
                path: self.file.path().to_path_buf(),
                offset: HEADER_BYTES,
                cluster: None,
                guest: None,
                what: format!("… and {count} more"),
            });
        }
        self.scan
    }

    /// Takes a finding; `cluster` counts from the file's first byte.
    pub(super) fn found(
        &mut self,
        kind: FindingKind,
        offset: u64,
        cluster: Option<u64>,
        guest: Option<Range<u64>>,
        what: String,
    ) {
        if self.scan.findings.len() >= FINDINGS_MAX {
            return self.omit(kind, 1);
        }
        let path = self.file.path().to_path_buf();
        self.scan.findings.push(Finding {
            kind,
            path,
            offset,
            cluster,
            guest,
            what,
        });
    }

    fn omit(&mut self, kind: FindingKind, count: u64) {
        match self.omitted.iter_mut().find(|(k, _)| *k == kind) {
            Some((_, n)) => *n += count,
            None => self.omitted.push((kind, count)),
        }
    }

    fn header_fields(&mut self) {
        let h = self.scan.header.clone();
        if h.dirty() {
            self.found(
                FindingKind::InUse,
                44,
                None,
                None,
                "the image was not closed cleanly".into(),
            );
        }
        if h.flags & FLAG_CONVERTING != 0 {
            let what = "a conversion between v1 and v2 was interrupted".into();
            self.found(FindingKind::ConversionInterrupted, 52, None, None, what);
        }
        let unknown = h.flags & !(FLAG_EMPTY | FLAG_CONVERTING);
        if unknown != 0 {
            let what = format!("header flags {unknown:#x} are not defined");
            self.found(FindingKind::UnknownFlags, 52, None, None, what);
        }
        if u64::from(h.entries) != h.clusters() {
            let what = format!(
                "the BAT has {} entries, a disk of {} sectors needs {}",
                h.entries,
                h.size_sectors,
                h.clusters()
            );
            self.found(FindingKind::EntryCountMismatch, 32, None, None, what);
        }
    }

    /// What no reader minds, and some other program does.
    fn header_notes(&mut self) {
        let h = &self.scan.header;
        let cluster = h.cluster_bytes();
        let least = (HEADER_BYTES + 4 * u64::from(h.entries)).next_multiple_of(cluster);
        if h.data_start > least {
            let what = format!(
                "the data area begins at byte {}, header and BAT need {least}",
                h.data_start
            );
            self.found(FindingKind::DataOffsetGap, 48, None, None, what);
        }
        let h = &self.scan.header;
        let sectors = h.cluster_sectors;
        let (at, what) = if !sectors.is_power_of_two() || !CLUSTER_SECTORS_OPENVZ.contains(&sectors)
        {
            (28, format!("clusters of {sectors} sectors"))
        } else if !h.data_start.is_multiple_of(cluster) {
            (
                48,
                format!("a data area at byte {}, off the cluster grid", h.data_start),
            )
        } else if !h.size().is_multiple_of(cluster) {
            (
                36,
                format!("{} sectors, no multiple of the cluster", h.size_sectors),
            )
        } else {
            return;
        };
        self.found(FindingKind::ForeignGeometry, at, None, None, what);
    }

    fn entry(&mut self, slot: u64, entry: u32) {
        let at = Header::slot_offset(slot);
        let h = &self.scan.header;
        let cluster = h.cluster_bytes();
        if slot >= h.clusters().min(u64::from(h.entries)) {
            let what = format!("BAT slot {slot}, past the last entry, is {entry:#x}, must be 0");
            return self.found(FindingKind::SlotPastEnd, at, None, None, what);
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
                let named = h.entry_offset(entry) / cluster;
                return self.found(kind, at, Some(named), Some(guest), what);
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

    fn duplicates(&mut self) -> Result<()> {
        let mut pairs = Vec::new();
        let mut more = 0;
        let owners = std::mem::take(&mut self.owners);
        self.scan.used = owners.finish(&mut |cluster, first, second| match pairs.len() {
            FINDINGS_MAX.. => more += 1,
            _ => pairs.push((cluster, first, second)),
        });
        let h = self.scan.header.clone();
        let cluster = h.cluster_bytes();
        let unknown = pairs.iter().filter(|(_, first, _)| first.is_none());
        let mut firsts: HashMap<u32, u32> = unknown.map(|&(n, _, _)| (n, u32::MAX)).collect();
        if !firsts.is_empty() {
            slots(self.file, HEADER_BYTES..h.data_start, &mut |slot, entry| {
                let at = h.entry_offset(entry).checked_sub(h.data_start);
                let number = at.and_then(|at| u32::try_from(at / cluster).ok());
                if let (Some(number), Ok(slot)) = (number, u32::try_from(slot))
                    && let Some(first) = firsts.get_mut(&number)
                {
                    *first = slot.min(*first);
                }
            })?;
        }
        for (number, first, second) in pairs {
            let first = first
                .or_else(|| firsts.get(&number).copied())
                .unwrap_or(second);
            let slot = u64::from(second);
            let what = format!("BAT entries {first} and {second} name the same file cluster");
            let guest = slot * cluster..((slot + 1) * cluster).min(h.size());
            let at = Header::slot_offset(slot);
            let named = h.data_start / cluster + u64::from(number);
            let kind = FindingKind::DuplicateEntry;
            self.found(kind, at, Some(named), Some(guest), what);
        }
        if more > 0 {
            self.omit(FindingKind::DuplicateEntry, more);
        }
        Ok(())
    }

    /// `held` are the clusters of a sound extension, where that is known.
    fn length(&mut self, held: Option<&[u32]>) {
        let h = &self.scan.header;
        let cluster = h.cluster_bytes();
        let len = self.scan.file_len;
        let data = len.saturating_sub(h.data_start);
        // Clusters of a valid extension belong to nobody's entry, and are no leak.
        let unknown = held.is_none()
            && extension::in_force(h)
            && h.extension_sector.saturating_mul(SECTOR) < len;
        let with = held.map(|held| self.scan.used.with(held));
        let used = with.as_ref().unwrap_or(&self.scan.used);
        let (end, count) = (used.end(), used.count());
        let used_end = h.data_start + end * cluster;
        let first = h.data_start / cluster;
        let whole = data / cluster;
        if !data.is_multiple_of(cluster) && used_end < len {
            let what = format!("the file's length of {len} bytes is no multiple of the cluster");
            let at = Some(first + whole);
            self.found(FindingKind::LengthMisaligned, len, at, None, what);
        }
        if unknown {
            return;
        }
        if whole > end {
            let what = format!("{} clusters behind the last one in use", whole - end);
            let at = Some(first + end);
            self.found(FindingKind::LeakedTail, used_end, at, None, what);
        }
        if end > count {
            let what = format!(
                "{} clusters inside the file that no entry names",
                end - count
            );
            let at = self.scan.header.data_start;
            self.found(FindingKind::UnreferencedClusters, at, None, None, what);
        }
    }
}

/// Calls `each` with slot and value of every slot in the file bytes `range` (whole slots, behind the
/// header) that is not zero. Holes are not read; what lies behind the end of the file is zeros.
pub fn slots(
    file: &dyn StoreFile,
    range: Range<u64>,
    each: &mut dyn FnMut(u64, u32),
) -> Result<()> {
    let (mut at, end) = (range.start, range.end);
    let mut buf = vec![0u8; CHUNK as usize];
    while at < end
        && let Some(data) = file.next_data(at, end)?
    {
        // Holes need not begin or end with an entry.
        let mut from = data.start.max(HEADER_BYTES) & !3;
        let to = data.end.next_multiple_of(4).min(end);
        while from < to {
            let n = (to - from).min(CHUNK) as usize;
            read_or_zero(file, &mut buf[..n], from)?;
            for (i, raw) in buf[..n].chunks_exact(4).enumerate() {
                let entry = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                if entry != 0 {
                    each((from - HEADER_BYTES) / 4 + i as u64, entry);
                }
            }
            from += n as u64;
        }
        at = to.max(at + 4);
    }
    Ok(())
}
