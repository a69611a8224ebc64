//! `fsck.ploop`, and `ploop check` with OpenVZ's options: exit codes, and what they may write.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use ploop_tests::corpus::{self, Case};
use ploop_tests::damage::state::state;
use ploop_tests::tools::{fsck_ploop, ploop, tool};
use serde_json::Value;
use tempfile::TempDir;

const IN_USE: u64 = 44;

/// Cases where OpenVZ's tool gives another code with `-f -c -r`, and why ours is right.
const NOT_AS_OPENVZ: &[(&str, &str)] = &[
    ("006-v1-data-off-0", FOREIGN),
    ("012-odd-cluster", FOREIGN),
    ("013-small-cluster", FOREIGN),
    ("208-cbt-dropped-by-ploop", EXTENSION),
    ("214-ext-bad-md5", EXTENSION),
    ("215-ext-bad-magic", EXTENSION),
    ("216-ext-bitmap-out-of-bounds", EXTENSION),
    ("217-ext-bitmap-count", EXTENSION),
    ("218-ext-section-length", EXTENSION),
    ("219-ext-size-mismatch", EXTENSION),
    ("220-ext-granularity", EXTENSION),
    ("221-ext-off-dangling", EXTENSION),
    ("222-ext-off-on-data", EXTENSION),
    ("223-bat-entry-on-extension", EXTENSION),
    ("412-slot-n-set", "theirs looks from the next slot on"),
    ("418-last-cluster-cut", LENGTH),
    ("419-last-cluster-mostly-cut", LENGTH),
    ("428-data-off-huge", CRASH),
    ("429-data-off-inside-bat", FIELDS),
    ("430-too-few-entries", FIELDS),
    ("431-too-many-entries", FIELDS),
    (
        "435-header-only",
        "theirs reads 4096 bytes before it looks at any",
    ),
    ("438-bat-cut", LENGTH),
    ("439-bat-only", LENGTH),
    ("442-three-defects", LENGTH),
    ("443-huge-entry-count", FIELDS),
    ("444-huge-count-and-size", CRASH),
    ("447-unknown-flags", FIELDS),
];
const FOREIGN: &str = "sound; theirs refuses what only QEMU writes";
const EXTENSION: &str = "theirs does not look at the format extension";
const LENGTH: &str = "theirs returns 0 when the length is no multiple of the cluster";
const FIELDS: &str = "theirs does not hold the fields of the header against each other";
const CRASH: &str = "theirs crashes";

fn case(name: &str) -> Case {
    let found = corpus::cases().into_iter().find(|c| c.name.ends_with(name));
    found.unwrap_or_else(|| panic!("no case {name}"))
}

fn unpacked(name: &str) -> (TempDir, PathBuf) {
    let case = case(name);
    let tmp = case.unpack();
    let path = fs::canonicalize(tmp.path()).unwrap();
    let entry = path.join(case.text("entry"));
    (tmp, entry)
}

fn run(command: &mut Command) -> (i32, String) {
    let out: Output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap(), said.into_owned())
}

fn fsck(words: &[&str], sources: &[&Path]) -> (i32, String) {
    run(fsck_ploop().args(words).args(sources))
}

fn check(words: &[&str], source: &Path) -> (i32, String) {
    run(ploop().arg("check").args(words).arg(source))
}

fn openvz(words: &[&str], source: &Path) -> (i32, String) {
    run(ploop()
        .args(["check", "--openvz-exit-codes"])
        .args(words)
        .arg(source))
}

/// Goal: no spelling of "look" writes, and the codes mean what scripts of either kind take them for.
/// Method: every case of the corpus; OpenVZ's codes are those that its own tool gave.
#[test]
fn looking_writes_nothing_and_says_the_codes_of_both_conventions() {
    let mut wrong = BTreeSet::new();
    let mut report = String::new();
    for case in corpus::cases() {
        let tmp = case.unpack();
        let dir = fs::canonicalize(tmp.path()).unwrap();
        let entry = dir.join(case.text("entry"));
        let before = state(&dir);
        let (_, json) = check(&["--json"], &entry);
        let class = serde_json::from_str(&json).map_or(String::new(), |v: Value| {
            v["class"].as_str().unwrap_or_default().to_owned()
        });
        let (code, said) = fsck(&["-n", "-f"], &[&entry]);
        let allowed: &[i32] = match class.as_str() {
            "clean" => &[0],
            // An interrupted operation that goes on by itself is no error.
            "dirty" => &[0, 4],
            "leak" | "corrupt" => &[4],
            _ => &[8],
        };
        assert!(
            allowed.contains(&code),
            "{}: {code}, {class}: {said}",
            case.name
        );
        let (code, said) = openvz(&["-f", "-c", "-r", "-s"], &entry);
        assert!(said.is_empty() || class.is_empty(), "{}: {said}", case.name);
        let (again, _) = openvz(&["-F", "-d", "-r", "-S", "-D"], &entry);
        assert_eq!(code, again, "{}", case.name);
        assert_eq!(state(&dir), before, "{}: a look wrote", case.name);
        // Of a descriptor's case the verdict is on one of its images.
        let of_image = case.text("format") == "ploop" && !entry.ends_with("DiskDescriptor.xml");
        let theirs = &case.expect["peer_verdicts"]["ploop check -f -c -r"];
        let theirs = theirs.as_i64().filter(|_| of_image && entry.is_file());
        if let Some(theirs) = theirs.filter(|&t| t != i64::from(code)) {
            report += &format!(
                "(\"{}\", \"\"), // {theirs}, here {code}, {class}\n",
                case.name
            );
            wrong.insert(case.name.clone());
        }
    }
    let listed = NOT_AS_OPENVZ.iter().map(|(n, _)| (*n).to_owned()).collect();
    assert_eq!(wrong, listed, "\n{report}");
}

#[test]
fn openvz_options_write_only_where_they_ask_for_it() {
    // The mark, and nothing else.
    let (_tmp, dirty) = unpacked("-entry-far-past-eof");
    let mut bytes = fs::read(&dirty).unwrap();
    let before = bytes.clone();
    for words in [&["-f"][..], &["-d"], &["-f", "-c", "-d"]] {
        let (code, said) = openvz(words, &dirty);
        assert_eq!(code, 11, "{words:?}: {said}");
        assert_eq!(fs::read(&dirty).unwrap(), before, "{words:?}");
    }
    let (code, said) = openvz(&["-F"], &dirty);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("lost: guest bytes"), "{said}");
    let undo = dirty.with_file_name("root.hds.undo");
    assert_eq!(run(ploop().args(["check", "--undo"]).arg(&undo)).0, 0);
    assert_eq!(fs::read(&dirty).unwrap(), before);

    let (_tmp, sound) = unpacked("-v2-1m");
    bytes.clone_from(&fs::read(&sound).unwrap());
    let mark = 0x746F_6E59u32.to_le_bytes();
    bytes[IN_USE as usize..][..4].copy_from_slice(&mark);
    fs::write(&sound, &bytes).unwrap();
    for (words, code) in [
        (&["-f", "-c"][..], 37),
        (&["-d", "-r"], 37),
        (&["-d", "-s"], 0),
    ] {
        let (got, said) = openvz(words, &sound);
        assert_eq!(got, code, "{words:?}: {said}");
        let marked = fs::read(&sound).unwrap() == bytes;
        assert_eq!(marked, code == 37, "{words:?}");
    }
    assert_eq!(
        openvz(&["-f"], &sound),
        (0, format!("{}: clean\n", sound.display()))
    );
}

#[test]
fn openvz_options_name_what_they_look_at() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let init = |name: &str| {
        let (code, said) = run(ploop().args(["init", "-s", "10M"]).arg(dir.join(name)));
        assert_eq!(code, 0, "{said}");
    };
    init("root.hds");
    let xml = dir.join("DiskDescriptor.xml");
    let guid = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
    let (code, said) = openvz(&["-u", guid], &xml);
    assert_eq!((code, said.contains("clean")), (0, true), "{said}");
    let raw = dir.join("plain");
    fs::write(&raw, [1; 4096]).unwrap();
    for (words, source, code) in [
        (
            &["-u", "{00000000-0000-4000-8000-000000000001}"][..],
            &xml,
            38,
        ),
        (&["-u", guid, "-d"], &xml, 38),
        (&["-u", guid, "--fs"], &xml, 38),
        (&["-u", guid], &dir.join("root.hds"), 38),
        (&["-R"], &raw, 38),
        (&["-R", "-b", "2048"], &raw, 0),
        (&["-R", "-b", "100"], &raw, 38),
        (&["-f"], &raw, 11),
        (&["-f"], &dir.join("nothing"), 4),
        (&["--no-such-option"], &raw, 38),
        (&["-r", "--repair"], &raw, 38),
    ] {
        let (got, said) = openvz(words, source);
        assert_eq!(got, code, "{words:?}: {said}");
    }
    // Without the switch the codes are ours.
    assert_eq!(check(&["-R"], &raw).0, 2);
    assert_eq!(check(&["-f"], &raw).0, 6);
    fs::remove_file(dir.join("root.hds")).unwrap();
    assert_eq!(openvz(&[], &xml).0, 4);
    fs::write(&xml, "<no").unwrap();
    assert_eq!(openvz(&[], &xml).0, 23);
}

#[test]
fn fsck_repairs_as_far_as_it_is_told() {
    let (_tmp, lossy) = unpacked("-entry-far-past-eof");
    let (_other, dirty) = unpacked("-v2-1m");
    let mut bytes = fs::read(&dirty).unwrap();
    bytes[IN_USE as usize..][..4].copy_from_slice(&0x746F_6E59u32.to_le_bytes());
    fs::write(&dirty, &bytes).unwrap();
    let before = fs::read(&lossy).unwrap();
    let nothing = lossy.with_file_name("nothing");
    for (words, sources, code) in [
        (&["-n"][..], &[&*dirty][..], 4),
        (&["-n"], &[&*lossy, &*dirty], 4),
        (&["-n"], &[&*nothing, &*lossy], 12),
        (&["-p", "-n"], &[&*dirty], 16),
        (&["-a", "-y"], &[&*dirty], 16),
        (&["-n", "--what"], &[&*dirty], 16),
        (&[], &[&*dirty], 8),
        (&["-r"], &[&*dirty], 8),
        (&["-V"], &[], 0),
        (&["-p", "-C", "7"], &[&*dirty], 16),
    ] {
        let (got, said) = fsck(words, sources);
        assert_eq!(got, code, "{words:?}: {said}");
        assert_eq!(fs::read(&dirty).unwrap(), bytes, "{words:?}");
        assert_eq!(fs::read(&lossy).unwrap(), before, "{words:?}");
    }
    // As fsck(8) calls it; one is repaired, the other one needs more.
    let (code, said) = fsck(&["-a", "-C0"], &[&lossy, &dirty]);
    assert_eq!(code, 1 | 4, "{said}");
    assert!(said.contains("-y does it"), "{said}");
    assert!(said.contains(&format!(
        "{}: clean, 1 image, 1 repair made\n",
        dirty.display()
    )));
    assert_eq!(fs::read(&lossy).unwrap(), before);
    assert_eq!(fsck(&["-a"], &[&dirty]).0, 0);
    let (code, said) = fsck(&["-y"], &[&lossy]);
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("lost: guest bytes") && said.contains("--undo"),
        "{said}"
    );
    assert_eq!(fsck(&["-n", "-f"], &[&lossy, &dirty]).0, 0);
}

#[test]
fn progress_goes_to_the_descriptor_that_is_named() {
    let (_tmp, image) = unpacked("401-duplicate-entry");
    let out = fsck_ploop()
        .args(["-y", "-C2"])
        .arg(&image)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8(out.stderr).unwrap();
    let mut passes = BTreeSet::new();
    for line in said.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        let numbers: Vec<u64> = words[..3].iter().map(|w| w.parse().unwrap()).collect();
        assert!(numbers[1] <= numbers[2], "{line}");
        assert_eq!(Path::new(words[3]), image);
        passes.insert(numbers[0]);
    }
    assert_eq!(passes, BTreeSet::from([1, 2, 3]));
}

/// Goal: an interrupt never leaves a repair in the middle, and ends everything else at once.
/// Method: whoever reads the progress lets the program hang in it, in the pass that is meant.
#[test]
fn an_interrupt_waits_for_a_repair_and_for_nothing_else() {
    for (pass, code) in [("1", 32), ("3", 33)] {
        let (tmp, image) = unpacked("401-duplicate-entry");
        let before = state(tmp.path());
        // Long lines: the socket takes a few of them only.
        let long = format!("{}/{}root.hds", tmp.path().display(), "./".repeat(1700));
        assert!(Path::new(&long).exists() && image.exists());
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 1).unwrap();
        let stderr = Stdio::from(std::os::fd::OwnedFd::from(theirs));
        let mut command = fsck_ploop();
        command
            .args(["-y", "-C2", &long])
            .stdout(Stdio::null())
            .stderr(stderr);
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut read = |until: &dyn Fn(&str) -> bool| {
            let (mut line, mut byte) = (String::new(), [0]);
            while ours.read(&mut byte).unwrap() == 1 {
                line.push(byte[0] as char);
                if until(&line) {
                    return;
                }
                if byte[0] == b'\n' {
                    line.clear();
                }
            }
        };
        read(&|line| line.starts_with(&format!("{pass} ")));
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        // To its end.
        read(&|_| false);
        assert_eq!(child.wait().unwrap().code(), Some(code), "pass {pass}");
        match code {
            32 => assert_eq!(state(tmp.path()), before),
            _ => {
                let mut qemu = tool("qemu-img");
                let (code, said) = run(qemu.args(["check", "-f", "parallels"]).arg(&image));
                assert_eq!(code, 0, "{said}");
            }
        }
    }
}
