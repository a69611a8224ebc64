use std::io::Cursor;
use std::sync::{Arc, Mutex};

use super::*;

/// Bytes to be read, and those that were written.
struct Tape {
    input: Cursor<Vec<u8>>,
    output: Arc<Mutex<Vec<u8>>>,
}

impl Read for Tape {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.input.read(buf)
    }
}

impl Write for Tape {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.output.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Duplex for Tape {
    fn be_patient(&mut self, _: Duration) {}
}

/// One that hears `input`.
pub(in crate::migrate) fn hears(input: &[u8]) -> Wire {
    let tape = Tape {
        input: Cursor::new(input.to_vec()),
        output: Arc::default(),
    };
    Wire::new(Box::new(tape), "there")
}

/// What is on the link after `say`.
pub(in crate::migrate) fn said(say: impl FnOnce(&mut Wire)) -> Vec<u8> {
    let output = Arc::<Mutex<Vec<u8>>>::default();
    let tape = Tape {
        input: Cursor::default(),
        output: output.clone(),
    };
    let mut wire = Wire::new(Box::new(tape), "there");
    say(&mut wire);
    wire.flush().unwrap();
    assert_eq!(wire.bytes(), output.lock().unwrap().len() as u64);
    std::mem::take(&mut *output.lock().unwrap())
}

fn all() -> Vec<u8> {
    said(|wire| {
        for (n, kind) in Type::ALL.into_iter().enumerate() {
            wire.send(kind, &[&[n as u8; 3], &[7]]).unwrap();
        }
    })
}

#[test]
fn frames_come_as_they_were_sent() {
    let mut wire = hears(&all());
    for (n, kind) in Type::ALL.into_iter().enumerate() {
        assert_eq!(wire.read().unwrap(), kind);
        assert_eq!(wire.payload(), [n as u8, n as u8, n as u8, 7]);
    }
    assert_eq!(wire.read().unwrap_err().kind(), Kind::Io);
    assert!(wire.is_broken());
    let big = vec![1; PAYLOAD_MAX + 1];
    let sent = said(|wire| assert!(wire.send(Type::Data, &[&big]).is_err()));
    assert!(sent.is_empty());
    let whole = said(|wire| wire.send(Type::Data, &[&big[1..]]).unwrap());
    let mut wire = hears(&whole);
    assert_eq!(wire.read().unwrap(), Type::Data);
    assert!(wire.payload() == &big[1..]);
}

/// Goal: a frame is what was sent, where it was sent, or none.
#[test]
fn a_turned_bit_a_cut_and_another_place_are_noticed() {
    let sent = all();
    let len = sent.len() / Type::ALL.len();
    for bit in 0..2 * len * 8 {
        let mut bytes = sent.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut wire = hears(&bytes);
        let first = wire.read();
        let refused = match bit / 8 < len {
            true => first,
            false => first.and_then(|_| wire.read()),
        };
        let error = refused.expect_err(&format!("bit {bit}"));
        assert!(error.to_string().contains("there"), "{error}");
    }
    for cut in 0..len {
        assert!(hears(&sent[..cut]).read().is_err());
    }
    // The second first, or the first twice.
    assert!(hears(&sent[len..]).read().is_err());
    let twice = [&sent[..len], &sent[..len]].concat();
    let mut wire = hears(&twice);
    wire.read().unwrap();
    assert_eq!(wire.read().unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn a_record_is_what_is_known_or_refused() {
    let answered = |json: &str| {
        let bytes = said(|wire| wire.send(Type::Answer, &[json.as_bytes()]).unwrap());
        let mut wire = hears(&bytes);
        wire.expect(Type::Answer)?;
        wire.record::<Answered>()
    };
    for answer in [Answer::Taken(7), Answer::Dropped, Answer::Unknown] {
        let json = serde_json::to_string(&Answered::from(answer)).unwrap();
        assert_eq!(Answer::from(answered(&json).unwrap()), answer);
    }
    for verdict in [Verdict::Given, Verdict::Aborted(3)] {
        assert_eq!(Verdict::from(Said::from(verdict)), verdict);
    }
    for json in [
        "",
        "null",
        "\"kept\"",
        "{\"taken\":{}}",
        "{\"taken\":{\"epoch\":-1}}",
        "{\"taken\":{\"epoch\":1,\"more\":1}}",
        "{\"taken\":{\"epoch\":1}}x",
        "{\"taken\":{\"epoch\":1},\"dropped\":null}",
    ] {
        assert_eq!(answered(json).unwrap_err().kind(), Kind::Corrupt, "{json}");
    }
    let hello = "{\"version\":1,\"id\":\"x\",\"name\":\"n\",\"purpose\":\"move\",\"more\":1}";
    let bytes = said(|wire| wire.send(Type::Hello, &[hello.as_bytes()]).unwrap());
    let mut wire = hears(&bytes);
    wire.expect(Type::Hello).unwrap();
    assert!(wire.record::<Hello>().is_err());
}

#[test]
fn a_refusal_is_the_error_and_bears_no_control_characters() {
    let refusal = Refusal {
        kind: Kind::NoSpace.name().to_owned(),
        what: format!("full\n\u{1b}[2J{}", "x".repeat(10_000)),
    };
    let bytes = said(|wire| wire.say(Type::Refused, &refusal).unwrap());
    let error = hears(&bytes).expect(Type::Ready).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace);
    let text = error.to_string();
    assert!(text.contains("there refused: full") && text.len() < 2500);
    assert!(!text.contains(|c: char| c.is_control()));
}

#[test]
fn a_stream_comes_as_it_was_written_and_nothing_else_does() {
    let data: Vec<u8> = (0..PAYLOAD_MAX * 2 + 77).map(|n| (n % 251) as u8).collect();
    let count = std::cell::Cell::new(0);
    let bytes = said(|wire| {
        let go_on = |n| {
            count.set(count.get() + n);
            Ok(())
        };
        let mut out = StreamOut {
            wire,
            go_on: &go_on,
        };
        out.write_all(&data).unwrap();
        wire.send(Type::StreamEnd, &[]).unwrap();
        wire.send(Type::Sync, &[]).unwrap();
    });
    assert_eq!(count.get(), data.len() as u64);
    let mut wire = hears(&bytes);
    let mut got = Vec::new();
    StreamIn::new(&mut wire).read_to_end(&mut got).unwrap();
    assert!(got == data);
    wire.expect(Type::Sync).unwrap();
    // Cut, or with another frame in it.
    for cut in [0, HEAD, bytes.len() / 2] {
        let read = StreamIn::new(&mut hears(&bytes[..cut])).read_to_end(&mut Vec::new());
        assert!(read.is_err());
    }
    let other = said(|wire| {
        wire.send(Type::Stream, &[&[1; 9]]).unwrap();
        wire.send(Type::Data, &[&[1; 9]]).unwrap();
    });
    let read = StreamIn::new(&mut hears(&other)).read_to_end(&mut Vec::new());
    assert!(
        read.unwrap_err()
            .to_string()
            .contains("in the middle of a stream")
    );
    // Whoever says stop is heard.
    let stopped = said(|wire| {
        let go_on = |_| Err(Error::new(Kind::Io, "enough"));
        let mut out = StreamOut {
            wire,
            go_on: &go_on,
        };
        assert!(out.write_all(&[1; 10]).is_err());
    });
    assert!(stopped.len() >= HEAD);
}
