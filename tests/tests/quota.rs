//! A container's quota, with the real binaries: what a full one is refused, and what it is not.
//!
//! What a user would lose: an operator, the host, when a container takes more than it may; the
//! container, writes to what it has, its snapshots, or the way out of being full.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nbd_server::control::client::resource;
use nbd_server::control::model::{Info, Quota, QuotaChange};
use nbd_server::wire::request::kind;
use ploop_tests::client::{Ask, Client};
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::fsx::Rng;
use ploop_tests::mount::MountedExport;
use ploop_tests::store::Rig;
use rustix::fs::{SeekFrom, seek};

const GRANULE: u64 = 4096;
const ENOSPC: u32 = 28;
const MIB: u64 = 1 << 20;

/// Where the small template has no data.
const FREE: u64 = 42 * MIB;

fn quota(daemon: &Daemon, container: &str) -> Quota {
    daemon
        .api()
        .get(&resource(&["containers", container, "quota"]))
        .unwrap()
}

fn set(daemon: &Daemon, container: &str, quota: u64) -> Quota {
    let path = resource(&["containers", container, "quota"]);
    daemon.api().patch(&path, &QuotaChange { quota }).unwrap()
}

fn write(client: &mut Client, at: u64, fill: u8) -> u32 {
    client
        .ask(Ask::write(0, at, &[fill; GRANULE as usize]))
        .error
}

/// Bytes of granules that hold data in the container's own images and journals: an independent count.
fn held(rig: &Rig, container: &str) -> u64 {
    let dir = rig.root().join("containers").join(container);
    let images = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path());
    let images = images.filter(|p| p.file_name().unwrap().to_str().unwrap().contains(".hds"));
    let side = fs::read_dir(dir.join(".ploop"))
        .unwrap()
        .map(|e| e.unwrap().path());
    let journals = side.filter(|p| {
        p.file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("journal.")
    });
    images.chain(journals).map(|p| data(&p)).sum()
}

fn data(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    let (mut at, mut sum) = (0, 0);
    while let Ok(start) = seek(file.as_fd(), SeekFrom::Data(at)) {
        at = seek(file.as_fd(), SeekFrom::Hole(start)).unwrap();
        sum += at.div_ceil(GRANULE) * GRANULE - start / GRANULE * GRANULE;
    }
    sum
}

/// What a container is charged, once what was charged ahead for clusters over data was given back.
fn settled(daemon: &Daemon, rig: &Rig) -> Quota {
    let (mut there, mut now) = (0, Quota::default());
    for _ in 0..36_000 {
        // In this order: what is there never is less than it was, nor more than what is charged.
        there = held(rig, "ct");
        now = quota(daemon, "ct");
        if now.charged == there {
            return now;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("charged {}, held {there}", now.charged);
}

/// Goal: the container that needs more is refused, at the granule, and nobody and nothing else is.
/// Method: raw writes with snapshots in between until the first refusal, then all that must go on.
#[test]
fn a_full_container_is_refused_more_and_keeps_what_it_has() {
    let rig = Rig::new();
    rig.small_template("t", &["ct", "neighbour"]);
    let daemon = Daemon::start(&rig);
    let limit = 4 * MIB;
    assert_eq!(set(&daemon, "ct", limit).quota, limit);
    let (mut client, mut neighbour) = (daemon.open("ct"), daemon.open("neighbour"));
    let mut written = Vec::new();
    // In an order of its own, so that a cluster is written to before and after a snapshot.
    let order = (0..4096).map(|i| FREE + i * 37 % 4096 * GRANULE);
    let mut refused = false;
    for (i, at) in order.enumerate() {
        match write(&mut client, at, i as u8) {
            0 => written.push((at, i as u8)),
            error => {
                assert_eq!(error, ENOSPC, "write {i}");
                refused = true;
                break;
            }
        }
        assert_eq!(write(&mut neighbour, at, 1), 0, "the neighbour's write {i}");
        if i % 200 == 100 {
            take(&daemon.api(), "ct", &format!("s{i}"));
        }
    }
    assert!(refused);
    // What was charged for all of a cluster's data, and is less, comes back; the rest goes to clusters
    // over nothing, where a granule costs a granule.
    assert!(settled(&daemon, &rig).charged <= limit);
    let last = (58 * MIB..63 * MIB).step_by(GRANULE as usize).find(|&at| {
        match write(&mut client, at, 55) {
            0 => {
                written.push((at, 55));
                false
            }
            error => {
                assert_eq!(error, ENOSPC);
                true
            }
        }
    });
    assert!(last.is_some());
    let full = quota(&daemon, "ct");
    assert_eq!(full.charged, limit, "to the granule");
    client.flush();
    assert!(quota(&daemon, "ct").charged >= held(&rig, "ct"));
    // What it has in its top it may write to; zeros cost nothing.
    let (at, _) = *written.last().unwrap();
    assert_eq!(write(&mut client, at, 77), 0);
    written.last_mut().unwrap().1 = 77;
    assert_eq!(write(&mut client, 63 * MIB, 1), ENOSPC);
    // What is given up may be taken again, and no more than that.
    let now = quota(&daemon, "ct").charged;
    set(&daemon, "ct", now);
    let freed = client.ask(Ask::new(kind::TRIM, 0, at..at + GRANULE));
    assert_eq!(freed.error, 0, "{}", freed.text);
    assert_eq!(quota(&daemon, "ct").charged, now - GRANULE);
    assert_eq!(write(&mut client, at, 78), 0);
    written.last_mut().unwrap().1 = 78;
    // Flush, snapshot, merge and deletion go on.
    client.flush();
    take(&daemon.api(), "ct", "full");
    rig.run(["snapshot", "delete", "ct", "s100"]);
    rig.run(["snapshot", "delete", "ct", "full"]);
    // Less than it has takes nothing away; then more, while it runs.
    set(&daemon, "ct", MIB);
    assert_eq!(write(&mut client, 63 * MIB, 1), ENOSPC);
    rig.run(["set", "ct", "--quota", "16M"]);
    assert_eq!(write(&mut client, 63 * MIB, 1), 0);
    written.push((63 * MIB, 1));
    client.flush();
    for &(at, fill) in &written {
        assert_eq!(
            client.read(at, GRANULE),
            vec![fill; GRANULE as usize],
            "at {at}"
        );
    }
    assert!(rig.run(["check", "ct"]).contains("clean"));
    client.disconnect();
    neighbour.disconnect();
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
    let info = rig.json(["info", "ct", "--json"]);
    assert_eq!(info["quota"]["charged"], held(&rig, "ct"));
    assert_eq!(info["quota"]["quota"], 16 * MIB);
}

/// Goal: an operator sees who is near his quota, and is not told a charge that nobody knows. Method: the
/// metrics and the list, with the container open, closed, and counted because it was asked for.
#[test]
fn the_charge_is_shown_where_it_is_known() {
    let rig = Rig::new();
    rig.small_template("t", &["ct", "free"]);
    let daemon = Daemon::start(&rig);
    set(&daemon, "ct", MIB);
    let row = |name: &str, words: &[&str]| {
        let all = rig.json(["list", "--json"].iter().chain(words));
        let found = all.as_array().unwrap().iter().find(|c| c["name"] == name);
        found.unwrap().clone()
    };
    let series = |daemon: &Daemon| -> Vec<String> {
        let text = daemon.api().text("/metrics").unwrap();
        let about = [
            "ploop_quota_bytes{",
            "ploop_charged_bytes{",
            "ploop_quota_refused_total{",
        ];
        let lines = text
            .lines()
            .filter(|l| about.iter().any(|a| l.starts_with(a)));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(series(&daemon), [""; 0]);
    assert_eq!(row("ct", &[])["charged"], serde_json::Value::Null);
    assert_eq!(row("ct", &[])["quota"], MIB);
    let (mut client, mut free) = (daemon.open("ct"), daemon.open("free"));
    let mut refused = 0;
    for i in 0..300 {
        assert_eq!(write(&mut free, FREE + i * GRANULE, 1), 0);
        refused += u64::from(write(&mut client, FREE + i * GRANULE, 1) == ENOSPC);
    }
    assert!(refused > 0);
    let charged = quota(&daemon, "ct").charged;
    assert_eq!(
        series(&daemon),
        [
            format!("ploop_quota_bytes{{container=\"ct\"}} {MIB}"),
            format!("ploop_charged_bytes{{container=\"ct\"}} {charged}"),
            format!("ploop_quota_refused_total{{container=\"ct\"}} {refused}"),
        ]
    );
    assert_eq!(row("ct", &[])["charged"], charged);
    // Without a quota nobody has counted.
    assert_eq!(row("free", &[])["charged"], serde_json::Value::Null);
    assert_eq!(
        row("free", &["--charge"])["charged"],
        quota(&daemon, "free").charged
    );
    assert!(rig.run(["list"]).contains("QUOTA"));
    client.disconnect();
    free.disconnect();
    daemon.stop();
    assert_eq!(row("ct", &[])["charged"], serde_json::Value::Null);
    for name in ["ct", "free"] {
        assert_eq!(
            row(name, &["--charge"])["charged"],
            held(&rig, name),
            "{name}"
        );
    }
}

/// Goal: the charge is what is there, also after kill -9, and while the disk is open again.
#[test]
fn the_charge_is_exact_after_a_kill() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let mut rng = Rng(7);
    for round in 0..6 {
        let daemon = Daemon::start(&rig);
        set(&daemon, "ct", (8 + round) * MIB);
        let mut client = daemon.open("ct");
        for i in 0..300 {
            // Over the template's data, too, where first writes are parts of clusters.
            let at = rng.below(48 * MIB / 512) * 512;
            let len = rng.below(40_000) + 1;
            let ask = match rng.below(5) {
                0 => Ask::new(kind::TRIM, 0, at..at + len),
                1 => Ask::new(kind::WRITE_ZEROES, 0, at..at + len),
                _ => Ask::write(0, at, &vec![i as u8; len as usize]),
            };
            let error = client.ask(ask).error;
            assert!(error == 0 || error == ENOSPC, "round {round}: {error}");
            if i % 50 == 49 {
                client.flush();
            }
        }
        if round % 2 == 1 {
            take(&daemon.api(), "ct", &format!("s{round}"));
        }
        daemon.kill();
        let info = rig.json(["info", "ct", "--json"]);
        assert_eq!(
            info["quota"]["charged"],
            held(&rig, "ct"),
            "round {round}, killed"
        );
        // Opened, what was flushed of parts is completed, and what no entry names goes.
        let daemon = Daemon::start(&rig);
        let client = daemon.open("ct");
        client.disconnect();
        daemon.stop();
        let info = rig.json(["info", "ct", "--json"]);
        assert_eq!(
            info["quota"]["charged"],
            held(&rig, "ct"),
            "round {round}, closed"
        );
        assert!(rig.run(["check", "ct"]).contains("clean"));
    }
}

/// Goal: what a full container looks like from inside: ENOSPC, and then a way out. Method: a mounted
/// ext4 is filled, deleted from, trimmed and filled again.
#[test]
fn a_file_system_in_a_full_container_goes_on_when_it_has_room() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    rig.run(["set", "ct", "--quota", "12M"]);
    let mut files = 0u64;
    let mounted = MountedExport::new(&daemon.uri("ct"));
    let refused = (0..64).find(|i| {
        let bytes = vec![*i as u8 + 1; MIB as usize];
        let path = mounted.path().join(format!("f{i}"));
        let wrote =
            File::create(path).and_then(|mut f| f.write_all(&bytes).and_then(|()| f.sync_all()));
        files = i + 1;
        wrote.is_err()
    });
    assert!(refused.is_some_and(|i| (4..12).contains(&i)), "{refused:?}");
    drop(mounted.unmount());
    let full = quota(&daemon, "ct");
    assert!(
        full.charged <= full.quota + MIB,
        "a journal is beside it: {full:?}"
    );
    rig.run(["set", "ct", "--quota", "64M"]);
    let mounted = MountedExport::new(&daemon.uri("ct"));
    for i in 0..files - 1 {
        let path = mounted.path().join(format!("f{i}"));
        assert!(
            fs::read(&path).unwrap() == vec![i as u8 + 1; MIB as usize],
            "file {i}"
        );
        fs::remove_file(&path).unwrap();
    }
    let disk = mounted.unmount();
    disk.e2fsck(
        rig.json(["template", "info", "t", "--json"])["partition_offset"]
            .as_u64()
            .unwrap(),
    );
    drop(disk);
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
}

/// Goal: who sets a quota and I/O limits at once, and gets one of them, is told which. Method: a service
/// of the test's own that takes the quota and fails at the limits.
#[test]
fn a_change_that_is_done_in_part_says_what_is_done() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let root = fs::canonicalize(rig.root()).unwrap();
    let info = Info {
        root: Some(root.display().to_string()),
        ..Info::default()
    };
    let info = serde_json::to_string(&info).unwrap();
    let quota = serde_json::to_string(&Quota::default()).unwrap();
    let failure = r#"{"kind":"io","what":"no limits today","text":"no limits today"}"#.to_owned();
    let listener = UnixListener::bind(root.join("control.sock")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let (mut line, mut length) = (String::new(), 0);
            stream.read_line(&mut line).unwrap();
            loop {
                let mut header = String::new();
                stream.read_line(&mut header).unwrap();
                let header = header.trim().to_ascii_lowercase();
                if let Some(n) = header.strip_prefix("content-length: ") {
                    length = n.parse().unwrap();
                }
                if header.is_empty() {
                    break;
                }
            }
            stream.read_exact(&mut vec![0; length]).unwrap();
            let (status, body) = match line.split(' ').nth(1).unwrap() {
                path if path.ends_with("/info") => ("200 OK", &info),
                path if path.ends_with("/quota") => ("200 OK", &quota),
                _ => ("500 Internal Server Error", &failure),
            };
            let length = body.len();
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n");
            let answer = format!("{head}content-type: application/json\r\n\r\n{body}");
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
        }
    });
    for (words, told) in [
        (&["--quota", "1G", "--iops", "5"][..], true),
        (&["--iops", "5"], false),
    ] {
        let mut command = rig.ploop();
        let out = command
            .args(["set", "ct"])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.contains("no limits today"), "{said}");
        let part = said.contains("the quota is set, and the I/O limits are not");
        assert_eq!(part, told, "{said}");
    }
    // A value that cannot be is refused before anything is set.
    let mut command = rig.ploop();
    command.args(["set", "ct", "--quota", "1G", "--burst", "1ms"]);
    assert_eq!(command.output().unwrap().status.code(), Some(2));
}
