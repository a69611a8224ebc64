//! Clients that others wrote: libnbd's and QEMU's.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::sync::Arc;

use common::{CLUSTER, FileDevice, Running, pattern, text, tool, try_tool};
use nbd_server::Config;
use nbd_server::export::Single;
use ploop::device::Device;

const LIBNBD: &str = "libnbd-bin";
const PYTHON: &str = "python3-libnbd";
const QEMU: &str = "qemu-utils";
const SIZE: u64 = 64 << 20;

fn serve(device: Arc<FileDevice>) -> Running {
    let single = Single::new(device, "disk", "a disk of the test").unwrap();
    Running::start(Arc::new(single), Config::default())
}

/// A device with some data: two clusters at 1 MiB, one byte range at 40 MiB.
fn sparse() -> Arc<FileDevice> {
    let device = FileDevice::temporary(SIZE);
    device
        .write(1 << 20, &pattern(2 * CLUSTER as usize, 3))
        .unwrap();
    device.write(40 << 20, &pattern(1000, 4)).unwrap();
    device
}

fn content(device: &FileDevice) -> Vec<u8> {
    let mut all = vec![0; device.size() as usize];
    device.read(0, &mut all).unwrap();
    all
}

#[test]
fn nbdinfo_sees_what_the_export_can_do() {
    let server = serve(sparse());
    let out = tool("nbdinfo", LIBNBD, &["--json", &server.uri("disk")]);
    for line in [
        "\"export-name\": \"disk\"",
        "\"description\": \"a disk of the test\"",
        "\"structured\": true",
        "\"export-size\": 67108864",
        "\"is_read_only\": false",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 65536",
        "\"block_size_maximum\": 33554432",
        "\"base:allocation\"",
    ] {
        assert!(out.contains(line), "{line} is missing in\n{out}");
    }
    let list = tool("nbdinfo", LIBNBD, &["--list", &server.uri("")]);
    assert!(list.contains("export=\"disk\""), "{list}");
    let (ok, _, err) = try_tool("nbdinfo", LIBNBD, &[&server.uri("other")]);
    assert!(!ok && err.contains("for export: other"), "{err}");
}

#[test]
fn nbdinfo_maps_holes_and_data() {
    let server = serve(sparse());
    let map = tool("nbdinfo", LIBNBD, &["--map", &server.uri("disk")]);
    let rows: Vec<Vec<&str>> = map
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    let rows: Vec<(u64, u64, &str)> = rows
        .iter()
        .map(|r| (r[0].parse().unwrap(), r[1].parse().unwrap(), r[2]))
        .collect();
    let data = 2 * CLUSTER;
    let expect = [
        (0, 1 << 20, "3"),
        (1 << 20, data, "0"),
        ((1 << 20) + data, (39 << 20) - data, "3"),
        (40 << 20, CLUSTER, "0"),
        ((40 << 20) + CLUSTER, (24 << 20) - CLUSTER, "3"),
    ];
    assert_eq!(rows, expect);
}

#[test]
fn a_read_only_export_is_shown_as_one() {
    let server = serve(FileDevice::read_only(SIZE));
    let out = tool("nbdinfo", LIBNBD, &["--json", &server.uri("disk")]);
    assert!(out.contains("\"is_read_only\": true"), "{out}");
    assert!(out.contains("\"can_trim\": false"), "{out}");
}

#[test]
fn nbdcopy_out_and_in_over_several_connections() {
    let device = sparse();
    let server = serve(device.clone());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("copy");
    tool(
        "nbdcopy",
        LIBNBD,
        &["--connections=4", &server.uri("disk"), text(&file)],
    );
    assert!(fs::read(&file).unwrap() == content(&device));

    let other = FileDevice::temporary(SIZE);
    // Old bytes that the copy has to replace, holes included.
    other.write(30 << 20, &pattern(3 << 20, 8)).unwrap();
    let target = serve(other.clone());
    tool(
        "nbdcopy",
        LIBNBD,
        &["--flush", &server.uri("disk"), &target.uri("disk")],
    );
    assert!(content(&other) == content(&device));
}

#[test]
fn qemu_img_reads_compares_and_converts() {
    let device = sparse();
    let server = serve(device.clone());
    let uri = server.uri("disk");
    let info = tool("qemu-img", QEMU, &["info", "--output=json", &uri]);
    assert!(info.contains("67108864"), "{info}");
    let map = tool("qemu-img", QEMU, &["map", "--output=json", &uri]);
    assert_eq!(map.matches("\"data\": true").count(), 2, "{map}");
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    tool(
        "qemu-img",
        QEMU,
        &["convert", "-O", "raw", &uri, text(&raw)],
    );
    assert!(fs::read(&raw).unwrap() == content(&device));

    let other = FileDevice::temporary(SIZE);
    other.write(0, &pattern(5 << 20, 1)).unwrap();
    let target = serve(other.clone());
    let raw = text(&raw);
    tool(
        "qemu-img",
        QEMU,
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            raw,
            &target.uri("disk"),
        ],
    );
    assert!(content(&other) == content(&device));
    tool(
        "qemu-img",
        QEMU,
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            &uri,
            &target.uri("disk"),
        ],
    );
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    let device = sparse();
    let server = serve(device.clone());
    let commands = [
        "write -P 0x5a 3M 300k",
        "write -f -P 0x5b 5000 512",
        "read -P 0x5a 3M 300k",
        "read -P 0x5b 5000 512",
        "write -z -u 1M 64k",
        "write -z 3M 1k",
        "discard 40M 1M",
        "flush",
        "read -P 0 1M 64k",
        "read -P 0 3M 1k",
        "read -P 0x5a 3073k 299k",
        "read -P 0 40M 64k",
        "write -P 0x11 0 32M",
        "read -P 0x11 0 32M",
    ];
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend(["-c", command]);
    }
    let uri = server.uri("disk");
    args.push(&uri);
    let out = tool("qemu-io", QEMU, &args);
    assert!(!out.contains("Pattern verification failed"), "{out}");
    assert!(content(&device)[..32 << 20].iter().all(|b| *b == 0x11));
}

/// libnbd's own checks are switched off, so that the server sees what a careless client sends.
const SCRIPT: &str = r#"
import errno, nbd, sys

h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
size = h.get_size()

def refused(number, call, *args, **kw):
    try:
        call(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == number, (e, call, args, kw)
    else:
        raise AssertionError(("not refused", call, args, kw))

h.pwrite(b"x" * 5000, 7)
assert h.pread(5000, 7) == b"x" * 5000
assert h.pread(5000, 7, nbd.CMD_FLAG_DF) == b"x" * 5000
refused(errno.ENOSPC, h.pwrite, b"y" * 1024, size - 512)
refused(errno.ENOSPC, h.zero, 1024, size - 512)
refused(errno.EINVAL, h.pread, 1024, size - 512)
refused(errno.EINVAL, h.trim, 1024, size - 512)
refused(errno.EINVAL, h.pread, 512, 0, 1 << 9)
refused(errno.EINVAL, h.pwrite, b"z" * 512, 0, nbd.CMD_FLAG_REQ_ONE)
refused(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_DF)
refused(errno.EOVERFLOW, h.pread, (32 << 20) + 512, 0)
refused(errno.EINVAL, h.pwrite, b"w" * ((32 << 20) + 512), 0)
refused(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(5000, 7) == b"x" * 5000, "refusals change nothing and the session goes on"
h.zero(1 << 20, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.cache(size, 0)
h.flush()
extents = []
h.block_status(size, 0, lambda ctx, at, entries, err: extents.append((ctx, at, entries)))
assert extents == [("base:allocation", 0, [1 << 20, 0, size - (1 << 20), 3])], extents
one = []
h.block_status(size - 512, 512, lambda *a: one.append(a[2]), nbd.CMD_FLAG_REQ_ONE)
assert one == [[(1 << 20) - 512, 0]], one

# Many requests in flight, answered each with its own bytes.
bufs = []
cookies = []
for i in range(500):
    b = nbd.Buffer.from_bytearray(bytearray([i % 251 + 1]) * 4096)
    cookies.append(h.aio_pwrite(b, (1 << 20) + i * 4096))
while h.aio_in_flight():
    h.poll(-1)
for cookie in cookies:
    assert h.aio_command_completed(cookie)
for i in range(500):
    b = nbd.Buffer(4096)
    bufs.append((i, b, h.aio_pread(b, (1 << 20) + i * 4096)))
while h.aio_in_flight():
    h.poll(-1)
for i, b, cookie in bufs:
    assert h.aio_command_completed(cookie)
    assert bytes(b.to_bytearray()) == bytes([i % 251 + 1]) * 4096, i
h.shutdown()
"#;

#[test]
fn libnbd_without_its_own_checks() {
    let server = serve(FileDevice::temporary(SIZE));
    tool(
        "/usr/bin/python3",
        PYTHON,
        &["-c", SCRIPT, &server.uri("disk")],
    );
}

#[test]
fn libnbd_without_structured_replies() {
    let device = sparse();
    let server = serve(device.clone());
    let script = "import nbd, sys\n\
         h = nbd.NBD()\n\
         h.set_request_structured_replies(False)\n\
         h.connect_uri(sys.argv[1])\n\
         assert not h.get_structured_replies_negotiated()\n\
         data = bytes(h.pread(32 << 20, 0)) + bytes(h.pread(32 << 20, 32 << 20))\n\
         open(sys.argv[2], 'wb').write(data)\n";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("out");
    tool(
        "/usr/bin/python3",
        PYTHON,
        &["-c", script, &server.uri("disk"), text(&file)],
    );
    assert!(fs::read(&file).unwrap() == content(&device));
}
