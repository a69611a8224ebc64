//! Under kill -9 and SIGTERM of the service.
//!
//! `PLOOP_KILLS=200 cargo test --workspace --test holder` for a longer run; `PLOOP_SEED` repeats one.

use std::ops::Range;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop_tests::client::{Ask, Client};
use ploop_tests::daemon::Daemon;
use ploop_tests::fsx::{Rng, env};
use ploop_tests::holder::Holder;
use ploop_tests::mount::wait_for;
use ploop_tests::server::qemu_check;
use ploop_tests::store::Rig;
use ploop_tests::tools::{run, tool};

use super::{SIZE, address, store};

const WRITERS: u64 = 3;

/// One client with a region of its own, and what that must hold.
struct Writer {
    region: Range<u64>,
    content: Vec<u8>,
    rng: Rng,
}

impl Writer {
    fn new(number: u64, seed: u64, template: &[u8]) -> Writer {
        let len = SIZE / WRITERS / 4096 * 4096;
        let region = number * len..(number + 1) * len;
        Writer {
            content: template[region.start as usize..region.end as usize].to_vec(),
            region,
            rng: Rng(seed ^ number << 32),
        }
    }

    /// Some requests at once, of ranges that do not meet; their answers are right.
    fn turn(&mut self, client: &mut Client) {
        let mut asks: Vec<Ask> = Vec::new();
        for _ in 0..self.rng.below(12) + 1 {
            let len = match self.rng.below(8) {
                0 => self.rng.below(200_000) + 1,
                _ => (self.rng.below(4) + 1) * 4096,
            };
            let at = self.rng.below(self.region.end - self.region.start - len);
            let at = self.region.start
                + if len % 4096 == 0 {
                    at / 4096 * 4096
                } else {
                    at
                };
            let range = at..at + len;
            let meets = |a: &Ask| a.range.start < range.end && range.start < a.range.end;
            if asks.iter().any(meets) {
                continue;
            }
            let fua = if self.rng.once_in(30) { flag::FUA } else { 0 };
            asks.push(match self.rng.below(10) {
                0..=4 => {
                    let mut data = vec![0; len as usize];
                    self.rng.fill(&mut data);
                    Ask::write(fua, at, &data)
                }
                5 => Ask::new(kind::WRITE_ZEROES, fua, range),
                6 => Ask::new(kind::TRIM, 0, range),
                _ => Ask::new(kind::READ, 0, range),
            });
        }
        if self.rng.once_in(8) {
            asks.push(Ask::new(kind::FLUSH, 0, 0..0));
        }
        let replies = client.try_exchange(&asks).expect("a stall, no error");
        for (ask, reply) in asks.iter().zip(replies) {
            assert_eq!((reply.error, reply.text.as_str()), (0, ""), "{ask:?}");
            let start = ask.range.start.saturating_sub(self.region.start) as usize;
            let len = (ask.range.end - ask.range.start) as usize;
            match ask.kind {
                kind::READ => {
                    let expect = &self.content[start..start + len];
                    assert!(
                        reply.data(&ask.range) == expect,
                        "{ask:?} reads other bytes"
                    );
                }
                kind::WRITE => self.content[start..start + len].copy_from_slice(&ask.data),
                kind::WRITE_ZEROES => self.content[start..start + len].fill(0),
                kind::TRIM => {
                    // What it leaves is nobody's business, until it is written to.
                    let mut data = vec![0; len];
                    self.rng.fill(&mut data);
                    client.write(ask.range.start, &data);
                    self.content[start..start + len].copy_from_slice(&data);
                }
                _ => {}
            }
        }
    }

    fn check(&self, client: &mut Client) {
        let got = client.read(self.region.start, self.region.end - self.region.start);
        let wrong = got.iter().zip(&self.content).position(|(a, b)| a != b);
        let wrong = wrong.map(|at| self.region.start + at as u64);
        assert_eq!(wrong, None, "an answered write is lost at this byte");
    }
}

/// Three clients write and read over a template, where a kill loses clusters that were not flushed, on
/// connections of all styles, while `end` ends the service again and again, by the number of the time.
/// Nobody sees an error, nothing that was answered is lost, flushed or not.
fn under_writers(rounds: u64, mut end: impl FnMut(&Rig, Daemon, &mut Rng, u64)) {
    let seed = env("PLOOP_SEED", 1);
    println!("PLOOP_SEED={seed}");
    let rig = Rig::new();
    let template = store(&rig);
    let mut rng = Rng(seed);
    let mut daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let styles = [Style::Simple, Style::Structured, Style::Extended];
    let mut writers: Vec<Writer> = (0..WRITERS)
        .map(|n| Writer::new(n, seed, &template))
        .collect();
    let mut clients: Vec<Client> = styles.map(|s| holder.open("ct", s)).into();
    let (stop, turns) = (AtomicBool::new(false), AtomicU64::new(0));
    daemon = std::thread::scope(|scope| {
        for (writer, client) in writers.iter_mut().zip(&mut clients) {
            let (stop, turns) = (&stop, &turns);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    writer.turn(client);
                    turns.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..rounds {
            let before = turns.load(Ordering::Relaxed);
            wait_for("writers to go on", || {
                turns.load(Ordering::Relaxed) > before + 20
            });
            std::thread::sleep(Duration::from_millis(rng.below(60)));
            end(&rig, daemon, &mut rng, round);
            std::thread::sleep(Duration::from_millis(rng.below(60)));
            daemon = Daemon::start(&rig);
        }
        stop.store(true, Ordering::Relaxed);
        daemon
    });
    // Once more, with writes that nobody flushes.
    for (writer, client) in writers.iter_mut().zip(&mut clients) {
        writer.turn(client);
    }
    daemon.kill();
    let daemon = Daemon::start(&rig);
    for (writer, client) in writers.iter().zip(&mut clients) {
        writer.check(client);
    }
    // What the last kill cut goes on.
    wait_for("the merges", || {
        daemon.jobs().iter().all(|j| j.state.is_over())
    });
    for client in clients {
        client.disconnect();
    }
    holder.stop();
    daemon.stop();
    qemu_check(&rig.top("ct"));
    rig.run(["check", "ct"]);
    // Nothing of it was only in the holder.
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    for writer in &writers {
        writer.check(&mut client);
    }
}

/// Goal: killing and stopping the service costs its clients a stall, and nothing else.
#[test]
fn a_service_that_is_killed_and_started_again_is_a_stall() {
    under_writers(env("PLOOP_KILLS", 10), |_, daemon, rng, _| {
        match rng.once_in(3) {
            true => drop(daemon.stop()),
            false => daemon.kill(),
        }
    });
}

/// Goal: the same while the tree changes. Method: the service is killed at some instant of a
/// snapshot, or of the merge that takes one away.
#[test]
fn a_service_that_is_killed_in_a_snapshot_or_a_merge_is_a_stall() {
    under_writers(env("PLOOP_KILLS", 8), |rig, daemon, rng, round| {
        let name = format!("s{}", round / 2);
        let mut command = rig.ploop();
        match round % 2 {
            0 => command.args(["snapshot", "create", "ct", "--name", &name]),
            // It is not there when its making was cut off.
            _ => command.args(["snapshot", "delete", "ct", &name]),
        };
        let (out, err) = (Stdio::null(), Stdio::null());
        let mut running = command.stdout(out).stderr(err).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(rng.below(120)));
        daemon.kill();
        // Done, cut off, or done by itself when the service was gone before it asked.
        running.wait().unwrap();
    });
}

/// Goal: without the holder the same is lost, so the test above tests something; and what a flush
/// covered is there when both are killed.
#[test]
fn what_was_flushed_survives_the_holder_too() {
    let rig = Rig::new();
    let template = store(&rig);
    let daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let mut client = holder.open("ct", Style::Structured);
    let at = |n: u64| n * (128 << 10);
    for n in 0..100 {
        client.write(at(n), &[1; 4096]);
    }
    client.flush();
    for n in 100..200 {
        client.write(at(n), &[2; 4096]);
    }
    assert_eq!(holder.status().exports[0].kept_changes, 100);
    daemon.kill();
    holder.kill();
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    let mut lost = 0;
    for n in 0..200 {
        let got = client.read(at(n), 4096);
        let old = &template[at(n) as usize..][..4096];
        assert!(n >= 100 || got == [1; 4096], "write {n} was flushed");
        assert!(
            got == old || got == [1; 4096] || got == [2; 4096],
            "write {n}"
        );
        lost += u32::from(n >= 100 && got == old);
    }
    assert!(lost > 0, "a kill loses what was not flushed");
}

/// Goal: a client of others sees no error, and its own sums are right. Method: fio writes with sums
/// while the service is killed and stopped, and reads all of it back.
#[test]
fn fio_sees_no_error() {
    let rig = Rig::new();
    store(&rig);
    let mut daemon = Daemon::start(&rig);
    let holder = Holder::start(&address(&rig), &[]);
    let mut fio = tool("fio");
    fio.current_dir(rig.path("")).args([
        "--name=sums",
        "--ioengine=nbd",
        &format!("--uri={}", holder.uri("ct")),
        "--rw=randwrite",
        "--bs=4k",
        "--size=24M",
        "--loops=2",
        "--iodepth=8",
        "--rate_iops=3000",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--fsync=500",
    ]);
    let running = std::thread::spawn(move || run(&mut fio));
    let mut kills = 0;
    while !running.is_finished() && kills < 20 {
        std::thread::sleep(Duration::from_millis(150));
        match kills % 3 {
            0 => drop(daemon.stop()),
            _ => daemon.kill(),
        }
        daemon = Daemon::start(&rig);
        kills += 1;
    }
    running.join().unwrap();
    assert!(kills > 2, "fio was too fast to see a kill");
    holder.stop();
    daemon.stop();
    qemu_check(&rig.top("ct"));
}
