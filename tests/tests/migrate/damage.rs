//! A link that damages what goes over it, and bytes that nobody of ours sends.
//!
//! `PLOOP_DAMAGE=1000 cargo test --workspace --test migrate` for a longer run; `PLOOP_SEED` repeats one.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd_server::control::model::{JobState, MigrationPhase};
use ploop_tests::fsx::env;
use ploop_tests::mount::wait_for;
use serde_json::json;

use super::proxy::{Flow, Frame, Proxy, Way};
use super::sides::{Side, calm, look, settled};
use super::*;

/// Types of frames whose answer is waited for: without them nothing goes on.
const ASKS: [u8; 6] = [1, 3, 6, 8, 9, 10];
/// The last frame of the tree's stream.
const STREAM_END: u8 = 3;

#[derive(Clone, Copy, Debug)]
enum Damage {
    Bit(u64),
    Cut(u64),
    Twice,
    Lost,
}

/// Frames of one direction, as they came.
type Sent = Vec<Vec<u8>>;

/// Two services with a tracker to bring, and a proxy in front of either.
struct Pair {
    sides: [Side; 2],
    proxies: [Proxy; 2],
    bytes: Vec<u8>,
    at: usize,
}

impl Pair {
    fn new() -> Pair {
        let mut sides = [Side::new(), Side::new()];
        let bytes = store(&sides[0].rig);
        import(&sides[1].rig);
        sides.iter_mut().for_each(Side::start);
        sides[0].rig.run(["tracker", "start", "ct", "t"]);
        let proxies = [0, 1].map(|n: usize| Proxy::new(&socket(&sides[n].rig)));
        Pair {
            sides,
            proxies,
            bytes,
            at: 0,
        }
    }

    /// Moves it to the other side, with some writes to be sent in each step, to whatever end.
    fn go(&mut self, rng: &mut Rng) -> JobState {
        let (from, to) = (&self.sides[self.at], &self.proxies[1 - self.at]);
        let mut client = from.here().open("ct");
        let mut write = |count: u64| {
            for _ in 0..count {
                let at = rng.below(SIZE >> 12) << 12;
                let mut data = [0; 4096];
                rng.fill(&mut data);
                client.write(at, &data);
                self.bytes[at as usize..][..4096].copy_from_slice(&data);
            }
        };
        write(3);
        let id = begin(from.here(), &to.address(), |m| m.freeze = true);
        let api = from.here().api();
        let path = resource(&["jobs", &id.to_string()]);
        let mut said = false;
        let mut job: Job = api.get(&path).unwrap();
        while !job.state.is_over() {
            let waits =
                |m: &nbd_server::control::model::Migration| m.phase == MigrationPhase::Freeze;
            if !said && job.migration.as_ref().is_some_and(waits) {
                write(3);
                let frozen = resource(&["containers", "ct", "migrate", "frozen"]);
                let _: serde_json::Value = api.post(&frozen, &json!({})).unwrap();
                said = true;
            }
            std::thread::sleep(Duration::from_millis(1));
            job = api.get(&path).unwrap();
        }
        job.state
    }

    /// One of them has all of it, and the other nothing.
    fn check(&mut self) {
        let (from, to) = (self.at, 1 - self.at);
        look(&self.sides[from], &self.sides[to]);
        if settled(&self.sides[from], &self.sides[to]) {
            self.at = to;
        }
        look(&self.sides[from], &self.sides[to]);
        let side = &self.sides[self.at];
        assert!(content(side.here(), "ct") == self.bytes, "wrong content");
        let other = &self.sides[1 - self.at];
        wait_for("nothing left", || is_empty(&other.rig));
        self.sides.iter().for_each(|s| calm(s.here()));
    }
}

/// Goal: whatever the link does, the container is moved and right, or stays and goes on.
#[test]
fn a_link_that_damages_is_noticed() {
    let seed = env("PLOOP_SEED", 1);
    println!("PLOOP_SEED={seed}");
    let mut rng = Rng(seed);
    let mut pair = Pair::new();
    // What goes over it.
    let seen: Arc<Mutex<[Sent; 2]>> = Arc::default();
    let book = seen.clone();
    pair.proxies[1].judge(move |frame| {
        book.lock().unwrap()[frame.way as usize].push(frame.bytes.clone());
        Flow::Pass
    });
    assert_eq!(pair.go(&mut rng), JobState::Done);
    pair.check();
    let lens = {
        let seen = seen.lock().unwrap();
        [0, 1].map(|way: usize| seen[way].iter().map(Vec::len).collect::<Vec<_>>())
    };
    let mut moved = 0;
    let runs = env("PLOOP_DAMAGE", 40);
    for run in 0..runs {
        let way = [Way::ToDestination, Way::ToSource][rng.once_in(3) as usize];
        let lens = &lens[way as usize];
        let place = rng.below(lens.len() as u64) as usize;
        let byte = match rng.once_in(2) {
            true => rng.below(12),
            false => rng.below(lens[place] as u64),
        };
        let damage = match rng.below(6) {
            0 => Damage::Cut(byte),
            1 => Damage::Twice,
            2 => Damage::Lost,
            _ => Damage::Bit(byte * 8 + rng.below(8)),
        };
        let mut count = 0;
        let target = 1 - pair.at;
        let mut first = None;
        pair.proxies[target].judge(move |mut frame| {
            let is_first = *first.get_or_insert(frame.link) == frame.link;
            if !is_first || frame.way != way {
                return Flow::Pass;
            }
            count += 1;
            match count == place + 1 {
                true => hurt(&mut frame, damage),
                false => Flow::Pass,
            }
        });
        let state = pair.go(&mut rng);
        println!(
            "run {run}: {damage:?} of frame {place} {way:?}: {}",
            state.name()
        );
        pair.proxies[target].open();
        pair.check();
        moved += u64::from(state == JobState::Done);
    }
    println!("{moved} of {runs} moved all the same");
}

fn hurt(frame: &mut Frame<'_>, damage: Damage) -> Flow {
    let waits = frame.way == Way::ToSource || ASKS.contains(&frame.kind());
    let len = frame.bytes.len() as u64;
    match damage {
        Damage::Bit(at) => {
            let byte = at / 8 % len;
            frame.bytes[byte as usize] ^= 1 << (at % 8);
            // More or fewer bytes are waited for; so long that nobody waits for it in a test.
            match (4..8).contains(&byte) {
                true => Flow::Last,
                false => Flow::Pass,
            }
        }
        Damage::Cut(at) => {
            frame.bytes.truncate((at % len) as usize);
            Flow::Last
        }
        Damage::Twice => {
            frame.bytes.extend_from_within(..);
            Flow::Pass
        }
        Damage::Lost if waits => Flow::Cut,
        Damage::Lost => {
            frame.bytes.clear();
            Flow::Pass
        }
    }
}

/// CRC-32 as Ethernet has it.
fn crc(parts: &[&[u8]]) -> u32 {
    let mut sum = u32::MAX;
    for byte in parts.iter().flat_map(|p| p.iter()) {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ ((sum & 1) * 0xEDB8_8320);
        }
    }
    !sum
}

fn framed(number: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind, 0, 0, 0];
    frame.extend((payload.len() as u32).to_le_bytes());
    let sum = crc(&[&number.to_le_bytes(), &frame, payload]);
    frame.extend(sum.to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// Sends this, and that no more comes; the types of the frames that are answered, and their text.
fn answered(side: &Side, bytes: &[u8]) -> (Vec<u8>, String) {
    let mut link = UnixStream::connect(socket(&side.rig)).unwrap();
    let patience = Duration::from_secs(180);
    link.set_read_timeout(Some(patience)).unwrap();
    // It need not take all of it.
    drop(link.write_all(bytes));
    link.shutdown(std::net::Shutdown::Write).ok();
    let (mut all, mut kinds, mut text) = (Vec::new(), Vec::new(), String::new());
    match link.read_to_end(&mut all) {
        Err(e) if e.kind() != std::io::ErrorKind::ConnectionReset => panic!("{e}"),
        _ => {}
    }
    let mut rest = &all[..];
    while rest.len() >= 12 {
        let len = u32::from_le_bytes(*rest[4..].first_chunk().unwrap()) as usize;
        kinds.push(rest[0]);
        if rest[0] == 37 {
            text = String::from_utf8_lossy(&rest[12..12 + len]).into_owned();
        }
        rest = &rest[12 + len..];
    }
    (kinds, text)
}

fn memory(side: &Side) -> u64 {
    let path = format!("/proc/{}/status", side.here().pid());
    let status = fs::read_to_string(path).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// Goal: what nobody of ours says is refused by name, costs no memory by a number that it claims, and
/// leaves nothing.
#[test]
fn what_is_no_move_is_refused_by_name() {
    let mut rng = Rng(5);
    let mut pair = Pair::new();
    let seen: Arc<Mutex<Sent>> = Arc::default();
    let book = seen.clone();
    pair.proxies[1].judge(move |frame| {
        if frame.way == Way::ToDestination {
            book.lock().unwrap().push(frame.bytes.clone());
        }
        Flow::Pass
    });
    assert_eq!(pair.go(&mut rng), JobState::Done);
    pair.check();
    assert_eq!(pair.go(&mut rng), JobState::Done);
    pair.check();
    let frames = seen.lock().unwrap().clone();
    let there = &pair.sides[1];
    let before = memory(there);
    let refused = |bytes: &[u8], why: &str| {
        let (kinds, text) = answered(there, bytes);
        assert_eq!(kinds.last(), Some(&37), "{why}: {kinds:?}");
        assert!(text.len() > 30, "{why}: {text}");
        text
    };

    for len in [12, 100, 4096, 1 << 20] {
        let mut garbage = vec![0; len];
        rng.fill(&mut garbage);
        refused(&garbage, "garbage");
    }
    assert_eq!(answered(there, &[]).0, [37]);
    let mut huge = framed(0, 1, b"{}");
    huge[4..8].fill(0xFF);
    let text = refused(&huge, "a huge length");
    assert!(text.contains("4294967295"), "{text}");
    let whole = json!({
        "version": 1, "id": "{8a6e0804-2bd0-4672-b79d-d97027f9071a}", "name": "ct",
        "purpose": "move", "luggage": { "trackers": {}, "life": null },
    });
    let tracker = json!({ "name": "t", "granularity": 65536, "created": 1 });
    let many = |n: u64| -> serde_json::Value {
        let id = |n: u64| format!("8a6e0804-2bd0-4672-b79d-{n:012x}");
        let all = (0..n).map(|n| (id(n), tracker.clone()));
        serde_json::Value::Object(all.collect())
    };
    for (field, value) in [
        ("version", json!(2)),
        ("version", json!(-1)),
        ("id", json!("")),
        ("id", json!("x".repeat(1000))),
        ("name", json!("../../etc")),
        ("name", json!("")),
        ("name", json!("x".repeat(5000))),
        ("purpose", json!("steal")),
        ("more", json!(1)),
        ("luggage", json!({ "trackers": many(2), "life": null })),
        ("luggage", json!({ "trackers": many(1000), "life": null })),
        (
            "luggage",
            json!({ "trackers": { "x": tracker }, "life": null }),
        ),
        ("luggage", json!([[[[[[]]]]]])),
    ] {
        let mut hello = whole.clone();
        hello[field] = value;
        let hello = serde_json::to_vec(&hello).unwrap();
        refused(&framed(0, 1, &hello), field);
    }
    let nested = "[".repeat(1 << 19);
    refused(&framed(0, 1, nested.as_bytes()), "nested");

    // Every type in every place of a move, and all that begins like one and ends there.
    let received = frames.iter().position(|f| f[0] == STREAM_END).unwrap() + 1;
    let far = [&[0xFF; 8][..], &[1; 40]].concat();
    for place in [0, 1, 2, received - 1, received, received + 1] {
        let prefix = frames[..place].concat();
        for kind in (0..12).chain(30..41) {
            for payload in [&[][..], &far, b"{\"given\":{}}", b"\"given\""] {
                let frame = framed(place as u64, kind, payload);
                let bytes = [&prefix[..], &frame].concat();
                let text = refused(&bytes, &format!("type {kind} at {place}"));
                assert!(!text.contains("stopped"), "{text}");
            }
        }
        wait_for("nothing left", || is_empty(&there.rig));
    }
    let after = memory(there);
    assert!(after < before + (48 << 20), "{before} bytes, then {after}");
    calm(there.here());
    pair.check();
}
