//! Many connections to one export: what one wrote and got answered, every other one reads.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop_tests::client::{Ask, Client};
use ploop_tests::fsx::{Rng, env};
use ploop_tests::server::{Bare, assert_acceptable, pattern, qemu_check};
use ploop_tests::store::Rig;

/// Bytes of a block: eight of them, of different writers, share the smallest cluster many times.
const BLOCK: u64 = 4096;
const WRITERS: u64 = 4;

/// Versions of a block: what was sent, and what was answered.
#[derive(Default)]
struct Versions {
    sent: AtomicU64,
    answered: AtomicU64,
}

/// Every fifth version is a WRITE_ZEROES; 0 is the block as it was found.
fn content(block: u64, version: u64) -> Vec<u8> {
    match version % 5 {
        0 if version > 0 => vec![0; BLOCK as usize],
        _ => (block << 32 | version)
            .to_le_bytes()
            .repeat(BLOCK as usize / 8),
    }
}

fn change(block: u64, version: u64) -> Ask {
    let range = block * BLOCK..(block + 1) * BLOCK;
    match version % 5 {
        0 => Ask::new(kind::WRITE_ZEROES, 0, range),
        1 => Ask::write(flag::FUA, range.start, &content(block, version)),
        _ => Ask::write(0, range.start, &content(block, version)),
    }
}

/// Writers that own every fourth block each, and readers of all of them. A sector that is read was
/// sent before the read ended, and is no older than what was answered before the read began.
fn coherent(socket: &std::path::Path, export: &str, first: &[u8], rounds: u64) {
    let blocks = first.len() as u64 / BLOCK;
    let seed = env("PLOOP_SEED", 51);
    println!("PLOOP_SEED={seed}");
    let state: Vec<Versions> = (0..blocks).map(|_| Versions::default()).collect();
    let state = &state;
    let styles = [Style::Simple, Style::Structured, Style::Extended];
    let read = |client: &mut Client, block: u64| {
        let oldest = state[block as usize].answered.load(SeqCst);
        let got = client.read(block * BLOCK, BLOCK);
        let newest = state[block as usize].sent.load(SeqCst);
        for (i, sector) in got.chunks(512).enumerate() {
            let at = i * 512;
            let is = |version: u64| match version {
                0 => sector == &first[(block * BLOCK) as usize + at..][..512],
                v => sector == &content(block, v)[at..at + 512],
            };
            let word = u64::from_le_bytes(*sector.first_chunk().unwrap());
            let right = (oldest..=newest).any(is);
            assert!(
                right,
                "block {block} sector {i}: {word:#x}, not of {oldest}..={newest}"
            );
        }
    };
    std::thread::scope(|scope| {
        for t in 0..WRITERS {
            scope.spawn(move || {
                let mut rng = Rng(seed + t);
                let mut client = Client::open(socket, export, styles[t as usize % 3]);
                for round in 0..rounds {
                    // At first all go through the same clusters, so that they meet in taking them.
                    let mine = match round < blocks / WRITERS {
                        true => round,
                        false => rng.below(blocks / WRITERS),
                    };
                    let block = mine * WRITERS + t;
                    let versions = &state[block as usize];
                    let version = versions.sent.load(SeqCst) + 1;
                    versions.sent.store(version, SeqCst);
                    let reply = client.ask(change(block, version));
                    assert_eq!(reply.error, 0, "{}", reply.text);
                    versions.answered.store(version, SeqCst);
                    read(&mut client, rng.below(blocks));
                    if round % 64 == 0 {
                        client.flush();
                    }
                }
            });
        }
        for t in 0..2 {
            scope.spawn(move || {
                let mut rng = Rng(seed + 100 + t);
                let mut client = Client::open(socket, export, styles[2 - t as usize]);
                (0..2 * rounds).for_each(|_| read(&mut client, rng.below(blocks)));
            });
        }
    });
    let mut client = Client::open(socket, export, Style::Simple);
    (0..blocks).for_each(|block| read(&mut client, block));
}

#[test]
fn of_a_bare_image() {
    let bare = Bare::new("16M", &["-b", "64"]);
    let server = bare.serve(&[]);
    coherent(server.socket(), "root", &vec![0; 12 << 20], 5000);
    server.stop();
    qemu_check(bare.image());
    assert_acceptable(bare.image(), false);
}

/// Every first write of a cluster has to complete it from the template, beside others that do.
#[test]
fn of_a_container() {
    let rig = Rig::new();
    let bytes = pattern(8 << 20, 9);
    std::fs::write(rig.path("t.raw"), &bytes).unwrap();
    rig.run(["template", "import", "t", &rig.arg("t.raw")]);
    rig.run(["create", "ct", "--template", "t"]);
    let server = rig.serve(["--store"]);
    coherent(server.socket(), "ct", &bytes, 5000);
    server.stop();
    qemu_check(&rig.top("ct"));
    assert_acceptable(&rig.top("ct"), false);
}
