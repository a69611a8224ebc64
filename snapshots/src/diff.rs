//! Where two nodes of a disk may read differently. Looks at maps alone: no data is read.
//!
//! What is found is everything that is written in an image on the way from either of the two down
//! to the node that both stand on ([`Disk::differing`]). It is found a piece at a time and given
//! away at once, so memory follows no size.

use std::ops::Range;

use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::error::{Error, Kind, Result};
use serde::Serialize;

use crate::place::Place;

/// What a comparison came to. In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sum {
    /// Where the two may read differently.
    pub bytes: u64,
    /// In so many extents.
    pub extents: u64,
}

/// Gives each range of bytes where `a` and `b` may read differently to `each`, in order and apart
/// from each other. Nothing that differs is left out; see [`Disk::differing`] for what may be there in
/// vain. An error of `each` ends it.
pub fn between(a: &Disk, b: &Disk, each: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<Sum> {
    let end = a.size().max(b.size());
    let (mut at, mut found, mut sum) = (0, Vec::new(), Sum::default());
    // The last one may go on in the next piece.
    let mut last = 0..0;
    let mut give = |range: Range<u64>, sum: &mut Sum| {
        if range.is_empty() {
            return Ok(());
        }
        sum.bytes += range.end - range.start;
        sum.extents += 1;
        each(range)
    };
    while at < end {
        at = a.differing(b, at..end, &mut found)?;
        for range in found.drain(..) {
            if range.start == last.end {
                last.end = range.end;
                continue;
            }
            give(std::mem::replace(&mut last, range), &mut sum)?;
        }
    }
    give(last, &mut sum)?;
    Ok(sum)
}

/// The same for two nodes of one disk, opened for it: `None` is the top, which nobody may have open
/// for writing, this process neither (`InUse`). Takes no lock of the disk.
pub fn differing(
    place: &Place<'_>,
    a: Option<Guid>,
    b: Option<Guid>,
    each: &mut dyn FnMut(Range<u64>) -> Result<()>,
) -> Result<Sum> {
    let open = |node| {
        let options = place.open_options(false);
        place.opener().open(&place.source(node), &options)
    };
    between(&open(a)?, &open(b)?, each)
}

/// Two disks that are open to be compared.
#[derive(Debug)]
pub struct Pair {
    a: Disk,
    b: Disk,
}

impl Pair {
    /// Opens two snapshots, or disks at rest. They are of one disk, or stand on a layer that both
    /// share, as clones of one template do; else `Invalid`. A disk that is being written is `InUse`.
    pub fn open(
        opener: &Opener,
        a: (&Source, &OpenOptions),
        b: (&Source, &OpenOptions),
    ) -> Result<Pair> {
        let open = |(source, options): (&Source, &OpenOptions)| {
            opener.open(source, options).map_err(|e| match e.kind() {
                Kind::InUse if source.descriptor && source.snapshot.is_none() => e.fix(
                    "Make a snapshot of it (`ploop snapshot create`), and compare that: what is \
                     being written has no last byte",
                ),
                _ => e,
            })
        };
        let pair = Pair {
            a: open(a)?,
            b: open(b)?,
        };
        let resolve = |source: &Source| opener.store().resolve(&source.path);
        if pair.a.common_layers(&pair.b) == 0 && resolve(a.0)? != resolve(b.0)? {
            let what = format!(
                "it has no layer in common with {}, so maps say nothing of where they differ",
                a.0.path.display()
            );
            return Err(Error::invalid(what)
                .on(&b.0.path)
                .fix("Name two snapshots of one disk, or two clones of one template"));
        }
        Ok(pair)
    }

    /// Virtual sizes in bytes.
    pub fn sizes(&self) -> (u64, u64) {
        (self.a.size(), self.b.size())
    }

    /// As [`between`].
    pub fn compare(&self, each: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<Sum> {
        between(&self.a, &self.b, each)
    }
}
