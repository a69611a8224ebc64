//! `ploop send | ploop receive` with the real programs: pipes, locks, a full host, kill -9, memory.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};

use ploop_tests::mount::Mounted;
use ploop_tests::store::{Rig, assert_unchanged, on_export};
use ploop_tests::tools::tool;
use serde_json::Value;

fn bytes_of(rig: &Rig, args: &[&str]) -> Vec<u8> {
    let out = rig.ploop().arg("send").args(args).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "send {args:?}: {said}");
    out.stdout
}

/// `ploop receive` with these bytes on its standard input.
fn receive(command: &mut Command, args: &[&str], bytes: &[u8]) -> Output {
    let mut child = command
        .arg("receive")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // One that refuses reads no more.
    drop(child.stdin.take().unwrap().write_all(bytes));
    child.wait_with_output().unwrap()
}

fn received(rig: &Rig, args: &[&str], bytes: &[u8]) -> String {
    let out = receive(&mut rig.ploop(), args, bytes);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "receive {args:?}: {said}");
    String::from_utf8(out.stdout).unwrap()
}

fn refused(rig: &Rig, args: &[&str], bytes: &[u8], code: i32, says: &str) {
    let out = receive(&mut rig.ploop(), args, bytes);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "receive {args:?}: {said}");
    assert!(said.contains(says), "{says:?} is not in: {said}");
}

/// A store with a template and the container `a` of it, which has a snapshot `s`; and another one.
fn rigs() -> (Rig, Rig) {
    let (from, to) = (Rig::new(), Rig::new());
    from.small_template("t", &["a"]);
    let server = from.serve(["a"]);
    on_export(&server.uri("a"), &["write -P 5 30M 1M", "flush"]);
    server.stop();
    from.run(["snapshot", "create", "a", "--name", "s"]);
    let server = from.serve(["a"]);
    on_export(&server.uri("a"), &["write -P 6 40M 64k", "flush"]);
    server.stop();
    (from, to)
}

#[test]
fn a_container_moves_by_a_pipe_and_says_so() {
    let (from, to) = rigs();
    // No store is needed where it goes: it is made.
    let stream = bytes_of(&from, &["a"]);
    let said: Value = serde_json::from_str(&received(&to, &["b", "--json"], &stream)).unwrap();
    assert_eq!(said["name"], "b");
    assert_eq!(said["size"], 64 << 20);
    assert_eq!(said["bytes"], stream.len());
    assert_eq!(said["current"], true);
    assert_eq!(to.content("b"), from.content("a"));
    assert_eq!(to.content("b@s"), from.content("a@s"));
    assert!(to.run(["check", "b"]).contains("clean"));
    let out = from.ploop().args(["send", "a@s", "--json"]).output();
    let out = out.unwrap();
    let said: Value = serde_json::from_slice(&out.stderr).unwrap();
    assert_eq!(said["images"], 1);
    assert_eq!(said["bytes"], out.stdout.len());
    // With no more than it may.
    let slow = bytes_of(&from, &["a@s", "--rate", "1G"]);
    assert_eq!(slow.len(), out.stdout.len());
}

#[test]
fn what_the_other_side_says_it_has_is_not_sent() {
    let (from, to) = rigs();
    // The same image on both sides is the same template, whatever it is called.
    from.run(["convert", "a@s", "base.raw", "--to", "raw"]);
    let raw = from.arg("base.raw");
    for (rig, name) in [(&from, "base"), (&to, "known")] {
        rig.run(["template", "import", name, &raw]);
    }
    from.run(["create", "c", "--template", "base"]);
    let have = to.run(["receive", "--list-have"]);
    assert!(
        have.contains("sha256-blocks:") && have.contains("known"),
        "{have}"
    );
    fs::write(from.path("have"), &have).unwrap();
    let alone = bytes_of(&from, &["c"]);
    for args in [&["c", "--have", "have"][..], &["c", "--reference", "base"]] {
        let stream = bytes_of(&from, args);
        assert!(stream.len() < 4096 && alone.len() > 1 << 20);
        received(&to, &["c"], &stream);
        assert_eq!(to.content("c"), from.content("c"));
        let listed = to.json(["list", "--json"]);
        assert_eq!(listed[0]["template"], "known");
        to.run(["rm", "c"]);
    }
    let other = Rig::new();
    other.small_template("t", &[]);
    let before = other.everything();
    let stream = bytes_of(&from, &["c", "--have", "have"]);
    refused(&other, &["c"], &stream, 3, "this store has none");
    assert_unchanged(&before, &other.everything(), "a refused stream");
}

#[test]
fn a_disk_in_use_is_sent_by_its_snapshot_and_refused_without() {
    let (from, to) = rigs();
    let server = from.serve(["a"]);
    on_export(&server.uri("a"), &["write -P 9 50M 64k", "flush"]);
    from.refused(5, ["send", "a"], &["in use", "ploop send a@NAME"]);
    let stream = bytes_of(&from, &["a@s"]);
    received(&to, &["b"], &stream);
    assert_eq!(to.content("b"), from.content("a@s"));
    server.stop();
    // A difference does not go onto one in use.
    from.run(["snapshot", "create", "a", "--name", "later"]);
    let since = bytes_of(&from, &["a@later", "--from", "s"]);
    let server = to.serve(["b"]);
    refused(&to, &["b"], &since, 5, "in use");
    server.stop();
    received(&to, &["b"], &since);
    assert_eq!(to.content("b"), from.content("a@later"));
    assert_eq!(to.content("b@s"), from.content("a@s"));
}

#[test]
fn a_terminal_and_a_reader_that_goes_are_refused_by_name() {
    let (from, to) = rigs();
    let terminal = || {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/ptmx")
            .unwrap()
    };
    let mut send = from.ploop();
    send.args(["send", "a"])
        .stdout(terminal())
        .stderr(Stdio::piped());
    let out = send.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("terminal") && said.contains("ssh"), "{said}");
    let out = to.ploop().args(["receive", "b"]).stdin(terminal()).output();
    assert_eq!(out.unwrap().status.code(), Some(2));
    // Half a stream is no success.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = from.ploop().args(["send", "a"]).stdout(writer).output();
    let out = out.unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("closed it before its end"), "{said}");
}

#[test]
fn a_full_host_refuses_it_and_has_nothing_of_it() {
    let (from, _) = rigs();
    let small = Mounted::tmpfs(1 << 20);
    let to = Rig::new().with_root(small.path());
    let stream = bytes_of(&from, &["a"]);
    refused(&to, &["b"], b"", 6, "ends before its end");
    let before = to.everything();
    refused(&to, &["b"], &stream, 8, "No space");
    assert_unchanged(&before, &to.everything(), "a stream that did not fit");
}

/// Goal: promise 3 for a receiver that is killed. Method: it is killed when it has taken a half of
/// the stream, and when it has taken all but the end; then whatever is in the store is collected by
/// the next one, and the stream is received.
#[test]
fn a_killed_receiver_leaves_nothing_that_is_seen() {
    let (from, to) = rigs();
    let stream = bytes_of(&from, &["a"]);
    to.small_template("x", &[]);
    for resumable in [false, true] {
        for len in [stream.len() / 2, stream.len() - 1] {
            let mut command = to.ploop();
            command.args(["receive", "b"]);
            if resumable {
                command.arg("--resumable");
            }
            let mut child = command
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // All of it is out of the pipe when the last of it fits in: it holds 64 KiB at most.
            let mut pipe = child.stdin.take().unwrap();
            pipe.write_all(&stream[..len]).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            drop(pipe);
            assert_eq!(to.json(["list", "--json"]), Value::Array(Vec::new()));
            if resumable {
                let token = to.run(["receive", "--resume-token", "b"]);
                let rest = bytes_of(&from, &["a", "--resume", token.trim()]);
                received(&to, &["b"], &rest);
            } else {
                received(&to, &["b"], &stream);
            }
            assert_eq!(to.content("b"), from.content("a"));
            assert_eq!(to.content("b@s"), from.content("a@s"));
            to.run(["rm", "b"]);
            let left = fs::read_dir(to.root().join("tmp")).unwrap().count();
            assert_eq!(left, 0, "collected");
        }
    }
}

#[test]
fn what_was_cut_is_listed_goes_on_and_can_be_given_up() {
    let (from, to) = rigs();
    let stream = bytes_of(&from, &["a"]);
    let half = &stream[..stream.len() / 2];
    refused(&to, &["b"], half, 6, "ends before its end");
    assert_eq!(
        to.json(["receive", "--list-cut", "--json"]),
        Value::Array(Vec::new())
    );
    refused(&to, &["b", "--resumable"], half, 6, "--resume-token b");
    let listed = to.json(["receive", "--list-cut", "--json"]);
    assert_eq!(listed[0]["name"], "b");
    assert!(to.run(["receive", "--list-cut"]).contains("b "));
    refused(&to, &["b"], &stream, 4, "--forget b");
    to.run(["receive", "--forget", "b"]);
    to.refused(3, ["receive", "--resume-token", "b"], &["was cut"]);
    from.refused(2, ["send", "a", "--resume", "nonsense"], &["no token"]);
    received(&to, &["b"], &stream);
}

/// Goal: memory is that of a frame, whatever is sent. Method: 256 MiB of data on a disk of 4 GiB,
/// with 64 MiB for each side in all.
#[test]
fn neither_side_has_more_than_a_frame_in_memory() {
    let (from, to) = (Rig::new(), Rig::new());
    let raw = from.path("large.raw");
    let mut file = File::create(&raw).unwrap();
    let piece: Vec<u8> = (0..1u32 << 20).map(|n| (n >> 3) as u8 | 1).collect();
    for _ in 0..256 {
        file.write_all(&piece).unwrap();
    }
    file.set_len(4 << 30).unwrap();
    drop(file);
    from.run(["template", "import", "t", raw.to_str().unwrap()]);
    fs::remove_file(&raw).unwrap();
    from.run(["create", "a", "--template", "t"]);
    let bounded = |rig: &Rig, verb: &str| {
        let ploop = rig.ploop();
        let program = ploop.get_program().to_str().unwrap().to_owned();
        let mut shell = tool("sh");
        shell
            .arg("-c")
            .arg(format!("ulimit -d 65536; exec {program} {verb} a"))
            .env("PLOOP_ROOT", rig.root());
        shell
    };
    let mut send = bounded(&from, "send")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut receive = bounded(&to, "receive");
    receive.stdin(send.stdout.take().unwrap());
    let out = receive.output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(send.wait().unwrap().success());
    let disk = |rig: &Rig| {
        let mut child = rig
            .ploop()
            .args(["convert", "a", "-", "--to", "raw"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut head = vec![0; 1 << 20];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut head)
            .unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        head
    };
    assert!(disk(&to) == piece && disk(&from) == piece);
    let size = to.json(["info", "a", "--json"])["virtual_size"].clone();
    assert_eq!(size, 4u64 << 30);
}
