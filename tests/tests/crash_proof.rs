//! The crash tests prove themselves: a build that leaves out, hastens or delays any sync of the
//! writable image is red (promises 1, 2 and 3).

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use ploop::format::ploop::Version;
use ploop::store::recording::Budget;
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::crash::{Fixture, History, Runner, Shape, Step, Sweep, workload};

const FILES: &[&str] = &["ploop/src/format/ploop/top.rs"];

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
    proof.verdict(FILES);
}
