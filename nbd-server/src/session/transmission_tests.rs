use proptest::prelude::*;

use super::*;
use crate::wire::request::EXTENDED_MAGIC;

const SIZE: u64 = 1 << 40;
const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

fn rules(style: Style, read_only: bool) -> Rules {
    let contexts = if style == Style::Simple {
        vec![]
    } else {
        Context::ALWAYS.to_vec()
    };
    Rules {
        style,
        size: SIZE.into(),
        read_only,
        contexts,
    }
}

fn request(kind: u16, flags: u16, offset: u64, length: u64) -> Request {
    Request {
        flags,
        kind,
        cookie: 42,
        offset,
        length,
    }
}

fn look(rules: &Rules, request: Request, payload: usize) -> Next {
    let mut bytes = Vec::new();
    request.emit(rules.style, &mut bytes);
    bytes.resize(bytes.len() + payload, 0xaa);
    rules.next(&bytes)
}

fn refused(next: Next) -> (u32, u64) {
    match next {
        Next::Refused {
            refusal, discard, ..
        } => {
            assert_eq!(refusal.tag.cookie, 42);
            assert!(!refusal.text.is_empty());
            (refusal.error, discard)
        }
        other => panic!("{other:?}"),
    }
}

/// The flags that the protocol documents for each command.
fn legal(style: Style, command: u16) -> u16 {
    let own = match command {
        kind::READ if style != Style::Simple => flag::DF,
        kind::WRITE if style == Style::Extended => flag::PAYLOAD_LEN,
        kind::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
        kind::BLOCK_STATUS => flag::REQ_ONE,
        _ => 0,
    };
    own | flag::FUA
}

#[test]
fn every_command_with_every_combination_of_flags() {
    for style in STYLES {
        for command in [0, 1, 3, 4, 5, 6, 7u16] {
            for flags in (0..128u16).chain([1 << 8, 1 << 15]) {
                let (offset, length) = if command == kind::FLUSH {
                    (0, 0)
                } else {
                    (512, 512)
                };
                let next = look(
                    &rules(style, false),
                    request(command, flags, offset, length),
                    512,
                );
                let illegal = flags & !legal(style, command) != 0;
                let no_context = style == Style::Simple && command == kind::BLOCK_STATUS;
                if illegal || no_context {
                    let has_payload = match style {
                        Style::Extended if flags & flag::PAYLOAD_LEN != 0 => true,
                        _ => command == kind::WRITE,
                    };
                    let discard = if has_payload { length } else { 0 };
                    let what = format!("{style:?} {command} {flags:#x}");
                    assert_eq!(refused(next), (errno::EINVAL, discard), "{what}");
                } else {
                    assert!(matches!(next, Next::Command { .. }), "{next:?}");
                }
            }
        }
    }
}

#[test]
fn flags_become_what_they_mean() {
    let rules = rules(Style::Structured, false);
    let action = |kind, flags| match look(&rules, request(kind, flags, 0, 512), 512) {
        Next::Command { command, .. } => (command.action, command.fua),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        action(kind::READ, flag::DF),
        (Action::Read { whole: true }, false)
    );
    assert_eq!(
        action(kind::READ, flag::FUA),
        (Action::Read { whole: false }, false)
    );
    assert_eq!(action(kind::WRITE, flag::FUA), (Action::Write, true));
    assert_eq!(action(kind::TRIM, flag::FUA), (Action::Trim, true));
    let mode = ZeroMode {
        keep_space: true,
        only_if_fast: true,
    };
    let zero = action(
        kind::WRITE_ZEROES,
        flag::NO_HOLE | flag::FAST_ZERO | flag::FUA,
    );
    assert_eq!(zero, (Action::Zero(mode), true));
    assert_eq!(
        action(kind::BLOCK_STATUS, flag::REQ_ONE),
        (Action::Status { one: true }, false)
    );
    assert_eq!(action(kind::CACHE, 0), (Action::Cache, false));
}

#[test]
fn ranges_past_the_end() {
    for style in [Style::Structured, Style::Extended] {
        let rules = rules(style, false);
        let past = [
            (SIZE, 1),
            (SIZE - 1, 2),
            (u64::MAX, 1),
            (u64::MAX, 4096),
            (SIZE + 1, 0),
        ];
        for (offset, length) in past {
            for (command, error) in [
                (kind::READ, errno::EINVAL),
                (kind::TRIM, errno::EINVAL),
                (kind::CACHE, errno::EINVAL),
                (kind::BLOCK_STATUS, errno::EINVAL),
                (kind::WRITE, errno::ENOSPC),
                (kind::WRITE_ZEROES, errno::ENOSPC),
            ] {
                let write = command == kind::WRITE;
                let flags = if write && style == Style::Extended {
                    flag::PAYLOAD_LEN
                } else {
                    0
                };
                let next = look(&rules, request(command, flags, offset, length), 0);
                let discard = if write { length } else { 0 };
                assert_eq!(
                    refused(next),
                    (error, discard),
                    "{command} {offset} {length}"
                );
            }
        }
        let next = look(&rules, request(kind::READ, 0, SIZE - 512, 512), 0);
        assert!(matches!(next, Next::Command { .. }));
    }
}

#[test]
fn a_read_only_export_refuses_changes_and_nothing_else() {
    let rules = rules(Style::Structured, true);
    for command in [kind::WRITE, kind::TRIM, kind::WRITE_ZEROES] {
        let (error, _) = refused(look(&rules, request(command, 0, 0, 512), 512));
        assert_eq!(error, errno::EPERM, "{command}");
    }
    for command in [kind::READ, kind::CACHE, kind::BLOCK_STATUS] {
        let next = look(&rules, request(command, 0, 0, 512), 0);
        assert!(matches!(next, Next::Command { .. }));
    }
    let next = look(&rules, request(kind::FLUSH, 0, 0, 0), 0);
    assert!(matches!(next, Next::Command { .. }));
}

#[test]
fn long_requests() {
    let long = u64::from(MAX_PAYLOAD) + 1;
    for style in STYLES {
        let rules = rules(style, false);
        let error = refused(look(&rules, request(kind::READ, 0, 0, long), 0)).0;
        assert_eq!(error, errno::EOVERFLOW);
        for command in [kind::TRIM, kind::WRITE_ZEROES, kind::CACHE] {
            let next = look(&rules, request(command, 0, 0, 1 << 31), 0);
            assert!(matches!(next, Next::Command { .. }), "{next:?}");
        }
    }
    let compact = rules(Style::Structured, false);
    let next = look(&compact, request(kind::WRITE, 0, 0, long), 0);
    assert_eq!(refused(next), (errno::EINVAL, long));
    let next = look(&compact, request(kind::WRITE, 0, 0, MAX_DISCARD), 0);
    assert_eq!(refused(next), (errno::EINVAL, MAX_DISCARD));
    let next = look(&compact, request(kind::WRITE, 0, 0, MAX_DISCARD + 1), 0);
    assert!(matches!(next, Next::Violation(_)));

    let extended = rules(Style::Extended, false);
    for command in [kind::WRITE, kind::TRIM, kind::BLOCK_STATUS, 999] {
        let next = look(&extended, request(command, flag::PAYLOAD_LEN, 0, long), 0);
        assert!(matches!(next, Next::Violation(_)), "{next:?}");
    }
    let next = look(&extended, request(kind::WRITE_ZEROES, 0, 0, SIZE), 0);
    assert!(
        matches!(next, Next::Command { .. }),
        "64-bit lengths are whole: {next:?}"
    );
}

#[test]
fn an_extended_write_has_a_payload_even_when_its_flag_is_missing() {
    let rules = rules(Style::Extended, false);
    for flags in [0, flag::PAYLOAD_LEN] {
        let next = look(&rules, request(kind::WRITE, flags, 0, 512), 600);
        assert!(
            matches!(
                next,
                Next::Command {
                    header: 32,
                    payload: 512,
                    ..
                }
            ),
            "{next:?}"
        );
    }
    let next = look(
        &rules,
        request(kind::WRITE, 0, 0, u64::from(MAX_PAYLOAD) + 1),
        0,
    );
    assert!(matches!(next, Next::Violation(_)));
}

#[test]
fn a_write_waits_for_its_payload_and_a_refused_one_does_not() {
    let rules = rules(Style::Structured, false);
    let next = look(&rules, request(kind::WRITE, 0, 0, 4096), 4095);
    assert_eq!(next, Next::NeedMore(28 + 4096));
    let next = look(&rules, request(kind::WRITE, 0, 0, 4096), 4097);
    assert!(matches!(
        next,
        Next::Command {
            header: 28,
            payload: 4096,
            ..
        }
    ));
    let next = look(&rules, request(kind::WRITE, flag::REQ_ONE, 0, 4096), 1);
    assert_eq!(refused(next), (errno::EINVAL, 4096));
}

#[test]
fn flush_status_and_disconnect_have_their_own_rules() {
    let rules = rules(Style::Structured, false);
    assert_eq!(
        refused(look(&rules, request(kind::FLUSH, 0, 1, 0), 0)).0,
        errno::EINVAL
    );
    assert_eq!(
        refused(look(&rules, request(kind::FLUSH, 0, 0, 1), 0)).0,
        errno::EINVAL
    );
    assert_eq!(
        refused(look(&rules, request(kind::BLOCK_STATUS, 0, 0, 0), 0)).0,
        errno::EINVAL
    );
    assert_eq!(
        look(&rules, request(kind::DISC, 0xffff, 1, 1), 0),
        Next::Disconnect
    );
    for command in [8, 9, 0x8000, 0xffff] {
        assert_eq!(
            refused(look(&rules, request(command, 0, 0, 0), 0)),
            (errno::EINVAL, 0)
        );
    }
}

#[test]
fn an_empty_request_is_no_error() {
    let rules = rules(Style::Structured, false);
    for command in [
        kind::READ,
        kind::WRITE,
        kind::TRIM,
        kind::WRITE_ZEROES,
        kind::CACHE,
    ] {
        let next = look(&rules, request(command, 0, SIZE, 0), 0);
        assert!(matches!(next, Next::Command { .. }), "{next:?}");
    }
}

#[test]
fn a_wrong_magic_number_ends_the_session() {
    let next = rules(Style::Structured, false).next(&EXTENDED_MAGIC.to_be_bytes());
    assert!(matches!(next, Next::Violation(_)));
}

proptest! {
    /// Whatever the bytes: no panic, what is used up is there, what is needed is bounded.
    #[test]
    fn any_bytes(
        style in 0..3usize,
        magic: bool,
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let rules = rules(STYLES[style], false);
        if magic {
            let number = if style == 2 { EXTENDED_MAGIC } else { crate::wire::request::MAGIC };
            let number = number.to_be_bytes();
            let n = bytes.len().min(4);
            bytes[..n].copy_from_slice(&number[..n]);
            // Small command numbers, so that more than unknown commands are tried.
            if let Some(b) = bytes.get_mut(6) { *b = 0; }
            if let Some(b) = bytes.get_mut(7) { *b &= 7; }
        }
        match rules.next(&bytes) {
            Next::NeedMore(n) => prop_assert!(n > bytes.len() && n <= 32 + MAX_PAYLOAD as usize),
            Next::Command { header, payload, command } => {
                prop_assert!(header + payload <= bytes.len());
                prop_assert!(command.range.start <= command.range.end && command.range.end <= SIZE);
            }
            Next::Refused { header, discard, .. } => {
                prop_assert!(header <= bytes.len() && discard <= MAX_DISCARD);
            }
            Next::Disconnect | Next::Violation(_) => {}
        }
    }
}
