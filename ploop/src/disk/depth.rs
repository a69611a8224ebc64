//! Which layer has the bytes of a range.

use std::ops::Range;

use super::{ALLOCATION_MAX, Disk, WINDOW};
use crate::device::{Depth, Device as _, SegmentPlace, check_range};
use crate::error::Result;

impl Disk {
    /// See [`crate::device::Device::depths`].
    pub(super) fn depths_of(
        &self,
        range: Range<u64>,
        limit: usize,
        out: &mut Vec<Depth>,
    ) -> Result<()> {
        out.clear();
        check_range(&range, self.size())?;
        let mut segments = Vec::new();
        let mut at = range.start;
        // Of an absurdly large disk one call answers a part: ending early is allowed.
        let end = range.end.min(range.start.saturating_add(ALLOCATION_MAX));
        // One version for the whole answer: layers are counted from its top.
        let stack = self.stack();
        let mapped = stack.mapped_end();
        let layers = stack.layers();
        while at < end && out.len() <= limit {
            if at >= mapped {
                push(out, range.end - at, 0);
                break;
            }
            let stop = at.saturating_add(WINDOW).min(end);
            segments.clear();
            stack.map(at..stop, &mut segments)?;
            for s in &segments {
                let depth = match s.place {
                    SegmentPlace::Hole => 0,
                    SegmentPlace::File { layer, .. }
                    | SegmentPlace::Through { layer }
                    | SegmentPlace::Fault { layer } => layers - layer,
                };
                push(out, s.len, depth);
            }
            at = stop;
        }
        out.truncate(limit);
        Ok(())
    }
}

fn push(out: &mut Vec<Depth>, len: u64, depth: u32) {
    match out.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.depth == depth => last.len += len,
        _ => out.push(Depth { len, depth }),
    }
}
