//! What goes wrong with a tree: what is refused and how, jobs that are killed, a host that is full.
//!
//! Wherever an operation ends, every snapshot reads as it did, `check` is content, and the next try
//! succeeds.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use ploop_tests::daemon::{Daemon, take};
use ploop_tests::fsx::{Rng, env};
use ploop_tests::mount::{Mounted, wait_for};
use ploop_tests::server::pattern;
use ploop_tests::store::{Rig, on_export};
use ploop_tests::tools::{run, tool};

/// Writes to containers that nobody serves, by a server of their own.
fn write(rig: &Rig, container: &str, commands: &[&str]) {
    let server = rig.serve([container]);
    on_export(&server.uri(container), commands);
    server.stop();
}

/// Every snapshot that has a name, and the live disk, with what they hold.
fn contents(rig: &Rig, container: &str) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([(String::new(), rig.content(container))]);
    for name in names(rig, container) {
        let content = rig.content(&format!("{container}@{name}"));
        all.insert(name, content);
    }
    all
}

fn names(rig: &Rig, container: &str) -> Vec<String> {
    let listed = rig.json(["snapshot", "list", container, "--json"]);
    let all = listed.as_array().unwrap().iter();
    all.filter_map(|s| Some(s["name"].as_str()?.to_owned()))
        .collect()
}

fn guid(rig: &Rig, container: &str, name: &str) -> String {
    let listed = rig.json(["snapshot", "list", container, "--json"]);
    let mut all = listed.as_array().unwrap().iter();
    let found = all.find(|s| s["name"] == name).unwrap();
    found["guid"].as_str().unwrap().to_owned()
}

fn top(rig: &Rig, container: &str) -> String {
    let tree = rig.json(["tree", container, "--json"]);
    let mut nodes = tree["nodes"].as_array().unwrap().iter();
    nodes.find(|n| n["top"] == true).unwrap()["guid"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// Goal: a wrong request is refused by name, with its exit code, and changes nothing; offline and by
/// the daemon alike. Method: each, and the whole store before and after.
#[test]
fn wrong_requests_are_refused_with_reason_and_leave_nothing() {
    let rig = Rig::new();
    rig.small_template("t", &["ct", "other"]);
    for name in ["one", "two"] {
        rig.run(["snapshot", "create", "ct", "--name", name]);
        write(&rig, "ct", &["write -P 7 20M 256k", "flush"]);
    }
    let (one, top) = (guid(&rig, "ct", "one"), top(&rig, "ct"));
    let unknown = "{11111111-2222-3333-4444-555555555555}";
    let cases: &[(i32, &[&str], &[&str])] = &[
        (
            4,
            &["snapshot", "create", "ct", "--name", "one"],
            &["\"one\"", "already", "another name"],
        ),
        (
            2,
            &["snapshot", "create", "ct", "--name", &one],
            &["must begin"],
        ),
        (
            2,
            &["snapshot", "create", "ct", "--name", &one[1..37]],
            &["GUID"],
        ),
        (2, &["snapshot", "create", "ct", "--name", "a/b"], &["a/b"]),
        (3, &["snapshot", "create", "nope", "--name", "x"], &["nope"]),
        (
            2,
            &["snapshot", "create", "ct@one", "--name", "x"],
            &["ct@one"],
        ),
        (
            2,
            &["snapshot", "delete", "ct", &top],
            &["live disk", "snapshot switch"],
        ),
        (
            3,
            &["snapshot", "delete", "ct", "three"],
            &["three", "snapshot list"],
        ),
        (3, &["snapshot", "delete", "ct", unknown], &[unknown]),
        (2, &["snapshot", "switch", "ct", &top], &["is the top"]),
        (
            3,
            &["snapshot", "switch", "ct", "three"],
            &["three", "snapshot list"],
        ),
        (3, &["snapshot", "switch", "ct", unknown], &[unknown]),
        (3, &["snapshot", "merge", "ct", "three"], &["three"]),
        (
            2,
            &["snapshot", "merge", "ct", "one"],
            &["nothing to merge"],
        ),
        (
            2,
            &["snapshot", "merge", "ct", "one", "--continue"],
            &["--continue"],
        ),
        (
            4,
            &["snapshot", "rename", "ct", "one", "two"],
            &["two", "already"],
        ),
        (
            2,
            &["snapshot", "rename", "ct", "one", &unknown[1..37]],
            &["GUID"],
        ),
        (
            3,
            &["snapshot", "rename", "ct", "three", "four"],
            &["three"],
        ),
        (
            3,
            &["snapshot", "describe", "ct", "three", "text"],
            &["three"],
        ),
        (
            2,
            &["snapshot", "create", "ct", "ct", "--group", "--name", "g"],
            &["ct", "twice"],
        ),
        (
            3,
            &["snapshot", "create", "ct", "nope", "--group"],
            &["nope"],
        ),
        (
            4,
            &[
                "snapshot", "create", "ct", "other", "--group", "--name", "one",
            ],
            &["already"],
        ),
        (3, &["create", "x", "--from", "ct@three"], &["three"]),
        (3, &["create", "x", "--from", "nope"], &["nope"]),
        (
            4,
            &["create", "other", "--from", "ct@one"],
            &["other", "already"],
        ),
        (3, &["export", "ct@three", "out"], &["three"]),
        (4, &["export", "ct@one", "rootfs"], &["rootfs"]),
        (3, &["tree", "nope"], &["nope"]),
        (3, &["jobs"], &["control.sock", "ploopd"]),
    ];
    let before = contents(&rig, "ct");
    let (names_before, tree) = (names(&rig, "ct"), rig.listing());
    for (code, args, says) in cases {
        rig.refused(*code, args.iter(), says);
        // Locks leave their file; a refusal leaves nothing else.
        assert_eq!(rig.listing(), tree, "{args:?}");
    }
    assert_eq!(
        (names(&rig, "ct"), contents(&rig, "ct")),
        (names_before, before.clone())
    );

    // The daemon says the same.
    let daemon = Daemon::start(&rig);
    let clients = [daemon.open("ct"), daemon.open("other")];
    for (code, args, says) in cases
        .iter()
        .filter(|c| !matches!(c.1[0], "export" | "jobs"))
    {
        rig.refused(*code, args.iter(), says);
    }
    drop(clients);
    daemon.stop();
    assert_eq!(contents(&rig, "ct"), before);
    assert_eq!(names(&rig, "other"), [""; 0]);
    assert!(rig.run(["check", "ct"]).contains("clean"));
}

/// A snapshot that is being removed is none any more, for whoever asks.
#[test]
fn what_is_being_removed_is_not_listed_nor_switched_to() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    rig.run(["snapshot", "create", "ct", "--name", "base"]);
    write(&rig, "ct", &["write -P 7 20M 8M", "flush"]);
    rig.run(["snapshot", "create", "ct", "--name", "left"]);
    rig.run(["snapshot", "switch", "ct", "base"]);
    let mut before = contents(&rig, "ct");
    before.remove("base");
    let base = guid(&rig, "ct", "base");
    // Two stand on it: it is hidden, and its data stays.
    let said = rig.run(["snapshot", "delete", "ct", "base"]);
    assert!(said.contains("hidden"), "{said}");
    assert!(!names(&rig, "ct").contains(&"base".to_owned()));
    for to in ["base", &base] {
        rig.refused(3, ["snapshot", "switch", "ct", to], &[to]);
        rig.refused(3, ["snapshot", "delete", "ct", to], &[to]);
        rig.refused(3, ["create", "x", "--from", &format!("ct@{to}")], &[to]);
    }
    // Its name is free, and now means another.
    rig.run(["snapshot", "create", "ct", "--name", "base"]);
    let mut after = contents(&rig, "ct");
    assert_eq!(after.remove("base").as_ref(), after.get(""));
    assert_eq!(after, before);
}

/// A container with four snapshots, each with data of its own, from which one is to be removed.
fn grown(rig: &Rig, container: &str, seed: u64) {
    let mut rng = Rng(seed);
    for i in 0..4 {
        rig.run(["snapshot", "create", container, "--name", &format!("s{i}")]);
        let server = rig.serve([container]);
        let mut client = ploop_tests::client::Client::open(
            server.socket(),
            container,
            nbd_server::wire::reply::Style::Structured,
        );
        for _ in 0..40 {
            let len = 1 + rng.below(400_000);
            let at = rng.below((64 << 20) - len) & !511;
            client.write(at, &pattern((len as usize) & !511, rng.bits()));
        }
        client.flush();
        client.disconnect();
        server.stop();
    }
}

/// What a kill leaves is what was: nothing that stays has changed, and `check` is content.
fn assert_whole(rig: &Rig, before: &BTreeMap<String, String>, gone: &str, what: &str) {
    let after = contents(rig, "ct");
    for (name, content) in before {
        match after.get(name) {
            Some(now) => assert_eq!(now, content, "{what}: {name:?} has changed"),
            None => assert_eq!(name, gone, "{what}: {name:?} is gone"),
        }
    }
}

/// Goal: a deletion or merge that is killed at any instant loses nothing, and the next try ends it.
/// Method: kill -9 of the command that does it offline, and of the daemon that does it live, each
/// after a random time; 50 times in all.
#[test]
fn a_merge_that_is_killed_at_any_time_goes_on() {
    let times = env("PLOOP_KILLS", 50);
    let rig = Rig::new();
    rig.small_template("t", &[]);
    let mut rng = Rng(env("PLOOP_SEED", 11));
    let (mut cut, mut round) = (0, 0);
    while cut < times {
        round += 1;
        assert!(round < 20 * times, "{cut} of {round} were cut");
        rig.run(["create", "ct", "--template", "t"]);
        grown(&rig, "ct", rng.bits());
        let mut before = contents(&rig, "ct");
        // The last stands below the live disk, the others between snapshots.
        let mut victims: Vec<String> = (1..4).map(|i| format!("s{i}")).collect();
        while let (Some(gone), true) = (victims.pop(), cut < times) {
            let live = rng.once_in(2);
            let wait = Duration::from_micros(rng.below(if live { 40_000 } else { 60_000 }));
            let done = match live {
                true => killed_live(&rig, &gone, wait),
                false => killed_offline(&rig, &gone, rng.once_in(2), wait),
            };
            let what = format!("round {round}, {gone}, live {live}, after {wait:?}");
            assert_whole(&rig, &before, &gone, &what);
            cut += u64::from(!done);
            finish(&rig, &gone, &what);
            before.remove(&gone);
            assert_eq!(names(&rig, "ct").len() + 1, before.len(), "{what}");
            assert_whole(&rig, &before, &gone, &what);
            let said = rig.run(["check", "ct"]);
            assert!(said.contains("clean"), "{what}: {said}");
        }
        rig.run(["rm", "ct"]);
    }
    eprintln!("{cut} cut in {round} rounds");
}

/// Removes snapshot `gone` by a command that is killed; true when it was faster.
fn killed_offline(rig: &Rig, gone: &str, merge: bool, wait: Duration) -> bool {
    let mut command = rig.ploop();
    let child = format!("s{}", gone[1..].parse::<u32>().unwrap() + 1);
    let exists = names(rig, "ct").contains(&child);
    match (merge, exists) {
        (false, _) => command.args(["snapshot", "delete", "ct", gone]),
        (true, true) => command.args(["snapshot", "merge", "ct", &child]),
        (true, false) => command.args(["snapshot", "merge", "ct"]),
    };
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    std::thread::sleep(wait);
    child.kill().unwrap();
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success() || out.status.code().is_none(),
        "{said}"
    );
    out.status.success()
}

/// The same by a daemon that is killed, with a client connected.
fn killed_live(rig: &Rig, gone: &str, wait: Duration) -> bool {
    let daemon = Daemon::start(rig);
    let client = daemon.open("ct");
    let mut command = rig.ploop();
    command.args(["snapshot", "delete", "ct", gone]);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(wait);
    daemon.kill();
    drop(client);
    child.wait().unwrap().success()
}

/// The next try, whatever came of the one before.
fn finish(rig: &Rig, gone: &str, what: &str) {
    // Marked before the kill, it is gone already for who asks.
    if names(rig, "ct").contains(&gone.to_owned()) {
        rig.run(["snapshot", "delete", "ct", gone]);
    }
    let said = rig.run(["snapshot", "merge", "ct", "--continue"]);
    assert!(said.contains("done"), "{what}: {said}");
    let tree = rig.json(["tree", "ct", "--json"]);
    let hidden = tree["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .any(|n| n["hidden"] == true);
    assert!(!hidden, "{what}: {tree}");
}

/// Goal: a full host stops a merge with a clear text and costs nothing; with room, it ends. Method:
/// a store on a small ext4 whose rest is filled up to the last block while the daemon merges, and
/// the same with the offline command.
#[test]
fn a_merge_on_a_full_host_loses_nothing_and_ends_when_there_is_room() {
    for live in [false, true] {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(192 << 20).unwrap();
        run(tool("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-m", "0"])
            .arg(image.path()));
        let host = Mounted::new(image.path(), "loop");
        let rig = Rig::new().with_root(&host.path().join("store"));
        rig.small_template("t", &["ct"]);
        // Many small pieces: the merged image needs clusters of its own for all of them.
        let scattered: Vec<String> = (0..120)
            .map(|i| format!("write -P 9 {} 4k", i * 524_288))
            .collect();
        let commands: Vec<&str> = scattered
            .iter()
            .map(String::as_str)
            .chain(["flush"])
            .collect();
        rig.run(["snapshot", "create", "ct", "--name", "a"]);
        write(&rig, "ct", &commands);
        rig.run(["snapshot", "create", "ct", "--name", "b"]);
        write(&rig, "ct", &["write -P 3 10M 64k", "flush"]);
        let before = contents(&rig, "ct");
        let balloon = host.path().join("balloon");
        // Without the store's reserve, which would be enough for it.
        let daemon = live.then(|| Daemon::with(&rig, &["--reserve", "0"]));
        drop(fs::remove_file(rig.root().join("reserve")));
        let client = daemon.as_ref().map(|d| d.open("ct"));
        fill(&balloon);
        let out = rig
            .ploop()
            .args(["snapshot", "delete", "ct", "b"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(8), "{live}: {said}");
        assert!(said.contains("No space left"), "{said}");
        // Who reads notices nothing.
        if let Some(mut client) = client {
            assert_eq!(client.read(10 << 20, 65536), vec![3; 65536]);
            client.disconnect();
        }
        fs::remove_file(&balloon).unwrap();
        for (name, content) in contents_of(&rig, daemon.as_ref(), &before) {
            assert_eq!(
                Some(&content),
                before.get(&name),
                "live {live}: {name:?} has changed"
            );
        }
        if let Some(daemon) = daemon {
            daemon.stop();
        }
        finish(&rig, "b", "full host");
        assert!(!names(&rig, "ct").contains(&"b".to_owned()));
        assert_whole(&rig, &before, "b", "full host");
        assert!(rig.run(["check", "ct"]).contains("clean"));
    }
}

/// The live disk as its holder shows it.
fn contents_of(
    rig: &Rig,
    daemon: Option<&Daemon>,
    before: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let Some(daemon) = daemon else {
        let mut all = contents(rig, "ct");
        all.retain(|name, _| before.contains_key(name));
        return all;
    };
    let mut client = daemon.open("ct");
    let all: Vec<u8> = (0..client.size >> 20)
        .flat_map(|i| client.read(i << 20, 1 << 20))
        .collect();
    BTreeMap::from([(
        String::new(),
        ploop_tests::treehash::reader_digest(&mut &all[..]),
    )])
}

/// Takes every free block of the file system.
fn fill(balloon: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(balloon).unwrap();
    let piece = vec![1; 1 << 20];
    let mut len = piece.len();
    while len >= 512 {
        match file.write(&piece[..len]) {
            Ok(n) if n == len => {}
            _ => len /= 2,
        }
    }
    // Delayed allocation reserves; what is reserved must be taken.
    drop(file.sync_all());
    let mut file = fs::OpenOptions::new().append(true).open(balloon).unwrap();
    while file.write(&piece[..4096]).is_ok() {}
    drop(file.sync_all());
}

/// A second snapshot while nobody waits for the first one's clients: the daemon holds many at once.
#[test]
fn a_name_is_free_again_when_its_snapshot_is_gone() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    for _ in 0..3 {
        take(&daemon.api(), "ct", "again");
        wait_for("the export", || {
            daemon.exports().contains(&"ct@again".to_owned())
        });
        rig.run(["snapshot", "delete", "ct", "again"]);
        assert!(!daemon.exports().contains(&"ct@again".to_owned()));
    }
    daemon.stop();
}
