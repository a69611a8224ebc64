//! `ploopd` for a store, started, asked, killed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nbd_server::control::client::resource;
use nbd_server::control::model::{Job, Snapshot, SnapshotCreate, SnapshotTaken};
use nbd_server::control::{Client, model};
use nbd_server::wire::reply::Style;

use crate::mount::wait_for;
use crate::store::Rig;
use crate::tools::ploopd;

/// A running `ploopd`; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    nbd: PathBuf,
    control: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts one for the rig's store.
    pub fn start(rig: &Rig) -> Daemon {
        Daemon::with(rig, &[])
    }

    /// The same, with further arguments.
    pub fn with(rig: &Rig, args: &[&str]) -> Daemon {
        Daemon::by(ploopd(), rig, args)
    }

    /// The same by a command that runs it.
    pub fn by(mut command: Command, rig: &Rig, args: &[&str]) -> Daemon {
        let log = tempfile::Builder::new()
            .prefix("ploopd-")
            .suffix(".log")
            .tempfile_in(rig.path(""))
            .unwrap();
        let log = log.into_temp_path().keep().unwrap();
        command
            .arg("--root")
            .arg(rig.root())
            .args(args)
            .stdin(Stdio::null());
        command
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap());
        let mut daemon = Daemon {
            child: command.spawn().unwrap(),
            nbd: PathBuf::new(),
            control: PathBuf::new(),
            log,
        };
        let mut lines = BufReader::new(daemon.child.stdout.take().unwrap()).lines();
        while daemon.control.as_os_str().is_empty() {
            let Some(line) = lines.next() else {
                panic!("{command:?} did not start: {}", daemon.log());
            };
            let line = line.unwrap();
            if let Some(path) = line.strip_prefix("control API at ") {
                daemon.control = path.into();
            } else if let Some(path) = line.strip_prefix("listening on /") {
                daemon.nbd = Path::new("/").join(path);
            }
        }
        daemon
    }

    /// The URI of an export.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.nbd.display())
    }

    /// The socket for NBD.
    pub fn socket(&self) -> &Path {
        &self.nbd
    }

    /// The socket of the control API.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said on standard error so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// A client of the control API.
    pub fn api(&self) -> Client {
        Client::connect(&self.control).unwrap()
    }

    /// A client of an export.
    pub fn open(&self, export: &str) -> crate::client::Client {
        crate::client::Client::open(&self.nbd, export, Style::Structured)
    }

    /// Every export that it names, sorted.
    pub fn exports(&self) -> Vec<String> {
        let all: Vec<model::Export> = self.api().get(&resource(&["exports"])).unwrap();
        let mut names: Vec<String> = all.into_iter().map(|e| e.name).collect();
        names.sort();
        names
    }

    /// All jobs, the oldest first.
    pub fn jobs(&self) -> Vec<Job> {
        self.api().get(&resource(&["jobs"])).unwrap()
    }

    /// Asks it to end by SIGTERM, waits, and panics unless it ended well. Gives what it said.
    pub fn stop(mut self) -> String {
        crate::server::terminate(self.child.id());
        let mut ended = None;
        wait_for("the daemon's end", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        assert!(ended.unwrap().success(), "{ended:?}\n{}", self.log());
        assert!(
            !self.control.exists() && !self.nbd.exists(),
            "its sockets are left"
        );
        self.log()
    }

    /// Kills it at once, as a power cut would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After `stop` there is nothing left to kill.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Makes a snapshot of that name.
pub fn take(api: &Client, container: &str, name: &str) -> SnapshotTaken {
    let new = SnapshotCreate {
        name: Some(name.into()),
        ..SnapshotCreate::default()
    };
    api.post(&resource(&["containers", container, "snapshots"]), &new)
        .unwrap()
}

/// The snapshots of a container.
pub fn snapshots(api: &Client, container: &str) -> Vec<Snapshot> {
    api.get(&resource(&["containers", container, "snapshots"]))
        .unwrap()
}

/// Waits, looking often, until `done` of a job.
pub fn wait_job(api: &Client, id: u64, what: &str, mut done: impl FnMut(&Job) -> bool) -> Job {
    let path = resource(&["jobs", &id.to_string()]);
    for _ in 0..36_000 {
        let job: Job = api.get(&path).unwrap();
        if done(&job) {
            return job;
        }
        assert!(!job.state.is_over(), "waited for {what}: {job:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("waited in vain for {what}");
}
