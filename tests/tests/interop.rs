//! Clients and tools that others wrote: what they write through NBD they find again, there and in
//! the files.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nbd::client::NbdExt;
use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::fsx::{Fsx, env};
use ploop_tests::mount::NbdFile;
use ploop_tests::server::{
    Bare, Listening, assert_acceptable, nbd_python, out, pattern, qemu_check, qemu_compare,
    refused, text,
};
use ploop_tests::store::{Rig, Server, on_export, qemu_io};
use ploop_tests::tools::{ploop, run, tool};
use serde_json::Value;

/// `in_use` of an image that is open, or was not closed.
const DIRTY: u32 = 0x746F_6E59;

/// Random operations through three connections; the server is stopped at the end.
fn random_session(fsx: &mut Fsx, server: Server, export: &str, ops: u64) {
    let styles = [Style::Simple, Style::Structured, Style::Extended];
    let mut links = styles.map(|s| Client::open(server.socket(), export, s));
    let until = fsx.done + ops;
    while fsx.done < until {
        let turn = fsx.rng().below(3) as usize;
        fsx.step(&mut links[turn]);
    }
    fsx.check_all(&mut links[0]);
    server.stop();
}

/// A bare image through two rounds of random operations, with QEMU writing to the file in between.
fn peers_agree(init: &[&str], megabytes: u64, cluster: u64, v1: bool) {
    let bare = Bare::new(&format!("{megabytes}M"), init);
    assert_acceptable(bare.image(), v1);
    let size = (megabytes << 20) as usize;
    let mut fsx = Fsx::new(env("PLOOP_SEED", 41), vec![0; size], cluster);
    let reference = bare.path("reference.raw");
    let compare = |fsx: &Fsx| {
        qemu_check(bare.image());
        assert_acceptable(bare.image(), v1);
        fs::write(&reference, &fsx.model).unwrap();
        qemu_compare("parallels", bare.image(), &reference);
        run(ploop().arg("check").arg(bare.image()));
    };
    random_session(&mut fsx, bare.serve(&[]), "root", env("PLOOP_OPS", 3000));
    compare(&fsx);
    let commands = ["write -P 0x5a 1M 300k", "write -P 0xa5 3000k 1", "flush"];
    let (ok, said) = qemu_io("parallels", false, bare.image().as_os_str(), &commands);
    assert!(ok, "{said}");
    fsx.model[1 << 20..(1 << 20) + (300 << 10)].fill(0x5a);
    fsx.model[3000 << 10] = 0xa5;
    random_session(&mut fsx, bare.serve(&[]), "root", env("PLOOP_OPS", 3000));
    compare(&fsx);
}

#[test]
fn peers_agree_on_v2_with_64k_clusters() {
    peers_agree(&["-b", "128"], 12, 64 << 10, false);
}

#[test]
fn peers_agree_on_v2_with_1m_clusters() {
    peers_agree(&[], 48, 1 << 20, false);
}

#[test]
fn peers_agree_on_v2_with_32k_clusters() {
    peers_agree(&["-b", "64"], 8, 32 << 10, false);
}

#[test]
fn peers_agree_on_v1_which_stays_v1() {
    peers_agree(&["-v", "1"], 48, 1 << 20, true);
    peers_agree(&["-f", "ploop1", "-b", "64"], 8, 32 << 10, true);
}

#[test]
fn peers_agree_on_a_container() {
    let rig = Rig::new();
    let mut bytes = pattern(10 << 20, 1);
    bytes[3 << 20..5 << 20].fill(0);
    fs::write(rig.path("template.raw"), &bytes).unwrap();
    rig.run(["template", "import", "t", &rig.arg("template.raw")]);
    rig.run(["create", "a", "b", "--template", "t", "--size", "12M"]);
    let template = rig.template_content("t");
    bytes.resize(12 << 20, 0);
    let server = rig.serve(["--store"]);
    let mut fsx = Fsx::new(env("PLOOP_SEED", 42), bytes.clone(), 64 << 10);
    random_session(&mut fsx, server, "a", env("PLOOP_OPS", 5000));
    qemu_check(&rig.top("a"));
    assert_acceptable(&rig.top("a"), false);
    fs::write(rig.path("reference.raw"), &fsx.model).unwrap();
    rig.run(["convert", "a", "whole.raw", "--to", "raw"]);
    qemu_compare("raw", &rig.path("whole.raw"), &rig.path("reference.raw"));
    rig.run(["check", "a"]);

    rig.run(["convert", "b", "other.raw", "--to", "raw"]);
    assert!(
        fs::read(rig.path("other.raw")).unwrap() == bytes,
        "another container is untouched"
    );
    assert_eq!(rig.template_content("t"), template);
}

/// A cluster that no entry names may hold anything; whoever gets it sees nothing of its past.
#[test]
fn a_free_cluster_in_the_middle_is_taken_again_and_shows_nothing_of_its_past() {
    const CLUSTER: u64 = 64 << 10;
    let bare = Bare::new("16M", &["-b", "128"]);
    let server = bare.serve(&[]);
    let mut client = Client::open(server.socket(), "root", Style::Structured);
    client.write(0, &vec![0x99; 8 * CLUSTER as usize]);
    server.stop();
    let length = fs::metadata(bare.image()).unwrap().len();
    // Guest clusters 2 to 5 are dropped from the table, as QEMU's discard does it.
    let file = fs::OpenOptions::new().write(true).open(bare.image());
    file.unwrap().write_all_at(&[0; 16], 64 + 4 * 2).unwrap();
    qemu_check(bare.image());

    let server = bare.serve(&[]);
    let mut client = Client::open(server.socket(), "root", Style::Structured);
    assert!(
        client
            .read(2 * CLUSTER, 4 * CLUSTER)
            .iter()
            .all(|b| *b == 0)
    );
    for cluster in [100, 3, 200, 101] {
        client.write(cluster * CLUSTER + 512, &[0x11; 512]);
        let mut expect = vec![0; CLUSTER as usize];
        expect[512..1024].fill(0x11);
        assert!(
            client.read(cluster * CLUSTER, CLUSTER) == expect,
            "{cluster}"
        );
    }
    server.stop();
    assert_eq!(
        fs::metadata(bare.image()).unwrap().len(),
        length,
        "the file has not grown"
    );
    assert_acceptable(bare.image(), false);
    qemu_check(bare.image());
}

/// Two clusters at 1 MiB, some bytes at 40 MiB.
fn sparse() -> Bare {
    let bare = Bare::new("64M", &["-b", "128"]);
    let server = bare.serve(&[]);
    let mut client = Client::open(server.socket(), "root", Style::Structured);
    client.write(1 << 20, &pattern(128 << 10, 3));
    client.write(40 << 20, &pattern(1000, 4));
    server.stop();
    bare
}

/// `nbdinfo --map`: (offset, length, type).
fn map(uri: &str) -> Vec<(u64, u64, u64)> {
    let rows: Value = serde_json::from_str(&out("nbdinfo", &["--map", "--json", uri])).unwrap();
    let number = |row: &Value, key: &str| row[key].as_u64().unwrap();
    let row = |r| (number(r, "offset"), number(r, "length"), number(r, "type"));
    rows.as_array().unwrap().iter().map(row).collect()
}

#[test]
fn nbdinfo_describes_an_image() {
    let bare = sparse();
    let server = bare.serve(&["--name", "disk"]);
    let uri = server.uri("disk");
    assert_eq!(out("nbdinfo", &["--size", &uri]).trim(), "67108864");
    let info: Value = serde_json::from_str(&out("nbdinfo", &["--json", &uri])).unwrap();
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    for (key, value) in [
        ("export-size", Value::from(64 << 20)),
        ("is_read_only", false.into()),
        ("can_cache", true.into()),
        ("can_df", true.into()),
        ("can_fast_zero", true.into()),
        ("can_flush", true.into()),
        ("can_fua", true.into()),
        ("can_multi_conn", true.into()),
        ("can_trim", true.into()),
        ("can_zero", true.into()),
        ("block_size_minimum", 1.into()),
        ("block_size_preferred", 65536.into()),
        ("block_size_maximum", (32 << 20).into()),
    ] {
        assert_eq!(export[key], value, "{key}");
    }
    assert_eq!(
        export["contexts"],
        serde_json::json!(["base:allocation", "qemu:allocation-depth"])
    );
    let (mib, data) = (1 << 20, 128 << 10);
    // The second piece is as long as its blocks in the file: the rest of its cluster is sparse.
    let rows = map(&uri);
    assert_eq!(
        rows[..3],
        [
            (0, mib, 3),
            (mib, data, 0),
            (mib + data, 39 * mib - data, 3)
        ]
    );
    assert!(
        rows[3].0 == 40 * mib && rows[3].2 == 0 && rows[3].1 <= 64 << 10,
        "{rows:?}"
    );
    assert_eq!(
        (rows[4].0 + rows[4].1, rows[4].2, rows.len()),
        (64 * mib, 3, 5)
    );
    server.stop();

    let server = bare.serve(&["--read-only"]);
    let info = out("nbdinfo", &["--json", &server.uri("root")]);
    let export = &serde_json::from_str::<Value>(&info).unwrap()["exports"][0];
    for key in ["can_trim", "can_zero", "can_fast_zero"] {
        assert_eq!(export[key], false, "{key} of a read-only export");
    }
    assert_eq!(
        (&export["is_read_only"], &export["can_flush"]),
        (&true.into(), &true.into())
    );
}

#[test]
fn nbdinfo_lists_a_store() {
    let rig = Rig::new();
    rig.small_template("t", &["a", "b"]);
    let server = rig.serve(["--store"]);
    let list: Value =
        serde_json::from_str(&out("nbdinfo", &["--list", "--json", &server.uri("")])).unwrap();
    let names = list["exports"].as_array().unwrap().iter();
    let mut names: Vec<_> = names.map(|e| e["export-name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "b", "template:t"]);
    let info = out("nbdinfo", &["--json", &server.uri("template:t")]);
    assert!(info.contains("\"is_read_only\": true"), "{info}");
    let said = refused(tool("nbdinfo").arg(server.uri("nobody")));
    assert!(
        said.contains("No such file or directory for export: nobody"),
        "{said}"
    );
}

#[test]
fn nbdcopy_takes_a_whole_disk_out_and_in() {
    let (from, to) = (sparse(), Bare::new("64M", &["-b", "64"]));
    let (source, target) = (from.serve(&[]), to.serve(&[]));
    let file = from.path("copy");
    out(
        "nbdcopy",
        &["--connections=4", &source.uri("root"), text(&file)],
    );
    let copy = fs::read(&file).unwrap();
    let mut client = Client::open(source.socket(), "root", Style::Simple);
    let whole = [client.read(0, 32 << 20), client.read(32 << 20, 32 << 20)].concat();
    assert!(copy == whole);

    // Old bytes that the copy has to replace, holes included.
    let mut client = Client::open(target.socket(), "root", Style::Simple);
    client.write(30 << 20, &pattern(3 << 20, 8));
    out(
        "nbdcopy",
        &[
            "--flush",
            "--connections=4",
            text(&file),
            &target.uri("root"),
        ],
    );
    out(
        "nbdcopy",
        &["--flush", &target.uri("root"), text(&from.path("again"))],
    );
    assert!(fs::read(from.path("again")).unwrap() == copy);

    // From export to export, and what was sparse is sparse again.
    let fresh = Bare::new("64M", &["-b", "128"]);
    let server = fresh.serve(&[]);
    out(
        "nbdcopy",
        &["--flush", &source.uri("root"), &server.uri("root")],
    );
    let data =
        |rows: Vec<(u64, u64, u64)>| -> u64 { rows.iter().filter(|r| r.2 == 0).map(|r| r.1).sum() };
    assert!(
        data(map(&server.uri("root"))) <= 192 << 10,
        "{:?}",
        map(&server.uri("root"))
    );
    [source, target, server].into_iter().for_each(Server::stop);
    for bare in [&to, &fresh] {
        qemu_check(bare.image());
        qemu_compare("parallels", bare.image(), &file);
    }
    assert!(
        fs::metadata(fresh.image()).unwrap().len() <= 4 << 16,
        "no cluster for a hole"
    );
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let (from, to) = (sparse(), Bare::new("64M", &[]));
    let (source, target) = (from.serve(&[]), to.serve(&[]));
    let (a, b) = (source.uri("root"), target.uri("root"));
    out(
        "qemu-img",
        &["convert", "-n", "-W", "-f", "raw", "-O", "raw", &a, &b],
    );
    out("qemu-img", &["compare", "-f", "raw", "-F", "raw", &a, &b]);
    let rows: Value =
        serde_json::from_str(&out("qemu-img", &["map", "--output=json", &a])).unwrap();
    let rows = rows.as_array().unwrap();
    let data = rows.iter().filter(|r| r["data"] == true).count();
    assert!(
        data == 2 && rows.iter().all(|r| r["data"] == true || r["zero"] == true),
        "{rows:?}"
    );
    let qcow2 = from.path("out.qcow2");
    out(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &a, text(&qcow2)],
    );
    out(
        "qemu-img",
        &["compare", "-f", "qcow2", "-F", "raw", text(&qcow2), &b],
    );
    source.stop();
    target.stop();
    assert_acceptable(to.image(), false);
}

#[test]
fn qemu_io_speaks_extended_headers() {
    let bare = sparse();
    let server = bare.serve(&[]);
    let mut qemu = tool("qemu-io");
    qemu.args([
        "-f",
        "raw",
        "-T",
        "nbd_*",
        "-c",
        "write -P 7 5M 70k",
        "-c",
        "read -P 7 5M 70k",
    ]);
    let done = run(qemu.arg(server.uri("root")));
    let trace = String::from_utf8_lossy(&done.stderr);
    let extended = "option reply 11 (extended headers), type 1 (ack)";
    assert!(trace.contains(extended), "{trace}");
    on_export(
        &server.uri("root"),
        &[
            "write -P 0x5a 3M 300k",
            "write -f -P 0x5b 5000 512",
            "read -P 0x5a 3M 300k",
            "read -P 0x5b 5000 512",
            "write -z -u 1M 64k",
            "write -z 3M 1k",
            "write -z -f 3500k 4k",
            "discard 40M 1M",
            "flush",
            "map",
            "read -P 0 1M 64k",
            "read -P 0 3M 1k",
            "read -P 0x5a 3073k 299k",
            "read -P 0 40M 64k",
            "write -P 0x11 0 32M",
            "read -P 0x11 0 32M",
            "aio_write -P 0x12 8M 1M",
            "aio_write -P 0x13 9M 1M",
            "aio_flush",
            "read -P 0x12 8M 1M",
            "read -P 0x13 9M 1M",
        ],
    );
    let (ok, said) = qemu_io("raw", false, server.uri("root").as_ref(), &["read 64M 512"]);
    assert!(!ok, "{said}");
    server.stop();
    qemu_check(bare.image());
}

#[test]
fn fio_verifies_what_four_connections_write() {
    let bare = Bare::new("128M", &["-b", "128"]);
    let server = bare.serve(&[]);
    let fio = |rw: &str, verify_only: &str| {
        run(tool("fio").current_dir(bare.path("")).args([
            "--name=job",
            "--ioengine=nbd",
            &format!("--uri={}", server.uri("root")),
            "--numjobs=4",
            "--size=24M",
            "--offset_increment=32M",
            "--bsrange=4k-128k",
            "--bs_unaligned=0",
            "--iodepth=16",
            &format!("--rw={rw}"),
            "--fsync=64",
            "--randseed=7",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            verify_only,
        ]))
    };
    fio("randwrite", "--do_verify=1");
    fio("randtrimwrite", "--do_verify=0");
    server.stop();
    qemu_check(bare.image());
    assert_acceptable(bare.image(), false);
}

#[test]
fn the_nbd_crates_client() {
    let bare = Bare::new("16M", &["-b", "128"]);
    let mut command = ploop();
    command
        .arg("serve")
        .arg(bare.image())
        .args(["--listen", "127.0.0.1:0", "--socket"]);
    let server = Listening::start(command.arg(bare.path("sock")), 2);
    fn session(mut socket: impl Read + Write, at: u64) {
        let export = nbd::client::handshake(&mut socket, b"root").unwrap();
        assert_eq!((export.size, export.readonly), (16 << 20, false));
        assert!(export.send_flush && export.send_trim);
        let data = pattern(300_000, at);
        let mut client = nbd::client::NbdClient::new(&mut socket, &export);
        let mut back = vec![0; data.len()];
        client.seek(SeekFrom::Start(at)).unwrap();
        client.write_all(&data).unwrap();
        client.flush().unwrap();
        client.seek(SeekFrom::Start(at)).unwrap();
        client.read_exact(&mut back).unwrap();
        assert!(back == data);
        client.seek(SeekFrom::Start(at)).unwrap();
        client.trim(65536).unwrap();
        client.read_exact(&mut back).unwrap();
        assert!(
            back[..65536]
                .iter()
                .zip(&data)
                .all(|(b, d)| b == d || *b == 0)
        );
        assert!(
            back[65536..] == data[65536..],
            "no byte behind a trim changes"
        );
    }
    session(UnixStream::connect(bare.path("sock")).unwrap(), 0);
    session(TcpStream::connect(&server.on[1]).unwrap(), 1 << 20);
    server.stop();
    qemu_check(bare.image());
}

#[test]
fn nbdkit_copies_in_and_out() {
    let bare = Bare::new("32M", &[]);
    let server = bare.serve(&[]);
    let script = "nbdcopy \"$uri\" \"$to\" && nbdcopy \"$to\" - | cmp - \"$raw\"";
    fs::write(bare.path("raw"), pattern(32 << 20, 5)).unwrap();
    let mut nbdkit = tool("nbdkit");
    nbdkit
        .args(["-U", "-", "file"])
        .arg(bare.path("raw"))
        .args(["--run", script]);
    run(nbdkit
        .env("to", server.uri("root"))
        .env("raw", bare.path("raw")));
    server.stop();
    qemu_compare("parallels", bare.image(), &bare.path("raw"));
}

/// The kernel's fsync, through a mounted file, is a FLUSH here: entries of new clusters are in the
/// file only after one, so that after SIGKILL the data can be there only if it came.
#[test]
fn fsync_reaches_the_disk() {
    let bare = Bare::new("64M", &["-b", "128"]);
    let server = bare.serve(&[]);
    let data = pattern(1 << 20, 6);
    let attached = NbdFile::attach(&server.uri("root"));
    let file = fs::OpenOptions::new()
        .write(true)
        .open(attached.path())
        .unwrap();
    file.write_all_at(&data, 5 << 20).unwrap();
    file.sync_all().unwrap();
    // Dropped, it is killed.
    drop(server);
    drop((file, attached));
    assert_eq!(bare.mark(), DIRTY);
    reads_after_crash(&bare, 5 << 20, &data);
}

/// The image opens without help, holds `data` at `at`, and the next clean stop is clean for QEMU.
fn reads_after_crash(bare: &Bare, at: u64, data: &[u8]) {
    let server = bare.serve(&[]);
    let mut client = Client::open(server.socket(), "root", Style::Structured);
    assert!(client.read(at, data.len() as u64) == data);
    server.stop();
    qemu_check(bare.image());
    assert_acceptable(bare.image(), false);
}

#[test]
fn libnbds_asynchronous_requests_find_their_own_bytes() {
    let bare = Bare::new("64M", &["-b", "128"]);
    let server = bare.serve(&[]);
    nbd_python(
        r"
h.connect_uri(uri)
block = lambda i: bytes([i % 251 + 1, i // 251]) * 2048
writes = []
for i in range(500):
    b = nbd.Buffer.from_bytearray(bytearray(block(i)))
    writes.append((b, h.aio_pwrite(b, (1 << 20) + i * 4096)))
while h.aio_in_flight():
    h.poll(-1)
for b, cookie in writes:
    assert h.aio_command_completed(cookie)
reads = []
for i in range(500):
    b = nbd.Buffer(4096)
    reads.append((i, b, h.aio_pread(b, (1 << 20) + i * 4096)))
while h.aio_in_flight():
    h.poll(-1)
for i, b, cookie in reads:
    assert h.aio_command_completed(cookie)
    assert bytes(b.to_bytearray()) == block(i), i
h.shutdown()
",
        &[&server.uri("root")],
    );
    server.stop();
    assert_acceptable(bare.image(), false);
}
