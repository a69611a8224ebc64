//! The checks. Opening for writing uses them, and so does `fsck`: there is one checker.
//!
//! Pure: reads, never writes, and returns [`Finding`]s. Memory is in proportion to the non-zero
//! entries that the file really has, never to numbers it claims: only the BAT's non-hole extents
//! are read, and of them only non-zero entries are kept.
//!
//! ```text
//!  scan_image      header, entries, length, what writing must know of the extension   (opening)
//!  check_image     the same, and all of the extension                                 (fsck)
//!  explain_header  what is wrong with a header that both refuse                       (fsck)
//! ```

mod extension;
mod header;
mod image;
mod merge;
#[cfg(test)]
mod tests;
mod used;

use std::ops::Range;
use std::path::PathBuf;

pub use header::explain_header;
pub use image::{ImageScan, PAGE_ENTRIES, check_image, scan_image, slots, sound_extension};
pub use merge::merge_untouched;
pub use used::Used;

/// How bad a finding is. The class of a whole check is the worst of its findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Nothing to find.
    Clean,
    /// Space or files are lost, nothing else.
    Leak,
    /// Not closed cleanly, or an operation was interrupted.
    Dirty,
    /// The bytes contradict the format.
    Corrupt,
}

impl Class {
    /// The class's name in JSON: `clean`, `leak`, `dirty`, `corrupt`.
    pub fn name(self) -> &'static str {
        match self {
            Class::Clean => "clean",
            Class::Leak => "leak",
            Class::Dirty => "dirty",
            Class::Corrupt => "corrupt",
        }
    }
}

/// What was found. The names are stable: they appear in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// The in-use mark is set.
    InUse,
    /// A version conversion was interrupted.
    ConversionInterrupted,
    /// Two entries name one cluster.
    DuplicateEntry,
    /// An entry points past the end of the file.
    EntryBeyondEof,
    /// The end of the file cuts an entry's cluster.
    ClusterTruncated,
    /// An entry points into the header or BAT.
    EntryInMetadata,
    /// A v1 entry is off the cluster grid.
    MisalignedEntry,
    /// A BAT slot behind the last entry is not zero.
    SlotPastEnd,
    /// The number of entries does not fit the size.
    EntryCountMismatch,
    /// Header flags that nobody defined.
    UnknownFlags,
    /// The file goes on behind the last cluster in use.
    LeakedTail,
    /// Clusters inside the file that no entry names.
    UnreferencedClusters,
    /// The file's length is no multiple of the cluster.
    LengthMisaligned,
    /// The format extension lies outside the file.
    ExtensionDangling,
    /// The format extension does not begin with its magic.
    ExtensionMagic,
    /// A BAT entry names the cluster of the format extension.
    ExtensionOverlapsData,
    /// The extension has a feature that we must not write without understanding.
    UnknownFeature,
    /// The header points to an extension and says that there is none in force.
    ExtensionStale,
    /// The extension's MD5 is not that of its content.
    ExtensionChecksum,
    /// A section of the extension does not fit its cluster, or is too short for what it is.
    ExtensionSectionLength,
    /// The bitmap is of a disk of another size.
    ExtensionSizeMismatch,
    /// The bitmap's granularity is no power of two.
    ExtensionGranularity,
    /// The bitmap's table has not as many entries as disk and granularity need.
    ExtensionBitmapCount,
    /// The bitmap has no table at all.
    ExtensionBitmapEmpty,
    /// The bitmap's table points to where no cluster of the file is.
    ExtensionBitmapOutOfBounds,
    /// Cluster, size and number of entries contradict each other.
    GeometryInconsistent,
    /// The data area begins later than it could.
    DataOffsetGap,
    /// Cluster, size or data area are of a kind that OpenVZ's tools refuse.
    ForeignGeometry,
    /// The extension has a feature that is not known here and goes with the first write.
    DroppableFeature,
}

impl FindingKind {
    /// The kind's stable name.
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::InUse => "in-use",
            FindingKind::ConversionInterrupted => "conversion-interrupted",
            FindingKind::DuplicateEntry => "duplicate-entry",
            FindingKind::EntryBeyondEof => "entry-beyond-eof",
            FindingKind::ClusterTruncated => "cluster-truncated",
            FindingKind::EntryInMetadata => "entry-in-metadata",
            FindingKind::MisalignedEntry => "misaligned-entry",
            FindingKind::SlotPastEnd => "slot-past-end",
            FindingKind::EntryCountMismatch => "entry-count-mismatch",
            FindingKind::UnknownFlags => "unknown-flags",
            FindingKind::LeakedTail => "leaked-tail",
            FindingKind::UnreferencedClusters => "unreferenced-clusters",
            FindingKind::LengthMisaligned => "length-misaligned",
            FindingKind::ExtensionDangling => "extension-dangling",
            FindingKind::ExtensionMagic => "extension-magic",
            FindingKind::ExtensionOverlapsData => "extension-overlaps-data",
            FindingKind::UnknownFeature => "unknown-feature",
            FindingKind::ExtensionStale => "extension-stale",
            FindingKind::ExtensionChecksum => "extension-checksum",
            FindingKind::ExtensionSectionLength => "extension-section-length",
            FindingKind::ExtensionSizeMismatch => "extension-size-mismatch",
            FindingKind::ExtensionGranularity => "extension-granularity",
            FindingKind::ExtensionBitmapCount => "extension-bitmap-count",
            FindingKind::ExtensionBitmapEmpty => "extension-bitmap-empty",
            FindingKind::ExtensionBitmapOutOfBounds => "extension-bitmap-out-of-bounds",
            FindingKind::GeometryInconsistent => "geometry-inconsistent",
            FindingKind::DataOffsetGap => "data-offset-gap",
            FindingKind::ForeignGeometry => "foreign-geometry",
            FindingKind::DroppableFeature => "droppable-feature",
        }
    }

    /// How bad it is.
    pub fn class(self) -> Class {
        match self {
            FindingKind::InUse | FindingKind::ConversionInterrupted => Class::Dirty,
            FindingKind::LeakedTail
            | FindingKind::UnreferencedClusters
            | FindingKind::LengthMisaligned => Class::Leak,
            FindingKind::UnknownFeature
            | FindingKind::ExtensionStale
            | FindingKind::ExtensionBitmapEmpty
            | FindingKind::DataOffsetGap
            | FindingKind::ForeignGeometry
            | FindingKind::DroppableFeature => Class::Clean,
            _ => Class::Corrupt,
        }
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// In which file.
    pub path: PathBuf,
    /// At which byte of it.
    pub offset: u64,
    /// The cluster of the file concerned, counted from its first byte, where there is one.
    pub cluster: Option<u64>,
    /// The guest bytes concerned, where there are any.
    pub guest: Option<Range<u64>>,
    /// One sentence with all operands.
    pub what: String,
}

/// The worst class among `findings`.
pub fn class_of(findings: &[Finding]) -> Class {
    findings
        .iter()
        .map(|f| f.kind.class())
        .max()
        .unwrap_or(Class::Clean)
}
