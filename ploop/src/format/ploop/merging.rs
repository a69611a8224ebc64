//! The writable image as a layer of a chain: while it is being sealed, and while it is merged.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::header::Header;
use super::top::{PAGE, Top};
use crate::device::Written;
use crate::error::{Error, Result};
use crate::format::{Delta, Place, Run};
use crate::store::StoreFile;

impl Top {
    /// Takes the entries of `clusters` (ascending) out; durable on return. What they named is still
    /// there, for leases of before; the caller gives it back ([`Top::give_back`]) when those are
    /// gone. Returns (first byte, count) of each run of it. Only while nobody writes the image, which
    /// then has no journal.
    pub fn take_out(&self, clusters: &[u64]) -> Result<Vec<(u64, u64)>> {
        self.before_change()?;
        self.flush()?;
        let bytes = self.header.cluster_bytes();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for &cluster in clusters {
            let Some(offset) = self.lookup(cluster)? else {
                continue;
            };
            self.file.write_at(&[0; 4], Header::slot_offset(cluster))?;
            match runs.last_mut() {
                Some((first, count)) if *first + *count * bytes == offset => *count += 1,
                _ => runs.push((offset, 1)),
            }
        }
        self.file.sync().inspect_err(|e| self.gate.latch(e))?;
        for &cluster in clusters {
            let page = self.load(cluster / PAGE)?;
            page[(cluster % PAGE) as usize].store(0, Ordering::Release);
        }
        Ok(runs)
    }
}

impl Written for Top {
    fn wrote(&self) {
        Top::wrote(self);
    }

    fn given_up(&self) {
        self.held.doubt();
    }
}

/// The image as a layer of a chain, while it is also being rewritten.
impl Delta for Top {
    fn size(&self) -> u64 {
        self.header.size()
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.cluster_bytes()
    }

    fn file(&self) -> &Arc<dyn StoreFile> {
        &self.file
    }

    fn shareable(&self) -> bool {
        false
    }

    fn map(&self, range: Range<u64>, runs: &mut Vec<Run>) -> Result<()> {
        let bytes = self.header.cluster_bytes();
        let mut at = range.start;
        while at < range.end {
            let cluster = at / bytes;
            let next = self.next_page_with_entries(cluster, range.end.div_ceil(bytes));
            let (place, end) = match next > cluster {
                true => (Place::Parent, next.saturating_mul(bytes)),
                false => {
                    let place = self.lookup(cluster)?.map_or(Place::Parent, |offset| {
                        Place::File(offset + (at - cluster * bytes))
                    });
                    (place, (cluster + 1).saturating_mul(bytes))
                }
            };
            let end = end.min(range.end);
            super::delta::push(
                runs,
                Run {
                    offset: at,
                    len: end - at,
                    place,
                },
            );
            at = end;
        }
        Ok(())
    }

    fn read(&self, offset: u64, _buf: &mut [u8]) -> Result<()> {
        Err(self.fault(offset))
    }

    fn fault(&self, offset: u64) -> Error {
        // Opening refused every damaged entry.
        Error::corrupt(format!(
            "no entry for guest byte {offset} can be damaged here"
        ))
        .on(self.file.path())
    }
}
