//! Store calls that fail while the tree of a disk changes under its clients.
//!
//! Every operation is run again and again; in run N change or sync number N of it fails. Then either
//! clients go on as if nothing had been, or the disk is latched and every later flush says so; never
//! a third thing. What was flushed is there, after kill -9 and after a power cut; a full host loses
//! nothing, and the next try succeeds once there is room.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::sync::Arc;

use ploop::Kind;
use ploop::device::Device;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, Calls, Fault, RecordingStore};
use ploop_tests::crash::full::FullStore;
use ploop_tests::crash::history::payload;
use ploop_tests::crash::live::{Clients, Driver, going};
use ploop_tests::crash::promise::{Depth, Promise};
use ploop_tests::crash::scene::{Host, Op, Plan, Scene};
use ploop_tests::crash::{CLUSTER, CLUSTER_SECTORS, SECTOR};
use snapshots::delete;
use snapshots::merge::{Direction, Merge, Step};
use snapshots::snapshot::{Live, NewSnapshot, take};

use Op::{Create, Delete, Run};

fn plans() -> Vec<Plan> {
    let gone = [Delete("b"), Run(true)];
    let up: &[(&str, &[u64])] = &[("a", &[0, 1]), ("b", &[1, 2, 3]), ("c", &[1, 3, 5, 6, 7])];
    let down: &[(&str, &[u64])] = &[("a", &[0, 1]), ("b", &[1, 2, 3, 6]), ("c", &[3, 7])];
    vec![
        Plan::chain("create", &[("a", &[0, 1])], &[1, 2]).does(&[Create("x"), Create("y")]),
        Plan {
            disks: 2,
            ..Plan::chain("create, a group", &[("a", &[0])], &[1]).does(&[Create("x")])
        },
        Plan {
            aside: Some("a"),
            ..Plan::chain("a leaf", &[("a", &[0]), ("b", &[1, 2])], &[2]).does(&[Delete("kept")])
        },
        Plan::chain("into the top", &up[..2], &[2, 4]).does(&gone),
        Plan::chain("up in the chain", up, &[0, 4]).does(&gone),
        Plan::chain("down in the chain", down, &[0, 4]).does(&gone),
        Plan {
            aside: Some("a"),
            ..Plan::chain("down aside", down, &[0, 4]).does(&gone)
        },
        Plan {
            raw: true,
            ..Plan::chain("a raw base", &[("b", &[])], &[2, 6]).does(&gone)
        },
        Plan {
            shared: true,
            ..Plan::chain("a shared layer", &[("b", &[0])], &[0, 1]).does(&gone)
        },
    ]
}

/// What became of one run.
#[derive(Debug, Default)]
struct Outcome {
    reached: bool,
    failed: bool,
    latched: bool,
}

/// Call `n` of the operations fails once.
fn run(scene: &Scene, fault: Fault, n: u64) -> Outcome {
    let record = RecordingStore::on(&scene.start);
    let mut driver = Driver::new(scene, record.store(), &record, Clients::NONE);
    driver.write_at(0, 3).unwrap();
    driver.flush().unwrap();
    driver.write_at(0, 5 + CLUSTER_SECTORS).unwrap();
    record.count(Calls::Changes);
    record.fail_at(n, fault);
    let context = |what: &str, e: &dyn std::fmt::Display| -> ! {
        let log = record.log().join("\n  ");
        panic!(
            "{}, {fault:?} at {n}: {what}: {e}\n  {log}",
            scene.plan.name
        )
    };
    let mut outcome = Outcome::default();
    for op in 0..scene.plan.ops.len() {
        let Err(e) = driver.op(op) else { continue };
        assert!(!outcome.failed, "{}: a second error: {e}", scene.plan.name);
        outcome.failed = true;
        let kind = match fault {
            Fault::Enospc => Kind::NoSpace,
            _ => Kind::Io,
        };
        if e.kind() != kind {
            context("another kind of error", &e);
        }
        let judged = judge_clients(&driver);
        outcome.latched = judged.unwrap_or_else(|e| context("clients", &e));
        if outcome.latched {
            break;
        }
        // The same again, as a user would.
        if let Err(e) = again(&mut driver, op) {
            context("the next try", &e);
        }
    }
    outcome.reached = record.calls() > n;
    record.clear_faults();
    let end = record.log().len();
    let killed = driver.promise(end);
    let promise = Promise {
        synced: false,
        ..killed.clone()
    };
    driver.join();
    let killed = killed.judge(&record.snapshot(), Depth::Work);
    killed.unwrap_or_else(|e| context("kill -9", &e));
    let budget = Budget {
        exhaustive_units: 4,
        seeded: 4,
        seed: n,
    };
    for (k, state) in record.states_at(end, &budget).enumerate() {
        let depth = match k % 5 {
            0 => Depth::Work,
            _ => Depth::Look,
        };
        let judged = promise.judge(&state.build(), depth);
        judged.unwrap_or_else(|e| context(&state.to_string(), &e));
    }
    outcome
}

/// Clients either go on, or meet a latch that stays. True for the latch.
fn judge_clients(driver: &Driver) -> Result<bool, String> {
    let wrote = driver.write_at(0, 7);
    let flushed = driver.flush();
    let latched = |done: &ploop::Result<()>| matches!(done, Err(e) if e.kind() == Kind::Latched);
    driver.words()?;
    match (wrote, flushed) {
        (Ok(()), Ok(())) => Ok(false),
        (wrote, flushed) if latched(&flushed) && (wrote.is_ok() || latched(&wrote)) => {
            match latched(&driver.flush()) && latched(&driver.close()) {
                true => Ok(true),
                false => Err("a latch that opened".into()),
            }
        }
        other => Err(format!("neither on nor latched: {other:?}")),
    }
}

/// What was done already counts as done.
fn again(driver: &mut Driver, op: usize) -> ploop::Result<()> {
    match driver.again(op) {
        Err(e) if matches!(e.kind(), Kind::Exists | Kind::NotFound) => Ok(()),
        other => other,
    }
}

fn every_call(fault: Fault) {
    let (mut runs, mut errors, mut latches) = (0, 0, 0);
    for plan in plans() {
        let scene = plan.build();
        for n in 0.. {
            let outcome = run(&scene, fault, n);
            runs += 1;
            errors += u32::from(outcome.failed);
            latches += u32::from(outcome.latched);
            if !outcome.reached {
                assert!(n > 8, "{}: {n} calls only", plan.name);
                break;
            }
        }
    }
    println!("{fault:?}: {runs} runs, {errors} with an error, {latches} latched");
    assert!(errors > 50 && latches < errors);
}

/// Goal: promises 1 and 3 when the device fails. Method: EIO at each change and sync.
#[test]
fn an_io_error_in_an_operation_is_survived_or_latches() {
    every_call(Fault::Eio);
}

/// Goal: promises 3 and 5 when the host says that it is full, wherever that is.
#[test]
fn a_full_host_in_an_operation_is_survived_or_latches() {
    every_call(Fault::Enospc);
}

/// A program on a host with so many free blocks.
fn on_full(start: &MemoryStore, free: u64) -> (MemoryStore, FullStore, Host) {
    let memory = start.snapshot();
    let full = FullStore::new(&memory, free);
    let host = Host::on(Arc::new(full.clone()), false).unwrap();
    (memory, full, host)
}

/// Goal: promise 5 for snapshots on a host that is really full. Method: room for 0, 1, 2 … blocks:
/// without enough the snapshot is refused, nothing latches, clients write in place and flush, and
/// with room again the next try succeeds under the same name.
#[test]
fn a_snapshot_without_room_is_refused_and_hurts_nobody() {
    let scene = Plan::chain("create", &[("a", &[0, 1])], &[1, 2]).build();
    let mut refused = 0;
    for free in 0..40 {
        let (_, full, host) = on_full(&scene.start, free);
        let place = host.place(0).unwrap();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        let new = NewSnapshot {
            name: Some("x".into()),
            ..NewSnapshot::default()
        };
        let write = |id| disk.write(CLUSTER, &payload(id, 1..2));
        write(1).unwrap();
        if let Err(e) = take(live, &new) {
            assert_eq!(e.kind(), Kind::NoSpace, "{free} blocks: {e}");
            refused += 1;
            write(2).unwrap_or_else(|e| panic!("{free} blocks: {e}"));
            disk.flush()
                .unwrap_or_else(|e| panic!("{free} blocks: {e}"));
            full.add(100);
            take(live, &new).unwrap_or_else(|e| panic!("{free} blocks, then more: {e}"));
        }
        full.add(100);
        write(3).unwrap();
        disk.close().unwrap();
    }
    assert!((2..40).contains(&refused), "{refused}");
}

/// A merge of many clusters of data, whose costs say in which direction.
fn heavy(direction: Direction, into_top: bool) -> Scene {
    let all: Vec<u64> = (0..24).collect();
    let few: Vec<u64> = vec![1, 30];
    let (b, c) = match direction {
        Direction::Up => (&few, &all),
        Direction::Down => (&all, &few),
    };
    // Into the top there is one way only, and all of it moves.
    let levels: Vec<(&'static str, &[u64])> = match into_top {
        true => vec![("a", &[0]), ("b", &all)],
        false => vec![("a", &[0]), ("b", b), ("c", c)],
    };
    let plan = Plan {
        clusters: 64,
        ..Plan::chain("heavy", &levels, &[40])
    };
    plan.build()
}

/// Fills the clusters that the image of `name` has with data, whole.
fn fatten(scene: &Scene) -> Scene {
    use ploop::store::{Access, Store};
    use ploop::verify::scan_image;
    let scene = scene.clone();
    let host = Host::on(Arc::new(scene.start.clone()), false).unwrap();
    let place = host.place(0).unwrap();
    let d = place.descriptor().unwrap();
    for image in &d.images {
        let path = place.file_of(image).unwrap();
        let file = scene.start.open(&path, Access::Write).unwrap();
        let header = scan_image(file.as_ref()).unwrap().header;
        let len = file.len().unwrap();
        for at in (header.data_start..len).step_by(SECTOR as usize) {
            let mut sector = [0; SECTOR as usize];
            file.read_at(&mut sector, at).unwrap();
            if sector.iter().all(|b| *b == 0) {
                file.write_at(&payload(9, at..at + 1), at).unwrap();
            }
        }
    }
    drop(d);
    scene
}

/// Room for this many batches of `clusters` clusters and what metadata takes.
fn room(clusters: u64) -> u64 {
    const METADATA: u64 = 8;
    clusters * CLUSTER / 4096 + METADATA
}

/// Goal: a merge needs no more room than one batch, however much it moves. Method: 24 clusters are
/// moved by batches of one and of three, in each direction and into the top, on a host with room for
/// that and the metadata; a clean end, and the same content.
#[test]
fn a_merge_needs_room_for_one_batch() {
    for (direction, into_top) in [
        (Direction::Up, true),
        (Direction::Up, false),
        (Direction::Down, false),
    ] {
        for batch in [1, 3] {
            let scene = fatten(&heavy(direction, into_top));
            let (memory, full, host) = on_full(&scene.start, room(batch));
            let place = host.place(0).unwrap();
            let before = host.reads(0, None).unwrap();
            let disk = place.open().unwrap();
            let (d, meta) = (place.descriptor().unwrap(), place.meta().unwrap());
            let node = place.find(&d, &meta, "b").unwrap();
            let mut merge = Merge::begin(&place, &disk, node).unwrap();
            assert_eq!(merge.direction(), Some(direction));
            loop {
                match merge.step(batch * CLUSTER) {
                    Ok(Step::More) => {}
                    Ok(Step::Done) => break,
                    Err(e) => panic!("{direction:?} {into_top} by {batch}: {e}"),
                }
            }
            disk.close().unwrap();
            drop(disk);
            let after = Host::on(Arc::new(memory), false).unwrap();
            assert_eq!(after.reads(0, None).unwrap(), before);
            println!(
                "{direction:?} {into_top} by {batch}: {} blocks left",
                full.free()
            );
        }
    }
}

/// Goal: promise 5 in the middle of a merge. Method: room for 0, 1, 2 … blocks: it stops with
/// ENOSPC, clients read, write in place and flush; with room again it goes on and ends right.
#[test]
fn a_merge_without_room_waits_for_it() {
    let mut stopped = 0;
    for (direction, into_top) in [
        (Direction::Up, true),
        (Direction::Up, false),
        (Direction::Down, false),
    ] {
        let scene = fatten(&heavy(direction, into_top));
        for free in (0..room(3)).step_by(2) {
            let (memory, full, host) = on_full(&scene.start, free);
            let mut expect = host.reads(0, None).unwrap();
            let place = host.place(0).unwrap();
            let disk = place.open().unwrap();
            let live = Live {
                place: &place,
                disk: &disk,
            };
            let what = format!("{direction:?} {into_top}, {free} blocks");
            let at = 40 * CLUSTER_SECTORS;
            disk.write(at * SECTOR, &payload(11, at..at + 1)).unwrap();
            let (d, meta) = (place.descriptor().unwrap(), place.meta().unwrap());
            let node = place.find(&d, &meta, "b").unwrap();
            let deleted = delete::delete(live, node).and_then(|_| delete::run(live, &going()));
            if let Err(e) = deleted {
                assert_eq!(e.kind(), Kind::NoSpace, "{what}: {e}");
                stopped += 1;
                disk.write(at * SECTOR, &payload(12, at..at + 1))
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                disk.flush().unwrap_or_else(|e| panic!("{what}: {e}"));
                full.add(10_000);
                if delete::delete(live, node).is_ok() {
                    delete::run(live, &going()).unwrap_or_else(|e| panic!("{what}: {e}"));
                }
            }
            full.add(10_000);
            disk.write(at * SECTOR, &payload(13, at..at + 1)).unwrap();
            disk.close().unwrap();
            drop(disk);
            expect[at as usize] = ploop_tests::crash::history::word(13, at);
            let after = Host::on(Arc::new(memory), false).unwrap();
            let place = after.place(0).unwrap();
            place.sweep().unwrap();
            assert_eq!(
                place.meta().unwrap().snapshots.len(),
                if into_top { 1 } else { 2 }
            );
            assert!(after.reads(0, None).unwrap() == expect, "{what}");
        }
    }
    assert!(stopped > 10, "{stopped}");
}
