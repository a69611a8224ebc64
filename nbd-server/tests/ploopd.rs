//! The daemon itself: what it opens, says and leaves behind.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use nbd_server::EngineKind;
use nbd_server::control::{Client, model};
use ploop::Kind;
use rustix::process::{Pid, Signal, kill_process};

struct Daemon {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn command(root: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ploopd"));
    command
        .arg("--root")
        .arg(root)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

impl Daemon {
    /// Runs it, and waits until it says where its control API is.
    fn start(root: &Path) -> Daemon {
        Daemon::start_with(root, &[])
    }

    fn start_with(root: &Path, args: &[&str]) -> Daemon {
        let mut command = command(root);
        let mut child = command.args(args).stderr(Stdio::inherit()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("control API at") {
            line.clear();
            assert_ne!(out.read_line(&mut line).unwrap(), 0, "it ended");
        }
        Daemon { child, out }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn ended_well(mut self) -> bool {
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        self.child.wait().unwrap().success()
    }
}

#[test]
fn it_makes_a_store_serves_it_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let daemon = Daemon::start(&root);
    let (nbd, control) = (root.join("nbd.sock"), root.join("control.sock"));
    for socket in [&nbd, &control] {
        let mode = std::fs::metadata(socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let client = Client::connect(&control).unwrap();
    let info = client.info();
    assert_eq!(
        (info.program.as_str(), info.pid),
        ("ploopd", daemon.child.id())
    );
    assert!(info.open_files_limit > 0);
    assert!(
        client
            .get::<Vec<model::Export>>("/v1/exports")
            .unwrap()
            .is_empty()
    );
    assert!(
        client
            .get::<Vec<model::Connection>>("/v1/connections")
            .unwrap()
            .is_empty()
    );
    assert!(
        client
            .text("/metrics")
            .unwrap()
            .contains("ploop_open_files")
    );
    // A second one finds the first.
    let second = command(&root).output().unwrap();
    assert_eq!(
        second.status.code(),
        Some(i32::from(Kind::InUse.exit_code()))
    );
    Client::connect(&control).unwrap();
    daemon.signal(Signal::TERM);
    assert!(daemon.ended_well());
    assert!(!nbd.exists() && !control.exists());
}

#[test]
fn the_engine_is_the_one_that_was_asked_for_and_is_told() {
    let dir = tempfile::tempdir().unwrap();
    for kind in EngineKind::ALL {
        let daemon = Daemon::start_with(dir.path(), &["--engine", kind.name()]);
        let client = Client::connect(&dir.path().join("control.sock")).unwrap();
        assert_eq!(client.info().engine, kind.name());
        let metrics = client.text("/metrics").unwrap();
        let line = format!("ploop_engine_info{{engine=\"{kind}\"}} 1\n");
        assert!(metrics.contains(&line), "{metrics}");
        assert!(metrics.contains("\nploop_syncs_total "), "{metrics}");
        assert!(
            metrics.contains("\nploop_journal_syncs_total "),
            "{metrics}"
        );
        daemon.signal(Signal::TERM);
        assert!(daemon.ended_well());
    }
    let refused = command(dir.path())
        .args(["--engine", "steam"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("inline, uring, portable"), "{said}");
}

#[test]
fn one_that_was_killed_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let first = Daemon::start(dir.path());
    first.signal(Signal::KILL);
    drop(first);
    let control = dir.path().join("control.sock");
    assert_eq!(
        Client::connect(&control).unwrap_err().kind(),
        Kind::NotFound
    );
    let second = Daemon::start(dir.path());
    Client::connect(&control).unwrap();
    second.signal(Signal::INT);
    assert!(second.ended_well());
}

#[test]
fn what_it_cannot_do_it_says() {
    let dir = tempfile::tempdir().unwrap();
    for (args, kind) in [
        (&["--listen", "0.0.0.0:0"][..], Kind::Permission),
        (&["--activation"], Kind::Invalid),
        (&["--max-connections", "0"], Kind::Invalid),
    ] {
        let out = command(dir.path()).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(
            out.status.code(),
            Some(i32::from(kind.exit_code())),
            "{args:?}: {text}"
        );
        assert!(!dir.path().join("control.sock").exists());
    }
    let none = dir.path().join("none");
    let out = command(&none).arg("--read-only").output().unwrap();
    assert_eq!(
        out.status.code(),
        Some(i32::from(Kind::NotFound.exit_code()))
    );
    assert!(!none.exists());
}
