//! The daemon as its users meet it: exports that come and go, operations asked from elsewhere, jobs,
//! who is refused and why.

#![allow(clippy::unwrap_used)]

mod backup;
mod diff;
mod jobs;

use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use nbd_server::control::client::resource;
use nbd_server::control::model::{GroupSnapshot, SnapshotTaken};
use nbd_server::export::Disks;
use nbd_server::wire::reply::Style;
use ploop::device::Device;
use ploop_tests::client::Client;
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::mount::wait_for;
use ploop_tests::server::out;
use ploop_tests::store::Rig;
use snapshots::Root;

/// The names of the exports, as nbdinfo lists them.
fn listed(daemon: &Daemon) -> Vec<String> {
    let text = out("nbdinfo", &["--list", "--json", &daemon.uri("")]);
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    let all = all["exports"].as_array().unwrap().iter();
    let mut names: Vec<String> = all
        .map(|e| e["export-name"].as_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn exports_come_and_go_with_what_they_are() {
    let rig = Rig::new();
    rig.small_template("t", &[]);
    let daemon = Daemon::start(&rig);
    let steps: &[(&[&str], &[&str])] = &[
        (&["list"], &["template:t"]),
        (
            &["create", "a", "b", "--template", "t"],
            &["a", "b", "template:t"],
        ),
        (
            &["snapshot", "create", "a", "--name", "one"],
            &["a", "a@one", "b", "template:t"],
        ),
        (
            &["snapshot", "rename", "a", "one", "first"],
            &["a", "a@first", "b", "template:t"],
        ),
        (
            &["create", "c", "--from", "a@first"],
            &["a", "a@first", "b", "c", "template:t"],
        ),
        (&["rm", "b"], &["a", "a@first", "c", "template:t"]),
        (
            &["snapshot", "delete", "a", "first"],
            &["a", "c", "template:t"],
        ),
        (&["rm", "a"], &["c", "template:t"]),
        (&["rm", "c"], &["template:t"]),
        (&["template", "rm", "t"], &[]),
    ];
    for (command, want) in steps {
        rig.run(command.iter());
        assert_eq!(listed(&daemon), *want, "after {command:?}");
        assert_eq!(daemon.exports(), *want, "after {command:?}");
        for name in *want {
            daemon.open(name).disconnect();
        }
    }
    let gone = Client::connect(daemon.socket()).go("a").unwrap_err();
    assert!(gone.1.contains("no export 'a'"), "{gone:?}");
    daemon.stop();
}

/// Text without what is different each time: GUIDs, paths, times and sizes on disk.
fn plain(text: &str) -> String {
    let word = |w: &str| {
        let guid = w.len() >= 38 && w.starts_with('{');
        match () {
            () if guid => "GUID".to_owned(),
            () if w.starts_with(|c: char| c.is_ascii_digit()) => "N".to_owned(),
            () if w.starts_with('/') => "PATH".to_owned(),
            () => w.to_owned(),
        }
    };
    let line = |l: &str| l.split_whitespace().map(word).collect::<Vec<_>>().join(" ");
    // After a number, its unit.
    let lines = text.lines().map(line).map(|l| {
        l.replace("N µs", "N")
            .replace("N ms", "N")
            .replace("N s", "N")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Everything that was said, and the exit code.
fn said(out: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| plain(&String::from_utf8_lossy(bytes));
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

/// Goal: whoever has the disk, the command does the same and says the same. Method: the same
/// commands with nobody, with `ploopd` and with `ploop serve` at the disk.
#[test]
fn the_same_is_done_and_said_whoever_holds_the_disk() {
    let commands: &[&[&str]] = &[
        &[
            "snapshot",
            "create",
            "ct",
            "--name",
            "one",
            "--description",
            "the first",
        ],
        &["snapshot", "create", "ct", "--name", "two"],
        &["snapshot", "create", "ct", "--name", "two"],
        &["snapshot", "create", "ct", "--name", "three"],
        &["snapshot", "list", "ct"],
        &["snapshot", "rename", "ct", "two", "zwei"],
        &["snapshot", "describe", "ct", "zwei", "the second"],
        &["snapshot", "list", "ct"],
        &["tree", "ct"],
        &["snapshot", "merge", "ct", "three"],
        &["snapshot", "delete", "ct", "nope"],
        &["snapshot", "delete", "ct", "one"],
        &["snapshot", "merge", "ct"],
        &["snapshot", "merge", "ct"],
        &["snapshot", "merge", "ct", "--continue"],
        &["snapshot", "create", "ct", "--name", "last"],
        // Where a whole store is at hand.
        &["create", "clone", "--from", "ct@last"],
        &["tree", "ct"],
        &["snapshot", "delete", "ct", "last"],
        &["rm", "clone"],
    ];
    let (nobody, daemon, serve) = (Rig::new(), Rig::new(), Rig::new());
    let rigs = [&nobody, &daemon, &serve];
    for rig in rigs {
        rig.small_template("t", &["ct"]);
    }
    let (held, served) = (Daemon::start(&daemon), serve.serve(["ct"]));
    let mut clients = [
        held.open("ct"),
        Client::open(served.socket(), "ct", Style::Structured),
    ];
    let mut in_store = false;
    for command in commands {
        let [alone, by_daemon, by_serve] =
            rigs.map(|rig| said(&rig.ploop().args(*command).output().unwrap()));
        assert_eq!(alone, by_daemon, "{command:?} by ploopd");
        in_store |= command[0] == "create";
        if !in_store {
            assert_eq!(alone, by_serve, "{command:?} by ploop serve");
        }
    }
    for client in &mut clients {
        client.write(0, &[1; 4096]);
        client.flush();
    }
    held.stop();
    served.stop();
    for rig in rigs {
        assert!(rig.run(["check", "ct"]).contains("clean"));
    }
}

/// GUID of the live disk.
fn top(rig: &Rig, container: &str) -> String {
    let tree = rig.json(["tree", container, "--json"]);
    let mut nodes = tree["nodes"].as_array().unwrap().iter();
    let top = nodes.find(|n| n["top"] == true).unwrap();
    top["guid"].as_str().unwrap().to_owned()
}

#[test]
fn a_switch_of_a_disk_in_use_names_the_client_or_ends_it() {
    let rig = Rig::new();
    rig.small_template("t", &["ct", "other"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    let mut other = daemon.open("other");
    client.write(0, &[1; 4096]);
    take(&daemon.api(), "ct", "one");
    client.write(0, &[2; 4096]);
    let switch = ["snapshot", "switch", "ct", "one"];
    let peer = format!("pid {}", std::process::id());
    rig.refused(5, switch, &["in use", &peer, "--force"]);
    // Nor is anybody's connection ended for what cannot be.
    for (code, to) in [(2, top(&rig, "ct").as_str()), (3, "nope")] {
        let switch = ["snapshot", "switch", "ct", to, "--force"];
        rig.refused(code, switch, &[to]);
    }
    // Nobody has noticed.
    assert_eq!(client.read(0, 4096), [2; 4096]);
    let said = rig.run(["snapshot", "switch", "ct", "one", "--force"]);
    assert!(said.contains("1 connections were ended"), "{said}");
    assert!(client.is_closed());
    assert_eq!(daemon.open("ct").read(0, 4096), [1; 4096]);
    // What was abandoned can be opened.
    let kept = daemon
        .exports()
        .into_iter()
        .find(|e| e.starts_with("ct@rollback"));
    assert_eq!(daemon.open(&kept.unwrap()).read(0, 4096), [2; 4096]);
    other.write(0, &[3; 4096]);
    daemon.stop();
}

/// Goal: nobody is told that a disk is in use by a client that has hung up, or by the service itself.
/// Method: clients that leave without a word, with unflushed data that closing the disk must move, and
/// at once what needs the disk for itself.
#[test]
fn who_has_hung_up_is_in_nobodys_way() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    take(&daemon.api(), "ct", "s");
    for round in 0..20u8 {
        for (i, what) in [
            &["set", "ct", "--quota", "1G"][..],
            &["snapshot", "switch", "ct", "s"],
            &["set", "ct", "--iops", "100000"],
            &["snapshot", "describe", "ct", "s", "said"],
            &["compact", "ct"],
        ]
        .into_iter()
        .enumerate()
        {
            let mut client = daemon.open("ct");
            client.write(u64::from(round) << 20, &vec![i as u8 + 1; 2 << 20]);
            drop(client);
            rig.run(what);
        }
    }
    let client = daemon.open("ct@s");
    drop(client);
    rig.run(["snapshot", "delete", "ct", "s"]);
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
}

#[test]
fn a_container_in_use_is_not_removed_unless_by_force() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    client.write(0, &[1; 4096]);
    let peer = format!("pid {}", std::process::id());
    rig.refused(5, ["rm", "ct"], &["in use", &peer, "--force"]);
    client.write(0, &[2; 4096]);
    rig.run(["rm", "ct", "--force"]);
    assert!(client.is_closed());
    assert_eq!(daemon.exports(), ["template:t"]);
    rig.refused(3, ["rm", "ct", "--force"], &["ct"]);
    daemon.stop();
}

/// Goal: nobody's ground is taken away, and who is in the way is named. Method: a client of a
/// snapshot; deleting and merging it, and the one below that it stands on.
#[test]
fn a_snapshot_that_is_exported_is_neither_deleted_nor_merged() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let mut writer = daemon.open("ct");
    for (i, name) in ["one", "two", "three"].iter().enumerate() {
        writer.write(1 << 20, &[i as u8 + 1; 16384]);
        take(&daemon.api(), "ct", name);
    }
    writer.write(1 << 20, &[9; 16384]);
    let mut reader = daemon.open("ct@two");
    let peer = format!("pid {}", std::process::id());
    let refused: &[&[&str]] = &[
        &["snapshot", "delete", "ct", "two"],
        &["snapshot", "merge", "ct", "two"],
        &["snapshot", "merge", "ct", "three"],
        &["snapshot", "delete", "ct", "one"],
    ];
    for args in refused {
        rig.refused(5, args.iter(), &["ct@two", &peer]);
        assert_eq!(reader.read(1 << 20, 16384), [2; 16384], "{args:?}");
    }
    // Nothing of what was refused waits for the client to go.
    assert_eq!(
        daemon.exports(),
        ["ct", "ct@one", "ct@three", "ct@two", "template:t"]
    );
    reader.disconnect();
    for (args, _) in refused.iter().zip(0..1) {
        wait_for("the export's close", || {
            rig.ploop().args(*args).output().unwrap().status.success()
        });
    }
    assert_eq!(daemon.open("ct@three").read(1 << 20, 16384), [3; 16384]);
    assert_eq!(writer.read(1 << 20, 16384), [9; 16384]);
    daemon.stop();
}

#[test]
fn metrics_count_what_happened() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    client.write(0, &[1; 8192]);
    client.read(0, 4096);
    client.flush();
    take(&daemon.api(), "ct", "one");
    rig.run(["snapshot", "delete", "ct", "one"]);
    let text = daemon.api().text("/metrics").unwrap();
    for line in [
        "ploop_export_clients{export=\"ct\"} 1",
        "ploop_requests_total{export=\"ct\",op=\"write\"} 1",
        "ploop_requests_total{export=\"ct\",op=\"read\"} 1",
        "ploop_bytes_total{export=\"ct\",op=\"write\"} 8192",
        "ploop_bytes_total{export=\"ct\",op=\"read\"} 4096",
        "ploop_flushes_total{export=\"ct\"} 1",
        "ploop_errors_total{export=\"ct\"} 0",
        "ploop_snapshot_pause_seconds_count 1",
        "ploop_jobs{state=\"done\"} 1",
        "ploop_open_disks 1",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    daemon.stop();
}

/// Goal: two services never write one disk, and each says who has it. Method: a second `ploopd`, and
/// `ploop serve` of a container and of the store, beside the first.
#[test]
fn two_services_on_one_store_do_not_meet_on_a_disk() {
    let rig = Rig::new();
    rig.small_template("t", &["a", "b"]);
    let daemon = Daemon::start(&rig);
    let mut a = daemon.open("a");
    a.write(0, &[1; 4096]);
    let mut second = ploop_tests::tools::ploopd();
    let out = second.arg("--root").arg(rig.root()).output().unwrap();
    assert_eq!(out.status.code(), Some(5), "{out:?}");
    let pid = daemon.pid().to_string();
    rig.refused(
        5,
        ["serve", "a", "--socket", &rig.arg("s")],
        &["in use", &pid],
    );
    // Beside it, what it has not open.
    let store = rig.serve(["--store"]);
    let taken = Client::connect(store.socket()).go("a").unwrap_err();
    assert!(taken.1.contains("in use"), "{taken:?}");
    let mut b = Client::open(store.socket(), "b", Style::Structured);
    b.write(0, &[2; 4096]);
    let taken = Client::connect(daemon.socket()).go("b").unwrap_err();
    assert!(taken.1.contains("in use"), "{taken:?}");
    // The command finds whoever has it.
    rig.run(["snapshot", "create", "a", "--name", "x"]);
    rig.run(["snapshot", "create", "b", "--name", "x"]);
    // No one process can stop both.
    rig.refused(
        5,
        ["snapshot", "create", "a", "b", "--group", "--name", "g"],
        &["in use"],
    );
    assert_eq!(
        (a.read(0, 4096), b.read(0, 4096)),
        (vec![1; 4096], vec![2; 4096])
    );
    store.stop();
    daemon.stop();
}

/// Goal: a group's snapshots are of one instant. Method: a client writes a counter to three disks
/// in turn, each answered before the next; at any instant the first is ahead of the last by one at
/// most. Every group that is taken meanwhile must show that.
#[test]
fn a_group_is_one_instant_of_three_disks() {
    const DISKS: [&str; 3] = ["a", "b", "c"];
    let rig = Rig::new();
    rig.small_template("t", &DISKS);
    let daemon = Daemon::start(&rig);
    let stop = AtomicBool::new(false);
    let counter =
        |client: &mut Client| u64::from_le_bytes(*client.read(0, 4096)[..].first_chunk().unwrap());
    std::thread::scope(|scope| {
        let mut clients = DISKS.map(|d| daemon.open(d));
        for client in &mut clients {
            client.write(0, &[0; 4096]);
        }
        let writer = scope.spawn(|| {
            let mut clients = DISKS.map(|d| daemon.open(d));
            let mut n = 0u64;
            while !stop.load(SeqCst) {
                n += 1;
                for client in &mut clients {
                    let mut block = [0; 4096];
                    block[..8].copy_from_slice(&n.to_le_bytes());
                    client.write(0, &block);
                }
            }
            n
        });
        let api = daemon.api();
        for i in 0..20 {
            let group = GroupSnapshot {
                // In no particular order.
                containers: [DISKS[i % 3], DISKS[(i + 1) % 3], DISKS[(i + 2) % 3]]
                    .map(str::to_owned)
                    .to_vec(),
                name: Some(format!("g{i}")),
                ..GroupSnapshot::default()
            };
            let taken: Vec<SnapshotTaken> =
                api.post(&resource(&["group-snapshots"]), &group).unwrap();
            assert_eq!(taken.len(), 3);
        }
        // By the command, too.
        rig.run([
            "snapshot", "create", "--group", "a", "b", "c", "--name", "g20",
        ]);
        stop.store(true, SeqCst);
        let last = writer.join().unwrap();
        assert!(last > 0);
    });
    let mut before = 0;
    for i in 0..=20 {
        let [a, b, c] = DISKS.map(|d| counter(&mut daemon.open(&format!("{d}@g{i}"))));
        assert!(a >= b && b >= c && a <= c + 1, "g{i}: {a} {b} {c}");
        assert!(c >= before, "g{i} is older than the one before");
        before = c;
    }
    // All or none.
    rig.refused(
        4,
        ["snapshot", "create", "--group", "a", "b", "--name", "g3"],
        &["already"],
    );
    take(&daemon.api(), "b", "only");
    rig.refused(
        4,
        [
            "snapshot", "create", "--group", "a", "b", "c", "--name", "only",
        ],
        &["only"],
    );
    assert!(
        !daemon
            .exports()
            .iter()
            .any(|e| e == "a@only" || e == "c@only")
    );
    daemon.stop();
}

/// Goal: what was answered is in the files when a service has ended in order, whoever was the last to look
/// at a disk. Method: a thread that lets go of one while the service waits for the end of all.
#[test]
fn a_service_ends_behind_the_close_of_its_last_disk() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let disks = Disks::new(Root::open(rig.root(), false).unwrap(), false);
    let open = disks.live("ct").unwrap();
    open.write(4096, &[7; 4096]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            drop(open);
        });
        disks.wait_all_closed().unwrap();
        assert!(rig.run(["check", "ct"]).contains("clean"));
    });
}
