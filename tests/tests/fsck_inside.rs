//! `--fs`: the file system inside is judged by its own tool, and lost bytes are named by file.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ploop_tests::damage::state::state;
use ploop_tests::tools::{fsck_ploop, ploop, run, tool};
use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

struct Bench {
    tmp: TempDir,
    raw: PathBuf,
}

impl Bench {
    /// A raw image with an ext4 on it.
    fn ext4() -> Bench {
        let tmp = tempfile::tempdir().unwrap();
        let tree = tmp.path().join("tree");
        fs::create_dir_all(tree.join("etc/deep")).unwrap();
        // No two blocks of it are alike, and none is zeros.
        let bytes: Vec<u8> = (1..=MIB as u32).flat_map(|i| i.to_le_bytes()).collect();
        fs::write(tree.join("etc/deep/lost file"), bytes).unwrap();
        fs::write(tree.join("etc/kept"), "kept").unwrap();
        let raw = tmp.path().join("disk.raw");
        File::create(&raw).unwrap().set_len(32 * MIB).unwrap();
        run(tool("mke2fs")
            .args(["-q", "-t", "ext4", "-b", "4096", "-d"])
            .arg(&tree)
            .arg(&raw));
        fs::remove_dir_all(tree).unwrap();
        Bench { tmp, raw }
    }

    fn debugfs(&self, request: &str) -> String {
        let out = run(tool("debugfs").args(["-w", "-R", request]).arg(&self.raw));
        String::from_utf8(out.stdout).unwrap()
    }

    /// The same behind a partition table as OpenVZ makes it.
    fn in_partition(&mut self) {
        let disk = self.tmp.path().join("partitioned.raw");
        let bytes = fs::read(&self.raw).unwrap();
        let file = File::create(&disk).unwrap();
        file.set_len(bytes.len() as u64 + 2 * MIB).unwrap();
        file.write_all_at(&bytes, MIB).unwrap();
        drop(file);
        let size = format!("1:2048:+{}K", bytes.len() / 1024);
        run(tool("sgdisk").args(["-n", &size]).arg(&disk));
        self.raw = disk;
    }

    /// It as a ploop image.
    fn ploop(&self) -> PathBuf {
        let image = self.tmp.path().join("root.hds");
        drop(fs::remove_file(&image));
        let mut convert = ploop();
        convert.arg("convert").arg(&self.raw).arg(&image);
        run(convert.args(["--to", "ploop", "--cluster", "64K"]));
        image
    }
}

/// The report of `ploop check --fs`, which writes nothing to the disk.
fn report(image: &Path) -> Value {
    let dir = image.parent().unwrap();
    let before = state(dir);
    let out = ploop()
        .args(["check", "--fs", "--json"])
        .arg(image)
        .output()
        .unwrap();
    assert_eq!(state(dir), before);
    let stderr = String::from_utf8_lossy(&out.stderr);
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {stderr}"))
}

/// Kind, class and words of each finding about the file system.
fn inside(report: &Value) -> Vec<(String, String, String)> {
    let text = |f: &Value, key: &str| f[key].as_str().unwrap().to_owned();
    let all = report["findings"].as_array().unwrap().iter();
    all.filter(|f| f["kind"].as_str().unwrap().starts_with("fs-"))
        .map(|f| (text(f, "kind"), text(f, "class"), text(f, "what")))
        .collect()
}

#[test]
fn an_ext4_is_judged_by_e2fsck() {
    let mut bench = Bench::ext4();
    assert_eq!(inside(&report(&bench.ploop())), []);
    // As a disk that was stopped in the middle.
    bench.debugfs("feature needs_recovery");
    let found = inside(&report(&bench.ploop()));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((&*found[0].0, &*found[0].1), ("fs-unclean", "dirty"));
    // The next mount ends it: no error.
    let mut fsck = fsck_ploop();
    let out = fsck.args(["-n", "--fs"]).arg(bench.ploop()).output();
    assert_eq!(out.unwrap().status.code(), Some(0));
    bench.debugfs("feature -needs_recovery");
    bench.debugfs("clri <13>");
    for _ in 0..2 {
        let image = bench.ploop();
        let said = report(&image);
        let found = inside(&said);
        assert_eq!(said["class"], "corrupt");
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((&*found[0].0, &*found[0].1), ("fs-errors", "corrupt"));
        assert!(found[0].2.contains("e2fsck -n: "), "{found:?}");
        assert!(found[0].2.contains("inode 13"), "{found:?}");
        let out = fsck_ploop().args(["-n", "--fs"]).arg(&image).output();
        assert_eq!(out.unwrap().status.code(), Some(4));
        // And the image is what it was called without it.
        let out = fsck_ploop().arg("-n").arg(&image).output();
        assert_eq!(out.unwrap().status.code(), Some(0));
        bench.in_partition();
    }
}

#[test]
fn an_xfs_is_judged_by_xfs_repair() {
    let tmp = tempfile::tempdir().unwrap();
    let raw = tmp.path().join("disk.raw");
    File::create(&raw).unwrap().set_len(512 * MIB).unwrap();
    run(tool("mkfs.xfs").arg("-q").arg(&raw));
    let bench = Bench { tmp, raw };
    assert_eq!(inside(&report(&bench.ploop())), []);
    run(tool("xfs_db")
        .args(["-x", "-c", "agf 0", "-c", "write -d freeblks 1"])
        .arg(&bench.raw));
    let found = inside(&report(&bench.ploop()));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].0, "fs-errors");
    assert!(found[0].2.contains("xfs_repair -n: "), "{found:?}");
}

#[test]
fn what_holds_no_known_file_system_is_said_to() {
    let tmp = tempfile::tempdir().unwrap();
    let raw = tmp.path().join("disk.raw");
    File::create(&raw).unwrap().set_len(4 * MIB).unwrap();
    let bench = Bench { tmp, raw };
    let image = bench.ploop();
    let said = report(&image);
    assert_eq!(said["class"], "clean");
    assert_eq!(inside(&said)[0].0, "fs-unknown");
    let (code, out, _) = words(fsck_ploop().args(["-p", "--fs"]).arg(&image));
    assert_eq!(code, 0);
    assert!(out.contains("fs-unknown: neither a file system"), "{out}");
    let last = out.lines().last().unwrap();
    assert!(
        last.ends_with("clean, 1 image; what is inside was not all checked"),
        "{out}"
    );
    let (_, out, _) = words(fsck_ploop().arg("-p").arg(&image));
    assert!(out.ends_with(": clean, 1 image\n"), "{out}");
}

/// The code of a program, and what it said.
fn words(command: &mut Command) -> (i32, String, String) {
    let out = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        out.status.code().unwrap(),
        text(out.stdout),
        text(out.stderr),
    )
}

/// Goal: a guest cannot have a device of the host opened as its journal, and what was not checked is
/// not called sound. Method: a journal elsewhere, by number and by kind.
#[test]
fn an_ext4_whose_journal_is_elsewhere_is_left_alone() {
    let bench = Bench::ext4();
    bench.debugfs("ssv journal_inum 0");
    bench.debugfs("ssv journal_dev 0x0700");
    bench.debugfs("feature needs_recovery");
    let outer = Bench::ext4();
    run(tool("mke2fs")
        .args(["-q", "-F", "-O", "journal_dev"])
        .arg(&outer.raw));
    for bench in [bench, outer] {
        let found = inside(&report(&bench.ploop()));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((&*found[0].0, &*found[0].1), ("fs-unknown", "clean"));
        assert!(
            found[0].2.contains("a journal on another device"),
            "{found:?}"
        );
    }
}

/// Goal: damage that only the journal tells of is found, and not repaired away on the copy. Method: the
/// journal has a superblock with the mark of errors, and an inode is wrong in a way that e2fsck -p mends.
#[test]
fn what_the_journal_brings_is_judged() {
    let bench = Bench::ext4();
    bench.debugfs("sif <13> blocks 4444");
    let marked = bench.tmp.path().join("marked.raw");
    fs::copy(&bench.raw, &marked).unwrap();
    run(tool("debugfs")
        .args(["-w", "-R", "ssv state 2"])
        .arg(&marked));
    let block = bench.tmp.path().join("block");
    fs::write(&block, &fs::read(&marked).unwrap()[..4096]).unwrap();
    let requests = bench.tmp.path().join("requests");
    fs::write(&requests, format!("jo\njw -b 0 {}\njc\n", block.display())).unwrap();
    run(tool("debugfs")
        .args(["-w", "-f"])
        .args([&requests, &bench.raw]));
    let said = report(&bench.ploop());
    let found = inside(&said);
    let kinds: Vec<&str> = found.iter().map(|f| &*f.0).collect();
    assert_eq!(kinds, ["fs-unclean", "fs-errors", "fs-errors"], "{found:?}");
    assert!(found[1].2.contains("the kernel met damage"), "{found:?}");
    assert!(found[2].2.contains("i_blocks is 4444"), "{found:?}");
    assert_eq!(said["class"], "corrupt");
}

/// Goal: a guest cannot talk damage down to a log that is to be replayed. Method: a file whose name has
/// a line of xfs_repair's own, in a directory that is damaged.
#[test]
fn a_name_inside_cannot_pass_for_a_word_of_the_tool() {
    let tmp = tempfile::tempdir().unwrap();
    let raw = tmp.path().join("disk.raw");
    File::create(&raw).unwrap().set_len(512 * MIB).unwrap();
    let (held, name) = (
        "nn_ALERT:_The_filesystem_has_valuable_metadata",
        "nn\nALERT: The filesystem has valuable metadata",
    );
    let content = tmp.path().join("content");
    fs::write(&content, "content").unwrap();
    let prototype = tmp.path().join("prototype");
    let lines = format!(
        "/\n0 0\nd--755 0 0\n{held} ---644 0 0 {}\n$\n",
        content.display()
    );
    fs::write(&prototype, lines).unwrap();
    // Version 4 has no sums of its tables.
    run(tool("mkfs.xfs")
        .args(["-q", "-m", "crc=0", "-p"])
        .args([&prototype, &raw]));
    let mut bytes = fs::read(&raw).unwrap();
    let at = bytes
        .windows(held.len())
        .position(|w| w == held.as_bytes())
        .unwrap();
    bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
    fs::write(&raw, bytes).unwrap();
    let bench = Bench { tmp, raw };
    assert_eq!(inside(&report(&bench.ploop())), []);
    run(tool("xfs_db")
        .args(["-x", "-c", "inode 131", "-c", "write core.mode 0"])
        .arg(&bench.raw));
    let found = inside(&report(&bench.ploop()));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((&*found[0].0, &*found[0].1), ("fs-errors", "corrupt"));
}

/// Goal: whoever had a disk repaired is told so, and how it is taken back, whatever comes after.
/// Method: the image is marked in use; the file system's checker is killed when it is asked again.
#[test]
fn a_repair_is_told_though_the_look_inside_fails_after_it() {
    let bench = Bench::ext4();
    let real = tool("e2fsck").get_program().to_owned();
    let bin = bench.tmp.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let (script, flag) = (bin.join("e2fsck"), bench.tmp.path().join("asked"));
    let (real, shown) = (Path::new(&real).display(), flag.display());
    let text = format!(
        "#!/bin/sh\nif [ -e {shown} ]; then kill -9 $$; fi\n: > {shown}\nexec {real} \"$@\"\n"
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut cli = ploop();
    cli.args(["check", "--repair", "--fs"]);
    let mut fsck = fsck_ploop();
    fsck.args(["-p", "--fs"]);
    for (mut command, code, asked) in [(cli, 1, true), (fsck, 1 | 8, false)] {
        let image = bench.ploop();
        let file = File::options().write(true).open(&image).unwrap();
        file.write_all_at(&0x746F_6E59u32.to_le_bytes(), 44)
            .unwrap();
        drop(file);
        drop(fs::remove_file(&flag));
        if asked {
            // It looks only once.
            fs::write(&flag, "").unwrap();
        }
        let (got, out, err) = words(command.env("PATH", &path).arg(&image));
        assert_eq!(got, code, "{out}{err}");
        assert!(err.contains("e2fsck: signal: 9"), "{err}");
        assert!(out.contains("check --undo"), "{out}");
        let undo = image.with_file_name("root.hds.undo");
        run(ploop().args(["check", "--undo"]).arg(&undo));
    }
}

/// Goal: an operator learns which of his files a repair costs him, before he says yes. Method: a
/// cluster in the middle of one file is cut out of the table, another one is given two owners.
#[test]
fn a_plan_names_the_files_that_it_loses() {
    let mut bench = Bench::ext4();
    let blocks = bench.debugfs("blocks \"/etc/deep/lost file\"");
    let blocks: Vec<u64> = blocks
        .split_whitespace()
        .map(|b| b.parse().unwrap())
        .collect();
    bench.in_partition();
    let image = bench.ploop();
    let slot = |block: u64| (MIB + block * 4096) / CLUSTER;
    let file = File::options().write(true).read(true).open(&image).unwrap();
    file.write_all_at(&[0xFF; 4], 64 + 4 * slot(blocks[100]))
        .unwrap();
    let before = fs::read(&image).unwrap();
    let named = |words: &[&str]| {
        let mut command = ploop();
        command
            .args(["check", "--repair", "--fs", "--json"])
            .args(words);
        let out = command.arg(&image).stdin(Stdio::null()).output().unwrap();
        serde_json::from_slice::<Value>(&out.stdout).unwrap()
    };
    let said = named(&[]);
    let lost = &said["not_done"][0];
    assert_eq!(lost["lost"].as_array().unwrap().len(), 1, "{said:#}");
    assert_eq!(
        lost["files"]["first"],
        serde_json::json!(["/etc/deep/lost file"])
    );
    assert_eq!(
        (&lost["files"]["more"], &lost["files"]["note"]),
        (&0.into(), &"".into())
    );
    assert_eq!(fs::read(&image).unwrap(), before);
    let out = fsck_ploop()
        .args(["-n", "--fs"])
        .arg(&image)
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("; files: /etc/deep/lost file\n"), "{text}");

    // Two clusters of the file are one.
    let mut entry = [0; 4];
    file.read_exact_at(&mut entry, 64 + 4 * slot(blocks[200]))
        .unwrap();
    file.write_all_at(&entry, 64 + 4 * slot(blocks[300]))
        .unwrap();
    let said = named(&["--yes"]);
    assert_eq!(said["not_done"], serde_json::json!([]), "{said:#}");
    for step in said["done"].as_array().unwrap() {
        let harms = !(step["lost"].as_array().unwrap().is_empty()
            && step["suspect"].as_array().unwrap().is_empty());
        match harms {
            true => assert_eq!(step["files"]["first"][0], "/etc/deep/lost file", "{step}"),
            false => assert_eq!(step["files"], Value::Null, "{step}"),
        }
    }
    // Its tables are whole: only content is lost.
    assert_eq!(said["class"], "clean");
}
