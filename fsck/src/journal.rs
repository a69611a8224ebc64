//! The journal of an image that was not closed: what it holds, and whether it can be replayed.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ploop::format::ploop::Header;
use ploop::format::ploop::journal::{self, Home};
use ploop::store::{Store, StoreFile};
use ploop::verify::{Class, scan_image};
use ploop::{Kind, Result};

use crate::report::{Finding, Findings};

/// Guest ranges named of one journal, at most; more are counted.
const RANGES_MAX: usize = 16;

/// Looks for the journal of the image at `image`, whose header is `header`.
pub(crate) fn check(
    store: &Arc<dyn Store>,
    image: &Path,
    file: &dyn StoreFile,
    header: &Header,
    found: &mut Findings,
) -> Result<()> {
    let Some(home) = Home::of(store, image) else {
        return Ok(());
    };
    let log = match journal::read(&home, header) {
        Ok(Some(log)) => log,
        Ok(None) => return Ok(()),
        Err(e) if e.kind() == Kind::Corrupt => {
            found.corrupt("journal-damaged", home.path(), &e);
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let cluster = header.cluster_bytes();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let (mut clusters, mut bytes) = (0, 0);
    for (slot, held) in log.clusters() {
        clusters += 1;
        bytes += held;
        let (start, end) = (slot * cluster, ((slot + 1) * cluster).min(header.size()));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    let holds = format!("{clusters} clusters, {bytes} bytes of them written");
    match log.explain(file, &scan_image(file)?) {
        Ok(_) => {
            let what = format!("a journal of {holds}: every open reads them from there");
            found.file("journal", Class::Dirty, home.path(), what);
        }
        Err(e) if e.kind() == Kind::Corrupt => {
            let what = format!(
                "{}: the journal of {holds} cannot be replayed; what was flushed last of these \
                 clusters is lost unless the image is put back as it was",
                e.what()
            );
            found.file("journal-foreign", Class::Corrupt, home.path(), what);
            let more = ranges.len().saturating_sub(RANGES_MAX);
            for range in ranges.into_iter().take(RANGES_MAX) {
                let what = format!("guest bytes {}..{} are in it", range.start, range.end);
                found.add(Finding {
                    guest: Some(range),
                    ..Finding::new("journal-holds", Class::Corrupt, home.path(), what)
                });
            }
            if more > 0 {
                let what = format!("… and {more} more ranges");
                found.file("journal-holds", Class::Corrupt, home.path(), what);
            }
        }
        Err(e) => return Err(e),
    }
    Ok(())
}
