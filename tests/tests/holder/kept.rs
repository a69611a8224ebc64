//! What the holder keeps, and for how long.

use std::io::Write;

use nbd_server::wire::option::{MetaRequest, kind as opt};
use nbd_server::wire::option_reply::kind as answer;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop_tests::client::{Ask, Client};
use ploop_tests::daemon::Daemon;
use ploop_tests::fsx::Rng;
use ploop_tests::holder::{Holder, unix};
use ploop_tests::mount::wait_for;
use ploop_tests::store::Rig;
use ploop_tests::tools::run;

use super::{SIZE, address, store};

/// Goal: a client that never flushes costs the holder its buffer and no more; and loses nothing.
#[test]
fn a_full_buffer_is_flushed_by_the_holder() {
    const BUFFER: u64 = 256 << 10;
    let rig = Rig::new();
    store(&rig);
    let daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &["--buffer", "256K"]);
    let mut client = holder.open("ct", Style::Simple);
    client.write(0, &[9; 4096]);
    let before = holder.memory_max();
    let mut content = vec![0; SIZE as usize];
    Rng(3).fill(&mut content);
    let mut most = 0;
    for (n, part) in content.chunks(1 << 20).enumerate() {
        let start = n << 20;
        let writes = part.chunks(32 << 10).enumerate();
        let asks = writes.map(|(i, data)| Ask::write(0, (start + (i << 15)) as u64, data));
        for reply in client.try_exchange(&asks.collect::<Vec<_>>()).unwrap() {
            assert_eq!(reply.error, 0, "{}", reply.text);
        }
        most = most.max(holder.status().exports[0].bytes);
    }
    // A request beyond the buffer, at most.
    assert!(most > 0 && most <= BUFFER + (33 << 10), "{most}");
    let grown = holder.memory_max() - before;
    assert!(
        grown < 16 << 20,
        "{grown} bytes more, for {SIZE} that were written"
    );
    daemon.kill();
    let _daemon = Daemon::start(&rig);
    for (n, part) in content.chunks(1 << 20).enumerate() {
        assert!(client.read((n << 20) as u64, 1 << 20) == part, "MiB {n}");
    }
}

/// Goal: a flush, a FUA write and the client's end leave nothing in the holder.
#[test]
fn what_is_durable_is_not_kept() {
    let rig = Rig::new();
    store(&rig);
    let daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let kept = || holder.status().exports.first().map(|e| e.kept_changes);
    let mut one = holder.open("ct", Style::Simple);
    let mut other = holder.open("ct", Style::Extended);
    assert_eq!(one.ask(Ask::write(flag::FUA, 0, &[1; 4096])).error, 0);
    assert_eq!(kept(), Some(0));
    one.write(4096, &[2; 4096]);
    other.ask(Ask::new(kind::WRITE_ZEROES, 0, 8192..1 << 20));
    assert_eq!(kept(), Some(2));
    // The service says that its connections share their flushes.
    other.flush();
    assert_eq!(kept(), Some(0));
    one.write(4096, &[3; 4096]);
    one.disconnect();
    other.disconnect();
    wait_for("the holder's own flush", || kept().is_none());
    daemon.kill();
    let daemon = Daemon::start(&rig);
    assert_eq!(daemon.open("ct").read(4096, 4096), [3; 4096]);
    holder.stop();
}

/// Goal: a disk's life tells the holder what it need not send again: after a service that was
/// stopped, nothing; after one that was killed, all that was not flushed.
#[test]
fn only_what_was_lost_is_sent_again() {
    let rig = Rig::new();
    store(&rig);
    let mut daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let mut client = holder.open("ct", Style::Simple);
    for killed in [false, true, false] {
        for n in 0..50u64 {
            client.write(n << 16, &[7; 4096]);
        }
        match killed {
            true => daemon.kill(),
            false => drop(daemon.stop()),
        }
        daemon = Daemon::start(&rig);
        assert_eq!(client.read(0, 4096), [7; 4096]);
        assert_eq!(writes(&daemon), if killed { "50" } else { "0" });
        client.flush();
    }
}

/// Goal: a service that is stopped in order and started again, twenty times, is told nothing twice.
#[test]
fn a_service_that_is_stopped_loses_nothing_to_send_again() {
    let rig = Rig::new();
    store(&rig);
    let mut daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let mut client = holder.open("ct", Style::Extended);
    for n in 0..20 {
        client.write(n << 16, &[n as u8 + 1; 4096]);
        daemon.stop();
        daemon = Daemon::start(&rig);
        assert_eq!(client.read(n << 16, 4096), [n as u8 + 1; 4096]);
        assert_eq!(writes(&daemon), "0", "after {n}");
    }
    assert_eq!(holder.status().exports[0].kept_changes, 20);
    // They are lost now, and sent.
    daemon.kill();
    daemon = Daemon::start(&rig);
    for n in 0..20 {
        assert_eq!(client.read(n << 16, 4096), [n as u8 + 1; 4096]);
    }
    assert_eq!(writes(&daemon), "20");
    assert_eq!(holder.status().exports[0].kept_changes, 0, "and flushed");
}

/// Write requests that the service has had for `ct`.
fn writes(daemon: &Daemon) -> String {
    let metrics = daemon.api().text("/metrics").unwrap();
    let writes = "ploop_requests_total{export=\"ct\",op=\"write\"} ";
    let said = metrics.lines().find_map(|l| l.strip_prefix(writes));
    said.unwrap().to_owned()
}

/// Goal: a client that ends, or breaks the protocol, while there is no service: what it was answered
/// is there for the next one.
#[test]
fn what_a_client_leaves_behind_is_there_for_the_next() {
    let rig = Rig::new();
    store(&rig);
    let daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let mut orderly = holder.open("ct", Style::Simple);
    let mut rude = holder.open("ct", Style::Structured);
    orderly.write(0, &[1; 4096]);
    rude.write(1 << 20, &[2; 4096]);
    daemon.kill();
    orderly.disconnect();
    rude.socket.write_all(&[0xff; 64]).unwrap();
    assert!(rude.is_closed());
    let daemon = Daemon::start(&rig);
    let mut next = holder.open("ct", Style::Structured);
    assert_eq!(next.read(0, 4096), [1; 4096]);
    assert_eq!(next.read(1 << 20, 4096), [2; 4096]);
    next.disconnect();
    wait_for("their ends", || holder.status().exports.is_empty());
    daemon.kill();
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    assert_eq!(client.read(0, 4096), [1; 4096]);
    assert_eq!(client.read(1 << 20, 4096), [2; 4096]);
}

/// Goal: clients go on at another server that has the disk as it was: a copy that knows the disk's
/// life, and an image that knows nothing of it.
#[test]
fn clients_are_moved_to_another_server() {
    let (here, there) = (Rig::new(), Rig::new());
    store(&here);
    let daemon = Daemon::start(&here);
    let holder = Holder::start(&address(&here), &[]);
    let mut client = holder.open("ct", Style::Structured);
    let mut content = vec![0; SIZE as usize];
    Rng(11).fill(&mut content);
    for (n, part) in content.chunks(1 << 20).enumerate() {
        client.write((n << 20) as u64, part);
    }
    daemon.stop();
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        run(std::process::Command::new("cp").arg("-a").arg(from).arg(to));
    };
    copy(here.root(), there.root());
    let daemon = Daemon::start(&there);
    holder.move_to(&unix(daemon.socket()));
    assert!(client.read(0, SIZE / 2) == content[..SIZE as usize / 2]);
    // A write that is not flushed, and a server that never heard of it.
    let image = there.arg("alone.hds");
    client.flush();
    there.run(["snapshot", "create", "ct", "--name", "s"]);
    there.run(["convert", "ct@s", &image, "--to", "ploop"]);
    client.write(5 << 20, &vec![0x55; 70_000]);
    content[5 << 20..][..70_000].fill(0x55);
    daemon.kill();
    let socket = there.path("alone.sock");
    let _alone = ploop_tests::server::Listening::start(
        there
            .ploop()
            .args(["serve", &image, "--name", "ct", "--socket"])
            .arg(&socket),
        1,
    );
    holder.move_to(&unix(&socket));
    for (n, part) in content.chunks(1 << 20).enumerate() {
        assert!(client.read((n << 20) as u64, 1 << 20) == part, "MiB {n}");
    }
    client.disconnect();
    holder.stop();
}

/// What the service tells of an export's life.
fn life(daemon: &Daemon, export: &str) -> Option<String> {
    let mut client = Client::connect(daemon.socket());
    let mut data = Vec::new();
    MetaRequest::emit(export, &["ploop:life"], &mut data);
    let answers = client.option(opt::LIST_META_CONTEXT, &data);
    assert_eq!(answers.last().unwrap().0, answer::ACK, "{answers:?}");
    let told = answers.iter().find(|a| a.0 == answer::META_CONTEXT);
    told.map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap())
}

/// Goal: the life goes on over clean closes, whoever asks, and ends with a kill. What cannot be
/// written to has none; a clone has one of its own.
#[test]
fn a_disk_tells_its_life() {
    let rig = Rig::new();
    store(&rig);
    rig.run(["snapshot", "create", "ct", "--name", "s"]);
    rig.run(["create", "clone", "--from", "ct@s"]);
    let daemon = Daemon::start(&rig);
    let first = life(&daemon, "ct").unwrap();
    assert!(first.starts_with("ploop:life:"), "{first}");
    let user = daemon.open("ct");
    assert_eq!(life(&daemon, "ct").as_ref(), Some(&first));
    assert_eq!(life(&daemon, "ct@s"), None);
    assert_eq!(life(&daemon, "template:base"), None);
    let disk = |life: &str| life.split('/').next().unwrap().to_owned();
    let clone = life(&daemon, "clone").unwrap();
    assert_ne!(disk(&clone), disk(&first));
    drop(user);
    daemon.stop();
    // A tool that opens and closes the disk in between is no end of it.
    rig.run(["snapshot", "create", "ct", "--name", "t"]);
    let daemon = Daemon::start(&rig);
    assert_eq!(life(&daemon, "ct").as_ref(), Some(&first));
    let user = daemon.open("ct");
    assert_eq!(life(&daemon, "ct").as_ref(), Some(&first));
    daemon.kill();
    drop(user);
    // Whatever closes it meanwhile: what was lost is lost.
    rig.run(["snapshot", "create", "ct", "--name", "u"]);
    let daemon = Daemon::start(&rig);
    let second = life(&daemon, "ct").unwrap();
    assert_ne!(second, first);
    assert_eq!(disk(&second), disk(&first));
    daemon.stop();
}
