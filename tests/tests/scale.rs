//! Many of everything: images in a chain, snapshots of a disk, containers of a store, and more
//! clients than files may be open. What must be right, not how fast it is.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nbd_server::control;
use nbd_server::control::client::resource;
use nbd_server::control::model::{Info, Job, JobState, Merge};
use nbd_server::wire::option::kind as opt;
use nbd_server::wire::option_reply::kind as answer;
use ploop_tests::client::Client;
use ploop_tests::daemon::{Daemon, snapshots, take, wait_job};
use ploop_tests::mount::wait_for;
use ploop_tests::server::terminate;
use ploop_tests::store::Rig;
use ploop_tests::tools::ploopd;
use serde_json::Value;
use tempfile::TempDir;

const CLUSTER: u64 = 64 << 10;
const BLOCK: u64 = 4096;

/// A store in memory, where there is any to be had: it is made of very many small files. It has the
/// template `t` of 64 MiB without any data.
fn rig() -> (Rig, TempDir) {
    let dir = tempfile::Builder::new();
    let room = dir.tempdir_in("/dev/shm").or_else(|_| dir.tempdir());
    let room = room.unwrap();
    let rig = Rig::new().with_root(&room.path().join("store"));
    let raw = rig.path("empty.raw");
    File::create(&raw).unwrap().set_len(64 << 20).unwrap();
    rig.run(["template", "import", "t", "empty.raw", "--from", "raw"]);
    (rig, room)
}

/// A block that says who wrote it.
fn mark(of: u64) -> Vec<u8> {
    of.to_le_bytes().repeat(BLOCK as usize / 8)
}

// ------------------------------------------------------------------------------------ a deep chain

/// Images of the chain, but for the template's.
const DEEP: u64 = 256;

/// Layer `n` writes three blocks: in a cluster of its own, in one that sixteen layers fill, and one
/// that every layer writes.
fn write_layer(client: &mut Client, n: u64) {
    for at in [own(n), shared(n), 0] {
        client.write(at, &mark(n));
    }
}

fn own(n: u64) -> u64 {
    (n + 32) * CLUSTER
}

fn shared(n: u64) -> u64 {
    (1 + n / 16) * CLUSTER + n % 16 * BLOCK
}

/// Panics unless the disk is what it was when layer `last` was written.
fn assert_layers(client: &mut Client, last: u64) {
    let nothing = mark(0);
    for n in 1..=DEEP {
        let wanted = match n <= last {
            true => mark(n),
            false => nothing.clone(),
        };
        for at in [own(n), shared(n)] {
            assert!(client.read(at, BLOCK) == wanted, "layer {n} at {at:#x}");
        }
        // What it shares its cluster with is nobody's.
        assert!(
            client.read(own(n) + BLOCK, BLOCK) == nothing,
            "beside layer {n}"
        );
    }
    assert!(
        client.read(0, BLOCK) == mark(last),
        "the block of all layers"
    );
}

#[test]
fn a_chain_of_256_images_reads_right_at_every_node() {
    let (rig, _room) = rig();
    rig.run(["create", "ct", "--template", "t"]);
    let daemon = Daemon::start(&rig);
    let api = daemon.api();
    let mut client = daemon.open("ct");
    for n in 1..=DEEP {
        write_layer(&mut client, n);
        if n == DEEP {
            break;
        }
        let taken = take(&api, "ct", &format!("s{n}"));
        // The template's image, those below, and the new one.
        assert_eq!(taken.depth, n + 2, "{taken:?}");
        // OpenVZ's driver takes 127 images.
        assert_eq!(taken.note.is_some(), taken.depth > 127, "{taken:?}");
    }
    client.flush();
    let check = |daemon: &Daemon, client: &mut Client| {
        assert_layers(client, DEEP);
        for n in [1, 2, 15, 16, 17, 126, 128, 200, DEEP - 1] {
            assert_layers(&mut daemon.open(&format!("ct@s{n}")), n);
        }
    };
    check(&daemon, &mut client);
    drop(client);
    daemon.stop();
    // Every process reads the same: one that opens the chain anew, and one that copies it.
    let daemon = Daemon::start(&rig);
    check(&daemon, &mut daemon.open("ct"));
    daemon.stop();
    rig.run(["convert", "ct", "flat.raw", "--to", "raw"]);
    let flat = fs::read(rig.path("flat.raw")).unwrap();
    for n in 1..=DEEP {
        for at in [own(n), shared(n)] {
            let at = at as usize;
            assert!(
                flat[at..at + BLOCK as usize] == mark(n),
                "layer {n} in the copy"
            );
        }
    }
}

// ---------------------------------------------------------------------------------- many snapshots

const SNAPSHOTS: u64 = 500;

fn finish(api: &control::Client, job: &Job) {
    let job = wait_job(api, job.id, "the job", |j| j.state.is_over());
    assert_eq!(job.state, JobState::Done, "{job:?}");
}

/// The snapshots by name; what has none is the template's.
fn named(api: &control::Client) -> BTreeSet<String> {
    let all = snapshots(api, "ct").into_iter();
    all.filter_map(|s| s.name).collect()
}

#[test]
fn five_hundred_snapshots_are_listed_and_deleted() {
    let (rig, _room) = rig();
    rig.run(["create", "ct", "--template", "t"]);
    let daemon = Daemon::start(&rig);
    let api = daemon.api();
    let mut client = daemon.open("ct");
    // Each writes a block of its own and one that each of 16 writes; the last one stays.
    for n in 1..=SNAPSHOTS {
        client.write(n * BLOCK, &mark(n));
        client.write((1024 + n % 16) * BLOCK, &mark(n));
        take(&api, "ct", &format!("s{n}"));
    }
    let all: BTreeSet<String> = (1..=SNAPSHOTS).map(|n| format!("s{n}")).collect();
    assert_eq!(named(&api), all);
    let list = rig.json(["snapshot", "list", "ct", "--json"]);
    let shown = list.as_array().unwrap().iter();
    let shown = shown.filter_map(|s| s["name"].as_str().map(str::to_owned));
    assert_eq!(shown.collect::<BTreeSet<_>>(), all);
    let exports = daemon.exports().into_iter().collect::<BTreeSet<_>>();
    assert!(all.iter().all(|s| exports.contains(&format!("ct@{s}"))));
    // Every fifth is deleted from the middle of the chain; all that is left, in one call.
    for n in (1..=SNAPSHOTS).filter(|n| n % 5 == 3) {
        let path = resource(&["containers", "ct", "snapshots", &format!("s{n}")]);
        finish(&api, &api.delete::<Job>(&path).unwrap());
    }
    assert_eq!(named(&api).len() as u64, SNAPSHOTS * 4 / 5);
    assert_kept(&mut client, SNAPSHOTS);
    assert_kept(&mut daemon.open("ct@s257"), 257);
    let merge = Merge {
        all: true,
        ..Merge::default()
    };
    let path = resource(&["containers", "ct", "merge"]);
    finish(&api, &api.post(&path, &merge).unwrap());
    assert_eq!(named(&api), BTreeSet::new());
    assert_kept(&mut client, SNAPSHOTS);
    drop(client);
    daemon.stop();
    let files = fs::read_dir(rig.root().join("containers/ct")).unwrap();
    let images = files.filter(|f| {
        let name = f.as_ref().unwrap().file_name();
        name.to_str().unwrap().contains(".hds")
    });
    assert_eq!(images.count(), 1, "images of merged snapshots are left");
}

/// Panics unless the disk is what it was at snapshot `last`.
fn assert_kept(client: &mut Client, last: u64) {
    for n in 1..=SNAPSHOTS {
        let wanted = if n <= last { n } else { 0 };
        assert!(client.read(n * BLOCK, BLOCK) == mark(wanted), "block {n}");
    }
    for i in 0..16 {
        let of = (0..=last).rev().find(|n| n % 16 == i).unwrap();
        let block = client.read((1024 + i) * BLOCK, BLOCK);
        assert!(block == mark(of), "shared block {i}");
    }
}

// --------------------------------------------------------------------------------- many containers

const CONTAINERS: u64 = 10_000;

#[test]
fn a_store_of_ten_thousand_containers_lists_and_serves() {
    let (rig, _room) = rig();
    let count = CONTAINERS.to_string();
    rig.run(["create", "ct", "--template", "t", "--count", &count]);
    let name = |n: u64| format!("ct-{n:05}");
    let all: BTreeSet<String> = (1..=CONTAINERS).map(name).collect();
    let list = rig.json(["list", "--json"]);
    let listed = list.as_array().unwrap().iter();
    let listed: BTreeSet<String> = listed.map(|c| text(&c["name"])).collect();
    assert!(listed == all, "{} listed", listed.len());
    let daemon = Daemon::start(&rig);
    assert_eq!(exports(daemon.socket()).len() as u64, CONTAINERS + 1);
    // First, last, between; each has its own data and nobody else's.
    let some = [1, 2, 4999, CONTAINERS - 1, CONTAINERS];
    for n in some {
        let mut client = daemon.open(&name(n));
        assert!(
            client.read(0, BLOCK) == mark(0),
            "{n} begins as the template"
        );
        client.write(0, &mark(n));
        client.flush();
    }
    for n in some {
        assert!(
            daemon.open(&name(n)).read(0, BLOCK) == mark(n),
            "container {n}"
        );
    }
    // What comes and goes is named at once.
    take(&daemon.api(), &name(77), "s");
    rig.run(["rm", &name(78)]);
    let exports = exports(daemon.socket());
    assert!(exports.contains(&format!("{}@s", name(77))));
    assert!(!exports.contains(&name(78)));
    assert_eq!(exports.len() as u64, CONTAINERS + 1);
    daemon.stop();
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// What LIST names.
fn exports(socket: &Path) -> BTreeSet<String> {
    let mut answers = Client::connect(socket).option(opt::LIST, &[]);
    assert_eq!(answers.pop().unwrap().0, answer::ACK);
    let name = |(kind, data): (u32, Vec<u8>)| {
        assert_eq!(kind, answer::SERVER);
        let len = u32::from_be_bytes(*data.first_chunk().unwrap()) as usize;
        String::from_utf8(data[4..4 + len].to_vec()).unwrap()
    };
    answers.into_iter().map(name).collect()
}

// --------------------------------------------------------------------------- a limit of open files

/// A `ploopd` that may open so many files; killed when dropped.
struct Limited {
    child: Child,
    log: PathBuf,
}

impl Limited {
    fn start(rig: &Rig, files: u64) -> Limited {
        let log = rig.path("limited.log");
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("ulimit -n {files} && exec \"$@\""), "sh"])
            .arg(ploopd().get_program())
            .arg("--root")
            .arg(rig.root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let limited = Limited { child, log };
        let up = lines.any(|l| l.unwrap().starts_with("control API at "));
        assert!(up, "it did not start: {}", limited.log());
        limited
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn open_files(&self) -> u64 {
        let dir = format!("/proc/{}/fd", self.child.id());
        fs::read_dir(dir).unwrap().count() as u64
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // After an orderly end there is nothing left to kill.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn a_full_table_of_open_files_is_said_to_who_came_too_late_and_disturbs_nobody() {
    const FILES: u64 = 64;
    let (rig, _room) = rig();
    rig.run(["create", "ct", "--template", "t", "--count", "64"]);
    let mut daemon = Limited::start(&rig, FILES);
    let socket = rig.root().join("nbd.sock");
    let api = control::Client::connect(&rig.root().join("control.sock")).unwrap();
    let info: Info = api.get(&resource(&["info"])).unwrap();
    assert_eq!(info.open_files_limit, FILES);
    assert!(
        daemon.log().contains("LimitNOFILE"),
        "warned at its start: {}",
        daemon.log()
    );
    let mut open = Vec::new();
    let refusal = loop {
        let mut client = Client::connect(&socket);
        let name = format!("ct-{:04}", open.len() + 1);
        if let Err((_, text)) = client.go(&name) {
            break text;
        }
        client.write(0, &mark(open.len() as u64));
        open.push(client);
        assert!(daemon.open_files() <= FILES);
        assert!((open.len() as u64) < FILES, "each has a socket at least");
    };
    assert!(refusal.contains("open files"), "the client: {refusal:?}");
    // Three descriptors for each: its connection, its lock, its image. The rest of them is its own.
    assert!(open.len() >= 8, "{} were let in: {refusal}", open.len());
    let said = |line: &str| line.contains("could not be opened") && line.contains("LimitNOFILE");
    assert!(daemon.log().lines().any(said), "{}", daemon.log());
    // Those who are in go on, and who leaves makes room.
    for (n, client) in open.iter_mut().enumerate() {
        assert!(client.read(0, BLOCK) == mark(n as u64), "client {n}");
        client.flush();
    }
    let list: Vec<Value> = api.get(&resource(&["connections"])).unwrap();
    assert_eq!(list.len(), open.len(), "the control API goes on");
    open.pop().unwrap().disconnect();
    let mut later = None;
    wait_for("room for another", || {
        let mut client = Client::connect(&socket);
        later = client.go("ct-0064").is_ok().then_some(client);
        later.is_some()
    });
    assert!(later.unwrap().read(0, BLOCK) == mark(0));
    drop(open);
    terminate(daemon.child.id());
    assert!(
        daemon.child.wait().unwrap().success(),
        "it ends in order: {}",
        daemon.log()
    );
}
