//! Power cuts on a store of templates and containers: promise 3, one commit point per operation.

use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::crash::tree::{self, Operation};

const LIFE: [Operation; 7] = [
    Operation::Found,
    Operation::Import,
    Operation::Create("a"),
    Operation::Create("b"),
    Operation::Remove("a"),
    Operation::Remove("b"),
    Operation::Forget,
];

/// Goal: promise 3 for import, create and remove. Method: the life of a store, all states after
/// every change and sync: each name is there and whole, or not there; afterwards every name can be
/// made and removed, and nothing is left.
#[test]
fn a_name_is_there_and_whole_or_not_there_at_all() {
    let store = RecordingStore::on(&tree::start());
    tree::run(&store.store(), &store, &LIFE);
    let budget = Budget { exhaustive_units: 9, seeded: 40, seed: 0 };
    let tally = tree::check(&store, &LIFE, &budget).unwrap_or_else(|e| panic!("{e}"));
    println!("{tally}");
}
#[allow(unused)]
fn x(_: Proof, _: Scenario, _: Verdict) {}
