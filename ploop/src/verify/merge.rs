//! Whether an interrupted merge of a child into its parent can have written to the parent yet.

use crate::error::Result;
use crate::format::{Delta, Place, Run};
use crate::store::{SECTOR, read_or_zero};

/// Guest bytes looked at in one step.
const STEP: u64 = 16 << 20;

/// True when no byte of `parent` can be from a merge of `child` into it.
///
/// A merge copies the child's clusters over the parent's, in the parent's own clusters; clusters
/// that only the child has become the parent's with their BAT entry, after the copy. So as long as
/// no sector of a cluster that both have is equal in both, nothing was copied, whatever a crash
/// tore. Equal sectors (zeros, say) prove nothing, and count as copied.
pub fn merge_untouched(parent: &dyn Delta, child: &dyn Delta) -> Result<bool> {
    let size = parent.mapped_end().min(child.mapped_end());
    let (mut ours, mut theirs): (Vec<Run>, Vec<Run>) = Default::default();
    let mut at = 0;
    while at < size {
        let end = (at + STEP).min(size);
        ours.clear();
        theirs.clear();
        parent.map(at..end, &mut ours)?;
        child.map(at..end, &mut theirs)?;
        let (mut i, mut j) = (0, 0);
        while let (Some(a), Some(b)) = (ours.get(i), theirs.get(j)) {
            if !differ(parent, child, a, b)? {
                return Ok(false);
            }
            match a.offset + a.len < b.offset + b.len {
                true => i += 1,
                false => j += 1,
            }
        }
        at = end;
    }
    Ok(true)
}

/// True when the two runs have no equal sector at the same guest offset.
fn differ(parent: &dyn Delta, child: &dyn Delta, a: &Run, b: &Run) -> Result<bool> {
    let (Place::File(a_at), Place::File(b_at)) = (a.place, b.place) else {
        return Ok(true);
    };
    let mut at = a.offset.max(b.offset);
    let end = (a.offset + a.len).min(b.offset + b.len);
    let (mut x, mut y) = ([0u8; SECTOR as usize], [0u8; SECTOR as usize]);
    while at < end {
        read_or_zero(parent.file().as_ref(), &mut x, a_at + (at - a.offset))?;
        read_or_zero(child.file().as_ref(), &mut y, b_at + (at - b.offset))?;
        if x == y {
            return Ok(false);
        }
        at += SECTOR;
    }
    Ok(true)
}
