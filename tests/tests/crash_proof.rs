//! The crash tests prove themselves: a build that leaves out, hastens or delays any sync of the
//! writable image is red (promises 1, 2 and 3).

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ploop::format::ploop::Version;
use ploop::store::recording::Budget;
use ploop_tests::crash::front::{FrontStore, Kind, killed};
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::crash::{CLUSTER_SECTORS, Fixture, History, Runner, Shape, Step, Sweep, workload};

const FILES: &[&str] = &[
    "ploop/src/format/ploop/top.rs",
    "ploop/src/format/ploop/durable.rs",
    "ploop/src/format/ploop/journal/mod.rs",
];

fn scenario<'a>(fx: &'a Fixture, name: &str, steps: &'a [Step]) -> Scenario<'a> {
    Scenario {
        name: format!("{name}, {}", fx.name),
        start: fx.start.clone(),
        run: Box::new(move |front, store| {
            let history = History::new(store, fx.initial.clone(), fx.closed());
            Runner::new(fx, front, &history).run(steps);
            let store = store.clone();
            let check = move || {
                let budget = Budget {
                    exhaustive_units: 8,
                    seeded: 40,
                    seed: 0,
                };
                Sweep {
                    budget,
                    work_every: 1,
                }
                .check(fx, &store, &history)
                .map(drop)
            };
            Box::new(check) as Verdict<'a>
        }),
    }
}

/// The same for a process that is killed when it is about to sync for the first time after it did
/// `what` to its journal `times` times; another one does `next`.
fn killed_scenario<'a>(
    fx: &'a Fixture,
    (what, times): (&'static str, u32),
    steps: &'a [Step],
    next: &'a [Step],
) -> Scenario<'a> {
    Scenario {
        name: format!("killed after {what} {times}, {}", fx.name),
        start: fx.start.clone(),
        run: Box::new(move |front, store| {
            let history = History::new(store, fx.initial.clone(), fx.closed());
            let first = FrontStore::new(front.clone());
            let seen = AtomicU32::new(0);
            first.watch(move |call| {
                let journal = call.path.to_string_lossy().contains("journal.");
                if call.what == what && journal {
                    seen.fetch_add(1, Ordering::SeqCst);
                }
                match seen.load(Ordering::SeqCst) >= times && call.kind == Kind::Sync {
                    true => Err(killed(call.path)),
                    false => Ok(()),
                }
            });
            let mut runner = Runner::new(fx, Arc::new(first), &history);
            assert!(steps.iter().any(|step| runner.step(step).is_err()));
            runner.die();
            Runner::new(fx, front, &history).run(next);
            let store = store.clone();
            let check = move || {
                let sweep = Sweep {
                    budget: Budget {
                        exhaustive_units: 8,
                        seeded: 40,
                        seed: 0,
                    },
                    work_every: 1,
                };
                sweep.check(fx, &store, &history).map(drop)
            };
            Box::new(check) as Verdict<'a>
        }),
    }
}

/// Goal: no sync of the writable image can be taken out or moved. Method: every story with every
/// sync dropped, hastened and delayed, until each line of the code that syncs was noticed.
#[test]
fn every_sync_of_the_writable_image_is_needed_where_it_is() {
    let stories = workload::stories();
    let mut proof = Proof::default();
    for (version, overlay, shape) in [
        (Version::V2, true, Shape::Empty),
        (Version::V1, false, Shape::Dirty),
        (Version::V1, true, Shape::Tail),
        (Version::V2, true, Shape::Holes),
    ] {
        let fx = Fixture::new(version, shape, overlay, workload::STORY_CLUSTERS);
        for (name, steps) in &stories {
            proof.add(&scenario(&fx, name, steps), FILES);
        }
    }
    let c = CLUSTER_SECTORS;
    let fx = Fixture::new(Version::V2, Shape::Empty, true, workload::STORY_CLUSTERS);
    let whole = [Step::Write(0, c), Step::Flush];
    let part = |at| [Step::Write(c + at, 1), Step::Flush];
    // The record that is in the cache only names an entry.
    let appended = [&part(9)[..], &whole].concat();
    // So does the journal that has taken the place of another in the cache only.
    let renamed = [&[9, 20, 30, 40].map(part).concat()[..], &whole].concat();
    // The journal has ended in the cache only.
    let closed = [&part(9)[..], &[Step::Close]].concat();
    let close = [Step::Close];
    let more = [&whole[..], &close].concat();
    for (when, steps, next) in [
        (("write", 2), &appended, &close[..]),
        (("rename", 2), &renamed, &close),
        (("write", 2), &closed, &close),
        (("write", 2), &closed, &more),
    ] {
        proof.add(&killed_scenario(&fx, when, steps, next), FILES);
    }
    proof.verdict(FILES);
}
