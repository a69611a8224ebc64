//! Servers and clients that break the protocol, with the real binary: the holder ends that
//! connection by name and goes on with others.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nbd_server::wire::greeting::Greeting;
use nbd_server::wire::option::{self, kind as opt};
use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::daemon::Daemon;
use ploop_tests::fsx::Rng;
use ploop_tests::holder::{Holder, unix};
use ploop_tests::mount::wait_for;
use ploop_tests::store::Rig;

use super::{address, store};

fn greeting() -> Vec<u8> {
    let mut out = Vec::new();
    Greeting { flags: 3 }.emit(&mut out);
    out
}

#[test]
fn a_server_that_speaks_otherwise_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("bad.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut long = Vec::new();
    long.extend(0x0003_e889_0455_65a9u64.to_be_bytes());
    long.extend(opt::LIST.to_be_bytes());
    long.extend(2u32.to_be_bytes());
    long.extend(u32::MAX.to_be_bytes());
    let bad: Vec<(Vec<u8>, Vec<u8>, &str)> = vec![
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            vec![],
            "not an NBD newstyle",
        ),
        (b"NBDMAGICIHAVEOPT\0\0".to_vec(), vec![], "fixed newstyle"),
        (greeting(), vec![7; 64], "not an answer to an option"),
        (greeting(), long, "more answers"),
    ];
    let count = bad.len();
    let says: Vec<&str> = bad.iter().map(|b| b.2).collect();
    let server = std::thread::spawn(move || {
        let mut open = Vec::new();
        for (hello, answer, _) in bad {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&hello).unwrap();
            // The client's flags and its option, if it comes to that.
            drop(stream.read(&mut [0; 4]));
            drop(stream.write_all(&answer));
            open.push(stream);
        }
        open
    });
    let holder = Holder::start(&unix(&socket), &[]);
    for said in says {
        let mut client = UnixStream::connect(holder.socket()).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut list = vec![0, 0, 0, 3];
        option::emit(opt::LIST, &[], &mut list);
        drop(client.write_all(&list));
        let mut rest = Vec::new();
        drop(client.read_to_end(&mut rest));
        assert!(rest.len() <= Greeting::LEN, "{rest:?}");
        wait_for("the log", || holder.log().contains(said));
    }
    assert_eq!(server.join().unwrap().len(), count);
    holder.stop();
}

#[test]
fn a_client_that_speaks_otherwise_is_alone_in_that() {
    let rig = Rig::new();
    store(&rig);
    let daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let mut good = holder.open("ct", Style::Structured);
    good.write(0, &[1; 512]);
    let mut rng = Rng(5);
    for n in 0..60 {
        let mut bytes = vec![0; rng.below(300) as usize + 1];
        rng.fill(&mut bytes);
        if n % 2 == 0 {
            let mut socket = UnixStream::connect(holder.socket()).unwrap();
            drop(socket.write_all(&[0, 0, 0, 3]));
            drop(socket.write_all(&bytes));
        } else {
            // After a handshake; the first bytes are never a request's.
            bytes[0] = 0xff;
            let mut client = holder.open("ct", Style::Extended);
            drop(client.socket.write_all(&bytes));
            if bytes.len() >= 4 {
                assert!(client.is_closed(), "{n}");
            }
        }
    }
    let mut tls = Client::connect(&holder.socket());
    let said = tls.option(opt::STARTTLS, &[]);
    assert!(String::from_utf8_lossy(&said[0].1).contains("TLS"));
    assert_eq!(good.read(0, 512), [1; 512]);
    drop(tls);
    good.disconnect();
    holder.stop();
    daemon.stop();
}
