//! `ploop resize` of disks that nobody uses, with the real binaries.
//!
//! What a user would lose: files, when what they lie in is moved; a snapshot's size; the disk, when it
//! is killed half-way.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nbd_server::control::model::Resize;
use nbd_server::wire::request::kind;
use ploop_tests::client::Ask;
use ploop_tests::crash::{Rng, env};
use ploop_tests::daemon::Daemon;
use ploop_tests::mount::{Mounted, MountedExport, e2fsck};
use ploop_tests::server::{out, pattern, qemu_check};
use ploop_tests::store::{Rig, assert_unchanged};
use ploop_tests::tools::{run, tool};
use ploop_tests::treehash::{Tree, tree};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// The files of `source`, after its file system and partition table were found sound.
fn files(rig: &Rig, source: &str) -> Tree {
    let raw = raw(rig, source);
    e2fsck(&raw, MIB);
    let table = String::from_utf8(run(tool("sgdisk").arg("-v").arg(&raw)).stdout).unwrap();
    assert!(table.contains("No problems found"), "{source}: {table}");
    let mounted = Mounted::new(&raw, "loop,ro,offset=1048576");
    let files = tree(mounted.path());
    drop(mounted);
    fs::remove_file(raw).unwrap();
    files
}

fn raw(rig: &Rig, source: &str) -> PathBuf {
    let raw = rig.path("raw");
    rig.run(["convert", source, raw.to_str().unwrap(), "--to", "raw"]);
    raw
}

/// Writes random files of 4 MiB into a container, by way of a mount.
fn write(rig: &Rig, container: &str, dir: &str, count: u32) {
    let daemon = Daemon::start(rig);
    let mounted = MountedExport::new(&daemon.uri(container));
    fill(&mounted.path().join(dir), count);
    run(tool("sync").arg("-f").arg(mounted.path()));
    drop(mounted.unmount());
    daemon.stop();
}

/// Fills a directory of a mounted file system; what is left lies far behind.
fn fill(dir: &Path, count: u32) {
    fs::create_dir_all(dir).unwrap();
    let mut rng = Rng(u64::from(count) + 1);
    for n in 0..count {
        let bytes: Vec<u8> = (0..MIB / 2)
            .flat_map(|_| rng.bits().to_le_bytes())
            .collect();
        fs::write(dir.join(n.to_string()), bytes).unwrap();
    }
    run(tool("sync").arg("-f").arg(dir));
    for n in 0..count * 3 / 4 {
        fs::remove_file(dir.join(n.to_string())).unwrap();
    }
}

fn size(rig: &Rig, source: &str) -> u64 {
    rig.json(["info", source, "--json"])["virtual_size"]
        .as_u64()
        .unwrap()
}

fn resized(rig: &Rig, args: &[&str]) -> Value {
    rig.json(["resize"].iter().chain(args).chain(&["--json"]))
}

/// Images of the container's own.
fn images(rig: &Rig, container: &str) -> Vec<PathBuf> {
    let dir = rig.root().join("containers").join(container);
    let all = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    all.filter(|p| p.file_name().unwrap().to_str().unwrap().contains(".hds"))
        .collect()
}

fn sound(rig: &Rig, container: &str) {
    images(rig, container).iter().for_each(|i| qemu_check(i));
    let said = rig.run(["check", container]);
    assert!(said.contains("clean"), "{said}");
    let side = rig.root().join("containers").join(container).join(".ploop");
    assert!(!side.join("work").exists(), "a work copy is left");
}

/// Goal: no file is lost on the way to another size and back, and what was cut off is given back.
/// Method: growing, shrinking, growing again, with files that must move, seen through a mount.
#[test]
fn a_disk_grows_and_shrinks_with_its_files_and_gives_back_what_was_cut() {
    let rig = Rig::new();
    rig.small_template("t", &["ct", "other"]);
    let done = resized(&rig, &["ct", "400M"]);
    assert_eq!(done["before"], 64 * MIB);
    assert_eq!(done["size"], 400 * MIB);
    assert_eq!(done["filesystem"], 398 * MIB);
    assert_eq!(
        (&done["reason"], &done["note"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(size(&rig, "ct"), 400 * MIB);
    // One top on the template, as before.
    assert_eq!(images(&rig, "ct").len(), 1);
    sound(&rig, "ct");
    write(&rig, "ct", "home/many", 40);
    let before = files(&rig, "ct");
    assert!(before.contains_key(Path::new("home/many/39")));

    // Smaller only where that is said, larger only where it is not.
    let state = rig.everything();
    rig.refused(2, ["resize", "ct", "200M"], &["--shrink"]);
    rig.refused(2, ["resize", "ct", "500M", "--shrink"], &["--shrink"]);
    rig.refused(2, ["resize", "ct", "0"], &["size"]);
    // What does not fit is refused with the size that does.
    let said = rig.refused(8, ["resize", "ct", "16M", "--shrink"], &["does not fit"]);
    let least = said.split("does not fit: ").nth(1).unwrap();
    let least: u64 = least.split(' ').next().unwrap().parse().unwrap();
    assert!((40 * MIB..200 * MIB).contains(&least), "{said}");
    assert_unchanged(&state, &rig.everything(), "refused");

    for to in [200 * MIB, least] {
        let done = resized(&rig, &["ct", &to.to_string(), "--shrink"]);
        assert_eq!(done["size"], to, "{done}");
        assert_eq!(size(&rig, "ct"), to);
        assert_eq!(rig.json(["list", "--json"])[0]["size"], to);
        assert_eq!(fs::metadata(raw(&rig, "ct")).unwrap().len(), to);
        fs::remove_file(rig.path("raw")).unwrap();
        assert!(files(&rig, "ct") == before);
        assert_eq!(images(&rig, "ct").len(), 1);
        sound(&rig, "ct");
    }
    // Clients see that size, and nothing behind it.
    let daemon = Daemon::start(&rig);
    let shown = out("nbdinfo", &["--size", &daemon.uri("ct")]);
    assert_eq!(shown.trim(), least.to_string());
    let mut client = daemon.open("ct");
    let answer = client.ask(Ask::new(kind::READ, 0, least..least + 4096));
    assert_ne!(answer.error, 0);
    client.disconnect();
    daemon.stop();

    // What was cut off takes no room, and reads as zeros when the disk is larger again.
    let held: u64 = images(&rig, "ct")
        .iter()
        .map(|i| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(i).unwrap()) * 512)
        .sum();
    assert!(held <= least, "{held} bytes of the host for {least}");
    let done = resized(&rig, &["ct", "300M", "--no-filesystem"]);
    assert_eq!(
        (&done["filesystem"], &done["size"]),
        (&Value::Null, &(300 * MIB).into())
    );
    let raw = raw(&rig, "ct");
    let bytes = fs::read(&raw).unwrap();
    assert_eq!(bytes.len() as u64, 300 * MIB);
    assert!(bytes[least as usize..].iter().all(|&b| b == 0));
    fs::remove_file(raw).unwrap();
    // The file system follows when it is asked to, and beyond what the images had.
    for to in ["300M", "500M"] {
        let done = resized(&rig, &["ct", to]);
        assert_eq!(done["filesystem"].as_u64().unwrap() + 2 * MIB, done["size"]);
        assert!(files(&rig, "ct") == before);
    }
    assert_eq!(size(&rig, "other"), 64 * MIB);
    sound(&rig, "ct");
    let said = rig.run(["resize", "ct", "500M"]);
    assert!(said.contains("its filesystem has 498M"), "{said}");
}

/// Goal: each snapshot keeps the size and the files that it was made with, and so does what comes of
/// it. Method: snapshots before and after growing and shrinking; switches between them; clones, templates
/// and exports of them.
#[test]
fn a_snapshot_keeps_its_size_and_gives_it_back() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    rig.run(["snapshot", "create", "ct", "--name", "small"]);
    resized(&rig, &["ct", "300M"]);
    write(&rig, "ct", "home/many", 20);
    rig.run(["snapshot", "create", "ct", "--name", "large"]);
    resized(&rig, &["ct", "160M", "--shrink"]);
    rig.run(["snapshot", "create", "ct", "--name", "cut"]);
    let sizes = [
        ("small", 64 * MIB),
        ("large", 300 * MIB),
        ("cut", 160 * MIB),
    ];
    let mut contents = Vec::new();
    for (name, bytes) in sizes {
        let source = format!("ct@{name}");
        assert_eq!(size(&rig, &source), bytes, "{name}");
        contents.push(rig.content(&source));
    }
    let many = files(&rig, "ct@large");
    assert!(many.contains_key(Path::new("home/many/19")));
    assert!(files(&rig, "ct@cut") == many);
    // Back and forth, twice: the second time over what the first has left.
    for (name, bytes) in [sizes, [sizes[1], sizes[2], sizes[0]]].concat() {
        let switched = rig.json(["snapshot", "switch", "ct", name, "--json"]);
        assert_eq!(switched["snapshot"].as_str().map(str::len), Some(38));
        assert_eq!(size(&rig, "ct"), bytes, "{name}");
        let at = sizes.iter().position(|s| s.0 == name).unwrap();
        assert_eq!(rig.content("ct"), contents[at], "{name}");
        for (i, (other, bytes)) in sizes.into_iter().enumerate() {
            let source = format!("ct@{other}");
            assert_eq!(size(&rig, &source), bytes, "{name}, {other}");
            assert_eq!(rig.content(&source), contents[i], "{name}, {other}");
        }
    }
    // What is written to a disk that was cut stays so, as a branch.
    rig.run(["snapshot", "switch", "ct", "cut"]);
    write(&rig, "ct", "home/more", 4);
    let more = files(&rig, "ct");
    let kept = rig.json(["snapshot", "switch", "ct", "large", "--json"])["kept"].clone();
    let kept = format!("ct@{}", kept.as_str().unwrap());
    assert_eq!(size(&rig, &kept), 160 * MIB);
    assert!(files(&rig, &kept) == more);
    rig.run(["snapshot", "switch", "ct", "cut"]);

    rig.run(["create", "fork", "--from", "ct@cut"]);
    rig.run(["create", "wide", "--from", "ct@cut", "--size", "200M"]);
    rig.run(["template", "create", "golden", "--from", "ct@cut"]);
    rig.run(["create", "of", "--template", "golden"]);
    rig.run(["create", "over", "--template", "golden", "--size", "400M"]);
    rig.run(["export", "ct@cut", "out.disk"]);
    for (source, bytes) in [
        ("fork", 160),
        ("wide", 200),
        ("of", 160),
        ("over", 400),
        ("out.disk", 160),
    ] {
        assert_eq!(size(&rig, source), bytes * MIB, "{source}");
        assert!(files(&rig, source) == many, "{source}");
    }
    let info = rig.json(["template", "info", "golden", "--json"]);
    assert_eq!(info["size"], 160 * MIB);
    rig.run(["template", "flatten", "golden"]);
    let info = rig.json(["template", "info", "golden", "--json"]);
    assert_eq!(info["size"], 160 * MIB);
    rig.run(["create", "flat", "--template", "golden"]);
    assert!(files(&rig, "flat") == many);
    // A merge changes no size.
    rig.run(["snapshot", "delete", "ct", "large"]);
    rig.run(["snapshot", "delete", "ct", "small"]);
    assert_eq!(size(&rig, "ct@cut"), 160 * MIB);
    assert!(files(&rig, "ct@cut") == many);
    assert!(files(&rig, "ct") == many);
}

/// Goal: a disk for other tools, which know no size limit. Method: flattened, smaller; what QEMU
/// says of its only image; its template can go.
#[test]
fn a_flattened_disk_is_one_image_of_its_size_and_stands_on_nothing() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    resized(&rig, &["ct", "300M"]);
    write(&rig, "ct", "home/many", 20);
    let before = files(&rig, "ct");
    rig.run(["snapshot", "create", "ct", "--name", "s"]);
    let state = rig.everything();
    let flatten = ["resize", "ct", "128M", "--shrink", "--flatten"];
    rig.refused(7, flatten, &["snapshots", ": s"]);
    assert_unchanged(&state, &rig.everything(), "refused");
    rig.run(["snapshot", "delete", "ct", "s"]);
    assert_eq!(resized(&rig, &flatten[1..])["size"], 128 * MIB);
    assert!(files(&rig, "ct") == before);
    sound(&rig, "ct");
    let [image] = &images(&rig, "ct")[..] else {
        panic!("{:?}", images(&rig, "ct"));
    };
    let info = out(
        "qemu-img",
        &["info", "-f", "parallels", image.to_str().unwrap()],
    );
    assert!(info.contains(&format!("({} bytes)", 128 * MIB)), "{info}");
    assert_eq!(rig.json(["list", "--json"])[0]["depth"], 1);
    // Nobody needs the template's layers.
    rig.run(["template", "rm", "t"]);
    assert_eq!(fs::read_dir(rig.root().join("layers")).unwrap().count(), 0);
    assert!(files(&rig, "ct") == before);
    resized(&rig, &["ct", "200M"]);
    assert!(files(&rig, "ct") == before);
    sound(&rig, "ct");
}

/// Goal: an increment lacks nothing of what flattening wrote over. Method: free blocks are full where
/// the new end's partition table has zeros; what the increment's chain shows is what the disk shows.
#[test]
fn an_increment_over_flattening_has_what_became_zeros() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    resized(&rig, &["ct", "300M"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    client.write(128 * MIB - 65536, &pattern(65536, 1));
    client.disconnect();
    daemon.stop();
    let full = ["backup", "ct", "b0.qcow2", "--tracker", "night"];
    rig.run(full.iter().chain(&["--granularity", "4K"]));
    resized(&rig, &["ct", "128M", "--shrink", "--flatten"]);
    rig.run(["backup", "ct", "b1.qcow2", "--since", "night"]);
    assert_eq!(rig.content("b1.qcow2"), rig.content("ct"));
}

/// Goal: disks that are in no store, and what is no disk or cannot be read.
#[test]
fn a_bare_disk_is_resized_and_what_cannot_be_is_refused_by_name() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    rig.run(["export", "ct", "bare"]);
    let before = files(&rig, "bare");
    // By our words, and by OpenVZ's.
    resized(&rig, &["bare", "256M"]);
    rig.run(["resize", "-s", "614400", "bare/DiskDescriptor.xml"]);
    assert_eq!(size(&rig, "bare"), 300 * MIB);
    resized(&rig, &["bare", "100M", "--shrink"]);
    assert_eq!(size(&rig, "bare"), 100 * MIB);
    assert!(files(&rig, "bare") == before);
    // What it stands on is in the directory, and could be anybody's snapshot.
    let flatten = ["resize", "bare", "80M", "--shrink", "--flatten"];
    rig.refused(7, flatten, &["snapshots"]);
    rig.run(["snapshot", "merge", "bare", "--all"]);
    resized(&rig, &flatten[1..]);
    assert_eq!(size(&rig, "bare"), 80 * MIB);
    assert!(files(&rig, "bare") == before);
    rig.run(["check", "bare"]);

    let raw = raw(&rig, "bare");
    rig.run(["convert", "bare", "disk.qcow2", "--to", "qcow2"]);
    rig.run(["convert", "bare", "disk.hds", "--to", "ploop"]);
    for single in [raw.to_str().unwrap(), "disk.qcow2", "disk.hds"] {
        rig.refused(7, ["resize", single, "300M"], &["single image"]);
    }
    rig.refused(3, ["resize", "nope", "300M"], &["nope"]);
    rig.refused(2, ["resize", "bare"], &["SIZE"]);

    run(tool("truncate")
        .args(["-s", "400M"])
        .arg(rig.path("xfs.raw")));
    run(tool("mkfs.xfs").arg("-q").arg(rig.path("xfs.raw")));
    rig.run(["template", "import", "x", "xfs.raw"]);
    rig.run(["create", "xfs", "--template", "x"]);
    let content = rig.content("xfs");
    let state = rig.everything();
    rig.refused(7, ["resize", "xfs", "350M", "--shrink"], &["XFS"]);
    assert_unchanged(&state, &rig.everything(), "refused");
    let done = resized(&rig, &["xfs", "500M"]);
    assert_eq!(done["size"], 500 * MIB);
    assert!(done["reason"].as_str().unwrap().contains("XFS"), "{done}");
    // It was not grown, so it can be cut again; not further.
    resized(&rig, &["xfs", "400M", "--shrink", "--no-filesystem"]);
    assert_eq!(rig.content("xfs"), content);
    let cut = ["resize", "xfs", "200M", "--shrink", "--no-filesystem"];
    rig.refused(7, cut, &["data behind the new end"]);
    assert_eq!(rig.content("xfs"), content);
}

/// Goal: what is in use is left alone; a service does it where nobody uses the disk.
#[test]
fn a_service_resizes_what_nobody_uses() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let before = files(&rig, "ct");
    let daemon = Daemon::start(&rig);
    let client = daemon.open("ct");
    rig.refused(5, ["resize", "ct", "48M", "--shrink"], &["in use"]);
    client.disconnect();
    assert_eq!(resized(&rig, &["ct", "200M"])["size"], 200 * MIB);
    resized(&rig, &["ct", "96M", "--shrink"]);
    let shown = out("nbdinfo", &["--size", &daemon.uri("ct")]);
    assert_eq!(shown.trim(), (96 * MIB).to_string());
    let done: Vec<_> = daemon
        .jobs()
        .into_iter()
        .filter_map(|j| j.resized)
        .collect();
    let sizes: Vec<u64> = done.iter().map(|r| r.size).collect();
    assert_eq!(sizes, [200 * MIB, 96 * MIB]);
    let request = Resize {
        size: 1,
        ..Resize::default()
    };
    let path = nbd_server::control::client::resource(&["containers", "ct", "resize"]);
    let job: nbd_server::control::model::Job = daemon.api().post(&path, &request).unwrap();
    let e = daemon.api().wait(job.id, |_| ()).unwrap_err();
    assert!(e.to_string().contains("--shrink"), "{e}");
    daemon.stop();
    assert!(files(&rig, "ct") == before);
    sound(&rig, "ct");
}

/// Goal: killed at any instant, a disk has its old size or its new one, and its files; the next
/// command goes on. Method: kill -9 of the command after a random time.
#[test]
fn a_resize_that_is_killed_at_any_time_leaves_the_old_size_or_the_new_one() {
    let times = env("PLOOP_KILLS", 12);
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    resized(&rig, &["ct", "128M"]);
    write(&rig, "ct", "home/many", 8);
    let before = files(&rig, "ct");
    let mut rng = Rng(env("PLOOP_SEED", 5));
    let (mut now, mut cut, mut round) = (128, 0, 0);
    while cut < times {
        round += 1;
        assert!(round < 20 * times, "{cut} of {round} were cut");
        let to = if now == 128 { 80 } else { 128 };
        let mut command = rig.ploop();
        command.args(["resize", "ct", &format!("{to}M")]);
        if to < now {
            command.arg("--shrink");
        }
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let wait = Duration::from_micros(rng.below(700_000));
        let mut child = command.spawn().unwrap();
        std::thread::sleep(wait);
        child.kill().unwrap();
        let done = child.wait().unwrap().success();
        let what = format!("round {round}, {now}M to {to}M, after {wait:?}");
        let shown = size(&rig, "ct") / MIB;
        assert!(shown == to || shown == now && !done, "{what}: {shown}M");
        assert!(files(&rig, "ct") == before, "{what}");
        cut += u64::from(!done);
        now = shown;
        // The next command ends it.
        if rng.once_in(2) {
            let to = now + 8;
            resized(&rig, &["ct", &format!("{to}M")]);
            now = 128;
            match to < now {
                true => drop(resized(&rig, &["ct", "128M"])),
                false => drop(resized(&rig, &["ct", "128M", "--shrink"])),
            }
            assert_eq!(images(&rig, "ct").len(), 1, "{what}");
            sound(&rig, "ct");
        }
    }
    eprintln!("{cut} cut in {round} rounds");
}

/// Goal: a copy as large as the disk does not fill the host for ever when a service was killed while
/// it resized. Method: what that leaves; the disk is served again.
#[test]
fn the_work_copy_of_a_killed_resize_goes_when_the_disk_is_served_again() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let work = rig.root().join("containers/ct/.ploop/work");
    fs::create_dir_all(&work).unwrap();
    fs::write(work.join("disk.raw"), vec![1; MIB as usize]).unwrap();
    let daemon = Daemon::start(&rig);
    daemon.open("ct").disconnect();
    assert!(!work.exists());
    daemon.stop();
}

/// Goal: who serves one disk need not wait to learn that it stays open, and it grows all the same.
#[test]
fn a_disk_that_is_served_alone_grows_and_says_what_keeps_it_open() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let server = rig.serve(["ct"]);
    assert_eq!(resized(&rig, &["ct", "100M"])["size"], 100 * MIB);
    let says = ["as long as it is served", "Stop the service"];
    rig.refused(5, ["resize", "ct", "80M", "--shrink"], &says);
    server.stop();
    assert_eq!(resized(&rig, &["ct", "80M", "--shrink"])["size"], 80 * MIB);
    sound(&rig, "ct");
}
