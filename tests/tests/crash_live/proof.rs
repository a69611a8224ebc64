//! The tests of tests: every sync of these operations, left out or moved, is noticed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ploop::error::Error;
use ploop::store::Store;
use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::Tally;
use ploop_tests::crash::front::{FrontStore, Kind, killed};
use ploop_tests::crash::live::{Clients, Driver};
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::crash::scene::{Op, Plan, Scene};

use crate::scenes;

const CREATE: &[&str] = &[
    "ploop/src/format/ploop/create.rs",
    "snapshots/src/meta.rs",
    "snapshots/src/place.rs",
    "snapshots/src/snapshot.rs",
];

const TAKE_OUT: &[&str] = &["ploop/src/format/ploop/merging.rs"];

/// What happens besides the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Story {
    /// Nothing.
    Alone,
    /// Clients write.
    Live,
    /// There is no room for the first descriptor.
    Refused,
    /// Another program wrote the raw image that the disk is.
    Raw,
}

const BUDGET: Budget = Budget {
    exhaustive_units: 5,
    seeded: 6,
    seed: 0,
};

fn scenario(scene: Scene, story: Story) -> Scenario<'static> {
    Scenario {
        name: format!("{}, {story:?}", scene.plan.name),
        start: scene.start.clone(),
        run: Box::new(move |store, record| {
            let driver = play(&scene, store, record, story);
            Box::new(move || driver.check(0, &BUDGET, 2).map(drop)) as Verdict<'static>
        }),
    }
}

/// Without threads: each run must do the same.
fn play(scene: &Scene, store: Arc<dyn Store>, record: &RecordingStore, story: Story) -> Driver {
    let front = FrontStore::new(store);
    let clients = Clients {
        seed: 5,
        write_every: if story == Story::Live { 4 } else { 0 },
        flush_every: 0,
    };
    let mut driver = Driver::new(scene, Arc::new(front.clone()), record, clients);
    match story {
        Story::Raw => driver.write_raw(9).unwrap(),
        _ => {
            driver.write_at(0, 3).unwrap();
            driver.flush().unwrap();
            driver.write_at(0, 3).unwrap();
        }
    }
    match story {
        Story::Refused => refuse_the_first_descriptor(&front),
        _ => driver.among(&front),
    }
    for n in 0..scene.plan.ops.len() {
        let done = driver.op(n);
        let refused = story == Story::Refused && n == 0;
        assert_eq!(done.is_err(), refused, "{done:?}");
        if story == Story::Live {
            driver.flush().unwrap();
        }
    }
    front.unwatch();
    driver
}

fn refuse_the_first_descriptor(front: &FrontStore) {
    let once = AtomicBool::new(false);
    front.watch(move |call| {
        let staged = call.what == "create" && call.path.ends_with("DiskDescriptor.xml.tmp");
        match staged && !once.swap(true, Ordering::SeqCst) {
            true => {
                let full = std::io::Error::from_raw_os_error(28);
                Err(Error::io("create", call.path, full))
            }
            false => Ok(()),
        }
    });
}

/// The scene after its operations were killed at the first rename of a descriptor, or at the first
/// change after that. What was done is durable.
fn after_a_kill(plan: &Plan, renamed: bool) -> Scene {
    let mut scene = plan.build();
    let record = RecordingStore::on(&scene.start);
    let front = FrontStore::new(record.store());
    let mut driver = Driver::new(&scene, Arc::new(front.clone()), &record, Clients::NONE);
    // Whether the rename was seen, and whether the process is dead.
    let state = Mutex::new((false, false));
    front.watch(move |call| {
        let (seen, dead) = &mut *state.lock().unwrap();
        let rename = call.what == "rename" && call.path.ends_with("DiskDescriptor.xml");
        *dead |= match renamed {
            true => *seen && call.kind == Kind::Change,
            false => rename,
        };
        *seen |= rename;
        match *dead && call.kind != Kind::Look {
            true => Err(killed(call.path)),
            false => Ok(()),
        }
    });
    let died = (0..plan.ops.len()).any(|n| driver.op(n).is_err());
    assert!(died, "{}", plan.name);
    scene.start = record.snapshot();
    scene
}

/// Goal: no sync of a snapshot, and none of the sweep, can be taken out or moved.
#[test]
fn every_sync_of_a_snapshot_is_needed_where_it_is() {
    let proof = Proof::default();
    for plan in scenes::creations() {
        proof.add(&scenario(plan.build(), Story::Alone), CREATE);
        proof.add(&scenario(plan.build(), Story::Live), CREATE);
    }
    let plan = &scenes::creations()[0];
    proof.add(&scenario(plan.build(), Story::Refused), CREATE);
    let mut left = after_a_kill(plan, false);
    left.plan.ops = vec![Op::Create("z")];
    proof.add(&scenario(left, Story::Alone), CREATE);
    let raw = Plan {
        raw: true,
        ..Plan::chain("create over raw", &[], &[]).does(&[Op::Create("x")])
    };
    proof.add(&scenario(raw.build(), Story::Raw), CREATE);
    proof.verdict(CREATE);
}

/// Goal: the same for taking entries out of an image that is merged away: those below must be whole
/// before, and no space may be given back earlier.
#[test]
fn the_sync_of_entries_that_go_is_needed_where_it_is() {
    let plans = scenes::merges();
    let plan = plans.iter().find(|p| p.name == "down aside").unwrap();
    let proof = Proof::default();
    proof.add(&scenario(plan.build(), Story::Alone), TAKE_OUT);
    proof.verdict(TAKE_OUT);
}

/// Goal: that a node's bytes alone mean nothing is durable before the first of them goes. Method:
/// killed between the mark and that; the next process begins the merge, pauses, goes on. Each of its
/// syncs is left out in turn: without that of the marker the node can be read, and reads wrong.
#[test]
fn the_marker_of_a_merge_is_durable_before_the_first_cluster_moves() {
    let plans = scenes::merges();
    let plan = plans.iter().find(|p| p.name == "into the top").unwrap();
    let scene = after_a_kill(plan, true);
    let run = |drop: Option<u64>| -> (u64, Result<Tally, String>) {
        let record = RecordingStore::on(&scene.start);
        let mut driver = Driver::new(&scene, record.store(), &record, Clients::NONE);
        // It was deleted before this begins.
        driver.skip();
        driver.write_at(0, 3).unwrap();
        driver.flush().unwrap();
        let (point, first) = (record.log().len(), record.syncs());
        if let Some(n) = drop {
            record.drop_sync(first + n);
        }
        driver.op(1).unwrap();
        let syncs = record.syncs() - first;
        (syncs, driver.check(point, &BUDGET, 5))
    };
    let (syncs, unharmed) = run(None);
    unharmed.unwrap_or_else(|e| panic!("{e}"));
    let reads_wrong = |n: &u64| {
        let lost = run(Some(*n)).1.err();
        lost.is_some_and(|why| why.starts_with("snapshot b of disk 0 reads"))
    };
    assert!((0..syncs).any(|n| reads_wrong(&n)), "of {syncs} syncs");
}
