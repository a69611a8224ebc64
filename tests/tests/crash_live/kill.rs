//! A process that is killed in the middle, and the power that goes later.
//!
//! What the killed process had done and not made durable is there for the next one, which builds on
//! it: what that one flushes must not hang on anything that the power can still take back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::front::{FrontStore, Kind, killed};
use ploop_tests::crash::live::{Clients, Driver, going};
use ploop_tests::crash::scene::{Plan, Scene};
use ploop_tests::crash::{Tally, env};
use snapshots::delete;
use snapshots::snapshot::Live;

use crate::scenes;

/// Which kind of next process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Writes and flushes.
    Writes,
    /// Goes on with what was interrupted, then that.
    GoesOn,
}

/// Kills the process at change or sync `n` of its operations. False: it ended before that.
fn kill_at(scene: &Scene, n: u64, next: Next) -> Result<(bool, Tally), String> {
    let record = RecordingStore::on(&scene.start);
    let front = FrontStore::new(record.store());
    let mut driver = Driver::new(scene, Arc::new(front.clone()), &record, Clients::NONE);
    driver.write_at(0, 3).unwrap();
    driver.flush().unwrap();
    driver.write_at(0, 3).unwrap();
    let calls = Arc::new(AtomicU64::new(0));
    let seen = calls.clone();
    // A dead process may look: nobody sees it.
    front.watch(move |call| {
        let dead = call.kind != Kind::Look && seen.fetch_add(1, Ordering::SeqCst) >= n;
        match dead {
            true => Err(killed(call.path)),
            false => Ok(()),
        }
    });
    let died = (0..scene.plan.ops.len()).any(|n| driver.op(n).is_err());
    if !died {
        return Ok((false, Tally::default()));
    }
    driver.die();
    let context = |e: ploop::Error| {
        let log = record.log().join("\n  ");
        format!(
            "{} killed at {n}, then {next:?}: {e}\n  {log}",
            scene.plan.name
        )
    };
    let point = record.log().len();
    let front: Arc<dyn ploop::store::Store> = Arc::new(FrontStore::new(record.store()));
    driver.reopen(front).map_err(context)?;
    if next == Next::GoesOn {
        let (place, disk) = (driver.place(0), driver.disk(0));
        let live = Live {
            place: &place,
            disk: &disk,
        };
        place.sweep().map_err(context)?;
        delete::run(live, &going()).map_err(context)?;
    }
    driver.write_at(0, 3).map_err(context)?;
    driver.flush().map_err(context)?;
    if next == Next::Writes {
        driver.place(0).sweep().map_err(context)?;
    }
    let budget = Budget {
        exhaustive_units: 3,
        seeded: 2,
        seed: env("PLOOP_CRASH_SEED", 1),
    };
    let tally = driver.check(point, &budget, 7);
    tally
        .map(|tally| (true, tally))
        .map_err(|e| format!("killed at {n}, then {next:?}: {e}"))
}

fn every_call(plans: &[Plan], nexts: &[Next]) {
    let mut all = Tally::default();
    for plan in plans {
        let scene = plan.build();
        for &next in nexts {
            for n in 0.. {
                let (died, tally) = kill_at(&scene, n, next).unwrap_or_else(|e| panic!("{e}"));
                all += tally;
                if !died {
                    assert!(n > 8, "{}: {n} calls only", plan.name);
                    break;
                }
            }
        }
    }
    println!("{all}");
}

/// Goal: promise 1 for what the process after a killed one flushed. Method: killed at each change
/// and sync of each snapshot; the next one writes, flushes, and the power goes.
#[test]
fn what_is_flushed_after_a_killed_snapshot_stays() {
    every_call(&scenes::creations(), &[Next::Writes, Next::GoesOn]);
}

/// Goal: the same for deletions and merges.
#[test]
fn what_is_flushed_after_a_killed_merge_stays() {
    every_call(&scenes::leaves(), &[Next::Writes, Next::GoesOn]);
    every_call(&scenes::merges(), &[Next::GoesOn]);
}
