//! What is done to a disk: steps, written by hand or drawn from a seed, and who runs them.

use std::sync::Arc;

use ploop::Result;
use ploop::device::{Device, ZeroMode};
use ploop::disk::Disk;
use ploop::store::Store;

use super::fixture::Fixture;
use super::history::{Asked, History, payload};
use super::{CLUSTER, CLUSTER_SECTORS, Rng, SECTOR};

/// One thing that is done. Places and lengths are sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A write: first sector, sectors.
    Write(u64, u64),
    /// A write that is durable when it is answered.
    Fua(u64, u64),
    /// Zeros; space may be given back.
    Zero(u64, u64),
    /// Zeros that keep their space.
    ZeroKeep(u64, u64),
    /// A discard.
    Discard(u64, u64),
    /// Clusters that were written in part are completed, so many at most.
    Complete(usize),
    /// A flush.
    Flush,
    /// The disk is made so many clusters large.
    Grow(u64),
    /// The disk gives back what it does not need.
    Compact,
    /// A clean close; the next step opens the disk again.
    Close,
    /// kill -9; the next process reads everything, and goes on.
    Kill,
}

/// The places of a step that is seeded: mostly a few sectors, often at a cluster's border, now and
/// then whole clusters.
fn place(rng: &mut Rng, clusters: u64) -> (u64, u64) {
    let sectors = clusters * CLUSTER_SECTORS;
    let cluster = rng.below(clusters) * CLUSTER_SECTORS;
    let (at, len) = match rng.below(8) {
        0 => (cluster, CLUSTER_SECTORS),
        1 => (cluster, 2 * CLUSTER_SECTORS),
        2 => (cluster + CLUSTER_SECTORS - 1, 2),
        3 => (
            cluster + rng.below(CLUSTER_SECTORS),
            rng.below(CLUSTER_SECTORS) + 1,
        ),
        _ => (cluster + rng.below(CLUSTER_SECTORS), rng.below(4) + 1),
    };
    (at.min(sectors - 1), len.min(sectors - at.min(sectors - 1)))
}

/// `count` steps drawn from `seed`, for a disk of `clusters` clusters.
pub fn seeded(seed: u64, count: usize, clusters: u64) -> Vec<Step> {
    let mut rng = Rng(seed);
    let step = |rng: &mut Rng| {
        let (at, len) = place(rng, clusters);
        match rng.below(20) {
            0..=7 => Step::Write(at, len),
            8 => Step::Fua(at, len),
            9..=10 => Step::Zero(at, len),
            11 => Step::ZeroKeep(at, len),
            12..=13 => Step::Discard(at, len),
            14 => Step::Complete(1 + at as usize % 3),
            15..=17 => Step::Flush,
            18 => Step::Close,
            _ => Step::Kill,
        }
    };
    (0..count).map(|_| step(&mut rng)).collect()
}

/// Clusters of the disk that [`stories`] are for.
pub const STORY_CLUSTERS: u64 = 24;

/// Clusters of a disk whose table needs a second cluster.
const GROWN: u64 = (CLUSTER - 64) / 4 + 1;

/// Short runs whose states can nearly all be tried. Each is a story; together they use every sync.
pub fn stories() -> Vec<(&'static str, Vec<Step>)> {
    use Step::{Close, Compact, Complete, Discard, Flush, Fua, Grow, Kill, Write, Zero, ZeroKeep};
    let c = CLUSTER_SECTORS;
    vec![
        ("write, close", vec![Write(4 * c + 1, 2), Close]),
        (
            "write, flush, overwrite, flush",
            vec![Write(4 * c + 1, 2), Flush, Write(4 * c + 1, 1), Flush],
        ),
        (
            "overwrite only, then close",
            vec![Write(c + 4, 2), Flush, Write(c + 5, 1), Close],
        ),
        (
            "two clusters at once, unflushed neighbour",
            vec![
                Write(5 * c - 1, 2),
                Flush,
                Write(2 * c + 7, 1),
                Write(5 * c - 1, 1),
            ],
        ),
        (
            "fua, then a write that nobody flushed",
            vec![Fua(4 * c, 1), Write(2 * c + 60, 3)],
        ),
        (
            "new cluster of zeros over data",
            vec![Zero(0, c), Flush, Write(3, 2), Close],
        ),
        (
            "part of a cluster zeroed over data",
            vec![ZeroKeep(2 * c + 30, 2), Flush, Close],
        ),
        (
            "a part over data, and more of it behind a flush",
            vec![
                Write(2 * c + 9, 1),
                Write(2 * c + 40, 3),
                Flush,
                Write(2 * c + 60, 1),
            ],
        ),
        (
            "a part over data, completed, written on",
            vec![Write(c + 9, 1), Complete(9), Write(c + 20, 1), Flush, Close],
        ),
        (
            "a part over data, zeroed across its end",
            vec![
                Write(c + 9, 1),
                Zero(c + 10, 20),
                Flush,
                Discard(c, c),
                Close,
            ],
        ),
        (
            "parts over data, killed, closed",
            vec![
                Write(9, 1),
                Write(c + 9, 1),
                Kill,
                Write(2 * c + 9, 1),
                Close,
            ],
        ),
        (
            "a part over data, flushed, completed, flushed, closed",
            vec![Write(c + 9, 1), Flush, Complete(9), Flush, Close],
        ),
        (
            "parts over data, flushed, killed, closed",
            vec![Write(c + 9, 1), Write(9, 1), Flush, Kill, Close],
        ),
        (
            "parts over data, flushed, killed, more of them",
            vec![
                Write(c + 9, 1),
                Flush,
                Kill,
                Write(c + 40, 1),
                Write(9, 1),
                Flush,
                Close,
            ],
        ),
        ("parts over data, flushed one by one, then zeroed", {
            let write = |at| [Write(at, 1), Flush];
            let all = [c + 9, c + 20, 9, c + 40, 2 * c + 30, 20];
            let mut steps: Vec<Step> = all.into_iter().flat_map(write).collect();
            steps.extend([Zero(c, c), Discard(0, c), Flush, Close]);
            steps
        }),
        (
            "discard, then flush",
            vec![Write(4 * c, 4), Flush, Discard(4 * c, c), Flush, Close],
        ),
        (
            "killed with an overwrite in the cache",
            vec![Write(4 * c, 1), Flush, Write(4 * c, 2), Kill, Flush],
        ),
        (
            "killed before any entry was written",
            vec![Write(4 * c, 1), Kill, Write(2 * c, 1), Flush],
        ),
        (
            "closed, opened, written, closed",
            vec![
                Write(4 * c, 1),
                Close,
                Write(4 * c + 1, 1),
                Write(6 * c, 1),
                Close,
            ],
        ),
        ("opened and closed", vec![Close]),
        ("closed with room to spare at the end", {
            let mut steps = Vec::new();
            for cluster in 0..20 {
                steps.push(Write(cluster * c + 9, 1));
                if cluster % 3 == 0 {
                    steps.push(Flush);
                }
            }
            steps.push(Close);
            steps
        }),
        (
            "grown, so that data is in the table's way",
            vec![
                Write(4 * c, 1),
                Write(c + 9, 1),
                Flush,
                Grow(GROWN),
                Write(c + 9, 1),
                Close,
            ],
        ),
        (
            "zeros and holes given back, the last cluster moved",
            vec![
                Write(4 * c, c),
                Write(6 * c, c),
                Write(8 * c, 5),
                Flush,
                ZeroKeep(4 * c, c),
                Discard(c, c),
                Compact,
                Write(8 * c, 1),
                Flush,
                Close,
            ],
        ),
        (
            "killed, then only closed",
            vec![Write(4 * c, 1), Flush, Write(4 * c, 1), Kill, Close],
        ),
    ]
}

/// Runs steps on a disk and writes its history.
#[derive(Debug)]
pub struct Runner<'a> {
    fixture: &'a Fixture,
    store: Arc<dyn Store>,
    history: &'a History,
    disk: Option<Disk>,
    /// False when a sync has failed: then what the next process sees need not stay, since the
    /// kernel calls pages clean that the disk never got.
    pub trust_cache: bool,
}

impl<'a> Runner<'a> {
    /// On the fixture's disk in `store`, which is where `history` puts its marks, or a front of it.
    pub fn new(fixture: &'a Fixture, store: Arc<dyn Store>, history: &'a History) -> Runner<'a> {
        Runner {
            fixture,
            store,
            history,
            disk: None,
            trust_cache: true,
        }
    }

    /// True between opening and closing.
    pub fn is_open(&self) -> bool {
        self.disk.is_some()
    }

    /// The disk, opened when it is not.
    pub fn disk(&mut self) -> Result<&Disk> {
        let disk = match self.disk.take() {
            Some(disk) => disk,
            None => self.fixture.open_on(&self.store, true)?,
        };
        Ok(self.disk.insert(disk))
    }

    /// Kill -9, and nothing more: the next step opens the disk anew.
    pub fn die(&mut self) {
        self.disk = None;
        self.history.death();
    }

    /// One step. An error is the disk's own.
    pub fn step(&mut self, step: &Step) -> Result<()> {
        let (fixture, history) = (self.fixture, self.history);
        let asked = |&(at, len): &(u64, u64)| at..at + len;
        match step {
            Step::Kill => return self.kill(),
            Step::Close => return self.close(),
            Step::Grow(clusters) => return self.grow(*clusters),
            Step::Compact => {
                let history = self.history;
                let disk = self.disk()?;
                // A change that changes no sector.
                let id = history.begin(Asked::Discard(0..0), false);
                let done = {
                    let _arranging = disk.arrange();
                    disk.compact()
                };
                history.saw_discard(id, Vec::new());
                return self.answer(id, done.map(drop));
            }
            Step::Complete(limit) => return self.disk()?.complete(u64::MAX, *limit),
            _ => {}
        }
        let disk = self.disk()?;
        let (id, done) = match step {
            Step::Write(at, len) | Step::Fua(at, len) => {
                let fua = matches!(step, Step::Fua(..));
                let id = history.begin(Asked::Write(asked(&(*at, *len))), fua);
                let done = disk.write(at * SECTOR, &payload(id, *at..at + len));
                (
                    id,
                    if fua {
                        done.and_then(|()| disk.flush())
                    } else {
                        done
                    },
                )
            }
            Step::Zero(at, len) | Step::ZeroKeep(at, len) => {
                let keep_space = matches!(step, Step::ZeroKeep(..));
                let id = history.begin(Asked::Zero(asked(&(*at, *len))), false);
                let mode = ZeroMode {
                    keep_space,
                    only_if_fast: false,
                };
                (id, disk.zero(at * SECTOR..(at + len) * SECTOR, mode))
            }
            Step::Discard(at, len) => {
                let before = fixture.words(disk);
                let id = history.begin(Asked::Discard(asked(&(*at, *len))), false);
                let done = disk.discard(at * SECTOR..(at + len) * SECTOR);
                if let (Ok(before), Ok(after)) = (before, fixture.words(disk)) {
                    let zeroed = (*at..at + len).filter(|&s| {
                        let (was, is) = (before[s as usize], after[s as usize]);
                        assert!(
                            is == was || is == 0,
                            "a discard wrote {is:#x} to sector {s}"
                        );
                        is != was
                    });
                    history.saw_discard(id, zeroed.collect());
                }
                (id, done)
            }
            _ => {
                let id = history.begin(Asked::Flush, false);
                (id, disk.flush())
            }
        };
        self.answer(id, done)
    }

    /// All of them. Panics when one fails.
    pub fn run(&mut self, steps: &[Step]) {
        for step in steps {
            self.step(step)
                .unwrap_or_else(|e| panic!("{step:?} on {}: {e}", self.fixture.name));
        }
    }

    fn answer(&self, id: u64, done: Result<()>) -> Result<()> {
        match &done {
            Ok(()) => self.history.ok(id),
            Err(_) => self.history.failed(id),
        }
        done
    }

    fn close(&mut self) -> Result<()> {
        let fixture = self.fixture;
        let disk = self.disk()?;
        let words = fixture.words(disk).ok().map(Arc::new);
        let words = words.filter(|_| self.trust_cache);
        let id = self.history.begin(Asked::Close(words), false);
        let closed = self.disk()?.close();
        let done = self.answer(id, closed);
        self.disk = None;
        if done.is_err() {
            self.history.death();
        }
        done
    }

    /// Grows the disk: the image is closed by that, as it is.
    fn grow(&mut self, clusters: u64) -> Result<()> {
        let (fixture, history) = (self.fixture, self.history);
        let disk = self.disk()?;
        let words = fixture.words(disk).ok().map(Arc::new);
        let id = history.begin(Asked::Close(words), false);
        let grown = {
            let _arranging = disk.arrange();
            disk.grow(clusters * CLUSTER)
        };
        self.answer(id, grown.map(drop))
    }

    /// Forgets the disk as kill -9 does; another process opens it and looks at everything.
    fn kill(&mut self) -> Result<()> {
        self.disk = None;
        self.history.death();
        let fixture = self.fixture;
        let disk = self.disk()?;
        // A read may fail once, on purpose.
        let words = fixture.words(disk).or_else(|_| fixture.words(disk));
        let words = words.unwrap_or_else(|e| panic!("after kill -9: {e}"));
        if let Err(e) = self.history.view(usize::MAX).check(&words) {
            panic!("after kill -9 on {}: {e}", self.fixture.name);
        }
        if !self.trust_cache {
            return Ok(());
        }
        let id = self.history.begin(Asked::Seen(Arc::new(words)), false);
        self.answer(id, Ok(()))
    }
}
