//! Another tool repairs the image of a disk after a crash, and then the disk comes back to us.
//!
//! ```text
//!  state ── write_out ──► a real directory each for ─┬─ nobody
//!                                                    ├─ qemu-img check -r all
//!                                                    ├─ qemu-io, writing a whole cluster
//!                                                    ├─ the same, crashed before it flushed
//!                                                    ├─ ploop check -f -c -d      OpenVZ 7
//!                                                    └─ the same, cutting the end  OpenVZ 6
//!            all sectors ◄── read-only, read-write, closed ◄── Opener::host
//! ```
//!
//! Nothing that a foreign tool says matters here; what it leaves in the files does. A disk with a
//! journal (`.ploop/journal.*`) need not open after it. When it does, a sector holds
//!
//! | in a cluster of which the image itself has an entry | what a crash may leave |
//! |---|---|
//! | in any other | that, or what it was before any write, or what lies below |
//!
//! and what the tool wrote for the guest is there; where it changed no byte, what a crash may leave, without a refusal. So nothing is ever
//! zeros that the guest did not zero.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::RwLock;

use ploop::disk::open::{DESCRIPTOR, OpenOptions, Opener, Source};
use ploop::format::ploop::Header;
use ploop::format::ploop::header::IN_USE_DIRTY;
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, EntryKind, Store};
use tempfile::TempDir;

use super::fixture::{Fixture, words_of};
use super::history::{History, View};
use super::qemu::write_out;
use super::{CLUSTER, CLUSTER_SECTORS};
use crate::server::u32_at;
use crate::tools::tool;

/// Who comes between the crash and us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// Nobody.
    None,
    /// `qemu-img check -r all`.
    QemuCheck,
    /// `qemu-io`, which repairs what it opens, and writes a cluster where the image has room.
    QemuWrite,
    /// The same, ended before it wrote its table or closed: the header and the table are as they
    /// were, what lies behind them is not.
    QemuCrash,
    /// OpenVZ 7's `ploop check -f -c -d`.
    Openvz,
    /// OpenVZ 6's, which also cuts what lies behind the last cluster in use.
    OpenvzCutting,
}

impl Tool {
    /// All of them.
    pub const ALL: [Tool; 6] = [
        Tool::None,
        Tool::QemuCheck,
        Tool::QemuWrite,
        Tool::QemuCrash,
        Tool::Openvz,
        Tool::OpenvzCutting,
    ];
}

/// What came of a state under one tool.
#[derive(Debug)]
pub struct Outcome {
    tool: Tool,
    /// The tool left other bytes than it found.
    pub changed: bool,
    /// What the disk reads, opened read-only. Error: why it does not open.
    read_only: Result<Vec<u64>, String>,
    /// The same, opened for writing.
    read_write: Result<Vec<u64>, String>,
}

impl Outcome {
    /// Whether one of the two ways to open it was refused.
    pub fn refused(&self) -> bool {
        self.read_only.is_err() || self.read_write.is_err()
    }
}

/// What is allowed after a tool that changed something.
#[derive(Clone, Debug)]
pub struct Weak {
    ever: Vec<Vec<u64>>,
    below: Vec<u64>,
}

impl Weak {
    /// At `point` of a run on `fx`.
    pub fn at(fx: &Fixture, history: &History, point: usize) -> Weak {
        Weak {
            ever: history.ever(point),
            below: fx.below.to_vec(),
        }
    }
}

/// A state as it lies on the disk: the number of its bytes, and of which clusters its top image has
/// an entry.
#[derive(Debug)]
pub struct Left {
    store: MemoryStore,
    image: PathBuf,
    /// The same for equal states.
    pub number: u64,
    named: Vec<bool>,
    /// There is a journal beside the image.
    journal: bool,
}

impl Left {
    /// The state in `store`.
    pub fn new(fx: &Fixture, store: MemoryStore) -> Left {
        let top = fx.top_file(&store);
        let entry = |cluster: u64| {
            let mut slot = [0; 4];
            top.read_at(&mut slot, Header::slot_offset(cluster))
                .unwrap();
            slot != [0; 4]
        };
        let named = (0..fx.clusters).map(entry).collect();
        let mut hasher = DefaultHasher::new();
        let mut journal = false;
        let dir = fx.top_path().parent().unwrap().to_path_buf();
        walk(&store, &dir, &mut |path, content| {
            path.hash(&mut hasher);
            content.hash(&mut hasher);
            let name = path.file_name().unwrap().to_string_lossy();
            journal |= path.parent().unwrap().ends_with(".ploop") && name.starts_with("journal.");
        });
        Left {
            image: fx.top_path(),
            number: hasher.finish(),
            store,
            named,
            journal,
        }
    }

    /// Lets each tool at a copy of its own, and opens what it leaves. Error: it opens, and then
    /// something is wrong that no view could allow.
    pub fn outcomes(&self) -> Result<Vec<Outcome>, String> {
        let room = TempDir::new().unwrap();
        let try_one = |(n, tool): (usize, &Tool)| {
            let dir = room.path().join(n.to_string());
            self.outcome(*tool, &dir)
                .map_err(|why| format!("{tool:?}: {why}"))
        };
        Tool::ALL.iter().enumerate().map(try_one).collect()
    }

    fn outcome(&self, tool: Tool, dir: &Path) -> Result<Outcome, String> {
        let from = self.image.parent().unwrap();
        fs::create_dir(dir).unwrap();
        walk(&self.store, from, &mut |path, content| {
            let to = dir.join(path.strip_prefix(from).unwrap());
            match content {
                None => fs::create_dir(to).unwrap(),
                Some(_) => {
                    let file = self.store.open(path, Access::Read).unwrap();
                    write_out(file.as_ref(), &to);
                }
            }
        });
        let image = dir.join(self.image.file_name().unwrap());
        let before = fs::read(&image).unwrap();
        match tool {
            Tool::None => {}
            Tool::QemuCheck => qemu_check(&image)?,
            Tool::QemuWrite => qemu_write(&image, self.cluster_to_write(), false)?,
            Tool::QemuCrash => qemu_write(&image, self.cluster_to_write(), true)?,
            Tool::Openvz => openvz_repair(&image, false),
            Tool::OpenvzCutting => openvz_repair(&image, true),
        }
        // QEMU makes it far longer.
        let len = fs::metadata(&image).unwrap().len();
        let changed = before.len() as u64 != len || before != fs::read(&image).unwrap();
        let read_only = open(dir, false, |_| Ok(()))?;
        let read_write = open(dir, true, |disk| {
            disk.close().map_err(|e| format!("close: {e}"))
        })?;
        if let (Ok(one), Ok(other)) = (&read_only, &read_write)
            && one != other
        {
            return Err("opened for writing it reads other bytes than read-only".into());
        }
        if let Ok(words) = &read_write {
            let after = open(dir, false, |_| Ok(()))?;
            let after = after.map_err(|why| format!("closed, it does not open any more: {why}"))?;
            if &after != words {
                return Err("closed, it reads other bytes than before".into());
            }
        }
        Ok(Outcome {
            tool,
            changed,
            read_only,
            read_write,
        })
    }

    /// One that the image has no entry of: QEMU takes for free what is a part's of ours.
    fn cluster_to_write(&self) -> u64 {
        self.named.iter().position(|named| !named).unwrap_or(0) as u64
    }

    /// Compares an outcome with what is allowed at a point that leaves this state.
    pub fn check(&self, outcome: &Outcome, view: &View, weak: &Weak) -> Result<(), String> {
        let mut allowed = view.clone();
        if outcome.changed {
            for (sector, list) in allowed.allowed.iter_mut().enumerate() {
                if !self.named[sector / CLUSTER_SECTORS as usize] {
                    list.extend(&weak.ever[sector]);
                    list.push(weak.below[sector]);
                    list.sort_unstable();
                    list.dedup();
                }
            }
        }
        let first = (self.cluster_to_write() * CLUSTER_SECTORS) as usize;
        for list in &mut allowed.allowed[first..first + CLUSTER_SECTORS as usize] {
            match outcome.tool {
                Tool::QemuWrite => *list = vec![u64::from_le_bytes([PATTERN; 8])],
                Tool::QemuCrash => list.push(u64::from_le_bytes([PATTERN; 8])),
                _ => {}
            }
        }
        for (how, words) in [
            ("read-only", &outcome.read_only),
            ("for writing", &outcome.read_write),
        ] {
            let wrong = match words {
                Ok(words) => allowed.check(words).err(),
                Err(_) if outcome.changed && self.journal => None,
                Err(why) => Some(format!("refused: {why}")),
            };
            if let Some(why) = wrong {
                let (tool, changed) = (outcome.tool, outcome.changed);
                return Err(format!(
                    "opened {how} after {tool:?} (changed: {changed}): {why}"
                ));
            }
        }
        Ok(())
    }
}

/// Each directory and file below `dir`, in the order of names: its path, and a file's bytes.
fn walk(store: &MemoryStore, dir: &Path, see: &mut dyn FnMut(&Path, Option<&[u8]>)) {
    let mut names = store.list(dir).unwrap();
    names.sort();
    for name in names {
        let path = dir.join(name);
        if store.kind(&path).unwrap() == Some(EntryKind::Dir) {
            see(&path, None);
            walk(store, &path, see);
            continue;
        }
        let file = store.open(&path, Access::Read).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        see(&path, Some(&bytes));
    }
}

/// A child has its parent's files, and so their locks, until its own program begins: no image is open
/// here while one is started.
static OPEN_OR_START: RwLock<()> = RwLock::new(());

type Opened = Result<Result<Vec<u64>, String>, String>;

/// Opens the disk in `dir` as the program does and reads all of it. The inner error is the
/// refusal, the outer one a disk that opens and does not work.
fn open(
    dir: &Path,
    write: bool,
    then: impl Fn(&ploop::disk::Disk) -> Result<(), String>,
) -> Opened {
    let source = Source {
        path: dir.join(DESCRIPTOR),
        descriptor: true,
        snapshot: None,
    };
    let options = OpenOptions {
        write,
        ..OpenOptions::default()
    };
    let _open = OPEN_OR_START.read().unwrap();
    match Opener::host().open(&source, &options) {
        Err(e) => Ok(Err(e.to_string())),
        Ok(disk) => {
            let words = words_of(&disk)?;
            then(&disk)?;
            Ok(Ok(words))
        }
    }
}

/// What QEMU writes.
const PATTERN: u8 = 0x51;

/// QEMU's findings are its own matter, but it must have looked.
fn qemu_check(image: &Path) -> Result<(), String> {
    let mut check = tool("qemu-img");
    check.args(["check", "-q", "-r", "all", "-f", "parallels"]);
    let (status, said) = start(check.arg(image));
    match status.code() {
        Some(0..=3) => Ok(()),
        _ => Err(format!("qemu-img check: {status}: {said}")),
    }
}

/// An image that QEMU can't write to any more is our doing.
fn qemu_write(image: &Path, cluster: u64, crash: bool) -> Result<(), String> {
    let mut io = tool("qemu-io");
    let write = format!("write -q -P {PATTERN} {} {CLUSTER}", cluster * CLUSTER);
    io.args(["-f", "parallels", "-c", &write]);
    if crash {
        // The cache keeps the table back until a flush.
        io.args(["-t", "writeback", "-c", "abort"]);
    }
    let (status, said) = start(io.arg(image));
    let ended = match crash {
        true => status.signal() == Some(rustix::process::Signal::ABORT.as_raw()),
        false => status.success(),
    };
    match ended && !said.contains("failed") {
        true => Ok(()),
        false => Err(format!("qemu-io: {status}: {said}")),
    }
}

/// Runs a program to its end; what it said on standard error.
fn start(command: &mut Command) -> (ExitStatus, String) {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::piped());
    let child = {
        let _start = OPEN_OR_START.write().unwrap();
        command.spawn().unwrap()
    };
    let out = child.wait_with_output().unwrap();
    (
        out.status,
        String::from_utf8_lossy(&out.stderr).into_owned(),
    )
}

/// As described for `ploop check -f -c -d`: a length that is no multiple of the cluster grows to one;
/// slots behind the disk's end become zeros; an entry past the file's end, or two on one cluster, end
/// it; else the mark of a dirty image, its flags and its extension go.
fn openvz_repair(image: &Path, cut: bool) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut len = fs::metadata(image).unwrap().len();
    if !len.is_multiple_of(CLUSTER) {
        len = len.next_multiple_of(CLUSTER);
        file.set_len(len).unwrap();
    }
    let mut bytes = fs::read(image).unwrap();
    let dirty = u32_at(&bytes, 44) == IN_USE_DIRTY;
    // Version 1 counts sectors, version 2 clusters.
    let unit = match bytes.starts_with(b"WithoutFreeSpace") {
        true => CLUSTER_SECTORS,
        false => 1,
    };
    let data = u64::from(u32_at(&bytes, 48)) / CLUSTER_SECTORS;
    let size = u64::from(u32_at(&bytes, 36)) / CLUSTER_SECTORS;
    let slots = (data * CLUSTER - Header::slot_offset(0)) / 4;
    let mut used: Vec<u64> = (0..data).collect();
    for slot in 0..slots {
        let at = Header::slot_offset(slot);
        let cluster = u64::from(u32_at(&bytes, at as usize)) / unit;
        if cluster == 0 {
            continue;
        }
        if slot > size {
            file.write_all_at(&[0; 4], at).unwrap();
            continue;
        }
        if (cluster + 1) * CLUSTER > len || used.contains(&cluster) {
            return;
        }
        used.push(cluster);
    }
    if cut {
        let end = used.iter().max().map_or(data, |last| last + 1);
        file.set_len(end * CLUSTER).unwrap();
    }
    if dirty {
        bytes[44..48].fill(0);
        bytes[52..64].fill(0);
        file.write_all_at(&bytes[44..64], 44).unwrap();
    }
}
