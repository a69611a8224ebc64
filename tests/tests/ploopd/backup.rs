//! Backups beside clients that are in their way.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Stdio;

use nbd_server::control::client::resource;
use nbd_server::control::model::{Backup, BackupStart, Job};
use ploop_tests::daemon::Daemon;
use ploop_tests::mount::wait_for;
use ploop_tests::server::pattern;
use ploop_tests::store::Rig;

fn begin(rig: &Rig, daemon: &Daemon, target: &str) -> Backup {
    let start = BackupStart {
        target: rig.arg(target),
        ..BackupStart::default()
    };
    let path = resource(&["containers", "ct", "backups"]);
    daemon.api().post(&path, &start).unwrap()
}

/// Goal: every new instant is of a frozen file system. Method: the file before was moved away, and
/// its snapshot is still read.
#[test]
fn a_target_of_the_same_name_is_frozen_again() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let begun = begin(&rig, &daemon, "b.qcow2");
    let reader = daemon.open(&format!("ct@backup-{}", &begun.id[..8]));
    let said = rig.run(["backup", "ct", "b.qcow2"]);
    assert!(said.contains("read by others"), "{said}");
    for more in ["", ".json"] {
        let from = rig.path(&format!("b.qcow2{more}"));
        fs::rename(from, rig.path(&format!("old.qcow2{more}"))).unwrap();
    }
    let none = rig.json(["backup", "list", "ct", "--json"]);
    assert_eq!(none, serde_json::json!([]));
    let log = rig.path("log");
    let say = |word: &str| format!("echo {word} >> {}", log.display());
    let (freeze, thaw) = (say("freeze"), say("thaw"));
    let hooks = ["--freeze", &freeze, "--thaw", &thaw];
    rig.run(["backup", "ct", "b.qcow2"].iter().chain(&hooks));
    assert_eq!(fs::read_to_string(&log).unwrap(), "freeze\nthaw\n");
    reader.disconnect();
    daemon.stop();
}

/// Goal: who waits for a backup knows that it is not whole. Method: one that somebody cancels.
#[test]
fn a_backup_that_was_cancelled_is_no_success() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    for at in 20..44 {
        client.write(at << 20, &pattern(1 << 20, at));
    }
    client.disconnect();
    for json in [false, true] {
        let mut slow = rig.ploop();
        slow.args(["backup", "ct", "b.qcow2", "--rate", "1M"]);
        slow.args(json.then_some("--json"));
        let mut slow = slow
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let running = || {
            let mut jobs = daemon.jobs().into_iter();
            jobs.find(|j| j.kind == "backup" && !j.state.is_over())
        };
        wait_for("the job", || running().is_some());
        let path = resource(&["jobs", &running().unwrap().id.to_string(), "cancel"]);
        let _: Job = daemon.api().post(&path, &()).unwrap();
        assert_eq!(slow.wait().unwrap().code(), Some(1));
        assert!(!rig.path("b.qcow2").exists());
    }
    daemon.stop();
}

/// Goal: an increment stands on the file that it was made on. Method: a link is named as its base, and
/// names another file afterwards.
#[test]
fn an_increment_does_not_stand_on_a_link() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    rig.run(["backup", "ct", "b0.qcow2", "--tracker", "night"]);
    for more in ["", ".json"] {
        let link = rig.path(&format!("latest{more}"));
        symlink(rig.path(&format!("b0.qcow2{more}")), link).unwrap();
    }
    let one = ["backup", "ct", "b1.qcow2", "--since", "night"];
    rig.run(one.iter().chain(&["--base", "latest"]));
    for more in ["", ".json"] {
        let link = rig.path(&format!("latest{more}"));
        fs::remove_file(&link).unwrap();
        symlink(rig.path(&format!("b1.qcow2{more}")), link).unwrap();
    }
    assert_eq!(rig.content("b1.qcow2"), rig.content("ct"));
    rig.run(["backup", "verify", "b1.qcow2"]);
}
