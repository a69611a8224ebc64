//! Metadata contexts: what each client is told of layers and of what was written, against what the
//! test wrote.

use std::fs;
use std::ops::Range;

use nbd_server::wire::errno;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop_tests::client::{Ask, Client};
use ploop_tests::server::{nbd_python, out, pattern};
use ploop_tests::store::{Rig, Server};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const GRANULE: u64 = 64 << 10;
const BITMAP: &str = "qemu:dirty-bitmap:night";
const DEPTH: &str = "qemu:allocation-depth";

/// A container, served, with two snapshots. In its layers are, besides the template's: `one` 20 MiB
/// + 1 MiB (below snapshot `two`), 30 MiB + 64 KiB (the top).
fn layered() -> (Rig, Server) {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let server = rig.serve(["--store"]);
    rig.run(["snapshot", "create", "ct", "--name", "one"]);
    write(&server, 20 * MIB, &pattern(MIB as usize, 1));
    rig.run(["snapshot", "create", "ct", "--name", "two"]);
    write(&server, 30 * MIB, &pattern(GRANULE as usize, 2));
    (rig, server)
}

fn write(server: &Server, at: u64, data: &[u8]) {
    let mut client = Client::open(server.socket(), "ct", Style::Structured);
    client.write(at, data);
    client.flush();
    client.disconnect();
}

/// What `nbdinfo --map` says of a context: (bytes, type), in order and without gaps.
fn map(uri: &str, context: &str) -> Vec<(Range<u64>, u64)> {
    let map = format!("--map={context}");
    let rows: Value = serde_json::from_str(&out("nbdinfo", &[&map, "--json", uri])).unwrap();
    let number = |row: &Value, key: &str| row[key].as_u64().unwrap();
    let mut end = 0;
    let rows = rows.as_array().unwrap().iter().map(|row| {
        let start = number(row, "offset");
        assert_eq!(start, end, "{context}: {rows}");
        end = start + number(row, "length");
        (start..end, number(row, "type"))
    });
    let rows: Vec<_> = rows.collect();
    assert_eq!(end, SIZE);
    rows
}

/// The bytes of one type.
fn of(rows: &[(Range<u64>, u64)], what: u64) -> Vec<Range<u64>> {
    let rows = rows.iter().filter(|(_, found)| *found == what);
    rows.map(|(bytes, _)| bytes.clone()).collect()
}

fn contexts(uri: &str) -> Value {
    let info: Value = serde_json::from_str(&out("nbdinfo", &["--json", uri])).unwrap();
    info["exports"][0]["contexts"].clone()
}

/// Goal: a client learns which layer has what. Method: layers whose clusters the test chose.
#[test]
fn nbdinfo_maps_layers_by_their_depth() {
    let (rig, server) = layered();
    let (top, second) = (30 * MIB..30 * MIB + GRANULE, 20 * MIB..21 * MIB);
    let rows = map(&server.uri("ct"), DEPTH);
    assert_eq!(of(&rows, 1), [top]);
    assert_eq!(of(&rows, 2), std::slice::from_ref(&second));
    // The container's first image has nothing; what the template has lies below that.
    assert_eq!(of(&rows, 3), []);
    let template = of(&rows, 4);
    assert!(!template.is_empty() && !of(&rows, 0).is_empty(), "{rows:?}");

    // Of a snapshot, its own image is the first.
    let rows = map(&server.uri("ct@two"), DEPTH);
    assert_eq!(of(&rows, 1), [second]);
    assert_eq!(of(&rows, 3), template);
    assert_eq!(of(&map(&server.uri("template:t"), DEPTH), 1), template);
    let none = serde_json::json!(["base:allocation", DEPTH]);
    assert_eq!(contexts(&server.uri("ct@two")), none);
    assert_eq!(contexts(&server.uri("ct")), none);
    // What is a hole has no layer, and the other way round but for zeros that were written.
    for (bytes, _) in map(&server.uri("ct"), "base:allocation") {
        assert!(bytes.end <= SIZE);
    }
    drop(rig);
    server.stop();
}

/// Goal: a program that makes incremental backups gets every byte that was written, from each client
/// it may use. Method: a copy at one instant, writes, and what the bitmap calls dirty read over it.
#[test]
fn what_is_dirty_brings_a_copy_up_to_date() {
    let (rig, server) = layered();
    let uri = server.uri("ct");
    let copy = rig.arg("copy");
    rig.run(["tracker", "start", "ct", "night"]);
    out("nbdcopy", &[&uri, &copy]);
    assert_eq!(of(&map(&uri, BITMAP), 1), []);
    assert_eq!(
        contexts(&uri),
        serde_json::json!(["base:allocation", DEPTH, BITMAP])
    );

    write(&server, 25 * MIB, &[3; 4096]);
    write(&server, 50 * MIB, &pattern(2 * GRANULE as usize, 4));
    // Over what a layer below has, and across a border of granules.
    write(&server, 20 * MIB + GRANULE - 512, &pattern(1024, 5));
    let dirty = [
        20 * MIB..20 * MIB + 2 * GRANULE,
        25 * MIB..25 * MIB + GRANULE,
        50 * MIB..50 * MIB + 2 * GRANULE,
    ];
    let rows = map(&uri, BITMAP);
    assert_eq!(of(&rows, 1), dirty);
    assert_eq!(rows.len(), 7, "clean and dirty by turns: {rows:?}");

    // QEMU takes the set bits of any context for holes.
    let node = format!(
        "driver=nbd,export=ct,server.type=unix,server.path={},x-dirty-bitmap={BITMAP}",
        server.socket().display()
    );
    let said = out("qemu-img", &["map", "--output=json", "--image-opts", &node]);
    let rows: Value = serde_json::from_str(&said).unwrap();
    let of_qemu: Vec<Range<u64>> = rows
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["data"] == false)
        .map(|row| {
            let start = row["start"].as_u64().unwrap();
            start..start + row["length"].as_u64().unwrap()
        })
        .collect();
    assert_eq!(of_qemu, dirty, "{said}");
    let json = format!(
        r#"json:{{"driver":"nbd","export":"ct","server":{{"type":"unix","path":"{}"}},"x-dirty-bitmap":"{BITMAP}"}}"#,
        server.socket().display()
    );
    assert_eq!(out("qemu-img", &["map", "--output=json", &json]), said);
    let info: Value =
        serde_json::from_str(&out("qemu-img", &["info", "--output=json", &json])).unwrap();
    assert_eq!(info["virtual-size"], SIZE);
    let read = ["-r", "--image-opts", &node, "-c", "read -P 3 25M 4k"];
    let said = out("qemu-io", &read);
    assert!(!said.contains("failed"), "{said}");

    let mut client = Client::open(server.socket(), "ct", Style::Structured);
    let mut old = fs::read(&copy).unwrap();
    for bytes in dirty {
        let new = client.read(bytes.start, bytes.end - bytes.start);
        old[bytes.start as usize..bytes.end as usize].copy_from_slice(&new);
    }
    let (now, by_qemu) = (rig.arg("now"), rig.arg("qemu"));
    out("nbdcopy", &[&uri, &now]);
    assert!(old == fs::read(&now).unwrap());
    out(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &uri, &by_qemu],
    );
    assert!(old == fs::read(&by_qemu).unwrap());

    rig.run(["tracker", "clear", "ct", "night"]);
    assert_eq!(of(&map(&uri, BITMAP), 1), []);
    server.stop();
}

/// Goal: one answer says all that was asked for, whatever the headers. Method: every style, the same
/// range, one extent each and many.
#[test]
fn several_contexts_share_an_answer() {
    let (rig, server) = layered();
    rig.run(["tracker", "start", "ct", "night"]);
    write(&server, 20 * MIB, &[7; 512]);
    let all = ["base:allocation", DEPTH, BITMAP];
    for style in [Style::Structured, Style::Extended] {
        let mut client = Client::open_with(server.socket(), "ct", style, &all);
        let mut ask = |flags, range| client.ask(Ask::new(kind::BLOCK_STATUS, flags, range));
        let range = 20 * MIB..30 * MIB + GRANULE;
        let reply = ask(0, range.clone());
        assert_eq!((reply.error, reply.others.len()), (0, 2), "{reply:?}");
        let of = |id: u32| -> Vec<(u64, u32)> {
            let extents = reply.others[&id].iter();
            extents.map(|e| (e.len, e.flags)).collect()
        };
        assert_eq!(of(3), [(GRANULE, 1), (10 * MIB, 0)]);
        let depths = of(2);
        assert_eq!(
            depths.iter().map(|d| d.0).sum::<u64>(),
            range.end - range.start
        );
        assert_eq!((depths[0].1, depths.last().unwrap()), (1, &(GRANULE, 1)));
        let held = reply.extents.iter().map(|e| e.len).sum::<u64>();
        assert!(held <= range.end - range.start);

        let one = ask(flag::REQ_ONE, 20 * MIB + 100..20 * MIB + 200);
        let lens = one.others.values().map(|e| (e.len(), e[0].len, e[0].flags));
        assert_eq!(lens.collect::<Vec<_>>(), [(1, 100, 1), (1, 100, 1)]);
        assert_eq!((one.extents.len(), one.extents[0].len), (1, 100));
        let past = ask(0, SIZE - 512..SIZE + 512);
        assert_eq!((past.error, past.others.len()), (errno::EINVAL, 0));
        client.disconnect();
    }
    server.stop();
}

/// Goal: nobody takes for clean what nobody looks at any more. Method: a tracker is ended, and
/// another of its name begun, under a client that selected it.
#[test]
fn a_tracker_that_ends_is_an_error_and_never_clean() {
    let (rig, server) = layered();
    rig.run(["tracker", "start", "ct", "night"]);
    let style = Style::Structured;
    let mut client = Client::open_with(server.socket(), "ct", style, &[DEPTH, BITMAP]);
    let status = |client: &mut Client| client.ask(Ask::new(kind::BLOCK_STATUS, 0, 0..SIZE));
    assert_eq!(status(&mut client).error, 0);
    rig.run(["tracker", "stop", "ct", "night"]);
    let ended = status(&mut client);
    assert_eq!(ended.error, errno::EINVAL);
    assert!(
        ended.text.contains("night") && ended.text.contains("ended"),
        "{ended:?}"
    );
    rig.run(["tracker", "start", "ct", "night"]);
    assert_eq!(status(&mut client).error, errno::EINVAL);
    // The client is as good as before otherwise.
    assert_eq!(client.read(20 * MIB, 16), pattern(16, 1));
    client.disconnect();
    let mut client = Client::open_with(server.socket(), "ct", style, &[DEPTH, BITMAP]);
    assert_eq!(status(&mut client).error, 0);
    client.disconnect();
    server.stop();
}

/// Goal: libnbd's own calls see several contexts at once.
#[test]
fn libnbd_asks_for_several_contexts() {
    let (rig, server) = layered();
    rig.run(["tracker", "start", "ct", "night"]);
    write(&server, 25 * MIB, &[7; 512]);
    nbd_python(
        r"
h.set_opt_mode(True)
h.connect_uri(uri)
contexts = []
for query, count in [('qemu:', 2), ('qemu:dirty-bitmap:', 1), ('base:', 1), ('qemu:x', 0)]:
    h.clear_meta_contexts()
    h.add_meta_context(query)
    contexts.clear()
    assert h.opt_list_meta_context(contexts.append) == count, (query, contexts)
h.clear_meta_contexts()
for context in ['qemu:dirty-bitmap:night', 'qemu:allocation-depth', 'base:allocation',
                'qemu:dirty-bitmap:day', 'qemu:dirty-bitmap:']:
    h.add_meta_context(context)
h.opt_go()
assert h.can_meta_context('qemu:dirty-bitmap:night')
assert not h.can_meta_context('qemu:dirty-bitmap:day')
got = {}
h.block_status(1 << 20, 25 << 20, lambda ctx, at, e, err: got.__setitem__(ctx, e))
assert sorted(got) == ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:night'], got
assert got['qemu:dirty-bitmap:night'] == [65536, 1, (1 << 20) - 65536, 0], got
assert got['qemu:allocation-depth'][1] == 1, got
h.shutdown()
",
        &[&server.uri("ct")],
    );
    server.stop();
}
