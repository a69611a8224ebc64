//! What a descriptor can be refused for, by name: programs go by these, whatever the sentence says.

use crate::error::Error;

/// Why a descriptor contradicts its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Defect {
    /// It is no XML, or ends too early.
    NotWellFormed,
    /// It is not in the encoding that it declares, or not in UTF-8.
    BadEncoding,
    /// It has a document type, which could define entities.
    Dtd,
    /// It is deeper, or longer, than what is read.
    TooLarge,
    /// An element that a disk needs is not there.
    MissingElement,
    /// An element where OpenVZ's tool takes it for another one, or a second one of a kind.
    UnexpectedElement,
    /// A number that is none, or impossible.
    BadNumber,
    /// A cluster size that is impossible.
    BadBlocksize,
    /// A GUID that is none, or the one that means "none".
    BadGuid,
    /// An image of no known type.
    BadType,
    /// A file or directory name that is none.
    BadPath,
    /// Padding that is not 0.
    Padding,
    /// Two images, or two snapshots, of one GUID.
    DuplicateGuid,
    /// Two images in one file.
    DuplicateFile,
    /// A snapshot without an image.
    MissingImage,
    /// An image without a snapshot.
    MissingShot,
    /// A parent that the disk does not have.
    UnknownParent,
    /// Parents in a circle.
    ParentCycle,
    /// A top without an image.
    TopMissing,
    /// A top that is marked for removal.
    TemporaryTop,
}

impl Defect {
    /// All of them.
    pub const ALL: [Defect; 20] = [
        Defect::NotWellFormed,
        Defect::BadEncoding,
        Defect::Dtd,
        Defect::TooLarge,
        Defect::MissingElement,
        Defect::UnexpectedElement,
        Defect::BadNumber,
        Defect::BadBlocksize,
        Defect::BadGuid,
        Defect::BadType,
        Defect::BadPath,
        Defect::Padding,
        Defect::DuplicateGuid,
        Defect::DuplicateFile,
        Defect::MissingImage,
        Defect::MissingShot,
        Defect::UnknownParent,
        Defect::ParentCycle,
        Defect::TopMissing,
        Defect::TemporaryTop,
    ];

    /// Its stable name.
    pub fn name(self) -> &'static str {
        match self {
            Defect::NotWellFormed => "not-well-formed",
            Defect::BadEncoding => "bad-encoding",
            Defect::Dtd => "dtd",
            Defect::TooLarge => "xml-too-deep",
            Defect::MissingElement => "missing-element",
            Defect::UnexpectedElement => "unexpected-element",
            Defect::BadNumber => "bad-number",
            Defect::BadBlocksize => "bad-blocksize",
            Defect::BadGuid => "bad-guid",
            Defect::BadType => "bad-type",
            Defect::BadPath => "bad-path",
            Defect::Padding => "padding",
            Defect::DuplicateGuid => "duplicate-guid",
            Defect::DuplicateFile => "duplicate-file",
            Defect::MissingImage => "missing-image",
            Defect::MissingShot => "missing-shot",
            Defect::UnknownParent => "unknown-parent",
            Defect::ParentCycle => "parent-cycle",
            Defect::TopMissing => "top-missing",
            Defect::TemporaryTop => "temporary-top",
        }
    }

    /// The refusal of a descriptor that has it.
    pub(super) fn refuse(self, what: impl Into<String>) -> Error {
        Error::corrupt(what).with_defect(self)
    }
}
