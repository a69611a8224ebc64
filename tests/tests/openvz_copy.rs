//! OpenVZ's `ploop copy`: what its senders send becomes a container, or nothing; what we send is what
//! its receiver takes.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use ploop::Kind;
use ploop::device::Device as _;
use ploop::disk::Disk;
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, Calls, Fault, RecordingStore};
use ploop::store::{Access, Store};
use ploop_tests::openvz::{
    COMMAND, DEVICE, INIT_QCOW2, MOUNT, SYNC, Stream, UMOUNT, as_file, codes, received, recorded,
};
use ploop_tests::store::{Rig, on_export};
use ploop_tests::stream::{container, everything, grown, host, on, shows, write};
use snapshots::Root;
use snapshots::place::Place;
use snapshots::stream::openvz;

const CLUSTER: u64 = 64 * 512;
const SIZE: u64 = 4 * CLUSTER;

/// A small disk as version 9 sends it: two clusters, one of them twice, zeros over another.
fn small(md5: bool) -> (Stream, Vec<u8>) {
    let mut shown = vec![0; SIZE as usize];
    shown[..512].fill(2);
    shown[3 * CLUSTER as usize + 512..][..1024].fill(3);
    let mut s = Stream::new(md5);
    s.init(64, SIZE / 512);
    s.packet(DEVICE, 0, &[1; 1024]);
    s.packet(DEVICE, CLUSTER, &[9; 512]);
    s.packet(DEVICE, 3 * CLUSTER + 512, &[3; 1024]);
    s.command(SYNC);
    s.packet(DEVICE, 0, &[2; 512]);
    s.packet(DEVICE, 512, &[0; 512]);
    s.packet(DEVICE, CLUSTER, &[0; 512]);
    s.command(SYNC);
    s.command(UMOUNT);
    s.finish();
    (s, shown)
}

/// What is refused leaves nothing; gives the error and the answers.
fn refused(stream: &[u8], why: &str) -> (ploop::Error, Vec<i32>) {
    let (store, root) = host();
    let before = everything(&store);
    let (done, replies) = received(&root, "dst", stream);
    let e = done.err().unwrap_or_else(|| panic!("{why}: taken"));
    let left = everything(&store);
    assert!(left == before, "{why}: {e}: left: {:?}", left.keys());
    (e, codes(&replies))
}

#[test]
fn a_stream_of_version_9_becomes_a_container_of_one_image() {
    for md5 in [false, true] {
        let (stream, shown) = small(md5);
        let (store, root) = host();
        let (done, replies) = received(&root, "dst", &stream.bytes);
        let done = done.unwrap();
        assert!(shows(&root, "dst", None) == shown);
        let mut wanted = vec![0; stream.answered];
        wanted[0] = if md5 { -3 } else { -2 };
        assert_eq!(codes(&replies), wanted);
        assert_eq!((done.size, done.md5, done.file), (SIZE, md5, false));
        assert_eq!(done.bytes, stream.bytes.len() as u64);
        assert!(store.list("/store/tmp".as_ref()).unwrap().is_empty());
        let place = Place::container(&root, "dst").unwrap();
        let d = place.descriptor().unwrap();
        let file = place.file_of(d.image(d.top).unwrap()).unwrap();
        let file = store.open(&file, Access::Read).unwrap();
        let header = read_header(file.as_ref()).unwrap().0;
        assert_eq!(header.version, Version::V2);
        assert_eq!((header.cluster_sectors, header.size()), (64, SIZE));
        assert_eq!((d.images.len(), header.dirty()), (1, false));
        // A disk like any other.
        write(&root, "dst", 5, &[7; 3]);
        assert_eq!(shows(&root, "dst", None)[5], 7);
    }
}

#[test]
fn a_device_of_no_whole_clusters_is_shown_as_it_was() {
    let mut s = Stream::new(true);
    s.init(64, 70);
    s.packet(DEVICE, 69 * 512, &[8; 512]);
    s.finish();
    let (_, root) = host();
    let (done, _) = received(&root, "dst", &s.bytes);
    assert_eq!(done.unwrap().size, 70 * 512);
    let shown = shows(&root, "dst", None);
    assert_eq!((shown.len(), shown[69 * 512]), (70 * 512, 8));
}

#[test]
fn changed_blocks_are_dropped_and_counted() {
    let mut s = Stream::new(true);
    s.init(64, SIZE / 512);
    s.packet(4, 0, &[1; 80]);
    s.packet(4, 4096, &[1; 80]);
    s.command(UMOUNT);
    s.finish();
    let (_, root) = host();
    let (done, replies) = received(&root, "dst", &s.bytes);
    assert_eq!(done.unwrap().cbt_dropped, 2);
    assert_eq!(codes(&replies), [-3, 0, 0, 0, 0, 0]);
}

/// Goal: no damaged byte is believed. Method: each byte of a stream with MD5s, three ways.
#[test]
fn a_stream_damaged_anywhere_is_refused_or_shows_the_same() {
    let (good, shown) = small(true);
    let mut refusals = 0;
    for at in 0..good.bytes.len() {
        // The inside of a payload is all alike; a disk of terabytes is one, and nothing for memory.
        if at % 97 != 0 && good.is_inside(at) || good.is_size(at) {
            continue;
        }
        for flip in [0x01, 0x80, 0xFF] {
            let mut bytes = good.bytes.clone();
            bytes[at] ^= flip;
            let (store, root) = host();
            let before = everything(&store);
            match received(&root, "dst", &bytes).0 {
                Ok(done) => {
                    // A header has no checksum: of a position, or of features, another one may do.
                    let same = done.size == SIZE && shows(&root, "dst", None) == shown;
                    assert!(same || good.is_head(at), "byte {at} ^ {flip:#x}");
                }
                Err(_) => {
                    refusals += 1;
                    assert!(everything(&store) == before, "byte {at} ^ {flip:#x}");
                }
            }
        }
    }
    assert!(refusals > 500, "{refusals}");
}

#[test]
fn a_stream_cut_anywhere_leaves_nothing() {
    let (good, _) = small(true);
    for at in 0..good.bytes.len() {
        if at % 61 == 0 || !good.is_inside(at) {
            let (e, replies) = refused(&good.bytes[..at], "a cut stream");
            assert_eq!(e.kind(), Kind::Corrupt, "{e}");
            assert!(replies.iter().all(|r| *r <= 0), "{at}: {replies:?}");
        }
    }
    // Behind the end nothing is read.
    let (_, root) = host();
    let more = [&good.bytes[..], b"and more"].concat();
    received(&root, "dst", &more).0.unwrap();
}

type Build = fn(&mut Stream);

#[test]
fn lies_are_refused_by_name_and_answered() {
    let lies: &[(&str, i32, Build)] = &[
        ("up to byte", 13, |s| s.init(63, 630)),
        ("up to byte", 13, |s| s.init(131_072 * 2, 1 << 30)),
        ("up to byte", 13, |s| s.init(64, 0)),
        ("up to byte", 13, |s| s.init(64, u64::MAX)),
        ("up to byte", 13, |s| s.init(64, u64::MAX / 512)),
        ("up to byte", 13, |s| s.init(64, 1 << 54)),
        ("second image", 13, |s| {
            s.init(64, 64);
            s.init(64, 64);
        }),
        ("a device of 32768", 13, |s| {
            s.init(64, 64);
            s.packet(DEVICE, CLUSTER - 512, &[1; 1024]);
        }),
        ("a device of 32768", 13, |s| {
            s.init(64, 64);
            s.packet(DEVICE, u64::MAX - 511, &[1; 512]);
        }),
        ("a device of 32768", 13, |s| {
            s.init(64, 64);
            s.packet(DEVICE, 0, &[1; 100]);
        }),
        ("not there", 13, |s| s.packet(DEVICE, 0, &[1; 512])),
        ("not there", 13, |s| {
            s.init(64, 64);
            s.command(UMOUNT);
            s.packet(DEVICE, 0, &[1; 512]);
        }),
        ("detach of no image", 13, |s| s.command(UMOUNT)),
        ("changed blocks of no image", 13, |s| {
            s.packet(4, 0, &[1; 80])
        }),
        ("beside a device", 13, |s| {
            s.init(64, 64);
            s.packet(0, 0, &[1; 512]);
        }),
        ("less than 4", 13, |s| s.packet(COMMAND, 0, &[1; 3])),
        ("qcow2", 38, |s| {
            let mut payload = vec![0; 64];
            payload[0] = INIT_QCOW2 as u8;
            s.packet(COMMAND, 64, &payload);
        }),
        ("no sender sends", 38, |s| s.command(MOUNT)),
        ("no sender sends", 38, |s| s.command(77)),
        ("type 9", 38, |s| s.packet(9, 0, &[1; 512])),
        ("without data", 13, |s| s.packet(DEVICE, 0, &[])),
        ("before anything", 13, |s| s.finish()),
        ("handshake in the middle", 13, |s| {
            s.packet(COMMAND, 3, &SYNC.to_le_bytes());
        }),
        ("another version", 13, |s| {
            s.bytes.extend(0x4CC0_AC3Du32.to_le_bytes())
        }),
        ("where a packet", 13, |s| s.bytes.extend([0; 24])),
        ("are the most", 13, |s| {
            let mut head = Stream::empty();
            head.packet(DEVICE, 0, &[]);
            head.bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
            s.bytes.extend(head.bytes);
        }),
        ("not the file of a ploop image", 38, |s| {
            s.packet(0, 0, &[1; 4096])
        }),
    ];
    for (says, code, build) in lies {
        let mut s = Stream::new(false);
        build(&mut s);
        // Of a lie nothing that comes later makes a truth.
        s.bytes.extend([0; 64]);
        let (e, replies) = refused(&s.bytes, says);
        assert!(e.to_string().contains(says), "{says:?} is not in: {e}");
        assert_eq!(replies.last(), Some(code), "{says}: {replies:?}");
    }
    let (good, _) = small(true);
    let (_, root) = host();
    container(&root, "dst", Version::V2, 64, SIZE);
    let (done, replies) = received(&root, "dst", &good.bytes);
    assert_eq!(done.unwrap_err().kind(), Kind::Exists);
    assert!(replies.is_empty());
}

/// The file of an image with some data.
fn image(version: Version) -> (Vec<u8>, Vec<u8>) {
    let store = MemoryStore::new();
    let header = Header::new(version, 64, SIZE / 512).unwrap();
    let file = create(&store, "/i".as_ref(), &header, 0o600).unwrap();
    let disk = Disk::writable(None, Top::open(file).unwrap(), None).unwrap();
    disk.write(2 * CLUSTER + 100, &[5; 9000]).unwrap();
    disk.write(0, &[6; 512]).unwrap();
    let mut shown = vec![0; SIZE as usize];
    disk.read(0, &mut shown).unwrap();
    disk.close().unwrap();
    let file = store.open("/i".as_ref(), Access::Read).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    (bytes, shown)
}

#[test]
fn the_file_of_an_image_becomes_a_container_when_it_is_sound() {
    for version in [Version::V1, Version::V2] {
        let (file, shown) = image(version);
        // Of version 8, before the handshake and with MD5s; answered, and not.
        for (md5, kind) in [(false, 0), (true, 0), (true, 2)] {
            let mut s = if md5 {
                Stream::new(true)
            } else {
                Stream::empty()
            };
            as_file(&file, |pos, bytes| s.packet(kind, pos, bytes));
            s.command(SYNC);
            s.finish();
            let (_, root) = host();
            let (done, replies) = received(&root, "dst", &s.bytes);
            assert!(done.unwrap().file);
            assert!(shows(&root, "dst", None) == shown);
            assert_eq!(codes(&replies).len(), s.answered);
        }
        // Of version 7.
        let mut s = Stream::empty();
        as_file(&file, |pos, bytes| s.old(pos, bytes));
        s.old(0, &[0; 4]);
        s.old(0, &[]);
        let (_, root) = host();
        let (done, replies) = received(&root, "dst", &s.bytes);
        assert!(done.unwrap().file);
        assert!(shows(&root, "dst", None) == shown);
        assert_eq!(replies, b"SUCCESS\n");
    }
}

#[test]
fn zeros_at_the_end_of_a_file_are_not_missed() {
    let (mut file, mut shown) = image(Version::V2);
    // The last cluster that was taken is the disk's first one.
    let last = file.len() - CLUSTER as usize;
    file[last..].fill(0);
    shown[..CLUSTER as usize].fill(0);
    let mut s = Stream::new(true);
    as_file(&file[..last], |pos, bytes| s.packet(0, pos, bytes));
    s.finish();
    let (_, root) = host();
    received(&root, "dst", &s.bytes).0.unwrap();
    assert!(shows(&root, "dst", None) == shown);
}

#[test]
fn the_file_of_an_image_that_is_not_sound_is_refused() {
    let (file, _) = image(Version::V2);
    let refuse = |says: &str, change: &dyn Fn(&mut Stream)| {
        let mut s = Stream::empty();
        as_file(&file, |pos, bytes| s.packet(0, pos, bytes));
        change(&mut s);
        s.command(SYNC);
        s.finish();
        let (e, replies) = refused(&s.bytes, says);
        assert_eq!(e.kind(), Kind::Corrupt, "{e}");
        assert!(e.to_string().contains(says), "{says:?} is not in: {e}");
        assert_eq!(replies.last(), Some(&13));
    };
    // An entry far behind the end, and two that are one; a header that was not closed.
    refuse("damaged", &|s| s.packet(0, 64, &[0, 0, 0, 1]));
    refuse("damaged", &|s| s.packet(0, 68, &file[64..68]));
    refuse("not closed", &|s| {
        s.packet(0, 44, &0x746F_6E59u32.to_le_bytes())
    });
    refuse("may have", &|s| s.packet(0, 1 << 40, &[1; 512]));
    refuse("may have", &|s| s.packet(0, u64::MAX - 4, &[1; 512]));
}

/// The container is whole, or, unless its sender was told, not there; then it can be received.
fn judge(state: &MemoryStore, s: &Stream, shown: &[u8], told: bool) {
    let root = on(Arc::new(state.clone()));
    let all = snapshots::list::containers(&root).unwrap();
    assert!(all.iter().all(|c| c.error.is_none()), "{all:?}");
    if all.is_empty() {
        assert!(!told, "lost after it was answered");
        received(&root, "dst", &s.bytes).0.unwrap();
    }
    assert!(shows(&root, "dst", None) == shown);
}

/// Goal: what was answered is durable, and nothing is in parts. Method: power cuts after every change
/// and sync; `EIO` and a full host at every one.
#[test]
fn a_power_cut_or_a_failing_call_leaves_all_or_nothing() {
    let (device, shown) = small(true);
    let (file, of_file) = image(Version::V2);
    let mut by_file = Stream::new(true);
    as_file(&file, |pos, bytes| by_file.packet(0, pos, bytes));
    by_file.finish();
    for (s, shown) in [(device, shown), (by_file, of_file)] {
        let log = RecordingStore::on(&host().0);
        recorded(&log, &s).unwrap();
        for point in 0..=log.log().len() {
            let told = log.marks_before(point).contains(&1);
            let budget = Budget {
                exhaustive_units: 5,
                seeded: 8,
                seed: 0,
            };
            for state in log.states_at(point, &budget) {
                judge(&state.build(), &s, &shown, told);
            }
        }
        for fault in [Fault::Eio, Fault::Enospc] {
            for n in 0.. {
                let log = RecordingStore::on(&host().0);
                log.count(Calls::Changes);
                log.fail_at(n, fault);
                let done = recorded(&log, &s);
                let reached = log.calls() > n;
                log.clear_faults();
                judge(&log.snapshot(), &s, &shown, done.is_ok());
                if !reached {
                    assert!(n > 20, "{n} calls only");
                    break;
                }
            }
        }
    }
}

/// Sends `name` of one store to `dst` of another.
fn moved(from: &Root, name: &str, snapshot: Option<&str>, to: &Root) -> openvz::SentDisk {
    let (mut here, mut there) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut replies = there.try_clone().unwrap();
            openvz::receive(to, "dst", &mut there, &mut replies, &|_, _| ())
        });
        let mut replies = here.try_clone().unwrap();
        let place = Place::container(from, name).unwrap();
        let sent = openvz::send(&place, snapshot, &mut here, &mut replies, &|_, _| ());
        let sent = sent.unwrap();
        assert_eq!(receiver.join().unwrap().unwrap().data, sent.data);
        sent
    })
}

#[test]
fn what_we_send_is_what_we_receive() {
    for cluster_sectors in [64, 2048] {
        let ((_, from), (_, to)) = (host(), host());
        grown(&from, "src", Version::V1, cluster_sectors);
        let sent = moved(&from, "src", None, &to);
        assert!(shows(&to, "dst", None) == shows(&from, "src", None));
        assert!(sent.md5);
        let d = Place::container(&to, "dst").unwrap().descriptor().unwrap();
        assert_eq!(d.cluster_sectors, cluster_sectors);
        let (_, to) = host();
        moved(&from, "src", Some("b"), &to);
        assert!(shows(&to, "dst", None) == shows(&from, "src", Some("b")));
    }
    // Neither holes nor zeros are sent.
    let ((_, from), (_, to)) = (host(), host());
    container(&from, "src", Version::V2, 2048, 64 << 20);
    write(&from, "src", 40 << 20, &[1; 4096]);
    write(&from, "src", 50 << 20, &vec![0; 65536]);
    assert_eq!(moved(&from, "src", None, &to).data, 4096);
}

/// A receiver that answers these, whatever comes.
fn answered(replies: &[i32]) -> (ploop::Result<openvz::SentDisk>, Vec<u8>) {
    let (_, from) = host();
    container(&from, "src", Version::V2, 64, SIZE);
    write(&from, "src", CLUSTER, &[1; 4096]);
    let replies: Vec<u8> = replies.iter().flat_map(|r| r.to_le_bytes()).collect();
    let mut sent = Vec::new();
    let place = Place::container(&from, "src").unwrap();
    let done = openvz::send(&place, None, &mut sent, &mut &replies[..], &|_, _| ());
    (done, sent)
}

/// Goal: the bytes are those that OpenVZ's receiver reads. Method: against a stream made by hand.
#[test]
fn what_we_send_is_made_as_the_format_says() {
    // OpenVZ's 9 says -1, and takes data of the device.
    for (features, md5) in [(-3, true), (-2, false), (-1, true)] {
        let (done, sent) = answered(&[features, 0, 0, 0, 0, 0]);
        assert_eq!(done.unwrap().bytes, sent.len() as u64);
        let mut wanted = Stream::empty();
        wanted.packet(COMMAND, 3, &SYNC.to_le_bytes());
        wanted.md5 = md5;
        wanted.init(64, SIZE / 512);
        wanted.packet(DEVICE, CLUSTER, &[1; 4096]);
        wanted.command(SYNC);
        wanted.command(UMOUNT);
        wanted.finish();
        assert!(sent == wanted.with_gaps(0));
    }
}

#[test]
fn what_the_receiver_answers_is_believed() {
    for (replies, says) in [
        (&[][..], "closed the stream before its end"),
        (&[13], "shake hands"),
        (&[0], "before version 9"),
        (&[-1, 38], "before version 9"),
        (&[i32::MIN], "before version 9"),
        (&[-3, 38], "make an image: exit code 38"),
        (&[-3, 0, 7], "write data: exit code 7"),
        (&[-3, 0, 0, -1], "sync"),
        (&[-3, 0, 0, 0, 22], "detach"),
        (&[-3, 0, 0, 0, 0], "closed the stream before its end"),
        (&[-3, 0, 0, 0, 0, 13], "finish"),
    ] {
        let e = answered(replies).0.unwrap_err().to_string();
        assert!(e.contains(says), "{says:?} is not in: {e}");
    }
}

/// The program with its standard input and output on these.
fn program(rig: &Rig, args: &[&str], input: Stdio, output: Stdio) -> std::process::Child {
    let mut command: Command = rig.ploop();
    command.args(args).stdin(input).stdout(output);
    command.stderr(Stdio::piped()).spawn().unwrap()
}

fn ended(child: std::process::Child) -> String {
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}");
    said
}

#[test]
fn the_programs_talk_over_a_socket_and_over_two_pipes() {
    let (from, to) = (Rig::new(), Rig::new());
    from.small_template("t", &["a"]);
    let server = from.serve(["a"]);
    on_export(&server.uri("a"), &["write -P 5 30M 1M", "flush"]);
    server.stop();
    let (send, receive) = (["send", "a", "--openvz"], ["receive", "b", "--openvz"]);
    // As OpenVZ's tool: one socket for both.
    let (here, there) = UnixStream::pair().unwrap();
    let fd = |s: UnixStream| Stdio::from(std::os::fd::OwnedFd::from(s));
    let receiver = program(&to, &receive, fd(there), Stdio::null());
    let sender = program(&from, &send, Stdio::null(), fd(here));
    assert!(ended(sender).contains("OpenVZ"));
    assert!(ended(receiver).contains("container b"));
    assert_eq!(to.content("b"), from.content("a"));
    to.run(["rm", "b"]);
    // Two pipes.
    let mut receiver = program(&to, &receive, Stdio::piped(), Stdio::piped());
    let input = Stdio::from(receiver.stdin.take().unwrap());
    let output = Stdio::from(receiver.stdout.take().unwrap());
    let sender = program(&from, &send, output, input);
    ended(sender);
    ended(receiver);
    assert_eq!(to.content("b"), from.content("a"));
    assert!(to.run(["check", "b"]).contains("clean"));
    // A receiver that goes away is a failure, not somebody who has enough.
    let (here, there) = UnixStream::pair().unwrap();
    drop(there);
    let out = program(&from, &send, Stdio::null(), fd(here));
    let out = out.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("closed the stream"),
        "{said}"
    );
    // So is a sender that went away before its end was answered; the first answer fails, so there is nothing.
    let (mut here, there) = UnixStream::pair().unwrap();
    here.write_all(&small(false).0.bytes).unwrap();
    drop(here);
    let out = program(&to, &["receive", "d", "--openvz"], fd(there), Stdio::null());
    let out = out.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("closed the stream"),
        "{said}"
    );
    assert!(!to.root().join("containers/d").exists());
    // A cut one: nothing is there, and it is said.
    let mut receiver = program(
        &to,
        &["receive", "c", "--openvz"],
        Stdio::piped(),
        Stdio::piped(),
    );
    let mut bytes = small(false).0.bytes;
    bytes.truncate(bytes.len() - 30);
    receiver.stdin.take().unwrap().write_all(&bytes).unwrap();
    let mut replies = Vec::new();
    let mut output = receiver.stdout.take().unwrap();
    output.read_to_end(&mut replies).unwrap();
    let out = receiver.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("cut"), "{said}");
    assert!(!to.root().join("containers/c").exists());
}
