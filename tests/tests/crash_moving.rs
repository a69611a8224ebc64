//! Power cuts while clusters of a disk are moved: it grows, or is compacted.
//!
//! The table of a grown disk lies where data was, and a compacted one is shorter than it was: every legal state of the way there is opened by
//! the shipped code and judged as in `crash.rs`: each cluster whole, in one place or the other, no
//! entry that names the table, a header of the old disk or of the new one. `PLOOP_CRASH_SEEDS=N`
//! draws that many runs.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::ploop::Version;
use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::Step::{
    Close, Compact, Complete, Discard, Flush, Grow, Kill, Write, Zero, ZeroKeep,
};
use ploop_tests::crash::history::{Asked, payload};
use ploop_tests::crash::{
    CLUSTER_SECTORS as C, Fixture, History, Rng, SECTOR, Shape, Step, Sweep, Tally, env, workload,
};

const CLUSTERS: u64 = 12;
/// Two more, which only a grown disk has.
const SHOWN: u64 = 14;
/// The first size whose table needs a second cluster, and a third, and a fourth.
const SECOND: u64 = (32768 - 64) / 4 + 1;
const THIRD: u64 = SECOND + 8192;
const FOURTH: u64 = THIRD + 8192;

/// One state of seven is also worked with.
fn sweep(budget: Budget) -> Sweep {
    Sweep {
        budget,
        work_every: 7,
    }
}

fn stories() -> Vec<(&'static str, Vec<Step>)> {
    let new = CLUSTERS * C + 5;
    vec![
        ("grown, room in the table", vec![Grow(SHOWN), Close]),
        ("grown, one cluster in the way", vec![Grow(SECOND), Close]),
        (
            "all data in the way",
            vec![Write(4 * C + 1, 2), Flush, Grow(FOURTH), Close],
        ),
        (
            "written before, not flushed, and behind the old end after",
            vec![
                Write(C + 9, 1),
                Write(4 * C, 1),
                Grow(THIRD),
                Write(new, 2),
                Flush,
                Close,
            ],
        ),
        (
            "parts in a journal, grown, parts again",
            vec![
                Write(9, 1),
                Write(2 * C + 9, 1),
                Flush,
                Grow(SECOND),
                Write(9, 2),
                Write(new, 1),
                Flush,
                Close,
            ],
        ),
        (
            "killed with unflushed data, grown",
            vec![
                Write(4 * C, 1),
                Flush,
                Write(4 * C, 2),
                Kill,
                Grow(THIRD),
                Flush,
            ],
        ),
        (
            "grown twice, nothing between, then over what moved",
            vec![
                Grow(SECOND),
                Grow(THIRD),
                Write(C + 1, 1),
                Zero(3 * C, C),
                Flush,
            ],
        ),
        (
            "grown again after data came to lie in the way of the next",
            vec![
                Grow(SECOND),
                Write(new, 1),
                Write(5 * C, 1),
                Grow(FOURTH),
                Discard(C, C),
                Close,
            ],
        ),
        (
            "killed after growing",
            vec![Grow(SECOND), Kill, Write(new, 1), Complete(9), Flush],
        ),
    ]
}

/// On a start image with holes, or with leftovers, there is more to move than these say.
fn compacting() -> Vec<(&'static str, Vec<Step>)> {
    let whole = |k: u64| Write(k * C, C);
    vec![
        ("compacted as it is", vec![Compact, Close]),
        (
            "zeros over nothing and over something, and the last one moves",
            vec![
                whole(0),
                whole(4),
                Flush,
                ZeroKeep(0, C),
                ZeroKeep(C, C),
                Flush,
                Compact,
                Close,
            ],
        ),
        (
            "a place is given back and taken again before and behind a flush",
            vec![
                whole(6),
                whole(7),
                Flush,
                ZeroKeep(6 * C, C),
                Compact,
                Write(9 * C, 2),
                Write(7 * C, 1),
                Flush,
            ],
        ),
        (
            "parts in a journal, zeros, compacted, parts again",
            vec![
                Write(2 * C + 9, 1),
                Flush,
                ZeroKeep(C, C),
                Compact,
                Write(2 * C + 40, 1),
                Write(9, 1),
                Flush,
                Close,
            ],
        ),
        (
            "killed with unflushed zeros, compacted, killed",
            vec![
                whole(4),
                Flush,
                ZeroKeep(4 * C, C),
                Kill,
                Compact,
                Kill,
                Write(4 * C, 1),
                Flush,
            ],
        ),
        (
            "compacted, grown over what moved, compacted",
            vec![
                whole(4),
                whole(5),
                Flush,
                Zero(4 * C, C),
                Compact,
                Grow(SECOND),
                Compact,
                Close,
            ],
        ),
    ]
}

fn every_story(version: Version) {
    let mut all = Tally::default();
    for shape in Shape::ALL {
        for base in [false, true] {
            let fx = Fixture::new(version, shape, base, CLUSTERS).showing(SHOWN);
            for (name, steps) in stories().into_iter().chain(compacting()) {
                all += sweep(Budget::default()).steps(&fx, &steps, name);
            }
        }
    }
    all.report_stories();
}

/// Goal: promises 1, 2, 3 and 7 in all legal states of growing and compacting. Method: each story on each start
/// image.
#[test]
fn every_state_of_moving_is_right_v1() {
    every_story(Version::V1);
}

/// The same for version 2, whose entries count clusters.
#[test]
fn every_state_of_moving_is_right_v2() {
    every_story(Version::V2);
}

/// Goal: the same for runs that nobody thought of. Method: seeded steps around and between growths.
#[test]
fn states_of_seeded_runs_are_right() {
    let first = env("PLOOP_CRASH_SEED", 1);
    let mut all = Tally::default();
    for seed in first..first + env("PLOOP_CRASH_SEEDS", 12) {
        let mut rng = Rng(seed);
        let version = [Version::V1, Version::V2][rng.below(2) as usize];
        let shape = Shape::ALL[rng.below(5) as usize];
        let fx = Fixture::new(version, shape, rng.below(2) == 0, CLUSTERS).showing(SHOWN);
        let mut steps = workload::seeded(rng.below(1 << 32), 8, CLUSTERS);
        for to in [[SHOWN, SECOND, THIRD][rng.below(3) as usize], FOURTH] {
            steps.push(Grow(to));
            if rng.below(2) == 0 {
                steps.push(Compact);
            }
            steps.extend(workload::seeded(rng.below(1 << 32), 6, SHOWN));
        }
        let budget = Budget {
            exhaustive_units: 7,
            seeded: 8,
            seed,
        };
        all += sweep(budget).steps(&fx, &steps, &format!("PLOOP_CRASH_SEED={seed}"));
    }
    println!("{all}");
}

fn write(disk: &Disk, history: &History, sector: u64, count: u64) {
    let id = history.begin(Asked::Write(sector..sector + count), false);
    let bytes = payload(id, sector..sector + count);
    disk.write(sector * SECTOR, &bytes).unwrap();
    history.ok(id);
}

/// A disk with much to give back, flushed; and how many syncs that took.
fn with_spare(fx: &Fixture, store: &RecordingStore, history: &History) -> (Arc<Disk>, u64) {
    let disk = Arc::new(fx.open(store, true).unwrap());
    // What the base has anyway, and zeros over nothing: the words stay as they are.
    for cluster in [0, 4, 5] {
        let mut same = vec![0; (C * SECTOR) as usize];
        disk.read(cluster * C * SECTOR, &mut same).unwrap();
        disk.write(cluster * C * SECTOR, &same).unwrap();
    }
    // These move.
    for cluster in [6, 8] {
        write(&disk, history, cluster * C, C);
    }
    let id = history.begin(Asked::Flush, false);
    disk.flush().unwrap();
    history.ok(id);
    (disk, store.syncs())
}

/// Goal: promises 1 and 2 for a write that comes while what was taken out, or moved, becomes durable:
/// the table may not name its place before its bytes are there. Method: inside of each sync of a
/// compaction, a write to a cluster of each kind, of a part and of all of it.
#[test]
fn what_is_written_while_a_move_becomes_durable_waits_for_the_next_flush() {
    let sweeper = Sweep {
        budget: Budget {
            exhaustive_units: 4,
            seeded: 8,
            ..Budget::default()
        },
        work_every: 9,
    };
    for version in [Version::V1, Version::V2] {
        let fx = Fixture::new(version, Shape::Empty, true, CLUSTERS).showing(SHOWN);
        let writes = [0, 4, 8].map(|k| [(k * C + 9, 2), (k * C, C)]);
        for (first, count) in writes.concat() {
            for at in 0.. {
                let store = RecordingStore::on(&fx.start);
                // What is written unseen marks it at once.
                let history = Arc::new(History::new(&store, fx.initial.clone(), false));
                let (disk, base) = with_spare(&fx, &store, &history);
                let (inner, h) = (disk.clone(), history.clone());
                store.during_sync(move |n| {
                    if n == base + at {
                        write(&inner, &h, first, count);
                    }
                });
                let arranging = disk.arrange();
                disk.compact().unwrap();
                drop(arranging);
                let seen = store.syncs() > base + at;
                let checked = sweeper.check(&fx, &store, &history);
                checked.unwrap_or_else(|e| panic!("sync {at}, {first}+{count}: {e}"));
                if !seen {
                    assert!(at > 0);
                    break;
                }
            }
        }
    }
}
