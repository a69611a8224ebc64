//! A server is killed again and again under fio, whose own sums then say whether all is there that
//! was flushed.
//!
//! fio saves the state of its verification when its server dies, but cannot use it here: it takes
//! for granted that whatever was issued more than `iodepth` requests before the end was answered,
//! which does not hold where answers come out of order, and that an answer is enough. Its logs say
//! more: the submission log has a line for each write that was sent, the latency log one for each that
//! was answered. A job with one request in flight sends nothing before its flush is answered, so
//! each round knows for certain what was flushed, and asks three things:
//!
//! | bytes of | must be |
//! |---|---|
//! | a write that was flushed | this round's, by fio's sums (it reads them as an iolog says) |
//! | any other write that was sent | never zeros where something else was |
//! | nothing that was sent | what they were after the last round, or in the template |
//!
//! A block of an earlier round has a right sum, too: each round keeps its sums at another place in
//! the block (`verify_offset`), where those of the others are not.
//!
//! `PLOOP_KILLS=200 cargo test --workspace --test killed_fio` for a longer run; `PLOOP_SEED` repeats
//! its choices, though not its timing.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::iter;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::fsx::{Rng, env};
use ploop_tests::mount::wait_for;
use ploop_tests::server::qemu_check;
use ploop_tests::store::{Rig, Server};
use ploop_tests::tools::tool;

/// Bytes of a job's region.
const REGION: u64 = 12 << 20;
/// Requests in flight of each job, and writes between two of its flushes (0: it has none).
const JOBS: [(u64, usize); 6] = [(1, 1), (1, 3), (1, 8), (1, 40), (8, 0), (16, 0)];
/// Bytes of the disk.
const SIZE: u64 = REGION * JOBS.len() as u64;
/// fio's header is 44 bytes, and must not overlap the place it is kept at.
const SUM_PLACES: Range<u64> = 48..4096 - 48;

/// A fio at work; killed when dropped.
struct Fio {
    child: Child,
    said: PathBuf,
}

impl Drop for Fio {
    fn drop(&mut self) {
        // After `wait` there is nothing left to kill.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Fio {
    fn start(mut command: Command, said: PathBuf) -> Fio {
        let file = File::create(&said).unwrap();
        command.stdin(Stdio::null());
        command.stderr(file.try_clone().unwrap()).stdout(file);
        let child = command.spawn().unwrap();
        Fio { child, said }
    }

    /// Waits for its end: how, and what it said.
    fn wait(mut self) -> (ExitStatus, String) {
        let mut ended = None;
        wait_for("fio's end", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        (ended.unwrap(), fs::read_to_string(&self.said).unwrap())
    }
}

/// What all runs of a round have in common.
fn fio(round: u64, uri: &str, dir: &Path) -> Command {
    let places = (SUM_PLACES.end - SUM_PLACES.start) / 8;
    let place = SUM_PLACES.start + round % places * 8;
    let mut fio = tool("fio");
    fio.current_dir(dir)
        .args(["--name=global", "--ioengine=nbd", "--thread"])
        .arg(format!("--uri={uri}"))
        .args(["--verify=crc32c", "--verify_interval=4096"])
        .arg(format!("--verify_offset={place}"))
        .args(["--verify_state_save=0", "--verify_fatal=1"]);
    fio
}

/// Random writes by all jobs, each block of a region once; logs in `dir`.
fn writer(round: u64, rng: &mut Rng, uri: &str, dir: &Path) -> Fio {
    let mut command = fio(round, uri, dir);
    command
        .args(["--rw=randwrite", "--bssplit=4k/55:8k/15:16k/15:64k/15"])
        .args(["--do_verify=0", "--write_lat_log=w", "--log_offset=1"])
        .args(["--per_job_logs=1", "--allrandrepeat=1"])
        // All that a region holds: before a log grows fio waits for what is in flight, which is for
        // ever when the server is gone.
        .arg(format!("--log_entries={}", REGION / 4096 + 1))
        .arg(format!("--randseed={}", rng.below(1 << 40)));
    for (n, (depth, fsync)) in (0..).zip(JOBS) {
        // Half of the regions begin off the grid of 4 KiB.
        let shift = rng.below(16).saturating_sub(8) * 512;
        command
            .arg(format!("--name=job{n}"))
            .arg(format!("--offset={}", n * REGION + shift))
            .arg(format!("--size={}", REGION - 4096))
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--fsync={fsync}"));
    }
    Fio::start(command, dir.join("written"))
}

/// What a round wrote.
#[derive(Default)]
struct Written {
    /// All that was sent.
    sent: Vec<Range<u64>>,
    /// How many of them were answered.
    answered: usize,
    /// Answered before a flush was sent that was answered.
    flushed: Vec<Range<u64>>,
}

impl Written {
    /// As fio's logs in `dir` have it.
    fn read(dir: &Path) -> Written {
        let mut written = Written::default();
        for (job, (depth, fsync)) in (1..).zip(JOBS) {
            let sent = logged(&dir.join(format!("w_slat.{job}.log")));
            let mut answered = logged(&dir.join(format!("w_lat.{job}.log")));
            assert!(
                answered.len() <= sent.len(),
                "job {job} was answered more than it sent"
            );
            written.answered += answered.len();
            if depth == 1 && fsync > 0 {
                // The write after the flush that covers these was sent.
                answered.truncate(sent.len().saturating_sub(1) / fsync * fsync);
                written.flushed.append(&mut answered);
            }
            written.sent.extend(sent);
        }
        written
    }
}

/// The writes in one of fio's logs. A job that wrote nothing has none.
fn logged(path: &Path) -> Vec<Range<u64>> {
    let text = match fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text.unwrap(),
    };
    let write = |line: &str| {
        // Time, latency, direction, length, offset, priority.
        let fields: Vec<u64> = line.split(',').map(|f| f.trim().parse().unwrap()).collect();
        assert_eq!(fields[2], 1, "{line} is no write");
        fields[4]..fields[4] + fields[3]
    };
    text.lines().map(write).collect()
}

/// fio reads what was flushed and compares its sums.
fn verify(round: u64, flushed: &[Range<u64>], uri: &str, dir: &Path) {
    let mut iolog = "fio version 2 iolog\ndisk add\ndisk open\n".to_owned();
    for write in flushed {
        writeln!(
            iolog,
            "disk read {} {}",
            write.start,
            write.end - write.start
        )
        .unwrap();
    }
    fs::write(dir.join("iolog"), iolog + "disk close\n").unwrap();
    let mut command = fio(round, uri, dir);
    command.args(["--name=check", "--rw=randread", "--read_iolog=iolog"]);
    command.args(["--bsrange=4k-64k", "--iodepth=16"]);
    let (ended, said) = Fio::start(command, dir.join("verified")).wait();
    assert!(ended.success(), "kill {round}: {ended}\n{said}");
    let all = format!("issued rwts: total={},0,", flushed.len());
    assert!(said.contains(&all), "kill {round}: not {all}\n{said}");
}

/// Compares what was not flushed with what was there before; what is seen is certain from then on.
fn compare(round: u64, sent: &[Range<u64>], certain: &mut Vec<u8>, server: &Server) {
    let mut client = Client::open(server.socket(), "ct", Style::Simple);
    let pieces = (0..SIZE >> 20).map(|i| client.read(i << 20, 1 << 20));
    let got = pieces.collect::<Vec<_>>().concat();
    client.disconnect();
    let mut sent: Vec<_> = sent
        .iter()
        .map(|w| w.start as usize..w.end as usize)
        .collect();
    sent.sort_by_key(|w| w.start);
    let mut from = 0;
    for write in sent.into_iter().chain(iter::once(got.len()..got.len())) {
        let (is, was) = (&got[from..write.start], &certain[from..write.start]);
        if is != was {
            let at = is.iter().zip(was).position(|(a, b)| a != b).unwrap();
            let len = (is.len() - at).min(16);
            panic!(
                "kill {round}: byte {}, which nobody wrote to, has changed: {:x?}, was {:x?}",
                from + at,
                &is[at..at + len],
                &was[at..at + len]
            );
        }
        let (is, was) = (&got[write.clone()], &certain[write.clone()]);
        let zeros = |(is, was): (&[u8], &[u8])| is != was && is.iter().all(|b| *b == 0);
        if let Some(n) = is.chunks(512).zip(was.chunks(512)).position(zeros) {
            panic!(
                "kill {round}: the sector at {} has turned to zeros",
                write.start + n * 512
            );
        }
        from = write.end;
    }
    *certain = got;
}

/// Random data with holes and zeros of all sizes between.
fn template(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    rng.fill(&mut bytes);
    for _ in 0..100 {
        let at = rng.below(SIZE - (200 << 10)) as usize;
        let len = (rng.below(200) << 10) as usize;
        bytes[at..at + len].fill(0);
    }
    bytes
}

#[test]
fn fio_finds_all_that_was_flushed_after_every_kill() {
    let seed = env("PLOOP_SEED", 1);
    eprintln!("PLOOP_SEED={seed}");
    let mut rng = Rng(seed);
    let rig = Rig::new();
    let mut certain = template(&mut rng);
    fs::write(rig.path("template.raw"), &certain).unwrap();
    let raw = rig.arg("template.raw");
    rig.run(["template", "import", "base", &raw, "--from", "raw"]);
    rig.run(["create", "ct", "--template", "base"]);
    let image = rig.top("ct");
    let changed = || fs::metadata(&image).unwrap().modified().unwrap();

    let (mut sent, mut answered, mut flushed, mut closed) = (0, 0, 0, 0);
    let mut serving: Option<Server> = None;
    for round in 0..env("PLOOP_KILLS", 6) {
        let dir = rig.path(&format!("round-{round}"));
        fs::create_dir(&dir).unwrap();
        // Every other time the server that has found what the last one left.
        let server = serving.take().unwrap_or_else(|| rig.serve(["ct"]));
        let before = changed();
        let mut writing = writer(round, &mut rng, &server.uri("ct"), &dir);
        wait_for("the first write", || {
            changed() != before || writing.child.try_wait().unwrap().is_some()
        });
        let life = match rng.below(5) {
            // Long enough for a flush, whatever the host.
            _ if flushed == 0 => 3_000 << round.min(6),
            // Long enough for clusters to be completed in the background.
            0 => 1_200 + rng.below(600),
            1 => rng.below(20),
            _ => rng.below(300),
        };
        std::thread::sleep(Duration::from_millis(life));
        drop(server);
        let (_, said) = writing.wait();
        // What a dead server gives is another error.
        for error in ["Input/output error", "No space left"] {
            let failed = said.contains(error);
            assert!(!failed, "kill {round}: a write failed\n{said}");
        }
        let written = Written::read(&dir);
        sent += written.sent.len();
        answered += written.answered;
        flushed += written.flushed.len();

        let server = rig.serve(["ct"]);
        if !written.flushed.is_empty() {
            verify(round, &written.flushed, &server.uri("ct"), &dir);
        }
        compare(round, &written.sent, &mut certain, &server);
        match rng.below(4) {
            0 => {
                server.stop();
                qemu_check(&image);
                closed += 1;
            }
            1 => drop(server),
            _ => serving = Some(server),
        }
        fs::remove_dir_all(&dir).unwrap();
    }
    drop(serving);
    eprintln!("{sent} writes sent, {answered} answered, {flushed} flushed; closed {closed} times");
    assert!(
        flushed > 0,
        "no write was flushed before its server was killed"
    );
    rig.serve(["ct"]).stop();
    qemu_check(&image);
    assert!(rig.run(["check", "ct"]).contains("clean"));
}
