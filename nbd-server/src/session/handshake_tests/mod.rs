mod contexts;
mod fuzz;

use std::sync::Arc;

use ploop::error::{Error, Kind, Result};

use super::*;
use crate::export::{ExportInfo, Single};
use crate::testing::FileDevice;
use crate::wire::greeting::{ExportReply, transmission_flag};
use crate::wire::option::{self, InfoRequest, MetaRequest, info};
use crate::wire::option_reply::kind as rep;

const SIZE: u64 = 1 << 20;

fn single() -> Single {
    Single::new(FileDevice::temporary(SIZE), "disk", "a disk of the test").unwrap()
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    InfoRequest::emit(name, wanted, &mut data);
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    MetaRequest::emit(name, queries, &mut data);
    data
}

/// What became of a whole script.
struct Ran {
    /// Answers after the greeting.
    out: Vec<u8>,
    end: Option<Step>,
    unused: usize,
}

impl Ran {
    /// (option, kind, data) of every answer.
    fn answers(&self) -> Vec<(u32, u32, Vec<u8>)> {
        let (mut at, mut all) = (0, Vec::new());
        while at < self.out.len() {
            let (header, data, len) = answer::parse(&self.out[at..]).unwrap();
            all.push((header.option, header.kind, data.to_vec()));
            at += len;
        }
        all
    }

    fn kinds(&self) -> Vec<u32> {
        self.answers().iter().map(|a| a.1).collect()
    }

    fn negotiated(self) -> Negotiated {
        match self.end {
            Some(Step::Negotiated(n)) => *n,
            other => panic!("{other:?}"),
        }
    }
}

/// Runs a handshake on `script` in pieces of `step` bytes.
fn run_in_steps(exports: &dyn Exports, script: &[u8], step: usize) -> Ran {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(&mut out);
    assert_eq!(Greeting::parse(&out).unwrap().flags, 3);
    out.clear();
    let (mut input, mut sent) = (Vec::new(), 0);
    loop {
        let (used, what) = handshake.advance(&input, &mut out, exports);
        input.drain(..used);
        match what {
            Step::Again => {}
            Step::NeedMore if sent == script.len() => {
                return Ran {
                    out,
                    end: None,
                    unused: input.len(),
                };
            }
            Step::NeedMore => {
                let to = script.len().min(sent + step);
                input.extend_from_slice(&script[sent..to]);
                sent = to;
            }
            end => {
                let unused = input.len() + script.len() - sent;
                return Ran {
                    out,
                    end: Some(end),
                    unused,
                };
            }
        }
    }
}

/// Client flags, then options; the same in one piece and byte by byte.
fn run(options: &[(u32, Vec<u8>)]) -> Ran {
    run_with_flags(3, options)
}

fn run_with_flags(flags: u32, options: &[(u32, Vec<u8>)]) -> Ran {
    let exports = single();
    let mut script = Vec::new();
    ClientFlags(flags).emit(&mut script);
    for (option, data) in options {
        option::emit(*option, data, &mut script);
    }
    let whole = run_in_steps(&exports, &script, usize::MAX >> 1);
    let bytewise = run_in_steps(&exports, &script, 1);
    assert!(
        whole.out == bytewise.out,
        "the answers depend on how the bytes arrive"
    );
    assert_eq!(whole.end.is_some(), bytewise.end.is_some());
    whole
}

#[test]
fn go_with_all_information() {
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 999];
    let ran = run(&[(kind::GO, info_data("", &wanted))]);
    let answers = ran.answers();
    assert_eq!(
        ran.kinds(),
        [rep::INFO, rep::INFO, rep::INFO, rep::INFO, rep::ACK]
    );
    assert_eq!(
        answers[0].2[..10],
        [&[0, 0], &SIZE.to_be_bytes()[..]].concat()
    );
    assert_eq!(answers[1].2, b"\0\x01disk");
    assert_eq!(answers[2].2, b"\0\x02a disk of the test");
    assert_eq!(answers[3].2, [0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 2, 0, 0, 0]);
    let n = ran.negotiated();
    assert_eq!(
        (n.size, n.style, n.export.name.as_str()),
        (SIZE, Style::Simple, "disk")
    );
    assert!(n.contexts.is_empty());
}

#[test]
fn go_sends_size_and_flags_even_when_not_asked() {
    let ran = run(&[
        (kind::STRUCTURED_REPLY, vec![]),
        (kind::GO, info_data("disk", &[])),
    ]);
    assert_eq!(ran.kinds(), [rep::ACK, rep::INFO, rep::ACK]);
    let flags = u16::from_be_bytes(ran.answers()[1].2[10..].try_into().unwrap());
    assert_ne!(flags & transmission_flag::SEND_DF, 0);
    assert_eq!(ran.negotiated().style, Style::Structured);
}

#[test]
fn info_goes_on_and_an_unknown_name_does_too() {
    let ran = run(&[
        (kind::INFO, info_data("nothing", &[])),
        (kind::INFO, info_data("disk", &[])),
        (kind::GO, info_data("nothing", &[])),
        (kind::GO, info_data("disk", &[])),
    ]);
    let expect = [
        rep::ERR_UNKNOWN,
        rep::INFO,
        rep::ACK,
        rep::ERR_UNKNOWN,
        rep::INFO,
        rep::ACK,
    ];
    assert_eq!(ran.kinds(), expect);
    let text = String::from_utf8(ran.answers()[0].2.clone()).unwrap();
    assert!(text.contains("no export 'nothing'"), "{text}");
    ran.negotiated();
}

#[test]
fn export_name_with_and_without_zeros() {
    for (flags, zeroes) in [(3, false), (1, true), (0, true)] {
        let ran = run_with_flags(flags, &[(kind::EXPORT_NAME, b"disk".to_vec())]);
        let reply = ExportReply::parse(&ran.out, zeroes).unwrap();
        assert_eq!(
            (reply.size, ran.out.len()),
            (SIZE, if zeroes { 134 } else { 10 })
        );
        assert_ne!(reply.flags & transmission_flag::CAN_MULTI_CONN, 0);
        assert_eq!(ran.negotiated().no_zeroes, !zeroes);
    }
}

#[test]
fn export_name_that_cannot_be_answered_ends_the_session() {
    let long = vec![b'x'; 4097];
    for name in [b"nothing".to_vec(), b"a\0".to_vec(), vec![0xff], long] {
        let ran = run(&[(kind::EXPORT_NAME, name)]);
        assert!(ran.out.is_empty() && matches!(ran.end, Some(Step::Closed(_))));
    }
    let ran = run(&[
        (kind::EXTENDED_HEADERS, vec![]),
        (kind::EXPORT_NAME, b"disk".to_vec()),
    ]);
    assert!(matches!(ran.end, Some(Step::Closed(_))));
}

#[test]
fn list_names_the_export() {
    let ran = run(&[(kind::LIST, vec![]), (kind::LIST, vec![0])]);
    assert_eq!(ran.kinds(), [rep::SERVER, rep::ACK, rep::ERR_INVALID]);
    assert_eq!(ran.answers()[0].2, b"\0\0\0\x04diska disk of the test");
}

#[test]
fn abort_is_acknowledged_whatever_its_data() {
    for data in [vec![], vec![1; 100], vec![1; MAX_OPTION as usize + 1]] {
        let ran = run(&[(kind::ABORT, data)]);
        assert_eq!(ran.kinds(), [rep::ACK]);
        assert!(matches!(ran.end, Some(Step::Closed(_))));
    }
}

#[test]
fn unknown_options_are_answered_as_unsupported() {
    let mut script = Vec::new();
    for option in [0, kind::PEEK_EXPORT, 12, 77, 0x8000_0000, u32::MAX] {
        script.push((option, vec![9; 40]));
        script.push((option, vec![]));
    }
    script.push((99, vec![0; MAX_OPTION as usize + 1]));
    script.push((kind::GO, info_data("", &[])));
    let ran = run(&script);
    let kinds = ran.kinds();
    assert_eq!(kinds.len(), 15);
    assert!(
        kinds[..13].iter().all(|k| *k == rep::ERR_UNSUP),
        "{kinds:x?}"
    );
    ran.negotiated();
}

#[test]
fn starttls_is_refused_by_policy() {
    let ran = run(&[(kind::STARTTLS, vec![]), (kind::STARTTLS, vec![1])]);
    assert_eq!(ran.kinds(), [rep::ERR_POLICY, rep::ERR_INVALID]);
}

#[test]
fn styles() {
    let (s, x) = (
        (kind::STRUCTURED_REPLY, vec![]),
        (kind::EXTENDED_HEADERS, vec![]),
    );
    let go = (kind::GO, info_data("", &[]));
    for (options, style) in [
        (vec![go.clone()], Style::Simple),
        (vec![s.clone(), s.clone(), go.clone()], Style::Structured),
        (vec![x.clone(), go.clone()], Style::Extended),
        (
            vec![s.clone(), x.clone(), x.clone(), go.clone()],
            Style::Extended,
        ),
    ] {
        assert_eq!(run(&options).negotiated().style, style);
    }
    let ran = run(&[x, s, go]);
    assert_eq!(ran.kinds()[..2], [rep::ACK, rep::ERR_EXT_HEADER_REQD]);
    assert_eq!(ran.negotiated().style, Style::Extended);
    let ran = run(&[
        (kind::STRUCTURED_REPLY, vec![1]),
        (kind::EXTENDED_HEADERS, vec![1]),
    ]);
    assert_eq!(ran.kinds(), [rep::ERR_INVALID, rep::ERR_INVALID]);
}

#[test]
fn malformed_data_is_invalid_and_the_handshake_goes_on() {
    let mut long_name = 4097u32.to_be_bytes().to_vec();
    long_name.extend(vec![b'x'; 4097]);
    long_name.extend([0, 0]);
    let bad: Vec<Vec<u8>> = vec![
        vec![],
        vec![0],
        vec![0, 0, 0, 0],
        vec![0, 0, 0, 5, b'd', 0, 0],
        vec![0xff, 0xff, 0xff, 0xff, 0, 0],
        vec![0, 0, 0, 0, 0, 2, 0, 0],
        vec![0, 0, 0, 0, 0, 0, 9],
        vec![0, 0, 0, 1, 0xff, 0, 0],
        vec![0, 0, 0, 1, 0, 0, 0],
        long_name,
    ];
    let mut script = Vec::new();
    for data in &bad {
        script.push((kind::GO, data.clone()));
        script.push((kind::INFO, data.clone()));
    }
    script.push((kind::GO, info_data("disk", &[])));
    let ran = run(&script);
    let kinds = ran.kinds();
    assert!(
        kinds[..bad.len() * 2]
            .iter()
            .all(|k| *k == rep::ERR_INVALID),
        "{kinds:x?}"
    );
    ran.negotiated();
}

#[test]
fn malformed_queries_are_invalid_and_the_handshake_goes_on() {
    let bad: Vec<Vec<u8>> = vec![
        vec![],
        vec![0, 0, 0, 0],
        vec![0, 0, 0, 0, 0, 0, 0, 1],
        vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9, b'b'],
        vec![0, 0, 0, 0, 0, 0, 0, 0, 1],
    ];
    let mut script = vec![(kind::STRUCTURED_REPLY, vec![])];
    for data in &bad {
        script.push((kind::SET_META_CONTEXT, data.clone()));
        script.push((kind::LIST_META_CONTEXT, data.clone()));
    }
    script.push((kind::GO, info_data("disk", &[])));
    let ran = run(&script);
    let kinds = ran.kinds();
    assert!(
        kinds[1..=bad.len() * 2]
            .iter()
            .all(|k| *k == rep::ERR_INVALID),
        "{kinds:x?}"
    );
    ran.negotiated();
}

#[test]
fn contexts_are_listed() {
    let s = (kind::STRUCTURED_REPLY, vec![]);
    let list = |name: &str, queries: &[&str]| (kind::LIST_META_CONTEXT, meta_data(name, queries));
    let (base, depth) = ("base:allocation", "qemu:allocation-depth");
    for (queries, found) in [
        (&[][..], &[base, depth][..]),
        (&["base:"], &[base]),
        (&["qemu:"], &[depth]),
        (&["qemu:", "base:allocation"], &[base, depth]),
        (&["qemu:allocation-depth", "qemu:", "qemu:"], &[depth]),
        (&["qemu:dirty-bitmap:"], &[]),
        (&["x-y:"], &[]),
        (
            &[
                "base:other",
                "qemu:dirty-bitmap:x",
                "qemu:allocation-depth2",
            ],
            &[],
        ),
    ] {
        let ran = run(&[s.clone(), list("disk", queries)]);
        let mut answers = ran.answers().split_off(1);
        assert_eq!(answers.pop().unwrap().1, rep::ACK, "{queries:?}");
        let listed = answers.iter().map(|(_, kind, data)| {
            assert_eq!((*kind, &data[..4]), (rep::META_CONTEXT, &[0; 4][..]));
            std::str::from_utf8(&data[4..]).unwrap()
        });
        assert_eq!(listed.collect::<Vec<_>>(), found, "{queries:?}");
    }
    let ran = run(&[s, list("nothing", &[])]);
    assert_eq!(ran.kinds()[1..], [rep::ERR_UNKNOWN]);
    assert_eq!(run(&[list("disk", &[])]).kinds(), [rep::ERR_INVALID]);
}

#[test]
fn contexts_hold_for_the_export_that_they_were_selected_for() {
    let s = (kind::STRUCTURED_REPLY, vec![]);
    let set = |name: &str, queries: &[&str]| (kind::SET_META_CONTEXT, meta_data(name, queries));
    let go = |name: &str| (kind::GO, info_data(name, &[]));
    let both = ["base:allocation", "base:allocation", "qemu:x"];
    let ran = run(&[s.clone(), set("disk", &both), go("disk")]);
    assert_eq!(ran.kinds()[1..3], [rep::META_CONTEXT, rep::ACK]);
    assert_eq!(ran.answers()[1].2, b"\0\0\0\x01base:allocation");
    assert_eq!(ran.negotiated().contexts, [Context::Allocation]);

    let none = |script: &[(u32, Vec<u8>)]| run(script).negotiated().contexts.is_empty();
    assert!(
        none(&[s.clone(), set("disk", &both), go("")]),
        "selected for another name"
    );
    assert!(
        none(&[s.clone(), set("disk", &["base:"]), go("disk")]),
        "the namespace selects nothing"
    );
    assert!(
        none(&[s.clone(), set("disk", &both), set("disk", &[]), go("disk")]),
        "replaced"
    );
    assert!(
        none(&[s.clone(), set("disk", &both), set("no", &both), go("disk")]),
        "failed later"
    );
    let bad = (kind::SET_META_CONTEXT, vec![1]);
    assert!(
        none(&[s.clone(), set("disk", &both), bad, go("disk")]),
        "malformed later"
    );
    let big = (kind::SET_META_CONTEXT, vec![0; MAX_OPTION as usize + 1]);
    assert!(
        none(&[s, set("disk", &both), big, go("disk")]),
        "too big later"
    );
    assert_eq!(run(&[set("disk", &both)]).kinds(), [rep::ERR_INVALID]);
}

#[test]
fn too_much_data_is_skipped_and_refused_and_far_too_much_ends_the_session() {
    let big = vec![0; MAX_OPTION as usize + 1];
    for option in [
        kind::GO,
        kind::INFO,
        kind::LIST,
        kind::SET_META_CONTEXT,
        kind::STARTTLS,
    ] {
        let ran = run(&[(option, big.clone()), (kind::GO, info_data("", &[]))]);
        assert_eq!(ran.kinds()[0], rep::ERR_TOO_BIG);
        ran.negotiated();
    }
    let mut script = vec![0, 0, 0, 3];
    Header {
        option: kind::GO,
        length: MAX_OPTION_SKIP + 1,
    }
    .emit(&mut script);
    let ran = run_in_steps(&single(), &script, 1000);
    assert!(ran.out.is_empty() && matches!(ran.end, Some(Step::Closed(_))));
}

#[test]
fn what_breaks_the_protocol_ends_the_session() {
    let ran = run_with_flags(4, &[]);
    assert!(matches!(ran.end, Some(Step::Closed(_))));
    let ran = run_in_steps(&single(), b"\0\0\0\x03IHAVENOT", 1);
    assert!(matches!(ran.end, Some(Step::Closed(_))));
    let many = vec![(kind::STRUCTURED_REPLY, vec![]); MAX_OPTIONS as usize + 1];
    let ran = run(&many);
    assert_eq!(ran.kinds().len(), MAX_OPTIONS as usize);
    assert!(matches!(ran.end, Some(Step::Closed(_))));
}

#[test]
fn bytes_after_the_handshake_are_left() {
    let mut script = vec![0, 0, 0, 3];
    option::emit(kind::GO, &info_data("", &[]), &mut script);
    script.extend(b"first request");
    assert_eq!(run_in_steps(&single(), &script, 1 << 20).unused, 13);
}

#[test]
fn a_server_that_shuts_down_says_so() {
    let exports = single();
    let mut out = Vec::new();
    let mut handshake = Handshake::start(&mut out);
    handshake.advance(&[0, 0, 0, 3], &mut out, &exports);
    handshake.shut_down();
    out.clear();
    let mut feed = |option: u32, data: &[u8]| {
        let mut input = Vec::new();
        option::emit(option, data, &mut input);
        let (_, step) = handshake.advance(&input, &mut out, &exports);
        let kind = answer::parse(&out).ok().map(|a| a.0.kind);
        out.clear();
        (kind, matches!(step, Step::Closed(_)))
    };
    for option in [kind::GO, kind::LIST, kind::STRUCTURED_REPLY, 500] {
        assert_eq!(feed(option, &[]), (Some(rep::ERR_SHUTDOWN), false));
    }
    assert_eq!(feed(kind::EXPORT_NAME, b"disk"), (None, true));
    assert_eq!(feed(kind::ABORT, b""), (Some(rep::ACK), true));
}

#[derive(Debug)]
struct Broken(Kind);

impl Exports for Broken {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        Err(Error::new(self.0, "the list is broken"))
    }
    fn open(&self, _: &str) -> Result<OpenExport> {
        Err(Error::new(self.0, "the disk is broken").fix("Repair it."))
    }
}

#[test]
fn errors_of_exports_come_with_their_text() {
    for (kind_of, expect) in [
        (Kind::NotFound, rep::ERR_UNKNOWN),
        (Kind::InUse, rep::ERR_POLICY),
        (Kind::Corrupt, rep::ERR_POLICY),
        (Kind::Permission, rep::ERR_POLICY),
    ] {
        let mut script = vec![0, 0, 0, 3];
        option::emit(kind::GO, &info_data("x", &[]), &mut script);
        option::emit(kind::LIST, &[], &mut script);
        let ran = run_in_steps(&Broken(kind_of), &script, 1 << 20);
        let answers = ran.answers();
        assert_eq!(answers[0].1, expect);
        assert_eq!(answers[0].2, b"the disk is broken");
        assert_eq!(
            (answers[1].1, answers[1].2.as_slice()),
            (expect, &b"the list is broken"[..])
        );
    }
}

#[derive(Debug)]
struct Counting(Single, std::sync::atomic::AtomicUsize);

impl Exports for Counting {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        self.0.list()
    }
    fn open(&self, name: &str) -> Result<OpenExport> {
        self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        self.0.open(name)
    }
}

#[test]
fn one_name_is_opened_once() {
    let exports = Arc::new(Counting(single(), Default::default()));
    let mut script = vec![0, 0, 0, 3];
    option::emit(kind::STRUCTURED_REPLY, &[], &mut script);
    option::emit(kind::INFO, &info_data("disk", &[]), &mut script);
    let contexts = meta_data("disk", &["base:allocation"]);
    option::emit(kind::SET_META_CONTEXT, &contexts, &mut script);
    option::emit(kind::GO, &info_data("disk", &[]), &mut script);
    run_in_steps(exports.as_ref(), &script, 1 << 20).negotiated();
    assert_eq!(exports.1.load(std::sync::atomic::Ordering::SeqCst), 1);
}
