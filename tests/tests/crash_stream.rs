//! Power cuts and failing calls while a stream is received. Promise 3: what comes is there and
//! whole, or not there, and what was there before is untouched.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::sync::Arc;

use ploop::Kind;
use ploop::disk::open::DESCRIPTOR;
use ploop::format::ploop::Version;
use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, Calls, Fault, RecordingStore};
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::stream::{
    container, frames, host, on, received, sent, shows, snapshot, state, write,
};
use snapshots::Root;
use snapshots::list;
use snapshots::place::Place;
use snapshots::stream::frame::Type;
use snapshots::stream::{SendOptions, forget, partial, partials};

/// What is received.
struct Streams {
    source: Root,
    /// The whole of `src`.
    tree: Vec<u8>,
    /// Its snapshot `a`, and what `b` has more.
    a: Vec<u8>,
    since: Vec<u8>,
    /// Where a half of the tree goes on.
    token: String,
}

const CLUSTER: u64 = 64 * 512;
/// Marks: all of it was received; a half of it was, and was said to be kept; the rest comes.
const DONE: u64 = 1;
const CUT: u64 = 2;
const GOES_ON: u64 = 3;

fn streams() -> Streams {
    let (_, source) = host();
    container(&source, "src", Version::V2, 64, 4 * CLUSTER);
    write(&source, "src", 4096, &[1; 512]);
    write(&source, "src", 3 * CLUSTER, &[2; 512]);
    snapshot(&source, "src", "a");
    write(&source, "src", 8192, &[3; 512]);
    write(&source, "src", 3 * CLUSTER, &vec![0; CLUSTER as usize]);
    snapshot(&source, "src", "b");
    write(&source, "src", 0, &[4; 512]);
    let since = SendOptions {
        from: Some("a".into()),
        ..state("b")
    };
    let tree = sent(&source, "src", &SendOptions::default()).unwrap();
    let (_, other) = host();
    received(&other, "dst", half(&tree), true).unwrap_err();
    Streams {
        token: partial(&other, "dst").unwrap().token,
        tree,
        a: sent(&source, "src", &state("a")).unwrap(),
        since: sent(&source, "src", &since).unwrap(),
        source,
    }
}

/// Up to where the second image is said to be done: it is closed in its middle.
fn half(stream: &[u8]) -> &[u8] {
    let done = |at: &usize| stream.get(*at) == Some(&(Type::Done as u8));
    let at = frames(stream).into_iter().filter(done).nth(1).unwrap();
    &stream[..at]
}

/// How it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// The whole tree, at once.
    Tree,
    /// The whole tree, cut in its middle; then the rest of it.
    Cut,
    /// What came after a snapshot, on that one.
    Onto,
}

impl How {
    /// What is there before.
    fn start(self, streams: &Streams) -> MemoryStore {
        let (store, root) = host();
        if self == How::Onto {
            received(&root, "dst", &streams.a, false).unwrap();
        }
        store
    }

    fn perform(self, root: &Root, streams: &Streams, mark: &dyn Fn(u64)) -> ploop::Result<()> {
        match self {
            How::Tree => received(root, "dst", &streams.tree, false).map(drop),
            How::Onto => received(root, "dst", &streams.since, false).map(drop),
            How::Cut => {
                let cut = received(root, "dst", half(&streams.tree), true).err();
                let Ok(known) = partial(root, "dst") else {
                    return cut.map_or(Ok(()), Err);
                };
                mark(CUT);
                let options = SendOptions {
                    resume: Some(known.token.parse()?),
                    ..SendOptions::default()
                };
                let rest = sent(&streams.source, "src", &options)?;
                mark(GOES_ON);
                received(root, "dst", &rest, true).map(drop)
            }
        }
    }

    /// What the container may show: before, and after.
    fn content(self, streams: &Streams) -> (Option<Vec<u8>>, Vec<u8>) {
        let of = |s: Option<&str>| shows(&streams.source, "src", s);
        match self {
            How::Tree | How::Cut => (None, of(None)),
            How::Onto => (Some(of(Some("a"))), of(Some("b"))),
        }
    }

    /// Judges one state, after these marks.
    fn judge(self, state: &MemoryStore, streams: &Streams, marks: &[u64]) -> Result<(), String> {
        let root = on(Arc::new(state.clone()));
        let answered = marks.contains(&DONE);
        if marks.contains(&CUT) && !marks.contains(&GOES_ON) {
            let known = partial(&root, "dst").map_err(|e| format!("what was kept is lost: {e}"))?;
            if known.token != streams.token {
                return Err(format!("it goes on at {}", known.token));
            }
        }
        let (before, after) = self.content(streams);
        let all = list::containers(&root).map_err(|e| e.to_string())?;
        if let Some(bad) = all.iter().find(|c| c.error.is_some()) {
            return Err(format!("{bad:?}"));
        }
        let there = all.iter().any(|c| c.name == "dst");
        if !there && (answered || before.is_some()) {
            return Err("dst is lost".into());
        }
        let mut done = false;
        if there {
            let now = shows(&root, "dst", None);
            done = now == after;
            if !done && (answered || before.as_ref() != Some(&now)) {
                return Err("dst shows something else".into());
            }
            for name in ["a", "b"] {
                let place = Place::container(&root, "dst").unwrap();
                let (d, meta) = (place.descriptor().unwrap(), place.meta().unwrap());
                let known = place.find(&d, &meta, name).is_ok();
                if done != known && (name == "b" || self != How::Onto) {
                    return Err(format!("snapshot {name} is lost, or nobody made it"));
                }
                if known
                    && shows(&root, "dst", Some(name)) != shows(&streams.source, "src", Some(name))
                {
                    return Err(format!("{name} shows something else"));
                }
            }
        }
        self.works_on(&root, streams, done)
    }

    /// What is missing can be received, and in the end everything can be removed.
    fn works_on(self, root: &Root, streams: &Streams, done: bool) -> Result<(), String> {
        let text = |e: ploop::Error| format!("afterwards: {e}");
        if let Ok(place) = Place::container(root, "dst") {
            place.sweep().map_err(text)?;
            let d = place.descriptor().map_err(text)?;
            for file in place.store().list(place.dir()).map_err(text)? {
                let file = file.to_str().unwrap();
                let known = [".ploop", DESCRIPTOR].contains(&file);
                if !known && !d.images.iter().any(|i| i.file == file) {
                    return Err(format!("{file} stays for good"));
                }
            }
        }
        for cut in partials(root).map_err(text)? {
            if done || cut.token.is_empty() {
                forget(root, &cut.name).map_err(text)?;
            }
        }
        if !done {
            match partial(root, "dst") {
                Ok(known) => {
                    let options = SendOptions {
                        resume: Some(known.token.parse().map_err(text)?),
                        ..SendOptions::default()
                    };
                    let rest = sent(&streams.source, "src", &options).map_err(text)?;
                    received(root, "dst", &rest, true).map(drop).map_err(text)?;
                }
                Err(_) => self.perform(root, streams, &|_| ()).map_err(text)?,
            }
        }
        if shows(root, "dst", None) != self.content(streams).1 {
            return Err("received again, it shows something else".into());
        }
        write(root, "dst", 512, &[9; 512]);
        snapshots::remove_container(root, "dst").map_err(text)?;
        for room in ["layers", "tmp", "containers"] {
            let left = root.opener().store().list(&root.dir().join(room));
            let left = left.map_err(text)?;
            if !left.is_empty() {
                return Err(format!("of an empty store are left: {left:?} in {room}"));
            }
        }
        Ok(())
    }
}

fn run(
    how: How,
    front: Arc<dyn Store>,
    log: &RecordingStore,
    streams: &Streams,
) -> Option<ploop::Error> {
    let met = how.perform(&on(front), streams, &|m| log.mark(m)).err();
    if met.is_none() {
        log.mark(DONE);
    }
    met
}

fn check(
    how: How,
    log: &RecordingStore,
    streams: &Streams,
    budget: &Budget,
) -> Result<u64, String> {
    let mut judged = 0;
    for point in 0..=log.log().len() {
        let marks = log.marks_before(point);
        for state in log.states_at(point, budget) {
            judged += 1;
            how.judge(&state.build(), streams, &marks)
                .map_err(|why| format!("{why}\n{state}\nlog:\n  {}", log.log().join("\n  ")))?;
        }
    }
    Ok(judged)
}

/// Goal: promise 3. Method: all states after every change and sync, in all three ways: a container
/// is there and whole, or as before; what is missing can be received, or goes on.
#[test]
fn what_comes_is_whole_or_absent_after_a_power_cut() {
    let streams = streams();
    let budget = Budget {
        exhaustive_units: 6,
        seeded: 16,
        seed: 0,
    };
    for how in [How::Tree, How::Cut, How::Onto] {
        let log = RecordingStore::on(&how.start(&streams));
        assert!(run(how, log.store(), &log, &streams).is_none());
        let judged = check(how, &log, &streams, &budget);
        println!(
            "{how:?}: {} states",
            judged.unwrap_or_else(|e| panic!("{how:?}: {e}"))
        );
    }
}

/// Goal: a call that fails anywhere fails the whole, by name, and leaves what was there. Method: EIO
/// and ENOSPC at every change and sync, then kill -9 and a power cut.
#[test]
fn a_failing_call_leaves_what_was_there() {
    let streams = streams();
    for how in [How::Tree, How::Cut, How::Onto] {
        for (fault, kind) in [(Fault::Eio, Kind::Io), (Fault::Enospc, Kind::NoSpace)] {
            for n in 0.. {
                let log = RecordingStore::on(&how.start(&streams));
                log.count(Calls::Changes);
                log.fail_at(n, fault);
                let met = run(how, log.store(), &log, &streams);
                if let Some(e) = met.as_ref().filter(|_| how != How::Cut) {
                    assert_eq!(e.kind(), kind, "{how:?}, call {n}: {e}");
                }
                let reached = log.calls() > n;
                log.clear_faults();
                let marks = log.marks_before(log.log().len());
                let context =
                    || format!("{how:?}, call {n}, {met:?}\n  {}", log.log().join("\n  "));
                how.judge(&log.snapshot(), &streams, &marks)
                    .unwrap_or_else(|e| panic!("kill -9: {e}: {}", context()));
                let budget = Budget {
                    exhaustive_units: 2,
                    seeded: 3,
                    seed: n,
                };
                for state in log.states_at(log.log().len(), &budget) {
                    how.judge(&state.build(), &streams, &marks)
                        .unwrap_or_else(|e| panic!("{e}\n{state}\n{}", context()));
                }
                if !reached {
                    assert!(n > 20, "{n} calls only");
                    break;
                }
            }
        }
    }
}

/// Goal: no sync of receiving can be taken out or moved. Method: each dropped, hastened and delayed.
#[test]
fn every_sync_of_receiving_is_needed_where_it_is() {
    const FILES: &[&str] = &[
        "snapshots/src/stream/commit.rs",
        "snapshots/src/stream/onto.rs",
        "snapshots/src/stream/partial.rs",
    ];
    let streams = streams();
    let proof = Proof::default();
    for how in [How::Tree, How::Cut, How::Onto] {
        let streams = &streams;
        let scenario = Scenario {
            name: format!("{how:?}"),
            start: how.start(streams),
            run: Box::new(move |front, log| {
                let failed = run(how, front, log, streams);
                let log = log.clone();
                Box::new(move || {
                    if let Some(e) = failed {
                        return Err(e.to_string());
                    }
                    let budget = Budget {
                        exhaustive_units: 6,
                        seeded: 10,
                        seed: 0,
                    };
                    check(how, &log, streams, &budget).map(drop)
                }) as Verdict<'_>
            }),
        };
        proof.add(&scenario, FILES);
    }
    proof.verdict(FILES);
}
