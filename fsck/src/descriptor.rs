//! A descriptor that was refused, by the stable name of its defect; and what a sound one says that
//! is out of date.

use std::path::Path;

use ploop::Error;
use ploop::descriptor::{Chs, Defect, Descriptor};
use ploop::verify::Class;

use crate::report::Findings;

/// Images on top of each other that OpenVZ's tools open.
const CHAIN_OPENVZ: usize = 127;

/// The name of what the parser refused.
pub(crate) fn defect(e: &Error) -> &'static str {
    e.defect().map_or("unreadable", Defect::name)
}

/// What the descriptor at `xml` says of a disk whose top has `sectors`.
pub(crate) fn stale(d: &Descriptor, xml: &Path, sectors: u64, found: &mut Findings) {
    let other = |said: Option<u64>| said.filter(|&n| n != sectors);
    if let Some(said) = other(d.disk_sectors).or(other(d.end)) {
        let what = format!("the descriptor says {said} sectors, the top image has {sectors}");
        found.file("stale-disk-size", Class::Clean, xml, what);
    }
    let Chs {
        cylinders: Some(c),
        heads: Some(h),
        sectors: Some(s),
    } = d.chs
    else {
        return;
    };
    let product = c.checked_mul(h).and_then(|n| n.checked_mul(s));
    let size = d.disk_sectors.unwrap_or(sectors);
    if d.chs != Chs::of(size) && product != Some(size) {
        let what = format!("{c} cylinders of {h} heads of {s} sectors for {size} sectors");
        found.file("stale-geometry", Class::Clean, xml, what);
    }
}

/// More images in the chain of the top than OpenVZ's tools open.
pub(crate) fn too_long(d: &Descriptor, xml: &Path, found: &mut Findings) {
    let images = d.chain(d.top).map_or(0, |chain| chain.len());
    if images > CHAIN_OPENVZ {
        let what = format!("the chain of the top has {images} images");
        found.file("too-many-images", Class::Clean, xml, what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;

    #[test]
    fn every_defect_is_a_kind_of_finding() {
        for defect in Defect::ALL {
            let kind = kinds::find(defect.name());
            assert!(
                kind.is_some_and(|k| k.classes == [Class::Corrupt]),
                "{defect:?}"
            );
        }
    }
}
