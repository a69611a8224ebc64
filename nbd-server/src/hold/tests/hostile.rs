//! Servers and clients that break the protocol: told so, never believed, never a panic.

use bytes::BytesMut;

use super::server::{Rng, terms};
use crate::hold::volume::{SeatId, Volume};
use crate::wire::chunk::{self, kind as chunk_kind};
use crate::wire::reply::{Chunk, DONE, Simple, Style};
use crate::wire::request::{Request, flag, kind};
use crate::wire::{Put, errno};

const SHARE: usize = 1 << 20;

/// A volume with a client that asks one thing, which is with the server; its cookie there.
fn asked(style: Style, kind: u16, offset: u64, length: u64) -> (Volume, SeatId, u64) {
    let mut volume = Volume::new(SHARE);
    let seat = volume.sit(terms(style));
    volume.up(seat, None, vec![(7, 1)]).unwrap();
    let request = Request {
        flags: 0,
        kind,
        cookie: 99,
        offset,
        length,
    };
    let mut bytes = Vec::new();
    request.emit(style, &mut bytes);
    volume.take_requests(seat, &mut bytes[..].into()).unwrap();
    let sent = volume.seats.get_mut(&seat).unwrap().to_server.take();
    let cookie = Request::parse(&sent, style).unwrap().cookie;
    (volume, seat, cookie)
}

fn chunk(style: Style, cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let length = payload.len() as u32;
    Chunk {
        flags,
        kind,
        cookie,
        offset: 0,
        length,
    }
    .emit(style, &mut out);
    out.put(payload);
    out
}

fn data(offset: u64, len: usize) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &vec![5; len]].concat()
}

fn status(id: u32) -> Vec<u8> {
    let mut out = Vec::new();
    chunk::put_status_head(Style::Structured, id, 1, &mut out);
    let extent = chunk::Extent { len: 8, flags: 0 };
    chunk::put_extent(Style::Structured, extent, &mut out);
    out
}

#[test]
fn answers_that_are_none_end_the_session_by_name() {
    const S: Style = Style::Structured;
    let simple = |error, cookie| Simple { error, cookie }.bytes().to_vec();
    type Bad = (Style, u16, &'static str, Box<dyn Fn(u64) -> Vec<u8>>);
    let bad: Vec<Bad> = vec![
        (
            S,
            kind::FLUSH,
            "nothing that was asked",
            Box::new(move |c| simple(0, c + 1)),
        ),
        (
            S,
            kind::READ,
            "chunks were agreed on",
            Box::new(move |c| simple(0, c)),
        ),
        (
            Style::Extended,
            kind::FLUSH,
            "chunks were agreed on",
            Box::new(move |c| simple(0, c)),
        ),
        (
            Style::Simple,
            kind::READ,
            "not agreed on",
            Box::new(|c| chunk(S, c, DONE, 0, &[])),
        ),
        (S, kind::READ, "not a reply", Box::new(|_| vec![0; 32])),
        (
            S,
            kind::READ,
            "in part",
            Box::new(|c| chunk(S, c, DONE, 0, &[])),
        ),
        (
            S,
            kind::READ,
            "in part",
            Box::new(|c| chunk(S, c, DONE, 1, &data(8, 7))),
        ),
        (
            S,
            kind::READ,
            "not asked for",
            Box::new(|c| chunk(S, c, 0, 1, &data(7, 4))),
        ),
        (
            S,
            kind::READ,
            "not asked for",
            Box::new(|c| chunk(S, c, 0, 1, &data(13, 4))),
        ),
        (
            S,
            kind::READ,
            "not asked for",
            Box::new(|c| chunk(S, c, 0, 1, &data(u64::MAX, 4))),
        ),
        (
            S,
            kind::READ,
            "longer than",
            Box::new(|c| chunk(S, c, 0, 1, &data(8, 9))),
        ),
        (
            S,
            kind::READ,
            "kind does not allow",
            Box::new(|c| chunk(S, c, 0, 1, &[0; 8])),
        ),
        (
            S,
            kind::READ,
            "twice",
            Box::new(|c| {
                [
                    chunk(S, c, 0, 1, &data(8, 4)),
                    chunk(S, c, 0, 2, &chunk::hole(11, 2)),
                ]
                .concat()
            }),
        ),
        (
            S,
            kind::READ,
            "not asked for",
            Box::new(|c| chunk(S, c, 0, 2, &chunk::hole(8, 0))),
        ),
        (
            S,
            kind::READ,
            "ends nothing",
            Box::new(|c| chunk(S, c, 0, 0, &[])),
        ),
        (
            S,
            kind::READ,
            "what was asked",
            Box::new(|c| chunk(S, c, 0, 5, &status(7))),
        ),
        (
            S,
            kind::WRITE_ZEROES,
            "what was asked",
            Box::new(|c| chunk(S, c, 0, 1, &data(8, 8))),
        ),
        (
            S,
            kind::BLOCK_STATUS,
            "a context",
            Box::new(|c| chunk(S, c, DONE, 5, &status(1))),
        ),
        (
            S,
            kind::READ,
            "kind does not allow",
            Box::new(|c| chunk(S, c, DONE, chunk_kind::ERROR, &[0, 0, 0, 5, 0, 9, b'x'])),
        ),
        (
            S,
            kind::READ,
            "without a number",
            Box::new(|c| chunk(S, c, DONE, chunk_kind::ERROR, &[0; 6])),
        ),
    ];
    for (n, (style, kind, says, bytes)) in bad.into_iter().enumerate() {
        let (mut volume, seat, cookie) = asked(style, kind, 8, 8);
        let bytes = bytes(cookie);
        let why = volume
            .take_answers(seat, &mut bytes[..].into())
            .unwrap_err();
        assert!(why.contains(says), "{n}: {why}");
        let told = volume.seats.get_mut(&seat).unwrap().to_client.take();
        assert!(told.is_empty(), "{n}: the client saw some of it");
    }
}

#[test]
fn an_announced_length_costs_nothing_before_it_comes() {
    let style = Style::Extended;
    let (mut volume, seat, cookie) = asked(style, kind::READ, 0, 8);
    let mut head = chunk(style, cookie, 0, chunk_kind::OFFSET_DATA, &[]);
    head[24..32].copy_from_slice(&(1u64 << 31).to_be_bytes());
    assert!(volume.take_answers(seat, &mut head[..].into()).is_err());
    let mut write = Vec::new();
    Request {
        flags: flag::PAYLOAD_LEN,
        kind: kind::WRITE,
        cookie: 1,
        offset: 0,
        length: 1 << 40,
    }
    .emit(style, &mut write);
    let why = volume
        .take_requests(seat, &mut write[..].into())
        .unwrap_err();
    assert!(why.contains("a write of"), "{why}");
}

#[test]
fn a_server_that_shuts_down_has_not_answered() {
    let style = Style::Simple;
    let (mut volume, seat, cookie) = asked(style, kind::READ, 0, 8);
    let error = errno::ESHUTDOWN;
    let reply = Simple { error, cookie }.bytes();
    volume.take_answers(seat, &mut reply[..].into()).unwrap();
    assert!(volume.wants_close(seat));
    volume.down(seat);
    volume.up(seat, None, Vec::new()).unwrap();
    let seat = volume.seats.get_mut(&seat).unwrap();
    assert!(seat.to_client.take().is_empty(), "the client is not told");
    let sent = Request::parse(&seat.to_server.take(), style).unwrap();
    assert_eq!((sent.kind, sent.length), (kind::READ, 8), "asked again");
}

#[test]
fn another_disk_of_the_same_name_is_refused() {
    let mut volume = Volume::new(SHARE);
    let seat = volume.sit(terms(Style::Simple));
    volume.up(seat, Some("one/1".into()), Vec::new()).unwrap();
    volume.down(seat);
    let why = volume
        .up(seat, Some("two/1".into()), Vec::new())
        .unwrap_err();
    assert!(why.contains("another disk"), "{why}");
}

#[test]
fn no_bytes_are_a_panic() {
    let kinds = [
        kind::READ,
        kind::WRITE_ZEROES,
        kind::FLUSH,
        kind::BLOCK_STATUS,
    ];
    for seed in 0..20_000 {
        let mut rng = Rng(seed);
        let style = [Style::Simple, Style::Structured, Style::Extended][rng.below(3) as usize];
        let (mut volume, seat, cookie) = asked(style, kinds[rng.below(4) as usize], 8, 8);
        // Half-way right, so that more than the first number is looked at.
        let mut bytes = match rng.below(3) {
            0 => Simple { error: 0, cookie }.bytes().to_vec(),
            _ => {
                let kinds = [0, 1, 2, 5, 6, chunk_kind::ERROR, chunk_kind::ERROR_OFFSET];
                let payload: Vec<u8> = (0..rng.below(40)).map(|_| rng.below(9) as u8).collect();
                let flags = rng.below(2) as u16;
                chunk(style, cookie, flags, kinds[rng.below(7) as usize], &payload)
            }
        };
        for _ in 0..rng.below(4) {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] = rng.below(256) as u8;
        }
        drop(volume.take_answers(seat, &mut bytes[..].into()));
        let mut request = Vec::new();
        let bits = rng.below(40);
        Request {
            flags: rng.below(64) as u16,
            kind: rng.below(9) as u16,
            cookie: rng.below(3),
            offset: rng.below(u64::MAX),
            length: rng.below(1 << bits),
        }
        .emit(style, &mut request);
        request.extend(vec![0; rng.below(64) as usize]);
        let mut input: BytesMut = request[..].into();
        drop(volume.take_requests(seat, &mut input));
        volume.leave(seat);
        assert_eq!(
            volume.charged(),
            volume.kept.cost(),
            "{seed}: charged for nothing"
        );
    }
}
