//! A header that cannot be used: which of its fields contradict each other.
//!
//! A reader stops at the first field that is wrong. Here the fields are weighed against each other
//! and against the file, so that an owner learns which one it is.

use super::{Finding, FindingKind, slots};
use crate::error::Result;
use crate::format::ploop::header::{CLUSTER_SECTORS_MAX, HEADER_BYTES, has_signature};
use crate::store::StoreFile;

/// What is wrong with a header that [`super::scan_image`] refused, beside what its error says.
pub fn explain_header(file: &dyn StoreFile) -> Result<Vec<Finding>> {
    let mut head = [0; HEADER_BYTES as usize];
    let mut found = Vec::new();
    if file.read_at(&mut head, 0)? < head.len() || !has_signature(&head) {
        return Ok(found);
    }
    let field = |at: usize| {
        let raw = [head[at], head[at + 1], head[at + 2], head[at + 3]];
        u64::from(u32::from_le_bytes(raw))
    };
    let mut add = |kind, offset, what| {
        found.push(Finding {
            kind,
            path: file.path().to_path_buf(),
            offset,
            cluster: None,
            guest: None,
            what,
        });
    };
    let (cluster, entries) = (field(28), field(32));
    // The upper half of the size does not exist in v1.
    let v2 = head.starts_with(b"WithouFreSpacExt");
    let size = field(36) | if v2 { field(40) << 32 } else { 0 };
    let bat_end = HEADER_BYTES + 4 * entries;
    let len = file.len()?;
    if cluster == 0 || cluster > u64::from(CLUSTER_SECTORS_MAX) {
        return Ok(found);
    }
    let needed = size.div_ceil(cluster);
    if entries != needed {
        let what = format!(
            "the BAT has {entries} entries; {size} sectors in clusters of {cluster} need {needed}"
        );
        // Of two fields that contradict each other, the one that leaves the file is wrong.
        match bat_end > len {
            true => add(FindingKind::EntryCountMismatch, 32, what),
            false => add(FindingKind::GeometryInconsistent, 28, what),
        }
    }
    let data_start = field(48) * 512;
    let least = bat_end.next_multiple_of(cluster * 512);
    if bat_end <= len && data_start == least && data_start > len {
        let count = entries_set(file, bat_end)?;
        let what = format!("{count} BAT entries name clusters; the file ends before the first one");
        if count > 0 {
            add(FindingKind::EntryBeyondEof, HEADER_BYTES, what);
        }
    }
    Ok(found)
}

fn entries_set(file: &dyn StoreFile, bat_end: u64) -> Result<u64> {
    let mut count = 0;
    slots(file, HEADER_BYTES..bat_end, &mut |_, _| count += 1)?;
    Ok(count)
}
