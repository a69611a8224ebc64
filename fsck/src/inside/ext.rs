//! ext2, ext3, ext4: e2fsck, and debugfs.

use std::collections::BTreeSet;

use ploop::{Error, Kind, Result};

use super::Found;
use super::tool::{self, Said, plain};
use super::view::View;

const PACKAGE: &str = "e2fsprogs";
/// The superblock, and fields of it.
const SUPER: u64 = 1024;
const LOG_BLOCK: usize = 24;
const STATE: usize = 58;
const COMPATIBLE: usize = 92;
const INCOMPATIBLE: usize = 96;
const JOURNAL_INODE: usize = 224;
/// It has a journal.
const HAS_JOURNAL: u32 = 4;
/// It is a journal, of another.
const JOURNAL_DEVICE: u32 = 8;
/// Set of a file system that was unmounted.
const UNMOUNTED: u16 = 1;
/// Set by a kernel that met damage.
const ERRORS: u16 = 2;
/// The journal holds something.
const RECOVER: u32 = 4;
/// Bits of e2fsck's exit code.
const CORRECTED: i32 = 1;
const REBOOT: i32 = 2;
const UNCORRECTED: i32 = 4;
const FAILED: i32 = 8;
/// Blocks, or inodes, that debugfs is asked about at a time: what fits on a command line.
const ASK_MAX: usize = 4096;
/// The first inode that is a file's or directory's, but for the root's.
const FIRST_FILE: u64 = 11;
const ROOT: u64 = 2;

struct Super {
    state: u16,
    recover: bool,
    /// Its journal is on another device, as it says, or it is one: e2fsck would look for that among
    /// the host's.
    elsewhere: bool,
    block: u64,
}

fn superblock(view: &View) -> Result<Super> {
    let mut bytes = [0; 1024];
    view.read(SUPER, &mut bytes)?;
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let incompatible = word(INCOMPATIBLE);
    let outer = word(COMPATIBLE) & HAS_JOURNAL != 0 && word(JOURNAL_INODE) == 0;
    Ok(Super {
        state: u16::from_le_bytes([bytes[STATE], bytes[STATE + 1]]),
        recover: incompatible & RECOVER != 0,
        elsewhere: outer || incompatible & JOURNAL_DEVICE != 0,
        block: 1024 << u32::from(bytes[LOG_BLOCK].min(6)),
    })
}

fn e2fsck(view: &View, how: &[&str]) -> Result<Said> {
    let path = view.path();
    let mut args: Vec<&std::ffi::OsStr> = how.iter().map(|a| a.as_ref()).collect();
    args.push(path.as_os_str());
    tool::run("e2fsck", PACKAGE, &args, view.patience())
}

/// What is wrong with it.
pub(super) fn check(view: &View) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut s = superblock(view)?;
    if s.elsewhere {
        let what = "ext4 with a journal on another device, which is not looked for: not checked";
        return Ok(vec![Found::unknown(what.into())]);
    }
    if s.recover {
        found.push(Found::unclean(
            "the journal of ext4 is to be replayed".into(),
        ));
        s = settle(view, s)?;
    } else if s.state & UNMOUNTED == 0 {
        found.push(Found::unclean("ext4 says that it was not unmounted".into()));
    }
    if s.state & ERRORS != 0 {
        found.push(Found::errors(
            "ext4 says that the kernel met damage in it".into(),
        ));
    }
    let said = e2fsck(view, &["-f", "-n"])?;
    if said.code & !(CORRECTED | REBOOT) != 0 {
        let words = tool::words(&said, &view.path(), |l| {
            !(l.starts_with("e2fsck ") || l.starts_with("Pass ") || l.contains("***** "))
        });
        // A superblock that cannot be used is a failure to it.
        if said.code & !(CORRECTED | REBOOT | UNCORRECTED | FAILED) != 0 {
            let what = format!("e2fsck ended with status {}: {words}", said.code);
            return Err(Error::new(Kind::Io, what));
        }
        let zeros = match view.unknown {
            0 => String::new(),
            n => format!(" ({n} guest bytes cannot be read and were zeros for it)"),
        };
        found.push(Found::errors(format!("e2fsck -n{zeros}: {words}")));
    }
    Ok(found)
}

/// Does on the copy what a mount does: replays the journal, ends the deletion of open files; gives the
/// superblock after it. Where that fails, the check says why.
fn settle(view: &View, s: Super) -> Result<Super> {
    // With the mark of errors, or without that of an unmount, this would repair, too. The journal may
    // bring either.
    if s.state & ERRORS != 0 {
        return Ok(s);
    }
    e2fsck(view, &["-p", "-E", "journal_only"])?;
    let s = superblock(view)?;
    if s.state & ERRORS == 0 && s.state & UNMOUNTED != 0 && !s.elsewhere {
        e2fsck(view, &["-p"])?;
    }
    Ok(s)
}

/// What blocks belong to.
#[derive(Debug, Default)]
pub(super) struct Owned {
    /// Paths, in order.
    pub(super) paths: BTreeSet<String>,
    /// Inodes without a name.
    pub(super) nameless: u64,
    /// Bytes of the journal and of other files of ext4's own.
    pub(super) own: u64,
    /// Bytes of no file: free, or tables.
    pub(super) of_none: u64,
    /// debugfs said more than was kept: there may be more of all of these.
    pub(super) cut: bool,
}

/// The files that the bytes of `ranges`, within the volume, belong to.
pub(super) fn owners(view: &View, ranges: &[std::ops::Range<u64>]) -> Result<Owned> {
    let s = superblock(view)?;
    let s = match s.recover && !s.elsewhere {
        true => settle(view, s)?,
        false => s,
    };
    let mut blocks: BTreeSet<u64> = BTreeSet::new();
    for r in ranges {
        blocks.extend(r.start / s.block..r.end.div_ceil(s.block));
    }
    let mut owned = Owned::default();
    let mut inodes: BTreeSet<u64> = BTreeSet::new();
    let (rows, cut) = ask(view, "icheck", &blocks)?;
    owned.cut |= cut;
    for row in rows {
        match row.1.parse::<u64>() {
            Ok(inode) if inode >= FIRST_FILE || inode == ROOT => {
                inodes.insert(inode);
            }
            Ok(_) => owned.own += s.block,
            Err(_) => owned.of_none += s.block,
        }
    }
    let mut named = BTreeSet::new();
    let (rows, cut) = ask(view, "ncheck", &inodes)?;
    owned.cut |= cut;
    for (inode, path) in rows {
        named.insert(inode);
        // debugfs begins a path with one slash too many in some versions.
        let path = path.trim_start_matches('/');
        owned.paths.insert(plain(&format!("/{path}")));
    }
    owned.nameless = inodes.difference(&named).count() as u64;
    if inodes.contains(&ROOT) && !named.contains(&ROOT) {
        owned.nameless -= 1;
        owned.paths.insert("/".into());
    }
    Ok(owned)
}

/// A number and the rest of its line.
type Row = (u64, String);

/// Asks debugfs about numbers: rows, and whether some were not kept.
fn ask(view: &View, what: &str, about: &BTreeSet<u64>) -> Result<(Vec<Row>, bool)> {
    let about: Vec<String> = about.iter().map(u64::to_string).collect();
    let (mut rows, mut cut) = (Vec::new(), false);
    for part in about.chunks(ASK_MAX) {
        let request = format!("{what} {}", part.join(" "));
        let path = view.path();
        let args = [
            "-c".as_ref(),
            "-R".as_ref(),
            request.as_ref(),
            path.as_os_str(),
        ];
        let mut said = tool::run("debugfs", PACKAGE, &args, view.patience())?;
        // It ends with 0 whatever happened; the head of its table is there when it could ask.
        if !said.out.contains('\t') {
            said.out.clear();
            let words = tool::words(&said, &path, |l| !l.starts_with("debugfs "));
            return Err(Error::new(Kind::Io, format!("debugfs {what}: {words}")));
        }
        let row = |l: &str| {
            let (number, rest) = l.split_once('\t')?;
            Some((number.trim().parse().ok()?, rest.trim().to_owned()))
        };
        let mut lines: Vec<&str> = said.out.lines().collect();
        if said.cut {
            // The last one may be half a line.
            lines.pop();
            cut = true;
        }
        rows.extend(lines.into_iter().filter_map(row));
    }
    Ok((rows, cut))
}
