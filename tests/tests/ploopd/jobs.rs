//! Jobs: seen, cancelled, cut and gone on with.

use std::process::{Child, Stdio};

use nbd_server::control::client::resource;
use nbd_server::control::model::{Job, JobState};
use ploop_tests::client::Client;
use ploop_tests::daemon::{Daemon, take, wait_job};
use ploop_tests::mount::wait_for;
use ploop_tests::server::pattern;
use ploop_tests::store::Rig;

/// Where the data is.
const FIRST: u64 = 10 << 20;

/// A container whose snapshot `one` takes a while to be merged away at [`RATE`]: 24 MiB move,
/// whichever way.
fn slow(rig: &Rig) -> Vec<u8> {
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(rig);
    let mut client = daemon.open("ct");
    let data = pattern(48 << 20, 5);
    take(&daemon.api(), "ct", "zero");
    for (i, piece) in data.chunks(1 << 20).enumerate() {
        if i == 24 {
            take(&daemon.api(), "ct", "one");
        }
        client.write(FIRST + ((i as u64) << 20), piece);
    }
    take(&daemon.api(), "ct", "two");
    client.flush();
    client.disconnect();
    daemon.stop();
    data
}

/// A merge that would take minutes.
const RATE: &str = "128K";

fn slow_merge(rig: &Rig) -> Child {
    let mut command = rig.ploop();
    command.args(["snapshot", "merge", "ct", "two", "--rate", RATE]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until the merge has moved something, and has not ended.
fn under_way(daemon: &Daemon) -> u64 {
    let mut id = 0;
    wait_for("the job", || {
        let jobs = daemon.jobs();
        let job = jobs
            .iter()
            .find(|j| j.state == JobState::Running && j.done > 0);
        id = job.map_or(0, |j| j.id);
        id > 0
    });
    id
}

fn assert_data(client: &mut Client, data: &[u8]) {
    for (i, piece) in data.chunks(1 << 20).enumerate() {
        assert_eq!(
            client.read(FIRST + ((i as u64) << 20), 1 << 20),
            piece,
            "MiB {i}"
        );
    }
}

/// Goal: a merge that is cancelled pauses, says how it goes on, and does; everything reads right at
/// every point. Method: a slow one, cancelled; then `--continue`.
#[test]
fn a_cancelled_merge_pauses_and_goes_on() {
    let rig = Rig::new();
    let data = slow(&rig);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    let merge = slow_merge(&rig);
    let id = under_way(&daemon);
    let jobs = rig.run(["jobs"]);
    assert!(jobs.contains("merge") && jobs.contains("running"), "{jobs}");
    assert_data(&mut client, &data);
    // It is in the way of what needs the disk for itself, and not its clients, who are told of later.
    let fix = ["a job works on ct", "ploop jobs"];
    rig.refused(5, ["resize", "ct", "40M", "--shrink"], &fix);
    // A snapshot does not wait for it.
    take(&daemon.api(), "ct", "meanwhile");
    let cancelled = rig.run(["jobs", "--cancel", &id.to_string()]);
    assert!(cancelled.contains("job"), "{cancelled}");
    let ended = merge.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(ended.status.success(), "{text}");
    assert!(
        text.contains("paused") && text.contains("--continue"),
        "{text}"
    );
    assert_data(&mut client, &data);
    // It has begun: the snapshot is gone already, for whoever asks.
    assert!(!daemon.exports().contains(&"ct@one".to_owned()));
    assert_data(&mut daemon.open("ct@two"), &data);
    wait_for("the export's close", || {
        rig.ploop()
            .args(["snapshot", "merge", "ct", "--continue"])
            .output()
            .unwrap()
            .status
            .success()
    });
    assert!(
        daemon
            .jobs()
            .iter()
            .any(|j| j.kind == "merge" && j.state == JobState::Done)
    );
    assert_hidden(&rig, 0);
    assert_data(&mut client, &data);
    rig.refused(3, ["jobs", "--cancel", "999"], &["999"]);
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
}

fn assert_hidden(rig: &Rig, want: usize) {
    let tree = rig.json(["tree", "ct", "--json"]);
    let nodes = tree["nodes"].as_array().unwrap().iter();
    assert_eq!(
        nodes.filter(|n| n["hidden"] == true).count(),
        want,
        "{tree}"
    );
}

/// Goal: a merge that was cut goes on by itself. Method: kill -9 of the daemon, and SIGTERM, in the
/// middle of one; the next daemon ends it when the container is opened.
#[test]
fn a_merge_that_was_cut_goes_on_when_the_container_is_opened() {
    for kill in [true, false] {
        let rig = Rig::new();
        let data = slow(&rig);
        cut(&rig, kill);
        goes_on(&rig, &data);
    }
}

/// Ends the service in the middle of a merge.
fn cut(rig: &Rig, kill: bool) {
    let daemon = Daemon::start(rig);
    // A disk that nobody holds is merged by the command itself.
    let client = daemon.open("ct");
    let merge = slow_merge(rig);
    under_way(&daemon);
    drop(client);
    match kill {
        true => daemon.kill(),
        false => drop(daemon.stop()),
    }
    let ended = merge.wait_with_output().unwrap();
    assert!(!kill || !ended.status.success(), "{ended:?}");
    // It is as it was, for who only looks.
    assert_hidden(rig, 1);
}

/// Goal: what the service merges of itself is in nobody's way. Method: commands that need the
/// container for themselves, the moment that it is opened and its merge goes on.
#[test]
fn a_merge_that_was_left_gives_way() {
    let rig = Rig::new();
    let data = slow(&rig);
    cut(&rig, true);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    let checked = rig.ploop().args(["check", "ct"]).output().unwrap();
    // Clean, or with a merge that was cut.
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{checked:?}");
    assert_data(&mut client, &data);
    wait_for("the merge's end", || {
        daemon.jobs().iter().any(|j| j.state == JobState::Done)
    });
    assert_hidden(&rig, 0);
    daemon.kill();

    let rig = Rig::new();
    slow(&rig);
    cut(&rig, true);
    let daemon = Daemon::start(&rig);
    let client = daemon.open("ct");
    rig.run(["rm", "ct", "--force"]);
    drop(client);
    wait_for("the job's end", || {
        daemon.jobs().iter().all(|j| j.state.is_over())
    });
    assert!(daemon.jobs().iter().all(|j| j.state != JobState::Failed));

    rig.run(["create", "ct", "--template", "t"]);
    drop(daemon.open("ct"));
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));

    // Also while nobody has it open but the merge, or not even that yet.
    let rig = Rig::new();
    slow(&rig);
    cut(&rig, true);
    let daemon = Daemon::start(&rig);
    drop(daemon.open("ct"));
    rig.run(["rm", "ct"]);
    daemon.stop();
}

fn goes_on(rig: &Rig, data: &[u8]) {
    let daemon = Daemon::start(rig);
    let mut client = daemon.open("ct");
    assert_data(&mut client, data);
    wait_for("the job's end", || {
        let jobs = daemon.jobs();
        jobs.iter().any(|j| j.state == JobState::Done)
    });
    assert_hidden(rig, 0);
    assert_data(&mut client, data);
    assert_data(&mut daemon.open("ct@two"), data);
    assert!(!daemon.exports().contains(&"ct@one".to_owned()));
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
}

/// Jobs can be asked for while they run, and each ends as it says.
#[test]
fn jobs_are_listed_with_what_came_of_them() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let api = daemon.api();
    take(&api, "ct", "one");
    let path = resource(&["containers", "ct", "snapshots", "one"]);
    let job: Job = api.delete(&path).unwrap();
    let job = wait_job(&api, job.id, "the deletion", |j| j.state == JobState::Done);
    assert_eq!(
        (job.kind.as_str(), job.container.as_str()),
        ("delete", "ct")
    );
    let failed: Job = api.delete(&path).unwrap();
    let failed = wait_job(&api, failed.id, "the failure", |j| {
        j.state == JobState::Failed
    });
    assert!(failed.error.unwrap().text.contains("one"));
    let json = rig.json(["jobs", "--json"]);
    let states: Vec<_> = json
        .as_array()
        .unwrap()
        .iter()
        .map(|j| j["state"].clone())
        .collect();
    assert_eq!(states, ["done", "failed"]);
    daemon.stop();
}
