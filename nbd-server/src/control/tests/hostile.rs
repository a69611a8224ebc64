//! Clients that send too much, too little, or nothing, and those that do not listen.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::*;

fn connect(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    socket
}

/// All that comes until the end.
fn rest(socket: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    // A reset ends it as well as a close.
    let mut buf = [0; 4096];
    while let Ok(n) = socket.read(&mut buf) {
        if n == 0 {
            break;
        }
        bytes.extend_from_slice(&buf[..n]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// One plain request; its status and body.
pub(super) fn ask(path: &Path, method: &str, asked: &str, body: &str) -> (u16, String) {
    let mut socket = connect(path);
    let (method, len) = (method.to_uppercase(), body.len());
    let head = format!("{method} {asked} HTTP/1.1\r\nhost: x\r\nconnection: close");
    // In one piece: who has seen enough of a request answers it, and closes.
    let request = format!("{head}\r\ncontent-length: {len}\r\n\r\n{body}");
    socket.write_all(request.as_bytes()).unwrap();
    let answer = rest(&mut socket);
    let status = answer.split(' ').nth(1).unwrap_or("0").parse().unwrap();
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, body.to_owned())
}

fn impatient() -> Limits {
    Limits {
        connections: 4,
        head: Duration::from_secs(3),
        body: Duration::from_secs(3),
        answer: Duration::from_millis(200),
    }
}

#[test]
fn a_body_that_is_too_long_is_refused_unread() {
    let rig = Rig::new();
    let mut socket = connect(&rig.path());
    let head = "POST /v1/containers HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    write!(socket, "{head}content-length: {}\r\n\r\n", 1u64 << 40).unwrap();
    assert!(rest(&mut socket).starts_with("HTTP/1.1 413"));
    let mut socket = connect(&rig.path());
    write!(socket, "{head}transfer-encoding: chunked\r\n\r\n").unwrap();
    // Until the service has had enough: it takes a megabyte, not a gigabyte.
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let mut sent = 0;
    while sent < 1 << 14 && socket.write_all(chunk.as_bytes()).is_ok() {
        sent += 1;
    }
    assert!(sent < 1 << 14);
    rig.client();
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let rig = Rig::new();
    let garbage: Vec<u8> = (0..100_000u32).map(|i| ((i * 7919) >> 3) as u8).collect();
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20)).into_bytes();
    let headers = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100_000)).into_bytes();
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let nul = b"GET /v1/containers/\0 HTTP/1.1\r\nhost: x\r\n\r\n".to_vec();
    for bytes in [garbage, long, headers, http2, nul, vec![0; 1000]] {
        let mut socket = connect(&rig.path());
        // It may be cut before it has sent all.
        socket.write_all(&bytes).ok();
        socket.shutdown(std::net::Shutdown::Write).ok();
        let answer = rest(&mut socket);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{answer}"
        );
        rig.client();
    }
}

#[test]
fn who_is_slow_is_let_go_and_blocks_nobody() {
    let rig = Rig::with(impatient());
    // All places but one are taken by clients that send nothing, half a head, half a body.
    let mut slow: Vec<_> = (0..3).map(|_| connect(&rig.path())).collect();
    slow[1].write_all(b"GET /v1/info HT").unwrap();
    let head = b"POST /v1/containers HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{";
    slow[2].write_all(head).unwrap();
    rig.client();
    // One more: now all are, and the next waits until one is let go.
    slow.push(connect(&rig.path()));
    rig.client();
    let answers: Vec<_> = slow.iter_mut().map(rest).collect();
    assert_eq!(answers[0], "");
    assert!(answers[2].starts_with("HTTP/1.1 408"), "{}", answers[2]);
}

#[test]
fn an_idle_connection_is_let_go_after_its_answer() {
    let rig = Rig::with(impatient());
    let mut socket = connect(&rig.path());
    socket
        .write_all(b"GET /v1/info HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    assert!(rest(&mut socket).starts_with("HTTP/1.1 200"));
}

#[test]
fn who_does_not_take_its_answer_is_let_go() {
    let mut rig = Rig::with(impatient());
    let mut deaf: Vec<_> = (0..4).map(|_| connect(&rig.path())).collect();
    for socket in &mut deaf {
        // 20 MB, more than a socket holds.
        let asked = b"GET /v1/containers/large/tree HTTP/1.1\r\nhost: x\r\n\r\n";
        socket.write_all(asked).unwrap();
    }
    rig.client();
    let start = Instant::now();
    rig.control.take().unwrap().stop();
    assert!(start.elapsed() < Duration::from_secs(50), "stopping hangs");
}
