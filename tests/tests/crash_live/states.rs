//! Every legal state after every step.

use std::sync::Arc;

use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::front::FrontStore;
use ploop_tests::crash::live::{Clients, Driver};
use ploop_tests::crash::scene::{Plan, Scene};
use ploop_tests::crash::{Tally, env};

use crate::scenes;

/// Runs a scene to its end: all of its operations, clients before, between and after.
fn play(scene: &Scene, clients: Clients) -> Driver {
    let record = RecordingStore::on(&scene.start);
    let front = FrontStore::new(record.store());
    let mut driver = Driver::new(scene, Arc::new(front.clone()), &record, clients);
    let live = clients != Clients::NONE;
    if live {
        driver.write().unwrap();
        driver.flush().unwrap();
        driver.write().unwrap();
        driver.among(&front);
    }
    for n in 0..scene.plan.ops.len() {
        let done = driver.op(n);
        done.unwrap_or_else(|e| panic!("{}: {:?}: {e}", scene.plan.name, scene.plan.ops[n]));
    }
    front.unwatch();
    if live {
        driver.join();
        driver.write().unwrap();
        driver.flush().unwrap();
    }
    driver.close().unwrap();
    driver
}

fn sweep(plans: &[Plan], clients: &[Clients]) {
    let soak = std::env::var_os("PLOOP_CRASH_SEEDS").is_some();
    let budget = Budget {
        exhaustive_units: if soak { 9 } else { 5 },
        seeded: if soak { 200 } else { 6 },
        seed: env("PLOOP_CRASH_SEED", 1),
    };
    let mut all = Tally::default();
    for plan in plans {
        let scene = plan.build();
        for clients in clients {
            let driver = play(&scene, *clients);
            let tally = driver
                .check(0, &budget, 9)
                .unwrap_or_else(|e| panic!("{e}"));
            println!("{} {clients:?}: {tally}", plan.name);
            all += tally;
        }
    }
    println!("{all}");
}

fn live() -> Vec<Clients> {
    let first = env("PLOOP_CRASH_SEED", 1);
    let seeds = first..first + env("PLOOP_CRASH_SEEDS", 1);
    seeds
        .map(|seed| Clients {
            seed,
            write_every: 3,
            flush_every: 4,
        })
        .collect()
}

/// Goal: promises 1, 2, 3 and 7 for operations on a disk that nobody uses. Method: opened, changed,
/// closed; every state after every change and sync.
#[test]
fn every_state_of_an_operation_alone_is_before_or_after_it() {
    sweep(&scenes::all(), &[Clients::NONE]);
}

/// Goal: the same for snapshots under clients: writes before and after the barrier, flushes that
/// must wait for the commit, a second snapshot right after the first.
#[test]
fn every_state_of_a_live_snapshot_is_before_or_after_it() {
    sweep(&scenes::creations(), &live());
}

/// Goal: the same for deletions and merges, in both directions.
#[test]
fn every_state_of_a_live_merge_reads_right() {
    let mut plans = scenes::merges();
    plans.extend(scenes::leaves());
    sweep(&plans, &live());
}
