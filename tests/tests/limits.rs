//! I/O limits with the real binaries: who waits, who does not, and that nothing is left behind.
//!
//! A limit of one byte per second makes requests wait for hours. What a test expects to go on goes
//! on while they wait; what it expects to wait is never answered before the limit is changed. No
//! time is measured.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::io::Write;
use std::time::Duration;

use nbd_server::control::client::resource;
use nbd_server::control::model::{Connection, Export, Limits, LimitsChange};
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::kind;
use ploop_tests::client::{Ask, Client, read_replies};
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::mount::wait_for;
use ploop_tests::store::Rig;

fn limits(daemon: &Daemon, container: &str) -> Limits {
    daemon
        .api()
        .get(&resource(&["containers", container, "limits"]))
        .unwrap()
}

fn waiting(daemon: &Daemon, container: &str) -> u64 {
    limits(daemon, container).waiting
}

/// Sends requests and does not wait for their answers.
fn send(client: &mut Client, asks: &[Ask]) {
    let mut bytes = Vec::new();
    for (cookie, ask) in asks.iter().enumerate() {
        ask.emit(Style::Structured, cookie as u64, &mut bytes);
    }
    client.socket.write_all(&bytes).unwrap();
}

/// Uses up a container's limit of writes and has `count` more wait.
fn throttle(rig: &Rig, daemon: &Daemon, client: &mut Client, count: usize) -> Vec<Ask> {
    rig.run(["set", "ct", "--write-bps", "1"]);
    client.write(0, &[1; 4096]);
    let asks: Vec<_> = (1..=count as u64)
        .map(|i| Ask::write(0, i * 4096, &[2; 4096]))
        .collect();
    send(client, &asks);
    wait_for("the writes to wait", || {
        waiting(daemon, "ct") == count as u64
    });
    asks
}

#[test]
fn limits_are_set_while_a_container_runs_shown_and_kept() {
    let rig = Rig::new();
    rig.small_template("t", &["ct", "other"]);
    // Nobody serves it.
    rig.run([
        "set",
        "ct",
        "--iops",
        "500",
        "--read-bps",
        "10M",
        "--burst",
        "2s",
    ]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    client.write(0, &[1; 4096]);
    // The daemon does.
    let set = rig.run([
        "set",
        "ct",
        "--write-iops",
        "7000",
        "--ioprio",
        "6",
        "--iops",
        "none",
    ]);
    let info = rig.run(["info", "ct"]);
    for text in [&set, &info] {
        let want = "limits    write-iops 7000, read-bps 10M, burst 2000 ms; priority 6";
        assert!(text.contains(want), "{text}");
    }
    let stored = limits(&daemon, "ct");
    assert_eq!(
        rig.json(["info", "ct", "--json"])["limits"]["write_iops"],
        7000
    );
    let metrics = daemon.api().text("/metrics").unwrap();
    for line in [
        "ploop_limit_iops{container=\"ct\",op=\"write\"} 7000\n",
        "ploop_limit_bytes_per_second{container=\"ct\",op=\"read\"} 10485760\n",
        "ploop_throttled_requests_total{container=\"ct\"} 0\n",
        "ploop_store_limit_iops 0\n",
    ] {
        assert!(metrics.contains(line), "{line}{metrics}");
    }
    assert!(
        rig.run(["info", "other"])
            .contains("limits    none; priority 4")
    );
    // Killed, and started again.
    daemon.kill();
    let daemon = Daemon::start(&rig);
    let again = limits(&daemon, "ct");
    let of = |l: &Limits| (l.write_iops, l.read_bps, l.burst_ms, l.priority, l.iops);
    assert_eq!(of(&again), (7000, 10 << 20, 2000, 6, 0));
    assert_eq!(of(&again), of(&stored));
    daemon.open("ct").read(0, 4096);
    assert_eq!(of(&limits(&daemon, "ct")), of(&stored));
    // A clone begins without; a rollback and a snapshot change nothing.
    take(&daemon.api(), "ct", "one");
    rig.run(["create", "clone", "--from", "ct@one"]);
    let clone = limits(&daemon, "clone");
    assert_eq!(of(&clone), (0, 0, 100, 4, 0));
    rig.run(["snapshot", "switch", "ct", "one"]);
    assert_eq!(of(&limits(&daemon, "ct")), of(&stored));
    daemon.stop();
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    rig.refused(2, ["set", "ct"], &["nothing is to be set"]);
    for bad in [
        &["--iops", "0"][..],
        &["--iops", "-1"],
        &["--bps", "fast"],
        &["--ioprio", "8"],
        &["--burst", "1ms"],
    ] {
        let mut command = rig.ploop();
        let out = command.args(["set", "ct"]).args(bad).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{bad:?}");
    }
    rig.refused(3, ["set", "nope", "--iops", "1"], &["nope"]);
    let path = resource(&["containers", "ct", "limits"]);
    for (change, word) in [
        (
            LimitsChange {
                priority: Some(9),
                ..LimitsChange::default()
            },
            "priority",
        ),
        (
            LimitsChange {
                bps: Some(u64::MAX),
                iops: Some(5),
                ..LimitsChange::default()
            },
            "highest",
        ),
    ] {
        let refused = daemon.api().patch::<Limits>(&path, &change).unwrap_err();
        assert!(refused.to_string().contains(word), "{refused}");
    }
    let now = limits(&daemon, "ct");
    assert_eq!((now.iops, now.priority), (0, 4));
    daemon.stop();
}

/// Goal: what waits holds up nobody: not the container's own flush and reads, not others. Method:
/// writes that wait for hours, and all of that beside them; then the limit goes, and they happen.
#[test]
fn writes_that_wait_hold_up_no_flush_no_read_and_nobody_else() {
    for engine in ["inline", "portable", "uring"] {
        let rig = Rig::new();
        rig.small_template("t", &["ct", "other"]);
        let daemon = Daemon::with(&rig, &["--engine", engine]);
        let (mut client, mut second) = (daemon.open("ct"), daemon.open("ct"));
        let mut other = daemon.open("other");
        let asks = throttle(&rig, &daemon, &mut client, 20);
        // On the same connection: cookies of their own.
        let mut bytes = Vec::new();
        Ask::new(kind::FLUSH, 0, 0..0).emit(Style::Structured, 100, &mut bytes);
        client.socket.write_all(&bytes).unwrap();
        let cookie = client.next_answered();
        assert_eq!(cookie, 100, "{engine}: the flush is answered first");
        second.flush();
        assert_eq!(second.read(0, 4096), [1; 4096]);
        assert_ne!(second.read(4096, 4096), [2; 4096]);
        other.write(0, &vec![3; 1 << 20]);
        other.flush();
        assert_eq!(other.read(0, 1 << 20), vec![3; 1 << 20]);
        assert_eq!(waiting(&daemon, "ct"), 20);
        rig.run(["set", "ct", "--write-bps", "none"]);
        let replies = read_replies(&mut client.socket, &asks).unwrap();
        assert!(replies.iter().all(|r| r.error == 0));
        assert_eq!(client.read(4096, 20 * 4096), vec![2; 20 * 4096]);
        let after = limits(&daemon, "ct");
        assert_eq!((after.throttled_requests, after.waiting), (20, 0));
        assert!(after.throttled_seconds > 0.0);
        daemon.stop();
        assert!(rig.run(["check", "ct"]).contains("clean"));
    }
}

/// Goal: a client that is gone leaves nothing: not its requests, not the export. Method: it is cut
/// off in each way there is while its writes wait, with its window full and not.
#[test]
fn who_goes_while_his_writes_wait_leaves_nothing() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let open = || {
        let all: Vec<Export> = daemon.api().get("/v1/exports").unwrap();
        all.iter().any(|e| e.name == "ct" && e.open)
    };
    for count in [5, 128] {
        for way in ["close", "disconnect", "end", "switch", "violate"] {
            rig.run(["set", "ct", "--write-bps", "none"]);
            let mut client = daemon.open("ct");
            if way == "switch" && count == 5 {
                take(&daemon.api(), "ct", "one");
            }
            throttle(&rig, &daemon, &mut client, count);
            match way {
                "close" => drop(client),
                "disconnect" => {
                    let disconnect = Ask::new(kind::DISC, 0, 0..0);
                    send(&mut client, &[disconnect]);
                    drop(client);
                }
                "end" => {
                    let all: Vec<Connection> = daemon.api().get("/v1/connections").unwrap();
                    let path = resource(&["connections", &all[0].id.to_string()]);
                    daemon.api().delete::<Connection>(&path).unwrap();
                    assert!(client.is_closed());
                }
                "switch" => {
                    rig.run(["snapshot", "switch", "ct", "one", "--force"]);
                    assert!(client.is_closed());
                }
                _ => {
                    client.socket.write_all(&[0xEE; 64]).unwrap();
                    // A full window does not read on; then it is the close that ends it.
                    if count < 128 {
                        assert!(client.is_closed());
                    }
                    drop(client);
                }
            }
            wait_for("the export to be closed", || !open());
            assert_eq!(waiting(&daemon, "ct"), 0, "{way} {count}");
            rig.run(["set", "ct", "--write-bps", "none"]);
            let mut after = daemon.open("ct");
            assert_ne!(
                after.read(8192, 4096),
                [2; 4096],
                "{way}: never answered, never done"
            );
            after.write(0, &[9; 4096]);
        }
    }
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
}

#[test]
fn a_server_that_stops_waits_for_no_turn() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    for count in [5, 128] {
        let daemon = Daemon::start(&rig);
        let mut client = daemon.open("ct");
        let asks = throttle(&rig, &daemon, &mut client, count);
        daemon.stop();
        // All that it took was done and answered.
        let replies = read_replies(&mut client.socket, &asks).unwrap();
        assert!(replies.iter().all(|r| r.error == 0));
        assert!(rig.run(["check", "ct"]).contains("clean"));
        rig.run(["set", "ct", "--write-bps", "none"]);
    }
}

/// Goal: what waits is in the way of no operation on the tree. Method: all of them while writes
/// wait; then these happen, on top of it all.
#[test]
fn the_tree_changes_while_writes_wait() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    client.write(0, &vec![7; 1 << 20]);
    take(&daemon.api(), "ct", "one");
    let asks = throttle(&rig, &daemon, &mut client, 20);
    take(&daemon.api(), "ct", "two");
    rig.run(["create", "clone", "--from", "ct@two"]);
    take(&daemon.api(), "ct", "three");
    rig.run(["snapshot", "delete", "ct", "three"]);
    rig.run(["snapshot", "delete", "ct", "one"]);
    rig.run(["snapshot", "merge", "ct", "--continue"]);
    assert_eq!(waiting(&daemon, "ct"), 20);
    rig.run(["set", "ct", "--write-bps", "none"]);
    let replies = read_replies(&mut client.socket, &asks).unwrap();
    assert!(replies.iter().all(|r| r.error == 0));
    assert_eq!(client.read(4096, 20 * 4096), vec![2; 20 * 4096]);
    assert_eq!(
        daemon.open("ct@two").read(0, 8192),
        [[1; 4096], [7; 4096]].concat()
    );
    drop(client);
    daemon.stop();
    for disk in ["ct", "clone"] {
        assert!(rig.run(["check", disk]).contains("clean"), "{disk}");
    }
    rig.run(["rm", "clone", "ct"]);
}

#[test]
fn a_service_of_one_disk_takes_limits_too() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let served = rig.serve(["ct"]);
    let mut client = Client::open(served.socket(), "ct", Style::Structured);
    rig.run(["set", "ct", "--write-bps", "1"]);
    client.write(0, &[1; 4096]);
    let asks = [Ask::write(0, 4096, &[2; 4096])];
    send(&mut client, &asks);
    let shown = || rig.json(["info", "ct", "--json"])["limits"].clone();
    wait_for("the write to wait", || shown()["waiting"] == 1);
    rig.run(["set", "ct", "--write-bps", "none", "--ioprio", "0"]);
    let replies = read_replies(&mut client.socket, &asks).unwrap();
    assert_eq!(replies[0].error, 0);
    drop(client);
    served.stop();
    assert_eq!(
        (&shown()["write_bps"], &shown()["priority"]),
        (&0.into(), &0.into())
    );
}

/// The budget of a store holds everybody, also who has no limit; each gets on.
#[test]
fn a_budget_of_the_store_is_shared() {
    let rig = Rig::new();
    rig.small_template("t", &["a", "b"]);
    let daemon = Daemon::with(&rig, &["--iops", "400", "--bps", "1G"]);
    let metrics = daemon.api().text("/metrics").unwrap();
    assert!(
        metrics.contains("ploop_store_limit_iops 400\n"),
        "{metrics}"
    );
    let mut clients = [
        daemon.open("a"),
        daemon.open("b"),
        daemon.open("template:t"),
    ];
    let asks: Vec<_> = (0..100u64)
        .map(|i| Ask::new(kind::READ, 0, i * 4096..(i + 1) * 4096))
        .collect();
    for client in &mut clients {
        client
            .socket
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        send(client, &asks);
    }
    for client in &mut clients {
        let replies = read_replies(&mut client.socket, &asks).unwrap();
        assert!(replies.iter().all(|r| r.error == 0));
    }
    // More than may be saved up: somebody waited.
    assert!(limits(&daemon, "a").throttled_requests + limits(&daemon, "b").throttled_requests > 0);
    daemon.stop();
}
