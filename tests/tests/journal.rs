//! What was flushed and is in a journal only, as an operator meets it: after kill -9, and after
//! another program was at the image in between (promises 1 and 3).

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::server::qemu_check;
use ploop_tests::store::Rig;
use serde_json::Value;

const SIZE: usize = 4 << 20;
const CLUSTER: usize = 64 << 10;
/// Where the in-use mark is.
const IN_USE: u64 = 44;

/// The findings of `ploop check`, and its class.
fn check(rig: &Rig) -> (String, Vec<Value>) {
    let out = rig
        .ploop()
        .args(["check", "ct", "--json"])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let class = report["class"].as_str().unwrap().to_owned();
    (class, report["findings"].as_array().unwrap().clone())
}

fn of<'a>(findings: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    findings.iter().filter(move |f| f["kind"] == kind)
}

/// Goal: what was flushed into parts of clusters is there after kill -9, and no other program's
/// image is taken for ours. Method: write, flush, kill; look, with `check`, `convert` and a second
/// server; clear the mark in between, as another tool does, and put it back.
#[test]
fn a_journal_is_replayed_or_refused_by_name() {
    let rig = Rig::new();
    let mut expected = vec![0x5A; SIZE];
    fs::write(rig.path("template.raw"), &expected).unwrap();
    let raw = rig.arg("template.raw");
    rig.run(["template", "import", "base", &raw, "--from", "raw"]);
    rig.run(["create", "ct", "--template", "base"]);
    let image = rig.top("ct");
    let name = format!("journal.{}", image.file_name().unwrap().to_str().unwrap());
    let journal = image.parent().unwrap().join(".ploop").join(name);

    let server = rig.serve(["ct"]);
    let mut client = Client::open(server.socket(), "", Style::Extended);
    for at in [CLUSTER + 5000, 9 * CLUSTER - 700] {
        let data = vec![0xC3; 9000];
        client.write(at as u64, &data);
        expected[at..at + 9000].copy_from_slice(&data);
    }
    client.flush();
    drop((server, client));
    assert!(journal.exists(), "{}", journal.display());

    let (class, findings) = check(&rig);
    assert_eq!(class, "dirty", "{findings:?}");
    assert_eq!(of(&findings, "journal").count(), 1, "{findings:?}");
    let copy = rig.arg("copy.raw");
    rig.run(["convert", "ct", &copy, "--to", "raw"]);
    assert!(
        fs::read(&copy).unwrap() == expected,
        "read beside the journal"
    );

    let file = File::options().read(true).write(true).open(&image).unwrap();
    let mut mark = [0; 4];
    file.read_exact_at(&mut mark, IN_USE).unwrap();
    file.write_all_at(&[0; 4], IN_USE).unwrap();
    let (class, findings) = check(&rig);
    assert_eq!(class, "corrupt", "{findings:?}");
    assert_eq!(of(&findings, "journal-foreign").count(), 1, "{findings:?}");
    let held: Vec<_> = of(&findings, "journal-holds")
        .map(|f| f["guest"].clone())
        .collect();
    let cluster = |first: usize, end: usize| serde_json::json!([first * CLUSTER, end * CLUSTER]);
    assert_eq!(held, [cluster(1, 2), cluster(8, 10)]);
    let says = ["another program", "3 clusters", "remove"];
    rig.refused(6, ["serve", "ct", "--socket", "s"], &says);
    rig.refused(6, ["serve", "--read-only", "ct", "--socket", "s"], &says);
    rig.refused(6, ["convert", "ct", "-", "--to", "raw"], &says);
    rig.refused(6, ["snapshot", "create", "ct"], &says);

    file.write_all_at(&mark, IN_USE).unwrap();
    let server = rig.serve(["ct"]);
    let mut client = Client::open(server.socket(), "", Style::Extended);
    assert!(client.read(0, SIZE as u64) == expected, "served again");
    client.disconnect();
    server.stop();
    assert!(!journal.exists());
    qemu_check(&image);
    assert_eq!(check(&rig).0, "clean");
    fs::remove_file(&copy).unwrap();
    rig.run(["convert", "ct", &copy, "--to", "raw"]);
    assert!(fs::read(&copy).unwrap() == expected, "after a clean close");
}
