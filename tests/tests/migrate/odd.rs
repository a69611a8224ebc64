//! Services that stop, hang, or are full, and moves that are in each other's way.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use nbd_server::control::model::MigrationPhase;
use ploop_tests::daemon::{Daemon, wait_job};
use ploop_tests::mount::{Filler, Mounted, wait_for};

use super::proxy::{Flow, PREPARE, Proxy};
use super::sides::{Side, look, moved, settled};
use super::*;

fn pair() -> (Side, Side, Vec<u8>) {
    let (mut source, mut destination) = (Side::new(), Side::new());
    let bytes = store(&source.rig);
    import_other(&destination.rig, 8);
    source.start();
    destination.start();
    (source, destination, bytes)
}

/// Begins a move that stays in this phase.
fn stays_in(source: &Side, to: &str, phase: MigrationPhase) -> u64 {
    let id = begin(source.here(), to, |m| {
        m.rate = (phase == MigrationPhase::Tree).then_some(1 << 20);
        m.freeze = true;
    });
    wait_job(&source.here().api(), id, "its phase", |j| {
        j.migration
            .as_ref()
            .is_some_and(|m| m.phase == phase && m.sent > 0)
    });
    id
}

/// Goal: neither a move nor somebody who says nothing keeps a service from its end; the source has it
/// then, and nothing is left at the destination.
#[test]
fn a_service_stops_while_a_container_moves() {
    for phase in [MigrationPhase::Tree, MigrationPhase::Freeze] {
        for at_source in [true, false] {
            let (mut source, mut destination, bytes) = pair();
            let _silent = UnixStream::connect(socket(&destination.rig)).unwrap();
            stays_in(&source, &address(&destination.rig), phase);
            let side = match at_source {
                true => &mut source,
                false => &mut destination,
            };
            // Which takes no longer than a test waits for it.
            side.daemon.take().unwrap().stop();
            side.start();
            assert!(!settled(&source, &destination), "{phase:?} {at_source}");
            look(&source, &destination);
            assert!(content(source.here(), "ct") == bytes);
        }
    }
}

/// Goal: clients of a move whose destination hangs in the hand-over go on at the source.
#[test]
fn a_destination_that_hangs_in_the_hand_over_is_waited_for_in_vain() {
    let (source, destination, mut bytes) = pair();
    let proxy = Proxy::new(&socket(&destination.rig));
    proxy.stop_at(PREPARE, Flow::Hold);
    let mut client = source.here().open("ct");
    let id = begin(source.here(), &proxy.address(), |_| ());
    let began = Instant::now();
    while source.state() != "offered" {
        assert!(began.elapsed().as_secs() < 30);
    }
    client.write(0, &[4; 4096]);
    bytes[..4096].fill(4);
    println!("a write waited for {:?}", began.elapsed());
    source.here().api().wait(id, |_| ()).unwrap_err();
    client.disconnect();
    proxy.open();
    proxy.cut();
    assert!(!settled(&source, &destination));
    assert!(content(source.here(), "ct") == bytes);
}

/// Goal: a destination that has no room says so, and the source goes on.
#[test]
fn a_destination_that_is_full_says_so() {
    let mut source = Side::new();
    let bytes = store(&source.rig);
    source.start();
    let room = Mounted::tmpfs(48 << 20);
    let there = Rig::new().with_root(&room.path().join("store"));
    import_other(&there, 8);
    let _full = Filler::new(room.path(), 4 << 20);
    let _there = Daemon::start(&there);
    source
        .rig
        .refused(8, ["migrate", "ct", &address(&there)], &["space"]);
    assert!(content(source.here(), "ct") == bytes);
    assert_eq!(source.state(), "none");
    let left = || {
        fs::read_dir(there.root().join("containers"))
            .unwrap()
            .count()
    };
    wait_for("nothing left", || left() == 0);
}

#[test]
fn moves_in_each_others_way_end_all_the_same() {
    let (source, destination, bytes) = pair();
    let (a, b) = (&source.rig, &destination.rig);
    // Twice at once: one of them moves it, and the other finds none.
    let ids = [0, 1].map(|_| begin(source.here(), &address(b), |_| ()));
    let api = source.here().api();
    let done = ids.map(|id| api.wait(id, |_| ()).is_ok());
    assert_eq!(done.iter().filter(|d| **d).count(), 1, "{done:?}");
    assert!(content(destination.here(), "ct") == bytes);
    // In both directions at once, under one name and under others.
    a.run(["template", "rm", "base"]);
    import_other(a, 9);
    a.run(["create", "ct", "--template", "base"]);
    let other = content(source.here(), "ct");
    let both = |name: Option<&str>| {
        let sides = [(&source, address(b)), (&destination, address(a))];
        let ids = sides.map(|(from, to)| {
            let id = begin(from.here(), &to, |m| m.name = name.map(str::to_owned));
            (from.here().api(), id)
        });
        ids.map(|(api, id)| api.wait(id, |_| ()).is_ok())
    };
    assert_eq!(both(None), [false, false]);
    assert!(content(source.here(), "ct") == other);
    assert!(content(destination.here(), "ct") == bytes);
    assert_eq!(both(Some("new")), [true, true]);
    assert!(content(source.here(), "new") == bytes);
    assert!(content(destination.here(), "new") == other);
    // To itself: as what it is called, and as another.
    a.run(["create", "ct", "--template", "base"]);
    a.refused(
        4,
        ["migrate", "ct", &address(a)],
        &["there is a container ct"],
    );
    moved(&source, &address(a), |m| m.name = Some("self".into()));
    assert!(content(source.here(), "self") == other);
    assert!(!source.has("ct"));
}

/// Goal: who comes when a service has enough to do is told so, and comes later.
#[test]
fn who_is_too_many_is_told_so() {
    let (source, destination, bytes) = pair();
    let to = address(&destination.rig);
    let others: Vec<_> = (0..32)
        .map(|_| UnixStream::connect(socket(&destination.rig)).unwrap())
        .collect();
    let args = ["migrate", "ct", &to];
    source.rig.refused(5, args, &["32 moves", "Try again"]);
    look(&source, &destination);
    drop(others);
    wait_for("the others' end", || {
        source.rig.ploop().args(args).status().unwrap().success()
    });
    assert!(content(destination.here(), "ct") == bytes);
}
