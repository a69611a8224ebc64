//! Bytes go both ways, whatever they go through.

use super::super::address::host;
use super::*;

fn both_ways(mut a: Link, mut b: Link) {
    std::thread::scope(|scope| {
        scope.spawn(|| exchange(&mut a, 1, 2));
        exchange(&mut b, 2, 1);
    });
    drop(a);
    assert_eq!(b.read(&mut [0]).unwrap(), 0, "an end is an end");
    assert_eq!(b.read(&mut []).unwrap(), 0);
    assert_eq!(b.write(&[]).unwrap(), 0);
}

#[test]
fn over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = at(&dir);
    let listener = Listener::unix(&path).unwrap();
    let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let dialed = dial_unix(&path);
    let accepted = accept(&listener);
    for link in [&dialed, &accepted] {
        let (pid, uid) = (std::process::id(), rustix::process::getuid().as_raw());
        let expected = format!("unix:{} (pid {pid}, uid {uid})", path.display());
        assert_eq!(link.peer(), expected);
    }
    both_ways(dialed, accepted);
    drop(listener);
    assert!(!path.exists(), "the file goes with the listener");
    let gone = Link::dial(&Address::Unix(path), None, never()).unwrap_err();
    assert_eq!(gone.kind(), Kind::NotFound);
}

#[test]
fn over_a_unix_socket_deeper_than_an_address_is_long() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120));
    fs::create_dir(&deep).unwrap();
    let path = deep.join("s");
    // One that was killed leaves its file behind.
    let stale = Listener::unix(&path).unwrap();
    let kept = deep.join("kept");
    fs::rename(&path, &kept).unwrap();
    drop(stale);
    fs::rename(&kept, &path).unwrap();
    let listener = Listener::unix(&path).unwrap();
    both_ways(dial_unix(&path), accept(&listener));
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn over_tcp() {
    let (dialed, accepted) = pair(None);
    assert!(dialed.peer().starts_with("tcp:127.0.0.1:"), "{dialed:?}");
    assert!(accepted.peer().starts_with("tcp:127.0.0.1:"));
    both_ways(dialed, accepted);
}

#[test]
fn over_tcp_to_a_name() {
    let tls = trusted();
    // Whatever else the name stands for.
    let (bound, listener) = Listener::tcp("127.0.0.1:0", Some(tls.clone())).unwrap();
    let at = Address::Tcp(format!("localhost:{}", bound[0].port()));
    std::thread::scope(|scope| {
        scope.spawn(|| accept(&listener).handshake().unwrap());
        Link::dial(&at, Some(&tls), never()).unwrap();
    });
}

#[test]
fn over_tls() {
    let (dialed, accepted) = pair(Some(&trusted()));
    for link in [&dialed, &accepted] {
        let peer = link.peer();
        assert!(peer.ends_with(" (CN=host a, O=Example)"), "{peer}");
    }
    both_ways(dialed, accepted);
}

#[test]
fn over_tls_whoever_speaks_first() {
    let tls = trusted();
    let (at, listener) = tcp(Some(&tls));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // No handshake was asked for.
            let mut link = accept(&listener);
            let mut heard = [0; 5];
            link.read_exact(&mut heard).unwrap();
            link.write_all(&heard).unwrap();
        });
        let mut link = Link::dial(&at, Some(&tls), never()).unwrap();
        link.write_all(b"hello").unwrap();
        let mut heard = Vec::new();
        link.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"hello");
    });
}

#[test]
fn over_a_command() {
    let mut link = exec("cat");
    assert_eq!(link.peer(), "exec:cat");
    exchange(&mut link, 3, 3);
}

#[test]
fn over_a_command_that_ends() {
    let mut heard = String::new();
    exec("echo one; echo two")
        .read_to_string(&mut heard)
        .unwrap();
    assert_eq!(heard, "one\ntwo\n");
}

#[test]
fn addresses_are_read_and_shown_the_same() {
    for text in [
        "unix:/run/ploop.sock",
        "tcp:localhost:10810",
        "tcp:[::1]:10810",
        "tcp:192.0.2.1:0",
        "exec:ssh host ploop migrate-receive",
        "exec: a:b | c",
        "unix:/a:b c",
    ] {
        let address = Address::parse(text).unwrap();
        assert_eq!(address.to_string(), text);
    }
    let hosts = ["a.b:1", "[::1]:1", "[0::0:1]:1", "192.0.2.1:1"].map(host);
    assert_eq!(
        hosts,
        ["a.b", "::1", "::1", "192.0.2.1"].map(|h| Ok(h.into()))
    );
    let bare = Address::parse("/run/ploop.sock").unwrap();
    assert_eq!(bare.to_string(), "unix:/run/ploop.sock");
    let long = format!("unix:/{}", "x".repeat(394));
    assert_eq!(long.len(), 400);
    assert!(Address::parse(&long).is_ok());
    let longer = long + "x";
    for text in [
        "",
        "unix:",
        "unix:relative",
        "relative",
        "localhost:10810",
        "tcp:",
        "tcp:nowhere",
        "tcp::10",
        "tcp:host:",
        "tcp:host:+1",
        "tcp:host:65536",
        "tcp:host:name",
        "tcp:::1:10810",
        "tcp:[::1]",
        "tcp:[::1]x:1",
        "tcp:[host]:1",
        "tcp:a b:1",
        "exec:",
        "exec: \t",
        "exec:a\nb",
        "unix:/a\0b",
        "nbd://x",
        &longer,
    ] {
        let refused = Address::parse(text).unwrap_err();
        assert_eq!(refused.kind(), Kind::Invalid, "{text}");
    }
}
