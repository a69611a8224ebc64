//! The bridge, with pipes and sockets for standard input and output.

use std::io::{PipeReader, PipeWriter, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{JoinHandle, spawn};

use super::super::bridge::Bridge;
use super::*;

/// A bridge that runs: what is input and output to it, and its service.
struct Rig {
    input: Option<PipeWriter>,
    output: Option<PipeReader>,
    service: Option<UnixStream>,
    bridge: JoinHandle<io::Result<()>>,
}

fn rig() -> Rig {
    let (service, far) = UnixStream::pair().unwrap();
    let (far_input, input) = pipe().unwrap();
    let (output, far_output) = pipe().unwrap();
    Rig {
        input: Some(input),
        output: Some(output),
        service: Some(service),
        bridge: spawn(move || run(far, &far_input, far_output.into())),
    }
}

fn run(service: UnixStream, input: impl AsFd, output: OwnedFd) -> io::Result<()> {
    let bridge = Bridge::new(service.into(), input.as_fd(), output.as_fd());
    bridge.run(|| Ok(()))
}

#[test]
fn both_ways_at_once_and_a_half_that_ends() {
    let mut rig = rig();
    let (mut input, mut output) = (rig.input.take().unwrap(), rig.output.take().unwrap());
    let mut service = rig.service.take().unwrap();
    let fill = |seed| {
        let mut bytes = vec![0; ALL];
        pattern(seed)(&mut bytes);
        bytes
    };
    std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(&fill(1)).unwrap());
        let mut writing = service.try_clone().unwrap();
        let writer = scope.spawn(move || writing.write_all(&fill(2)).unwrap());
        scope.spawn(move || {
            let mut got = Vec::new();
            service.read_to_end(&mut got).unwrap();
            assert!(got == fill(1));
            // The other half is still there.
            writer.join().unwrap();
            service.write_all(b"the end").unwrap();
        });
        let mut got = Vec::new();
        output.read_to_end(&mut got).unwrap();
        assert!(got[..ALL] == fill(2));
        assert_eq!(&got[ALL..], b"the end");
    });
    rig.bridge.join().unwrap().unwrap();
}

#[test]
fn a_service_that_goes_ends_it() {
    let mut rig = rig();
    let mut service = rig.service.take().unwrap();
    service.write_all(b"bye").unwrap();
    drop(service);
    let mut got = Vec::new();
    rig.output.take().unwrap().read_to_end(&mut got).unwrap();
    assert_eq!(got, b"bye");
    // The input is still open.
    rig.bridge.join().unwrap().unwrap();
    assert!(rig.input.unwrap().write_all(b"x").is_err());
}

#[test]
fn a_service_that_only_listens_is_written_to() {
    let mut rig = rig();
    let mut service = rig.service.take().unwrap();
    service.shutdown(std::net::Shutdown::Write).unwrap();
    rig.input.take().unwrap().write_all(b"more").unwrap();
    let mut got = Vec::new();
    service.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"more");
    rig.bridge.join().unwrap().unwrap();
}

#[test]
fn output_that_nobody_reads_ends_what_the_service_writes() {
    let mut rig = rig();
    let mut service = rig.service.take().unwrap();
    drop(rig.output.take());
    let chunk = vec![0; CHUNK];
    while service.write_all(&chunk).is_ok() {}
    // What comes in still arrives.
    rig.input.take().unwrap().write_all(b"last").unwrap();
    let mut got = Vec::new();
    service.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"last");
    rig.bridge.join().unwrap().unwrap();
}

#[test]
fn one_socket_may_be_input_and_output() {
    let (mut service, far) = UnixStream::pair().unwrap();
    let (mut ours, both) = UnixStream::pair().unwrap();
    let bridge = spawn(move || run(far, both.try_clone().unwrap(), both.into()));
    ours.write_all(b"question").unwrap();
    let mut got = [0; 8];
    service.read_exact(&mut got).unwrap();
    service.write_all(b"answer").unwrap();
    let mut got = [0; 6];
    ours.read_exact(&mut got).unwrap();
    // The service ends: that is passed on, though the socket is still open for input.
    service.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(ours.read(&mut got).unwrap(), 0);
    ours.write_all(b"last").unwrap();
    drop(ours);
    let mut got = Vec::new();
    service.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"last");
    bridge.join().unwrap().unwrap();
}

#[test]
fn there_must_be_a_service() {
    let dir = tempfile::tempdir().unwrap();
    let none = bridge(&at(&dir)).unwrap_err();
    assert_eq!(none.kind(), Kind::NotFound);
}
