//! The API over its socket: what a user would lose if it lied, hung or fell.

mod fake;
mod hostile;
mod routes;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::model::{Info, Job, JobState, Merge, SnapshotCreate, SnapshotTaken};
use super::service::Limits;
use super::*;
use crate::control::client::resource;
use crate::export::Single;
use crate::serve::{Config, Server};
use crate::testing::FileDevice;
use fake::Fake;
use ploop::Kind;

/// A service with fake operations.
struct Rig {
    fake: Arc<Fake>,
    jobs: Jobs,
    meter: Arc<Meter>,
    server: Server,
    control: Option<Control>,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(Limits::default())
    }

    fn with(limits: Limits) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        Rig::at(dir, &path, limits)
    }

    fn at(dir: tempfile::TempDir, path: &Path, limits: Limits) -> Rig {
        let device = FileDevice::temporary(1 << 20);
        let exports = Arc::new(Single::new(device, "disk", "").unwrap());
        let server = Server::new(exports, Config::default());
        let (fake, jobs) = (Arc::new(Fake::default()), Jobs::default());
        let meter = Arc::new(Meter::default());
        let service = Service {
            info: Info {
                version: "1".into(),
                program: "test".into(),
                pid: std::process::id(),
                ..Info::default()
            },
            connections: server.connections(),
            jobs: jobs.clone(),
            meter: meter.clone(),
            operations: fake.clone(),
            limits,
        };
        let control = Some(Control::start(path, service).unwrap());
        Rig {
            fake,
            jobs,
            meter,
            server,
            control,
            dir,
        }
    }

    fn path(&self) -> PathBuf {
        self.control.as_ref().unwrap().path().to_owned()
    }

    fn client(&self) -> Client {
        Client::connect(&self.path()).unwrap()
    }
}

#[test]
fn an_error_is_the_same_for_who_asks_and_for_who_does_it() {
    let rig = Rig::new();
    let client = rig.client();
    for kind in ["io", "not-found", "exists", "corrupt", "in-use", "no-space"] {
        let local = fake::failure(kind);
        let path = resource(&["containers", kind, "tree"]);
        let remote = client.get::<model::Tree>(&path).unwrap_err();
        assert_eq!(remote.to_string(), local.to_string());
        assert_eq!(remote.kind(), local.kind());
        assert_eq!(remote.raw_os_error(), local.raw_os_error());
        assert_eq!(remote.fix_text(), local.fix_text());
    }
    let gone = client.get::<Job>("/v1/jobs/77").unwrap_err();
    assert_eq!(gone.kind(), Kind::NotFound);
}

#[test]
fn names_arrive_as_they_were_written() {
    let rig = Rig::new();
    let client = rig.client();
    for name in ["a b", "x/y", "..", ".", "%2e", "ü\"\n?#&", "web.prod+1"] {
        let path = resource(&["containers", "ct", "snapshots", name]);
        let rename = model::Rename::default();
        let snapshot: model::Snapshot = client.patch(&path, &rename).unwrap();
        assert_eq!(snapshot.name.as_deref(), Some(name));
    }
}

#[test]
fn a_job_is_followed_to_its_end() {
    let rig = Rig::new();
    let client = rig.client();
    let path = resource(&["containers", "ct", "merge"]);
    let merge = Merge {
        all: true,
        ..Merge::default()
    };
    let job: Job = client.post(&path, &merge).unwrap();
    assert_eq!((job.kind.as_str(), job.container.as_str()), ("merge", "ct"));
    let mut seen = Vec::new();
    let done = client.wait(job.id, |job| {
        seen.push((job.done, job.total));
        rig.fake.step();
    });
    let done = done.unwrap();
    assert_eq!(
        (done.state, done.message.as_deref()),
        (JobState::Done, Some("merged"))
    );
    assert_eq!(seen.last(), Some(&(fake::STEPS, fake::STEPS)));
    assert!(seen.is_sorted(), "{seen:?}");
    let delete = resource(&["containers", "in-use", "snapshots", "s"]);
    let job: Job = client.delete(&delete).unwrap();
    let failed = client.wait(job.id, |_| ()).unwrap_err();
    assert_eq!(failed.to_string(), fake::failure("in-use").to_string());
}

#[test]
fn a_cancelled_job_says_whether_it_was_undone() {
    let rig = Rig::new();
    let client = rig.client();
    for (name, state) in [("a", JobState::Cancelled), ("b", JobState::Paused)] {
        let path = resource(&["templates", name, "verify"]);
        let job: Job = client.post(&path, &()).unwrap();
        let cancel = resource(&["jobs", &job.id.to_string(), "cancel"]);
        client.post::<Job>(&cancel, &()).unwrap();
        let job = client.wait(job.id, |_| ()).unwrap();
        assert_eq!(job.state, state);
        assert_eq!(job.container, format!("template:{name}"));
    }
}

#[test]
fn a_long_poll_ends_with_the_job_and_not_before() {
    let rig = Rig::new();
    let client = rig.client();
    let job: Job = client.post("/v1/templates/b/verify", &()).unwrap();
    let at = |wait: &str| format!("/v1/jobs/{}?wait={wait}", job.id);
    assert_eq!(
        client.get::<Job>(&at("0.01")).unwrap().state,
        JobState::Running
    );
    assert_eq!(
        client.get::<Job>(&at("0")).unwrap().state,
        JobState::Running
    );
    for bad in ["-1", "NaN", "x", "1&more=2"] {
        let refused = client.get::<Job>(&at(bad)).unwrap_err();
        assert_eq!(refused.kind(), Kind::Invalid, "{bad}");
    }
    let path = rig.path();
    let (url, id) = (at("1e300"), job.id);
    let waiting = std::thread::spawn(move || {
        let client = Client::connect(&path).unwrap();
        client.get::<Job>(&url).unwrap().state
    });
    std::thread::sleep(Duration::from_millis(50));
    rig.jobs.cancel(id).unwrap();
    assert_eq!(waiting.join().unwrap(), JobState::Paused);
}

#[test]
fn stopping_ends_jobs_and_answers_who_waits() {
    let mut rig = Rig::new();
    let client = rig.client();
    let job: Job = client.post("/v1/templates/b/verify", &()).unwrap();
    let waiting = std::thread::spawn(move || client.wait(job.id, |_| ()));
    std::thread::sleep(Duration::from_millis(50));
    let path = rig.path();
    rig.control.take().unwrap().stop();
    // Told, or cut off between two questions: never left hanging.
    match waiting.join().unwrap() {
        Ok(job) => assert_eq!(job.state, JobState::Paused),
        Err(e) => assert!(matches!(e.kind(), Kind::NotFound | Kind::Io), "{e}"),
    }
    assert!(!path.exists());
    assert!(rig.jobs.list().iter().all(|j| j.state.is_over()));
    assert_eq!(Client::connect(&path).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_dead_socket_and_a_deaf_one_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let none = Client::connect(&path).unwrap_err();
    assert_eq!(none.kind(), Kind::NotFound);
    assert!(none.to_string().contains("nobody answers"), "{none}");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let dead = Client::connect(&path).unwrap_err();
    assert_eq!(dead.kind(), Kind::NotFound);
    assert!(dead.to_string().contains("killed"), "{dead}");
    // A killed service's socket is replaced by the next.
    let rig = Rig::at(dir, &path, Limits::default());
    rig.client();
    let twice = Control::start(&path, fake_service()).unwrap_err();
    assert_eq!(twice.kind(), Kind::InUse);
}

fn fake_service() -> Service {
    let rig = Rig::new();
    Service {
        info: Info::default(),
        connections: rig.server.connections(),
        jobs: Jobs::default(),
        meter: Arc::default(),
        operations: rig.fake.clone(),
        limits: Limits::default(),
    }
}

#[test]
fn a_socket_may_lie_deeper_than_an_address_is_long() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120)).join("e".repeat(90));
    std::fs::create_dir_all(&deep).unwrap();
    let path = deep.join("control.sock");
    let mut rig = Rig::at(dir, &path, Limits::default());
    assert_eq!(rig.client().info().program, "test");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let twice = Control::start(&path, fake_service()).unwrap_err();
    assert_eq!(
        (twice.kind(), twice.path()),
        (Kind::InUse, Some(path.as_path()))
    );
    rig.control.take().unwrap().stop();
    assert!(!path.exists(), "{:?}", rig.dir);
    let gone = Client::connect(&path).unwrap_err();
    assert_eq!(
        (gone.kind(), gone.path()),
        (Kind::NotFound, Some(path.as_path()))
    );
}

#[test]
fn requests_do_not_wait_for_each_other() {
    let rig = Rig::new();
    let path = rig.path();
    // This one is stuck until the fake lets it go.
    let stuck = std::thread::spawn(move || {
        let client = Client::connect(&path).unwrap();
        let path = resource(&["containers", "stuck", "snapshots"]);
        client.post::<SnapshotTaken>(&path, &SnapshotCreate::default())
    });
    rig.fake.wait_until_stuck();
    assert_eq!(rig.client().get::<Vec<Job>>("/v1/jobs").unwrap(), []);
    rig.fake.step();
    assert_eq!(stuck.join().unwrap().unwrap().container, "stuck");
}
