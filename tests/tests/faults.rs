//! Every store call fails once.
//!
//! Each story is run again and again; in run N call number N fails, until a run has no call N.
//! Nothing panics; errors have the right kind; what was answered and flushed is there after kill -9
//! and after a power cut (promise 1); a failed sync stops all writing (promise 1: no false
//! success); a full host hurts the writer that needs space and nobody else, and the image still
//! closes clean (promise 5).

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::sync::Arc;

use ploop::Kind;
use ploop::device::Device;
use ploop::format::ploop::Version;
use ploop::store::recording::{Budget, Calls, CrashState, Fault, RecordingStore, Tear};
use ploop::verify::{FindingKind, scan_image};
use ploop_tests::crash::full::FullStore;
use ploop_tests::crash::history::{Asked, payload};
use ploop_tests::crash::{
    CLUSTER_SECTORS, Depth, Fixture, History, Runner, SECTOR, Shape, Step, Sweep, env, fixture,
    judge, workload,
};

/// What fails.
#[derive(Clone, Copy, Debug)]
struct Case {
    fault: Fault,
    calls: Calls,
    tear: Tear,
    /// Count syncs only.
    syncs: bool,
}

/// What became of one run.
struct Outcome {
    /// The error of the step that met the fault; `None` when it was survived without one.
    first: Option<ploop::Error>,
    /// Call N was reached.
    reached: bool,
}

/// True for a failure after which nothing may be written any more: of a sync, or of a write to the
/// header or the table.
fn must_latch(fx: &Fixture, e: &ploop::Error) -> bool {
    e.what().starts_with("sync")
        || e.what().starts_with("write") && e.offset().is_some_and(|at| at < data_start(fx))
}

fn data_start(fx: &Fixture) -> u64 {
    scan_image(fx.top_file(&fx.start).as_ref())
        .unwrap()
        .header
        .data_start
}

fn run(fx: &Fixture, steps: &[Step], case: Case, n: u64) -> Outcome {
    let store = RecordingStore::on(&fx.start);
    store.count(case.calls);
    store.tear(case.tear);
    match case.syncs {
        true => store.fail_sync(n, case.fault),
        false => store.fail_at(n, case.fault),
    }
    let history = History::new(&store, fx.initial.clone(), fx.closed());
    let mut runner = Runner::new(fx, store.store(), &history);
    let mut first: Option<ploop::Error> = None;
    let mut growing = false;
    let mut latched = false;
    let mut points = Vec::new();
    let mut closed = false;
    for step in steps.iter().chain([&Step::Close]) {
        if first.is_some() {
            points.push(store.log().len());
        }
        let fresh = !runner.is_open() || *step == Step::Kill;
        latched &= !fresh;
        match runner.step(step) {
            Ok(()) => {
                assert!(!latched, "{step:?} succeeded after {first:?}");
                closed = *step == Step::Close;
                continue;
            }
            Err(e) if first.is_none() => {
                let kind = if case.fault == Fault::Enospc {
                    Kind::NoSpace
                } else {
                    Kind::Io
                };
                assert_eq!(e.kind(), kind, "{step:?}: {e}");
                // Once its header is another, the image must be read anew.
                growing = matches!(step, Step::Grow(_));
                latched = runner.is_open() && e.what().starts_with("sync");
                runner.trust_cache = !e.what().starts_with("sync");
                points.push(store.log().len());
                first = Some(e);
            }
            Err(e) => {
                let first = first.as_ref().unwrap();
                assert!(
                    growing || must_latch(fx, first),
                    "{step:?} fails: {e}, after one failure: {first}"
                );
                assert_eq!(e.kind(), Kind::Latched, "{step:?}: {e}");
                assert!(!fresh, "{step:?} after a new open: {e}");
            }
        }
        closed = false;
        // A close that failed is a close all the same: the next step opens the disk anew.
        latched &= runner.is_open();
    }
    let reached = if case.syncs {
        store.syncs() > n
    } else {
        store.calls() > n
    };
    // Even after an error the last close leaves nothing behind, unless it failed itself.
    if closed {
        let scan = scan_image(fx.top_file(&store.snapshot()).as_ref()).unwrap();
        let worse = |k| k != FindingKind::UnreferencedClusters || !fx.findings.contains(&k);
        let left: Vec<_> = scan.findings.iter().filter(|f| worse(f.kind)).collect();
        assert!(
            left.is_empty(),
            "closed after {first:?}, and not clean: {left:?}"
        );
    }
    points.push(store.log().len());
    look(fx, &store, &history, &points);
    Outcome { first, reached }
}

/// kill -9 and power cuts: between all steps that came after the failure with everything and
/// nothing of what is at risk, at the end with more.
fn look(fx: &Fixture, store: &RecordingStore, history: &History, points: &[usize]) {
    let killed = judge(
        fx,
        &history.view(usize::MAX),
        &store.snapshot(),
        Depth::Work,
    );
    killed.unwrap_or_else(|e| panic!("after kill -9: {e}"));
    let fail = |e: String, state: &CrashState| {
        let ops = history.lines().join("\n  ");
        panic!(
            "{e}\n{state}\n  {ops}\nlog:\n  {}",
            store.log().join("\n  ")
        )
    };
    let all: Vec<usize> = (0..1000).collect();
    for &point in points {
        let view = history.view(point);
        for kept in [&all[..], &[]] {
            let state = store.state(point, kept);
            judge(fx, &view, &state.build(), Depth::Look).unwrap_or_else(|e| fail(e, &state));
        }
    }
    let (end, view) = (store.log().len(), history.view(usize::MAX));
    let budget = Budget {
        exhaustive_units: 5,
        seeded: 6,
        seed: 1,
    };
    for state in store.states_at(end, &budget) {
        judge(fx, &view, &state.build(), Depth::Work).unwrap_or_else(|e| fail(e, &state));
    }
}

fn every_call(case: Case) {
    let (mut runs, mut errors) = (0u64, 0u64);
    for (version, overlay, shape) in [
        (Version::V2, true, Shape::Empty),
        (Version::V1, true, Shape::Dirty),
        (Version::V2, false, Shape::Holes),
    ] {
        let fx = Fixture::new(version, shape, overlay, workload::STORY_CLUSTERS);
        for (name, steps) in workload::stories() {
            let mut fx = fx.clone();
            if steps
                .iter()
                .any(|s| matches!(s, Step::Grow(_) | Step::Compact))
            {
                // Clusters that were moved before it failed leave holes, which are used again.
                fx.findings.push(FindingKind::UnreferencedClusters);
            }
            for n in 0.. {
                println!("{}, {name}, {case:?}, call {n}", fx.name);
                let outcome = run(&fx, &steps, case, n);
                runs += 1;
                errors += u64::from(outcome.first.is_some());
                if !outcome.reached {
                    break;
                }
            }
        }
    }
    println!("{runs} runs, {errors} of them with an error");
    assert!(errors > 100 && errors < runs);
}

/// Goal: promise 1 when the device fails. Method: EIO at every call, reads included, with nothing
/// and with two sectors of a failing write on disk.
#[test]
fn an_io_error_at_any_call_loses_nothing_that_was_flushed() {
    let case = Case {
        fault: Fault::Eio,
        calls: Calls::All,
        tear: Tear::Nothing,
        syncs: false,
    };
    every_call(case);
    every_call(Case {
        calls: Calls::Changes,
        tear: Tear::Bytes(1024),
        ..case
    });
}

/// Goal: promise 5. Method: ENOSPC at every call that changes something.
#[test]
fn a_full_host_at_any_call_hurts_one_writer_only() {
    let case = Case {
        fault: Fault::Enospc,
        calls: Calls::Changes,
        tear: Tear::Nothing,
        syncs: false,
    };
    every_call(case);
    every_call(Case {
        tear: Tear::Bytes(1024),
        ..case
    });
}

/// Goal: promise 1 when a sync fails and the kernel forgets it. Method: every sync fails once, and
/// what it covered stays losable whatever later syncs report.
#[test]
fn a_failed_sync_stops_all_writing() {
    every_call(Case {
        fault: Fault::Eio,
        calls: Calls::Changes,
        tear: Tear::Nothing,
        syncs: true,
    });
}

/// Goal: promise 3 when closing fails half-way: an image that may say that it is closed is not
/// changed. Method: every call of a close fails, with the write that fails on disk all the same;
/// then the same open disk is written, flushed and closed again. Every state is judged.
#[test]
fn after_a_close_that_failed_nothing_is_changed_in_secret() {
    for (shape, overlay) in [(Shape::Empty, true), (Shape::Dirty, false)] {
        let fx = Fixture::new(Version::V2, shape, overlay, 8);
        for n in 0.. {
            let store = RecordingStore::on(&fx.start);
            let history = History::new(&store, fx.initial.clone(), fx.closed());
            let disk = fx.open(&store, true).unwrap();
            let write = |sector: u64| {
                let id = history.begin(Asked::Write(sector..sector + 1), false);
                answer(
                    &history,
                    id,
                    disk.write(sector * SECTOR, &payload(id, sector..sector + 1)),
                )
            };
            let flush = || {
                let id = history.begin(Asked::Flush, false);
                answer(&history, id, disk.flush())
            };
            let close = || {
                let words = fixture::words_of(&disk).ok().map(Arc::new);
                let id = history.begin(Asked::Close(words), false);
                answer(&history, id, disk.close())
            };
            write(4 * CLUSTER_SECTORS).unwrap();
            store.count(Calls::Changes);
            store.tear(Tear::Bytes(64));
            store.fail_at(n, Fault::Eio);
            let failed = close();
            if failed.is_ok() {
                assert!(n > 4);
                break;
            }
            println!("{}, call {n}: {failed:?}", fx.name);
            // Whether these work is the disk's choice; what they leave must be right.
            drop((
                write(4 * CLUSTER_SECTORS),
                write(2 * CLUSTER_SECTORS),
                flush(),
                close(),
            ));
            let sweep = Sweep {
                budget: Budget {
                    seeded: 30,
                    ..Budget::default()
                },
                work_every: 1,
            };
            sweep
                .check(&fx, &store, &history)
                .unwrap_or_else(|e| panic!("call {n}: {e}"));
        }
    }
}

fn answer(history: &History, id: u64, done: ploop::Result<()>) -> ploop::Result<()> {
    match &done {
        Ok(()) => history.ok(id),
        Err(_) => history.failed(id),
    }
    done
}

/// Goal: promise 5 on a host that is really full. Method: seeded runs with room for 0, 1, 2 …
/// blocks: only what needs room fails, with ENOSPC; a flush and a close never do, nothing that
/// was answered is lost, and with room again everything works.
#[test]
fn a_full_host_fails_nobody_but_the_writer_that_needs_room() {
    let first = env("PLOOP_CRASH_SEED", 1);
    let mut refused = 0;
    for seed in first..first + env("PLOOP_CRASH_SEEDS", 6) {
        for (shape, overlay) in [
            (Shape::Empty, true),
            (Shape::Dirty, true),
            (Shape::Holes, false),
        ] {
            let fx = Fixture::new(Version::V2, shape, overlay, 12);
            let steps = workload::seeded(seed, 40, 12);
            for free in 0.. {
                println!("PLOOP_CRASH_SEED={seed}, {}, {free} blocks", fx.name);
                let errors = run_full(&fx, &steps, free);
                refused += errors;
                if errors == 0 {
                    break;
                }
            }
        }
    }
    // A table of several blocks, most of them holes at first.
    let fx = Fixture::new(Version::V2, Shape::Used, false, 3000);
    let far = [1500, 2900, 700, 1501].map(|cluster| Step::Write(cluster * CLUSTER_SECTORS + 5, 1));
    let steps: Vec<Step> = far
        .into_iter()
        .flat_map(|write| [write, Step::Flush])
        .collect();
    for free in 0..8 {
        refused += run_full(&fx, &steps, free);
    }
    println!("{refused} steps refused");
    assert!(refused > 1000);
}

/// Runs on `free` blocks; gives the number of steps that failed.
fn run_full(fx: &Fixture, steps: &[Step], free: u64) -> u64 {
    let memory = fx.start.snapshot();
    let full = FullStore::new(&memory, free);
    // Only for its oracle: marks go to a store of their own.
    let log = RecordingStore::new();
    let history = History::new(&log, fx.initial.clone(), fx.closed());
    let mut runner = Runner::new(fx, Arc::new(full.clone()), &history);
    let mut errors = 0;
    for step in steps {
        let Err(e) = runner.step(step) else { continue };
        let writes = !matches!(step, Step::Flush | Step::Close | Step::Kill);
        assert!(
            writes && e.kind() == Kind::NoSpace,
            "{step:?} with {} blocks: {e}",
            full.free()
        );
        errors += 1;
    }
    runner.step(&Step::Flush).unwrap();
    let killed = judge(
        fx,
        &history.view(usize::MAX),
        &memory.snapshot(),
        Depth::Work,
    );
    killed.unwrap_or_else(|e| panic!("{e}\n  {}", history.lines().join("\n  ")));
    full.add(10_000);
    for cluster in 0..fx.clusters {
        runner
            .step(&Step::Write(cluster * CLUSTER_SECTORS + 7, 1))
            .unwrap();
    }
    runner.step(&Step::Close).unwrap();
    let left = scan_image(fx.top_file(&memory).as_ref()).unwrap().findings;
    assert!(left.is_empty(), "{left:?}");
    errors
}
