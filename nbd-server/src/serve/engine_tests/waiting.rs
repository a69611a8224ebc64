//! Engines that defer what waits for a disk: who is answered when, and that nothing is lost.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use ploop::store::ring::Ring;
use proptest::prelude::*;

use super::rig::{Reply, SIZE, STYLES, decode_all, pattern};
use crate::serve::deferred::{AT_POOL, BYTES, REQUESTS};
use crate::serve::engine::{Engine, Sink, Turn};
use crate::serve::plane::{EngineKind, Plane};
use crate::session::MAX_PAYLOAD;
use crate::session::transmission::Rules;
use crate::sleepy::Sleepy;
use crate::testing::CLUSTER;
use crate::wire::errno as nbd;
use crate::wire::reply::Style;
use crate::wire::request::{Request, flag, kind};

/// Engines that defer.
const DEFERRING: [EngineKind; 2] = [EngineKind::Portable, EngineKind::Uring];

/// A client that does not wait for its answers.
struct Crowd {
    device: Arc<Sleepy>,
    plane: Arc<Plane>,
    engine: Engine,
    style: Style,
    input: Vec<u8>,
    out: Vec<u8>,
    cookie: u64,
    /// Cookies of READs, and their lengths.
    lengths: HashMap<u64, usize>,
}

impl Crowd {
    fn new(kind: EngineKind, style: Style) -> Crowd {
        Crowd::over(Plane::new(kind), Sleepy::new(SIZE), style)
    }

    fn over(plane: Arc<Plane>, device: Arc<Sleepy>, style: Style) -> Crowd {
        let rules = Rules::over(device.as_ref(), style);
        Crowd {
            engine: Engine::on(&plane, device.clone(), rules),
            device,
            plane,
            style,
            input: Vec::new(),
            out: Vec::new(),
            cookie: 0,
            lengths: HashMap::new(),
        }
    }

    /// Puts a request behind the others; its cookie.
    fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> u64 {
        self.cookie += 1;
        let extended_write = self.style == Style::Extended && kind == kind::WRITE;
        let extra = u16::from(extended_write) * flag::PAYLOAD_LEN;
        let request = Request {
            flags: flags | extra,
            kind,
            cookie: self.cookie,
            offset,
            length,
        };
        request.emit(self.style, &mut self.input);
        if kind == kind::READ {
            self.lengths.insert(self.cookie, length as usize);
        }
        self.cookie
    }

    fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let cookie = self.ask(kind::WRITE, flags, offset, data.len() as u64);
        self.input.extend_from_slice(data);
        cookie
    }

    /// Runs the engine once.
    fn run(&mut self) -> Turn {
        let (used, turn) = self.engine.run(&self.input, &mut self.out).unwrap();
        self.input.drain(..used);
        turn
    }

    /// Runs until everything is answered.
    fn finish(&mut self) {
        loop {
            let turn = self.run();
            self.engine.finish(&mut self.out).unwrap();
            if turn != Turn::Full {
                break;
            }
        }
        assert!(self.input.is_empty());
    }

    /// The whole answers that came, in the order of their ends; those of READs that are not whole
    /// stay.
    fn answers(&mut self) -> Vec<(u64, Reply)> {
        decode_all(&std::mem::take(&mut self.out), &self.lengths)
    }

    /// Fills the first clusters and makes some of them cold.
    fn fill(&mut self, clusters: u64, cold: &[u64]) -> Vec<u8> {
        let data = pattern((clusters * CLUSTER) as usize, 7);
        self.write(0, 0, &data);
        self.finish();
        self.out.clear();
        let ranges = cold.iter().map(|c| c * CLUSTER..(c + 1) * CLUSTER);
        *self.device.mood.cold.lock().unwrap() = ranges.collect();
        data
    }
}

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

/// One request of a random batch, in a slot of its own.
#[derive(Clone, Debug)]
enum Act {
    Write(u8, bool),
    Zero(bool),
    Trim,
    Read(bool),
    Flush,
    Cache,
}

/// Bytes of a slot: several pieces of a READ.
const SLOT: u64 = 10 * CLUSTER;
const SLOTS: usize = 12;

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (any::<u8>(), any::<bool>()).prop_map(|(s, f)| Act::Write(s, f)),
        1 => any::<bool>().prop_map(Act::Zero),
        1 => Just(Act::Trim),
        6 => any::<bool>().prop_map(Act::Read),
        2 => Just(Act::Flush),
        1 => Just(Act::Cache),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Against a flat array: each request of a batch is answered once, and reads give what was
    /// written in the batches before, whatever was cold and whoever did the work.
    #[test]
    fn random_batches(
        engine in 0..3usize,
        style in 0..3usize,
        rings in any::<bool>(),
        batches in prop::collection::vec(
            (
                prop::collection::vec((any_act(), 0..SLOT, 1..SLOT), SLOTS),
                prop::collection::vec((0..SLOTS as u64 * SLOT, 0..2 * SLOT), 0..4),
            ),
            1..6,
        ),
    ) {
        let mut crowd = Crowd::new(EngineKind::ALL[engine], STYLES[style]);
        crowd.device.mood.rings.store(rings, SeqCst);
        let mut model = vec![0u8; SLOTS * SLOT as usize];
        for (acts, cold) in batches {
            *crowd.device.mood.cold.lock().unwrap() =
                cold.into_iter().map(|(at, len)| at..at + len).collect();
            let mut expected = HashMap::new();
            for (slot, (act, skip, len)) in acts.into_iter().enumerate() {
                let at = slot as u64 * SLOT + skip;
                let len = len.min(SLOT - skip);
                let part = &mut model[at as usize..(at + len) as usize];
                let cookie = match act {
                    Act::Write(seed, fua) => {
                        part.copy_from_slice(&pattern(len as usize, seed));
                        let data = part.to_vec();
                        crowd.write(u16::from(fua) * flag::FUA, at, &data)
                    }
                    Act::Zero(fua) => {
                        part.fill(0);
                        crowd.ask(kind::WRITE_ZEROES, u16::from(fua) * flag::FUA, at, len)
                    }
                    Act::Trim => {
                        // This device gives whole clusters back.
                        let from = at.next_multiple_of(CLUSTER);
                        let to = ((at + len) / CLUSTER * CLUSTER).max(from);
                        model[from as usize..to as usize].fill(0);
                        crowd.ask(kind::TRIM, 0, at, len)
                    }
                    Act::Read(df) => {
                        let flags = u16::from(df && crowd.style != Style::Simple) * flag::DF;
                        let cookie = crowd.ask(kind::READ, flags, at, len);
                        expected.insert(cookie, model[at as usize..(at + len) as usize].to_vec());
                        continue;
                    }
                    Act::Flush => crowd.ask(kind::FLUSH, 0, 0, 0),
                    Act::Cache => crowd.ask(kind::CACHE, 0, at, len),
                };
                expected.insert(cookie, Vec::new());
            }
            crowd.finish();
            let answers = crowd.answers();
            prop_assert_eq!(answers.len(), expected.len());
            for (cookie, reply) in answers {
                let data = expected.remove(&cookie);
                prop_assert!(data.is_some(), "answered twice, or never asked: {}", cookie);
                prop_assert!(reply.data() == data.unwrap_or_default(), "{}", cookie);
            }
        }
        prop_assert_eq!(crowd.device.mood.leases.load(SeqCst), 0);
        prop_assert_eq!(crowd.plane.in_flight(), 0);
    }
}
