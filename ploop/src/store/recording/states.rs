//! The states that a power cut can leave at one point, one at a time.
//!
//! ```text
//!   Point (durable base + units) ─ choices ─► subset of units ─► disk ─ new? ─► CrashState
//! ```
//!
//! Up to the budget's number of units every subset is tried. Beyond it: all prefixes (a disk that
//! stops), all single losses, all single survivors, and seeded subsets, from sparse to dense.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::replay::{Point, PointUnit, reached};
use crate::store::memory::{Disk, MemoryStore};

/// How many states to try at one point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Up to this many units (at most 32), all subsets.
    pub exhaustive_units: usize,
    /// With more units: this many random subsets, besides the fixed families.
    pub seeded: usize,
    /// The seed of those.
    pub seed: u64,
}

impl Default for Budget {
    /// 12 units, 1,000 subsets, seed 0.
    fn default() -> Budget {
        Budget {
            exhaustive_units: 12,
            seeded: 1000,
            seed: 0,
        }
    }
}

/// Which rule chose a subset.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Subset,
    Prefix,
    Loss,
    Survivor,
    Seeded(u64),
    Asked,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::Subset => f.write_str("subset"),
            Choice::Prefix => f.write_str("prefix"),
            Choice::Loss => f.write_str("single loss"),
            Choice::Survivor => f.write_str("single survivor"),
            Choice::Seeded(seed) => write!(f, "seed {seed}"),
            Choice::Asked => f.write_str("asked for"),
        }
    }
}

/// A well mixed number from a counter.
fn mixed(n: u64) -> u64 {
    let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Budget {
    /// The `k`-th subset of `n` units; `None` after the last.
    fn choose(&self, k: u64, n: usize) -> Option<(Choice, Vec<bool>)> {
        if n <= self.exhaustive_units.min(32) {
            let subset = (0..n).map(|unit| k >> unit & 1 == 1);
            return (k >> n == 0).then(|| (Choice::Subset, subset.collect()));
        }
        let units = n as u64;
        let pick =
            |choice, rule: &dyn Fn(u64) -> bool| Some((choice, (0..units).map(rule).collect()));
        let Some(k) = k.checked_sub(units + 1) else {
            return pick(Choice::Prefix, &|unit| unit < k);
        };
        let Some(k) = k.checked_sub(units) else {
            return pick(Choice::Loss, &|unit| unit != k);
        };
        let Some(k) = k.checked_sub(units) else {
            return pick(Choice::Survivor, &|unit| unit == k);
        };
        if k >= self.seeded as u64 {
            return None;
        }
        let stream = mixed(self.seed) ^ mixed(!k);
        let density = mixed(stream) % 15 + 1;
        let kept = |unit: u64| mixed(stream.wrapping_add(unit + 1)) % 16 < density;
        pick(Choice::Seeded(self.seed), &kept)
    }
}

/// The distinct states at one point; see [`super::RecordingStore::states_at`].
pub struct States {
    point: Arc<Point>,
    budget: Budget,
    next: u64,
    seen: HashSet<u64>,
}

impl States {
    pub(super) fn new(point: Arc<Point>, budget: Budget) -> States {
        States {
            point,
            budget,
            next: 0,
            seen: HashSet::new(),
        }
    }

    /// The number of changes that the power cut can take back at this point.
    pub fn units(&self) -> usize {
        self.point.losable().count()
    }
}

impl fmt::Debug for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "States(point {}, {} units)", self.point.at, self.units())
    }
}

impl Iterator for States {
    type Item = CrashState;

    fn next(&mut self) -> Option<CrashState> {
        loop {
            let (choice, kept) = self.budget.choose(self.next, self.units())?;
            self.next += 1;
            let disk = self.point.disk(&kept);
            if self.seen.insert(self.point.hash(&disk)) {
                return Some(CrashState {
                    point: Arc::clone(&self.point),
                    choice,
                    kept,
                    disk,
                });
            }
        }
    }
}

/// One disk that a power cut can leave. Its `Display` names the point and the units that survived
/// (ranges include both ends): `RecordingStore::state` builds it from those again.
pub struct CrashState {
    point: Arc<Point>,
    choice: Choice,
    kept: Vec<bool>,
    disk: Disk,
}

impl CrashState {
    pub(super) fn of(point: Arc<Point>, kept: &[usize]) -> CrashState {
        let kept: Vec<bool> = (0..point.losable().count())
            .map(|n| kept.contains(&n))
            .collect();
        let disk = point.disk(&kept);
        CrashState {
            point,
            choice: Choice::Asked,
            kept,
            disk,
        }
    }

    /// A fresh store that holds this disk, and nothing that the disk does not. Each call makes
    /// another; changing one changes no other.
    pub fn build(&self) -> MemoryStore {
        let mut disk = self.disk.clone();
        let names = reached(&disk);
        disk.files.retain(|ino, _| names.contains(ino));
        Arc::make_mut(&mut disk.dirs).retain(|ino, _| names.contains(ino));
        MemoryStore::from_disk(&disk)
    }

    /// The point in the log.
    pub fn point(&self) -> usize {
        self.point.at
    }

    /// The numbers of the units that survived.
    pub fn kept(&self) -> Vec<usize> {
        (0..self.kept.len()).filter(|&n| self.kept[n]).collect()
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>, kept: bool) -> fmt::Result {
        const SHOWN: usize = 12;
        let mut units = self
            .point
            .losable()
            .zip(&self.kept)
            .filter(|(_, k)| **k == kept);
        for (unit, _) in units.by_ref().take(SHOWN) {
            let word = if kept { "kept" } else { "lost" };
            write!(f, "\n  {word} {}", unit.unit.describe(&unit.path))?;
        }
        match units.count() {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}

/// The numbers of what was kept, as ranges with both ends.
fn ranges(kept: &[bool]) -> String {
    let mut parts = Vec::new();
    let mut n = 0;
    while n < kept.len() {
        let run = kept[n..].iter().take_while(|kept| **kept).count();
        match run {
            0 => {}
            1 => parts.push(format!("{n}")),
            _ => parts.push(format!("{n}-{}", n + run - 1)),
        }
        n += run.max(1);
    }
    parts.join(", ")
}

impl fmt::Display for CrashState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Point { at, of, after, .. } = &*self.point;
        let (total, kept) = (self.kept.len(), ranges(&self.kept));
        write!(f, "power cut at point {at} of {of} (after {after}): ")?;
        write!(f, "{}, kept [{kept}] of {total} units", self.choice)?;
        self.describe(f, true)?;
        self.describe(f, false)
    }
}

impl fmt::Debug for CrashState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Point {
    fn losable(&self) -> impl Iterator<Item = &PointUnit> {
        self.units.iter().filter(|unit| unit.losable)
    }

    /// The files with units on top of the base.
    fn touched(&self) -> BTreeSet<u64> {
        self.units
            .iter()
            .filter_map(|unit| unit.unit.file())
            .collect()
    }

    /// The base with the durable units and those of the losable ones that `kept` says.
    fn disk(&self, kept: &[bool]) -> Disk {
        let mut disk = self.base.clone();
        let mut kept = kept.iter();
        for unit in &self.units {
            if !unit.losable || kept.next().is_some_and(|kept| *kept) {
                unit.unit.apply(&mut disk);
            }
        }
        for file in self.touched() {
            if let Some(pages) = disk.files.get_mut(&file) {
                Arc::make_mut(pages).drop_ghosts();
            }
        }
        disk
    }

    /// Equal for disks that read the same: names, lengths and bytes.
    fn hash(&self, disk: &Disk) -> u64 {
        let mut hash = 0u64;
        let mut feed = |word: u64| hash = mixed((hash ^ word).wrapping_add(1));
        let names = reached(disk);
        if self.units.iter().any(|unit| unit.unit.file().is_none()) {
            for (ino, dir) in disk.dirs.iter().filter(|(ino, _)| names.contains(ino)) {
                feed(*ino);
                feed(dir.len() as u64);
                for (name, ino) in dir {
                    feed(name.len() as u64);
                    name.as_bytes().iter().for_each(|&byte| feed(byte.into()));
                    feed(*ino);
                }
            }
        }
        for file in self.touched().iter().filter(|file| names.contains(file)) {
            if let (Some(pages), Some(base)) = (disk.files.get(file), self.base.files.get(file)) {
                feed(*file);
                pages.feed_difference(base, &mut feed);
            }
        }
        hash
    }
}
