//! Engines on a host that is full: what waits for room, what does not, and what is left of it.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use ploop::store::FileId;
use ploop::store::memory::MemoryStore;

use super::crowd::Crowd;
use super::rig::STYLES;
use crate::export::limits::Throttle;
use crate::export::space::{Host, OnFull, Options, Space};
use crate::serve::engine::{Engine, Turn};
use crate::serve::plane::EngineKind;
use crate::serve::throttled::REQUESTS;
use crate::session::transmission::Rules;
use crate::testing::CLUSTER;
use crate::wire::errno;
use crate::wire::reply::Style;
use crate::wire::request::{flag, kind};

/// A connection whose writes do `on_full` when the device says that the host is.
fn on(kind: EngineKind, style: Style, on_full: OnFull) -> (Crowd, Arc<Space>) {
    let host = Host {
        dir: "/".into(),
        store: Arc::new(MemoryStore::new()),
        reserve: None,
    };
    let options = Options {
        on_full: Some(on_full),
        ..Options::default()
    };
    let space = Space::of(host, &options).unwrap();
    let mut crowd = Crowd::new(kind, style);
    let throttle = Arc::<Throttle>::default();
    let gate = throttle.gate("ct", FileId { dev: 1, ino: 1 }, || None);
    let rules = Rules::over(crowd.device.as_ref(), style);
    let engine = Engine::on(&crowd.plane, crowd.device.clone(), rules);
    crowd.engine = engine.behind(gate, &crowd.plane).waiting_for(space.clone());
    crowd.device.mood.full.store(true, SeqCst);
    (crowd, space)
}

/// Runs until nothing is under way but what waits for room.
fn settle(crowd: &mut Crowd) {
    while crowd.engine.outstanding() > crowd.engine.held() {
        crowd.engine.wait(None).unwrap();
        crowd.engine.reap(&mut crowd.out).unwrap();
    }
}

fn errors(crowd: &mut Crowd) -> Vec<(u64, u32)> {
    let mut answers = crowd.answers();
    answers.sort_by_key(|(cookie, _)| *cookie);
    answers
        .into_iter()
        .map(|(c, reply)| (c, reply.error))
        .collect()
}

#[test]
fn what_needs_room_waits_for_it_and_all_else_goes_ahead() {
    for kind in EngineKind::ALL {
        for style in STYLES {
            let (mut crowd, space) = on(kind, style, OnFull::Pause);
            let write = crowd.write(flag::FUA, 0, &[1; 4096]);
            // On this thread, and on another.
            let short = crowd.ask(kind::WRITE_ZEROES, flag::NO_HOLE, CLUSTER, 4096);
            let long = crowd.ask(kind::WRITE_ZEROES, flag::NO_HOLE, CLUSTER, 40 << 20);
            let flush = crowd.ask(kind::FLUSH, 0, 0, 0);
            let read = crowd.ask(kind::READ, 0, 0, 4096);
            crowd.run();
            settle(&mut crowd);
            assert_eq!(crowd.engine.held(), 3, "{kind} {style:?}");
            assert_eq!(errors(&mut crowd), [(flush, 0), (read, 0)]);
            assert_eq!(crowd.device.mood.leases.load(SeqCst), 0);
            assert_eq!(space.status().waiting, (3, 3));
            // Tried again, and in vain.
            space.begin().unwrap();
            crowd.engine.wait(None).unwrap();
            crowd.engine.reap(&mut crowd.out).unwrap();
            crowd.device.mood.full.store(false, SeqCst);
            crowd.finish();
            assert_eq!(errors(&mut crowd), [(write, 0), (short, 0), (long, 0)]);
            let status = space.status();
            assert_eq!((status.waiting.0, status.refused), (0, 0));
            crowd.ask(kind::READ, 0, 0, 4096);
            crowd.run();
            crowd.finish();
            assert_eq!(crowd.answers()[0].1.data(), [1; 4096]);
        }
    }
}

#[test]
fn where_nobody_waits_it_is_no_space() {
    for kind in EngineKind::ALL {
        let (mut crowd, space) = on(kind, Style::Structured, OnFull::Error);
        let write = crowd.write(0, 0, &[1; 4096]);
        let zero = crowd.ask(kind::WRITE_ZEROES, flag::NO_HOLE, CLUSTER, 40 << 20);
        crowd.finish();
        assert_eq!(
            errors(&mut crowd),
            [(write, errno::ENOSPC), (zero, errno::ENOSPC)]
        );
        assert_eq!(space.status().refused, 2);
    }
}

#[test]
fn as_many_wait_as_may_be_held_and_none_after_the_end() {
    for kind in EngineKind::ALL {
        let (mut crowd, space) = on(kind, Style::Structured, OnFull::Pause);
        for i in 0..REQUESTS as u64 + 10 {
            crowd.write(0, i * 512, &[1; 512]);
        }
        assert_eq!(crowd.run(), Turn::Full);
        assert_eq!(crowd.engine.held(), REQUESTS, "{kind}");
        // The service stops: who comes again asks again, so nobody is told of a failure.
        crowd.engine.release();
        let flush = crowd.ask(kind::FLUSH, 0, 0, 0);
        crowd.finish();
        assert_eq!(errors(&mut crowd), [(flush, 0)]);
        assert_eq!(crowd.engine.outstanding(), 0);
        assert_eq!((space.status().waiting.0, space.status().refused), (0, 0));
        // The client goes.
        let (mut crowd, space) = on(kind, Style::Structured, OnFull::Pause);
        crowd.write(0, 0, &[1; 512]);
        crowd.ask(kind::WRITE_ZEROES, flag::NO_HOLE, CLUSTER, 40 << 20);
        crowd.run();
        crowd.engine.forget();
        crowd.engine.finish(&mut crowd.out).unwrap();
        assert_eq!(crowd.engine.outstanding(), 0);
        assert_eq!(space.status().waiting.0, 0);
        assert!(!crowd.plane.holds_much());
    }
}
