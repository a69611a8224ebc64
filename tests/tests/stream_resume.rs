//! A stream that is cut goes on where it was cut, wherever that was.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::path::Path;

use ploop::Kind;
use ploop::format::ploop::Version;
use ploop::store::{Access, Store};
use ploop_tests::stream::{
    everything, frames, grown, host, on, received, sent, shows, snapshot, state, write,
};
use snapshots::Root;
use snapshots::stream::{SendOptions, forget, partial, partials};

fn resume(root: &Root, name: &str, of: &SendOptions) -> SendOptions {
    let token = partial(root, name).unwrap().token;
    SendOptions {
        resume: Some(token.parse().unwrap()),
        ..of.clone()
    }
}

fn source() -> Root {
    let (_, from) = host();
    grown(&from, "src", Version::V2, 256);
    from
}

/// Cuts a stream at `at`, and lets it go on; what there is in the end is what was sent.
fn cut_and_go_on(from: &Root, stream: &[u8], at: &[usize]) {
    let all = SendOptions::default();
    let (store, mut to) = host();
    let empty = everything(&store);
    let mut now = stream.to_vec();
    for at in at {
        let at = (*at).min(now.len() - 1);
        let e = received(&to, "dst", &now[..at], true).unwrap_err();
        // As a program that starts then finds it.
        to = on(std::sync::Arc::new(store.clone()));
        now = match partial(&to, "dst") {
            Ok(cut) => {
                let told = e.to_string().contains("--resume-token dst");
                assert!(told || now.len() < stream.len(), "{e}");
                assert_eq!((cut.of.as_str(), cut.images), ("src", 5));
                sent(from, "src", &resume(&to, "dst", &all)).unwrap()
            }
            // The records were not there yet, and nothing is.
            Err(e) => {
                assert_eq!(e.kind(), Kind::NotFound, "{e}");
                assert!(everything(&store) == empty);
                stream.to_vec()
            }
        };
    }
    received(&to, "dst", &now, true).unwrap_or_else(|e| panic!("cut at {at:?}: {e}"));
    for s in [None, Some("a"), Some("b"), Some("c")] {
        assert!(
            shows(&to, "dst", s) == shows(from, "src", s),
            "cut at {at:?}: {s:?}"
        );
    }
    assert!(store.list(Path::new("/store/tmp")).unwrap().is_empty());
}

#[test]
fn a_stream_goes_on_after_a_cut_at_any_frame_and_at_any_byte() {
    let from = source();
    let stream = sent(&from, "src", &SendOptions::default()).unwrap();
    let borders = frames(&stream);
    assert!(borders.len() > 15);
    for at in borders.into_iter().filter(|at| *at < stream.len()) {
        cut_and_go_on(&from, &stream, &[at]);
    }
    for at in (0..stream.len()).step_by(6007) {
        cut_and_go_on(&from, &stream, &[at]);
    }
}

#[test]
fn it_may_be_cut_again_and_again_and_sends_what_came_no_second_time() {
    let from = source();
    let stream = sent(&from, "src", &SendOptions::default()).unwrap();
    cut_and_go_on(&from, &stream, &[150_000, 3000, 90_000, 40, 70_000]);
    let (_, to) = host();
    let most = stream.len() - 200;
    received(&to, "dst", &stream[..most], true).unwrap_err();
    let rest = sent(&from, "src", &resume(&to, "dst", &SendOptions::default())).unwrap();
    assert!(
        rest.len() < stream.len() / 2,
        "{} of {}",
        rest.len(),
        stream.len()
    );
}

#[test]
fn a_difference_goes_on_too() {
    let from = source();
    let (_, to) = host();
    received(&to, "dst", &sent(&from, "src", &state("a")).unwrap(), false).unwrap();
    let since = SendOptions {
        from: Some("a".into()),
        ..state("b")
    };
    let stream = sent(&from, "src", &since).unwrap();
    received(&to, "dst", &stream[..stream.len() - 300], true).unwrap_err();
    assert_eq!(shows(&to, "dst", None), shows(&from, "src", Some("a")));
    let rest = sent(&from, "src", &resume(&to, "dst", &since)).unwrap();
    received(&to, "dst", &rest, true).unwrap();
    assert_eq!(shows(&to, "dst", None), shows(&from, "src", Some("b")));
}

#[test]
fn what_was_cut_is_kept_until_it_goes_on_or_is_given_up() {
    let from = source();
    let (store, to) = host();
    let before = everything(&store);
    let all = SendOptions::default();
    let stream = sent(&from, "src", &all).unwrap();
    let cut = &stream[..stream.len() / 2];
    received(&to, "dst", cut, true).unwrap_err();
    let kept = everything(&store);
    assert!(kept != before);
    // Collecting what interrupted work left takes it not.
    snapshots::remove::sweep(&to).unwrap();
    assert!(everything(&store) == kept);
    assert!(snapshots::list::containers(&to).unwrap().is_empty());
    let listed = partials(&to).unwrap();
    assert_eq!((listed.len(), listed[0].name.as_str()), (1, "dst"));
    // Neither another stream nor the same from its beginning takes its place.
    for resumable in [false, true] {
        let e = received(&to, "dst", &stream, resumable).unwrap_err();
        assert_eq!(e.kind(), Kind::Exists, "{e}");
        assert!(e.to_string().contains("--forget dst"), "{e}");
    }
    // A stream of another disk does not go on with it.
    let (_, other) = host();
    grown(&other, "src", Version::V1, 256);
    let whole = sent(&other, "src", &all).unwrap();
    let (_, third) = host();
    received(&third, "dst", &whole[..whole.len() / 2], true).unwrap_err();
    let foreign = sent(&other, "src", &resume(&third, "dst", &all)).unwrap();
    let e = received(&to, "dst", &foreign, true).unwrap_err();
    assert!(e.to_string().contains("another disk"), "{e}");
    let e = sent(&from, "src", &resume(&third, "dst", &all)).unwrap_err();
    assert!(e.to_string().contains("not what the stream"), "{e}");
    assert!(everything(&store) == kept);
    // One that goes on where there is nothing.
    let (bare, empty) = host();
    let rest = sent(&from, "src", &resume(&to, "dst", &all)).unwrap();
    let nothing = everything(&bare);
    let e = received(&empty, "dst", &rest, true).unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound, "{e}");
    assert!(everything(&bare) == nothing);

    forget(&to, "dst").unwrap();
    assert!(everything(&store) == before);
    assert_eq!(forget(&to, "dst").unwrap_err().kind(), Kind::NotFound);
    received(&to, "dst", &stream, false).unwrap();
}

#[test]
fn what_came_before_the_cut_is_verified_and_so_is_the_source() {
    let from = source();
    let all = SendOptions::default();
    let stream = sent(&from, "src", &all).unwrap();
    // A byte of what came, changed on the disk of the receiver: of a whole image, and of the one
    // that was cut.
    for image in ["0", "1"] {
        let (store, to) = host();
        let before = everything(&store);
        let borders = frames(&stream);
        let cut = (0..borders.len())
            .map(|n| borders[n])
            .find(|at| {
                drop(forget(&to, "dst"));
                received(&to, "dst", &stream[..*at], true).unwrap_err();
                partial(&to, "dst").is_ok_and(|p| p.done == 1 && !p.token.contains("-1-0-"))
            })
            .unwrap();
        let rest = sent(&from, "src", &resume(&to, "dst", &all)).unwrap();
        let path = Path::new("/store/tmp/receive-dst").join(image);
        let file = store.open(&path, Access::Write).unwrap();
        let last = file.len().unwrap() - 256 * 512;
        let data = file.next_data(last, last + 256 * 512).unwrap().unwrap();
        file.write_at(&[0xEE], data.start).unwrap();
        let e = received(&to, "dst", &rest, true).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt, "image {image}, cut at {cut}: {e}");
        assert!(everything(&store) == before, "image {image}: {e}");
    }
    // The state was written to meanwhile.
    let (store, to) = host();
    let before = everything(&store);
    let top = frames(&stream).into_iter().rev().nth(3).unwrap();
    received(&to, "dst", &stream[..top], true).unwrap_err();
    assert_eq!(partial(&to, "dst").unwrap().done, 4);
    write(&from, "src", 6 * 256 * 512, &[0xEE; 10]);
    let rest = sent(&from, "src", &resume(&to, "dst", &all));
    if let Ok(rest) = rest {
        // It is sent as it is now, all of it or none.
        match received(&to, "dst", &rest, true) {
            Ok(_) => assert_eq!(shows(&to, "dst", None), shows(&from, "src", None)),
            Err(_) => assert!(everything(&store) == before),
        }
    }
    // A snapshot was made meanwhile.
    drop(forget(&to, "again"));
    received(&to, "again", &stream[..top], true).unwrap_err();
    let token = resume(&to, "again", &all);
    snapshot(&from, "src", "new");
    let e = sent(&from, "src", &token).unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid, "{e}");
}

#[test]
fn a_frame_that_came_damaged_ends_it_where_that_one_began() {
    let from = source();
    let all = SendOptions::default();
    let stream = sent(&from, "src", &all).unwrap();
    let (_, to) = host();
    let mut bytes = stream.clone();
    let at = bytes.len() * 2 / 3;
    bytes[at] ^= 4;
    received(&to, "dst", &bytes, true).unwrap_err();
    let rest = sent(&from, "src", &resume(&to, "dst", &all)).unwrap();
    received(&to, "dst", &rest, true).unwrap();
    assert_eq!(shows(&to, "dst", None), shows(&from, "src", None));
}

#[test]
fn a_token_with_a_slip_of_the_pen_is_refused() {
    let from = source();
    let stream = sent(&from, "src", &SendOptions::default()).unwrap();
    let (_, to) = host();
    received(&to, "dst", &stream[..stream.len() / 2], true).unwrap_err();
    let token = partial(&to, "dst").unwrap().token;
    let parse = |text: &str| text.parse::<snapshots::stream::Token>();
    assert_eq!(parse(&token).unwrap().to_string(), token);
    for at in 0..token.len() {
        let mut wrong = token.clone().into_bytes();
        wrong[at] = if wrong[at] == b'7' { b'3' } else { b'7' };
        let wrong = String::from_utf8(wrong).unwrap();
        assert_eq!(parse(&wrong).unwrap_err().kind(), Kind::Invalid, "{wrong}");
    }
    for wrong in ["", "1", "1-2-3-4-5", "x"] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}
