//! Links between threads of this process, and to commands.

mod bridges;
mod bytes;
mod ends;
mod files;
mod refusals;

use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use super::*;

/// Bytes of one direction.
const ALL: usize = 8 << 20;
/// Bytes at once: every kind of socket holds as much, so that both sides may write first.
const CHUNK: usize = 32 << 10;

fn never() -> Stop {
    Arc::new(|| false)
}

/// True from the `n`th time on that it is asked.
fn at_the(n: usize) -> Stop {
    let asked = AtomicUsize::new(1);
    Arc::new(move || asked.fetch_add(1, Ordering::Relaxed) >= n)
}

fn pattern(seed: u64) -> impl FnMut(&mut [u8]) {
    let mut x = seed | 1;
    move |bytes| {
        for piece in bytes.chunks_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            piece.copy_from_slice(&x.to_le_bytes()[..piece.len()]);
        }
    }
}

/// Writes the pattern of `mine` while the pattern of `theirs` is read.
fn exchange(link: &mut Link, mine: u64, theirs: u64) {
    let (mut mine, mut theirs) = (pattern(mine), pattern(theirs));
    let (mut out, mut expected, mut got) = (vec![0; CHUNK], vec![0; CHUNK], vec![0; CHUNK]);
    for n in 0..ALL / CHUNK {
        mine(&mut out);
        link.write_all(&out).unwrap();
        theirs(&mut expected);
        link.read_exact(&mut got).unwrap();
        assert!(got == expected, "chunk {n}");
    }
}

/// Who signs certificates.
struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new(name: &str) -> Ca {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Ca { pem, issuer }
    }

    /// A certificate for loopback, with its key.
    fn sign(&self, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let names = ["localhost", "127.0.0.1", "::1"].map(String::from);
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "host a");
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Example");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        (pem, key.serialize_pem())
    }

    /// One who has a certificate of this CA, and lets in who has one of `trusted`.
    fn tls(&self, trusted: &Ca, change: impl FnOnce(&mut CertificateParams)) -> Tls {
        let dir = tempfile::tempdir().unwrap();
        Tls::load(&files(&dir, &self.sign(change), &trusted.pem)).unwrap()
    }
}

fn files(dir: &TempDir, (cert, key): &(String, String), ca: &str) -> TlsFiles {
    let write = |name: &str, text: &str| -> PathBuf {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    TlsFiles {
        cert: write("cert.pem", cert),
        key: write("key.pem", key),
        ca: write("ca.pem", ca),
    }
}

/// One who has a certificate, and lets in who has one of the same CA.
fn trusted() -> Tls {
    let ca = Ca::new("ca");
    ca.tls(&ca, |_| {})
}

fn tcp(tls: Option<&Tls>) -> (Address, Listener) {
    let (bound, listener) = Listener::tcp("127.0.0.1:0", tls.cloned()).unwrap();
    (address(bound[0]), listener)
}

fn address(at: SocketAddr) -> Address {
    Address::Tcp(at.to_string())
}

fn accept(listener: &Listener) -> Link {
    listener.accept(&never()).unwrap().unwrap()
}

/// Both ends of a link.
fn pair(tls: Option<&Tls>) -> (Link, Link) {
    let (at, listener) = tcp(tls);
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| {
            let mut link = accept(&listener);
            link.handshake().unwrap();
            link
        });
        let dialed = Link::dial(&at, tls, never()).unwrap();
        (dialed, accepted.join().unwrap())
    })
}

fn exec(command: &str) -> Link {
    Link::dial(&Address::Exec(command.into()), None, never()).unwrap()
}

fn at(dir: &TempDir) -> PathBuf {
    dir.path().join("socket")
}

fn dial_unix(path: &Path) -> Link {
    Link::dial(&Address::Unix(path.into()), None, never()).unwrap()
}
