//! Power cuts while a disk is tracked: no bit is ever missing.
//!
//! Every legal state of a run is opened by the shipped code and judged as in `crash.rs`; besides,
//! every sector that reads otherwise than at the start must have its bit in every tracker: in the
//! image where that says that it is closed, in the side file where it does not.
//! `PLOOP_CRASH_SEEDS=N` draws that many runs.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use ploop::device::Device;
use ploop::format::ploop::Version;
use ploop::store::recording::{Budget, RecordingStore};
use ploop::tracker::Id;
use ploop_tests::crash::Step::{Close, Compact, Flush, Fua, Grow, Kill, Write, Zero};
use ploop_tests::crash::history::payload;
use ploop_tests::crash::proof::{Proof, Scenario};
use ploop_tests::crash::{
    CLUSTER_SECTORS as C, Fixture, Rng, Shape, Step, Sweep, Tally, env, workload,
};

const FILES: &[&str] = &[
    "ploop/src/tracker/side.rs",
    "ploop/src/format/ploop/bitmaps.rs",
];
const CLUSTERS: u64 = 12;
const SHOWN: u64 = 14;
/// The first size whose table needs a second cluster.
const SECOND: u64 = (32768 - 64) / 4 + 1;

/// One state of seven is also worked with.
fn sweep(budget: Budget) -> Sweep {
    Sweep {
        budget,
        work_every: 7,
    }
}

fn stories() -> Vec<(&'static str, Vec<Step>)> {
    vec![
        ("written and closed", vec![Write(4 * C + 1, 2), Close]),
        (
            "written, closed, written, killed, written",
            vec![
                Write(9, 1),
                Close,
                Write(2 * C, 3),
                Kill,
                Write(5 * C, 1),
                Flush,
                Close,
            ],
        ),
        (
            "flushed, and killed at once",
            vec![Fua(C + 1, 1), Kill, Close, Zero(C, C), Flush],
        ),
        (
            "grown and written behind the old end",
            vec![Write(C, 1), Grow(SECOND), Write(CLUSTERS * C + 5, 1), Flush],
        ),
        (
            "grown, closed at once",
            vec![Write(C, 1), Flush, Grow(SECOND), Close],
        ),
        (
            "zeros, compacted",
            vec![Write(4 * C, C), Zero(4 * C, C), Compact, Close],
        ),
    ]
}

/// Goal: promise 6 in all legal states. Method: each story on closed start images, on the versions in
/// turn.
#[test]
fn no_bit_is_missing_in_any_state() {
    let mut all = Tally::default();
    for (version, shape, base) in [
        (Version::V2, Shape::Used, true),
        (Version::V1, Shape::Used, false),
        (Version::V2, Shape::Empty, false),
    ] {
        let fx = Fixture::new(version, shape, base, CLUSTERS);
        let fx = fx.tracked().showing(SHOWN);
        for (name, steps) in stories() {
            all += sweep(Budget::default()).steps(&fx, &steps, name);
        }
    }
    println!("{all}");
    assert!(all.exhaustive * 10 > all.points * 7, "{all}");
}

/// Goal: the same for runs that nobody thought of.
#[test]
fn no_bit_is_missing_in_seeded_runs() {
    let first = env("PLOOP_CRASH_SEED", 1);
    let mut all = Tally::default();
    for seed in first..first + env("PLOOP_CRASH_SEEDS", 8) {
        let mut rng = Rng(seed);
        let version = [Version::V1, Version::V2][rng.below(2) as usize];
        let shape = [Shape::Empty, Shape::Used][rng.below(2) as usize];
        let fx = Fixture::new(version, shape, rng.below(2) == 0, CLUSTERS);
        let fx = fx.tracked().showing(SHOWN);
        let steps = workload::seeded(rng.below(1 << 32), 12, CLUSTERS);
        let budget = Budget {
            exhaustive_units: 7,
            seeded: 8,
            seed,
        };
        all += sweep(budget).steps(&fx, &steps, &format!("PLOOP_CRASH_SEED={seed}"));
    }
    println!("{all}");
}

/// Goal: no sync of the trackers' files can be taken out or moved. Method: as in `crash_proof.rs`.
#[test]
fn every_sync_of_trackers_is_needed_where_it_is() {
    let proof = Proof::default();
    for (version, base) in [(Version::V2, true), (Version::V1, false)] {
        let fx = Fixture::new(version, Shape::Used, base, CLUSTERS);
        let fx = fx.tracked().showing(SHOWN);
        for (name, steps) in stories().into_iter().take(4) {
            proof.add(&Scenario::of(&fx, name, &steps), FILES);
        }
    }
    // Three regions: written to before, written to after, and never.
    let region = (16 << 20) / 512;
    let fx = Fixture::new(Version::V2, Shape::Empty, false, 2 * region / C + 20);
    let fx = fx.tracked().leaving(2 * region..2 * region + 20 * C);
    let (first, second) = (Write(9, 1), Write(region + 9, 1));
    for (name, steps) in [
        ("one region, closed", vec![first.clone(), Flush, Close]),
        (
            "one region, another",
            vec![first.clone(), Flush, second.clone(), Flush],
        ),
        (
            "killed, another region",
            vec![first.clone(), Flush, Kill, second.clone(), Flush],
        ),
        (
            "closed, another region, killed",
            vec![first, Close, second, Flush, Kill, Flush],
        ),
    ] {
        proof.add(&Scenario::of(&fx, name, &steps), FILES);
    }
    proof.verdict(FILES);
}

/// Marks that a run leaves in the log.
const CLEARED: u64 = 1;

/// Goal: what was read at the instant of a clearing, and is lost in a power cut because nobody had
/// flushed it, has its bit again: an increment must bring the old bytes back. Method: unflushed
/// writes, a clearing (or a new tracker), other writes; every state of the time after.
#[test]
fn what_was_not_durable_when_a_tracker_was_cleared_is_not_forgotten() {
    for begin in [false, true] {
        for version in [Version::V1, Version::V2] {
            let fx = Fixture::new(version, Shape::Used, true, CLUSTERS).tracked();
            let store = RecordingStore::on(&fx.start);
            let disk = fx.open_on(&store.store(), true).unwrap();
            let id = if begin { Id([3; 16]) } else { Id([1; 16]) };
            if begin {
                // As who begins one does: its name first.
                let meta = Path::new("/disk/.ploop/meta.json");
                let text = "{\"trackers\": {\"03030303-0303-0303-0303-030303030303\": \
                            {\"name\": \"n\", \"granularity\": 512}}}";
                let new = meta.with_extension("tmp");
                let file = store.store().create(&new, 0o600).unwrap();
                file.write_at(text.as_bytes(), 0).unwrap();
                file.sync().unwrap();
                store.store().rename(&new, meta).unwrap();
                store.store().sync_dir(Path::new("/disk/.ploop")).unwrap();
            }
            disk.write(512, &payload(1, 1..3)).unwrap();
            disk.write(5 * C * 512, &payload(2, 5 * C..5 * C + 2))
                .unwrap();
            let seen = fx.words(&disk).unwrap();
            match begin {
                true => drop(disk.start_tracker(id, 512, false).unwrap()),
                false => drop(disk.clear_tracker(id).unwrap()),
            }
            let cleared = store.log().len();
            store.mark(CLEARED);
            disk.write((C + 9) * 512, &payload(3, C + 9..C + 11))
                .unwrap();
            disk.flush().unwrap();
            disk.write((C + 9) * 512, &payload(4, C + 9..C + 10))
                .unwrap();
            drop(disk);
            let mut states = 0;
            for point in store.crash_points() {
                let after = store.marks_before(point).contains(&CLEARED);
                for state in store.states_at(point, &Budget::default()) {
                    let state = state.build();
                    let trackers = fx.trackers(&state).unwrap();
                    let Some(tracker) = trackers.iter().find(|t| t.id == id) else {
                        assert!(!after, "the tracker is gone after call {cleared}");
                        continue;
                    };
                    let disk = fx.open(&state, false).unwrap();
                    let words = fx.words(&disk).unwrap();
                    states += 1;
                    // What it is compared with: at the latest what was there at the clearing; before
                    // it was answered, what was at the start would do, too.
                    let covers = |then: &[u64]| missing(tracker, &words, then);
                    let now = covers(&seen);
                    let sound = now.is_none() || !after && covers(&fx.initial).is_none();
                    assert!(
                        sound,
                        "{version:?}, begun {begin}, point {point}: sector {now:?}"
                    );
                }
            }
            assert!(states > 100, "{states}");
        }
    }
}

/// The first sector that reads otherwise than `then`, and whose bit is clear.
fn missing(tracker: &ploop::tracker::Tracker, words: &[u64], then: &[u64]) -> Option<u64> {
    let clear = tracker.bits.runs(0..tracker.bits.size());
    let clear = clear.filter(|run| !run.1);
    let mut sectors = clear.flat_map(|(run, _)| run.start / 512..run.end.div_ceil(512));
    sectors.find(|&s| words[s as usize] != then[s as usize])
}
