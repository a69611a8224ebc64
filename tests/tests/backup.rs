//! Backups with the real programs: under writers, killed, damaged, restored by QEMU's tools alone.
//!
//! What a user would lose: a file that he needs from a backup.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nbd_server::control::client::resource;
use nbd_server::control::model::{Backup, BackupStart, Job};
use ploop_tests::crash::{Rng, env};
use ploop_tests::daemon::{Daemon, snapshots};
use ploop_tests::fio::Fio;
use ploop_tests::mount::wait_for;
use ploop_tests::server::{out, pattern};
use ploop_tests::store::Rig;
use ploop_tests::treehash::file_digest;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 65536;

/// Begins a backup; what its snapshot is called, and the SHA-256 of what that shows.
fn begin(rig: &Rig, daemon: &Daemon, target: &str, since: Option<&str>) -> (Backup, String) {
    let start = BackupStart {
        target: rig.arg(target),
        since: since.map(str::to_owned),
        tracker: since.is_none().then(|| "night".to_owned()),
        ..BackupStart::default()
    };
    let path = resource(&["containers", "ct", "backups"]);
    let begun: Backup = daemon.api().post(&path, &start).unwrap();
    let snapshot = format!("ct@backup-{}", &begun.id[..8]);
    let content = rig.content(&snapshot);
    (begun, content)
}

/// SHA-256 of what QEMU reads in an image, with all that it stands on.
fn by_qemu(rig: &Rig, file: &str) -> String {
    let (file, raw) = (rig.arg(file), rig.arg("by-qemu.raw"));
    out(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", &file, &raw],
    );
    file_digest(Path::new(&raw))
}

/// What of the guest a qcow2 file has itself, as data or as zeros.
fn own(rig: &Rig, file: &str) -> Vec<Range<u64>> {
    let said = out(
        "qemu-img",
        &["map", "--output=json", "-f", "qcow2", &rig.arg(file)],
    );
    let rows: Value = serde_json::from_str(&said).unwrap();
    let mut all: Vec<Range<u64>> = Vec::new();
    let rows = rows.as_array().unwrap().iter();
    for row in rows.filter(|r| r["depth"] == 0 && r["present"] == true) {
        let start = row["start"].as_u64().unwrap();
        let end = start + row["length"].as_u64().unwrap();
        match all.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => all.push(start..end),
        }
    }
    all
}

/// The snapshots of backups.
fn names(daemon: &Daemon) -> Vec<String> {
    let all = snapshots(&daemon.api(), "ct").into_iter();
    let names = all.filter_map(|s| s.name);
    names.filter(|n| n.starts_with("backup-")).collect()
}

fn dirty(rig: &Rig) -> u64 {
    rig.json(["tracker", "list", "ct", "--json"])[0]["dirty"]
        .as_u64()
        .unwrap()
}

/// Raises a flag when dropped.
struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Goal: a chain is the disk as it was at each instant, whatever clients did, and QEMU's tools alone
/// give it back. Method: fio and a writer of zeros and data all the time; the content of each backup's
/// snapshot against what qemu-img reads in the file.
#[test]
fn a_full_backup_and_five_increments_under_writers_are_the_disk_at_each_instant() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let stop = AtomicBool::new(false);
    let files: Vec<String> = (0..6).map(|n| format!("b{n}.qcow2")).collect();
    let mut contents = Vec::new();
    thread::scope(|s| {
        // Also when something panics: the writer would never end.
        let _stop = Raised(&stop);
        // Few writes enough that an increment is less than all.
        let seconds = env("PLOOP_BACKUP_SECONDS", 6);
        let fio = Fio::start(&daemon.uri("ct"), seconds, &["--rate_iops=100"]);
        let (at_work, stopped) = (&daemon, &stop);
        s.spawn(move || {
            let mut client = at_work.open("ct");
            let mut rng = Rng(8);
            while !stopped.load(Ordering::Relaxed) {
                // Where fio does not write.
                let at = 40 * MIB + rng.below(20 * MIB / 512) * 512;
                let len = (1 + rng.below(24)) * 512;
                match rng.below(12) {
                    0 => client.write(at, &vec![0; len as usize]),
                    1 => client.flush(),
                    n => client.write(at, &pattern(len as usize, n)),
                }
                thread::sleep(std::time::Duration::from_millis(1));
            }
            client.disconnect();
        });
        for (n, file) in files.iter().enumerate() {
            let since = (n > 0).then_some("night");
            let (begun, content) = begin(&rig, &daemon, file, since);
            assert!(!begun.resumed);
            let option = ["--tracker", "--since"][since.map_or(0, |_| 1)];
            let said = rig.run(["backup", "ct", file, option, "night"]);
            assert!(said.contains("gone on with"), "{said}");
            contents.push(content);
        }
        stop.store(true, Ordering::Relaxed);
        fio.wait();
    });
    for (file, content) in files.iter().zip(&contents) {
        assert_eq!(&by_qemu(&rig, file), content, "{file}");
        out("qemu-img", &["check", "-f", "qcow2", &rig.arg(file)]);
        rig.run(["backup", "verify", file]);
    }
    assert_eq!(names(&daemon), Vec::<String>::new(), "no snapshot stays");
    let last = rig.content("b5.qcow2");
    assert_eq!(&last, contents.last().unwrap(), "by our own reader");
    let info: Value = serde_json::from_str(&out(
        "qemu-img",
        &["info", "--output=json", &rig.arg("b5.qcow2")],
    ))
    .unwrap();
    assert_eq!(info["backing-filename"], "b4.qcow2");
    assert_eq!(info["backing-filename-format"], "qcow2");
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
}

/// Goal: an increment has what was written since, and nothing else; the next one what came after its
/// instant. Method: known writes, over data and over holes, zeros and trims among them; coarse and
/// fine granules.
#[test]
fn an_increment_has_the_written_granules_and_no_other() {
    for (granularity, unit) in [("64K", GRANULE), ("4K", 4096), ("1M", MIB)] {
        let rig = Rig::new();
        rig.small_template("t", &["ct"]);
        let daemon = Daemon::start(&rig);
        let mut client = daemon.open("ct");
        client.write(20 * MIB, &pattern(MIB as usize, 1));
        let full = [
            "backup",
            "ct",
            "full.raw",
            "--to",
            "raw",
            "--tracker",
            "night",
        ];
        rig.run(full.iter().chain(&["--granularity", granularity]));
        assert_eq!(dirty(&rig), 0);
        assert_eq!(fs::metadata(rig.path("full.raw")).unwrap().len(), 64 * MIB);
        let writes = [
            (20 * MIB + 5 * GRANULE + 512, 1024),
            (33 * MIB, 4096),
            (50 * MIB, 512),
        ];
        for (at, len) in writes {
            client.write(at, &pattern(len, 3));
        }
        client.write(20 * MIB, &vec![0; GRANULE as usize]);
        let zeros = 20 * MIB..20 * MIB + GRANULE.max(unit);
        let mut expected = vec![zeros];
        for (at, len) in writes {
            let start = at / unit * unit;
            let end = (at + len as u64).next_multiple_of(unit);
            match expected.last_mut() {
                Some(last) if last.end >= start => last.end = last.end.max(end),
                _ => expected.push(start..end),
            }
        }
        let before = rig.run(["backup", "ct", "one.qcow2", "--since", "night"]);
        assert!(before.contains("an increment"), "{before}");
        assert_eq!(own(&rig, "one.qcow2"), expected, "{granularity}");
        // Nothing came since.
        rig.run(["backup", "ct", "two.qcow2", "--since", "night", "--content"]);
        assert_eq!(own(&rig, "two.qcow2"), [], "{granularity}");
        client.disconnect();
        daemon.stop();
        assert_eq!(
            by_qemu(&rig, "two.qcow2"),
            rig.content("ct"),
            "{granularity}"
        );
        // The whole of it into another place: names are relative.
        let moved = rig.path("moved");
        fs::create_dir(&moved).unwrap();
        for file in ["full.raw", "one.qcow2", "two.qcow2"] {
            fs::rename(rig.path(file), moved.join(file)).unwrap();
        }
        assert_eq!(by_qemu(&rig, "moved/two.qcow2"), rig.content("ct"));
    }
}

/// Goal: whatever is cut goes on, or is dropped, and no bit is lost. Method: a copy held to a rate is
/// cancelled, and the service killed, in its middle; more is written; then it goes on, or is
/// abandoned.
#[test]
fn a_backup_that_was_killed_goes_on_or_gives_its_bits_back() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let mut daemon = Daemon::start(&rig);
    let mut rng = Rng(5);
    rig.run(["backup", "ct", "b0.qcow2", "--tracker", "night"]);
    let mut last = "b0.qcow2".to_owned();
    for round in 1..7u8 {
        let mut client = daemon.open("ct");
        let mut written = Vec::new();
        for _ in 0..40 {
            let at = rng.below(900) * GRANULE;
            client.write(at, &pattern(GRANULE as usize, u64::from(round)));
            written.push(at);
        }
        client.flush();
        let file = format!("b{round}.qcow2");
        let (begun, content) = begin(&rig, &daemon, &file, Some("night"));
        assert_eq!(begun.base.as_deref(), Some(rig.arg(&last).as_str()));
        let after = rng.below(900) * GRANULE;
        client.write(after, &pattern(512, u64::from(round) + 100));
        client.flush();
        let mut slow = rig.ploop();
        slow.args(["backup", "ct", &file, "--since", "night", "--rate", "128K"]);
        slow.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut slow = slow.spawn().unwrap();
        let part = rig.path(&format!("{file}.part"));
        wait_for("a part of the file", || {
            fs::metadata(&part).is_ok_and(|m| m.len() > 4 * GRANULE)
        });
        if round % 2 == 0 {
            daemon.kill();
            daemon = Daemon::start(&rig);
            client = daemon.open("ct");
        } else {
            let job = daemon
                .jobs()
                .into_iter()
                .rfind(|j| j.kind == "backup")
                .unwrap();
            let path = resource(&["jobs", &job.id.to_string(), "cancel"]);
            let _: Job = daemon.api().post(&path, &()).unwrap();
        }
        slow.wait().unwrap();
        assert!(part.exists() && !rig.path(&file).exists());
        let pending = rig.json(["backup", "list", "ct", "--json"]);
        assert_eq!(pending[0]["id"], begun.id, "{pending}");
        // It is somebody's.
        rig.refused(5, ["tracker", "clear", "ct", "night"], &["abandon"]);
        let snapshot = format!("backup-{}", &begun.id[..8]);
        rig.refused(5, ["snapshot", "delete", "ct", &snapshot], &["abandon"]);
        if round % 3 == 0 {
            rig.run(["backup", "ct", &file, "--abandon"]);
            assert!(!part.exists());
            // All of it is in the next one: what came before, and what came after.
            let (_, content) = begin(&rig, &daemon, &file, Some("night"));
            rig.run(["backup", "ct", &file, "--since", "night"]);
            assert_eq!(by_qemu(&rig, &file), content, "round {round}");
            let own = own(&rig, &file);
            for at in written.iter().chain([&after]) {
                assert!(
                    own.iter().any(|r| r.contains(at)),
                    "round {round}: {at} of {own:?}"
                );
            }
        } else {
            rig.refused(4, ["backup", "ct", &file], &["since night"]);
            rig.run(["backup", "ct", &file, "--since", "night"]);
            assert_eq!(by_qemu(&rig, &file), content, "round {round}");
        }
        rig.run(["backup", "verify", &file]);
        assert_eq!(
            rig.json(["backup", "list", "ct", "--json"]),
            serde_json::json!([])
        );
        client.disconnect();
        last = file;
    }
    assert_eq!(names(&daemon), Vec::<String>::new());
    daemon.stop();
    // What came behind the last instant alone.
    rig.run(["backup", "ct", "end.qcow2", "--since", "night"]);
    assert_eq!(by_qemu(&rig, "end.qcow2"), rig.content("ct"));
}

/// Goal: a damaged backup is known before somebody needs it, and a sound one comes back. Method: each
/// file of a chain flipped in a byte, cut, exchanged.
#[test]
fn verify_finds_what_is_wrong_and_restore_gives_the_same_disk() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    // With nobody who serves it.
    rig.run(["backup", "ct", "full.qcow2", "--tracker", "night"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    client.write(40 * MIB, &pattern(300_000 / 512 * 512, 9));
    client.disconnect();
    daemon.stop();
    rig.run(["backup", "ct", "one.qcow2", "--since", "night"]);
    let content = rig.content("ct");
    let said = rig.run(["backup", "verify", "one.qcow2"]);
    assert_eq!(said.matches(": sound").count(), 2, "{said}");

    let done = rig.json(["restore", "one.qcow2", "back", "--json"]);
    assert_eq!(
        (&done["size"], &done["verified"]),
        (&(64 * MIB).into(), &true.into())
    );
    rig.run(["restore", "full.qcow2", "one.qcow2", "chain"]);
    for name in ["back", "chain"] {
        assert_eq!(rig.content(name), content);
        assert!(rig.run(["check", name]).contains("clean"));
    }
    let before = rig.everything();
    rig.refused(4, ["restore", "one.qcow2", "ct"], &["ct"]);
    rig.refused(
        2,
        ["restore", "one.qcow2", "full.qcow2", "new"],
        &["not one chain"],
    );
    for file in ["full.qcow2", "one.qcow2"] {
        let path = rig.path(file);
        let sound = fs::read(&path).unwrap();
        let places = [4, 70_000, sound.len() / 2, sound.len() - 1];
        for at in places {
            let mut bad = sound.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            rig.refused(6, ["backup", "verify", "one.qcow2"], &["damaged", file]);
        }
        fs::write(&path, &sound[..sound.len() - 512]).unwrap();
        rig.refused(6, ["backup", "verify", "one.qcow2"], &["damaged"]);
        let mut bad = sound.clone();
        // Of the guest's data: the image itself is as good as before.
        let at = sound
            .windows(8)
            .rposition(|w| w.iter().all(|b| *b != 0))
            .unwrap();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        rig.refused(6, ["restore", "one.qcow2", "new"], &["damaged"]);
        fs::write(&path, &sound).unwrap();
    }
    rig.run(["backup", "verify", "one.qcow2"]);
    ploop_tests::store::assert_unchanged(&before, &rig.everything(), "a refused restore");
    // The records are for that alone.
    for file in ["full.qcow2", "one.qcow2"] {
        fs::remove_file(rig.path(&format!("{file}.json"))).unwrap();
    }
    assert_eq!(by_qemu(&rig, "one.qcow2"), content);
    rig.run(["restore", "one.qcow2", "bare"]);
    assert_eq!(rig.content("bare"), content);
    rig.refused(3, ["backup", "verify", "one.qcow2"], &["one.qcow2.json"]);
    rig.refused(
        3,
        ["backup", "ct", "two.qcow2", "--since", "night"],
        &["--base"],
    );
}

/// Goal: nobody gets an increment that lacks something. Method: what breaks the chain is said.
#[test]
fn what_is_no_increment_is_refused() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    rig.run(["tracker", "start", "ct", "night"]);
    rig.refused(
        2,
        ["backup", "ct", "a.qcow2", "--since", "night"],
        &["--tracker night"],
    );
    rig.refused(3, ["backup", "ct", "a.qcow2", "--since", "day"], &["day"]);
    rig.run(["backup", "ct", "a.qcow2", "--tracker", "night"]);
    rig.refused(4, ["backup", "ct", "a.qcow2"], &["a.qcow2"]);
    rig.refused(
        7,
        ["backup", "ct", "b.raw", "--since", "night", "--to", "raw"],
        &["qcow2"],
    );
    for dir in ["old", "new"] {
        fs::create_dir(rig.path(dir)).unwrap();
    }
    for file in ["a.qcow2", "a.qcow2.json"] {
        fs::rename(rig.path(file), rig.path("old").join(file)).unwrap();
    }
    let b = ["backup", "ct", "new/b.qcow2", "--since", "night"];
    rig.refused(3, b, &["--base"]);
    rig.run(b.iter().chain(&["--base", "old/a.qcow2"]));
    rig.run(["backup", "verify", "new/b.qcow2"]);
    assert_eq!(by_qemu(&rig, "new/b.qcow2"), rig.content("ct"));
    rig.refused(9, ["restore", "new/b.qcow2", "back"], &["Name all files"]);
    rig.run(["restore", "old/a.qcow2", "new/b.qcow2", "back"]);
    assert_eq!(rig.content("back"), rig.content("ct"));
    // Cleared by hand, it does not know what came before.
    rig.run(["tracker", "clear", "ct", "night"]);
    rig.refused(
        2,
        ["backup", "ct", "c.qcow2", "--since", "night"],
        &["--tracker night"],
    );
    rig.run([
        "backup",
        "ct",
        "p.hds",
        "--to",
        "ploop",
        "--tracker",
        "night",
    ]);
    assert_eq!(rig.content("p.hds"), rig.content("ct"));
    rig.run(["backup", "verify", "p.hds"]);
    rig.refused(
        7,
        ["backup", "ct", "c.qcow2", "--since", "night"],
        &["ploop image"],
    );
    let left = rig.run(["snapshot", "list", "ct"]);
    assert!(!left.contains("backup-"), "{left}");
}

/// Goal: a file system is never left frozen, and a backup never taken of one that was thawed too
/// early. Method: commands that say when they ran.
#[test]
fn what_is_frozen_is_thawed_whatever_happens() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let log = rig.path("log");
    let said = || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        drop(fs::remove_file(&log));
        text
    };
    let say = |word: &str| format!("echo {word} >> {}", log.display());
    let (freeze, thaw) = (say("freeze"), say("thaw"));
    let within = |seconds: &str, target: &str, freeze: &str, thaw: &str| -> Vec<String> {
        let hooks = ["--freeze", freeze, "--thaw", thaw];
        let words = [
            &["backup", "ct", target],
            &hooks[..],
            &["--hook-timeout", seconds],
        ];
        words.concat().into_iter().map(str::to_owned).collect()
    };
    let hooked = |target: &str, freeze: &str, thaw: &str| within("120", target, freeze, thaw);
    rig.run(hooked("a.qcow2", &freeze, &thaw));
    assert_eq!(said(), "freeze\nthaw\n");
    let fails = format!("{freeze}; exit 3");
    rig.refused(1, hooked("b.qcow2", &fails, &thaw), &["exit code 3"]);
    assert_eq!(said(), "freeze\nthaw\n");
    let hangs = format!("{freeze}; sleep 1000");
    rig.refused(1, within("5", "b.qcow2", &hangs, &thaw), &["more than 5 s"]);
    assert_eq!(said(), "freeze\nthaw\n");
    assert_eq!(
        rig.json(["backup", "list", "ct", "--json"]),
        serde_json::json!([])
    );
    let fails = format!("{thaw}; exit 4");
    rig.refused(
        1,
        hooked("b.qcow2", &freeze, &fails),
        &["exit code 4", "Thaw it by hand"],
    );
    assert_eq!(said(), "freeze\nthaw\n");
    // It has begun, and goes on without them.
    rig.run(hooked("b.qcow2", &freeze, &thaw));
    assert_eq!(said(), "");
    // Killed while it is frozen.
    let mut killed = rig.ploop();
    killed.args(hooked("c.qcow2", &format!("{freeze}; sleep 1"), &thaw));
    let mut killed = killed.stdin(Stdio::null()).spawn().unwrap();
    wait_for("the freeze", || {
        fs::read_to_string(&log).is_ok_and(|text| text == "freeze\n")
    });
    killed.kill().unwrap();
    killed.wait().unwrap();
    wait_for("the thaw", || {
        fs::read_to_string(&log).is_ok_and(|text| text == "freeze\nthaw\n")
    });
}
