//! How a server ends, and what is there afterwards. A write that was answered and then flushed is
//! there after SIGKILL; after SIGTERM every answered one is.
//!
//! SIGKILL leaves the page cache, so this tells a lost entry, not a lost sector; the recording
//! store tells those (the crash tests). An entry is in the file only after a flush.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use nbd_server::wire::greeting::transmission_flag as can;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop_tests::client::{Ask, Client};
use ploop_tests::fsx::{Rng, env};
use ploop_tests::mount::wait_for;
use ploop_tests::server::{Bare, assert_acceptable, pattern, qemu_check};
use ploop_tests::store::{Rig, Server};
use ploop_tests::tools::{ploop, run};

const BLOCK: u64 = 4096;
const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];
const DIRTY: u32 = 0x746F_6E59;

/// What may be in a block: its last durable version and the ones written since.
#[derive(Clone, Debug)]
struct Block {
    may: Vec<u64>,
}

/// Version 0 is a block never written.
fn content(block: u64, version: u64) -> Vec<u8> {
    match version {
        0 => vec![0; BLOCK as usize],
        v => pattern(BLOCK as usize, block << 32 | v),
    }
}

/// Writers on an export, until the server goes away under them.
struct Load {
    blocks: Vec<Mutex<Block>>,
    next: AtomicU64,
    answered: AtomicU64,
}

impl Load {
    fn new(blocks: u64) -> Load {
        let block = || Mutex::new(Block { may: vec![0] });
        let blocks = (0..blocks).map(|_| block()).collect();
        Load {
            blocks,
            next: AtomicU64::new(1),
            answered: AtomicU64::new(0),
        }
    }

    /// Four writers, each with blocks of its own; `end` ends the server while they write.
    fn run(&self, socket: &Path, export: &str, seed: u64, flushes: bool, end: impl FnOnce()) {
        let began = self.answered.load(SeqCst);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for t in 0..4u64 {
                let client = Client::open(socket, export, STYLES[t as usize % 3]);
                let done = &done;
                scope.spawn(move || self.write(client, t, Rng(seed * 4 + t), flushes, done));
            }
            wait_for("some writes", || self.answered.load(SeqCst) > began + 300);
            end();
            done.store(true, SeqCst);
        });
    }

    fn write(&self, mut client: Client, t: u64, mut rng: Rng, flushes: bool, done: &AtomicBool) {
        let mut unflushed: Vec<(u64, u64)> = Vec::new();
        let mine = self.blocks.len() as u64 / 4;
        loop {
            let block = rng.below(mine) * 4 + t;
            let version = self.next.fetch_add(1, SeqCst);
            let fua = flushes && rng.once_in(8);
            let flags = if fua { flag::FUA } else { 0 };
            let ask = Ask::write(flags, block * BLOCK, &content(block, version));
            self.blocks[block as usize]
                .lock()
                .unwrap()
                .may
                .push(version);
            let Ok(replies) = client.try_exchange(&[ask]) else {
                break;
            };
            assert_eq!(replies[0].error, 0, "{}", replies[0].text);
            self.answered.fetch_add(1, SeqCst);
            unflushed.push((block, version));
            let flush = flushes && rng.once_in(8);
            if flush {
                let ask = Ask::new(kind::FLUSH, 0, 0..0);
                let Ok(replies) = client.try_exchange(&[ask]) else {
                    break;
                };
                assert_eq!(replies[0].error, 0, "{}", replies[0].text);
            }
            if flush || fua {
                // FUA promises its own write; a flush all that was answered.
                let durable = if flush { 0 } else { unflushed.len() - 1 };
                self.durable(unflushed.drain(durable..));
            }
        }
        assert!(
            done.load(SeqCst) || self.next.load(SeqCst) > 300,
            "the server went away early"
        );
    }

    /// Nothing older than these can be read any more.
    fn durable(&self, writes: impl Iterator<Item = (u64, u64)>) {
        for (block, version) in writes {
            self.blocks[block as usize]
                .lock()
                .unwrap()
                .may
                .retain(|&v| v >= version);
        }
    }

    /// Every answered write, but for those that were overwritten, is there.
    fn all_answered_are_durable(&self) {
        for block in &self.blocks {
            let may = &mut block.lock().unwrap().may;
            // The last one may have been on its way; the one before was answered.
            let keep = may.len().saturating_sub(2);
            may.drain(..keep);
        }
    }

    /// Every sector is of a version that may be there. What is found stays.
    fn check(&self, client: &mut Client) {
        for (n, block) in self.blocks.iter().enumerate() {
            let may = &mut block.lock().unwrap().may;
            let got = client.read(n as u64 * BLOCK, BLOCK);
            let versions: Vec<_> = may.iter().map(|&v| (v, content(n as u64, v))).collect();
            let mut seen = Vec::new();
            for (i, sector) in got.chunks(512).enumerate() {
                let is = |v: &&(u64, Vec<u8>)| v.1[i * 512..][..512] == *sector;
                match versions.iter().find(is) {
                    Some((version, _)) => seen.push(*version),
                    None => panic!("block {n} sector {i} is of none of the versions {may:?}"),
                }
            }
            may.retain(|v| seen.contains(v));
        }
    }
}

/// A container's server, and its file.
fn container() -> Rig {
    let rig = Rig::new();
    std::fs::write(rig.path("t.raw"), vec![0; 32 << 20]).unwrap();
    rig.run(["template", "import", "t", &rig.arg("t.raw")]);
    rig.run(["create", "ct", "--template", "t"]);
    rig
}

fn check_file(image: &Path) {
    qemu_check(image);
    assert_acceptable(image, false);
    run(ploop().arg("check").arg(image));
}

#[test]
fn sigterm_during_io_keeps_every_answered_write() {
    let seed = env("PLOOP_SEED", 61);
    println!("PLOOP_SEED={seed}");
    let (bare, rig) = (Bare::new("32M", &["-b", "128"]), container());
    let image = rig.top("ct");
    type Serve<'a> = &'a dyn Fn() -> Server;
    let runs: [(&str, &Path, Serve); 2] = [
        ("root", bare.image(), &|| bare.serve(&[])),
        ("ct", &image, &|| rig.serve(["--store"])),
    ];
    for (export, image, serve) in runs {
        let load = Load::new(4096);
        for round in 0..4 {
            let mut server = Some(serve());
            let socket = server.as_ref().unwrap().socket().to_path_buf();
            load.run(&socket, export, seed + round, round % 2 == 0, || {
                server.take().unwrap().stop()
            });
            assert_eq!(
                ploop_tests::server::mark(image),
                0,
                "the mark of a clean close"
            );
            check_file(image);
            load.all_answered_are_durable();
            let server = serve();
            load.check(&mut Client::open(
                server.socket(),
                export,
                Style::Structured,
            ));
            server.stop();
        }
    }
}

#[test]
fn sigkill_keeps_every_flushed_write() {
    let seed = env("PLOOP_SEED", 62);
    println!("PLOOP_SEED={seed}");
    let (bare, rig) = (Bare::new("32M", &["-b", "64"]), container());
    let image = rig.top("ct");
    type Serve<'a> = &'a dyn Fn() -> Server;
    let runs: [(&str, &Path, Serve); 2] = [
        ("root", bare.image(), &|| bare.serve(&[])),
        ("ct", &image, &|| rig.serve(["--store"])),
    ];
    for (export, image, serve) in runs {
        let load = Load::new(4096);
        for round in 0..6 {
            let mut server = Some(serve());
            let socket = server.as_ref().unwrap().socket().to_path_buf();
            // Dropped, it is killed.
            load.run(&socket, export, seed + round, true, || drop(server.take()));
            assert_eq!(ploop_tests::server::mark(image), DIRTY);
            let server = serve();
            load.check(&mut Client::open(
                server.socket(),
                export,
                Style::Structured,
            ));
            server.stop();
            check_file(image);
        }
    }
}

/// Each of the three ways to ask for durability, alone, on a fresh cluster.
#[test]
fn fua_and_flush_reach_the_file_before_the_answer() {
    let bare = Bare::new("32M", &["-b", "128"]);
    for (n, style) in (0u64..).zip(STYLES) {
        let server = bare.serve(&[]);
        let mut client = Client::open(server.socket(), "root", style);
        assert_ne!(client.flags & can::SEND_FLUSH, 0, "flush is offered");
        assert_ne!(client.flags & can::SEND_FUA, 0, "FUA is offered");
        let at = n << 20;
        let mut ask = |ask: Ask| {
            let reply = client.ask(ask);
            assert_eq!(reply.error, 0, "{}", reply.text);
        };
        ask(Ask::write(flag::FUA, at, &content(1, 1)));
        drop(server);
        let server = bare.serve(&[]);
        let mut client = Client::open(server.socket(), "root", style);
        assert!(
            client.read(at, BLOCK) == content(1, 1),
            "FUA write, {style:?}"
        );
        client.write(at + (512 << 10), &content(2, 2));
        client.flush();
        drop(server);
        let server = bare.serve(&[]);
        let mut client = Client::open(server.socket(), "root", style);
        assert!(
            client.read(at + (512 << 10), BLOCK) == content(2, 2),
            "flush, {style:?}"
        );
        let zero = Ask::new(kind::WRITE_ZEROES, flag::FUA, at..at + BLOCK);
        assert_eq!(client.ask(zero).error, 0);
        drop(server);
        let server = bare.serve(&[]);
        let mut client = Client::open(server.socket(), "root", style);
        assert_eq!(
            client.read(at, BLOCK),
            content(0, 0),
            "FUA zeroes, {style:?}"
        );
        server.stop();
    }
    check_file(bare.image());
}

/// Clusters that a killed server had taken and never entered are taken again, not leaked.
#[test]
fn fifty_kills_do_not_grow_the_file() {
    let bare = Bare::new("1G", &["-b", "128"]);
    let mut rng = Rng(env("PLOOP_SEED", 63));
    let data = pattern(64 << 10, 1);
    // Header and table of 16384 entries: two clusters.
    let (tables, flushed) = (2 << 16, 4 << 20);
    for cycle in 0..50 {
        let server = bare.serve(&[]);
        let mut client = Client::open(server.socket(), "root", STYLES[cycle % 3]);
        for _ in 0..16 {
            client.write(rng.below(flushed / 65536) * 65536, &data);
        }
        client.flush();
        // New clusters, a megabyte of them, that no flush ever enters.
        for _ in 0..16 {
            client.write((64 + rng.below(900)) << 20, &data);
        }
        drop(server);
        let len = std::fs::metadata(bare.image()).unwrap().len();
        // What was flushed, what a cycle took, and the eighth by which a file grows.
        let bound = (tables + flushed + (1 << 20)) * 9 / 8 + 65536;
        assert!(
            len <= bound,
            "{len} bytes after {cycle} kills, {bound} at most"
        );
    }
    bare.serve(&[]).stop();
    check_file(bare.image());
    let len = std::fs::metadata(bare.image()).unwrap().len();
    assert!(len <= tables + flushed, "{len} bytes after a clean close");
}

#[test]
fn a_client_that_holds_a_request_open_does_not_hold_up_the_end() {
    let bare = Bare::new("16M", &[]);
    let server = bare.serve(&[]);
    let mut client = Client::open(server.socket(), "root", Style::Structured);
    let mut bytes = Vec::new();
    Ask::write(0, 0, &[1; 4096]).emit(Style::Structured, 1, &mut bytes);
    std::io::Write::write_all(&mut client.socket, &bytes[..2000]).unwrap();
    // The server may not have read it yet; either way it ends, and soon.
    std::thread::sleep(Duration::from_millis(50));
    server.stop();
    assert!(client.is_closed());
    assert_eq!(bare.mark(), 0);
}
