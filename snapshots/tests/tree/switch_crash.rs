//! Rollback under power cuts and failing calls: before or after, nothing lost, nothing left.

use ploop::Kind;
use ploop::descriptor::Guid;
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, Calls, Fault, RecordingStore};
use snapshots::switch::{SwitchOptions, Switched, switch};

use crate::common::{CLUSTER, Host};

/// What a case starts from, and what it does.
#[derive(Clone, Copy, Debug)]
struct Case {
    discard: bool,
    /// The disk was killed while it was written.
    killed: bool,
    /// Nothing was written since the last snapshot.
    empty: bool,
}

const CASES: [Case; 5] = [
    case(false, false, false),
    case(false, true, false),
    case(true, false, false),
    case(true, true, false),
    case(false, false, true),
];

const fn case(discard: bool, killed: bool, empty: bool) -> Case {
    Case {
        discard,
        killed,
        empty,
    }
}

impl Case {
    /// The old top's file goes.
    fn drops(self) -> bool {
        self.discard || self.empty
    }
}

/// A disk before a rollback, and what its nodes show.
struct Before {
    start: MemoryStore,
    a: Guid,
    b: Guid,
    at_a: Vec<u8>,
    at_b: Vec<u8>,
    at_top: Vec<u8>,
    top_file: String,
}

fn before(case: Case) -> Before {
    let start = MemoryStore::new();
    let host = Host::after(&start);
    host.init(Version::V2);
    host.write(0, 2 * CLUSTER, 1);
    let a = host.snap("a");
    host.write(CLUSTER, CLUSTER, 2);
    let b = host.snap("b");
    match (case.empty, case.killed) {
        (true, _) => {}
        (_, true) => host.write_and_die(0, CLUSTER, 3),
        _ => host.write(0, CLUSTER, 3),
    }
    let shows = |n| host.shows(n).unwrap();
    Before {
        at_a: shows(Some(a)),
        at_b: shows(Some(b)),
        at_top: shows(None),
        top_file: {
            let d = host.place().descriptor().unwrap();
            d.image(d.top).unwrap().file.clone()
        },
        a,
        b,
        start,
    }
}

fn go(host: &Host, case: Case) -> ploop::Result<Switched> {
    let options = SwitchOptions {
        to: "a".into(),
        discard: case.discard,
        keep_as: None,
    };
    switch(&host.try_place()?, &options)
}

const DONE: u64 = 1;

impl Before {
    /// Judges one state. `done`: the rollback was answered. Then works on.
    fn judge(&self, state: &MemoryStore, case: Case, done: bool) -> Result<(), String> {
        let host = Host::after(state);
        let text = |e: ploop::Error| e.to_string();
        let shows = |n| host.shows(n).map_err(text);
        if shows(Some(self.a))? != self.at_a || shows(Some(self.b))? != self.at_b {
            return Err("a snapshot shows other bytes".into());
        }
        let now = shows(None)?;
        let d = host.place().descriptor().map_err(text)?;
        let back = d.shot(d.top).is_some_and(|s| s.parent == self.a);
        if done && !back {
            return Err("the rollback was answered, and is lost".into());
        }
        let expected = if back { &self.at_a } else { &self.at_top };
        if &now != expected {
            return Err(format!("neither before nor after (after: {back})"));
        }
        let meta = host.place().meta().map_err(text)?;
        if meta.name_of(self.a) != Some("a") || meta.name_of(self.b) != Some("b") {
            return Err("a name is lost".into());
        }
        let kept = d.shots.iter().map(|s| s.guid);
        let kept = kept
            .into_iter()
            .find(|g| ![self.a, self.b, d.top].contains(g));
        if kept.is_some() != (back && !case.discard && !case.empty) {
            return Err(format!("kept: {kept:?}"));
        }
        if let Some(kept) = kept {
            if shows(Some(kept))? != self.at_top {
                return Err("what is kept shows other bytes".into());
            }
            if meta.name_of(kept) != Some("rollback-1") {
                return Err("what is kept has no name".into());
            }
        }
        // Without a tool of ours it opens and writes; with it, it goes back and leaves nothing.
        host.place().sweep().map_err(text)?;
        if host.files() != host.named() {
            return Err(format!(
                "orphans: {:?} for {:?}",
                host.files(),
                host.named()
            ));
        }
        let disk = host.place().open().map_err(text)?;
        disk.close().map_err(text)?;
        drop(disk);
        let findings = host.findings().map_err(text)?;
        if !findings.is_empty() {
            return Err(format!("damaged: {findings:?}"));
        }
        if !back {
            go(&host, case).map_err(|e| format!("the next try: {e}"))?;
            if shows(None)? != self.at_a {
                return Err("the next try goes elsewhere".into());
            }
        }
        host.place().sweep().map_err(text)?;
        match host.files() == host.named() {
            true => Ok(()),
            false => Err("the next try leaves orphans".into()),
        }
    }
}

#[test]
fn a_power_cut_at_any_point_leaves_before_or_after() {
    for case in CASES {
        let fx = before(case);
        let store = RecordingStore::on(&fx.start);
        go(&Host::on(store.store()), case).unwrap();
        store.mark(DONE);
        let budget = Budget {
            exhaustive_units: 11,
            seeded: 200,
            seed: 1,
        };
        let mut states = 0;
        for point in 0..=store.log().len() {
            let done = store.marks_before(point).contains(&DONE);
            for state in store.states_at(point, &budget) {
                states += 1;
                fx.judge(&state.build(), case, done).unwrap_or_else(|why| {
                    panic!("{case:?}: {why}\n{state}\n{}", store.log().join("\n"))
                });
            }
        }
        assert!(states > 60, "{states} states only");
    }
}

#[test]
fn every_sync_of_a_rollback_is_needed() {
    for case in CASES {
        let fx = before(case);
        let syncs = {
            let store = RecordingStore::on(&fx.start);
            go(&Host::on(store.store()), case).unwrap();
            store.syncs()
        };
        for n in 0..syncs {
            let store = RecordingStore::on(&fx.start);
            store.drop_sync(n);
            go(&Host::on(store.store()), case).unwrap();
            store.mark(DONE);
            let log = store.log();
            let line = log.iter().find(|l| l.contains("(dropped)")).unwrap();
            // Closing the old top has its own tests; what it holds was flushed before. And that the
            // metadata still lists a file that is gone costs nothing.
            if line.contains(&fx.top_file) || n + 1 == syncs && case.drops() {
                continue;
            }
            let budget = Budget {
                exhaustive_units: 12,
                seeded: 300,
                seed: 2,
            };
            let bad = (0..=log.len()).any(|point| {
                let done = store.marks_before(point).contains(&DONE);
                let mut states = store.states_at(point, &budget);
                states.any(|state| fx.judge(&state.build(), case, done).is_err())
            });
            assert!(bad, "{case:?}: {line} is not needed\n{}", log.join("\n"));
        }
    }
}

#[test]
fn a_failing_call_leaves_before_or_after_and_the_next_try_succeeds() {
    let faults = [
        (Fault::Eio, Calls::All, Kind::Io),
        (Fault::Enospc, Calls::Changes, Kind::NoSpace),
    ];
    for case in CASES {
        let fx = before(case);
        for (fault, calls, kind) in faults {
            for n in 0.. {
                let store = RecordingStore::on(&fx.start);
                store.count(calls);
                store.fail_at(n, fault);
                let done = go(&Host::on(store.store()), case);
                if store.calls() <= n {
                    done.unwrap();
                    assert!(n > 12, "{n} calls only");
                    break;
                }
                if let Err(e) = &done {
                    assert_eq!(e.kind(), kind, "{case:?}, call {n}: {e}");
                }
                let context = || format!("{case:?} {fault:?} {n}: {}", store.log().join("\n"));
                let answered = done.is_ok();
                fx.judge(&store.snapshot(), case, answered)
                    .unwrap_or_else(|why| panic!("kill -9: {why}\n{}", context()));
                let budget = Budget {
                    exhaustive_units: 6,
                    seeded: 20,
                    seed: n,
                };
                for state in store.states_at(store.log().len(), &budget) {
                    fx.judge(&state.build(), case, answered)
                        .unwrap_or_else(|why| panic!("{why}\n{state}\n{}", context()));
                }
            }
        }
    }
}
