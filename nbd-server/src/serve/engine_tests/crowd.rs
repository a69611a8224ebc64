//! A client that does not wait for its answers, and random batches of its requests.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;

use super::rig::{Reply, SIZE, STYLES, decode_all, pattern};
use crate::serve::engine::{Engine, Turn};
use crate::serve::plane::{EngineKind, Plane};
use crate::session::transmission::Rules;
use crate::sleepy::Sleepy;
use crate::testing::CLUSTER;
use crate::wire::reply::Style;
use crate::wire::request::{Request, flag, kind};

/// See the module text.
pub(super) struct Crowd {
    pub(super) device: Arc<Sleepy>,
    pub(super) plane: Arc<Plane>,
    pub(super) engine: Engine,
    pub(super) style: Style,
    pub(super) input: Vec<u8>,
    pub(super) out: Vec<u8>,
    cookie: u64,
    /// Cookies of READs, and their lengths.
    lengths: HashMap<u64, usize>,
}

impl Crowd {
    pub(super) fn new(kind: EngineKind, style: Style) -> Crowd {
        Crowd::over(Plane::new(kind), Sleepy::new(SIZE), style)
    }

    pub(super) fn over(plane: Arc<Plane>, device: Arc<Sleepy>, style: Style) -> Crowd {
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
    pub(super) fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> u64 {
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

    pub(super) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let cookie = self.ask(kind::WRITE, flags, offset, data.len() as u64);
        self.input.extend_from_slice(data);
        cookie
    }

    /// Runs the engine once.
    pub(super) fn run(&mut self) -> Turn {
        let (used, turn) = self.engine.run(&self.input, &mut self.out).unwrap();
        self.input.drain(..used);
        turn
    }

    /// Runs until everything is answered.
    pub(super) fn finish(&mut self) {
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
    pub(super) fn answers(&mut self) -> Vec<(u64, Reply)> {
        decode_all(&std::mem::take(&mut self.out), &self.lengths)
    }

    /// Fills the first clusters and makes some of them cold.
    pub(super) fn fill(&mut self, clusters: u64, cold: &[u64]) -> Vec<u8> {
        let data = pattern((clusters * CLUSTER) as usize, 7);
        self.write(0, 0, &data);
        self.finish();
        self.out.clear();
        let ranges = cold.iter().map(|c| c * CLUSTER..(c + 1) * CLUSTER);
        *self.device.mood.cold.lock().unwrap() = ranges.collect();
        data
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
