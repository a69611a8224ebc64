//! The tree changes under clients that write.
//!
//! What a user would lose: a write that was answered before a snapshot and is not in it, one that
//! was sent after it and is; an error where there should have been a short wait. The pauses are
//! printed, never asserted: they are the machine's as much as ours.

#![allow(clippy::unwrap_used)]

mod check;
mod fio;
mod writer;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nbd_server::control::Client;
use nbd_server::control::client::resource;
use nbd_server::control::model::{CreateContainers, CreatedContainer, Job, JobState, Merge};
use ploop_tests::daemon::{Daemon, snapshots, take};
use ploop_tests::fsx::{Rng, env};
use ploop_tests::server::qemu_check;
use ploop_tests::store::Rig;

use writer::{BLOCK, BLOCKS, Log, Writer};

const WRITERS: u64 = 4;
const REGION: u64 = BLOCK * BLOCKS;

/// Where the first region is; the regions are not aligned to clusters, so that neighbours share
/// one.
const FIRST: u64 = (8 << 20) + 5 * BLOCK;

/// How long the writers are watched before the first snapshot.
const IDLE: Duration = Duration::from_millis(1500);

/// A snapshot, and for each writer between which of its batches it was taken.
#[derive(Clone, Debug)]
struct Made {
    name: String,
    least: Vec<u64>,
    most: Vec<u64>,
    pause: f64,
    when: (Instant, Instant),
}

/// Goal: a snapshot has every write that was answered before it was asked for, and none that was
/// sent after it was there; nobody's request fails; merging changes no snapshot. Method: four
/// writers that log what is answered, 200 snapshots, half of them deleted or merged meanwhile.
#[test]
fn two_hundred_snapshots_under_four_writers_are_what_was_there() {
    let count = env("PLOOP_LIVE_SNAPSHOTS", 200) as usize;
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let writers: Vec<Writer> = (0..WRITERS)
        .map(|w| Writer::start(daemon.open("ct"), w, FIRST + w * REGION))
        .collect();
    let logs: Vec<Arc<Log>> = writers.iter().map(|w| w.log.clone()).collect();
    // What it is like without snapshots.
    std::thread::sleep(IDLE);
    let started = Instant::now();

    let present = Mutex::new(Vec::new());
    let over = AtomicBool::new(false);
    let mut all = Vec::new();
    std::thread::scope(|scope| {
        let (api, present, over) = (daemon.api(), &present, &over);
        let remover = scope.spawn(move || remove(&api, present, over, count / 2));
        let api = daemon.api();
        for i in 0..count {
            let made = make(&api, &logs, &format!("s{i:03}"));
            lock(present).push(made.clone());
            all.push(made);
            assert!(writers.iter().all(Writer::is_well), "{}", daemon.log());
        }
        over.store(true, SeqCst);
        remover.join().unwrap();
    });
    let took = started.elapsed();
    let present = present.into_inner().unwrap();
    assert_eq!(present.len(), count - count / 2);
    clone_while_running(&daemon, &logs, &present);

    let ended: Vec<_> = writers.into_iter().map(Writer::stop).collect();
    // The template's layer, which it stands on, has no name.
    let listed = snapshots(&daemon.api(), "ct").into_iter();
    let names: Vec<_> = listed.filter_map(|s| s.name).collect();
    let want: Vec<_> = present.iter().map(|m| m.name.clone()).collect();
    assert_eq!(names, want, "what is listed");
    for (log, mut client) in ended {
        // Each reads all of it: what the others wrote is there, too.
        client.flush();
        check_live(&mut client, &logs);
        assert_eq!(log.sent(), log.answered());
    }
    for made in &present {
        let mut client = daemon.open(&format!("ct@{}", made.name));
        check(
            &made.name,
            |at| client.read(at, REGION),
            &logs,
            &made.least,
            &made.most,
        );
    }
    report(&all, &logs, started, took);
    for error in ["ERROR", "panicked"] {
        assert!(!daemon.log().contains(error), "{}", daemon.log());
    }
    daemon.stop();
    after_it_is_closed(&rig, &present, &logs);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

fn make(api: &Client, logs: &[Arc<Log>], name: &str) -> Made {
    let least = logs.iter().map(|l| l.answered()).collect();
    let start = Instant::now();
    let taken = take(api, "ct", name);
    let end = Instant::now();
    Made {
        name: name.to_owned(),
        least,
        most: logs.iter().map(|l| l.sent()).collect(),
        pause: taken.pause,
        when: (start, end),
    }
}

/// Deletes and merges `count` of the snapshots that are present, in any order, while more are made.
fn remove(api: &Client, present: &Mutex<Vec<Made>>, over: &AtomicBool, count: usize) {
    let mut rng = Rng(7);
    let mut removed = 0;
    while removed < count {
        let mut list = lock(present);
        // Never so fast that nothing is left to be merged.
        if list.len() < 8 && !over.load(SeqCst) {
            drop(list);
            std::thread::sleep(Duration::from_millis(2));
            continue;
        }
        let at = match rng.below(4) {
            // The newest is what the live disk stands on.
            0 => list.len() - 1,
            _ => rng.below(list.len() as u64 - 1) as usize,
        };
        let gone = list.remove(at);
        let child = list.get(at).map(|m| m.name.clone());
        drop(list);
        let job: Job = match child.filter(|_| rng.once_in(2)) {
            // Merging a node makes its parent go.
            Some(child) => {
                let merge = Merge {
                    snapshot: Some(child),
                    ..Merge::default()
                };
                api.post(&resource(&["containers", "ct", "merge"]), &merge)
            }
            None => api.delete(&resource(&["containers", "ct", "snapshots", &gone.name])),
        }
        .unwrap();
        let job = api.wait(job.id, |_| ()).unwrap();
        assert_eq!(job.state, JobState::Done, "{job:?}");
        removed += 1;
    }
}

/// A clone of a snapshot of a disk that is being written.
fn clone_while_running(daemon: &Daemon, logs: &[Arc<Log>], present: &[Made]) {
    let made = &present[present.len() / 2];
    let request = CreateContainers {
        names: vec!["clone".into()],
        from: Some(format!("ct@{}", made.name)),
        ..CreateContainers::default()
    };
    let _: Vec<CreatedContainer> = daemon
        .api()
        .post(&resource(&["containers"]), &request)
        .unwrap();
    let mut client = daemon.open("clone");
    check(
        "clone",
        |at| client.read(at, REGION),
        logs,
        &made.least,
        &made.most,
    );
}

fn check(
    what: &str,
    mut read: impl FnMut(u64) -> Vec<u8>,
    logs: &[Arc<Log>],
    least: &[u64],
    most: &[u64],
) {
    for (i, log) in logs.iter().enumerate() {
        log.check(what, &read(log.at), least[i], most[i]);
    }
}

/// The live disk has everything that was sent.
fn check_live(client: &mut ploop_tests::client::Client, logs: &[Arc<Log>]) {
    let sent: Vec<u64> = logs.iter().map(|l| l.sent()).collect();
    check("live", |at| client.read(at, REGION), logs, &sent, &sent);
}

/// What the files hold when nobody serves them; and what QEMU says of each.
fn after_it_is_closed(rig: &Rig, present: &[Made], logs: &[Arc<Log>]) {
    let mut images = 0;
    let layers = fs::read_dir(rig.root().join("layers")).unwrap();
    let dirs = layers.map(|l| l.unwrap().path());
    for dir in dirs.chain(["ct", "clone"].map(|c| rig.root().join("containers").join(c))) {
        for file in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            if file.file_name().unwrap().to_str().unwrap().contains(".hds") {
                qemu_check(&file);
                images += 1;
            }
        }
    }
    assert!(images >= present.len() + 2, "{images} images");
    for container in ["ct", "clone"] {
        assert!(rig.run(["check", container]).contains("clean"));
    }
    let sent: Vec<u64> = logs.iter().map(|l| l.sent()).collect();
    let (first, last) = (&present[0], &present[present.len() - 1]);
    for (source, least, most) in [
        (format!("ct@{}", first.name), &first.least, &first.most),
        (format!("ct@{}", last.name), &last.least, &last.most),
        ("ct".to_owned(), &sent, &sent),
    ] {
        rig.run(["convert", &source, "out.raw", "--to", "raw"]);
        let raw = fs::read(rig.path("out.raw")).unwrap();
        fs::remove_file(rig.path("out.raw")).unwrap();
        let read = |at: u64| raw[at as usize..(at + REGION) as usize].to_vec();
        check(&source, read, logs, least, most);
    }
}

/// Milliseconds: median and worst.
fn spread(mut all: Vec<f64>) -> String {
    all.sort_by(f64::total_cmp);
    match all.last() {
        Some(worst) => {
            let (median, p99) = (all[all.len() / 2], all[all.len() * 99 / 100]);
            format!("median {median:.3} ms, 99% {p99:.3} ms, worst {worst:.3} ms")
        }
        None => "none".into(),
    }
}

/// Prints what it cost the writers.
fn report(all: &[Made], logs: &[Arc<Log>], started: Instant, took: Duration) {
    let ms = |d: &Duration| d.as_secs_f64() * 1e3;
    let waits: Vec<(Instant, Duration)> =
        logs.iter().flat_map(|l| lock(&l.waits).clone()).collect();
    let flushes: Vec<_> = logs.iter().flat_map(|l| lock(&l.flushes).clone()).collect();
    let of = |all: &[(Instant, Duration)], during: bool| {
        let chosen = all.iter().filter(|(at, _)| (*at >= started) == during);
        spread(chosen.map(|(_, d)| ms(d)).collect())
    };
    // The longest answer that any writer waited for while a snapshot was being made; and the same
    // for as long a time before there were any.
    let longest = |(start, end): (Instant, Instant)| {
        let meets = |(at, d): &&(Instant, Duration)| *at < end && *at + *d > start;
        let all = waits.iter().filter(meets).map(|(_, d)| ms(d));
        all.fold(0.0, f64::max)
    };
    let mut calls: Vec<Duration> = all.iter().map(|m| m.when.1 - m.when.0).collect();
    calls.sort();
    let usual = calls[calls.len() / 2];
    let before = (0..IDLE.as_micros() / usual.as_micros().max(1)).map(|i| {
        let end = started - usual * i as u32;
        longest((end - usual, end))
    });
    let gaps = all.iter().map(|made| longest(made.when));
    let calls = calls.iter().map(ms);
    eprintln!(
        "{} snapshots in {:.1} s, {} batches",
        all.len(),
        took.as_secs_f64(),
        waits.len()
    );
    eprintln!(
        "  pause, as reported     {}",
        spread(all.iter().map(|m| m.pause * 1e3).collect())
    );
    eprintln!("  longest answer in each {}", spread(gaps.collect()));
    eprintln!("  as long, before        {}", spread(before.collect()));
    eprintln!("  whole call             {}", spread(calls.collect()));
    eprintln!("  answers, before        {}", of(&waits, false));
    eprintln!("  answers, meanwhile     {}", of(&waits, true));
    eprintln!("  flushes, before        {}", of(&flushes, false));
    eprintln!("  flushes, meanwhile     {}", of(&flushes, true));
}
