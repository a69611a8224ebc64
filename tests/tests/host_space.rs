//! A host that is full, with the real binaries: a small ext4 that a store is on.
//!
//! What a user would lose: what was flushed, the way out of being full, or a container that did not
//! ask for room. Nothing here measures time: what is to happen is waited for, what is not to happen
//! is held off until the test makes room.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nbd_server::control::model::Space;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop_tests::client::{Ask, Client, read_replies};
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::fsx::Rng;
use ploop_tests::mount::{Filler, Mounted, wait_for};
use ploop_tests::store::Rig;

const ENOSPC: u32 = 28;
const MIB: u64 = 1 << 20;
const PIECE: u64 = 64 << 10;

/// Where the small template has no data, and the disk's end.
const FREE: u64 = 42 * MIB;
const END: u64 = 64 * MIB;

/// A store on an ext4 of its own.
struct Host {
    // In this order: the store's rig goes before what it stands on, and that before its image.
    rig: Rig,
    disk: Mounted,
    _image: Rig,
}

impl Host {
    fn new(bytes: u64, containers: &[&str]) -> Host {
        let image = Rig::new();
        let disk = Mounted::ext4(&image.path("ext4"), bytes);
        let rig = Rig::new().with_root(&disk.path().join("store"));
        rig.small_template("t", containers);
        Host {
            rig,
            disk,
            _image: image,
        }
    }

    fn filler(&self, leave: u64) -> Filler {
        Filler::new(self.disk.path(), leave)
    }

    /// Bytes that the reserve really holds.
    fn reserve(&self) -> u64 {
        let file = fs::metadata(self.rig.root().join("reserve"));
        file.map_or(0, |m| m.blocks() * 512)
    }

    fn check(&self, containers: &[&str]) {
        for name in containers {
            let said = self.rig.run(["check", name]);
            assert!(said.contains("clean"), "{name}: {said}");
        }
    }
}

fn space(daemon: &Daemon) -> Space {
    daemon.api().get("/v1/space").unwrap()
}

fn write(client: &mut Client, at: u64, fill: u8) -> u32 {
    client
        .ask(Ask::write(0, at, &vec![fill; PIECE as usize]))
        .error
}

/// What a container was told is there.
#[derive(Default)]
struct Written {
    /// Place and content of each write that was answered.
    all: Vec<(u64, u8)>,
    refused: usize,
}

impl Written {
    fn set(&mut self, at: u64, fill: u8) {
        self.all.retain(|w| w.0 != at);
        self.all.push((at, fill));
    }

    /// Writes at random places, with flushes, until many were refused.
    fn fill_up(&mut self, client: &mut Client, seed: u64) {
        let mut rng = Rng(seed);
        for i in 0u64.. {
            let (at, fill) = (rng.below(END / PIECE) * PIECE, (seed + i) as u8 | 1);
            match write(client, at, fill) {
                0 => self.set(at, fill),
                error => {
                    assert_eq!(error, ENOSPC);
                    self.refused += 1;
                }
            }
            if i % 16 == 15 {
                client.flush();
            }
            if self.refused > 100 {
                break;
            }
        }
        client.flush();
    }

    fn assert_there(&self, client: &mut Client, who: &str) {
        for &(at, fill) in &self.all {
            let read = client.read(at, PIECE);
            assert!(read == vec![fill; PIECE as usize], "{who} at {at}");
        }
    }
}

/// Goal: a host at 100 % under four writers costs them ENOSPC for what needs room, and nobody
/// anything else; what frees room lets them go on. Method: they and another program fill it; then
/// all that must work does; then one container goes.
#[test]
fn a_full_host_loses_nothing_and_goes_on_as_soon_as_a_container_is_deleted() {
    let names = ["a", "b", "c", "d"];
    let host = Host::new(160 * MIB, &["a", "b", "c", "d", "gone"]);
    let rig = &host.rig;
    let daemon = Daemon::with(rig, &["--reserve", "4M"]);
    let mut gone = daemon.open("gone");
    for at in (FREE..FREE + 8 * MIB).step_by(PIECE as usize) {
        assert_eq!(write(&mut gone, at, 9), 0);
    }
    gone.flush();
    gone.disconnect();
    // A node each that is to be merged away later.
    let mut all: Vec<(Client, Written)> = Vec::new();
    for name in names {
        let mut client = daemon.open(name);
        let mut written = Written::default();
        for at in (FREE..FREE + MIB).step_by(PIECE as usize) {
            assert_eq!(write(&mut client, at, 7), 0);
            written.set(at, 7);
        }
        take(&daemon.api(), name, "early");
        all.push((client, written));
    }
    std::thread::scope(|s| {
        for (seed, (client, written)) in all.iter_mut().enumerate() {
            s.spawn(move || written.fill_up(client, seed as u64 + 1));
        }
    });
    // Not even what the file system itself may need is left.
    let filler = host.filler(0);
    assert_eq!(space(&daemon).level, "full");
    for (i, (client, written)) in all.iter_mut().enumerate() {
        let free = |at: &u64| !written.all.iter().any(|w| w.0 == *at);
        let new = (0..END / PIECE).map(|p| p * PIECE).find(free).unwrap();
        let refused = client.ask(Ask::write(0, new, &vec![1; PIECE as usize]));
        assert_eq!(refused.error, ENOSPC);
        assert!(refused.text.contains("host"), "{}", refused.text);
        // What it has it may write to.
        let (at, _) = *written.all.last().unwrap();
        assert_eq!(write(client, at, 200 + i as u8), 0);
        written.set(at, 200 + i as u8);
        client.flush();
    }
    assert!(space(&daemon).refused >= 400);
    for name in names {
        take(&daemon.api(), name, "full");
    }
    filler.take(0);
    for name in ["a", "b"] {
        rig.run(["snapshot", "delete", name, "early"]);
        rig.run(["snapshot", "delete", name, "full"]);
    }
    for (client, written) in &mut all {
        client.flush();
        written.assert_there(client, "while it is full");
    }
    let now = space(&daemon);
    assert!(now.reserve_uses > 0, "{now:?}");
    rig.run(["rm", "gone"]);
    // Without a restart, for each of them.
    for (client, written) in &mut all {
        let (at, _) = written.all[0];
        wait_for("room", || write(client, at, 99) == 0);
        written.set(at, 99);
        client.flush();
    }
    drop(filler);
    wait_for("the reserve", || host.reserve() >= 4 * MIB);
    wait_for("room", || space(&daemon).level != "full");
    for (mut client, written) in all {
        written.assert_there(&mut client, "at the end");
        client.disconnect();
    }
    let log = daemon.log();
    assert!(!log.contains("stopped by an earlier failure"), "{log}");
    daemon.stop();
    host.check(&names);
}

/// Sends requests and does not wait for their answers.
fn send(client: &mut Client, first: u64, asks: &[Ask]) {
    let mut bytes = Vec::new();
    for (cookie, ask) in (first..).zip(asks) {
        ask.emit(Style::Structured, cookie, &mut bytes);
    }
    client.socket.write_all(&bytes).unwrap();
}

/// Has writes wait for room, one of them of zeros that are to keep their room.
fn wait_in(daemon: &Daemon, client: &mut Client, count: u64) -> Vec<Ask> {
    let before = space(daemon).waiting;
    let mut asks: Vec<_> = (1..count)
        .map(|i| Ask::write(0, FREE + i * PIECE, &vec![2; PIECE as usize]))
        .collect();
    let large = FREE + 10 * MIB..FREE + 13 * MIB;
    asks.push(Ask::new(kind::WRITE_ZEROES, flag::NO_HOLE, large));
    send(client, 0, &asks);
    wait_for("them to wait", || space(daemon).waiting == before + count);
    asks
}

/// Goal: with `--on-full pause` writes wait instead of failing, hold up nothing meanwhile, and happen
/// when there is room. Method: they wait on a full host, with all else beside them.
#[test]
fn writes_that_wait_for_room_hold_up_nobody_and_happen_later() {
    for engine in ["inline", "portable", "uring"] {
        let host = Host::new(96 * MIB, &["ct", "other"]);
        let rig = &host.rig;
        let args = ["--engine", engine, "--on-full", "pause", "--reserve", "4M"];
        let daemon = Daemon::with(rig, &args);
        let (mut client, mut second) = (daemon.open("ct"), daemon.open("ct"));
        let mut other = daemon.open("other");
        assert_eq!(write(&mut client, FREE, 1), 0);
        assert_eq!(write(&mut other, FREE, 3), 0);
        let filler = host.filler(0);
        let asks = wait_in(&daemon, &mut client, 20);
        // On the same connection: a cookie of its own.
        send(&mut client, 100, &[Ask::new(kind::FLUSH, 0, 0..0)]);
        let cookie = client.next_answered();
        assert_eq!(cookie, 100, "{engine}: the flush is answered first");
        // In place, on another connection; a snapshot; another container.
        assert_eq!(write(&mut second, FREE, 4), 0);
        second.flush();
        assert_eq!(second.read(FREE, PIECE), vec![4; PIECE as usize]);
        assert_ne!(second.read(FREE + PIECE, PIECE), vec![2; PIECE as usize]);
        assert_eq!(write(&mut other, FREE, 5), 0);
        other.flush();
        take(&daemon.api(), "ct", "meanwhile");
        let now = space(&daemon);
        assert_eq!((now.waiting, now.waited, now.refused), (20, 20, 0));
        drop(filler);
        let replies = read_replies(&mut client.socket, &asks).unwrap();
        assert!(replies.iter().all(|r| r.error == 0), "{engine}");
        client.flush();
        let written = second.read(FREE + PIECE, 19 * PIECE);
        assert!(written == vec![2; 19 * PIECE as usize], "{engine}");
        let now = space(&daemon);
        assert_eq!((now.waiting, now.waited, now.refused), (0, 20, 0));
        let mut before = daemon.open("ct@meanwhile");
        assert_eq!(before.read(FREE, PIECE), vec![4; PIECE as usize]);
        assert_ne!(before.read(FREE + PIECE, PIECE), vec![2; PIECE as usize]);
        daemon.stop();
        host.check(&["ct", "other"]);
    }
}

/// Goal: who goes while his writes wait leaves nothing, and neither does a service that stops then.
#[test]
fn clients_that_go_and_a_service_that_stops_while_writes_wait_end_in_order() {
    let host = Host::new(96 * MIB, &["ct", "quota"]);
    let rig = &host.rig;
    let daemon = Daemon::with(rig, &["--on-full", "pause"]);
    let mut client = daemon.open("ct");
    assert_eq!(write(&mut client, FREE, 1), 0);
    client.flush();
    client.disconnect();
    let filler = host.filler(0);
    for count in [5, 128] {
        for way in ["close", "disconnect", "violate"] {
            let mut client = daemon.open("ct");
            wait_in(&daemon, &mut client, count);
            match way {
                "disconnect" => send(&mut client, 200, &[Ask::new(kind::DISC, 0, 0..0)]),
                "violate" => client.socket.write_all(&[0xFF; 64]).unwrap(),
                _ => {}
            }
            drop(client);
            wait_for("them to be forgotten", || space(&daemon).waiting == 0);
        }
    }
    // A quota is no host: who has no right to more does not wait.
    rig.run(["set", "quota", "--quota", "4K"]);
    let mut quota = daemon.open("quota");
    let limited = quota.ask(Ask::write(0, FREE, &vec![1; PIECE as usize]));
    assert_eq!(limited.error, ENOSPC);
    assert!(limited.text.contains("limit"), "{}", limited.text);
    let (mut client, mut second) = (daemon.open("ct"), daemon.open("ct"));
    let asks = wait_in(&daemon, &mut client, 20);
    wait_in(&daemon, &mut second, 3);
    daemon.stop();
    // Nobody is told of a failure: a client that reconnects asks again.
    let mut told = Vec::new();
    client.socket.read_to_end(&mut told).ok();
    assert_eq!((asks.len(), told.len()), (20, 0));
    drop(filler);
    host.check(&["ct"]);
    let daemon = Daemon::start(rig);
    let mut client = daemon.open("ct");
    assert_eq!(client.read(FREE, PIECE), vec![1; PIECE as usize]);
    daemon.stop();
}

/// The lines of a log that have all of these.
fn lines(daemon: &Daemon, all: &[&str]) -> usize {
    let log = daemon.log();
    let has = |line: &&str| all.iter().all(|word| line.contains(word));
    log.lines().filter(has).count()
}

/// Goal: an operator is told once when his host becomes low and full, sees it in the metrics, and keeps
/// what is below the hard mark for himself.
#[test]
fn marks_are_said_once_and_nothing_is_given_below_the_hard_one() {
    let host = Host::new(192 * MIB, &["ct"]);
    let rig = &host.rig;
    let args = ["--space-soft", "60M", "--space-hard", "30M"];
    let daemon = Daemon::with(rig, &args);
    let mut client = daemon.open("ct");
    let now = space(&daemon);
    assert_eq!(now.level, "plenty", "{now:?}");
    assert_eq!((now.soft, now.hard), (60 * MIB, 30 * MIB));
    assert_eq!(
        (now.reserve_wanted, now.on_full.as_str()),
        (now.total / 100, "error")
    );
    let low = host.filler(50 * MIB);
    wait_for("low", || space(&daemon).level == "low");
    wait_for("the log", || {
        lines(&daemon, &["WARN", "little room left"]) == 1
    });
    assert_eq!(write(&mut client, FREE, 1), 0);
    let full = host.filler(20 * MIB);
    wait_for("full", || space(&daemon).level == "full");
    wait_for("the log", || lines(&daemon, &["WARN", "host is full"]) == 1);
    let refused = client.ask(Ask::write(0, FREE + PIECE, &vec![2; PIECE as usize]));
    assert_eq!(refused.error, ENOSPC);
    assert!(refused.text.contains("host"), "{}", refused.text);
    assert_eq!(write(&mut client, FREE, 3), 0);
    client.flush();
    let metrics = daemon.api().text("/metrics").unwrap();
    for line in [
        "ploop_host_level{level=\"plenty\"} 0",
        "ploop_host_level{level=\"full\"} 1",
        "ploop_host_became_total{level=\"low\"} 1",
        "ploop_host_became_total{level=\"full\"} 1",
        "ploop_host_refused_requests_total 1",
        "ploop_host_hard_bytes 31457280",
    ] {
        assert!(
            metrics.contains(&format!("\n{line}\n")),
            "{line}: {metrics}"
        );
    }
    drop(full);
    wait_for("room", || write(&mut client, FREE + PIECE, 2) == 0);
    drop(low);
    wait_for("plenty", || space(&daemon).level == "plenty");
    assert_eq!(lines(&daemon, &["INFO", "has room again"]), 1);
    assert_eq!(lines(&daemon, &["little room left"]), 1);
    drop(client);
    daemon.stop();
    host.check(&["ct"]);
}

/// Goal: a full host without a service is got out of, too. Method: snapshots and a merge by the
/// command, on what a service has left in reserve; and on nothing, where they are refused.
#[test]
fn commands_without_a_service_use_the_reserve() {
    let host = Host::new(128 * MIB, &["ct", "other"]);
    let rig = &host.rig;
    let daemon = Daemon::with(rig, &["--reserve", "8M"]);
    let mut client = daemon.open("ct");
    for (i, at) in (FREE..END).step_by(PIECE as usize).enumerate() {
        assert_eq!(write(&mut client, at, i as u8 | 1), 0);
        if i == 100 {
            take(&daemon.api(), "ct", "early");
        }
    }
    client.flush();
    client.disconnect();
    daemon.stop();
    let filler = host.filler(0);
    let content = rig.content("ct");
    assert!(host.reserve() >= 8 * MIB);
    for i in 0..4 {
        rig.run(["snapshot", "create", "ct", "--name", &format!("s{i}")]);
        filler.take(0);
    }
    let left = host.reserve();
    assert!(left < 8 * MIB, "{left}");
    rig.run(["snapshot", "delete", "ct", "early"]);
    rig.run(["snapshot", "delete", "ct", "s0"]);
    assert_eq!(rig.content("ct"), content);
    // Containers are not made of it.
    let kept = host.reserve();
    let says = ["No space left on device"];
    filler.take(0);
    rig.refused(8, ["create", "new", "--template", "t"], &says);
    rig.refused(8, ["template", "import", "new", "rootfs"], &says);
    assert!(kept - host.reserve() <= 3 * MIB, "{kept}");
    fs::remove_file(rig.root().join("reserve")).unwrap();
    filler.take(0);
    rig.refused(8, ["snapshot", "create", "other", "--name", "x"], &says);
    drop(filler);
    host.check(&["ct", "other"]);
    assert_eq!(rig.content("ct"), content);
}

/// Goal: `ploop serve` does the same for its disk, and says what does not apply to it.
#[test]
fn a_single_disk_is_served_with_marks_too() {
    let host = Host::new(96 * MIB, &["ct"]);
    let rig = &host.rig;
    let dir = host.disk.path().join("root.hdd");
    rig.run([Path::new("export"), Path::new("ct"), &dir]);
    let disk = dir.to_str().unwrap();
    let socket = rig.arg("s.sock");
    let serve = ["serve", disk, "--socket", &socket];
    let refused = |more: &[&str], says: &[&str]| {
        let args = serve.iter().chain(more);
        rig.refused(if more[0] == "--reserve" { 2 } else { 7 }, args, says);
    };
    refused(&["--reserve", "1M"], &["only a store has a reserve"]);
    refused(
        &["--on-full", "pause", "--read-only"],
        &["served for writing"],
    );
    let server = rig.serve([disk, "--space-hard", "20M"]);
    let mut client = Client::open(server.socket(), "root.hdd", Style::Structured);
    assert_eq!(write(&mut client, FREE, 1), 0);
    let filler = host.filler(10 * MIB);
    // What was written once has its place.
    let mut next = FREE;
    wait_for("the mark", || {
        next += PIECE;
        write(&mut client, next, 2) == ENOSPC
    });
    client.flush();
    drop(filler);
    wait_for("room", || write(&mut client, next, 2) == 0);
    client.disconnect();
    server.stop();
    // A container of the store has the store's reserve.
    let server = rig.serve(["ct", "--reserve", "2M"]);
    wait_for("the reserve", || host.reserve() >= 2 * MIB);
    server.stop();
}
