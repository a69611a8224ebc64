//! Random sessions against a flat array, and random bytes.

use proptest::prelude::*;

use super::rig::{Rig, SIZE, STYLES, pattern};
use crate::serve::engine::Turn;
use crate::testing::CLUSTER;
use crate::wire::reply::Style;
use crate::wire::request::{Request, kind};

/// One step of a random session, on a small part of the device.
#[derive(Clone, Debug)]
enum Act {
    Write(u64, usize, u8),
    Zero(u64, u64, u16),
    Trim(u64, u64),
    Read(u64, u64, u16),
}

const AREA: u64 = 6 * CLUSTER;

fn any_act() -> impl Strategy<Value = Act> {
    let at = 0..AREA;
    prop_oneof![
        (at.clone(), 1..100_000usize, any::<u8>()).prop_map(|(a, n, s)| Act::Write(a, n, s)),
        (at.clone(), 1..2 * CLUSTER, 0..2u16).prop_map(|(a, n, f)| Act::Zero(a, n, f << 1)),
        (at.clone(), 1..2 * CLUSTER).prop_map(|(a, n)| Act::Trim(a, n)),
        (at, 1..AREA, 0..2u16).prop_map(|(a, n, f)| Act::Read(a, n, f << 2)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Against a flat array: the bytes are those written last, in every style.
    #[test]
    fn random_sessions(style in 0..3usize, acts in prop::collection::vec(any_act(), 1..25)) {
        let style = STYLES[style];
        let mut rig = Rig::new(style);
        let mut model = vec![0u8; 2 * AREA as usize];
        for act in acts {
            match act {
                Act::Write(at, n, seed) => {
                    let data = pattern(n, seed);
                    prop_assert_eq!(rig.write(0, at, &data).error, 0);
                    model[at as usize..at as usize + n].copy_from_slice(&data);
                }
                Act::Zero(at, n, flags) => {
                    prop_assert_eq!(rig.ask(kind::WRITE_ZEROES, flags, at, n).error, 0);
                    model[at as usize..(at + n) as usize].fill(0);
                }
                Act::Trim(at, n) => {
                    prop_assert_eq!(rig.ask(kind::TRIM, 0, at, n).error, 0);
                    // The protocol leaves the content open; this device gives whole clusters back.
                    let from = at.next_multiple_of(CLUSTER);
                    let to = ((at + n) / CLUSTER * CLUSTER).max(from);
                    model[from as usize..to as usize].fill(0);
                }
                Act::Read(at, n, flags) => {
                    let flags = if style == Style::Simple { 0 } else { flags };
                    let got = rig.ask(kind::READ, flags, at, n).data();
                    prop_assert!(got == model[at as usize..(at + n) as usize]);
                }
            }
        }
    }

    /// Whatever the bytes and however they arrive: no panic, and the answers are the same.
    #[test]
    fn any_bytes(
        style in 0..3usize,
        requests in prop::collection::vec(
            (0..9u16, 0..64u16, 0..SIZE + 4096, 0..20_000u64, 0..3000usize), 0..8),
        noise in prop::collection::vec(any::<u8>(), 0..100),
        step in 1..5000usize,
    ) {
        let style = STYLES[style];
        let mut script = Vec::new();
        for (kind, flags, offset, length, payload) in requests {
            Request { flags, kind, cookie: 3, offset, length }.emit(style, &mut script);
            script.resize(script.len() + payload, 0);
        }
        script.extend(noise);
        let run = |step: usize| {
            let mut rig = Rig::new(style);
            let (mut out, mut input, mut last) = (Vec::new(), Vec::new(), Turn::NeedMore(1));
            for part in script.chunks(step) {
                input.extend_from_slice(part);
                let (used, turn) = rig.engine.run(&input, &mut out).unwrap();
                input.drain(..used);
                last = turn;
                if !matches!(turn, Turn::NeedMore(_)) {
                    break;
                }
            }
            (out, std::mem::discriminant(&last))
        };
        let (whole, parts) = (run(usize::MAX), run(step));
        prop_assert!(whole == parts);
    }
}
