//! The holder of a container's clients: it is where the container is, whoever hangs or is killed.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nbd_server::control::model::JobState;
use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::daemon::wait_job;
use ploop_tests::holder::Holder;
use ploop_tests::mount::wait_for;
use tempfile::TempDir;

use super::sides::{Side, look, settled};
use super::*;

/// In front of a holder's control socket: what is to send it elsewhere is done, and, once, not answered.
struct Mute {
    dir: TempDir,
    /// The next that sends it gets no answer.
    mute: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Mute {
    fn before(control: PathBuf) -> Mute {
        let dir = tempfile::Builder::new()
            .prefix("ploop-m-")
            .tempdir()
            .unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let mute = Mute {
            dir,
            mute: Arc::new(AtomicBool::new(true)),
            ended: Arc::default(),
        };
        let (silent, ended) = (mute.mute.clone(), mute.ended.clone());
        std::thread::spawn(move || {
            while let Ok((from, _)) = listener.accept() {
                if ended.load(Ordering::Acquire) {
                    return;
                }
                let (control, silent, ended) = (control.clone(), silent.clone(), ended.clone());
                std::thread::spawn(move || ask(from, &control, &silent, &ended));
            }
        });
        mute
    }

    fn control(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// It was sent elsewhere, and nobody was told.
    fn is_sent(&self) -> bool {
        !self.mute.load(Ordering::Acquire)
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        UnixStream::connect(self.control()).ok();
    }
}

/// One request, and its answer.
fn ask(mut from: UnixStream, control: &Path, mute: &AtomicBool, ended: &AtomicBool) {
    let mut request = Vec::new();
    let mut bytes = [0; 4096];
    while !is_whole(&request) {
        match from.read(&mut bytes) {
            Ok(n @ 1..) => request.extend_from_slice(&bytes[..n]),
            _ => return,
        }
    }
    let mut to = UnixStream::connect(control).unwrap();
    to.write_all(&request).unwrap();
    let mut answer = Vec::new();
    to.read_to_end(&mut answer).unwrap();
    let sends = request.starts_with(b"POST /v1/holder/to");
    if sends && mute.swap(false, Ordering::AcqRel) {
        while !ended.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(5));
        }
    } else {
        from.write_all(&answer).ok();
    }
    from.shutdown(Shutdown::Both).ok();
}

fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let mut lines = head.lines();
    let len = lines.find_map(|l| l.strip_prefix("content-length: ")?.parse().ok());
    body.len() >= len.unwrap_or(0)
}

/// A container with a held client, and the holder whose first order is not answered.
struct Held {
    source: Side,
    destination: Side,
    holder: Holder,
    mute: Mute,
    client: Client,
    bytes: Vec<u8>,
}

impl Held {
    fn new() -> Held {
        let (mut source, mut destination) = (Side::new(), Side::new());
        let mut bytes = store(&source.rig);
        import(&destination.rig);
        source.start();
        destination.start();
        let holder = Holder::start(&nbd(&source.rig), &[]);
        let mute = Mute::before(holder.control());
        let mut client = holder.open("ct", Style::Extended);
        client.write(4096, &[5; 4096]);
        bytes[4096..8192].fill(5);
        Held {
            source,
            destination,
            holder,
            mute,
            client,
            bytes,
        }
    }

    fn begin(&self) -> u64 {
        let id = begin(self.source.here(), &address(&self.destination.rig), |m| {
            m.holder = Some(MigrateHolder {
                control: self.mute.control().to_str().unwrap().to_owned(),
                to: nbd(&self.destination.rig),
            });
        });
        wait_for("the holder to be sent", || self.mute.is_sent());
        id
    }

    /// The client goes on at the source, and the next move takes it along.
    fn goes_on(mut self) {
        let (here, there) = (nbd(&self.source.rig), nbd(&self.destination.rig));
        wait_for("the holder's way back", || self.holder.status().to == here);
        assert_eq!(self.client.read(0, 16384), self.bytes[..16384]);
        self.client.write(8192, &[6; 4096]);
        self.bytes[8192..12288].fill(6);
        assert!(!settled(&self.source, &self.destination));
        look(&self.source, &self.destination);
        let id = begin(self.source.here(), &address(&self.destination.rig), |m| {
            m.holder = Some(with_holder(&self.holder, &self.destination.rig));
        });
        self.source.here().api().wait(id, |_| ()).unwrap();
        assert_eq!(self.holder.status().to, there);
        assert_eq!(self.client.read(0, 16384), self.bytes[..16384]);
        self.client.disconnect();
        assert!(content(self.destination.here(), "ct") == self.bytes);
    }
}

/// Goal: clients are where the container is, without anybody's help. Method: the source is killed when it
/// has sent the holder, and has not given the container yet.
#[test]
fn a_source_that_comes_back_gets_its_clients_back() {
    let mut held = Held::new();
    held.begin();
    assert_eq!(held.holder.status().to, nbd(&held.destination.rig));
    held.source.kill();
    assert_eq!(held.source.state(), "offered");
    held.source.start();
    held.goes_on();
}

/// Goal: a holder that hangs does not keep clients waiting for ever.
#[test]
fn a_holder_that_hangs_ends_the_move() {
    let held = Held::new();
    let id = held.begin();
    let over = |j: &Job| j.state.is_over();
    let job = wait_job(&held.source.here().api(), id, "its end", over);
    assert_eq!(job.state, JobState::Failed);
    held.goes_on();
}

/// Goal: nobody's clients are taken to where what they use is not.
#[test]
fn a_holder_that_cannot_go_along_is_refused() {
    let held = Held::new();
    let (rig, to) = (&held.source.rig, nbd(&held.destination.rig));
    let control = held.holder.control();
    let dest = address(&held.destination.rig);
    let more = ["--holder", control.to_str().unwrap(), "--holder-to"];
    let args = |more: &[&str]| {
        let mut all = vec!["migrate".to_owned(), "ct".to_owned(), dest.clone()];
        all.extend(more.iter().map(|a| (*a).to_owned()));
        all
    };
    rig.refused(2, args(&[&more[..], &["nowhere"]].concat()), &["nowhere"]);
    rig.run(["create", "other", "--template", "base"]);
    let other = held.holder.open("other", Style::Extended);
    rig.refused(5, args(&[&more[..], &[&to]].concat()), &["other"]);
    other.disconnect();
    held.client.disconnect();
    assert_eq!(held.holder.status().to, nbd(rig));
    assert!(content(held.source.here(), "ct") == held.bytes);
}
