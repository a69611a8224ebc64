//! The format extension of one image.
//!
//! ```text
//!  extension_found    what writing must know: is it there, may it be dropped       (every open)
//!  extension_content  MD5, sections, bitmap and its clusters                       (fsck)
//! ```
//!
//! Reading a disk needs none of it: nothing found here makes an image unreadable. Memory: the
//! clusters that the bitmap names, no more than the file has.

use super::image::Scanner;
use super::{Class, FindingKind, class_of};
use crate::error::Result;
use crate::format::ploop::extension::{
    self, BITMAP_HEAD, BITMAP_WORDS, BitmapHead, Extension, FEATURE_DIRTY_BITMAP, SECTION_HEAD,
    SECTIONS_AT, SectionHead,
};
use crate::store::{SECTOR, read_or_zero};

/// Table bytes read at a time.
const CHUNK: u64 = 64 * 1024;

impl Scanner<'_> {
    /// Notes what is at the place that the header names.
    pub(super) fn extension_found(&mut self) -> Result<()> {
        let h = self.scan.header.clone();
        if !extension::in_force(&h) {
            return Ok(());
        }
        let at = h.extension_sector.saturating_mul(SECTOR);
        let number = at / h.cluster_bytes();
        match extension::read(self.file, &h, self.scan.file_len)? {
            Extension::Outside => {
                let what = format!("the format extension at byte {at} is outside the data area");
                self.found(FindingKind::ExtensionDangling, 56, None, None, what);
            }
            Extension::NoMagic => {
                let (kind, what) = match self.holds_data(at) {
                    true => (
                        FindingKind::ExtensionOverlapsData,
                        "the extension's cluster holds guest data",
                    ),
                    false => (
                        FindingKind::ExtensionMagic,
                        "the format extension has a wrong magic",
                    ),
                };
                self.found(kind, 56, Some(number), None, what.into());
            }
            Extension::Sections(sections) => {
                if self.holds_data(at) {
                    let what = "a BAT entry names the cluster of the format extension".into();
                    let kind = FindingKind::ExtensionOverlapsData;
                    self.found(kind, 56, Some(number), None, what);
                }
                for s in sections.iter().filter(|s| s.forbids_writing()) {
                    let what = format!(
                        "format extension feature {:#018x} (flags {:#x}) is not known here and must \
                         be kept",
                        s.magic, s.flags
                    );
                    let kind = FindingKind::UnknownFeature;
                    self.found(kind, s.offset, Some(number), None, what);
                }
            }
        }
        Ok(())
    }

    /// True when an entry names a cluster that has a byte of the one at file byte `at`, which is in
    /// the data area.
    fn holds_data(&self, at: u64) -> bool {
        let h = &self.scan.header;
        let cluster = h.cluster_bytes();
        let first = (at - h.data_start) / cluster;
        let off_grid = !(at - h.data_start).is_multiple_of(cluster);
        self.scan.used.contains(first) || off_grid && self.scan.used.contains(first + 1)
    }

    /// Checks all of the extension. Gives its clusters, counted from the data area's start, when it
    /// is sound.
    pub(super) fn extension_content(&mut self) -> Result<Option<Vec<u32>>> {
        let h = self.scan.header.clone();
        let cluster = h.cluster_bytes();
        let len = self.scan.file_len;
        if h.extension_sector == 0 {
            return Ok(None);
        }
        let at = h.extension_sector.saturating_mul(SECTOR);
        let inside = at >= h.data_start && at < len;
        if !extension::in_force(&h) {
            let place = match inside {
                true => "",
                false => ", which is not in the data area",
            };
            let what = format!(
                "the header names a format extension at byte {at}{place}, and says that it is not \
                 in force"
            );
            self.found(FindingKind::ExtensionStale, 56, None, None, what);
            return Ok(None);
        }
        if !inside {
            return Ok(None);
        }
        let number = Some(at / cluster);
        if at.saturating_add(cluster) > len {
            let what = format!("the end of the file cuts the format extension at byte {at}");
            self.found(FindingKind::ExtensionDangling, 56, number, None, what);
            return Ok(None);
        }
        if !extension::has_magic(self.file, at)? {
            return Ok(None);
        }
        if !extension::sum_is_right(self.file, at, cluster)? {
            let what = "the format extension's MD5 is not that of its content".into();
            let kind = FindingKind::ExtensionChecksum;
            self.found(kind, at + 8, number, None, what);
            return Ok(None);
        }
        let mut held = vec![at];
        let before = self.scan.findings.len();
        self.sections(at, &mut held)?;
        let clusters = self.private(held);
        let new = self.scan.findings.get(before..).unwrap_or_default();
        Ok(Some(clusters).filter(|_| class_of(new) == Class::Clean))
    }

    fn sections(&mut self, at: u64, held: &mut Vec<u64>) -> Result<()> {
        let cluster = self.scan.header.cluster_bytes();
        let number = Some(at / cluster);
        let mut next = SECTIONS_AT;
        while next + SECTION_HEAD <= cluster {
            let mut raw = [0; SECTION_HEAD as usize];
            read_or_zero(self.file, &mut raw, at + next)?;
            let head = SectionHead::parse(&raw);
            if head.magic == 0 {
                break;
            }
            let data = next + SECTION_HEAD;
            let bytes = u64::from(head.bytes);
            let short = head.magic == FEATURE_DIRTY_BITMAP && bytes < BITMAP_HEAD;
            if data + bytes > cluster || short {
                let what = format!(
                    "feature {:#018x} has {bytes} bytes at byte {data} of the extension's cluster \
                     of {cluster}",
                    head.magic
                );
                let kind = FindingKind::ExtensionSectionLength;
                self.found(kind, at + next + 16, number, None, what);
                break;
            }
            if head.magic == FEATURE_DIRTY_BITMAP {
                self.bitmap(at + data, bytes, held)?;
            } else if !head.forbids_writing() {
                let what = format!(
                    "format extension feature {:#018x} is not known here, and may be dropped",
                    head.magic
                );
                let kind = FindingKind::DroppableFeature;
                self.found(kind, at + next, number, None, what);
            }
            next = (data + bytes).next_multiple_of(8);
        }
        Ok(())
    }

    /// The bitmap whose section has `bytes` bytes at file byte `at`.
    fn bitmap(&mut self, at: u64, bytes: u64, held: &mut Vec<u64>) -> Result<()> {
        let h = self.scan.header.clone();
        let cluster = h.cluster_bytes();
        let number = Some(at / cluster);
        let mut raw = [0; BITMAP_HEAD as usize];
        read_or_zero(self.file, &mut raw, at)?;
        let head = BitmapHead::parse(&raw);
        if head.size_sectors != h.size_sectors {
            let what = format!(
                "the bitmap is of {} sectors, the disk has {}",
                head.size_sectors, h.size_sectors
            );
            let kind = FindingKind::ExtensionSizeMismatch;
            self.found(kind, at, number, None, what);
        }
        let granule = u64::from(head.granularity);
        if !granule.is_power_of_two() {
            let what = format!("a bit of the bitmap stands for {granule} sectors, no power of two");
            let kind = FindingKind::ExtensionGranularity;
            self.found(kind, at + 24, number, None, what);
            return Ok(());
        }
        let bits = h.size_sectors.div_ceil(granule);
        let needed = bits.div_ceil(8).div_ceil(cluster);
        let count = u64::from(head.entries);
        if count == 0 && needed != 0 {
            let what = "the bitmap has no table: OpenVZ's tool writes that for an empty one".into();
            let kind = FindingKind::ExtensionBitmapEmpty;
            self.found(kind, at + 28, number, None, what);
            // No damage: its cluster is its own all the same.
        } else if count != needed || BITMAP_HEAD + 8 * count > bytes {
            let what = format!(
                "the bitmap's table has {count} entries in {bytes} bytes, the disk needs {needed}"
            );
            let kind = FindingKind::ExtensionBitmapCount;
            self.found(kind, at + 28, number, None, what);
            return Ok(());
        }
        self.pointers(at + BITMAP_HEAD, count, held)
    }

    /// The `count` table entries at file byte `at`, which lie in one cluster.
    fn pointers(&mut self, at: u64, count: u64, held: &mut Vec<u64>) -> Result<()> {
        let h = self.scan.header.clone();
        let cluster = h.cluster_bytes();
        // More than the file has clusters are named twice, which the first of them shows.
        let most = (self.scan.file_len / cluster + 2) as usize;
        let mut buf = vec![0; CHUNK.min(8 * count) as usize];
        let mut next = at;
        while next < at + 8 * count {
            let n = (at + 8 * count - next).min(CHUNK) as usize;
            read_or_zero(self.file, &mut buf[..n], next)?;
            for (i, word) in buf[..n].chunks_exact(8).enumerate() {
                let sector = extension::word(word);
                if BITMAP_WORDS.contains(&sector) {
                    continue;
                }
                let to = sector.checked_mul(SECTOR).filter(|&to| {
                    to >= h.data_start
                        && (to - h.data_start).is_multiple_of(cluster)
                        && to.saturating_add(cluster) <= self.scan.file_len
                });
                match to {
                    Some(to) if held.len() < most => held.push(to),
                    Some(_) => {}
                    None => {
                        let what = format!(
                            "a part of the bitmap is at sector {sector}, where the file has no \
                             cluster"
                        );
                        let kind = FindingKind::ExtensionBitmapOutOfBounds;
                        self.found(kind, next + 8 * i as u64, None, None, what);
                    }
                }
            }
            next += n as u64;
        }
        Ok(())
    }

    /// The clusters at the file bytes `held`; finds those that something else holds, too.
    fn private(&mut self, mut held: Vec<u64>) -> Vec<u32> {
        let h = self.scan.header.clone();
        let cluster = h.cluster_bytes();
        let kind = FindingKind::ExtensionOverlapsData;
        // The first is the extension itself: what it lies on was found at opening already.
        let own = held[0];
        held.sort_unstable();
        let mut out: Vec<u32> = Vec::with_capacity(held.len() + 1);
        let mut before = None;
        for at in held {
            let number = Some(at / cluster);
            if before.is_some_and(|b: u64| at - b < cluster) {
                let what = "two parts of the format extension are in one cluster".into();
                self.found(kind, at, number, None, what);
            }
            before = Some(at);
            if at != own && self.holds_data(at) {
                let what = "a BAT entry names a cluster of the change-tracking bitmap".into();
                self.found(kind, at, number, None, what);
            }
            let first = (at - h.data_start) / cluster;
            let last = (at + cluster - 1 - h.data_start) / cluster;
            out.extend((first..=last).filter_map(|c| u32::try_from(c).ok()));
        }
        out
    }
}
