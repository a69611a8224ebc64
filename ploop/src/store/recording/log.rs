//! What happened, in order, and what of it a power cut can take back piece by piece.

use std::ffi::OsString;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::store::SECTOR;
use crate::store::memory::{Disk, PAGE};

/// A directory entry: the directory by inode number, and the path that the caller used.
#[derive(Clone, Debug)]
pub(super) struct Name {
    pub(super) dir: u64,
    pub(super) name: OsString,
    pub(super) path: PathBuf,
}

/// How a sync ended. Only `Done` makes anything durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    /// Reported as failed; what it covered can never be made durable by a later one.
    Failed,
    /// Reported as done but left out.
    Dropped,
}

/// What a call did.
#[derive(Clone, Debug)]
pub(super) enum Action {
    Create {
        file: u64,
        name: Name,
    },
    Write {
        file: u64,
        offset: u64,
        bytes: Arc<[u8]>,
        grew: bool,
    },
    SetLen {
        file: u64,
        len: u64,
    },
    Punch {
        file: u64,
        offset: u64,
        len: u64,
    },
    Zero {
        file: u64,
        offset: u64,
        len: u64,
    },
    Rename {
        ino: u64,
        from: Name,
        to: Name,
    },
    /// A second name of a file. A file that has two is never renamed by code under test.
    HardLink {
        file: u64,
        name: Name,
    },
    Remove {
        name: Name,
    },
    CreateDir {
        dir: u64,
        name: Name,
    },
    RemoveDir {
        name: Name,
    },
    /// `started` is the number of events logged when the sync began: it covers those only.
    Sync {
        file: u64,
        started: usize,
        outcome: Outcome,
    },
    SyncDir {
        dir: u64,
        started: usize,
        outcome: Outcome,
    },
    SyncAll {
        started: usize,
        outcome: Outcome,
    },
    Mark(u64),
}

/// One line of the log.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) path: Arc<Path>,
    pub(super) action: Action,
}

impl Event {
    pub(super) fn new(path: &Path, action: Action) -> Event {
        Event {
            path: Arc::from(path),
            action,
        }
    }

    pub(super) fn is_mark(&self) -> bool {
        matches!(self.action, Action::Mark(_))
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let ended = |outcome: &Outcome| match outcome {
            Outcome::Done => "",
            Outcome::Failed => " (failed)",
            Outcome::Dropped => " (dropped)",
        };
        match &self.action {
            Action::Create { .. } => write!(f, "create {path}"),
            Action::Write { offset, bytes, .. } => {
                write!(f, "write {path} {offset:#x}+{:#x}", bytes.len())
            }
            Action::SetLen { len, .. } => write!(f, "set_len {path} {len:#x}"),
            Action::Punch { offset, len, .. } => write!(f, "punch {path} {offset:#x}+{len:#x}"),
            Action::Zero { offset, len, .. } => write!(f, "zero {path} {offset:#x}+{len:#x}"),
            Action::Rename { to, .. } => write!(f, "rename {path} {}", to.path.display()),
            Action::HardLink { name, .. } => write!(f, "link {path} {}", name.path.display()),
            Action::Remove { .. } => write!(f, "remove {path}"),
            Action::CreateDir { .. } => write!(f, "create_dir {path}"),
            Action::RemoveDir { .. } => write!(f, "remove_dir {path}"),
            Action::Sync { outcome, .. } => write!(f, "sync {path}{}", ended(outcome)),
            Action::SyncDir { outcome, .. } => write!(f, "sync_dir {path}{}", ended(outcome)),
            Action::SyncAll { outcome, .. } => write!(f, "sync_all {path}{}", ended(outcome)),
            Action::Mark(mark) => write!(f, "mark {mark}"),
        }
    }
}

/// The smallest piece of a change that survives or is lost as a whole.
#[derive(Debug)]
pub(super) enum Unit {
    /// Bytes inside one sector: `part` of what was written, to `offset`. Moves no length.
    Data {
        file: u64,
        offset: u64,
        bytes: Arc<[u8]>,
        part: Range<usize>,
    },
    /// Zeros.
    Clear { file: u64, offset: u64, len: u64 },
    /// The length, whatever it was before. Growing shows surviving data that lies there.
    Len { file: u64, len: u64 },
    /// A new name.
    Link { ino: u64, name: Name },
    /// The old name goes and the new one comes, in one step.
    Rename { ino: u64, from: Name, to: Name },
    /// A name goes.
    Unlink { name: Name },
}

/// Runs that a large punch is cut into at most: it tears, but does not drown all other units.
const RUNS: u64 = 16;

impl Action {
    /// The units of this change, in the order in which the disk would see them; none for a sync.
    pub(super) fn units(&self) -> Vec<Unit> {
        match self {
            Action::Write {
                file,
                offset,
                bytes,
                grew,
            } => {
                let end = offset + bytes.len() as u64;
                let mut units: Vec<Unit> = pieces(*offset, end, SECTOR)
                    .map(|at| Unit::Data {
                        file: *file,
                        offset: at.start,
                        bytes: Arc::clone(bytes),
                        part: (at.start - offset) as usize..(at.end - offset) as usize,
                    })
                    .collect();
                units.extend(grew.then_some(Unit::Len {
                    file: *file,
                    len: end,
                }));
                units
            }
            Action::SetLen { file, len } => vec![Unit::Len {
                file: *file,
                len: *len,
            }],
            Action::Punch { file, offset, len } | Action::Zero { file, offset, len } => {
                let step = if *len <= PAGE {
                    SECTOR
                } else {
                    len.div_ceil(RUNS).next_multiple_of(PAGE)
                };
                pieces(*offset, offset + len, step)
                    .map(|at| Unit::Clear {
                        file: *file,
                        offset: at.start,
                        len: at.end - at.start,
                    })
                    .collect()
            }
            Action::Create { file: ino, name }
            | Action::HardLink { file: ino, name }
            | Action::CreateDir { dir: ino, name } => {
                vec![Unit::Link {
                    ino: *ino,
                    name: name.clone(),
                }]
            }
            Action::Rename { ino, from, to } => {
                vec![Unit::Rename {
                    ino: *ino,
                    from: from.clone(),
                    to: to.clone(),
                }]
            }
            Action::Remove { name } | Action::RemoveDir { name } => {
                vec![Unit::Unlink { name: name.clone() }]
            }
            Action::Sync { .. }
            | Action::SyncDir { .. }
            | Action::SyncAll { .. }
            | Action::Mark(_) => Vec::new(),
        }
    }
}

/// Cuts a range at multiples of `step`.
fn pieces(mut at: u64, end: u64, step: u64) -> impl Iterator<Item = Range<u64>> {
    std::iter::from_fn(move || {
        let start = at;
        at = (start / step + 1).saturating_mul(step).min(end);
        (start < end).then_some(start..at)
    })
}

impl Unit {
    /// The file whose bytes or length this is; `None` for a name.
    pub(super) fn file(&self) -> Option<u64> {
        match self {
            Unit::Data { file, .. } | Unit::Clear { file, .. } | Unit::Len { file, .. } => {
                Some(*file)
            }
            Unit::Link { .. } | Unit::Rename { .. } | Unit::Unlink { .. } => None,
        }
    }

    /// The directories that must be synced before this name is durable; none for a file's bytes.
    pub(super) fn dirs(&self) -> Vec<u64> {
        match self {
            Unit::Link { name, .. } | Unit::Unlink { name } => vec![name.dir],
            Unit::Rename { from, to, .. } if from.dir == to.dir => vec![to.dir],
            Unit::Rename { from, to, .. } => vec![from.dir, to.dir],
            Unit::Data { .. } | Unit::Clear { .. } | Unit::Len { .. } => Vec::new(),
        }
    }

    /// Does it to a disk on which earlier units may be missing.
    pub(super) fn apply(&self, disk: &mut Disk) {
        if let Some(pages) = self.file().and_then(|file| disk.files.get_mut(&file)) {
            let pages = Arc::make_mut(pages);
            match self {
                Unit::Data {
                    offset,
                    bytes,
                    part,
                    ..
                } => pages.put(&bytes[part.clone()], *offset),
                Unit::Clear { offset, len, .. } => pages.clear(*offset, *len),
                Unit::Len { len, .. } => pages.set_len(*len),
                Unit::Link { .. } | Unit::Rename { .. } | Unit::Unlink { .. } => {}
            }
            return;
        }
        let dirs = Arc::make_mut(&mut disk.dirs);
        match self {
            Unit::Link { ino, name } => {
                dirs.entry(name.dir)
                    .or_default()
                    .insert(name.name.clone(), *ino);
            }
            Unit::Unlink { name } => {
                dirs.entry(name.dir).or_default().remove(&name.name);
            }
            Unit::Rename { ino, from, to } => {
                // An earlier rename of the same file may be lost: wherever it is, it leaves.
                dirs.values_mut()
                    .for_each(|dir| dir.retain(|_, there| there != ino));
                dirs.entry(from.dir).or_default().remove(&from.name);
                dirs.entry(to.dir)
                    .or_default()
                    .insert(to.name.clone(), *ino);
            }
            Unit::Data { .. } | Unit::Clear { .. } | Unit::Len { .. } => {}
        }
    }

    /// For people: what it is, on `path`.
    pub(super) fn describe(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Unit::Data { offset, part, .. } => format!("data {path} {offset:#x}+{:#x}", part.len()),
            Unit::Clear { offset, len, .. } => format!("zeros {path} {offset:#x}+{len:#x}"),
            Unit::Len { len, .. } => format!("length {path} {len:#x}"),
            Unit::Link { .. } => format!("name {path}"),
            Unit::Rename { to, .. } => format!("rename {path} {}", to.path.display()),
            Unit::Unlink { .. } => format!("removal {path}"),
        }
    }
}
