//! The daemon is killed again and again under clients that write over a template; the next one has
//! everything that was flushed, and of the rest, sector by sector, the old or the new.
//!
//! `PLOOP_KILLS=200 cargo test --workspace --test killed` for a longer run; `PLOOP_SEED` repeats one.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use nbd_server::export::Disks;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop::device::Device;
use ploop_tests::client::{Ask, Client};
use ploop_tests::daemon::Daemon;
use ploop_tests::fsx::{Rng, env};
use ploop_tests::mount::wait_for;
use ploop_tests::server::qemu_check;
use ploop_tests::store::Rig;
use snapshots::Root;

const SECTOR: u64 = 512;
/// Sectors of a writer's region.
const REGION: u64 = (8 << 20) / SECTOR;
const WRITERS: u64 = 4;

/// What a sector may hold: what is certain, and what was sent since.
#[derive(Clone, Debug, Default)]
struct Sector {
    certain: u64,
    since: Vec<u64>,
}

/// One client and its region. Number 0 is the template's content, all others are writes.
struct Writer {
    number: u64,
    rng: Rng,
    next: u64,
    sectors: Vec<Sector>,
}

fn stamp(writer: u64, sector: u64, id: u64) -> Vec<u8> {
    let words = [writer, sector, id, !id];
    let words: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    words.repeat(SECTOR as usize / words.len())
}

impl Writer {
    fn new(number: u64, seed: u64) -> Writer {
        Writer {
            number,
            rng: Rng(seed ^ number << 32),
            next: 1,
            sectors: vec![Sector::default(); REGION as usize],
        }
    }

    fn base(&self) -> u64 {
        self.number * REGION * SECTOR
    }

    /// Some writes; each sector remembers them before they are sent.
    fn batch(&mut self) -> Vec<Ask> {
        let count = self.rng.below(8) + 1;
        let mut asks: Vec<Ask> = Vec::new();
        for _ in 0..count {
            let len = match self.rng.below(4) {
                0 => self.rng.below(3) + 1,
                1 => self.rng.below(300) + 1,
                _ => 8,
            };
            let at = self.rng.below(REGION - len);
            let at = if len == 8 { at / 8 * 8 } else { at };
            let range = self.base() + at * SECTOR..self.base() + (at + len) * SECTOR;
            // Requests that are under way together have no order.
            let meets = |a: &Ask| a.range.start < range.end && range.start < a.range.end;
            if asks.iter().any(meets) {
                continue;
            }
            let id = self.next;
            self.next += 1;
            let mut bytes = Vec::new();
            for sector in at..at + len {
                self.sectors[sector as usize].since.push(id);
                bytes.extend(stamp(self.number, sector, id));
            }
            asks.push(Ask::write(0, range.start, &bytes));
        }
        asks
    }

    /// Writes and flushes until the server is gone.
    fn run(&mut self, mut client: Client) {
        while self.turn(&mut client).is_ok() {}
    }

    fn turn(&mut self, client: &mut Client) -> io::Result<()> {
        let asks = self.batch();
        for reply in client.try_exchange(&asks)? {
            assert_eq!(reply.error, 0, "{}", reply.text);
        }
        if self.rng.once_in(6) {
            let flushed = client.try_exchange(&[Ask::new(kind::FLUSH, 0, 0..0)])?;
            assert_eq!(flushed[0].error, 0, "{}", flushed[0].text);
            // What was answered before the flush was sent, in its last state.
            for sector in &mut self.sectors {
                if let Some(&last) = sector.since.last() {
                    sector.certain = last;
                    sector.since.clear();
                }
            }
        }
        if self.rng.once_in(40) {
            let at = self.rng.below(REGION - 1);
            let id = self.next;
            self.next += 1;
            self.sectors[at as usize].since.push(id);
            let bytes = stamp(self.number, at, id);
            let write = Ask::write(flag::FUA, self.base() + at * SECTOR, &bytes);
            let done = client.try_exchange(&[write])?;
            assert_eq!(done[0].error, 0, "{}", done[0].text);
            let sector = &mut self.sectors[at as usize];
            sector.certain = id;
            sector.since.clear();
        }
        Ok(())
    }

    /// Compares the region with what it may be; what is seen is certain from then on.
    fn check(&mut self, round: u64, template: &[u8], client: &mut Client) {
        let at = self.base();
        let got = client.read(at, REGION * SECTOR);
        for (i, (bytes, sector)) in got
            .chunks(SECTOR as usize)
            .zip(&mut self.sectors)
            .enumerate()
        {
            let old = &template[at as usize + i * SECTOR as usize..][..SECTOR as usize];
            let is = |id: u64| match id {
                0 => bytes == old,
                id => bytes == stamp(self.number, i as u64, id),
            };
            let found = sector
                .since
                .iter()
                .copied()
                .chain([sector.certain])
                .find(|id| is(*id));
            let Some(found) = found else {
                let id = u64::from_le_bytes(*bytes[16..].first_chunk().unwrap());
                panic!(
                    "kill {round}, writer {}, sector {i}: {id:#x} is neither {} nor one of {:?}",
                    self.number, sector.certain, sector.since
                );
            };
            sector.certain = found;
            sector.since.clear();
        }
    }
}

#[test]
fn what_was_flushed_survives_every_kill() {
    let seed = env("PLOOP_SEED", 1);
    let rig = Rig::new();
    let mut template = vec![0; (WRITERS * REGION * SECTOR) as usize];
    Rng(seed).fill(&mut template);
    // Holes and zeros of all sizes between the data.
    let mut rng = Rng(seed + 1);
    for _ in 0..200 {
        let at = rng.below(template.len() as u64 - (200 << 10)) as usize;
        let len = (rng.below(200) << 10) as usize;
        template[at..at + len].fill(0);
    }
    let raw = rig.path("template.raw");
    fs::write(&raw, &template).unwrap();
    let raw = raw.to_str().unwrap();
    rig.run(["template", "import", "base", raw, "--from", "raw"]);
    rig.run(["create", "ct", "--template", "base"]);
    let mut writers: Vec<Writer> = (0..WRITERS).map(|n| Writer::new(n, seed)).collect();
    for round in 0..env("PLOOP_KILLS", 6) {
        let daemon = Daemon::start(&rig);
        let life = match rng.below(5) {
            // Long enough for clusters to be completed in the background.
            0 => Duration::from_millis(1_200 + rng.below(600)),
            _ => Duration::from_millis(rng.below(250)),
        };
        let end = Instant::now() + life;
        std::thread::scope(|scope| {
            let clients: Vec<Client> = writers
                .iter()
                .map(|_| Client::open(daemon.socket(), "ct", Style::Simple))
                .collect();
            for (writer, client) in writers.iter_mut().zip(clients) {
                scope.spawn(move || writer.run(client));
            }
            std::thread::sleep(end.saturating_duration_since(Instant::now()));
            daemon.kill();
        });
        let daemon = Daemon::start(&rig);
        let mut client = Client::open(daemon.socket(), "ct", Style::Simple);
        for writer in &mut writers {
            writer.check(round, &template, &mut client);
        }
        match rng.once_in(4) {
            true => {
                client.disconnect();
                daemon.stop();
                qemu_check(&rig.top("ct"));
            }
            false => daemon.kill(),
        }
    }
}

/// Goal: clusters that were written in part do not stay so until the next flush. Method: the disks of
/// a service, without its sockets: parts go by themselves, and come back with the next writes.
#[test]
fn parts_are_completed_in_the_background() {
    let rig = Rig::new();
    let raw = rig.path("template.raw");
    let mut template = vec![0; 4 << 20];
    Rng(5).fill(&mut template);
    fs::write(&raw, &template).unwrap();
    let raw = raw.to_str().unwrap();
    rig.run(["template", "import", "base", raw, "--from", "raw"]);
    rig.run(["create", "ct", "--template", "base"]);
    let root = Root::open(rig.root(), true).unwrap();
    let disks = Disks::new(root, false);
    let disk = disks.live("ct").unwrap();
    for round in 0..2u8 {
        let (_, before) = disk.disk().parts();
        for at in (0..4u64 << 20).step_by(256 << 10) {
            let at = at + u64::from(round) * (64 << 10) + 8192;
            disk.write(at, &[round + 1; 4096]).unwrap();
            template[at as usize..][..4096].fill(round + 1);
        }
        assert!(
            disk.disk().parts().1 > before,
            "it was written in whole clusters"
        );
        wait_for("the parts to go", || disk.disk().parts().0 == 0);
    }
    let mut got = vec![0; template.len()];
    disk.read(0, &mut got).unwrap();
    assert!(got == template);
    drop(disk);
    qemu_check(&rig.top("ct"));
}
