//! A store, the model of it, and operations on both.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use ploop::descriptor::Guid;
use ploop::disk::Disk;
use ploop::disk::open::Opener;
use ploop::error::{Error, Kind};
use ploop::store::memory::MemoryStore;
use snapshots::Root;
use snapshots::place::Place;
use tempfile::TempDir;

use super::data;
use super::hook::{Hook, Hooked};
use super::op::Op;
use super::oracle::{Ct, Sectors};

/// Why a run failed.
#[derive(Clone, Debug)]
pub struct Failure(pub String);

impl From<Error> for Failure {
    #[track_caller]
    fn from(e: Error) -> Failure {
        let at = std::panic::Location::caller();
        Failure(format!("{}:{}: {:?}: {e}", at.file(), at.line(), e.kind()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an operation came to.
pub type Done<T = ()> = Result<T, Failure>;

/// Fails unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::model::world::Failure(format!($($text)+)));
        }
    };
}
pub(super) use ensure;

/// What is left of a list of operations.
pub type Rest<'a> = std::slice::Iter<'a, Op>;

/// What was done how often: a run that did nothing proves nothing.
#[derive(Clone, Debug, Default)]
pub struct Tally(pub BTreeMap<&'static str, u64>);

impl Tally {
    /// Once more.
    pub fn add(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    pub(super) fn most(&mut self, what: &'static str, n: usize) {
        let most = self.0.entry(what).or_default();
        *most = (*most).max(n as u64);
    }

    /// Of both runs.
    pub fn join(&mut self, other: &Tally) {
        for (what, n) in &other.0 {
            let sum = self.0.entry(what).or_default();
            *sum = match what.starts_with("most ") {
                true => (*sum).max(*n),
                false => *sum + n,
            };
        }
    }

    /// How often.
    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }
}

/// A snapshot that is open for reading.
pub(super) struct Held {
    pub(super) ct: String,
    pub(super) guid: Guid,
    pub(super) disk: Disk,
    pub(super) sectors: Sectors,
}

/// Where the store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// In memory.
    Memory,
    /// In files of the host, with all locks.
    Files,
}

/// See the module text.
pub struct World {
    pub(super) root: Rc<Root>,
    pub(super) home: Home,
    pub(super) cts: BTreeMap<String, Ct>,
    pub(super) disks: BTreeMap<String, Arc<Disk>>,
    pub(super) held: VecDeque<Held>,
    /// The merge under way: its container, the node, its child (none: the top).
    pub(super) merging: Option<(String, Guid, Option<Guid>)>,
    /// What to compare when the operation is over.
    pub(super) touched: Vec<(String, Option<Guid>)>,
    /// What happened.
    pub tally: Tally,
    hook: Option<Hook>,
    /// Tables have room on the host that no entry uses.
    pub(super) roomy: bool,
    /// Operations of the list that were begun.
    pub(super) after: usize,
    total: usize,
    stamp: u32,
    done: usize,
    // The last to go.
    _dir: Option<TempDir>,
}

impl World {
    /// An empty store.
    pub fn new(home: Home) -> World {
        let (root, dir, hook) = match home {
            Home::Memory => {
                let (store, hook) = Hooked::on(Arc::new(MemoryStore::new()));
                store.create_dir(Path::new("/store")).unwrap();
                let root = Root::on(Opener::on(store), Path::new("/store"), true, false);
                (root.unwrap(), None, Some(hook))
            }
            Home::Files => {
                let dir = tempfile::tempdir().unwrap();
                let root = Root::open(&dir.path().join("store"), true);
                (root.unwrap(), Some(dir), None)
            }
        };
        World {
            root: Rc::new(root),
            home,
            cts: BTreeMap::new(),
            disks: BTreeMap::new(),
            held: VecDeque::new(),
            merging: None,
            touched: Vec::new(),
            tally: Tally::default(),
            hook,
            roomy: false,
            after: 0,
            total: 0,
            stamp: 0,
            done: 0,
            _dir: dir,
        }
    }

    /// Does all of it, and compares on the way and at the end.
    pub fn run(&mut self, ops: &[Op]) -> Done {
        let mut rest = ops.iter();
        self.total = ops.len();
        while let Some(op) = rest.next() {
            let done = self.one(op, &mut rest);
            done.map_err(|e| {
                let n = self.after;
                Failure(format!(
                    "operation {n} of {}: {:?}: {e}",
                    ops.len(),
                    ops[n - 1]
                ))
            })?;
        }
        self.after = ops.len();
        // Before it comes to rest, too: of a list that was cut after its failing operation this finds
        // what the look after every hundredth found.
        let end = self.everything().and_then(|()| self.finish());
        end.map_err(|e| Failure(format!("at the end: {e}")))
    }

    /// One operation (a merge: all that happens in the middle of it, too).
    pub(super) fn one(&mut self, op: &Op, rest: &mut Rest<'_>) -> Done {
        self.after = self.total - rest.len();
        if self.cts.is_empty() {
            self.create(false, false)?;
        }
        self.perform(op, rest)?;
        for (name, node) in std::mem::take(&mut self.touched) {
            self.compare(&name, node)?;
        }
        self.done += 1;
        match self.done.is_multiple_of(100) {
            true => self.everything(),
            false => Ok(()),
        }
    }

    fn perform(&mut self, op: &Op, rest: &mut Rest<'_>) -> Done {
        match *op {
            Op::Write { ct, at, len } => self.write(ct, at, len),
            Op::Zero { ct, at, len, keep } => self.zero(ct, at, len, keep),
            Op::Discard { ct, at, len } => self.discard(ct, at, len),
            Op::Abort { ct, at, len } => self.abort(ct, at, len),
            Op::Flush { ct } => self.flush(ct),
            Op::Close { ct } => {
                let name = self.name(ct);
                self.close(&name)
            }
            Op::Kill { ct } => {
                let name = self.name(ct);
                self.kill(&name)
            }
            Op::Snapshot { ct, named, offline } => self.snapshot(ct, named, offline),
            Op::Group { ct, more } => self.group(ct, more),
            Op::Rename { ct, node, named } => self.rename(ct, node, named),
            Op::Sweep { ct, store } => self.sweep(ct, store),
            Op::Switch {
                ct,
                node,
                discard,
                named,
                open,
            } => self.switch(ct, node, discard, named && !discard, open),
            Op::Delete { ct, node, run } => self.delete(ct, node, run),
            Op::DeleteForetold { ct, node } => self.delete_foretold(ct, node),
            Op::Run { ct, steps } => {
                let name = self.name(ct);
                self.go_on(&name, Some(steps.into()))
            }
            Op::MergeDown { ct, node, all } => self.merge_down(ct, node, all),
            Op::Merge { ct, node, budget } => self.merge(ct, node, budget, rest),
            // In the middle of nothing.
            Op::Step { .. } | Op::Pause | Op::Abandon => Ok(()),
            Op::Clone { ct, node, count } => self.clone_from(ct, node, count),
            Op::Remove { ct } => self.remove(ct),
            Op::New { raw, v1 } => self.create(raw, v1),
            Op::Hold { ct, node } => self.hold(ct, node),
            Op::Release => {
                let held = self.held.pop_front();
                held.map_or(Ok(()), |held| self.compare_held(&held))
            }
        }
    }

    /// The name of a container.
    pub(super) fn name(&self, ct: u8) -> String {
        let nth = usize::from(ct) % self.cts.len();
        self.cts.keys().nth(nth).unwrap().clone()
    }

    /// A container.
    pub(super) fn ct(&mut self, name: &str) -> &mut Ct {
        self.cts.get_mut(name).unwrap()
    }

    /// A snapshot of it, if it has any.
    pub(super) fn pick(&self, name: &str, node: u16) -> Option<Guid> {
        let nodes = &self.cts[name].nodes;
        let nth = usize::from(node).checked_rem(nodes.len())?;
        Some(nodes[nth].guid)
    }

    /// A number that was not there before.
    pub(super) fn stamp(&mut self) -> u32 {
        self.stamp += 1;
        self.stamp
    }

    /// Where a container is. The result must not borrow the world.
    pub(super) fn place<'a>(root: &'a Root, name: &str) -> Done<Place<'a>> {
        Ok(Place::container(root, name)?)
    }

    /// A container's disk, open.
    pub(super) fn open(&mut self, name: &str) -> Done<Arc<Disk>> {
        if let Some(disk) = self.disks.get(name) {
            return Ok(disk.clone());
        }
        let disk = Arc::new(World::place(&self.root, name)?.open()?);
        self.disks.insert(name.to_owned(), disk.clone());
        self.tally.add("opened");
        Ok(disk)
    }

    /// Closes a disk that is open.
    pub(super) fn close(&mut self, name: &str) -> Done {
        let Some(disk) = self.disks.remove(name) else {
            return Ok(());
        };
        disk.close()?;
        ensure!(
            Arc::strong_count(&disk) == 1,
            "the test itself holds {name}"
        );
        drop(disk);
        self.ct(name).flushed();
        self.touch(name, None);
        self.tally.add("closed");
        Ok(())
    }

    /// Drops a disk that is open. What it may have lost is found out by a reader, who writes
    /// nothing; whoever opens it next must see the same.
    pub(super) fn kill(&mut self, name: &str) -> Done {
        let Some(disk) = self.disks.remove(name) else {
            return Ok(());
        };
        ensure!(
            Arc::strong_count(&disk) == 1,
            "the test itself holds {name}"
        );
        drop(disk);
        self.roomy = true;
        let found = self.read_node(name, None)?;
        let ct = self.ct(name);
        for (sector, &value) in found.iter().enumerate() {
            ensure!(
                ct.may_be(sector, value),
                "{name}, sector {sector}, after a kill: {value}, flushed was {}, then {:?}",
                ct.durable[sector],
                ct.since.get(&sector)
            );
        }
        ct.survived(found);
        self.tally.add("killed");
        Ok(())
    }

    /// Does `work`, which rearranges the open disk of `name`. In the middle of it, whenever a
    /// descriptor is put in force, the disk must read what it did; with `write`, these sectors are
    /// written as soon as there is a new top. Returns whether they were. Not on files of the host.
    pub(super) fn watched<T>(
        &mut self,
        name: &str,
        write: Option<data::Wish>,
        work: impl FnOnce() -> T,
    ) -> Done<(T, bool)> {
        let (Some(hook), Some(disk)) = (self.hook.clone(), self.disks.get(name).cloned()) else {
            return Ok((work(), false));
        };
        let seen = Arc::new(Mutex::new((Ok(()), false)));
        let (mut expected, told) = (self.cts[name].top.clone(), seen.clone());
        let top = disk.path();
        let call = move || {
            let mut seen = told.lock().unwrap();
            if seen.0.is_ok() {
                seen.0 = data::look(disk.as_ref(), &expected);
            }
            let is_now = seen.0.is_ok() && !seen.1 && disk.path() != top;
            if let Some(wish) = write.as_ref().filter(|_| is_now) {
                seen.0 = wish.grant(disk.as_ref(), &mut expected);
                seen.1 = true;
            }
        };
        let done = hook.during(Box::new(call), work);
        let (looked, written) = seen.lock().unwrap().clone();
        looked.map_err(|e| Failure(format!("in the middle: the top of {name}: {e}")))?;
        Ok((done, written))
    }

    /// To be compared when the operation is over.
    pub(super) fn touch(&mut self, name: &str, node: Option<Guid>) {
        self.touched.push((name.to_owned(), node));
    }

    /// A node, the top, and somebody else's: what a change of `node` must leave alone.
    pub(super) fn touch_around(&mut self, name: &str, node: Option<Guid>) {
        if let Some(guid) = node.filter(|g| self.cts[name].has(*g)) {
            self.touch(name, Some(guid));
        }
        self.touch(name, None);
        let turn = self.done as u16;
        if let Some(other) = self.pick(name, turn) {
            self.touch(name, Some(other));
        }
        let name = self.name(turn as u8);
        let other = self
            .pick(&name, turn / 3)
            .filter(|_| !turn.is_multiple_of(3));
        self.touch(&name, other);
    }

    /// Whether `e` is right because somebody reads what is to be rewritten or removed.
    pub(super) fn is_held(&mut self, name: &str, e: &Error) -> bool {
        let merging = self.merging.as_ref().is_some_and(|(ct, ..)| ct == name);
        let held = merging || self.held.iter().any(|h| h.ct == name);
        let right = held && e.kind() == Kind::InUse;
        if right {
            self.tally.add("refused: in use");
        }
        right
    }

    /// The directory of a container.
    pub(super) fn dir(&self, name: &str) -> PathBuf {
        self.root.container(name)
    }
}
