//! The crash tests prove themselves: a build that leaves out, hastens or delays any sync is red.

use ploop::format::ploop::Version;
use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::reorder::{Order, ReorderingStore};
use ploop_tests::crash::{Fixture, History, Runner, Shape, Step, Sweep, workload};

/// A run with one sync dropped or moved; the first violation, if any.
fn noticed(fx: &Fixture, steps: &[Step], drop: Option<u64>, order: Order) -> Option<String> {
    let store = RecordingStore::on(&fx.start);
    if let Some(n) = drop {
        store.drop_sync(n);
    }
    let history = History::new(&store, fx.initial.clone(), fx.closed());
    let front = ReorderingStore::new(&store, order);
    Runner::new(fx, std::sync::Arc::new(front), &history).run(steps);
    let sweep = Sweep { budget: Budget { seeded: 100, ..Budget::default() }, work_every: 1 };
    sweep.check(fx, &store, &history).err()
}

#[test]
fn explore() {
    use std::collections::BTreeMap;
    let mut seen: BTreeMap<String, BTreeMap<&str, (u32, u32, String)>> = BTreeMap::new();
    for (version, overlay) in [(Version::V1, true), (Version::V2, false)] {
        for shape in Shape::ALL {
            let fx = Fixture::new(version, shape, overlay, 8);
            for (name, steps) in workload::stories() {
                let store = RecordingStore::on(&fx.start);
                let history = History::new(&store, fx.initial.clone(), fx.closed());
                let front = ReorderingStore::new(&store, Order::Unchanged);
                Runner::new(&fx, std::sync::Arc::new(front.clone()), &history).run(&steps);
                for (n, call) in (0..).zip(front.calls()) {
                    let mut note = |what, yes: bool| {
                        let e = seen.entry(call.site.clone()).or_default().entry(what).or_default();
                        e.0 += 1;
                        e.1 += u32::from(yes);
                        if !yes && e.2.len() < 300 { e.2 += &format!("[{} {name}] ", fx.name); }
                    };
                    note("drop", noticed(&fx, &steps, Some(n), Order::Unchanged).is_some());
                    note("late", noticed(&fx, &steps, None, Order::Late(n)).is_some());
                    match call.last {
                        None => note("nothing", true),
                        Some((change, of)) => {
                            note("early", noticed(&fx, &steps, None, Order::Early { sync: n, change, of }).is_some())
                        }
                    }
                }
            }
        }
    }
    for (site, e) in seen {
        for (what, (all, yes, miss)) in e {
            println!("{site} {what}: {yes} of {all} {}", miss);
        }
    }
}
