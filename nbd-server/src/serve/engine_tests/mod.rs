mod crowd;
mod limited;
mod model;
mod rig;
mod roomless;
mod waiting;

use std::sync::atomic::Ordering::SeqCst;

use ploop::error::Kind;

use super::*;
use crate::session::context::Context;
use crate::session::{MAX_DISCARD, MAX_EXTENTS, MAX_PAYLOAD};
use crate::testing::{CLUSTER, FileDevice};
use crate::wire::chunk;
use crate::wire::errno as nbd;
use crate::wire::reply::{Simple, Style};
use crate::wire::request::{flag, kind};
use rig::{Rig, SIZE, STYLES, decode, pattern};

#[test]
fn what_is_written_is_read_in_every_style() {
    for style in STYLES {
        let mut rig = Rig::new(style);
        let data = pattern(300_000, 5);
        assert_eq!(rig.write(0, 65_000, &data).error, 0);
        assert_eq!(rig.read(65_000, 300_000), data, "{style:?}");
        assert_eq!(rig.read(0, 512), [0; 512]);
        let around = rig.read(60_000, 400_000);
        assert_eq!(around[5000..305_000], data[..]);
        assert!(
            around[..5000]
                .iter()
                .chain(&around[305_000..])
                .all(|b| *b == 0)
        );
    }
}

#[test]
fn holes_are_chunks_unless_df_or_simple() {
    let mut rig = Rig::new(Style::Structured);
    rig.write(0, 4 * CLUSTER, &pattern(CLUSTER as usize, 1));
    let reply = rig.ask(kind::READ, 0, 0, 32 * CLUSTER);
    assert_eq!(
        (reply.holes, reply.content.len()),
        (2, 3),
        "holes are joined across pieces"
    );
    let reply = rig.ask(kind::READ, flag::DF, 0, 32 * CLUSTER);
    assert_eq!((reply.holes, reply.content.len()), (0, 1));
    assert_eq!(
        reply.data()[4 * CLUSTER as usize..5 * CLUSTER as usize],
        pattern(CLUSTER as usize, 1)
    );
    let reply = rig.ask(kind::READ, flag::DF, 8 * CLUSTER, CLUSTER);
    assert_eq!(
        (reply.holes, reply.content.len()),
        (1, 1),
        "a hole alone is one chunk"
    );
    let reply = rig.ask(kind::READ, 0, 0, 512);
    assert_eq!(
        (reply.holes, reply.data()),
        (0, vec![0; 512]),
        "a short hole is data"
    );
}

#[test]
fn a_long_read_is_sent_while_it_is_read() {
    struct Sends(Vec<usize>, usize);
    impl Sink for Sends {
        fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
            self.0.push(bytes.len());
            self.1 += bytes.len();
            Ok(())
        }
    }
    let mut rig = Rig::new(Style::Structured);
    rig.write(0, 0, &pattern(8 << 20, 3));
    let bytes = rig.bytes(kind::READ, 0, 0, 8 << 20, &[]);
    let mut sends = Sends(Vec::new(), 0);
    rig.engine.run(&bytes, &mut sends).unwrap();
    assert!(sends.1 > 8 << 20);
    assert!(sends.0.iter().all(|n| *n < 2 * SEND_AT), "{:?}", sends.0);
}

#[test]
fn many_requests_in_one_input_are_answered_in_one_piece_and_in_order() {
    for style in STYLES {
        let mut rig = Rig::new(style);
        let mut input = Vec::new();
        for i in 0..16u64 {
            input.extend(rig.bytes(kind::WRITE, 0, i * 4096, 4096, &pattern(4096, i as u8)));
        }
        for i in 0..16u64 {
            input.extend(rig.bytes(kind::READ, 0, i * 4096, 4096, &[]));
        }
        let mut out = Vec::new();
        let (used, _) = rig.engine.run(&input, &mut out).unwrap();
        assert_eq!(used, input.len());
        let mut at = 0;
        for cookie in 1..=32u64 {
            let length = if style == Style::Simple && cookie > 16 {
                4096
            } else {
                0
            };
            let (reply, len) = decode(&out[at..], cookie, length);
            if cookie > 16 {
                assert_eq!(reply.data(), pattern(4096, cookie as u8 - 17));
            }
            at += len;
        }
        assert_eq!(at, out.len());
    }
}

#[test]
fn flush_and_fua_reach_the_device_before_the_answer() {
    for style in STYLES {
        let mut rig = Rig::new(style);
        let flushes = |rig: &Rig| rig.device.flushes.load(SeqCst);
        rig.write(0, 0, &[1; 512]);
        assert_eq!(flushes(&rig), 0);
        rig.write(flag::FUA, 0, &[1; 512]);
        assert_eq!(flushes(&rig), 1);
        rig.ask(kind::WRITE_ZEROES, flag::FUA, 0, 512);
        rig.ask(kind::TRIM, flag::FUA, 0, 512);
        rig.ask(kind::FLUSH, 0, 0, 0);
        assert_eq!(flushes(&rig), 4);
        rig.ask(kind::READ, flag::FUA, 0, 512);
        assert_eq!(flushes(&rig), 4);
    }
}

#[test]
fn a_fua_write_whose_flush_fails_fails() {
    for style in STYLES {
        let mut rig = Rig::new(style);
        let fail = |rig: &Rig| {
            rig.device
                .flush_failures
                .lock()
                .unwrap()
                .push_back(Kind::Io)
        };
        fail(&rig);
        assert_eq!(rig.write(flag::FUA, 0, &[2; 512]).error, nbd::EIO);
        fail(&rig);
        assert_eq!(
            rig.ask(kind::WRITE_ZEROES, flag::FUA, 0, 512).error,
            nbd::EIO
        );
        fail(&rig);
        assert_eq!(rig.ask(kind::TRIM, flag::FUA, 0, 512).error, nbd::EIO);
        fail(&rig);
        assert_eq!(rig.write(0, 0, &[2; 512]).error, 0);
        assert_eq!(rig.ask(kind::FLUSH, 0, 0, 0).error, nbd::EIO);
    }
}

#[test]
fn device_errors_become_the_protocols_numbers() {
    for style in STYLES {
        let mut rig = Rig::new(style);
        for (kind_of, number) in [
            (Kind::NoSpace, nbd::ENOSPC),
            (Kind::Io, nbd::EIO),
            (Kind::Latched, nbd::EIO),
            (Kind::Unsupported, nbd::EINVAL),
        ] {
            rig.device.failures.lock().unwrap().extend([kind_of; 3]);
            let reply = rig.write(0, 0, &[1; 4096]);
            assert_eq!(reply.error, number);
            assert_eq!(reply.text.is_empty(), style == Style::Simple);
            assert_eq!(rig.ask(kind::TRIM, 0, 0, 4096).error, number);
            assert_eq!(rig.ask(kind::WRITE_ZEROES, 0, 0, 4096).error, number);
        }
        assert_eq!(rig.read(0, 512), [0; 512], "the session goes on");
    }
}

#[test]
fn zeroes_with_their_flags() {
    let mut rig = Rig::new(Style::Extended);
    rig.write(0, 0, &pattern(4 * CLUSTER as usize, 9));
    assert_eq!(
        rig.ask(kind::WRITE_ZEROES, flag::FAST_ZERO, 512, 512).error,
        nbd::ENOTSUP
    );
    assert_eq!(
        rig.read(512, 512),
        pattern(2048, 9)[512..1024],
        "a refusal changes nothing"
    );
    assert_eq!(
        rig.ask(kind::WRITE_ZEROES, flag::FAST_ZERO, 0, CLUSTER)
            .error,
        0
    );
    assert_eq!(
        rig.ask(kind::WRITE_ZEROES, flag::NO_HOLE, CLUSTER, CLUSTER)
            .error,
        0
    );
    assert_eq!(rig.read(0, 2 * CLUSTER), vec![0; 2 * CLUSTER as usize]);
    let extents = rig.ask(kind::BLOCK_STATUS, 0, 0, SIZE).extents;
    let lens: Vec<_> = extents.iter().map(|e| (e.len, e.flags)).collect();
    assert_eq!(
        lens,
        [(CLUSTER, 3), (3 * CLUSTER, 0), (SIZE - 4 * CLUSTER, 3)]
    );
    assert_eq!(
        rig.ask(kind::WRITE_ZEROES, 0, 0, SIZE).error,
        0,
        "the whole device at once"
    );
    assert_eq!(rig.read(3 * CLUSTER, 512), [0; 512]);
}

#[test]
fn trim_gives_space_back() {
    let mut rig = Rig::new(Style::Structured);
    rig.write(0, 0, &pattern(2 * CLUSTER as usize, 9));
    assert_eq!(rig.ask(kind::TRIM, 0, 0, SIZE).error, 0);
    let extents = rig.ask(kind::BLOCK_STATUS, 0, 0, SIZE).extents;
    assert_eq!(
        extents,
        [chunk::Extent {
            len: SIZE,
            flags: 3
        }]
    );
}

#[test]
fn one_extent_when_one_is_asked_for() {
    for style in [Style::Structured, Style::Extended] {
        let mut rig = Rig::new(style);
        rig.write(0, CLUSTER, &[1; 512]);
        let ask =
            |rig: &mut Rig, at, len| rig.ask(kind::BLOCK_STATUS, flag::REQ_ONE, at, len).extents;
        assert_eq!(
            ask(&mut rig, 0, SIZE),
            [chunk::Extent {
                len: CLUSTER,
                flags: 3
            }]
        );
        assert_eq!(
            ask(&mut rig, 512, 100),
            [chunk::Extent { len: 100, flags: 3 }]
        );
        assert_eq!(
            ask(&mut rig, CLUSTER, SIZE - CLUSTER),
            [chunk::Extent {
                len: CLUSTER,
                flags: 0
            }]
        );
    }
}

#[test]
fn status_is_bounded() {
    for style in [Style::Structured, Style::Extended] {
        let mut rig = Rig::over(FileDevice::temporary(3 << 30), style);
        rig.device.make_checkered();
        let reply = rig.ask(kind::BLOCK_STATUS, 0, 0, 3 << 30);
        assert_eq!(reply.extents.len(), MAX_EXTENTS);
        assert!(reply.extents.iter().all(|e| e.len == CLUSTER));
    }
}

#[test]
fn a_read_error_half_way_keeps_what_was_read_and_names_the_byte() {
    let mut rig = Rig::new(Style::Structured);
    let data = pattern(8 * CLUSTER as usize, 2);
    rig.write(0, 0, &data);
    let bad = 6 * CLUSTER + 1024;
    *rig.device.damaged.lock().unwrap() = bad..bad + 512;
    let reply = rig.ask(kind::READ, 0, 512, 8 * CLUSTER - 512);
    assert_eq!((reply.error, reply.error_at), (nbd::EIO, Some(bad)));
    assert!(reply.text.contains("damaged"), "{}", reply.text);
    let got: Vec<u8> = reply.content.iter().flat_map(|c| c.1.clone()).collect();
    assert_eq!(got, data[512..bad as usize]);
    for (style, flags) in [(Style::Structured, flag::DF), (Style::Simple, 0)] {
        let mut rig = Rig::over(rig.device.clone(), style);
        let reply = rig.ask(kind::READ, flags, 512, 8 * CLUSTER - 512);
        assert_eq!((reply.error, reply.content.len()), (nbd::EIO, 0));
        assert_eq!(rig.read(0, 512), data[..512], "the session goes on");
    }
    let mut rig = Rig::over(rig.device.clone(), Style::Structured);
    let reply = rig.ask(kind::READ, 0, bad, 512);
    assert_eq!((reply.error_at, reply.content.len()), (Some(bad), 0));
}

#[test]
fn a_device_that_maps_too_little_leaks_nothing() {
    for style in STYLES {
        let mut rig = Rig::new(style);
        rig.write(0, 0, &pattern(4 * CLUSTER as usize, 1));
        rig.read(0, 4 * CLUSTER);
        rig.device.forgetful.store(true, SeqCst);
        let reply = rig.ask(kind::READ, 0, 8 * CLUSTER, 3 * CLUSTER);
        assert_eq!((reply.error, reply.content.len()), (nbd::EIO, 0));
        let reply = rig.write(0, 0, &[1; 512]);
        assert_eq!(reply.error, nbd::EIO, "an unwritten part is no success");
        if style != Style::Simple {
            assert_eq!(rig.ask(kind::BLOCK_STATUS, 0, 0, 512).error, nbd::EIO);
        }
    }
}

#[test]
fn a_refused_write_is_thrown_away_as_it_comes() {
    let mut rig = Rig::new(Style::Structured);
    let length = u64::from(MAX_PAYLOAD) + 5;
    let header = rig.bytes(kind::WRITE, 0, 0, length, &[]);
    let cookie = rig.cookie;
    let mut out = Vec::new();
    rig.engine.run(&header, &mut out).unwrap();
    let (mut left, piece) = (length as usize, vec![0xee; 1 << 20]);
    while left > 0 {
        assert!(out.is_empty(), "the answer comes after the payload");
        let n = left.min(piece.len());
        let (used, _) = rig.engine.run(&piece[..n], &mut out).unwrap();
        assert_eq!(used, n);
        left -= n;
    }
    assert_eq!(decode(&out, cookie, 0).0.error, nbd::EINVAL);
    assert_eq!(rig.read(0, 512), [0; 512]);
    assert_eq!(rig.write(0, SIZE - 512, &[1; 1024]).error, nbd::ENOSPC);
    assert_eq!(
        rig.read(SIZE - 512, 512),
        [0; 512],
        "no part of it was written"
    );
    let header = rig.bytes(kind::WRITE, 0, 0, MAX_DISCARD + 1, &[]);
    let (_, turn) = rig.engine.run(&header, &mut Vec::new()).unwrap();
    assert!(matches!(turn, Turn::Violated(_)));
}

#[test]
fn the_largest_request_of_both_kinds() {
    for style in STYLES {
        let mut rig = Rig::new(style);
        let data = pattern(MAX_PAYLOAD as usize, 7);
        assert_eq!(rig.write(0, 512, &data).error, 0);
        assert!(rig.read(512, u64::from(MAX_PAYLOAD)) == data);
        assert!(rig.engine.is_large());
        rig.engine.shrink();
        assert!(!rig.engine.is_large());
    }
}

#[test]
fn cache_reads_and_changes_nothing() {
    let mut rig = Rig::new(Style::Extended);
    rig.write(0, 0, &pattern(CLUSTER as usize, 4));
    assert_eq!(rig.ask(kind::CACHE, 0, 0, SIZE).error, 0);
    assert_eq!(rig.read(0, CLUSTER), pattern(CLUSTER as usize, 4));
    *rig.device.damaged.lock().unwrap() = 0..512;
    assert_eq!(rig.ask(kind::CACHE, 0, 0, SIZE).error, nbd::EIO);
}

#[test]
fn empty_requests_succeed() {
    for style in STYLES {
        let mut rig = Rig::new(style);
        for command in [kind::READ, kind::TRIM, kind::WRITE_ZEROES, kind::CACHE] {
            let reply = rig.ask(command, 0, 4096, 0);
            assert_eq!(
                (reply.error, reply.content.len()),
                (0, 0),
                "{style:?} {command}"
            );
        }
        assert_eq!(rig.write(0, 4096, &[]).error, 0);
    }
}

#[test]
fn disconnect_ends_it_after_the_answers() {
    let mut rig = Rig::new(Style::Simple);
    let mut input = rig.bytes(kind::WRITE, 0, 0, 512, &[1; 512]);
    input.extend(rig.bytes(kind::DISC, 0, 0, 0, &[]));
    let mut out = Vec::new();
    let (_, turn) = rig.engine.run(&input, &mut out).unwrap();
    assert_eq!((turn, out.len()), (Turn::Disconnected, Simple::LEN));
}

#[test]
fn two_engines_on_one_device_see_each_others_writes() {
    let mut a = Rig::new(Style::Structured);
    let mut b = Rig::over(a.device.clone(), Style::Simple);
    a.write(0, 0, &pattern(4096, 1));
    assert_eq!(b.read(0, 4096), pattern(4096, 1));
    b.ask(kind::WRITE_ZEROES, 0, 0, 4096);
    assert_eq!(a.read(0, 4096), [0; 4096]);
}

#[test]
fn a_read_only_device_stays_as_it_is() {
    let mut rig = Rig::over(FileDevice::read_only(SIZE), Style::Structured);
    assert_eq!(rig.write(0, 0, &[1; 512]).error, nbd::EPERM);
    assert_eq!(rig.ask(kind::TRIM, 0, 0, 512).error, nbd::EPERM);
    assert_eq!(rig.ask(kind::WRITE_ZEROES, 0, 0, 512).error, nbd::EPERM);
    assert_eq!(rig.ask(kind::FLUSH, 0, 0, 0).error, 0);
    assert_eq!(rig.read(0, 512), [0; 512]);
}

#[test]
fn a_status_without_a_context_is_invalid() {
    let mut rig = Rig::new(Style::Structured);
    let mut rules = Rules::over(rig.device.as_ref(), Style::Structured);
    assert_eq!(rules.contexts, [Context::Allocation]);
    rules.contexts.clear();
    rig.engine = Engine::new(rig.device.clone(), rules);
    assert_eq!(rig.ask(kind::BLOCK_STATUS, 0, 0, 512).error, nbd::EINVAL);
}
