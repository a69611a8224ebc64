//! DiskDescriptor.xml: which images a disk has, how they hang together, which one is the top.
//!
//! ```text
//! bytes ── xml ──> elements ── parse ──> Descriptor ── write ──> bytes
//!         bounded            named errors    │ tree: chain, children, edits, check
//! ```
//!
//! Pure: no file is opened here and no path is followed; file names are text, and whether one may
//! be opened is the caller's judgement. A descriptor that [`parse`] returns is consistent: every
//! image has its shot and every shot its image, parents exist, no chain is a cycle, the top is there
//! and is no leftover. Whoever edits the public fields calls [`Descriptor::check`] before writing.
//!
//! FORMAT.md beside this file has every element, its unit and its rules.

mod defect;
mod guid;
mod parse;
mod tree;
mod write;
mod xml;

#[cfg(test)]
mod tests;

pub use defect::Defect;
pub use guid::Guid;
pub use parse::parse;

use crate::error::{Error, Result};

/// Images (and shots) of the largest disk that is read.
pub const MAX_IMAGES: usize = 20_000;

/// Bytes of the largest descriptor that is read.
pub const MAX_BYTES: usize = xml::MAX_BYTES;

/// The smallest and the largest cluster, in sectors; a power of two between them is allowed.
const CLUSTER_SECTORS: std::ops::RangeInclusive<u64> = 64..=131_072;

/// Sectors of the largest byte offset that a file can have.
const MAX_SECTORS: u64 = (i64::MAX / 512) as u64;

/// What a DiskDescriptor.xml says. See FORMAT.md for which values are authoritative.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Virtual size in sectors. Can be stale: the header of the top image rules.
    pub disk_sectors: Option<u64>,
    /// `Max_delta_size` in sectors; nothing here uses it.
    pub max_delta_sectors: Option<u64>,
    /// Drive geometry, for show.
    pub chs: Chs,
    /// First sector of the storage area; 0 in every disk that isn't split. Not judged.
    pub start: Option<u64>,
    /// Sector after the last of the storage area. Can be stale like `disk_sectors`.
    pub end: Option<u64>,
    /// Cluster size in sectors: a power of two from 64 to 131072.
    pub cluster_sectors: u32,
    /// The base was created with all its clusters allocated.
    pub preallocated: bool,
    /// The image files, in the order of the file.
    pub images: Vec<Image>,
    /// The tree, in the order of the file: one shot per image.
    pub shots: Vec<Shot>,
    /// The writable image. [`Guid::TOP`] except in volumes and very old disks.
    pub top: Guid,
    /// Present if the disk has an `Encryption` element.
    pub encryption: Option<Encryption>,
    /// Present in the layout where a disk continues another disk's directory.
    pub volume: Option<Volume>,
    /// The inside of the root's start tag, as it was read.
    root: String,
    foreign: Foreign,
}

/// Cylinders, heads and sectors per track.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chs {
    /// `Cylinders`.
    pub cylinders: Option<u64>,
    /// `Heads`.
    pub heads: Option<u64>,
    /// `Sectors`: per track.
    pub sectors: Option<u64>,
}

/// One image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name in the tree.
    pub guid: Guid,
    /// Its label; see [`Descriptor::base_is_raw`] before believing it.
    pub kind: ImageKind,
    /// Path as written: absolute, or relative to the descriptor's directory. Never empty, without
    /// control characters; not checked for leaving the directory.
    pub file: String,
}

/// The label of an [`Image`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// `Plain`: somewhere in the disk, a raw base.
    Plain,
    /// `Compressed`: an expandable image. Nothing in it is compressed.
    Compressed,
}

/// One node of the snapshot tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shot {
    /// The image that it is about.
    pub guid: Guid,
    /// The node below, or [`Guid::NONE`] for a base.
    pub parent: Guid,
    /// Whether an operation means to remove it.
    pub temporary: Temporary,
}

/// The mark of a [`Shot`] that an operation left or is about to remove.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Temporary {
    /// A snapshot that is meant to stay.
    #[default]
    No,
    /// To be merged away; its data is complete.
    Temporary,
    /// A merge of the top into a base is clearing the base's entries.
    Zero,
    /// The same merge, after the two files were exchanged.
    ZeroSwap,
}

impl Temporary {
    /// The element of each mark.
    const ELEMENTS: [(&str, Temporary); 3] = [
        ("Temporary", Temporary::Temporary),
        ("TemporaryZero", Temporary::Zero),
        ("TemporaryZeroSwap", Temporary::ZeroSwap),
    ];
}

/// The `Encryption` element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encryption {
    /// Name of the key. With one, the guest data of the images is ciphertext.
    pub key_id: Option<String>,
    /// Other vendors' elements in it, verbatim.
    foreign: Vec<String>,
}

/// The `Volume` element: this descriptor lists only its own images and goes on in another one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// Directory of the disk that holds the parents; relative to this descriptor's directory.
    pub parent: Option<String>,
    /// The snapshot there that this disk hangs on.
    pub snapshot_guid: Option<Guid>,
    /// The disk is a read-only snapshot of another.
    pub read_only: bool,
}

/// Elements that we don't know, verbatim, at the places where every reader skips them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Foreign {
    parameters: Vec<String>,
    storage: Vec<String>,
    snapshots: Vec<String>,
}

impl Descriptor {
    /// A disk of one image, which is its top.
    ///
    /// Fails with [`Kind::Invalid`](crate::error::Kind) if a value is out of its range.
    pub fn new_single(
        disk_sectors: u64,
        cluster_sectors: u32,
        base_is_raw: bool,
        guid: Guid,
        file: impl Into<String>,
    ) -> Result<Descriptor> {
        let kind = if base_is_raw {
            ImageKind::Plain
        } else {
            ImageKind::Compressed
        };
        let mut new = Descriptor {
            disk_sectors: None,
            max_delta_sectors: None,
            chs: Chs::default(),
            start: Some(0),
            end: None,
            cluster_sectors,
            preallocated: false,
            images: vec![Image {
                guid,
                kind,
                file: file.into(),
            }],
            shots: vec![Shot {
                guid,
                parent: Guid::NONE,
                temporary: Temporary::No,
            }],
            top: guid,
            encryption: None,
            volume: None,
            root: write::ROOT.to_owned(),
            foreign: Foreign::default(),
        };
        new.set_disk_sectors(disk_sectors);
        new.check()?;
        Ok(new)
    }

    /// Sets the virtual size, and with it the end of the storage area and the geometry.
    pub fn set_disk_sectors(&mut self, sectors: u64) {
        self.disk_sectors = Some(sectors);
        self.end = Some(sectors);
        self.chs = Chs::of(sectors);
    }

    /// Whether the lowest image is a raw file and the others expandable ones.
    ///
    /// One `Plain` label anywhere says so: OpenVZ's tool then labels all of them `Plain`, QEMU's
    /// description of the format wants the label on the base only.
    pub fn base_is_raw(&self) -> bool {
        self.images
            .iter()
            .any(|image| image.kind == ImageKind::Plain)
    }

    /// The key that the guest data is encrypted with, if it is.
    pub fn encryption_key(&self) -> Option<&str> {
        self.encryption.as_ref()?.key_id.as_deref()
    }
}

impl Chs {
    /// The geometry that OpenVZ's tool writes for a disk of this many sectors.
    pub fn of(disk_sectors: u64) -> Chs {
        let s = disk_sectors;
        let (heads, cylinders, guess) = if s > 1_032_192 && s < 16_777_216 {
            (16, s / 1008, 63)
        } else if let Some(track) = [63, 32, 16, 8].into_iter().find(|&t| s.is_multiple_of(t))
            && let Some(heads) = [16, 8, 4, 2]
                .into_iter()
                .find(|&h| (s / track).is_multiple_of(h))
        {
            (heads, s / track / heads, track)
        } else {
            (1, s & 0xffff_ffff, 1)
        };
        let sectors = s.checked_div(cylinders * heads).unwrap_or(guess);
        Chs {
            cylinders: Some(cylinders),
            heads: Some(heads),
            sectors: Some(sectors),
        }
    }
}

/// The name for a new delta of a disk: that of its first image, with `.{GUID}` for an ending.
///
/// The directory part is kept, so the delta is made beside the first image. Endings of that kind
/// which the first image already has are replaced. `file_guid` is a fresh GUID, not the snapshot's.
pub fn new_delta_file_name(first_image_file: &str, file_guid: Guid) -> String {
    let mut stem = first_image_file;
    while let Some((rest, ending)) = stem.rsplit_once('.')
        && ending.starts_with('{')
        && Guid::read(ending).is_some()
        && !rest.is_empty()
        && !rest.ends_with('/')
    {
        stem = rest;
    }
    format!("{stem}.{file_guid}")
}

/// Foreign text in a message: quoted, cut, without control characters.
fn shown(text: &str) -> String {
    format!("“{}”", xml::clip(text))
}

/// The rule for texts that name something: never empty, one line, of bounded length.
fn text_defect(defect: Defect, what: &str, text: &str) -> Option<Error> {
    if xml::is_white(text) {
        return Some(defect.refuse(format!("{what} is empty")));
    }
    if text.len() > xml::MAX_TEXT {
        let max = xml::MAX_TEXT;
        return Some(defect.refuse(format!("{what} is {} bytes long, over {max}", text.len())));
    }
    let bad = text.chars().find(|&c| c.is_control() || !xml::allowed(c))?;
    let code = u32::from(bad);
    Some(defect.refuse(format!(
        "{what} {} has the character U+{code:04X} in it",
        shown(text)
    )))
}
