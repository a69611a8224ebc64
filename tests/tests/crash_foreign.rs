//! Another tool after a crash: the disk of a container over a template is cut off, QEMU or OpenVZ's
//! tool repairs its top image, and only then do we come back.
//!
//! What an image cannot say to other tools (which parts of a cluster are written so far) may be lost
//! to them; but then the disk refuses to open, or shows what was there before: never zeros where the
//! template has data, never another's bytes. Without another tool all promises hold.
//!
//! `PLOOP_FOREIGN_STATES=N` looks at up to N states of each point, `PLOOP_FOREIGN_SEEDS=N` draws that
//! many runs besides the written ones, the first from `PLOOP_CRASH_SEED`.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::collections::HashMap;

use ploop::format::ploop::Version;
use ploop::store::recording::{Budget, CrashState, RecordingStore};
use ploop_tests::crash::foreign::{Left, Outcome, Weak};
use ploop_tests::crash::{
    CLUSTER_SECTORS, Fixture, History, Rng, Runner, Shape, Step, env, workload,
};

/// Clusters of a disk.
const CLUSTERS: u64 = 8;

fn stories() -> [(&'static str, Vec<Step>); 6] {
    use Step::{Close, Complete, Discard, Flush, Fua, Kill, Write, Zero, ZeroKeep};
    let c = CLUSTER_SECTORS;
    [
        ("a part, flushed", vec![Write(2 * c + 9, 3), Flush]),
        (
            "parts before and after a flush, in the same clusters and others",
            vec![
                Write(9, 8),
                Write(2 * c + 60, 8),
                Flush,
                Write(2 * c + 8, 8),
                Write(4 * c + 17, 1),
                Flush,
                Write(9, 4),
                Write(6 * c - 2, 4),
            ],
        ),
        (
            "parts, completed before a flush and after it",
            vec![
                Write(9, 1),
                Complete(9),
                Write(2 * c + 9, 1),
                Write(12, 1),
                Flush,
                Complete(9),
                Write(2 * c + 12, 1),
                Flush,
            ],
        ),
        (
            "a whole cluster, parts beside it, closed, and again",
            vec![
                Write(2 * c, c),
                Write(4 * c + 1, 2),
                Flush,
                Write(4 * c, c),
                Close,
                Write(5 * c + 8, 8),
                Write(2 * c + 8, 1),
                Flush,
            ],
        ),
        (
            "parts zeroed and discarded",
            vec![
                Write(2 * c + 8, 16),
                Flush,
                Zero(2 * c + 12, 20),
                ZeroKeep(4 * c + 5, 2),
                Write(5 * c + 5, 2),
                Flush,
                Discard(2 * c, c),
                Zero(5 * c, c),
                Flush,
            ],
        ),
        (
            "parts, killed, more of them",
            vec![
                Write(9, 2),
                Fua(2 * c + 9, 2),
                Kill,
                Write(12, 2),
                Write(4 * c + 9, 1),
                Flush,
                Kill,
                Flush,
                Close,
            ],
        ),
    ]
}

/// Up to `limit` states of a point: nothing lost, all lost, and others that the seed draws.
fn states(store: &RecordingStore, point: usize, limit: u64, rng: &mut Rng) -> Vec<CrashState> {
    let budget = Budget {
        exhaustive_units: 6,
        seeded: 20,
        seed: rng.bits(),
    };
    let mut all: Vec<CrashState> = store.states_at(point, &budget).collect();
    all.sort_by_key(|s| s.kept().len());
    let mut some: Vec<CrashState> = all.pop().into_iter().collect();
    if !all.is_empty() {
        some.push(all.remove(0));
    }
    while !all.is_empty() && (some.len() as u64) < limit {
        some.push(all.swap_remove(rng.below(all.len() as u64) as usize));
    }
    some
}

/// Runs the stories and some seeded steps on a start image. Equal states are tried once.
fn sweep(version: Version, shape: Shape) {
    let seed = env("PLOOP_CRASH_SEED", 1);
    let limit = env("PLOOP_FOREIGN_STATES", 4);
    let fx = Fixture::on_data(version, shape, CLUSTERS);
    assert!(fx.below.iter().all(|w| *w != 0) && fx.initial.iter().all(|w| *w != 0));
    let mut runs: Vec<(u64, String, Vec<Step>)> = Vec::new();
    runs.extend(stories().map(|(name, steps)| (seed, name.to_owned(), steps)));
    for seed in seed..seed + env("PLOOP_FOREIGN_SEEDS", 2) {
        let steps = workload::seeded(seed, 14, CLUSTERS);
        runs.push((seed, format!("PLOOP_CRASH_SEED={seed}"), steps));
    }
    let mut known: HashMap<u64, Vec<Outcome>> = HashMap::new();
    let (mut looked, mut changed, mut refused) = (0, 0, 0);
    for (seed, name, steps) in runs {
        let mut rng = Rng(seed);
        let store = RecordingStore::on(&fx.start);
        let history = History::new(&store, fx.initial.clone(), fx.closed());
        Runner::new(&fx, store.store(), &history).run(&steps);
        for point in history.points() {
            let view = history.view(point);
            let weak = Weak::at(&fx, &history, point);
            for state in states(&store, point, limit, &mut rng) {
                let fail = |why: String| -> ! {
                    let (history, log) = (history.lines().join("\n  "), store.log().join("\n  "));
                    panic!(
                        "{name} on {}: {why}\n{state}\n  {history}\nlog:\n  {log}",
                        fx.name
                    )
                };
                let left = Left::new(&fx, state.build());
                looked += 1;
                let outcomes = known.entry(left.number).or_insert_with(|| {
                    let outcomes = left.outcomes().unwrap_or_else(|why| fail(why));
                    changed += outcomes.iter().filter(|o| o.changed).count();
                    refused += outcomes.iter().filter(|o| o.refused()).count();
                    outcomes
                });
                for outcome in outcomes {
                    left.check(outcome, &view, &weak)
                        .unwrap_or_else(|why| fail(why));
                }
            }
        }
    }
    println!(
        "{}: {looked} states, {} different; of their {} ways back {changed} with bytes changed, \
         {refused} refused",
        fx.name,
        known.len(),
        known.values().map(Vec::len).sum::<usize>()
    );
    assert!(
        changed > 0,
        "no tool has changed anything: nothing was tried"
    );
}

/// Goal: see the module text, on a disk that was just cloned.
#[test]
fn nothing_turns_to_zeros_on_a_new_clone() {
    sweep(Version::V2, Shape::Empty);
}

/// The same on one that was used before, of version 1, whose entries count sectors.
#[test]
fn nothing_turns_to_zeros_on_a_used_disk() {
    sweep(Version::V1, Shape::Used);
}

/// The same on one that was left dirty, with a hole and a tail full of leftovers.
#[test]
fn nothing_turns_to_zeros_on_a_disk_that_was_dirty_before() {
    sweep(Version::V2, Shape::Dirty);
}
