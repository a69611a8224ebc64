//! Reading a journal, and judging whether it explains the image.

use std::collections::{BTreeMap, HashSet};

use super::record::{HEAD, HeaderBytes, Items, LoggedPart, claimed_len, decode, part_bytes};
use super::{Home, NEW, TAIL};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::delta::judge;
use crate::format::ploop::header::{HEADER_BYTES, Header};
use crate::format::ploop::parts::{self, GRANULE, Part};
use crate::store::{Access, SECTOR, StoreFile, read_exact, read_or_zero};
use crate::verify::{ImageScan, PAGE_ENTRIES};

/// Bytes of a journal that are in no proportion to the image: heads of records, zeros ahead.
const SLACK: u64 = 4 << 20;
/// Bytes looked at at a time, behind the last record.
const CHUNK: u64 = 256 * 1024;

/// What a journal says.
#[derive(Debug)]
pub struct Log {
    header: HeaderBytes,
    sums: Vec<(u32, u32)>,
    /// Slots whose cluster is complete in the file, and their entries.
    pub entries: BTreeMap<u32, u32>,
    /// Clusters in parts, by slot; none that is among the entries.
    pub parts: BTreeMap<u32, LoggedPart>,
    cluster: u64,
    /// Guest clusters that the image has entries for.
    slots: u64,
}

/// What is to be made of an image's map.
#[derive(Debug, Default)]
pub struct Replay {
    /// Slots that have no entry on disk, and the one that they get.
    pub entries: BTreeMap<u32, u32>,
    /// Clusters in parts. What is not present of them may hold anything.
    pub parts: BTreeMap<u32, Part>,
    /// Every slot that the journal names.
    pub slots: Vec<u32>,
    /// The file clusters that only the journal names.
    pub claimed: Vec<u32>,
}

/// The journal at `home` of an image with `header`, whether or not it explains the image; `None`
/// where there is none. Error: `Corrupt` for one that is damaged.
pub fn read(home: &Home, header: &Header) -> Result<Option<Log>> {
    match home.store.open(&home.path, Access::Read) {
        Ok(journal) => Log::read(journal.as_ref(), header),
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// What the journal of the image that `file` is adds to it; `None` where there is none. Errors:
/// `Corrupt` for one that is damaged, or that does not explain the image. Writes nothing.
pub fn find(home: &Home, file: &dyn StoreFile, scan: &ImageScan) -> Result<Option<Replay>> {
    let way_out = || {
        format!(
            "`ploop check` shows what the journal holds. To give that up and keep the image as it \
             is, remove {}",
            home.path.display()
        )
    };
    let log = read(home, &scan.header).map_err(|e| match e.kind() {
        Kind::Corrupt => e.fix(way_out()),
        _ => e,
    })?;
    let Some(log) = log else {
        return Ok(None);
    };
    log.explain(file, scan).map(Some).map_err(|e| {
        if e.kind() != Kind::Corrupt {
            return e;
        }
        let what = format!(
            "{}; its journal, with {} clusters that were flushed, was not replayed",
            e.what(),
            log.clusters().count()
        );
        let refused = Error::corrupt(what).on(file.path()).fix(way_out());
        match e.offset() {
            Some(at) => refused.at(at),
            None => refused,
        }
    })
}

/// Checksums of the pages of a BAT that are not all zeros, with `masked` slots (ascending) taken
/// for 0.
pub(super) fn sums(
    file: &dyn StoreFile,
    header: &Header,
    masked: &[u32],
) -> Result<Vec<(u32, u32)>> {
    let end = Header::slot_offset(u64::from(header.entries));
    let page_bytes = PAGE_ENTRIES * 4;
    let mut out = Vec::new();
    let mut bytes = vec![0; page_bytes as usize];
    let mut at = HEADER_BYTES;
    while at < end
        && let Some(data) = file.next_data(at, end)?
    {
        let page = (data.start.max(HEADER_BYTES) - HEADER_BYTES) / page_bytes;
        let start = HEADER_BYTES + page * page_bytes;
        let stop = (start + page_bytes).min(end);
        let here = &mut bytes[..(stop - start) as usize];
        read_or_zero(file, here, start)?;
        let (first, last) = (page * PAGE_ENTRIES, (page + 1) * PAGE_ENTRIES);
        let from = masked.partition_point(|&s| u64::from(s) < first);
        for &slot in masked[from..].iter().take_while(|&&s| u64::from(s) < last) {
            let at = (u64::from(slot) - first) as usize * 4;
            here[at..at + 4].fill(0);
        }
        if here.iter().any(|&b| b != 0) {
            // Entries are counted in 32 bits, and so are pages of them.
            out.push((page as u32, crc32fast::hash(here)));
        }
        at = stop;
    }
    Ok(out)
}

impl Log {
    /// Reads the journal of an image with `header`; `None` for one that has ended.
    pub fn read(file: &dyn StoreFile, header: &Header) -> Result<Option<Log>> {
        let damaged = |what: String| Error::corrupt(what).on(file.path());
        let len = file.len()?;
        if len > longest(header) {
            return Err(damaged(format!("a journal of {len} bytes is none of ours")));
        }
        let granules = header.cluster_bytes() / GRANULE;
        let mut log: Option<Log> = None;
        let mut sums_left = 0;
        let (mut at, mut number, mut group, mut nonce) = (0, 0, 0, [0; 16]);
        while let Some((tag, items, next)) = record_at(file, at, len, granules)? {
            let first = log.is_none();
            if !first && tag.nonce != nonce || tag.number != number {
                break;
            }
            match (items, &mut log) {
                (Items::End, None) => return Ok(None),
                (
                    Items::Base {
                        header: bytes,
                        sums,
                    },
                    None,
                ) => {
                    nonce = tag.nonce;
                    sums_left = sums;
                    log = Some(Log {
                        header: bytes,
                        sums: Vec::new(),
                        entries: BTreeMap::new(),
                        parts: BTreeMap::new(),
                        cluster: header.cluster_bytes(),
                        slots: u64::from(header.entries).min(header.clusters()),
                    });
                }
                (Items::Sums(sums), Some(log)) if sums_left > 0 => {
                    sums_left -= 1;
                    log.sums.extend(sums);
                }
                (Items::Entries(entries), Some(log)) if sums_left == 0 => {
                    log.add_entries(entries)
                        .map_err(|what| damaged(what).at(at))?;
                }
                (Items::Parts(parts), Some(log)) if sums_left == 0 => {
                    log.add_parts(parts).map_err(|what| damaged(what).at(at))?;
                }
                _ => return Err(damaged("its records are out of order".into()).at(at)),
            }
            (at, number, group) = (next, number + 1, tag.group);
        }
        let Some(log) = log.filter(|_| sums_left == 0) else {
            return Err(damaged("the journal does not begin with a whole base".into()).at(at));
        };
        // The last flush may have left any of its records. One of a flush after it says that this
        // one was answered.
        if let Some(later) = later_group(file, at, len, granules, &nonce)?
            && later.saturating_sub(group) > 1
        {
            let what = format!("record {number} is damaged, and records follow it");
            return Err(damaged(what).at(at));
        }
        Ok(Some(log))
    }

    fn add_entries(&mut self, entries: Vec<(u32, u32)>) -> Result<(), String> {
        for (slot, entry) in entries {
            self.refuse_slot(slot)?;
            let before = self.parts.remove(&slot).map(|p| p.entry);
            let before = before.or_else(|| self.entries.get(&slot).copied());
            if entry == 0 || before.is_some_and(|b| b != entry) {
                return Err(format!("cluster {slot} is in two places"));
            }
            self.entries.insert(slot, entry);
        }
        Ok(())
    }

    fn refuse_slot(&self, slot: u32) -> Result<(), String> {
        match u64::from(slot) < self.slots {
            true => Ok(()),
            false => Err(format!("it names cluster {slot}, past the end of the disk")),
        }
    }

    fn add_parts(&mut self, parts: Vec<LoggedPart>) -> Result<(), String> {
        if !self.cluster.is_multiple_of(GRANULE) {
            return Err("clusters of this size are never in parts".into());
        }
        for part in parts {
            self.refuse_slot(part.slot)?;
            let before = self.parts.get(&part.slot).map(|p| p.entry);
            if part.entry == 0
                || self.entries.contains_key(&part.slot)
                || before.is_some_and(|b| b != part.entry)
            {
                return Err(format!("cluster {} is in two places", part.slot));
            }
            self.parts.insert(part.slot, part);
        }
        // Room for those that writers began while others were completed.
        match self.parts.len() > 2 * parts::most(self.cluster) {
            true => Err("it names more clusters in parts than an image may have".into()),
            false => Ok(()),
        }
    }

    /// The slots that it names, ascending, and for each the entry that it may have on disk.
    fn named(&self) -> Vec<(u32, u32)> {
        let parts = self.parts.values().map(|p| (p.slot, p.entry));
        let mut named: Vec<_> = self.entries.iter().map(|(s, e)| (*s, *e)).collect();
        named.extend(parts);
        named.sort_unstable();
        named
    }

    /// The clusters of the disk that it names, ascending, and how many bytes of each are in the
    /// image's file.
    pub fn clusters(&self) -> impl Iterator<Item = (u64, u64)> {
        let bytes = |slot: u32| match self.parts.get(&slot) {
            Some(part) => part.present.count_set() * GRANULE,
            None => self.cluster,
        };
        let slots = self.named().into_iter().map(|(slot, _)| slot);
        slots.map(move |s| (u64::from(s), bytes(s)))
    }

    /// Whether the image is as this journal's writer left it, and what is to be replayed. Error:
    /// `Corrupt`, saying what another program changed.
    pub fn explain(&self, file: &dyn StoreFile, scan: &ImageScan) -> Result<Replay> {
        let changed = |what: String| Error::corrupt(format!("another program {what}"));
        let mut header = [0; HEADER_BYTES as usize];
        read_exact(file, &mut header, 0)?;
        if header != self.header {
            let what = match scan.header.dirty() {
                false => "cleared the image's in-use mark after a crash",
                true => "changed the image's header after a crash",
            };
            return Err(changed(what.into()).at(0));
        }
        if scan.file_len.saturating_sub(scan.header.data_start) % self.cluster != TAIL {
            let what = "cut or extended the file after a crash";
            return Err(changed(what.into()).at(scan.file_len));
        }
        let named = self.named();
        let slots: Vec<u32> = named.iter().map(|(slot, _)| *slot).collect();
        let now = sums(file, &scan.header, &slots)?;
        if now != self.sums {
            let page = now.iter().zip(&self.sums).find(|(a, b)| a != b);
            let page = match page {
                Some((a, b)) => a.0.min(b.0),
                None => now.last().max(self.sums.last()).map_or(0, |s| s.0),
            };
            let at = Header::slot_offset(u64::from(page) * PAGE_ENTRIES);
            return Err(changed("changed the BAT after a crash".into()).at(at));
        }
        let mut replay = Replay {
            slots,
            ..Replay::default()
        };
        let mut claimed = HashSet::new();
        let mut page = Page::default();
        for (slot, entry) in named {
            let at = Header::slot_offset(u64::from(slot));
            let on_disk = page.entry(file, &scan.header, slot)?;
            if on_disk != 0 {
                if on_disk != entry {
                    return Err(changed(format!("changed BAT entry {slot}")).at(at));
                }
                continue;
            }
            let Ok(offset) = judge(&scan.header, scan.file_len, u64::from(slot), entry) else {
                let what = format!("cut the file: cluster {slot} of the disk was behind its end");
                return Err(changed(what).at(scan.file_len));
            };
            let cluster = (offset - scan.header.data_start) / self.cluster;
            if scan.used.contains(cluster) || !claimed.insert(cluster as u32) {
                let what = format!("cluster {slot} of the disk is where another one is");
                return Err(Error::corrupt(what).at(offset));
            }
            match self.parts.get(&slot) {
                Some(part) if !part.present.full() => {
                    let part = Part::found(offset, part.present.clone());
                    replay.parts.insert(slot, part);
                }
                _ => {
                    replay.entries.insert(slot, entry);
                }
            }
        }
        replay.claimed = claimed.into_iter().collect();
        replay.claimed.sort_unstable();
        Ok(replay)
    }
}

/// The page of a BAT that was read last.
#[derive(Default)]
struct Page {
    first: u64,
    bytes: Vec<u8>,
}

impl Page {
    fn entry(&mut self, file: &dyn StoreFile, header: &Header, slot: u32) -> Result<u32> {
        let slot = u64::from(slot);
        let first = slot / PAGE_ENTRIES * PAGE_ENTRIES;
        if self.bytes.is_empty() || self.first != first {
            let count = PAGE_ENTRIES.min(u64::from(header.entries).saturating_sub(first));
            self.first = first;
            self.bytes.resize(count as usize * 4, 0);
            read_exact(file, &mut self.bytes, Header::slot_offset(first))?;
        }
        let at = (slot - first) as usize * 4;
        let raw = self.bytes.get(at..at + 4).unwrap_or(&[0; 4]);
        Ok(u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]))
    }
}

/// Bytes of the longest journal that is one of ours for an image with `header`: a base, with every
/// entry and the most parts, and one flush of as much behind it.
fn longest(header: &Header) -> u64 {
    let cluster = header.cluster_bytes();
    let part = part_bytes((cluster / GRANULE).div_ceil(64) as usize) as u64;
    let entries = u64::from(header.entries) * 8;
    let flush = entries + 2 * parts::most(cluster) as u64 * part;
    // A head and a border for each record of 64 KiB.
    (2 * flush + entries / PAGE_ENTRIES) / 64 * 65 + SLACK
}

/// True when the journal in `file` says that there is none.
pub(super) fn has_ended(file: &dyn StoreFile) -> Result<bool> {
    let first = record_at(file, 0, file.len()?, 0)?;
    Ok(matches!(first, Some((_, Items::End, _))))
}

type Found = (super::record::Tag, Items, u64);

/// The record at byte `at`, and where the next one may be.
fn record_at(file: &dyn StoreFile, at: u64, len: u64, granules: u64) -> Result<Option<Found>> {
    if at + HEAD as u64 > len {
        return Ok(None);
    }
    let mut head = [0; HEAD];
    read_exact(file, &mut head, at)?;
    let Some(claimed) = claimed_len(&head).filter(|&n| at + n as u64 <= len) else {
        return Ok(None);
    };
    let mut bytes = vec![0; claimed];
    read_exact(file, &mut bytes, at)?;
    let next = at + (claimed as u64).next_multiple_of(SECTOR);
    Ok(decode(&bytes, granules).map(|(tag, items)| (tag, items, next)))
}

/// The latest flush that a record behind byte `from` is of.
fn later_group(
    file: &dyn StoreFile,
    from: u64,
    len: u64,
    granules: u64,
    nonce: &[u8; 16],
) -> Result<Option<u64>> {
    let mut latest = None;
    let mut at = from;
    let mut buf = vec![0; CHUNK as usize];
    while at < len
        && let Some(data) = file.next_data(at, len)?
    {
        at = data.start / SECTOR * SECTOR;
        let some = &mut buf[..CHUNK.min(data.end - at) as usize];
        read_exact(file, some, at)?;
        for (i, sector) in some.chunks(SECTOR as usize).enumerate() {
            if sector.len() < HEAD || claimed_len(sector).is_none() {
                continue;
            }
            let at = at + i as u64 * SECTOR;
            if let Some((tag, ..)) = record_at(file, at, len, granules)?
                && tag.nonce == *nonce
            {
                latest = latest.max(Some(tag.group));
            }
        }
        at += some.len() as u64;
    }
    Ok(latest)
}

/// True for the name of a journal, or of one being written, of an image that `keep` refuses.
pub fn is_stale(name: &str, keep: impl Fn(&str) -> bool) -> bool {
    let Some(image) = name.strip_prefix(super::JOURNAL) else {
        return false;
    };
    !keep(image) && !image.strip_suffix(NEW).is_some_and(keep)
}
