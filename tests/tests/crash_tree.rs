//! Power cuts on a store of templates and containers: promise 3, one commit point per operation.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use ploop::Kind;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, Calls, Fault, RecordingStore};
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::crash::tree::{self, Operation};

const LIFE: [Operation; 7] = [
    Operation::Found,
    Operation::Import,
    Operation::Create("a"),
    Operation::CreateTogether("b"),
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
    let budget = Budget {
        exhaustive_units: 9,
        seeded: 40,
        seed: 0,
    };
    let tally = tree::check(&store, &LIFE, &budget).unwrap_or_else(|e| panic!("{e}"));
    println!("{tally}");
}

/// Goal: no sync of these operations can be taken out or moved. Method: the same life with every
/// sync dropped, hastened and delayed.
#[test]
fn every_sync_of_the_tree_is_needed_where_it_is() {
    const FILES: &[&str] = &[
        "ploop/src/format/ploop/create.rs",
        "snapshots/src/clone.rs",
        "snapshots/src/layer.rs",
        "snapshots/src/meta.rs",
        "snapshots/src/remove.rs",
        "snapshots/src/store.rs",
        "snapshots/src/template.rs",
    ];
    let life = Scenario {
        name: "the life of a store".into(),
        start: tree::start(),
        run: Box::new(|front, store| {
            tree::run(&front, store, &LIFE);
            let store = store.clone();
            let budget = Budget {
                exhaustive_units: 8,
                seeded: 20,
                seed: 0,
            };
            Box::new(move || tree::check(&store, &LIFE, &budget).map(drop)) as Verdict<'_>
        }),
    };
    let proof = Proof::default();
    proof.add(&life, FILES);
    proof.verdict(FILES);
}

/// Goal: promises 3 and 5 when a call fails. Method: EIO and ENOSPC at every call of the life of a
/// store; the operation that meets it fails with that kind, and then everything that was answered
/// is there, after kill -9 and after a power cut, and everything works and can be removed.
#[test]
fn a_failing_call_at_any_point_leaves_the_store_whole() {
    let cases = [
        (Fault::Eio, Calls::All, Kind::Io),
        (Fault::Enospc, Calls::Changes, Kind::NoSpace),
    ];
    for (fault, calls, kind) in cases {
        for n in 0.. {
            let store = RecordingStore::on(&tree::start());
            store.count(calls);
            store.fail_at(n, fault);
            let met = life_until_an_error(&store);
            if let Some((operation, e)) = &met {
                assert_eq!(e.kind(), kind, "call {n}, {operation:?}: {e}");
            }
            let reached = store.calls() > n;
            let end = store.log().len();
            let marks = store.marks_before(end);
            let (must, may) = tree::expected(&LIFE, &marks);
            let judge = |state: &MemoryStore| tree::judge(state, marks.contains(&1), &must, &may);
            let context = || format!("call {n}, {met:?}\n  {}", store.log().join("\n  "));
            judge(&store.snapshot()).unwrap_or_else(|e| panic!("kill -9: {e}: {}", context()));
            let budget = Budget {
                exhaustive_units: 5,
                seeded: 6,
                seed: n,
            };
            for state in store.states_at(end, &budget) {
                judge(&state.build()).unwrap_or_else(|e| panic!("{e}\n{state}\n{}", context()));
            }
            if !reached {
                assert!(n > 50, "{n} calls only");
                break;
            }
        }
    }
}

/// The life of a store up to the first failure; marks as [`tree::run`] puts them.
fn life_until_an_error(store: &RecordingStore) -> Option<(Operation, ploop::Error)> {
    for (n, operation) in (0..).zip(LIFE) {
        store.mark(2 * n);
        let root = tree::open(store.store());
        match root.and_then(|root| tree::perform(&root, operation)) {
            Ok(()) => store.mark(2 * n + 1),
            Err(e) => return Some((operation, e)),
        }
    }
    None
}
