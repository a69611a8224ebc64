//! Who is not let in, and who says so.

use std::net::TcpStream;

use rcgen::{ExtendedKeyUsagePurpose, date_time_ymd};
use rustls::crypto::ring;

use super::*;

/// What both sides say when they meet: the one that dials, at the latest when it reads.
fn meet(server: &Tls, client: &Tls) -> (Error, Error) {
    let (at, listener) = tcp(Some(server));
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| accept(&listener).handshake().unwrap_err());
        let dialed = Link::dial(&at, Some(client), never()).and_then(|mut link| {
            let read = link.read(&mut [0]);
            read.map_err(|e| Error::new(Kind::Io, "read").caused_by(e))
        });
        (dialed.unwrap_err(), accepted.join().unwrap())
    })
}

#[track_caller]
fn assert_says(e: &Error, what: &str) {
    assert!(e.to_string().contains(what), "{e}");
}

#[test]
fn the_one_that_dials_refuses_another_ca() {
    let (ours, other) = (Ca::new("ca"), Ca::new("ca"));
    let (dialed, accepted) = meet(&ours.tls(&ours, |_| {}), &ours.tls(&other, |_| {}));
    assert_eq!(dialed.kind(), Kind::Permission);
    assert_says(&dialed, "is not signed by the CA that was given (--tls-ca)");
    assert_says(&accepted, "refuses our certificate");
}

#[test]
fn the_one_that_accepts_refuses_another_ca() {
    for name in ["ca", "another"] {
        let (ours, other) = (Ca::new("ca"), Ca::new(name));
        let (dialed, accepted) = meet(&ours.tls(&ours, |_| {}), &other.tls(&ours, |_| {}));
        assert_eq!(accepted.kind(), Kind::Permission);
        assert_says(&accepted, "is not signed by the CA that was given");
        assert_says(&dialed, "refuses our certificate");
    }
}

#[test]
fn the_one_that_accepts_refuses_who_shows_no_certificate() {
    let ca = Ca::new("ca");
    let ours = ca.tls(&ca, |_| {});
    let roots = rustls::RootCertStore {
        roots: {
            let mut roots = rustls::RootCertStore::empty();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("ca");
            fs::write(&path, &ca.pem).unwrap();
            for certificate in super::super::pem::certificates(&path).unwrap() {
                roots.add(certificate).unwrap();
            }
            roots.roots
        },
    };
    let bare = rustls::ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let bare = Tls {
        client: Arc::new(bare),
        server: ours.server.clone(),
    };
    let (dialed, accepted) = meet(&ours, &bare);
    assert_eq!(accepted.kind(), Kind::Permission);
    assert_says(&accepted, "the other side shows no certificate");
    assert_says(&dialed, "refuses our certificate: there is none");
}

#[test]
fn the_one_that_dials_refuses_another_host() {
    let ca = Ca::new("ca");
    let server = ca.tls(&ca, |params| {
        *params = CertificateParams::new(vec!["other.example".into()]).unwrap();
    });
    let (dialed, accepted) = meet(&server, &ca.tls(&ca, |_| {}));
    assert_eq!(dialed.kind(), Kind::Permission);
    assert_says(&dialed, "is for another host name: not 127.0.0.1");
    assert_says(&dialed, "other.example");
    assert_says(&accepted, "refuses our certificate");
}

#[test]
fn both_refuse_what_has_expired_or_is_not_valid_yet() {
    let ca = Ca::new("ca");
    let good = ca.tls(&ca, |_| {});
    let expired = ca.tls(&ca, |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    let (dialed, accepted) = meet(&expired, &good);
    assert_says(&dialed, "the certificate of the other side has expired");
    assert_says(&accepted, "refuses our certificate: it has expired");
    let (dialed, accepted) = meet(&good, &expired);
    assert_says(&accepted, "the certificate of the other side has expired");
    assert_says(&dialed, "refuses our certificate: it has expired");
    let early = ca.tls(&ca, |params| {
        params.not_before = date_time_ymd(4000, 1, 1);
        params.not_after = date_time_ymd(4001, 1, 1);
    });
    assert_says(&meet(&early, &good).0, "is not valid yet");
    assert_says(&meet(&good, &early).1, "is not valid yet");
}

#[test]
fn both_refuse_a_certificate_for_something_else() {
    let ca = Ca::new("ca");
    let with = |purpose| {
        ca.tls(&ca, |params| {
            params.extended_key_usages = vec![purpose];
        })
    };
    let server = with(ExtendedKeyUsagePurpose::ServerAuth);
    let client = with(ExtendedKeyUsagePurpose::ClientAuth);
    assert_says(&meet(&client, &client).0, "is not for this purpose");
    assert_says(&meet(&server, &server).1, "is not for this purpose");
}

#[test]
fn another_host_is_not_dialed_without_tls() {
    for at in ["192.0.2.1:9", "[2001:db8::1]:9", "[::ffff:192.0.2.1]:9"] {
        let refused = Link::dial(&Address::Tcp(at.into()), None, never()).unwrap_err();
        assert_eq!(refused.kind(), Kind::Permission, "{at}");
        for what in ["--tls-cert", "--tls-key", "--tls-ca", "exec:ssh"] {
            assert_says(&refused, what);
        }
    }
    // A name is refused for any address that it has.
    let found = ["127.0.0.1:9", "192.0.2.1:9"].map(|a| a.parse().unwrap());
    assert!(super::super::connect::check_dial("x", &found).is_err());
    assert!(super::super::connect::check_dial("x", &found[..1]).is_ok());
}

#[test]
fn other_hosts_are_not_listened_to_without_tls() {
    for at in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let refused = Listener::tcp(at, None).unwrap_err();
        assert_eq!(refused.kind(), Kind::Permission, "{at}");
        assert_says(&refused, "--tls-cert, --tls-key and --tls-ca");
    }
    let (bound, _) = Listener::tcp("0.0.0.0:0", Some(trusted())).unwrap();
    assert_ne!(bound[0].port(), 0);
    let refused = Listener::tcp("nonsense", None).unwrap_err();
    assert_eq!(refused.kind(), Kind::Invalid);
}

#[test]
fn tls_is_for_tcp() {
    for text in ["unix:/nowhere", "exec:true"] {
        let address = Address::parse(text).unwrap();
        let refused = Link::dial(&address, Some(&trusted()), never()).unwrap_err();
        assert_eq!(refused.kind(), Kind::Invalid);
        assert_says(&refused, "TLS is for TCP");
    }
}

#[test]
fn a_host_that_no_certificate_could_name_is_refused() {
    let tls = trusted();
    for at in ["a_b!:1", "no-port", "[::1"] {
        let refused = Link::dial(&Address::Tcp(at.into()), Some(&tls), never()).unwrap_err();
        assert_eq!(refused.kind(), Kind::Invalid, "{at}: {refused}");
    }
}

#[test]
fn one_that_speaks_no_tls_is_told_from_one_that_does() {
    let tls = trusted();
    let (at, listener) = tcp(Some(&tls));
    let mut plain = Link::dial(&at, None, never()).unwrap();
    plain.write_all(b"hello, is anybody there?").unwrap();
    let mut link = accept(&listener);
    drop(plain);
    assert_says(&link.handshake().unwrap_err(), "is no TLS");
    // What failed stays failed.
    assert_says(&link.handshake().unwrap_err(), "is no TLS");
    assert!(link.read(&mut [0]).is_err() && link.write(&[0]).is_err());

    let (at, listener) = tcp(None);
    std::thread::scope(|scope| {
        scope.spawn(|| accept(&listener).write_all(b"hello, who are you?").unwrap());
        let refused = Link::dial(&at, Some(&tls), never()).unwrap_err();
        assert_says(&refused, "is no TLS");
    });
}

#[test]
fn hostile_bytes_instead_of_a_handshake_are_an_error() {
    let tls = trusted();
    let (at, listener) = tcp(Some(&tls));
    let Address::Tcp(at) = at else { panic!() };
    let mut random = pattern(7);
    let mut cases: Vec<Vec<u8>> = vec![
        vec![],
        vec![0],
        // A record that says it is as long as can be, and is not.
        vec![22, 3, 1, 0xff, 0xff],
        vec![22, 3, 3, 0x40, 0, 1, 0, 0x3f, 0xfc],
        // A hello that says it has 16 MiB.
        vec![22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff],
        // An alert, and application data.
        vec![21, 3, 3, 0, 2, 2, 40],
        vec![23, 3, 3, 0, 1, 0],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0; 100_000],
    ];
    for n in 1..200 {
        let mut bytes = vec![0; n * 7 % 600];
        random(&mut bytes);
        // Every other one gets past the header.
        if n % 2 == 0 && bytes.len() > 9 {
            let len = (bytes.len() - 5) as u16;
            bytes[..3].copy_from_slice(&[22, 3, 1]);
            bytes[3..5].copy_from_slice(&len.to_be_bytes());
            bytes[5..7].copy_from_slice(&[1, 0]);
            bytes[7..9].copy_from_slice(&(len - 4).to_be_bytes());
        }
        cases.push(bytes);
    }
    for bytes in cases {
        let mut hostile = TcpStream::connect(&at).unwrap();
        let mut link = accept(&listener);
        // It may be closed before all is sent.
        hostile.write_all(&bytes).ok();
        drop(hostile);
        link.handshake().unwrap_err();
    }
}
