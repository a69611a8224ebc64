//! Power cuts on one disk.
//!
//! Every state that the recording store calls legal, after every change and sync of a run, is
//! opened by the shipped code and judged: promises 1 (answered and flushed survives), 2 (unflushed
//! is old or new, sector by sector), 3 (no tool is needed; to another tool every entry is complete)
//! and 7 (what is closed here is clean to all). `PLOOP_CRASH_SEEDS=N` draws that many runs and
//! looks at their states with the full budget; `PLOOP_CRASH_SEED=S` begins with seed S: a seed that
//! fails is printed, and fails again.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::ploop::Version;
use ploop::store::recording::{Budget, RecordingStore};
use ploop::verify::scan_image;
use ploop_tests::crash::history::{Asked, payload};
use ploop_tests::crash::{
    CLUSTER_SECTORS, Depth, Fixture, History, Rng, Runner, SECTOR, Shape, Step, Sweep, Tally, env,
    fixture, judge, qemu, workload,
};

fn run(fx: &Fixture, steps: &[Step]) -> (RecordingStore, History) {
    let store = RecordingStore::on(&fx.start);
    let history = History::new(&store, fx.initial.clone(), fx.closed());
    Runner::new(fx, store.store(), &history).run(steps);
    (store, history)
}

/// Every start image of a version: all shapes, bare and on a base.
fn fixtures(version: Version, clusters: u64) -> Vec<Fixture> {
    let both = |shape| [true, false].map(|base| Fixture::new(version, shape, base, clusters));
    Shape::ALL.into_iter().flat_map(both).collect()
}

fn every_story(version: Version) {
    let sweeper = Sweep {
        budget: Budget::default(),
        work_every: 7,
    };
    let mut all = Tally::default();
    for fx in fixtures(version, workload::STORY_CLUSTERS) {
        for (name, steps) in workload::stories() {
            all += sweeper.steps(&fx, &steps, name);
        }
    }
    all.report_stories();
}

/// Goal: promises 1, 2, 3 and 7 in all legal states of short runs. Method: each story on each start
/// image; the runs are short enough that most points are enumerated without gaps.
#[test]
fn every_state_of_every_story_is_right_v1() {
    every_story(Version::V1);
}

/// The same for version 2, whose entries count clusters.
#[test]
fn every_state_of_every_story_is_right_v2() {
    every_story(Version::V2);
}

/// Goal: the same for runs that nobody thought of. Method: seeded steps on seeded start images,
/// with fewer states per point; all of them with `PLOOP_CRASH_SEEDS`.
#[test]
fn states_of_seeded_runs_are_right() {
    let soak = std::env::var_os("PLOOP_CRASH_SEEDS").is_some();
    let seeded = if soak { 1000 } else { 12 };
    let exhaustive_units = if soak { 12 } else { 7 };
    let first = env("PLOOP_CRASH_SEED", 1);
    let mut all = Tally::default();
    for seed in first..first + env("PLOOP_CRASH_SEEDS", 12) {
        let mut rng = Rng(seed);
        let version = [Version::V1, Version::V2][rng.below(2) as usize];
        let shape = Shape::ALL[rng.below(5) as usize];
        let fx = Fixture::new(version, shape, rng.below(2) == 0, 8 + rng.below(9));
        let steps = workload::seeded(seed, 24, fx.clusters);
        let budget = Budget {
            exhaustive_units,
            seeded,
            seed,
        };
        let what = format!("PLOOP_CRASH_SEED={seed}");
        let sweeper = Sweep {
            budget,
            work_every: 5,
        };
        let tally = sweeper.steps(&fx, &steps, &what);
        println!("seed {seed}: {tally}, {}", fx.name);
        all += tally;
    }
    println!("{all}");
}

/// Goal: promises 1 and 2 where the table is larger than what a disk writes in one piece. Method:
/// clusters whose entries lie in two sectors, written by one flush.
#[test]
fn entries_in_two_sectors_of_the_table_are_each_complete() {
    let border = (512 - 64) / 4 * CLUSTER_SECTORS;
    let steps = [
        Step::Write(border - 1, 2),
        Step::Write(5, 1),
        Step::Flush,
        Step::Write(border, 2),
        Step::Write(border + CLUSTER_SECTORS, 1),
        Step::Close,
    ];
    let sweeper = Sweep {
        budget: Budget::default(),
        work_every: 3,
    };
    for version in [Version::V1, Version::V2] {
        for shape in [Shape::Empty, Shape::Dirty] {
            let fx = Fixture::new(version, shape, false, 120);
            sweeper.steps(&fx, &steps, "two sectors of the table");
        }
    }
}

/// Goal: promise 1 for a write that comes while a flush syncs: that flush may not name it on disk
/// (its data may have missed the sync), and the next must. Method: a write of a new cluster, an
/// overwrite or a discard inside of each sync of a flush.
#[test]
fn what_is_written_during_a_flush_waits_for_the_next_one() {
    for fx in [
        Fixture::new(Version::V2, Shape::Empty, true, 8),
        Fixture::new(Version::V1, Shape::Dirty, true, 8),
    ] {
        for (at, what) in (1..7).flat_map(|at| [0, 1, 2].map(|what| (at, what))) {
            let store = RecordingStore::on(&fx.start);
            let history = Arc::new(History::new(&store, fx.initial.clone(), fx.closed()));
            let disk = Arc::new(fx.open(&store, true).unwrap());
            let base = store.syncs();
            let (inner, h) = (disk.clone(), history.clone());
            store.during_sync(move |n| match what {
                _ if n != base + at => {}
                0 => write(&inner, &h, 2 * CLUSTER_SECTORS + 1, 2),
                1 => write(&inner, &h, 4 * CLUSTER_SECTORS + 1, 2),
                _ => {
                    let id = h.begin(Asked::Discard(0..CLUSTER_SECTORS), false);
                    inner.discard(0..CLUSTER_SECTORS * SECTOR).unwrap();
                    h.ok(id);
                }
            });
            // Sync 0 is that of the mark, which every change waits for.
            write(&disk, &history, 4 * CLUSTER_SECTORS, 1);
            flush(&disk, &history);
            write(&disk, &history, 4 * CLUSTER_SECTORS + 9, 1);
            flush(&disk, &history);
            flush(&disk, &history);
            let sweeper = Sweep {
                budget: Budget {
                    seeded: 200,
                    ..Budget::default()
                },
                work_every: 4,
            };
            let checked = sweeper.check(&fx, &store, &history);
            checked.unwrap_or_else(|e| panic!("during sync {at}, {what}: {e}"));
        }
    }
}

fn write(disk: &Disk, history: &History, sector: u64, count: u64) {
    let id = history.begin(Asked::Write(sector..sector + count), false);
    disk.write(sector * SECTOR, &payload(id, sector..sector + count))
        .unwrap();
    history.ok(id);
}

fn flush(disk: &Disk, history: &History) {
    let id = history.begin(Asked::Flush, false);
    disk.flush().unwrap();
    history.ok(id);
}

/// Goal: promise 1 with concurrent flushes: one may share only a sync that started after the last
/// write that it must cover was answered. Method: inside of a sync, another thread writes and
/// flushes; whatever is answered first, all states must keep what was promised.
#[test]
fn a_flush_never_shares_a_sync_that_began_before_it() {
    let fx = Fixture::new(Version::V2, Shape::Used, true, 8);
    for at in 1..4 {
        let store = RecordingStore::on(&fx.start);
        let history = Arc::new(History::new(&store, fx.initial.clone(), fx.closed()));
        let disk = Arc::new(fx.open(&store, true).unwrap());
        let other = Arc::new(Mutex::new(None));
        let (base, once) = (store.syncs(), AtomicBool::new(false));
        let (inner, h, slot) = (disk.clone(), history.clone(), other.clone());
        store.during_sync(move |n| {
            if n != base + at || once.swap(true, Ordering::SeqCst) {
                return;
            }
            let (disk, history) = (inner.clone(), h.clone());
            let (asked, asking) = std::sync::mpsc::channel();
            *slot.lock().unwrap() = Some(std::thread::spawn(move || {
                write(&disk, &history, 6 * CLUSTER_SECTORS, 2);
                asked.send(()).unwrap();
                flush(&disk, &history);
            }));
            asking.recv().unwrap();
            // Long enough for the other flush to come here, or to end if it wrongly shares.
            std::thread::sleep(std::time::Duration::from_millis(30));
        });
        write(&disk, &history, 5 * CLUSTER_SECTORS, 1);
        flush(&disk, &history);
        write(&disk, &history, 5 * CLUSTER_SECTORS, 1);
        flush(&disk, &history);
        let thread = other.lock().unwrap().take();
        thread.unwrap().join().unwrap();
        let sweeper = Sweep {
            budget: Budget::default(),
            work_every: 4,
        };
        let checked = sweeper.check(&fx, &store, &history);
        checked.unwrap_or_else(|e| panic!("during sync {at}: {e}"));
    }
}

/// Goal: promise 3 for readers. Method: every start image is opened read-only and read whole on a
/// store that logs every change and sync: there is none. Opened for writing, it and its
/// directory are synced, and nothing else, before the first change.
#[test]
fn opening_writes_nothing() {
    for fx in [Version::V1, Version::V2]
        .into_iter()
        .flat_map(|v| fixtures(v, 8))
    {
        let store = RecordingStore::on(&fx.start);
        let disk = fx.open(&store, false).unwrap();
        assert_eq!(&fixture::words_of(&disk).unwrap(), &*fx.initial);
        disk.close().unwrap();
        assert_eq!(store.log(), [""; 0], "{}", fx.name);
        drop(disk);
        let disk = fx.open(&store, true).unwrap();
        assert_eq!(&fixture::words_of(&disk).unwrap(), &*fx.initial);
        let syncs = store.log().iter().filter(|l| l.starts_with("sync")).count();
        assert_eq!((syncs, store.log().len()), (2, syncs), "{}", fx.name);
    }
}

/// Goal: a disk that was closed and goes on is as good as a new one. Method: write, close, write
/// more on the same open disk, close again; every state is judged.
#[test]
fn a_disk_can_go_on_after_its_close() {
    for fx in [
        Fixture::new(Version::V1, Shape::Dirty, false, 20),
        Fixture::new(Version::V2, Shape::Tail, true, 8),
    ] {
        let store = RecordingStore::on(&fx.start);
        let history = History::new(&store, fx.initial.clone(), fx.closed());
        let disk = fx.open(&store, true).unwrap();
        // With 17 clusters the file grows ahead of need, and the close cuts it.
        for clusters in [0..5, 2..fx.clusters - 3, 1..fx.clusters - 1, 0..fx.clusters] {
            for cluster in clusters {
                write(&disk, &history, cluster * CLUSTER_SECTORS + 3, 1);
                if cluster % 3 == 1 {
                    flush(&disk, &history);
                }
            }
            let words = Arc::new(fixture::words_of(&disk).unwrap());
            let id = history.begin(Asked::Close(Some(words)), false);
            disk.close().unwrap();
            history.ok(id);
        }
        let before = store.log().len();
        disk.close().unwrap();
        assert_eq!(
            store.log().len(),
            before,
            "the second close has nothing to do"
        );
        let sweeper = Sweep {
            budget: Budget {
                seeded: 60,
                ..Budget::default()
            },
            work_every: 4,
        };
        sweeper
            .check(&fx, &store, &history)
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Goal: promises 3 and 7 in another tool's eyes. Method: states from all over the stories are
/// written to real files; `qemu-img check` calls none corrupt (the mark of an unclean close is no
/// damage), and `qemu-img convert` of a bare disk gives the bytes that we read.
#[test]
fn qemu_agrees_with_a_sample_of_states() {
    let samples = env("PLOOP_CRASH_QEMU", 100);
    let budget = Budget {
        exhaustive_units: 5,
        seeded: 6,
        seed: 3,
    };
    let mut states = Vec::new();
    for fx in [Version::V1, Version::V2]
        .into_iter()
        .flat_map(|v| fixtures(v, 8))
    {
        for seed in 0..2 {
            let (store, history) = run(&fx, &workload::seeded(seed + 77, 16, 8));
            for point in history.points() {
                let view = history.view(point);
                for state in store.states_at(point, &budget) {
                    states.push((fx.clone(), view.clone(), state));
                }
            }
        }
    }
    let mut rng = Rng(env("PLOOP_CRASH_SEED", 1));
    for _ in 0..samples {
        let (fx, view, state) = states.swap_remove(rng.below(states.len() as u64) as usize);
        let store = state.build();
        let dirty = scan_image(fx.top_file(&store).as_ref())
            .unwrap()
            .header
            .dirty();
        let opinion = qemu::opinion(&fx, &store, dirty);
        assert_eq!(opinion.corruptions, 0, "{}: {state}", fx.name);
        judge(&fx, &view, &store, Depth::Look).unwrap_or_else(|e| panic!("{e}\n{state}"));
        if !fx.overlay() {
            let ours = fixture::words_of(&fx.open(&store, false).unwrap()).unwrap();
            assert!(
                opinion.words == ours,
                "qemu-img reads other bytes: {}: {state}",
                fx.name
            );
        }
    }
}
