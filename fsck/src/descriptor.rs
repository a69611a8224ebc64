//! A descriptor that was refused, by the stable name of its defect; and what a sound one says that
//! is out of date.

use std::path::Path;

use ploop::Error;
use ploop::descriptor::{Chs, Descriptor};
use ploop::verify::Class;

use crate::report::Findings;

/// Images on top of each other that OpenVZ's tools open.
const CHAIN_OPENVZ: usize = 127;

/// A part of the parser's sentence, and the name of the defect. The first that fits counts.
const SENTENCES: &[(&str, &str)] = &[
    ("form a cycle", "parent-cycle"),
    ("elements have the GUID", "duplicate-guid"),
    ("two images have the file", "duplicate-file"),
    ("which the disk doesn't have", "unknown-parent"),
    ("is marked for removal", "temporary-top"),
    ("has no <Shot>", "missing-shot"),
    ("means \"none\"", "bad-guid"),
    ("is not a GUID", "bad-guid"),
    ("<Padding>", "padding"),
    ("<Type>", "bad-type"),
    ("<File>", "bad-path"),
    ("<Parent>", "bad-path"),
    ("OpenVZ's tool cannot read it there", "unexpected-element"),
    ("in the same place", "unexpected-element"),
    ("which holds text", "unexpected-element"),
    ("<Blocksize>", "bad-blocksize"),
    ("a cluster of", "bad-blocksize"),
    ("is not a number", "bad-number"),
    ("is beyond 64 bits", "bad-number"),
    ("must be 0 or 1", "bad-number"),
    ("sectors than a disk can have", "bad-number"),
    ("more than a disk can have", "bad-number"),
    ("a largest delta of 0", "bad-number"),
    ("<Preallocated> is 1", "bad-number"),
    ("DOCTYPE", "dtd"),
    ("not valid UTF-8", "bad-encoding"),
    ("declares encoding", "bad-encoding"),
    ("are nested deeper", "xml-too-deep"),
    ("the limit is", "xml-too-deep"),
    ("is longer than", "xml-too-deep"),
    ("are not read", "xml-too-deep"),
    ("elements", "xml-too-deep"),
];

/// The name of what the parser refused. Whatever has no other name is no XML.
pub(crate) fn defect(e: &Error) -> &'static str {
    let what = e.what();
    // "<A> has no <B>", of the top, of a snapshot, of any element.
    if what.contains(" has no <Image>") {
        return match what {
            w if w.starts_with("the top ") => "top-missing",
            w if w.starts_with("snapshot ") => "missing-image",
            _ => "missing-element",
        };
    }
    let named = SENTENCES.iter().find(|(part, _)| what.contains(part));
    match named {
        Some((_, kind)) => kind,
        None if what.contains(" has no <") => "missing-element",
        None => "not-well-formed",
    }
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
