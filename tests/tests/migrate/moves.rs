//! Moves that come to their end, and those that are called back.

use nbd_server::control::model::{JobState, MigrationPhase};
use nbd_server::wire::reply::Style;
use ploop_tests::daemon::{Daemon, take, wait_job};
use ploop_tests::holder::Holder;
use ploop_tests::mount::wait_for;
use ploop_tests::store::Rig;
use ploop_tests::tools::ploop_path;
use serde_json::Value;

use super::*;

const GRANULE: u64 = 64 << 10;

fn trackers(rig: &Rig) -> Vec<(String, u64)> {
    let all = rig.json(["tracker", "list", "ct", "--json"]);
    let of = |t: &Value| {
        let name = t["name"].as_str().unwrap().to_owned();
        (name, t["dirty"].as_u64().unwrap())
    };
    all.as_array().unwrap().iter().map(of).collect()
}

/// Goal: nothing of a container is left behind: its state, its snapshots with their names, its quota,
/// limits and trackers; and it can come back. Templates that the other side has are not sent.
#[test]
fn a_container_moves_with_all_that_it_has_and_comes_back() {
    let (a, b) = (Rig::new(), Rig::new());
    store(&a);
    import(&b);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    let mut client = here.open("ct");
    client.write(0, &[1; 4096]);
    take(&here.api(), "ct", "first");
    a.run(["tracker", "start", "ct", "nightly"]);
    client.write(3 * GRANULE, &[2; 8192]);
    take(&here.api(), "ct", "second");
    client.write(5 << 20, &vec![3; 70_000]);
    client.flush();
    client.disconnect();
    a.run(["set", "ct", "--quota", "64M", "--iops", "10000"]);
    let shown = content(&here, "ct");
    let (first, second) = (content(&here, "ct@first"), content(&here, "ct@second"));
    let dirty = trackers(&a);
    assert_eq!(dirty, [("nightly".to_owned(), 3 * GRANULE)]);
    let limits = a.json(["info", "ct", "--json"]);
    let names = |rig: &Rig| {
        let list = rig.json(["snapshot", "list", "ct", "--json"]);
        let list = list.as_array().unwrap().iter();
        let mut names: Vec<_> = list.map(|s| s["name"].clone().to_string()).collect();
        names.sort();
        names
    };
    let named = names(&a);

    let moved = a.json(["migrate", "ct", &address(&b), "--json"]);
    let moved = &moved["migration"]["moved"];
    assert!(
        moved["bytes"].as_u64().unwrap() < 2 << 20,
        "the template was sent: {moved}"
    );
    a.refused(3, ["info", "ct"], &["ct"]);
    // The move's own snapshot, which is charged, too, is merged away.
    merged(&there);
    for (export, bytes) in [("ct", &shown), ("ct@first", &first), ("ct@second", &second)] {
        assert!(content(&there, export) == *bytes, "{export}");
    }
    assert_eq!(trackers(&b), dirty);
    let now = b.json(["info", "ct", "--json"]);
    for key in ["limits", "size"] {
        assert_eq!(now[key], limits[key], "{key}");
    }
    for key in ["quota", "charged"] {
        assert_eq!(now["quota"][key], limits["quota"][key], "{key}");
    }
    assert_eq!(names(&b), named);
    // It is an ordinary container there.
    let mut client = there.open("ct");
    client.write(9 << 20, &[4; 4096]);
    client.flush();
    client.disconnect();
    assert_eq!(trackers(&b)[0].1, 4 * GRANULE);
    b.run(["snapshot", "switch", "ct", "first"]);
    assert!(content(&there, "ct") == first);
    b.run(["migrate", "ct", &address(&a), "--as", "back"]);
    assert!(content(&here, "back") == first);
    assert!(content(&here, "back@second") == second);
    b.refused(3, ["info", "ct"], &["ct"]);
    there.stop();
    merged(&here);
    here.stop();
    a.run(["check", a.root().join("containers/back").to_str().unwrap()]);
}

/// Goal: the sides need no socket in common. Method: a command that speaks for the other service, as
/// ssh would run it.
#[test]
fn a_container_moves_through_a_command() {
    let (a, b) = (Rig::new(), Rig::new());
    let bytes = store(&a);
    let (_here, there) = (Daemon::start(&a), Daemon::start(&b));
    let command = format!(
        "exec:{} --root {} migrate-receive",
        ploop_path().display(),
        b.root().display()
    );
    a.run(["migrate", "ct", &command, "--as", "moved"]);
    assert!(content(&there, "moved") == bytes);
    // A command that fails says why.
    a.run(["create", "ct", "--template", "base"]);
    let fails = "exec:echo the host is unknown >&2; exit 3";
    a.refused(1, ["migrate", "ct", fails], &["the host is unknown"]);
    assert!(content(&_here, "ct") == bytes);
}

/// Goal: without a service at the source the command itself moves what nobody uses.
#[test]
fn a_container_that_nobody_serves_moves() {
    let (a, b) = (Rig::new(), Rig::new());
    let bytes = store(&a);
    let there = Daemon::start(&b);
    a.run(["migrate", "ct", &address(&b)]);
    assert!(content(&there, "ct") == bytes);
    a.refused(3, ["info", "ct"], &["ct"]);
}

/// Goal: called back at any time, the source goes on as if nothing had been, nothing is left at the
/// destination, and the next try succeeds.
#[test]
fn a_move_that_is_called_back_leaves_nothing() {
    let (a, b) = (Rig::new(), Rig::new());
    let mut bytes = store(&a);
    import_other(&b, 8);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    let before = b.listing();
    let mut client = here.open("ct");
    for (round, phase) in [MigrationPhase::Tree, MigrationPhase::Freeze]
        .into_iter()
        .enumerate()
    {
        let id = begin(&here, &address(&b), |m| {
            m.rate = (phase == MigrationPhase::Tree).then_some(1 << 20);
            m.freeze = true;
        });
        wait_job(&here.api(), id, "its phase", |j| {
            j.migration
                .as_ref()
                .is_some_and(|m| m.phase == phase && m.sent > 0)
        });
        // Its tree stays as it is meanwhile.
        a.refused(
            5,
            ["snapshot", "create", "ct", "--name", "no"],
            &["being moved"],
        );
        client.write((round as u64) << 16, &[9; 4096]);
        bytes[round << 16..][..4096].fill(9);
        let path = resource(&["jobs", &id.to_string(), "cancel"]);
        let _: Job = here.api().post(&path, &serde_json::json!({})).unwrap();
        let job: Job = here.api().wait(id, |_| ()).unwrap();
        assert_eq!(job.state, JobState::Cancelled);
        assert_eq!(client.read((round as u64) << 16, 4096), [9; 4096]);
        // It notices the end of the link by itself.
        wait_for("nothing of it at the destination", || is_empty(&b));
        wait_for("the same files at the destination", || {
            b.listing() == before
        });
    }
    a.run(["snapshot", "create", "ct", "--name", "yes"]);
    client.disconnect();
    a.run(["migrate", "ct", &address(&b)]);
    assert!(content(&there, "ct") == bytes);
    wait_for("the moves' own snapshots are merged away", || {
        let tree = b.json(["tree", "ct", "--json"]);
        // The template's layer, `yes`, and the top.
        tree["nodes"].as_array().unwrap().len() == 3
    });
}

/// Goal: what cannot move is refused by name, before anything is done.
#[test]
fn what_cannot_move_is_refused_by_name() {
    let (a, b) = (Rig::new(), Rig::new());
    store(&a);
    store(&b);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    let (in_a, in_b) = (content(&here, "ct"), content(&there, "ct"));
    a.refused(
        4,
        ["migrate", "ct", &address(&b)],
        &["there is a container ct", "--as"],
    );
    a.refused(3, ["migrate", "none", &address(&b)], &["none"]);
    a.refused(2, ["migrate", "ct", "ftp:there"], &["ftp:there"]);
    a.refused(
        2,
        ["migrate", "ct", &address(&b), "--as", "../up"],
        &["../up"],
    );
    a.refused(2, ["migrate", "ct"], &["DEST"]);
    a.refused(
        2,
        ["migrate", "ct", "--resolve", "take"],
        &["nothing is to be decided"],
    );
    let nobody = format!("unix:{}", b.path("nobody.sock").display());
    a.refused(3, ["migrate", "ct", &nobody], &["nobody.sock"]);
    let far = ["migrate", "ct", "tcp:192.0.2.1:7"];
    a.refused(9, far, &["--tls-cert"]);
    let holder = b.arg("no-holder.sock");
    let args = [
        "migrate",
        "ct",
        &address(&b),
        "--as",
        "x",
        "--holder",
        &holder,
        "--holder-to",
        "unix:/x",
    ];
    a.refused(3, args, &["no-holder.sock"]);
    assert!(content(&here, "ct") == in_a && content(&there, "ct") == in_b);
    here.stop();
    there.stop();
}

/// Goal: the client's connection outlives the disk's move, and both ways of asking know it.
#[test]
fn a_held_client_notices_nothing() {
    let (a, b) = (Rig::new(), Rig::new());
    let mut bytes = store(&a);
    let (_here, there) = (Daemon::start(&a), Daemon::start(&b));
    let holder = Holder::start(&nbd(&a), &[]);
    let mut client = holder.open("ct", Style::Extended);
    client.write(4096, &[5; 4096]);
    bytes[4096..8192].fill(5);
    let holder_to = nbd(&b);
    let control = holder.control();
    a.run([
        "migrate",
        "ct",
        &address(&b),
        "--holder",
        control.to_str().unwrap(),
        "--holder-to",
        &holder_to,
    ]);
    // Not flushed before the move, and nothing was lost by it: it is not sent again.
    assert_eq!(client.read(0, 16384), bytes[..16384]);
    client.write(8192, &[6; 4096]);
    client.flush();
    client.disconnect();
    bytes[8192..12288].fill(6);
    assert!(content(&there, "ct") == bytes);
}

/// Goal: what is inside can be made consistent for the hand-over, and is never left frozen. Method:
/// commands that leave a trace, that fail, and that take too long.
#[test]
fn what_is_frozen_for_a_move_is_thawed() {
    let (a, b) = (Rig::new(), Rig::new());
    let mut bytes = store(&a);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    let log = a.path("log");
    let trace = |what: &str| format!("echo {what} >> {}", log.display());
    let said = || fs::read_to_string(&log).unwrap_or_default();
    let dest = address(&b);
    let migrate = |freeze: &str, more: &[&str]| {
        let thaw = trace("thaw");
        let mut command = a.ploop();
        command.args(["migrate", "ct", &dest, "--freeze", freeze, "--thaw", &thaw]);
        command.args(more).output().unwrap()
    };
    let failed = migrate("exit 3", &[]);
    let text = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(
        !failed.status.success() && text.contains("exit code 3"),
        "{text}"
    );
    assert_eq!(said(), "thaw\n");
    assert!(content(&here, "ct") == bytes, "it goes on where it was");
    let late = migrate("sleep 60", &["--hook-timeout", "5"]);
    assert!(!late.status.success(), "{late:?}");
    assert_eq!(said(), "thaw\nthaw\n");
    assert!(content(&here, "ct") == bytes);

    // What is written before the freeze ends, by the freeze itself, moves too.
    let written = format!(
        "{}; qemu-io -f raw -c 'write -P 102 8192 4096' -c flush '{}'",
        trace("freeze"),
        here.uri("ct")
    );
    let moved = migrate(&written, &[]);
    assert!(moved.status.success(), "{moved:?}");
    assert_eq!(said(), "thaw\nthaw\nfreeze\nthaw\n");
    bytes[8192..12288].fill(b'f');
    assert!(content(&there, "ct") == bytes);
}

/// Goal: who asks for it has the files of what moved, and nobody takes them for the container.
#[test]
fn what_is_kept_is_not_opened() {
    let (a, b) = (Rig::new(), Rig::new());
    let bytes = store(&a);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    a.run(["migrate", "ct", &address(&b), "--keep"]);
    assert!(content(&there, "ct") == bytes);
    a.refused(5, ["snapshot", "create", "ct"], &["was given"]);
    a.refused(5, ["rm", "ct"], &["was given"]);
    here.stop();
    let _here = Daemon::start(&a);
    a.refused(5, ["snapshot", "create", "ct"], &["was given"]);
    let given = a.json(["migrate", "ct", "--resolve", "give", "--json"]);
    assert_eq!(given["owned"], false);
    a.refused(3, ["info", "ct"], &["ct"]);
    assert!(content(&there, "ct") == bytes);
}
