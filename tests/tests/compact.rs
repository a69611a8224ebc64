//! Space comes back: what is deleted inside, trimmed and compacted is the host's again, and as much as
//! was foretold.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use nbd_server::control::client::resource;
use nbd_server::control::model::{Compact, Job, JobState};
use ploop_tests::daemon::{Daemon, wait_job};
use ploop_tests::fsx::Rng;
use ploop_tests::mount::MountedExport;
use ploop_tests::store::{Rig, on_export};
use ploop_tests::tools::{run, tool};

const MIB: u64 = 1 << 20;

/// Bytes that the host has given a container's images.
fn host(rig: &Rig, container: &str) -> u64 {
    let dir = rig.root().join("containers").join(container);
    let images = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    let images = images.filter(|e| e.file_name().to_string_lossy().starts_with("root.hds"));
    let blocks = images.map(|e| {
        // What is delayed gets its blocks.
        File::open(e.path()).unwrap().sync_all().unwrap();
        e.metadata().unwrap().blocks()
    });
    blocks.sum::<u64>() * 512
}

/// All that was written to a mounted file system, and what was deleted, is on its disk.
fn settle(mounted: &MountedExport) {
    rustix::fs::syncfs(File::open(mounted.path()).unwrap()).unwrap();
}

/// The first number in what `compact` said.
fn bytes(rig: &Rig, args: &[&str]) -> u64 {
    let said = rig.json([&["compact", "--json"], args].concat());
    let text = said["message"].as_str().unwrap().to_owned();
    assert_eq!(said["state"], "done", "{text}");
    text.split(' ').next().unwrap().parse().unwrap()
}

/// What each node of the container holds, the live disk too.
fn contents(rig: &Rig) -> BTreeMap<String, String> {
    let listed = rig.json(["snapshot", "list", "ct", "--json"]);
    let names = listed.as_array().unwrap().iter();
    let names = names.filter_map(|s| Some(format!("ct@{}", s["name"].as_str()?)));
    names
        .chain(["ct".to_owned()])
        .map(|node| (node.clone(), rig.content(&node)))
        .collect()
}

fn images_are_sound(rig: &Rig) {
    assert!(rig.run(["check", "ct"]).contains("clean"));
    let dir = rig.root().join("containers/ct");
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
        if entry.file_name().to_string_lossy().starts_with("root.hds") {
            run(tool("qemu-img")
                .args(["check", "-f", "parallels"])
                .arg(entry.path()));
        }
    }
}

/// Goal: a container that had much and deleted it takes what is live, and at most a cluster for each
/// delta. Method: files in a mounted ext4 with a snapshot between them, deleted, trimmed, the snapshot
/// deleted, compacted; the host is asked what it gave.
#[test]
fn what_is_deleted_inside_comes_back() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let mounted = MountedExport::new(&daemon.uri("ct"));
    let mut rng = Rng(7);
    let mut noise = |len: u64| (0..len).map(|_| rng.below(256) as u8).collect::<Vec<u8>>();
    fs::write(mounted.path().join("stays"), noise(MIB)).unwrap();
    settle(&mounted);
    let before = host(&rig, "ct");
    for i in 0..6 {
        fs::write(mounted.path().join(format!("f{i}")), noise(2 * MIB)).unwrap();
        if i == 2 {
            settle(&mounted);
            rig.run(["snapshot", "create", "ct", "--name", "half"]);
        }
    }
    settle(&mounted);
    let full = host(&rig, "ct");
    assert!(full > before + 11 * MIB, "{before} {full}");
    for i in 0..6 {
        fs::remove_file(mounted.path().join(format!("f{i}"))).unwrap();
    }
    settle(&mounted);
    run(tool("fstrim").arg(mounted.path()));
    rig.run(["snapshot", "delete", "ct", "half"]);
    let foretold = bytes(&rig, &["ct", "--dry-run"]);
    let there = host(&rig, "ct");
    // Beside the client that has it mounted.
    let freed = bytes(&rig, &["ct"]);
    let now = host(&rig, "ct");
    assert_eq!(freed, foretold);
    // Room that was taken ahead of writers goes with it.
    assert!(there - now >= foretold, "{foretold}: {there} {now}");
    let cluster = rig.json(["info", "ct", "--json"])["cluster_size"]
        .as_u64()
        .unwrap();
    assert!(now <= before + cluster, "{before} before, {now} now");
    mounted.unmount().e2fsck(
        rig.json(["template", "info", "t", "--json"])["partition_offset"]
            .as_u64()
            .unwrap(),
    );
    daemon.stop();
    images_are_sound(&rig);
}

/// Goal: what was foretold is freed to the byte, in each image, and every node reads as it did; by a
/// service and without one, also after a run that was cut off. Method: snapshots with zeros and with
/// the parent's bytes in them.
#[test]
fn every_image_gives_back_what_was_foretold_and_reads_the_same() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let write = |commands: &[&str]| {
        let server = rig.serve(["ct"]);
        on_export(&server.uri("ct"), commands);
        server.stop();
    };
    write(&["write -P 1 8M 6M", "write -P 2 20M 3M"]);
    rig.run(["snapshot", "create", "ct", "--name", "one"]);
    // As it was; zeros over data; zeros over nothing; its own.
    write(&[
        "write -P 1 8M 2M",
        "write -P 0 10M 1M",
        "write -P 0 30M 2M",
        "write -P 3 12M 1M",
    ]);
    rig.run(["snapshot", "create", "ct", "--name", "two"]);
    write(&[
        "write -P 3 12M 1M",
        "write -P 0 13M 1M",
        "write -P 5 33M 64k",
    ]);
    let before = contents(&rig);
    let there = host(&rig, "ct");

    let foretold = bytes(&rig, &["ct", "--dry-run"]);
    assert_eq!(contents(&rig), before);
    assert_eq!(host(&rig, "ct"), there, "a dry run changes nothing");
    assert!(foretold >= 7 * MIB, "{foretold}");
    // In use, only the top.
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    client.read(0, 512);
    let said = rig.run(["compact", "ct", "--rate", "1G"]);
    assert!(said.contains("left: the images below the top"), "{said}");
    client.disconnect();
    let rest = bytes(&rig, &["ct"]);
    daemon.stop();
    let now = host(&rig, "ct");
    assert_eq!(there - now, foretold, "of which {rest} at last");
    assert_eq!(contents(&rig), before);
    images_are_sound(&rig);
    // Nothing is left, here or there.
    assert_eq!(bytes(&rig, &["ct", "--dry-run"]), 0);
    assert_eq!(bytes(&rig, &["ct"]), 0);
    // A snapshot that is being read is left, by name.
    let server = rig.serve(["ct@one"]);
    let said = rig.run(["compact", "ct"]);
    assert!(said.contains("another program"), "{said}");
    server.stop();
    assert_eq!(contents(&rig), before);
}

/// Goal: no byte that a container takes is unexplained, and none is explained that is not there; what
/// is said to be free to go, goes. Method: known contents, a snapshot, zeros, a discarded cluster; by a
/// service with the disk open and without one, against the files themselves.
#[test]
fn every_byte_is_explained() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    on_export(
        &daemon.uri("ct"),
        &["write -P 1 8M 3M", "write -P 2 20M 2M", "flush"],
    );
    rig.run(["snapshot", "create", "ct", "--name", "one"]);
    on_export(&daemon.uri("ct"), &["write -P 3 8M 1M", "discard 20M 1M"]);
    let files = || {
        let (mut sum, mut todo) = (0, vec![rig.root().join("containers/ct")]);
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
                match entry.file_type().unwrap().is_dir() {
                    true => todo.push(entry.path()),
                    false => {
                        File::open(entry.path()).unwrap().sync_all().unwrap();
                        sum += entry.metadata().unwrap().blocks() * 512;
                    }
                }
            }
        }
        sum
    };
    let explained = |what: &str| {
        let there = files();
        let said = rig.json(["df", "ct", "--json"])["disks"][0].clone();
        let of = |name: &str| said[name].as_u64().unwrap();
        let parts = ["data", "snapshots", "unnamed", "metadata", "room"];
        assert_eq!(
            parts.map(of).iter().sum::<u64>(),
            of("host"),
            "{what}: {said}"
        );
        assert_eq!(of("host"), there, "{what}: {said}");
        said
    };
    // Once with the disk open, once closed by the service, once without it.
    let mut client = daemon.open("ct");
    client.flush();
    let open = explained("open");
    client.disconnect();
    explained("closed");
    daemon.stop();
    let said = explained("no service");
    // A MiB is the cluster: 1 + 2 of the snapshot's are shown, 1 was written over, 1 was discarded.
    assert_eq!(said["data"], 4 * MIB, "{said}");
    assert_eq!(said["snapshots"], 2 * MIB, "{said}");
    assert_eq!(
        (&open["data"], &open["snapshots"]),
        (&said["data"], &said["snapshots"])
    );
    assert!(
        said["shared"].as_u64().unwrap() > 0,
        "the template's: {said}"
    );
    // The whole store, and all that is in it.
    let all = rig.json(["df", "--json"]);
    let store = |name: &str| all["store"][name].as_u64().unwrap();
    let parts = ["containers", "layers", "templates", "work", "other"];
    assert_eq!(parts.map(store).iter().sum::<u64>(), store("host"), "{all}");
    assert_eq!(store("containers"), files());
    let text = rig.run(["df"]);
    assert!(text.contains("store: ") && text.contains("ct "), "{text}");
    // A damaged one hides none of the others.
    rig.run(["create", "bad", "--template", "t"]);
    let xml = rig.root().join("containers/bad/DiskDescriptor.xml");
    fs::write(xml, "none").unwrap();
    let said = rig.ploop().arg("df").output().unwrap();
    let (text, error) = (said.stdout, String::from_utf8(said.stderr).unwrap());
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("store: ") && text.contains("ct "), "{text}");
    assert!(
        !said.status.success() && error.contains("containers/bad/"),
        "{error}"
    );
}

/// Goal: a service that serves read-only writes to no image, whatever it is asked. Method: a snapshot
/// that has something to give back.
#[test]
fn a_read_only_service_compacts_nothing() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let server = rig.serve(["ct"]);
    on_export(
        &server.uri("ct"),
        &["write -P 1 8M 2M", "write -P 0 10M 2M"],
    );
    server.stop();
    rig.run(["snapshot", "create", "ct", "--name", "one"]);
    let foretold = bytes(&rig, &["ct", "--dry-run"]);
    assert!(foretold > 0);
    let daemon = Daemon::with(&rig, &["--read-only"]);
    // By its API: the command leaves such a service alone, and does the work itself.
    let api = daemon.api();
    let path = resource(&["containers", "ct", "compact"]);
    let job: Job = api.post(&path, &Compact::default()).unwrap();
    let job = wait_job(&api, job.id, "the refusal", |j| j.state == JobState::Failed);
    assert_eq!(job.error.unwrap().kind, "read-only");
    daemon.stop();
    assert_eq!(bytes(&rig, &["ct", "--dry-run"]), foretold);
}
