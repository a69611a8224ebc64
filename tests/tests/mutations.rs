//! Damage by the thousands, seeded: whatever it is, repair neither fails nor lies.
//!
//! `PLOOP_MUTATIONS=100000` runs longer, `PLOOP_MUTATIONS_FROM=N` from seed N on; `PLOOP_SEED=N`
//! repeats one.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use ploop_fuzz::base::Base;
use ploop_fuzz::guest::LOOK;
use ploop_fuzz::trial::{Trial, Verdict};
use ploop_tests::crash::env;
use ploop_tests::damage::{bases, damaged};

/// Failing seeds after which a run ends.
const FAILURES_MAX: usize = 10;

/// What happened to one seed.
#[derive(Debug, Default)]
struct Tally {
    clean: u64,
    repaired: u64,
    asked: u64,
    refused: u64,
    left: u64,
}

fn run(bases: &[Base], seed: u64, tally: &mut Tally) {
    let (base, store, what) = damaged(bases, seed);
    let about = format!("seed {seed}, {}: {what:?}", base.name);
    let trial = Trial {
        store: &store,
        source: &base.source,
        look: LOOK,
        about: &about,
    };
    trial.check();
    *match trial.repair() {
        Verdict::Clean => &mut tally.clean,
        Verdict::Repaired => &mut tally.repaired,
        Verdict::Asked => &mut tally.asked,
        Verdict::Refused => &mut tally.refused,
        Verdict::Left => &mut tally.left,
    } += 1;
}

#[test]
fn whatever_the_damage_repair_ends_clean_names_its_losses_and_can_be_taken_back() {
    let bases = bases();
    let mut tally = Tally::default();
    if let Ok(seed) = std::env::var("PLOOP_SEED") {
        return run(&bases, seed.parse().unwrap(), &mut tally);
    }
    let from = env("PLOOP_MUTATIONS_FROM", 0);
    let count = env("PLOOP_MUTATIONS", 5000);
    let mut failed = Vec::new();
    for seed in from..from + count {
        // The panic was printed; the next seed says more.
        let whole = AssertUnwindSafe(|| run(&bases, seed, &mut tally));
        if catch_unwind(whole).is_err() {
            failed.push(seed);
            if failed.len() == FAILURES_MAX {
                break;
            }
        }
    }
    println!("{count} seeds from {from}: {tally:?}");
    assert!(failed.is_empty(), "PLOOP_SEED=N repeats one of {failed:?}");
    // The damage is such that all of these happen.
    assert!(tally.repaired > 0 && tally.asked > 0 && tally.refused > 0 && tally.clean > 0);
}
