//! Engines that defer what waits for a disk: who is answered when, and that nothing is lost.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use ploop::store::ring::Ring;

use super::crowd::Crowd;
use super::rig::{SIZE, STYLES};
use crate::serve::deferred::{BYTES, REQUESTS};
use crate::serve::engine::{Sink, Turn};
use crate::serve::line::AT_POOL;
use crate::serve::plane::{EngineKind, Plane};
use crate::session::MAX_PAYLOAD;
use crate::sleepy::Sleepy;
use crate::testing::CLUSTER;
use crate::wire::errno as nbd;
use crate::wire::reply::Style;
use crate::wire::request::{flag, kind};

/// Engines that defer.
const DEFERRING: [EngineKind; 2] = [EngineKind::Portable, EngineKind::Uring];

#[test]
fn a_cached_read_behind_a_miss_is_answered_first() {
    for (kind, rings) in [
        (EngineKind::Portable, false),
        (EngineKind::Uring, false),
        (EngineKind::Uring, true),
    ] {
        for style in STYLES {
            let mut crowd = Crowd::new(kind, style);
            let data = crowd.fill(4, &[0]);
            crowd.device.mood.rings.store(rings, SeqCst);
            crowd.device.mood.hold();
            let cold = crowd.ask(kind::READ, 0, 4096, 8192);
            let warm = crowd.ask(kind::READ, 0, CLUSTER, 4096);
            crowd.run();
            if !rings {
                let answers = crowd.answers();
                assert_eq!(answers.len(), 1, "{kind} {style:?}");
                assert_eq!(answers[0].0, warm);
                assert_eq!(crowd.engine.outstanding(), 1);
                crowd.ask(kind::READ, 0, 2 * CLUSTER, 4096);
                crowd.run();
                assert_eq!(crowd.answers()[0].0, warm + 1, "and so is what comes later");
            }
            crowd.device.mood.release();
            crowd.finish();
            let answers = crowd.answers();
            let last = &answers[answers.len() - 1];
            assert_eq!(last.0, cold, "{kind} {style:?}");
            assert_eq!(last.1.data(), data[4096..12_288]);
            assert_eq!(crowd.device.mood.leases.load(SeqCst), 0);
            assert_eq!(crowd.plane.in_flight(), 0);
        }
    }
}

#[test]
fn a_flush_holds_up_nobody_and_comes_before_its_answer() {
    for kind in DEFERRING {
        for style in STYLES {
            let mut crowd = Crowd::new(kind, style);
            crowd.fill(4, &[]);
            let flushes = |crowd: &Crowd| crowd.device.inner.flushes.load(SeqCst);
            let before = flushes(&crowd);
            crowd.device.mood.hold();
            let plain = crowd.write(0, 0, &[1; 512]);
            let flush = crowd.ask(kind::FLUSH, 0, 0, 0);
            let fua = crowd.write(flag::FUA, 512, &[2; 512]);
            let read = crowd.ask(kind::READ, 0, 0, 1024);
            crowd.run();
            let answers = crowd.answers();
            let cookies: Vec<_> = answers.iter().map(|a| a.0).collect();
            assert_eq!(cookies, [plain, read], "{kind} {style:?}");
            assert_eq!(answers[1].1.data(), [[1; 512], [2; 512]].concat());
            assert_eq!(flushes(&crowd), before);
            crowd.device.mood.release();
            crowd.finish();
            let mut cookies: Vec<_> = crowd.answers().iter().map(|a| a.0).collect();
            cookies.sort_unstable();
            assert_eq!(cookies, [flush, fua]);
            assert_eq!(flushes(&crowd), before + 2);
        }
    }
}

#[test]
fn a_flush_that_fails_elsewhere_fails() {
    for kind in DEFERRING {
        let mut crowd = Crowd::new(kind, Style::Structured);
        crowd.fill(1, &[]);
        let failures = &crowd.device.inner.flush_failures;
        failures.lock().unwrap().extend([ploop::error::Kind::Io; 3]);
        let bad = [
            crowd.ask(kind::FLUSH, 0, 0, 0),
            crowd.write(flag::FUA, 0, &[1; 512]),
            crowd.ask(kind::TRIM, flag::FUA, 0, 512),
        ];
        let good = crowd.ask(kind::READ, 0, 0, 512);
        crowd.finish();
        let answers: HashMap<_, _> = crowd.answers().into_iter().collect();
        assert_eq!(answers.len(), 4);
        assert!(bad.iter().all(|c| answers[c].error == nbd::EIO));
        assert_eq!(answers[&good].error, 0);
    }
}

#[test]
fn the_lease_is_gone_before_the_answer_is_sent() {
    struct Looks(Arc<Sleepy>, usize);
    impl Sink for Looks {
        fn send(&mut self, _: &[u8]) -> io::Result<()> {
            assert_eq!(self.0.mood.leases.load(SeqCst), 0);
            self.1 += 1;
            Ok(())
        }
    }
    for kind in DEFERRING {
        for (rings, len) in [
            (false, 4096),
            (true, 4096),
            (false, 4 * CLUSTER),
            (true, 4 * CLUSTER),
        ] {
            let mut crowd = Crowd::new(kind, Style::Structured);
            crowd.fill(4, &[0, 2]);
            crowd.device.mood.rings.store(rings, SeqCst);
            crowd.ask(kind::READ, 0, 0, len);
            let mut looks = Looks(crowd.device.clone(), 0);
            crowd.engine.run(&crowd.input, &mut looks).unwrap();
            crowd.engine.finish(&mut looks).unwrap();
            assert!(looks.1 > 0);
        }
    }
}

#[test]
fn who_waits_for_its_client_holds_no_lease() {
    struct Full(Arc<Sleepy>, usize);
    impl Sink for Full {
        fn send(&mut self, _: &[u8]) -> io::Result<()> {
            assert_eq!(self.0.mood.leases.load(SeqCst), 0);
            self.1 += 1;
            Ok(())
        }
        fn send_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len() / 2)
        }
    }
    let mut crowd = Crowd::new(EngineKind::Uring, Style::Structured);
    crowd.fill(32, &(0..16).collect::<Vec<_>>());
    crowd.device.mood.rings.store(true, SeqCst);
    for i in 0..100 {
        crowd.ask(kind::READ, 0, i % 32 * CLUSTER, CLUSTER);
        crowd.ask(kind::READ, 0, i % 8 * 4 * CLUSTER, 6 * CLUSTER);
    }
    let mut full = Full(crowd.device.clone(), 0);
    while !crowd.input.is_empty() {
        let (used, _) = crowd.engine.run(&crowd.input, &mut full).unwrap();
        crowd.input.drain(..used);
        crowd.engine.finish(&mut full).unwrap();
    }
    assert!(full.1 > 0);
}

#[test]
fn no_more_waits_than_may_and_all_of_it_is_answered() {
    for kind in DEFERRING {
        let mut crowd = Crowd::new(kind, Style::Structured);
        let data = crowd.fill(160, &(0..160).collect::<Vec<_>>());
        crowd.device.mood.hold();
        for i in 0..1000 {
            crowd.ask(kind::READ, 0, i * 4096, 4096);
        }
        assert_eq!(crowd.run(), Turn::Full);
        assert_eq!(crowd.run(), Turn::Full);
        assert_eq!(crowd.engine.outstanding(), REQUESTS);
        crowd.device.mood.until_begun(AT_POOL);
        crowd.device.mood.release();
        crowd.finish();
        let answers: HashMap<_, _> = crowd.answers().into_iter().collect();
        assert_eq!(answers.len(), 1000);
        for (cookie, reply) in answers {
            let at = (cookie as usize - 2) * 4096;
            assert!(reply.data() == data[at..at + 4096], "{cookie}");
        }
        crowd.device.mood.hold();
        for _ in 0..12 {
            crowd.ask(kind::READ, flag::DF, 0, 10 << 20);
        }
        assert_eq!(crowd.run(), Turn::Full);
        assert!(crowd.plane.in_flight() >= BYTES);
        assert!(crowd.plane.in_flight() <= BYTES + u64::from(MAX_PAYLOAD));
        crowd.device.mood.release();
        crowd.finish();
        let answers = crowd.answers();
        assert_eq!(answers.len(), 12);
        assert!(answers.iter().all(|(_, r)| r.data() == data));
        assert_eq!(crowd.plane.in_flight(), 0);
    }
}

#[test]
fn what_all_connections_may_have_in_flight_is_bounded_and_the_rest_waits_in_place() {
    let plane = Plane::new(EngineKind::Portable);
    let mut crowd = Crowd::over(plane.clone(), Sleepy::new(SIZE), Style::Simple);
    let data = crowd.fill(2, &[0]);
    let mut others = 0;
    while plane.admit(1 << 20) {
        others += 1 << 20;
    }
    crowd.ask(kind::READ, 0, 0, CLUSTER);
    crowd.run();
    assert_eq!(crowd.engine.outstanding(), 0);
    assert_eq!(crowd.answers()[0].1.data(), data[..CLUSTER as usize]);
    plane.leave(others);
}

#[test]
fn a_connection_that_ends_takes_everything_along() {
    for kind in DEFERRING {
        let mut crowd = Crowd::new(kind, Style::Structured);
        crowd.fill(64, &(0..64).collect::<Vec<_>>());
        let mood = crowd.device.mood.clone();
        mood.hold();
        for i in 0..40 {
            crowd.ask(kind::READ, 0, i * 4096, 4096);
        }
        crowd.ask(kind::FLUSH, 0, 0, 0);
        crowd.run();
        mood.until_begun(AT_POOL);
        let Crowd {
            engine,
            device,
            plane,
            ..
        } = crowd;
        let ending = std::thread::spawn(move || drop(engine));
        // What has not begun goes at once; what has goes on until the disk lets it.
        while mood.leases.load(SeqCst) > AT_POOL {
            std::thread::yield_now();
        }
        mood.release();
        ending.join().unwrap();
        assert_eq!(mood.begun.load(SeqCst), AT_POOL, "the others never began");
        assert_eq!(mood.leases.load(SeqCst), 0);
        assert_eq!(plane.in_flight(), 0);
        assert_eq!(Arc::strong_count(&device), 1);
    }
}

#[test]
fn an_idle_engine_gives_its_ring_back_and_gets_another() {
    for kind in DEFERRING {
        let mut crowd = Crowd::new(kind, Style::Structured);
        let data = crowd.fill(2, &[0]);
        crowd.device.mood.rings.store(true, SeqCst);
        for _ in 0..3 {
            crowd.ask(kind::READ, 0, 0, 4096);
            crowd.finish();
            assert_eq!(crowd.answers()[0].1.data(), data[..4096]);
            assert!(crowd.engine.is_large());
            crowd.engine.shrink();
            assert!(!crowd.engine.is_large());
        }
    }
}

#[test]
fn without_a_ring_threads_do_its_work() {
    fn none(_: Arc<OwnedFd>) -> io::Result<Ring> {
        Err(io::Error::from_raw_os_error(1))
    }
    let plane = Plane::with_rings(EngineKind::Uring, none);
    let mut crowd = Crowd::over(plane, Sleepy::new(SIZE), Style::Structured);
    let data = crowd.fill(8, &[0, 2, 4]);
    crowd.device.mood.rings.store(true, SeqCst);
    for i in 0..8 {
        crowd.ask(kind::READ, 0, i * CLUSTER, CLUSTER);
    }
    crowd.finish();
    let answers = crowd.answers();
    assert_eq!(answers.len(), 8);
    for (cookie, reply) in answers {
        let at = (cookie - 2) * CLUSTER;
        assert!(reply.data() == data[at as usize..(at + CLUSTER) as usize]);
    }
    assert_eq!(crowd.device.mood.begun.load(SeqCst), 3);
}

#[test]
fn an_error_elsewhere_is_the_one_that_it_would_be_here() {
    let ask = |kind: EngineKind, style: Style, flags: u16| {
        let mut crowd = Crowd::new(kind, style);
        crowd.fill(16, &(0..16).collect::<Vec<_>>());
        let bad = 6 * CLUSTER..7 * CLUSTER;
        *crowd.device.mood.broken.lock().unwrap() = Some(bad);
        crowd.ask(kind::READ, flags, 512, 15 * CLUSTER);
        crowd.finish();
        let mut answers = crowd.answers();
        assert_eq!(answers.len(), 1);
        answers.remove(0).1
    };
    for style in STYLES {
        for flags in [0, flag::DF] {
            let flags = if style == Style::Simple { 0 } else { flags };
            let here = ask(EngineKind::Inline, style, flags);
            assert_eq!(here.error, nbd::EIO);
            for kind in DEFERRING {
                assert_eq!(ask(kind, style, flags), here, "{kind} {style:?} {flags}");
            }
        }
    }
}

#[test]
fn work_that_panics_ends_the_session_and_nothing_else() {
    for kind in DEFERRING {
        let mut crowd = Crowd::new(kind, Style::Simple);
        crowd.fill(1, &[]);
        crowd.device.mood.panics.store(true, SeqCst);
        crowd.ask(kind::FLUSH, 0, 0, 0);
        crowd.ask(kind::READ, 0, 0, 512);
        let ran = crowd.engine.run(&crowd.input, &mut crowd.out);
        let ended = ran.and_then(|_| crowd.engine.finish(&mut crowd.out));
        assert!(ended.unwrap_err().to_string().contains("panicked"));
        let Crowd {
            engine,
            device,
            plane,
            ..
        } = crowd;
        drop(engine);
        assert_eq!(Arc::strong_count(&device), 1);
        let mut next = Crowd::over(plane, device, Style::Simple);
        next.ask(kind::FLUSH, 0, 0, 0);
        next.ask(kind::READ, 0, 0, 512);
        next.finish();
        assert_eq!(next.answers().len(), 2);
    }
}
