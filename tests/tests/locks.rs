//! Who may have what open: our disks beside each other, beside QEMU and beside OpenVZ's tools.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Stdio};

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop_tests::mount::wait_for;
use ploop_tests::store::{Rig, expect_refusal, on_export, qemu_io};
use ploop_tests::tools::tool;

const LOCKED: &str = "lock";

/// QEMU must be refused because of a lock.
fn qemu_refused(image: &Path, read_only: bool) {
    let (ok, said) = qemu_io("parallels", read_only, image.as_os_str(), &["read 0 512"]);
    assert!(!ok && said.contains(LOCKED), "{}: {said}", image.display());
}

fn qemu_reads(image: &Path) {
    let (ok, said) = qemu_io("parallels", true, image.as_os_str(), &["read 0 512"]);
    assert!(ok, "{}: {said}", image.display());
}

/// QEMU may write what nobody has open; leaves the file as it was.
fn qemu_writes(image: &Path) {
    let was = fs::read(image).unwrap();
    let (ok, said) = qemu_io("parallels", false, image.as_os_str(), &["read 0 512"]);
    assert!(ok, "{}: {said}", image.display());
    fs::write(image, was).unwrap();
}

/// A process that has a file open until it is told to end.
struct Holder(Child);

impl Holder {
    /// QEMU, with `image` open read-write.
    fn qemu(image: &Path) -> Holder {
        let mut command = tool("qemu-io");
        command
            .args(["-f", "parallels"])
            .arg(image)
            .stdin(Stdio::piped());
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers when it has opened the image.
        writeln!(child.stdin.as_mut().unwrap(), "read 0 512").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.contains("read 512/512"), "{line}");
        Holder(child)
    }

    /// A program with a POSIX read lock on `count` bytes from `first`, as OpenVZ's tools take.
    fn posix(image: &Path, first: u64, count: u64) -> Holder {
        let script = "import fcntl, sys\n\
                      f = open(sys.argv[1], 'rb')\n\
                      first, count = int(sys.argv[2]), int(sys.argv[3])\n\
                      fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB, count, first)\n\
                      print('held', flush=True)\n\
                      sys.stdin.read()\n";
        let mut command = tool("python3");
        command.args(["-c", script]).arg(image);
        command.args([first.to_string(), count.to_string()]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "held\n");
        Holder(child)
    }

    /// Lets it end in its own way.
    fn release(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // After `release` there is nothing left to kill.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn open(opener: &Opener, rig: &Rig, name: &str, write: bool) -> Disk {
    let path = rig.root().join("containers").join(name);
    let source = Source::parse(opener.store().as_ref(), path.to_str().unwrap()).unwrap();
    let allow = vec![rig.root().to_path_buf()];
    opener
        .open(
            &source,
            &OpenOptions {
                write,
                allow,
                ..OpenOptions::default()
            },
        )
        .unwrap()
}

/// Goal: a layer stays locked while any disk in the process stands on it. Method: POSIX locks would
/// all vanish when the first of two disks is closed; QEMU says whether ours did.
#[test]
fn two_disks_in_one_process_keep_the_template_locked_until_the_last_is_closed() {
    let rig = Rig::new();
    rig.small_template("mini", &["a", "b"]);
    let layer = rig.layer();
    qemu_writes(&layer);
    // Once with what they share in one opener, once with nothing shared.
    for shared in [true, false] {
        let (one, two) = (Opener::host(), Opener::host());
        let a = open(&one, &rig, "a", true);
        let b = open(if shared { &one } else { &two }, &rig, "b", true);
        qemu_refused(&layer, false);
        qemu_reads(&layer);
        a.close().unwrap();
        drop(a);
        qemu_refused(&layer, false);
        qemu_reads(&layer);
        qemu_refused(&rig.top("b"), false);
        qemu_writes(&rig.top("a"));
        // A reader that comes and goes takes nobody's locks with it.
        fs::read(&layer).unwrap();
        drop(open(&Opener::host(), &rig, "a", false));
        qemu_refused(&layer, false);
        let mut buf = [0; 512];
        b.read(PARTITION_TABLE, &mut buf).unwrap();
        assert_eq!(&buf[..8], b"EFI PART");
        b.close().unwrap();
        drop((b, one, two));
        qemu_writes(&layer);
    }
}

/// Where the GPT's header is.
const PARTITION_TABLE: u64 = 512;

#[test]
fn two_servers_keep_the_template_locked_until_the_last_has_ended() {
    let rig = Rig::new();
    rig.small_template("mini", &["a", "b"]);
    let layer = rig.layer();
    let (a, b) = (rig.serve(["a"]), rig.serve(["b"]));
    on_export(&a.uri("a"), &["write -P 1 30M 4k", "flush"]);
    on_export(&b.uri("b"), &["read -P 0 30M 4k"]);
    qemu_refused(&layer, false);
    qemu_reads(&layer);
    for name in ["a", "b"] {
        qemu_refused(&rig.top(name), false);
        qemu_refused(&rig.top(name), true);
    }
    a.stop();
    qemu_refused(&layer, false);
    qemu_reads(&layer);
    qemu_reads(&rig.top("a"));
    qemu_refused(&rig.top("b"), true);
    // One that dies without a word holds nothing.
    drop(b);
    qemu_writes(&layer);
}

#[test]
fn a_disk_that_qemu_has_open_is_refused_and_the_file_named() {
    let rig = Rig::new();
    rig.small_template("mini", &["a"]);
    let layer = rig.layer();
    for image in [rig.top("a"), layer] {
        let holder = Holder::qemu(&image);
        let file = image.file_name().unwrap().to_str().unwrap();
        let socket = rig.arg("sock");
        let serve = ["serve", "a", "--socket", &socket];
        rig.refused(
            5,
            serve,
            &[file, "another program has the image open", "lslocks"],
        );
        assert!(!Path::new(&socket).exists());
        holder.release();
        rig.serve(["a"]).stop();
    }
}

#[test]
fn openvz_locks_on_the_base_are_respected() {
    let rig = Rig::new();
    rig.small_template("mini", &["a"]);
    let layer = rig.layer();
    for (first, says) in [(200, "another program"), (300, "a long operation")] {
        let holder = Holder::posix(&layer, first, 5);
        let socket = rig.arg("sock");
        let serve = ["serve", "a", "--socket", &socket];
        rig.refused(5, serve, &["image.hds", says, "lslocks"]);
        rig.refused(
            5,
            ["convert", "a", "out.raw", "--to", "raw"],
            &["image.hds", says],
        );
        assert!(!rig.path("out.raw").exists());
        holder.release();
        rig.serve(["a"]).stop();
    }
    // And the other way round: what OpenVZ's tool looks for is there, as long as we write.
    let top = rig.top("a");
    let server = rig.serve(["a"]);
    assert!(write_lock_would_wait(&top, 200, 5));
    assert!(!write_lock_would_wait(&top, 300, 5));
    server.stop();
    assert!(!write_lock_would_wait(&top, 200, 5));
}

fn write_lock_would_wait(image: &Path, first: u64, count: u64) -> bool {
    let script = "import fcntl, sys\n\
                  f = open(sys.argv[1], 'r+b')\n\
                  try:\n    \
                      fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, *map(int, sys.argv[3:1:-1]))\n\
                  except BlockingIOError:\n    \
                      sys.exit(9)\n";
    let mut command = tool("python3");
    command
        .args(["-c", script])
        .arg(image)
        .args([first.to_string(), count.to_string()]);
    match command.status().unwrap().code() {
        Some(0) => false,
        Some(9) => true,
        other => panic!("python3: {other:?}"),
    }
}

#[test]
fn a_served_disk_has_one_server_and_cannot_be_removed() {
    let rig = Rig::new();
    rig.small_template("mini", &["a", "b"]);
    let server = rig.serve(["a"]);
    on_export(&server.uri("a"), &["write -P 9 30M 4k", "flush"]);
    let before = rig.listing();
    let pid = format!("process {}", server.pid());
    let socket = rig.arg("second");
    let serve = ["serve", "a", "--socket", &socket];
    rig.refused(
        5,
        serve,
        &["containers/a", "in use", &pid, "Stop that process"],
    );
    // By its directory it is the same disk.
    let dir = rig.root().join("containers/a");
    let serve = ["serve", dir.to_str().unwrap(), "--socket", &socket];
    rig.refused(5, serve, &["containers/a", &pid]);
    rig.refused(5, ["rm", "a"], &["containers/a", &pid, "Stop that process"]);
    rig.refused(
        5,
        ["template", "rm", "mini"],
        &["mini", "2 containers", "Remove them first"],
    );
    assert_eq!(rig.listing(), before);
    // The others are not kept.
    rig.run(["rm", "b"]);
    on_export(&server.uri("a"), &["read -P 9 30M 4k"]);
    server.stop();
    rig.run(["rm", "a"]);
    rig.run(["template", "rm", "mini"]);
    let left: Vec<_> = fs::read_dir(rig.root().join("layers")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A store is served by name: two servers of it, and one for a single disk, each refuse what
/// another one of them has open, and give it back when its last client has left.
#[test]
fn two_servers_of_one_store_share_its_disks_one_at_a_time() {
    let rig = Rig::new();
    rig.small_template("mini", &["a", "b"]);
    let (one, two) = (rig.serve(["--store"]), rig.serve(["--store"]));
    let client = Holder::qemu_on(&one.uri("a"));
    let (ok, said) = qemu_io("raw", false, two.uri("a").as_ref(), &["read 0 512"]);
    assert!(
        !ok && said.contains(&format!("process {}", one.pid())),
        "{said}"
    );
    on_export(&two.uri("b"), &["write -P 2 30M 4k", "flush"]);
    let mut rm = rig.ploop();
    expect_refusal(
        rm.args(["rm", "a"]),
        5,
        &["containers/a", "in use by unix pid", "--force"],
    );
    client.release();
    // The server closes the disk when it sees that the client is gone.
    wait_for("the first server to close the disk", || {
        qemu_io(
            "raw",
            false,
            two.uri("a").as_ref(),
            &["write -P 3 30M 4k", "flush"],
        )
        .0
    });
    let (ok, said) = qemu_io(
        "raw",
        true,
        two.uri("template:mini").as_ref(),
        &["read -P 0 30M 4k"],
    );
    assert!(ok, "{said}");
    one.stop();
    two.stop();
}

impl Holder {
    /// A client of an export, connected until it is told to end.
    fn qemu_on(uri: &str) -> Holder {
        let mut command = tool("qemu-io");
        command
            .args(["-f", "raw", uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        writeln!(child.stdin.as_mut().unwrap(), "read 0 512").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.contains("read 512/512"), "{line}");
        Holder(child)
    }
}
