//! Calls that would block for ever, and links that end.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::thread::sleep;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::*;

fn fill(link: &mut Link) -> io::Error {
    let chunk = vec![7; CHUNK];
    loop {
        if let Err(e) = link.write(&chunk) {
            return e;
        }
    }
}

#[test]
fn stop_ends_a_read_and_a_write() {
    let tls = trusted();
    for tls in [None, Some(&tls)] {
        let (mut ours, _theirs) = pair(tls);
        ours.set_stop(at_the(2));
        let stopped = ours.read(&mut [0]).unwrap_err();
        assert_eq!(stopped.to_string(), "stopped");
        assert_ne!(stopped.kind(), ErrorKind::Interrupted);
        ours.set_stop(at_the(2));
        assert_eq!(fill(&mut ours).to_string(), "stopped");
    }
    let mut command = exec("sleep 1000");
    command.set_stop(at_the(2));
    assert_eq!(command.read(&mut [0]).unwrap_err().to_string(), "stopped");
}

#[test]
fn stop_ends_a_dial() {
    // Nobody says anything.
    let (at, _listener) = tcp(None);
    let e = Link::dial(&at, Some(&trusted()), at_the(2)).unwrap_err();
    assert!(e.to_string().ends_with(": stopped"), "{e}");

    // Nobody accepts, and no more may wait.
    let dir = tempfile::tempdir().unwrap();
    let path = super::at(&dir);
    let address = SocketAddrUnix::new(&path).unwrap();
    let socket = || -> OwnedFd {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    };
    let listener = socket();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = socket();
        if rustix::net::connect(&client, &address).is_err() {
            break;
        }
        waiting.push(client);
    }
    let e = Link::dial(&Address::Unix(path), None, at_the(2)).unwrap_err();
    assert!(e.to_string().ends_with(": stopped"), "{e}");
}

#[test]
fn stop_ends_an_accept() {
    let (_, listener) = tcp(None);
    assert!(listener.accept(&at_the(3)).unwrap().is_none());
}

/// Goal: a service that stops does not go on for as long as the other side has something to say.
#[test]
fn stop_ends_a_read_that_need_not_wait() {
    let tls = trusted();
    for tls in [None, Some(&tls)] {
        let (mut ours, mut theirs) = pair(tls);
        theirs.write_all(b"xx").unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 1);
        theirs.write_all(b"more").unwrap();
        ours.set_stop(Arc::new(|| true));
        let mut rest = Vec::new();
        let e = ours.read_to_end(&mut rest).unwrap_err();
        assert!(e.to_string().contains("stopped") && rest.len() < 2, "{e}");
    }
}

#[test]
fn patience_ends_a_read_and_a_write() {
    let tls = trusted();
    for tls in [None, Some(&tls)] {
        let (mut ours, mut theirs) = pair(tls);
        ours.set_patience(Some(Duration::from_millis(20)));
        let late = ours.read(&mut [0]).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::TimedOut);
        // A read that got nothing lost nothing.
        theirs.write_all(b"x").unwrap();
        ours.set_patience(Some(Duration::MAX));
        assert_eq!(ours.read(&mut [0]).unwrap(), 1);
        ours.set_patience(Some(Duration::from_millis(20)));
        assert_eq!(fill(&mut ours).kind(), ErrorKind::TimedOut);
    }
}

#[test]
fn one_that_says_nothing_holds_up_nobody() {
    let tls = trusted();
    let (address, listener) = tcp(Some(&tls));
    let Address::Tcp(at) = &address else { panic!() };
    let _silent = TcpStream::connect(at).unwrap();
    let mut silent = accept(&listener);
    std::thread::scope(|scope| {
        scope.spawn(|| accept(&listener).handshake().unwrap());
        Link::dial(&address, Some(&tls), never()).unwrap();
    });
    silent.greeting = Duration::from_millis(20);
    let late = silent.handshake().unwrap_err();
    assert!(late.to_string().contains("for too long"), "{late}");
    assert_eq!(late.kind(), Kind::Io);
}

#[test]
fn one_that_says_a_byte_now_and_then_is_given_up_too() {
    let tls = trusted();
    let (address, listener) = tcp(Some(&tls));
    let Address::Tcp(at) = &address else { panic!() };
    let mut slow = TcpStream::connect(at).unwrap();
    let mut link = accept(&listener);
    link.greeting = Duration::from_millis(300);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A record that never comes to its end.
            slow.write_all(&[22, 3, 1, 0x40, 0]).ok();
            while slow.write_all(&[1]).is_ok() {
                sleep(Duration::from_millis(5));
            }
        });
        link.handshake().unwrap_err();
        drop(link);
    });
}

#[test]
fn a_tls_link_that_is_cut_is_no_end() {
    let (mut ours, mut theirs) = pair(Some(&trusted()));
    theirs.write_all(b"x").unwrap();
    theirs.line.end();
    assert_eq!(ours.read(&mut [0]).unwrap(), 1);
    let cut = ours.read(&mut [0]).unwrap_err();
    assert_eq!(cut.kind(), ErrorKind::UnexpectedEof);
    assert!(cut.to_string().contains("was cut"), "{cut}");
}

#[test]
fn a_tls_link_that_failed_does_not_say_that_it_ended() {
    let (mut ours, mut theirs) = pair(Some(&trusted()));
    ours.set_stop(at_the(1));
    fill(&mut ours);
    assert_eq!(ours.write(&[0]).unwrap_err().to_string(), "stopped");
    drop(ours);
    let cut = io::copy(&mut theirs, &mut io::sink()).unwrap_err();
    assert_eq!(cut.kind(), ErrorKind::UnexpectedEof);
}

#[test]
fn a_command_that_fails_is_quoted() {
    for io in [
        |link: &mut Link| link.read(&mut [0]).map(drop).unwrap_err(),
        fill,
    ] {
        let mut link = exec("echo ssh: no such host >&2; echo really >&2; exit 3");
        let failed = io(&mut link).to_string();
        let expected = "the command ended with exit status 3: ssh: no such host; really";
        assert_eq!(failed, expected);
        assert_eq!(fill(&mut link).to_string(), expected);
    }
    let killed = exec("kill -9 $$").read(&mut [0]).unwrap_err();
    assert_eq!(killed.to_string(), "the command was killed by signal 9");
    let unknown = exec("/no/such/command").read(&mut [0]).unwrap_err();
    assert!(
        unknown.to_string().contains("/no/such/command"),
        "{unknown}"
    );
}

#[test]
fn only_the_last_words_of_a_command_are_kept() {
    let mut link = exec("head -c 1000000 /dev/zero | tr '\\0' x >&2; echo last words >&2; exit 1");
    let failed = link.read(&mut [0]).unwrap_err().to_string();
    assert!(failed.ends_with("xlast words"), "{failed}");
    assert!(failed.len() < 1100);
}

#[test]
fn a_command_is_reaped_and_what_it_left_is_killed() {
    for command in [
        "cat",
        "exit 1",
        "trap '' HUP TERM; while :; do sleep 1; done",
        "exec 0<&- 1<&-; sleep 1000",
    ] {
        let link = exec(command);
        let pid = link.child.as_ref().unwrap().pid();
        drop(link);
        assert_reaped(pid);
    }
    let mut link = exec("sleep 1000 2>&1 & echo $!; cat >/dev/null");
    let mut left = String::new();
    while !left.ends_with('\n') {
        let mut byte = [0];
        link.read_exact(&mut byte).unwrap();
        left.push(char::from(byte[0]));
    }
    drop(link);
    let stat = format!("/proc/{}/stat", left.trim());
    // Whoever inherits it may not have reaped it.
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z")) {
        sleep(Duration::from_millis(10));
    }
}

fn assert_reaped(pid: Pid) {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let waited = waitid(WaitId::Pid(pid), options);
    assert_eq!(waited.unwrap_err(), rustix::io::Errno::CHILD);
}
