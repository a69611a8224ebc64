//! The command's manners: help, JSON, exit codes, pipes, completions, OpenVZ's verbs, the demo.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Output, Stdio};

use ploop_tests::corpus::{self, Case};
use ploop_tests::mount::Mounted;
use ploop_tests::store::{Rig, on_export, qemu_io};
use ploop_tests::tools::{ploop, run, tool};
use serde_json::Value;

fn text(out: &Output) -> String {
    String::from_utf8(out.stdout.clone()).unwrap()
}

/// Every command with subcommands unfolded, as `--help` names them, with its help.
fn commands() -> BTreeMap<Vec<String>, String> {
    let mut all = BTreeMap::new();
    let mut todo = vec![Vec::new()];
    while let Some(path) = todo.pop() {
        let help = text(&run(ploop().args(&path).arg("--help")));
        assert!(help.contains("Usage: ploop"), "{path:?}: {help}");
        let listed = help
            .split_once("\nCommands:\n")
            .map_or("", |(_, rest)| rest);
        for line in listed.lines().take_while(|l| l.starts_with("  ")) {
            let name = line.split_whitespace().next().unwrap().to_owned();
            if name != "help" {
                todo.push([path.clone(), vec![name]].concat());
            }
        }
        all.insert(path, help);
    }
    all
}

#[test]
fn every_command_explains_itself() {
    let all = commands();
    assert!(all.len() >= 17, "{:?}", all.keys());
    for (path, help) in &all {
        let first = help.lines().next().unwrap();
        assert!(first.len() > 10, "{path:?} says what it is for: {first:?}");
        let by_help = text(&run(ploop().arg("help").args(path)));
        assert_eq!(&by_help, help, "{path:?}");
        let short = text(&run(ploop().args(path).arg("-h")));
        assert!(short.contains("Usage: ploop"), "{path:?}");
    }
    for word in ["--root", "--version", "Exit codes:", "Sizes:", "SOURCE:"] {
        assert!(all[&vec![]].contains(word), "{word}");
    }
    assert!(text(&run(ploop().arg("--version"))).starts_with("ploop "));
    // Nothing to do is not nothing wrong.
    let out = ploop().output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("Usage: ploop"));
}

#[test]
fn json_is_offered_where_programs_ask_and_says_what_people_are_told() {
    let rig = Rig::new();
    rig.small_rootfs();
    let calls: [&[&str]; 32] = [
        &["template", "import", "t", "rootfs", "--size", "64M"],
        &["template", "list"],
        &["template", "info", "t"],
        &["create", "a", "b", "--template", "t"],
        &["list"],
        &["set", "a", "--iops", "500"],
        &["info", "a"],
        &["check", "a"],
        &["convert", "a", "a.qcow2", "--to", "qcow2"],
        &["snapshot-list", "store/containers/a"],
        &["snapshot", "create", "a", "--name", "s"],
        &["snapshot", "list", "a"],
        &["tree", "a"],
        &["diff", "a@s"],
        &["export", "a@s", "a.disk"],
        &["snapshot", "switch", "a", "s"],
        &["snapshot", "merge", "a", "--continue"],
        &["snapshot", "delete", "a", "s"],
        &["tracker", "start", "a", "t"],
        &["tracker", "start", "a", "u", "--granularity", "4K"],
        &["tracker", "list", "a"],
        &["tracker", "merge", "a", "t", "u"],
        &["tracker", "clear", "a", "t"],
        &["backup", "a", "a.backup", "--tracker", "t"],
        &["backup", "list", "a"],
        &["backup", "verify", "a.backup"],
        &["restore", "a.backup", "r"],
        &["tracker", "stop", "a", "t"],
        &["compact", "a"],
        &["df"],
        &["resize", "a", "96M"],
        &["receive", "--list-cut"],
    ];
    let mut said = BTreeMap::new();
    for call in calls {
        let two = ["template", "snapshot", "tracker"].contains(&call[0])
            || call[0] == "backup" && ["list", "verify"].contains(&call[1]);
        let name: Vec<_> = call.iter().take(if two { 2 } else { 1 }).collect();
        let name = name.into_iter().copied().collect::<Vec<_>>().join(" ");
        said.insert(name, rig.json(call.iter().chain(&["--json"])));
    }
    let offered = commands()
        .into_iter()
        .filter(|(_, help)| help.contains("--json"));
    let offered = offered.map(|(path, _)| path.join(" "));
    // Of three the JSON is a service's, of one it is beside the stream; tested with those.
    let elsewhere = |name: &String| ["hold-to", "jobs", "migrate", "send"].contains(&name.as_str());
    let offered: Vec<String> = offered.filter(|name| !elsewhere(name)).collect();
    assert_eq!(offered, said.keys().cloned().collect::<Vec<_>>());

    let size = 64u64 << 20;
    assert_eq!(said["set"]["limits"]["iops"], 500);
    assert_eq!(said["info"]["limits"], said["set"]["limits"]);
    assert_eq!(said["info"]["quota"], said["set"]["quota"]);
    assert_eq!(said["template import"]["size"], size);
    assert_eq!(said["template list"][0]["name"], "t");
    assert_eq!(said["snapshot create"][0]["name"], "s");
    assert_eq!(said["snapshot list"][1]["name"], "s");
    assert_eq!(said["tree"]["nodes"][2]["top"], true);
    assert_eq!(said["diff"]["from"], "a@s");
    assert_eq!(said["diff"]["to"], "a");
    assert_eq!(said["diff"]["to_size"], size);
    assert_eq!(said["diff"]["bytes"], 0);
    assert_eq!(said["export"]["virtual_size"], size);
    assert_eq!(said["snapshot switch"]["kept"], serde_json::Value::Null);
    assert_eq!(said["snapshot delete"]["state"], "done");
    assert_eq!(said["snapshot merge"]["state"], "done");
    assert_eq!(said["tracker start"]["granularity"], 4096);
    assert_eq!(said["tracker list"][0]["name"], "t");
    assert_eq!(said["tracker list"][0]["dirty"], 0);
    assert_eq!(said["tracker merge"]["name"], "u");
    assert_eq!(said["backup"]["state"], "done");
    assert_eq!(said["backup list"], serde_json::json!([]));
    assert_eq!(said["backup verify"]["ok"], true);
    assert_eq!(said["restore"]["verified"], true);
    assert_eq!(said["resize"]["size"], 96 << 20);
    assert_eq!(said["resize"]["filesystem"], 94 << 20);
    assert_eq!(said["template info"]["filesystem"], "ext4");
    assert_eq!(said["template info"]["partition_offset"], 1 << 20);
    assert_eq!(said["create"][1]["name"], "b");
    assert_eq!(said["list"][0]["template"], "t");
    assert_eq!(said["list"][1]["depth"], 2);
    assert_eq!(said["list"][1]["quota"], 0);
    assert_eq!(said["list"][1]["charged"], serde_json::Value::Null);
    assert_eq!(said["info"]["virtual_size"], size);
    assert_eq!(said["info"]["format"], "ploop");
    assert_eq!(said["check"]["class"], "clean");
    assert_eq!(said["convert"]["virtual_size"], size);
    assert_eq!(said["snapshot-list"][1]["current"], true);
    assert_eq!(text(&run(rig.ploop().arg("list"))).lines().count(), 4);

    // Errors, too, on standard error.
    for (call, code, kind) in [
        (&["info", "nope", "--json"][..], 3, "not-found"),
        (&["create", "a", "--template", "t", "--json"], 4, "exists"),
        (
            &["create", "x/y", "--template", "t", "--json"],
            2,
            "invalid",
        ),
        (&["template", "info", "nope", "--json"], 3, "not-found"),
    ] {
        let out = rig.ploop().args(call).output().unwrap();
        assert_eq!(out.status.code(), Some(code), "{call:?}");
        assert!(out.stdout.is_empty(), "{call:?}");
        let error: Value = serde_json::from_slice(&out.stderr).unwrap();
        assert_eq!(error["error"]["kind"], kind, "{error}");
        assert!(
            error["error"]["text"]
                .as_str()
                .is_some_and(|t| t.len() > 10),
            "{error}"
        );
    }
}

#[test]
fn exit_codes_are_those_of_the_help() {
    let help = text(&run(ploop().arg("--help")));
    let codes = help.split_once("Exit codes:").unwrap().1.replace('\n', " ");
    for (code, word) in [
        (0, "done"),
        (1, "failed"),
        (2, "usage"),
        (3, "not found"),
        (4, "exists"),
        (5, "in use"),
        (6, "damaged"),
        (7, "unsupported"),
        (8, "no space"),
        (9, "not permitted"),
    ] {
        assert!(
            codes.contains(&format!(" {code} {word}")),
            "{code}: {codes}"
        );
    }
    let rig = Rig::new();
    rig.small_template("t", &["a"]);
    rig.run(["list"]);
    rig.refused(2, ["list", "--nonsense"], &["--nonsense"]);
    rig.refused(2, ["create", "-a", "--template", "t"], &["-a"]);
    rig.refused(3, ["rm", "nope"], &["nope"]);
    rig.refused(4, ["create", "a", "--template", "t"], &["already"]);
    fs::write(rig.path("bad"), "garbage").unwrap();
    rig.refused(6, ["info", "bad"], &["bad"]);
    rig.refused(7, ["mount", "x"], &["mount"]);
    rig.refused(2, ["check", "a", "--yes"], &["--repair"]);
    rig.refused(2, ["check"], &["SOURCE"]);
    rig.refused(
        9,
        ["serve", "a", "--listen", "0.0.0.0:0"],
        &["--insecure-listen"],
    );
    let server = rig.serve(["a"]);
    on_export(&server.uri("a"), &["write -P 5 30M 1M", "flush"]);
    rig.refused(5, ["rm", "a"], &["in use"]);
    // A disk that was not closed is neither clean nor damaged.
    drop(server);
    let out = rig.ploop().args(["check", "a"]).output().unwrap();
    assert_eq!(
        (out.status.code(), text(&out).contains("dirty")),
        (Some(1), true)
    );
    // Serving it closes it again.
    rig.serve(["a"]).stop();
    assert!(rig.run(["check", "a"]).contains("clean"));
    let small = Mounted::tmpfs(1 << 20);
    let target = small.path().join("out.raw");
    let target = target.to_str().unwrap();
    rig.refused(
        8,
        ["convert", "a", target, "--to", "raw"],
        &[target, "No space"],
    );
    assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0);
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    let rig = Rig::new();
    rig.small_template("t", &["a", "b"]);
    for call in [
        &["list"][..],
        &["list", "--json"],
        &["template", "list"],
        &["template", "info", "t"],
        &["info", "a"],
        &["info", "a", "--json"],
        &["check", "a"],
        &["convert", "a", "-", "--to", "raw"],
        &["snapshot-list", "store/containers/a"],
        &["completions", "bash"],
        &["--help"],
        &["--version"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let out = rig
            .ploop()
            .args(call)
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.success() && said.is_empty(),
            "{call:?}: {} {said}",
            out.status
        );
    }
}

#[test]
fn completions_are_scripts_that_the_shells_take() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = text(&run(ploop().args(["completions", shell])));
        for word in ["template", "serve", "snapshot-list", "--root"] {
            let bare = word.trim_start_matches('-');
            assert!(script.contains(bare), "{shell}: {word}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("completion");
    fs::write(&file, text(&run(ploop().args(["completions", "bash"])))).unwrap();
    run(Command::new("bash").arg("-n").arg(&file));
    let ask = format!(
        ". {}; COMP_WORDS=(ploop te); COMP_CWORD=1; _ploop ploop te ploop; echo ${{COMPREPLY[@]}}",
        file.display()
    );
    assert_eq!(
        text(&run(Command::new("bash").args(["-c", &ask]))),
        "template\n"
    );
    let out = ploop().args(["completions", "csh"]).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
}

/// The case of the corpus whose name ends like this.
fn case(name: &str) -> Case {
    corpus::cases()
        .into_iter()
        .find(|c| c.name.ends_with(name))
        .unwrap()
}

/// Goal: nothing is changed that was not asked for, what is lost is said, and all of it can be taken
/// back. Method: an image that a repair without loss leaves as it is.
#[test]
fn a_repair_is_asked_for_twice_where_it_may_lose_and_can_be_taken_back() {
    let dir = case("-entry-far-past-eof").unpack();
    let image = dir.path().join("root.hds");
    let before = fs::read(&image).unwrap();
    let check = |words: &[&str]| {
        let out = ploop()
            .arg("check")
            .args(words)
            .stdin(Stdio::null())
            .output();
        let out = out.unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned() + &text(&out);
        (out.status.code(), said)
    };
    let path = image.to_str().unwrap();
    let (code, said) = check(&[path]);
    assert_eq!(code, Some(6), "{said}");
    assert!(
        said.contains("entry-beyond-eof") && said.contains("Repair: "),
        "{said}"
    );
    let (code, said) = check(&["--repair", path]);
    assert_eq!(code, Some(6), "{said}");
    assert!(
        said.contains("not done") && said.contains("--repair --yes"),
        "{said}"
    );
    assert_eq!(fs::read(&image).unwrap(), before);
    let undo = dir.path().join("undo");
    let (code, said) = check(&[
        "--repair",
        "--yes",
        "--json",
        "--undo-file",
        undo.to_str().unwrap(),
        path,
    ]);
    assert_eq!(code, Some(0), "{said}");
    let json: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(json["class"], "clean");
    assert!(json["done"][0]["lost"][0][1].is_u64(), "{said}");
    assert_ne!(fs::read(&image).unwrap(), before);
    run(tool("qemu-img")
        .args(["check", "-q", "-f", "parallels"])
        .arg(&image));
    let (code, said) = check(&["--undo", undo.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(fs::read(&image).unwrap(), before);
}

#[test]
fn openvz_verbs_do_what_they_did_there() {
    let rig = Rig::new();
    // Sizes without a letter are sectors.
    for (args, version, cluster, bytes) in [
        (&["-s", "20480", "root.hds"][..], 2, 2048, 10 << 20),
        (&["-s", "10M", "-b", "128", "root.hds"], 2, 128, 10 << 20),
        (&["-s", "1G", "-f", "ploop1", "root.hds"], 1, 2048, 1 << 30),
        (
            &[
                "-s", "10M", "-f", "expanded", "-v", "1", "-t", "none", "root.hds",
            ],
            1,
            2048,
            10 << 20,
        ),
    ] {
        rig.run(["init"].iter().chain(args));
        let sectors: u64 = bytes / 512;
        let want = format!("size:\t\t{sectors}\nblocksize:\t{cluster}\nfmt_version:\t{version}\n");
        assert_eq!(rig.run(["info", "-s", "root.hds"]), want);
        assert_eq!(rig.run(["info", "-s", "DiskDescriptor.xml"]), want);
        // What is made here is an image to others, and empty.
        let image = rig.path("root.hds");
        run(tool("qemu-img")
            .args(["check", "-q", "-f", "parallels"])
            .arg(&image));
        let read = format!("read -P 0 0 {}", bytes.min(64 << 20));
        let (ok, said) = qemu_io("parallels", true, image.as_os_str(), &[&read]);
        assert!(ok, "{said}");
        assert!(rig.run(["check", "DiskDescriptor.xml"]).contains("clean"));
        for made in ["root.hds", "DiskDescriptor.xml"] {
            fs::remove_file(rig.path(made)).unwrap();
        }
    }
    rig.refused(
        7,
        ["init", "-s", "1G", "-t", "ext4", "root.hds"],
        &["-t ext4", "-t none"],
    );
    rig.refused(
        7,
        ["init", "-s", "1G", "-f", "raw", "root.hds"],
        &["-f raw", "expanded"],
    );

    let branches = case("-branches");
    let dir = branches.unpack();
    let xml = dir.path().join(branches.text("entry"));
    let list = |args: &[&str]| text(&run(ploop().arg("snapshot-list").args(args).arg(&xml)));
    let nodes = branches.expect["snapshots"].as_object().unwrap();
    assert!(nodes.len() > 3);
    let top = branches.text("top_guid");
    let all = list(&[]);
    let mut lines = all.lines();
    let header: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(header, ["PARENT_UUID", "C", "UUID", "FNAME"]);
    let mut seen = 0;
    for line in lines {
        let current = line.contains(" * ");
        let line = line.replace(" * ", " ");
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(nodes[words[1]], words[0], "{line}");
        assert_eq!(current, words[1] == top, "{line}");
        assert!(dir.path().join(words[2]).exists(), "{line}");
        seen += 1;
    }
    assert_eq!(seen, nodes.len());
    assert_eq!(list(&["-H"]).lines().count(), nodes.len());
    assert!(!list(&["-s"]).contains(&format!("* {top}")));
    let only = list(&["-H", "-o", "uuid", "-u", top]);
    assert_eq!(only.trim(), top);
    let missing = "{11111111-2222-3333-4444-555555555555}";
    rig.refused(
        3,
        ["snapshot-list", "-u", missing, xml.to_str().unwrap()],
        &[missing],
    );
    rig.refused(
        2,
        ["snapshot-list", "-o", "size", xml.to_str().unwrap()],
        &["size", "fname"],
    );
    let delta = dir.path().join(branches.text("focus"));
    if delta.is_file() {
        rig.refused(
            2,
            ["snapshot-list", delta.to_str().unwrap()],
            &["DiskDescriptor.xml"],
        );
    }
}

#[test]
fn openvz_verbs_that_are_not_here_are_refused_by_name() {
    let rig = Rig::new();
    rig.run(["init", "-s", "1M", "root.hds"]);
    let before = rig.path("root.hds").metadata().unwrap().len();
    for verb in [
        "mount",
        "umount",
        "grow",
        "merge",
        "tsnapshot",
        "copy",
        "replace",
        "encrypt",
        "restore-descriptor",
        "stat",
        "balloon",
        "cbt",
        "tg-init",
        "degrade",
        "fscheck",
        "start",
        "stop",
        "clear",
        "delete",
    ] {
        rig.refused(
            7,
            [verb, "-d", "/dev/x", "root.hds"],
            &[&format!("`ploop {verb}`: ")],
        );
    }
    rig.refused(2, ["listt"], &["listt", "ploop help"]);
    assert_eq!(rig.path("root.hds").metadata().unwrap().len(), before);
}

#[test]
fn a_conversion_to_standard_output_is_the_guests_bytes() {
    for name in ["-v2-32k", "-chain-3", "-raw-base-chain"] {
        let case = case(name);
        let dir = case.unpack();
        let entry = dir.path().join(case.text("entry"));
        let script = "set -o pipefail; \"$1\" convert \"$2\" - --to raw | sha256sum";
        let mut shell = Command::new("bash");
        shell
            .args(["-c", script, "sh"])
            .arg(ploop_tests::tools::ploop_path())
            .arg(entry);
        let said = text(&run(&mut shell));
        let want = case.hashes().remove("top").unwrap().0.unwrap();
        assert_eq!(said.split_whitespace().next().unwrap(), want, "{name}");
    }
    let rig = Rig::new();
    rig.run(["init", "-s", "1M", "root.hds"]);
    for to in ["ploop", "ploop-v1", "qcow2"] {
        rig.refused(
            2,
            ["convert", "root.hds", "-", "--to", to],
            &["--to raw", "standard output"],
        );
    }
}

#[test]
fn the_demo_shows_all_of_it_and_cleans_up() {
    let tmp = tempfile::tempdir().unwrap();
    let mut demo = ploop();
    demo.args(["demo", "--clones", "10"])
        .env("TMPDIR", tmp.path());
    let said = text(&run(&mut demo));
    for word in [
        "template mini",
        "10 containers",
        "equal to the template",
        "chroot: hello",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0, "{said}");
}
