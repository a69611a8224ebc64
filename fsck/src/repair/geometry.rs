//! Header fields that contradict each other or the file: which one gives way.
//!
//! * Signature, type and cluster size are what everything else is read by. They are never guessed:
//!   an image that is only consistent with another cluster size or version is refused, saying so.
//! * The number of entries gives way to the size: the size is what the guest sees. It is raised
//!   only over slots that can be entries.
//! * The data area's start gives way to the entries: it is where the BAT ends, unless that would
//!   take the grid from under v1 entries. It is lowered over a gap that is not empty.

use std::ops::Range;

use ploop::Result;
use ploop::format::ploop::Version;
use ploop::format::ploop::header::{CLUSTER_SECTORS_MAX, CLUSTER_SECTORS_OPENVZ, HEADER_BYTES};
use ploop::store::{SECTOR, StoreFile};

use super::changes::Notes;
use super::fields::{Fields, TYPE_EXPANDABLE};
use super::ranges::{holds_anything, push};
use ploop::verify::slots;

/// Why an image cannot be repaired: one sentence.
pub(super) type Refusal = String;

fn bat_end(entries: u64) -> u64 {
    HEADER_BYTES + 4 * entries
}

/// The sector that the data area of `entries` entries starts at, at least and on the grid.
fn least(entries: u64, cluster_sectors: u64) -> u64 {
    bat_end(entries).div_ceil(cluster_sectors * SECTOR) * cluster_sectors
}

/// The header with fields that agree. `len` is the file's length; the data area may start behind
/// it, if the BAT is there.
pub(super) fn settle(
    file: &dyn StoreFile,
    found: Fields,
    len: u64,
    notes: &mut Notes,
) -> Result<Result<Fields, Refusal>> {
    let version = match usable(&found) {
        Ok(version) => version,
        Err(why) => return Ok(Err(why)),
    };
    if let Some(cluster) = other_cluster(&found) {
        return Ok(Err(format!(
            "the header says clusters of {} sectors, and everything else in it fits clusters of \
             {cluster}: which of them is wrong cannot be known",
            found.cluster_sectors()
        )));
    }
    let mut fields = found;
    if let Err(why) = settle_entries(file, &found, &mut fields, len, notes)? {
        return Ok(Err(why));
    }
    let start = match version {
        Version::V1 => settle_v1(file, &found, &mut fields, len, notes)?,
        Version::V2 => settle_v2(file, &mut fields, len, notes)?,
    };
    let start = match start {
        Ok(start) => start,
        Err(why) => return Ok(Err(why)),
    };
    if let Some(why) = other_version(file, &fields, start, len)? {
        return Ok(Err(why));
    }
    Ok(Ok(fields))
}

/// What nothing can be read without.
fn usable(found: &Fields) -> Result<Version, Refusal> {
    let Some(version) = found.version() else {
        return Err("it does not begin with the signature of a ploop image".into());
    };
    if found.kind() != TYPE_EXPANDABLE {
        return Err(format!("the header's type is {}, not 2", found.kind()));
    }
    let cluster = found.cluster_sectors();
    if cluster == 0 || cluster > CLUSTER_SECTORS_MAX {
        return Err(format!(
            "the header says clusters of {cluster} sectors, which no image has"
        ));
    }
    if found.size_sectors() > i64::MAX as u64 / SECTOR {
        let size = found.size_sectors();
        return Err(format!(
            "the header says a disk of {size} sectors, which no file can hold"
        ));
    }
    Ok(version)
}

/// Another cluster size that number of entries, size and data area agree on, when they do not agree
/// on the one that the header has.
fn other_cluster(found: &Fields) -> Option<u64> {
    let (entries, size) = (u64::from(found.entries()), found.size_sectors());
    let field = u64::from(found.data_offset());
    let fits = |cluster: u64| size.div_ceil(cluster) == entries && field == least(entries, cluster);
    let own = u64::from(found.cluster_sectors());
    let right_otherwise = field == least(size.div_ceil(own), own);
    if fits(own) || right_otherwise || entries == 0 {
        return None;
    }
    let all = u64::from(*CLUSTER_SECTORS_OPENVZ.start())..=u64::from(*CLUSTER_SECTORS_OPENVZ.end());
    let mut powers = std::iter::successors(Some(*all.start()), |c| Some(c * 2));
    let powers = powers.by_ref().take_while(|c| all.contains(c));
    // Of a size that is none of OpenVZ's, a table within its first cluster says how long one is.
    let odd = (!own.is_power_of_two()).then_some(field);
    powers
        .chain(odd)
        .find(|&c| c != 0 && c != own && field.is_multiple_of(c) && fits(c))
}

fn settle_entries(
    file: &dyn StoreFile,
    found: &Fields,
    fields: &mut Fields,
    len: u64,
    notes: &mut Notes,
) -> Result<Result<(), Refusal>> {
    let cluster_sectors = u64::from(found.cluster_sectors());
    let cluster = cluster_sectors * SECTOR;
    let has = u64::from(found.entries());
    if found.size_sectors() == 0 && has > 0 {
        let size = has * cluster_sectors;
        if bat_end(has) > len || size > i64::MAX as u64 / SECTOR {
            let what = format!("the disk's size is 0, and {has} BAT entries do not fit the file");
            return Ok(Err(what));
        }
        fields.set_size_sectors(size);
        // Where there are images below or above, what shows of them changes, too.
        notes.doubtful(
            format!(
                "the disk's size is 0: set it to {size} sectors, what the {has} BAT entries are for"
            ),
            std::iter::once(0..size * SECTOR).collect(),
        );
        return Ok(Ok(()));
    }
    let wants = found.size_sectors().div_ceil(cluster_sectors);
    if bat_end(wants) > len {
        return Ok(Err(format!(
            "a disk of {} sectors needs {wants} BAT entries, and the file ends after {len} bytes",
            found.size_sectors()
        )));
    }
    let Ok(number) = u32::try_from(wants) else {
        return Ok(Err(format!(
            "{wants} clusters are more than a BAT can have"
        )));
    };
    if wants == has {
        return Ok(Ok(()));
    }
    // With a second field that fits nothing, it may be the cluster size that is wrong.
    let start = u64::from(found.data_offset());
    let inside = start * SECTOR >= bat_end(wants.min(has)) && start * SECTOR <= len;
    let on_grid = start != 0 && start.is_multiple_of(cluster_sectors);
    let fits = match found.version() {
        Some(Version::V1) => start == 0 || inside,
        _ => on_grid && inside,
    };
    if !fits {
        return Ok(Err(format!(
            "{has} BAT entries, a disk of {} sectors in clusters of {cluster_sectors}, and a data \
             area at sector {start} fit in no way: which of them is wrong cannot be known",
            found.size_sectors()
        )));
    }
    fields.set_entries(number);
    let what = format!(
        "the BAT is said to have {has} entries: set that to {wants}, what the disk's size needs"
    );
    if wants < has {
        notes.sure(what);
        return Ok(Ok(()));
    }
    // Slots that were not part of the BAT become entries.
    let start = u64::from(found.data_offset()) * SECTOR;
    let start = match start == 0 {
        true => least(wants, cluster_sectors) * SECTOR,
        false => start,
    };
    if bat_end(wants) > start {
        return Ok(Err(format!(
            "a disk of {} sectors needs {wants} BAT entries, and there is room for {} only: the \
             size or the table is wrong",
            found.size_sectors(),
            start.saturating_sub(HEADER_BYTES) / 4
        )));
    }
    let unit = unit(found);
    let mut gained: Vec<Range<u64>> = Vec::new();
    let mut odd = None;
    slots(file, bat_end(has)..bat_end(wants), &mut |slot, value| {
        let offset = u64::from(value) * unit;
        if offset < start || offset >= len {
            odd = Some(slot);
        }
        push(&mut gained, slot * cluster..(slot + 1) * cluster);
    })?;
    if let Some(slot) = odd {
        return Ok(Err(format!(
            "the BAT has {has} entries, a disk of this size needs {wants}, and what is there in \
             place of entry {slot} is none"
        )));
    }
    match gained.is_empty() {
        true => notes.sure(what),
        false => notes.doubtful(
            format!("{what}; what the entries behind the old end name comes back"),
            gained,
        ),
    }
    Ok(Ok(()))
}

/// Bytes that a BAT entry counts.
fn unit(fields: &Fields) -> u64 {
    match fields.version() {
        Some(Version::V1) => SECTOR,
        _ => u64::from(fields.cluster_sectors()) * SECTOR,
    }
}

/// The guest ranges of the entries that point into `bytes`.
fn pointing_into(
    file: &dyn StoreFile,
    fields: &Fields,
    bytes: Range<u64>,
) -> Result<Vec<Range<u64>>> {
    let cluster = u64::from(fields.cluster_sectors()) * SECTOR;
    let (unit, mut found) = (unit(fields), Vec::new());
    let table = HEADER_BYTES..bat_end(u64::from(fields.entries()));
    slots(file, table, &mut |slot, value| {
        if bytes.contains(&(u64::from(value) * unit)) {
            push(&mut found, slot * cluster..(slot + 1) * cluster);
        }
    })?;
    Ok(found)
}

fn set_start(fields: &mut Fields, sector: u64, notes: &mut Notes, recovered: Vec<Range<u64>>) {
    let what = format!(
        "the data area is said to start at sector {}: set that to {sector}, where the BAT ends",
        fields.data_offset()
    );
    // The callers looked that it fits.
    fields.set_data_offset(sector as u32);
    match recovered.is_empty() {
        true => notes.sure(what),
        false => notes.doubtful(
            format!("{what}; what could not be read before comes back"),
            recovered,
        ),
    }
}

/// The start of the data area of a v2 image, in bytes.
fn settle_v2(
    file: &dyn StoreFile,
    fields: &mut Fields,
    len: u64,
    notes: &mut Notes,
) -> Result<Result<u64, Refusal>> {
    let cluster = u64::from(fields.cluster_sectors());
    let least = least(u64::from(fields.entries()), cluster);
    let field = u64::from(fields.data_offset());
    if least > u64::from(u32::MAX) {
        return Ok(Err("the BAT is longer than any file's".into()));
    }
    if field == least {
        return Ok(Ok(least * SECTOR));
    }
    if field < least || !field.is_multiple_of(cluster) || field * SECTOR > len {
        set_start(fields, least, notes, Vec::new());
        return Ok(Ok(least * SECTOR));
    }
    let gap = least * SECTOR..field * SECTOR;
    let named = pointing_into(file, fields, gap.clone())?;
    if named.is_empty() && !holds_anything(file, gap)? {
        return Ok(Ok(field * SECTOR));
    }
    set_start(fields, least, notes, named);
    Ok(Ok(least * SECTOR))
}

/// The same for v1, whose entries are sectors: their grid begins where the data area does, which
/// may be anywhere behind the BAT.
fn settle_v1(
    file: &dyn StoreFile,
    found: &Fields,
    fields: &mut Fields,
    len: u64,
    notes: &mut Notes,
) -> Result<Result<u64, Refusal>> {
    let cluster = u64::from(fields.cluster_sectors());
    let end = bat_end(u64::from(fields.entries())).next_multiple_of(SECTOR);
    let field = u64::from(fields.data_offset());
    if field == 0 {
        let was = bat_end(u64::from(found.entries())).next_multiple_of(SECTOR);
        if was == end {
            return Ok(Ok(end));
        }
        // The grid of the entries is that of the table as it was said to be.
        if was < end || was > len {
            let what = "the number of entries is wrong, and with it where the data area starts";
            return Ok(Err(what.into()));
        }
        set_start(fields, was / SECTOR, notes, Vec::new());
        return Ok(Ok(was));
    }
    let valid = field * SECTOR >= end && field * SECTOR <= len;
    let majority = residue(file, fields, end, len)?;
    let on_grid = majority.is_none_or(|r| r == field % cluster);
    let gap = match valid {
        true => pointing_into(file, fields, end..field * SECTOR)?,
        false => Vec::new(),
    };
    let r = majority.unwrap_or(if valid { field % cluster } else { 0 });
    let from = end / SECTOR;
    let start = from + (r + cluster - from % cluster) % cluster;
    // Entries off the grid are single faults as long as they are not most of them.
    if valid && on_grid && (gap.is_empty() || majority.is_none()) {
        let empty = start >= field || !holds_anything(file, start * SECTOR..field * SECTOR)?;
        if empty {
            return Ok(Ok(field * SECTOR));
        }
    }
    if start == field {
        return Ok(Ok(start * SECTOR));
    }
    if start * SECTOR > len && majority.is_some() || start > u64::from(u32::MAX) {
        return Ok(Err("where the data area starts cannot be known".into()));
    }
    let recovered = match valid {
        true => pointing_into(file, fields, 0..u64::MAX)?,
        false => Vec::new(),
    };
    set_start(fields, start, notes, recovered);
    Ok(Ok(start * SECTOR))
}

/// How far off the grid of clusters, in sectors, most entries are: two of them, at least.
fn residue(file: &dyn StoreFile, fields: &Fields, from: u64, len: u64) -> Result<Option<u64>> {
    let cluster = u64::from(fields.cluster_sectors());
    let table = HEADER_BYTES..bat_end(u64::from(fields.entries()));
    let inside = |value: u32| (from..len).contains(&(u64::from(value) * SECTOR));
    let (mut candidate, mut lead, mut total) = (0, 0u64, 0u64);
    slots(file, table.clone(), &mut |_, value| {
        let r = u64::from(value) % cluster;
        match inside(value) {
            false => return,
            true if lead == 0 => (candidate, lead) = (r, 1),
            true if r == candidate => lead += 1,
            true => lead -= 1,
        }
        total += 1;
    })?;
    let mut count = 0;
    slots(file, table, &mut |_, value| {
        count += u64::from(inside(value) && u64::from(value) % cluster == candidate);
    })?;
    Ok((count >= 2 && count * 2 > total).then_some(candidate))
}

/// The sentence for a table whose entries make no sense in this version's unit and do in the
/// other's.
fn other_version(
    file: &dyn StoreFile,
    fields: &Fields,
    start: u64,
    len: u64,
) -> Result<Option<Refusal>> {
    let cluster = u64::from(fields.cluster_sectors()) * SECTOR;
    let v1 = fields.version() == Some(Version::V1);
    let least = least(u64::from(fields.entries()), cluster / SECTOR) * SECTOR;
    let (mut total, mut good, mut other) = (0u64, 0u64, 0u64);
    let table = HEADER_BYTES..bat_end(u64::from(fields.entries()));
    slots(file, table, &mut |_, value| {
        total += 1;
        let (sectors, clusters) = (u64::from(value) * SECTOR, u64::from(value) * cluster);
        let as_v1 = (start..len).contains(&sectors) && (sectors - start).is_multiple_of(cluster);
        let as_v2 = (least..len).contains(&clusters);
        let as_other_v1 = (least..len).contains(&sectors) && sectors.is_multiple_of(cluster);
        good += u64::from(if v1 { as_v1 } else { as_v2 });
        other += u64::from(if v1 { as_v2 } else { as_other_v1 });
    })?;
    if good > 0 || other * 2 <= total {
        return Ok(None);
    }
    let (here, there) = if v1 { (1, 2) } else { (2, 1) };
    Ok(Some(format!(
        "the signature is that of v{here}, and the BAT is one of v{there}: one of them is wrong. If \
         you know that it was v{there}, put that signature back"
    )))
}
