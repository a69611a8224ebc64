//! A server that is not what the client was told.

use std::io::{ErrorKind, Read};
use std::process::Command;
use std::time::Duration;

use nbd_server::wire::errno;
use nbd_server::wire::reply::Style;
use ploop_tests::client::{Ask, Client};
use ploop_tests::daemon::Daemon;
use ploop_tests::holder::{Holder, unix};
use ploop_tests::mount::wait_for;
use ploop_tests::server::{Bare, Listening};
use ploop_tests::store::Rig;

use super::{address, store};

fn serve(bare: &Bare, args: &[&str]) -> (Listening, String) {
    let socket = bare.path("s.sock");
    let mut command: Command = ploop_tests::tools::ploop();
    command.arg("serve").arg(bare.image()).args(args);
    command.arg("--socket").arg(&socket);
    (Listening::start(&mut command, 1), unix(&socket))
}

/// The client's connection ends, and the holder's log says why.
fn ends(client: &mut Client, holder: &Holder, says: &str) {
    client
        .socket
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    match client.socket.read(&mut [0; 64]) {
        Ok(0) => {}
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        went_on => panic!("{went_on:?}\n{}", holder.log()),
    }
    wait_for("the log", || holder.log().contains(says));
}

#[test]
fn a_smaller_a_read_only_and_a_missing_export_end_the_connection_by_name() {
    let name = ["--name", "x"];
    let (large, small) = (Bare::new("32M", &[]), Bare::new("16M", &[]));
    let other = ["--name", "y"];
    for (next, args, says) in [
        (&small, &name, "bytes now"),
        (&large, &other, "no such export any more"),
    ] {
        let (first, to) = serve(&large, &name);
        let holder = Holder::start(&to, &[]);
        let mut client = holder.open("x", Style::Structured);
        client.write(0, &[1; 512]);
        first.stop();
        let (_next, now) = serve(next, args);
        if now != to {
            holder.move_to(&now);
        }
        ends(&mut client, &holder, says);
        // The holder is there for others.
        assert!(holder.status().exports.is_empty());
    }
    let (first, to) = serve(&large, &name);
    let holder = Holder::start(&to, &[]);
    let mut client = holder.open("x", Style::Simple);
    first.stop();
    let (_next, _) = serve(&large, &["--name", "x", "--read-only"]);
    ends(&mut client, &holder, "gone");
}

/// Goal: a client outlives a move that is taken back: the disk is not there yet, or not any more.
#[test]
fn a_disk_that_is_on_its_way_is_waited_for() {
    let (here, there) = (Bare::new("16M", &[]), Bare::new("16M", &[]));
    let (_first, to) = serve(&here, &["--name", "x"]);
    let holder = Holder::start(&to, &[]);
    let mut client = holder.open("x", Style::Structured);
    client.write(0, &[1; 512]);
    let (_next, now) = serve(&there, &["--name", "y"]);
    holder.move_to(&now);
    wait_for("the log", || {
        holder.log().contains("no such export any more")
    });
    holder.move_to(&to);
    assert_eq!(client.read(0, 512), [1; 512]);
}

#[test]
fn a_larger_export_is_kept() {
    let name = ["--name", "x"];
    let (small, large) = (Bare::new("16M", &[]), Bare::new("32M", &[]));
    let (first, to) = serve(&small, &name);
    let holder = Holder::start(&to, &[]);
    let mut client = holder.open("x", Style::Structured);
    client.write(0, &[1; 512]);
    first.stop();
    let (_next, to) = serve(&large, &name);
    holder.move_to(&to);
    assert_eq!(
        client.read(0, 512),
        [1; 512],
        "and has what was not flushed"
    );
}

#[test]
fn another_container_of_the_same_name_is_refused() {
    let rig = Rig::new();
    store(&rig);
    let daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let mut client = holder.open("ct", Style::Structured);
    client.write(0, &[1; 512]);
    daemon.stop();
    rig.run(["rm", "ct"]);
    rig.run(["create", "ct", "--template", "base"]);
    let _daemon = Daemon::start(&rig);
    ends(&mut client, &holder, "another disk");
}

/// Goal: a disk that was rolled back is not what its client has in memory.
#[test]
fn a_disk_that_was_switched_is_refused() {
    let rig = Rig::new();
    store(&rig);
    rig.run(["snapshot", "create", "ct", "--name", "s"]);
    let daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let mut client = holder.open("ct", Style::Structured);
    client.write(0, &[1; 512]);
    daemon.stop();
    rig.run(["snapshot", "switch", "ct", "s"]);
    let _daemon = Daemon::start(&rig);
    ends(&mut client, &holder, "another disk");
    let mut next = holder.open("ct", Style::Structured);
    assert_ne!(next.read(0, 512), [1; 512]);
}

/// Goal: several connections to a server that tells no lives are there together, over a kill, too;
/// they do not drive each other out.
#[test]
fn connections_to_an_image_are_there_together() {
    let bare = Bare::new("32M", &[]);
    let (first, to) = serve(&bare, &["--name", "x"]);
    let holder = Holder::start(&to, &[]);
    let mut clients: Vec<Client> = (0..4).map(|_| holder.open("x", Style::Simple)).collect();
    for round in 0..20u8 {
        for (n, client) in clients.iter_mut().enumerate() {
            client.write((n as u64) << 20, &[round; 4096]);
        }
    }
    assert!(
        !holder.log().contains("the server is away"),
        "{}",
        holder.log()
    );
    drop(first);
    let (_next, _) = serve(&bare, &["--name", "x"]);
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.read((n as u64) << 20, 4096), [19; 4096]);
    }
    wait_for("all of them", || !holder.status().exports[0].waiting);
    let away = holder.log().matches("the server is away").count();
    assert!(away <= 2 * clients.len(), "{away} times\n{}", holder.log());
}

/// Goal: one disk by two names would be two things to the holder.
#[test]
fn a_second_name_of_a_disk_is_refused() {
    let rig = Rig::new();
    store(&rig);
    let server = rig.serve(["ct"]);
    let holder = Holder::start(&unix(server.socket()), &[]);
    let mut one = holder.open("ct", Style::Structured);
    let mut other = holder.open("", Style::Structured);
    ends(&mut other, &holder, "use one name");
    one.write(0, &[1; 512]);
    assert_eq!(one.read(0, 512), [1; 512]);
}

#[test]
fn patience_ends_with_an_error_and_begins_anew_with_a_server() {
    let rig = Rig::new();
    store(&rig);
    let daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &["--patience", "1"]);
    let mut client = holder.open("ct", Style::Structured);
    client.write(0, &[1; 512]);
    daemon.kill();
    let reply = client.ask(Ask::write(0, 512, &[2; 512]));
    assert_eq!(reply.error, errno::EIO);
    assert!(reply.text.contains("no server"), "{}", reply.text);
    let _daemon = Daemon::start(&rig);
    wait_for("the server", || !holder.status().exports[0].waiting);
    wait_for("an answer", || {
        client.ask(Ask::write(0, 512, &[3; 512])).error == 0
    });
    assert_eq!(
        client.read(0, 512),
        [1; 512],
        "answered before, not flushed"
    );
}

/// Patience that no clock can hold is patience for ever.
#[test]
fn patience_without_end_is_for_ever() {
    let rig = Rig::new();
    store(&rig);
    let daemon = Daemon::start(&rig);
    let patience = u64::MAX.to_string();
    let holder = Holder::start(&address(&rig), &["--patience", &patience]);
    let mut client = holder.open("ct", Style::Structured);
    client.write(0, &[1; 512]);
    daemon.kill();
    let _daemon = Daemon::start(&rig);
    assert_eq!(client.read(0, 512), [1; 512]);
}
