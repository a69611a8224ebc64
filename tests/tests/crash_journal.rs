//! A process that is killed in the middle of a flush or a close, another one that goes on, and the
//! power that goes later (promises 1, 2 and 3): what the killed one had begun and not made durable,
//! its journal above all, is there for the next one, which builds on it.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ploop::format::ploop::Version;
use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::front::{FrontStore, Kind, killed};
use ploop_tests::crash::{
    CLUSTER_SECTORS, Fixture, History, Runner, Shape, Step, Sweep, Tally, workload,
};

/// Kills the process at change or sync `n` of `steps`; another one does `next`. `None`: it ended
/// before that.
fn kill_at(fx: &Fixture, steps: &[Step], n: u64, next: &[Step]) -> Option<Tally> {
    let record = RecordingStore::on(&fx.start);
    let history = History::new(&record, fx.initial.clone(), fx.closed());
    let front = FrontStore::new(record.store());
    let mut runner = Runner::new(fx, Arc::new(front.clone()), &history);
    let calls = AtomicU64::new(0);
    front.watch(move |call| {
        let dead = call.kind != Kind::Look && calls.fetch_add(1, Ordering::SeqCst) >= n;
        match dead {
            true => Err(killed(call.path)),
            false => Ok(()),
        }
    });
    steps.iter().find_map(|step| runner.step(step).err())?;
    runner.die();
    let point = record.log().len();
    let context = |e: &dyn std::fmt::Display| {
        let log = record.log().join("\n  ");
        format!("{} killed at {n}: {e}\n  {log}", fx.name)
    };
    let mut runner = Runner::new(fx, record.store(), &history);
    for step in next {
        if let Err(e) = runner.step(step) {
            panic!("{step:?}: {}", context(&e));
        }
    }
    let sweep = Sweep {
        budget: Budget {
            exhaustive_units: 5,
            seeded: 8,
            seed: 0,
        },
        work_every: 7,
    };
    let tally = sweep.check_from(point, fx, &record, &history);
    Some(tally.unwrap_or_else(|e| panic!("{n}, then {next:?}: {e}")))
}

/// Every story that ends with a close, killed at each change and sync; then a close, or a write, a
/// flush and a close.
fn stories_on(shape: Shape) {
    let write = Step::Write(CLUSTER_SECTORS + 33, 1);
    let nexts = [vec![Step::Close], vec![write, Step::Flush, Step::Close]];
    let mut all = Tally::default();
    let fx = Fixture::new(Version::V2, shape, true, workload::STORY_CLUSTERS);
    for (name, steps) in workload::stories() {
        if !name.contains("part") || !matches!(steps.last(), Some(Step::Close)) {
            continue;
        }
        for next in &nexts {
            let mut kills = 0;
            while let Some(tally) = kill_at(&fx, &steps, kills, next) {
                all += tally;
                kills += 1;
            }
            assert!(kills > 5, "{name}: {kills} calls only");
        }
    }
    println!("{all}");
}

/// Goal: what was flushed stays, whoever was killed when.
#[test]
fn whatever_a_killed_process_had_begun_the_next_one_builds_on_it() {
    stories_on(Shape::Empty);
}

/// The same on an image with free places among its clusters.
#[test]
fn it_builds_on_it_in_an_image_with_holes() {
    stories_on(Shape::Holes);
}
