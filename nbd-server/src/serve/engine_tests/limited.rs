//! Engines behind a gate: what waits, what does not, and what is left of it.
//!
//! Of a limit of one byte per second the first write takes more than an hour's worth: what waits
//! then waits until the test changes the limit, however slow the machine is.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use ploop::store::FileId;
use snapshots::limits::Limits;

use super::crowd::Crowd;
use super::rig::STYLES;
use crate::export::limits::Throttle;
use crate::serve::engine::{Engine, Turn};
use crate::serve::plane::{EngineKind, Plane};
use crate::serve::throttled::{BYTES, REQUESTS};
use crate::session::transmission::Rules;
use crate::sleepy::Sleepy;
use crate::testing::CLUSTER;
use crate::wire::reply::Style;
use crate::wire::request::{flag, kind};

fn writes(write_bps: u64) -> Limits {
    Limits {
        write_bps,
        ..Limits::default()
    }
}

fn all(bps: u64) -> Limits {
    Limits {
        bps,
        ..Limits::default()
    }
}

/// A connection to that container.
fn join(throttle: &Arc<Throttle>, mut crowd: Crowd, name: &str, limits: &Limits) -> Crowd {
    let gate = throttle.gate(name, FileId { dev: 1, ino: 1 }, || Some(limits.clone()));
    let rules = Rules::over(crowd.device.as_ref(), crowd.style);
    let engine = Engine::on(&crowd.plane, crowd.device.clone(), rules);
    crowd.engine = engine.behind(gate, &crowd.plane);
    crowd
}

fn limited(kind: EngineKind, style: Style, limits: &Limits) -> (Crowd, Arc<Throttle>) {
    let throttle = Arc::<Throttle>::default();
    let mut crowd = Crowd::new(kind, style);
    crowd.fill(4, &[]);
    (join(&throttle, crowd, "ct", limits), throttle)
}

fn cookies(crowd: &mut Crowd) -> Vec<u64> {
    crowd.answers().into_iter().map(|(c, _)| c).collect()
}

#[test]
fn a_flush_and_reads_go_ahead_of_writes_that_wait_and_a_change_lets_those_go() {
    for kind in EngineKind::ALL {
        for style in STYLES {
            let (mut crowd, throttle) = limited(kind, style, &writes(1));
            let flushes = |crowd: &Crowd| crowd.device.inner.flushes.load(SeqCst);
            let before = flushes(&crowd);
            let first = crowd.write(0, 0, &[1; 4096]);
            let second = crowd.write(flag::FUA, 4096, &[2; 4096]);
            let flush = crowd.ask(kind::FLUSH, 0, 0, 0);
            let read = crowd.ask(kind::READ, 0, 0, 8192);
            crowd.run();
            while crowd.engine.outstanding() > crowd.engine.held() {
                crowd.engine.wait(None).unwrap();
                crowd.engine.reap(&mut crowd.out).unwrap();
            }
            assert_eq!(crowd.engine.held(), 1, "{kind} {style:?}");
            let mut answers = crowd.answers();
            answers.sort_by_key(|(c, _)| *c);
            let got: Vec<_> = answers.iter().map(|(c, _)| *c).collect();
            assert_eq!(got, [first, flush, read]);
            // It did not happen yet.
            assert_ne!(answers[2].1.data()[4096..], [2; 4096]);
            assert_eq!(flushes(&crowd), before + 1);
            assert_eq!(throttle.known("ct").unwrap().totals.waiting, 1);
            throttle.set("ct", &Limits::default());
            crowd.finish();
            assert_eq!(cookies(&mut crowd), [second]);
            assert_eq!(flushes(&crowd), before + 2);
            crowd.ask(kind::READ, 0, 4096, 4096);
            crowd.run();
            crowd.finish();
            assert_eq!(crowd.answers()[0].1.data(), [2; 4096]);
            let totals = throttle.known("ct").unwrap().totals;
            assert_eq!((totals.waited, totals.waiting), (1, 0));
            assert!(totals.nanos > 0);
        }
    }
}

#[test]
fn what_waits_is_bounded_and_holds_no_lease() {
    for kind in EngineKind::ALL {
        let (mut crowd, throttle) = limited(kind, Style::Structured, &all(1));
        crowd.ask(kind::READ, 0, 0, 4096);
        crowd.run();
        crowd.finish();
        crowd.answers();
        for i in 0..REQUESTS as u64 + 10 {
            crowd.ask(kind::READ, 0, i * 512, 512);
        }
        assert_eq!(crowd.run(), Turn::Full);
        assert_eq!(crowd.engine.held(), REQUESTS);
        assert_eq!(crowd.device.mood.leases.load(SeqCst), 0);
        assert!(crowd.answers().is_empty() && !crowd.input.is_empty());
        throttle.set("ct", &Limits::default());
        crowd.finish();
        assert_eq!(crowd.answers().len(), REQUESTS + 10);
        // By bytes.
        throttle.set("ct", &all(1));
        crowd.write(0, 0, &[1; 4096]);
        crowd.run();
        let large = vec![3; 4 << 20];
        for _ in 0..6 {
            crowd.write(0, 0, &large);
        }
        assert_eq!(crowd.run(), Turn::Full);
        assert_eq!(crowd.engine.held() as u64, BYTES / (4 << 20));
        drop(crowd.engine);
        assert_eq!(throttle.known("ct").unwrap().totals.waiting, 0);
    }
}

/// Goal: all connections to a container share its limit, and nobody else does. Method: one
/// connection uses it up; then another, one to another container, and both ends.
#[test]
fn a_limit_is_of_a_container_and_of_all_its_connections() {
    let throttle = Arc::<Throttle>::default();
    let (plane, device) = (Plane::new(EngineKind::Portable), Sleepy::new(64 << 20));
    let to = |name: &str, limits: &Limits| {
        let crowd = Crowd::over(plane.clone(), device.clone(), Style::Structured);
        join(&throttle, crowd, name, limits)
    };
    let (mut one, mut two) = (to("ct", &all(1)), to("ct", &all(1)));
    one.write(0, 0, &[1; 4096]);
    one.run();
    assert_eq!(one.answers().len(), 1);
    two.write(0, CLUSTER, &[1; 4096]);
    two.run();
    assert_eq!((two.engine.held(), two.answers().len()), (1, 0));
    // A client that comes again finds the debt of before.
    drop((one, two));
    let mut again = to("ct", &all(1));
    again.write(0, CLUSTER, &[1; 4096]);
    again.run();
    assert_eq!(again.engine.held(), 1);
    // One without limits never asks.
    let (mut free, never) = (to("free", &all(0)), to("never", &all(0)));
    for _ in 0..2 * REQUESTS {
        free.write(0, 0, &[1; 4096]);
    }
    free.run();
    assert_eq!(free.answers().len(), 2 * REQUESTS);
    drop(never);
    // Until the store has a budget.
    throttle.set_store(0, 1);
    for _ in 0..2 {
        free.write(0, 0, &[1; 4096]);
    }
    free.run();
    assert_eq!(free.engine.held(), 1);
    throttle.set_store(0, 0);
    free.finish();
    drop((again, free));
    // Who was never limited is not remembered, nor is a container that was removed.
    throttle.forget("ct");
    let names: Vec<_> = throttle.all().into_iter().map(|k| k.name).collect();
    assert_eq!(names, ["free"]);
}

#[test]
fn what_is_forgotten_never_happens_and_what_is_released_does() {
    let (mut crowd, _throttle) = limited(EngineKind::Uring, Style::Structured, &all(1));
    crowd.write(0, 0, &[1; 4096]);
    crowd.write(0, 0, &[2; 4096]);
    crowd.run();
    crowd.engine.forget();
    assert_eq!(crowd.engine.outstanding(), 0);
    crowd.finish();
    assert_eq!(crowd.answers().len(), 1);
    let late = crowd.write(0, 0, &[3; 4096]);
    crowd.run();
    assert_eq!(crowd.engine.held(), 1);
    crowd.engine.release();
    crowd.finish();
    assert_eq!(cookies(&mut crowd), [late]);
    assert!(!crowd.plane.holds_much());
}

/// Goal: nobody is forgotten, whoever's thread finds the next turn. Method: two connections to one
/// container and one to another ask for more than may be saved up, under limits of their own and
/// one of the store; all is answered in the end.
#[test]
fn everything_that_waits_goes_in_the_end() {
    let throttle = Arc::<Throttle>::default();
    throttle.set_store(4000, 0);
    let plane = Plane::new(EngineKind::Portable);
    let of = |name: &'static str, iops| {
        let (plane, throttle) = (plane.clone(), throttle.clone());
        std::thread::spawn(move || {
            let crowd = Crowd::over(plane, Sleepy::new(64 << 20), Style::Structured);
            let limits = Limits {
                iops,
                ..Limits::default()
            };
            let mut crowd = join(&throttle, crowd, name, &limits);
            for i in 0..600 {
                crowd.write(0, (i % 64) * 4096, &[1; 4096]);
            }
            crowd.finish();
            crowd.answers().len()
        })
    };
    let all = [of("a", 400), of("a", 400), of("b", 0)];
    let answered = all.map(|thread| thread.join().unwrap());
    assert_eq!(answered, [600; 3]);
    let known = throttle.all();
    assert!(known.iter().any(|k| k.totals.waited > 0));
    assert!(known.iter().all(|k| k.totals.waiting == 0));
}
