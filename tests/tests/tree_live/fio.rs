//! fio, which checks what it reads with its own sums, on a disk whose tree changes meanwhile.

use std::fs;
use std::process::{Child, Stdio};

use nbd_server::control::client::resource;
use nbd_server::control::model::{Job, JobState};
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::fsx::{Rng, env};
use ploop_tests::server::qemu_check;
use ploop_tests::store::Rig;
use ploop_tests::tools::tool;
use ploop_tests::treehash::reader_digest;

struct Fio(Child);

impl Drop for Fio {
    fn drop(&mut self) {
        // After `wait` there is nothing left to kill.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Fio {
    /// Four connections, each on 8 MiB of its own, that verify what they wrote all along.
    fn start(uri: &str, seconds: u64) -> Fio {
        let mut fio = tool("fio");
        fio.args([
            "--name=live",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bssplit=4k/70:32k/30",
        ])
        .args(["--iodepth=8", "--numjobs=4", "--thread", "--size=8m"])
        .args(["--offset=8m", "--offset_increment=8m", "--fsync=100"])
        .args([
            "--verify=crc32c",
            "--verify_backlog=64",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ])
        .args(["--time_based", "--group_reporting", "--randrepeat=0"])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--uri={uri}"));
        fio.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Fio(fio.spawn().unwrap())
    }

    /// Waits for its end; panics unless it found nothing wrong.
    fn wait(mut self) {
        let read = |from: Option<&mut dyn std::io::Read>| {
            let mut text = String::new();
            from.unwrap().read_to_string(&mut text).unwrap();
            text
        };
        let said = read(self.0.stdout.as_mut().map(|o| o as _));
        let errors = read(self.0.stderr.as_mut().map(|o| o as _));
        let ended = self.0.wait().unwrap();
        assert!(ended.success(), "{ended}\n{said}{errors}");
        assert!(said.contains("err= 0"), "{said}{errors}");
    }
}

/// Goal: what fio reads is what it wrote, whatever becomes of the tree below; and a snapshot stays
/// what it was. Method: snapshots, deletions and merges until fio has ended; the hash of a snapshot
/// when it was made is its hash at the end.
#[test]
fn fio_finds_nothing_wrong_while_the_tree_changes() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let api = daemon.api();
    let mut fio = Fio::start(&daemon.uri("ct"), env("PLOOP_LIVE_SECONDS", 5));
    let mut rng = Rng(3);
    let mut hashed: Vec<(String, String)> = Vec::new();
    let mut present: Vec<String> = Vec::new();
    let (mut made, mut removed) = (0, 0);
    while fio.0.try_wait().unwrap().is_none() {
        let name = format!("f{made}");
        take(&api, "ct", &name);
        if made % 16 == 0 {
            hashed.push((name, hash(&daemon, &format!("f{made}"))));
        } else {
            present.push(name);
        }
        made += 1;
        if present.len() > 6 {
            let at = rng.below(present.len() as u64) as usize;
            let gone = present.swap_remove(at);
            let path = resource(&["containers", "ct", "snapshots", &gone]);
            let job: Job = api.delete(&path).unwrap();
            let job = api.wait(job.id, |_| ()).unwrap();
            assert_eq!(job.state, JobState::Done, "{job:?}");
            removed += 1;
        }
    }
    fio.wait();
    eprintln!("{made} snapshots, {removed} removed");
    assert!(made > 10 && removed > 3, "{made} made, {removed} removed");
    for (name, was) in &hashed {
        assert_eq!(&hash(&daemon, name), was, "{name} has changed");
    }
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
    for file in fs::read_dir(rig.root().join("containers/ct")).unwrap() {
        let file = file.unwrap().path();
        if file.file_name().unwrap().to_str().unwrap().contains(".hds") {
            qemu_check(&file);
        }
    }
}

fn hash(daemon: &Daemon, snapshot: &str) -> String {
    let mut client = daemon.open(&format!("ct@{snapshot}"));
    let pieces = (0..client.size >> 20).flat_map(|i| client.read(i << 20, 1 << 20));
    let all: Vec<u8> = pieces.collect();
    reader_digest(&mut &all[..])
}
