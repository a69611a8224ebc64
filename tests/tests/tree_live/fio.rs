//! fio, which checks what it reads with its own sums, on a disk whose tree changes meanwhile.

use std::fs;

use nbd_server::control::client::resource;
use nbd_server::control::model::{Job, JobState};
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::fio::Fio;
use ploop_tests::fsx::{Rng, env};
use ploop_tests::server::qemu_check;
use ploop_tests::store::Rig;
use ploop_tests::treehash::reader_digest;

/// Goal: what fio reads is what it wrote, whatever becomes of the tree below; and a snapshot stays
/// what it was. Method: snapshots, deletions and merges until fio has ended; the hash of a snapshot
/// when it was made is its hash at the end.
#[test]
fn fio_finds_nothing_wrong_while_the_tree_changes() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let api = daemon.api();
    let seconds = env("PLOOP_LIVE_SECONDS", 5);
    let mut fio = Fio::start(&daemon.uri("ct"), seconds, &[]);
    let mut rng = Rng(3);
    let mut hashed: Vec<(String, String)> = Vec::new();
    let mut present: Vec<String> = Vec::new();
    let (mut made, mut removed) = (0, 0);
    loop {
        if !fio.runs() {
            fio.wait();
            if made > 10 && removed > 3 {
                break;
            }
            // A slow host: once more.
            fio = Fio::start(&daemon.uri("ct"), seconds, &[]);
        }
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
    eprintln!("{made} snapshots, {removed} removed");
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
