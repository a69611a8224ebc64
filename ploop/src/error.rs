//! The one error of this workspace: a small stable kind, and the context an operator needs.
//!
//! ```text
//! Error ── kind      what class of failure; maps to an NBD errno and an exit code
//!       ├─ what      one sentence: what failed, with all operands
//!       ├─ path      on which file
//!       ├─ offset    at which byte of that file
//!       ├─ fix       what to do next, where we know it
//!       ├─ defect    of a descriptor: what is wrong with it, by name
//!       └─ source    the cause below
//! ```
//!
//! `Error` is one pointer wide, so a `Result<()>` on the data path costs a register.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::descriptor::Defect;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The class of a failure. Small and stable: programs match on this, people read the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The operating system refused or failed an operation.
    Io,
    /// A file, disk, snapshot, template or export that was named does not exist.
    NotFound,
    /// Something of that name is already there.
    Exists,
    /// The caller asked for something that makes no sense (a size, a name, a range).
    Invalid,
    /// The bytes of a file contradict its format.
    Corrupt,
    /// Well formed, but something this program does not do. Always says what.
    Unsupported,
    /// Somebody else holds the disk or the file.
    InUse,
    /// The host, the quota or the image is full.
    NoSpace,
    /// The operating system or a path rule forbids it.
    Permission,
    /// A write to something that is read-only.
    ReadOnly,
    /// An earlier failure made the disk unsafe; it must be reopened and checked.
    Latched,
}

impl Kind {
    /// The process exit code for this kind (README, "Exit codes"). 2 is kept for usage errors.
    pub const fn exit_code(self) -> u8 {
        match self {
            Kind::Io | Kind::Latched => 1,
            Kind::Invalid => 2,
            Kind::NotFound => 3,
            Kind::Exists => 4,
            Kind::InUse => 5,
            Kind::Corrupt => 6,
            Kind::Unsupported => 7,
            Kind::NoSpace => 8,
            Kind::Permission | Kind::ReadOnly => 9,
        }
    }

    /// The kind's name in JSON output and in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Io => "io",
            Kind::NotFound => "not-found",
            Kind::Exists => "exists",
            Kind::Invalid => "invalid",
            Kind::Corrupt => "corrupt",
            Kind::Unsupported => "unsupported",
            Kind::InUse => "in-use",
            Kind::NoSpace => "no-space",
            Kind::Permission => "permission",
            Kind::ReadOnly => "read-only",
            Kind::Latched => "latched",
        }
    }

    fn of(e: &io::Error) -> Kind {
        match e.kind() {
            // Where a file stands instead of a directory, nothing can be behind it.
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Kind::NotFound,
            // Too long for a name.
            io::ErrorKind::InvalidFilename => Kind::Invalid,
            io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => Kind::Exists,
            io::ErrorKind::PermissionDenied => Kind::Permission,
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Kind::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem => Kind::ReadOnly,
            // Links in a circle.
            _ if e.raw_os_error() == Some(libc::ELOOP) => Kind::Invalid,
            io::ErrorKind::WouldBlock | io::ErrorKind::AddrInUse => Kind::InUse,
            _ => Kind::Io,
        }
    }
}

/// What failed, where, why, and what to do next. See the module text for the parts.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    what: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    fix: Option<String>,
    defect: Option<Defect>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `what` is one sentence with all operands, no final stop.
    pub fn new(kind: Kind, what: impl Into<String>) -> Error {
        Error(Box::new(Inner {
            kind,
            what: what.into(),
            path: None,
            offset: None,
            fix: None,
            defect: None,
            source: None,
        }))
    }

    /// [`Kind::Corrupt`], with the sentence.
    pub fn corrupt(what: impl Into<String>) -> Error {
        Error::new(Kind::Corrupt, what)
    }

    /// [`Kind::Invalid`], with the sentence.
    pub fn invalid(what: impl Into<String>) -> Error {
        Error::new(Kind::Invalid, what)
    }

    /// [`Kind::Unsupported`], with the sentence.
    pub fn unsupported(what: impl Into<String>) -> Error {
        Error::new(Kind::Unsupported, what)
    }

    /// The operating system's error while doing `what` ("read", "create") on `path`.
    pub fn io(what: impl Into<String>, path: impl AsRef<Path>, source: io::Error) -> Error {
        Error::new(Kind::of(&source), what)
            .on(path)
            .caused_by(source)
    }

    /// Adds the file.
    #[must_use]
    pub fn on(mut self, path: impl AsRef<Path>) -> Error {
        self.0.path = Some(path.as_ref().to_path_buf());
        self
    }

    /// Adds the byte offset in that file.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Error {
        self.0.offset = Some(offset);
        self
    }

    /// Adds what to do next: an imperative sentence, with the exact command where there is one.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Error {
        self.0.fix = Some(fix.into());
        self
    }

    /// Adds what is wrong with a descriptor.
    #[must_use]
    pub(crate) fn with_defect(mut self, defect: Defect) -> Error {
        self.0.defect = Some(defect);
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(mut self, e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.0.source = Some(e.into());
        self
    }

    /// Puts `before` and a colon before the sentence: "open the disk: …".
    #[must_use]
    pub fn while_doing(mut self, before: impl fmt::Display) -> Error {
        self.0.what = format!("{before}: {}", self.0.what);
        self
    }

    /// The class of the failure.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The file, where one is known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The byte offset in [`Error::path`], where one is known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The sentence alone.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// What to do next, where it is known.
    pub fn fix_text(&self) -> Option<&str> {
        self.0.fix.as_deref()
    }

    /// What is wrong with the descriptor, where it is about one that contradicts its format.
    pub fn defect(&self) -> Option<Defect> {
        self.0.defect
    }

    /// True when the host has no room, as opposed to a quota or an image that is full: it may have
    /// some later, whatever the disk does.
    pub fn is_host_full(&self) -> bool {
        self.kind() == Kind::NoSpace
            && matches!(self.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
    }

    /// The operating system's error number, if that is where it came from.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0
            .source
            .as_ref()?
            .downcast_ref::<io::Error>()?
            .raw_os_error()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &self.0;
        if let Some(path) = &e.path {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(offset) = e.offset {
            write!(f, "offset {offset:#x} ({offset}): ")?;
        }
        f.write_str(&e.what)?;
        if let Some(source) = &e.source {
            write!(f, ": {source}")?;
        }
        if let Some(fix) = &e.fix {
            write!(f, ". {fix}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {self}", self.0.kind.name())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The cause is part of Display: an operator sees it once, whoever prints the chain.
        None
    }
}
