//! Damage by the thousands, seeded: whatever it is, repair neither fails nor lies.
//!
//! `PLOOP_MUTATIONS=100000` runs longer; `PLOOP_SEED=N` repeats one.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use fsck::Class;
use fsck::repair::{self, How, Outcome, Plan};
use ploop::descriptor::Guid;
use ploop::disk::open::{OpenOptions, Opener};
use ploop::store::memory::MemoryStore;
use ploop_tests::crash::env;
use ploop_tests::damage::guest::{Reading, read};
use ploop_tests::damage::state::files;
use ploop_tests::damage::{Base, bases, damaged};

/// Failing seeds after which a run ends.
const FAILURES_MAX: usize = 10;

fn opener(store: &MemoryStore) -> Opener {
    Opener::on(Arc::new(store.clone()))
}

fn nodes(base: &Base, store: &MemoryStore) -> Vec<Option<Guid>> {
    let mut nodes = vec![None];
    if base.source.descriptor
        && let Ok(d) = opener(store).read_descriptor(&base.source.path)
    {
        nodes.extend(d.shots.iter().map(|s| Some(s.guid)).take(3));
    }
    nodes
}

fn readings(base: &Base, store: &MemoryStore, nodes: &[Option<Guid>]) -> Vec<Option<Reading>> {
    let reading = |n: &Option<Guid>| read(store, &base.source, *n);
    nodes.iter().map(reading).collect()
}

fn named(outcome: &Outcome) -> Vec<Range<u64>> {
    let steps = outcome.done.iter();
    steps
        .flat_map(|s| s.lost.iter().chain(&s.suspect).cloned())
        .collect()
}

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
    let about = || format!("seed {seed}, {}: {what:?}", base.name);
    let before = files(&store);
    let all = nodes(base, &store);
    let shown = readings(base, &store, &all);
    let plan = |store: &MemoryStore| -> Plan {
        repair::plan(&opener(store), &base.source, &OpenOptions::default())
            .unwrap_or_else(|e| panic!("{}: {e}", about()))
    };
    let planned = match repair::plan(&opener(&store), &base.source, &OpenOptions::default()) {
        // A flipped descriptor may ask for what is not done here.
        Err(e) if e.kind() == ploop::Kind::Unsupported => {
            tally.refused += 1;
            return;
        }
        _ => plan(&store),
    };
    assert_eq!(files(&store), before, "{}: a plan wrote", about());
    for how in [How::Preen, How::Yes] {
        let copy = store.snapshot();
        let undo = Path::new("/undo");
        let outcome = repair::apply(&opener(&copy), &planned, how, Some(undo));
        let outcome = outcome.unwrap_or_else(|e| panic!("{}: {how:?}: {e}", about()));
        let excepted = match how {
            How::Preen => vec![],
            How::Yes => named(&outcome),
        };
        let now = readings(base, &copy, &all);
        for (node, (was, is)) in all.iter().zip(shown.iter().zip(&now)) {
            let Some(was) = was else { continue };
            if let Some(at) = was.lost_in(is.as_ref(), &excepted) {
                panic!(
                    "{}: {how:?}: byte {at} of {node:?} reads otherwise: {:#?}",
                    about(),
                    outcome.done
                );
            }
        }
        if how == How::Yes {
            judge(&outcome, &planned, tally, &about);
            let again = plan(&copy);
            if outcome.unrepairable.is_empty() {
                assert!(again.is_empty(), "{}: again {:?}", about(), again.steps);
            }
        }
        match &outcome.undo {
            Some(undo) => {
                repair::undo(&opener(&copy), undo)
                    .unwrap_or_else(|e| panic!("{}: undo: {e}", about()));
            }
            None => assert!(outcome.done.is_empty()),
        }
        assert_eq!(files(&copy), before, "{}: {how:?}, undone", about());
    }
}

fn judge(outcome: &Outcome, plan: &Plan, tally: &mut Tally, about: &dyn Fn() -> String) {
    if !outcome.unrepairable.is_empty() {
        assert!(outcome.done.is_empty() && outcome.undo.is_none());
        tally.refused += 1;
    } else if !outcome.left.is_empty() {
        tally.left += 1;
    } else {
        let after = &outcome.after;
        let steps = &outcome.done;
        assert_eq!(
            after.class,
            Class::Clean,
            "{}: {:#?} after {steps:#?}",
            about(),
            after.findings
        );
        match (plan.is_empty(), plan.is_automatic()) {
            (true, _) => tally.clean += 1,
            (_, true) => tally.repaired += 1,
            _ => tally.asked += 1,
        }
    }
}

#[test]
fn whatever_the_damage_repair_ends_clean_names_its_losses_and_can_be_taken_back() {
    let bases = bases();
    let mut tally = Tally::default();
    if let Ok(seed) = std::env::var("PLOOP_SEED") {
        return run(&bases, seed.parse().unwrap(), &mut tally);
    }
    let count = env("PLOOP_MUTATIONS", 5000);
    let mut failed = Vec::new();
    for seed in 0..count {
        // The panic was printed; the next seed says more.
        let whole = AssertUnwindSafe(|| run(&bases, seed, &mut tally));
        if catch_unwind(whole).is_err() {
            failed.push(seed);
            if failed.len() == FAILURES_MAX {
                break;
            }
        }
    }
    println!("{count} seeds: {tally:?}");
    assert!(failed.is_empty(), "PLOOP_SEED=N repeats one of {failed:?}");
    // The damage is such that all of these happen.
    assert!(tally.repaired > 0 && tally.asked > 0 && tally.refused > 0 && tally.clean > 0);
}
