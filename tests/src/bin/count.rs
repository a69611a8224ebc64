//! Executes many equal requests in the serving engine over memory, and nothing else: what an
//! instruction counter is run on ([`tests/instructions.rs`]). No socket, no ring, no clock.
//!
//!     count read|write|first-write REQUESTS [bare|tracked]
//!
//! 4 KiB each, 16 in a batch, at random places of a container's disk over a template. `first-write`
//! goes to a cluster that the container does not have yet each time. Guest bytes are not moved: the
//! files have tables, and their data areas are blank ([`Blank`]). The container has no limits; `bare`
//! is an engine that does not even ask whether it has. `tracked` is a disk with one tracker, all of
//! whose regions are announced.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use nbd_server::EngineKind;
use nbd_server::export::{Counted, Counters, Throttle};
use nbd_server::serve::Plane;
use nbd_server::serve::engine::{Engine, Sink};
use nbd_server::session::transmission::Rules;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{Request, kind};
use ploop::Result;
use ploop::chain::Chain;
use ploop::device::Device as _;
use ploop::disk::Disk;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as format, Header, PloopDelta, Version};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, FileId, Store, StoreFile};
use ploop::tracker;
use snapshots::limits::Limits;

const CLUSTER: u64 = 64 << 10;
const BLOCK: u64 = 4 << 10;
const BATCH: u64 = 16;
/// Clusters of the template.
const CLUSTERS: u64 = 1024;

fn main() {
    let mut args = std::env::args().skip(1);
    let what = args.next().unwrap();
    let requests: u64 = args.next().unwrap().parse().unwrap();
    assert!(what != "first-write" || requests <= CLUSTERS);
    let how = args.next().unwrap_or_default();
    let device = disk(what == "write");
    if how == "tracked" {
        let id = tracker::Id::random();
        device
            .start_tracker(id, tracker::GRANULARITY, false)
            .unwrap();
    }
    let style = Style::Structured;
    let counted = Arc::new(Counted::new(device.clone(), Arc::new(Counters::default())));
    let mut engine = Engine::new(counted, Rules::over(device.as_ref(), style));
    if how != "bare" {
        let throttle = Arc::new(Throttle::default());
        let gate = throttle.gate("ct", FileId { dev: 0, ino: 0 }, || Some(Limits::default()));
        engine = engine.behind(gate, &Plane::new(EngineKind::Inline));
    }
    let (mut input, mut output) = (Vec::new(), Nowhere(0));
    let mut place = 1u64;
    for batch in 0..requests / BATCH {
        input.clear();
        for i in 0..BATCH {
            // A full period over all clusters, so that each comes once in a round.
            place = (place * 5 + 1) % CLUSTERS;
            let (kind, payload) = match what.as_str() {
                "read" => (kind::READ, &[][..]),
                _ => (kind::WRITE, &[7; BLOCK as usize][..]),
            };
            let request = Request {
                flags: 0,
                kind,
                cookie: i,
                offset: place * CLUSTER + (batch % 16) * BLOCK,
                length: BLOCK,
            };
            request.emit(style, &mut input);
            input.extend_from_slice(payload);
        }
        engine.run(&input, &mut output).unwrap();
    }
    assert!(output.0 >= requests * 16);
}

/// Counts the bytes of answers.
struct Nowhere(u64);

impl Sink for Nowhere {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0 += bytes.len() as u64;
        Ok(())
    }
}

/// A container over a full template; with `written`, it has all of its clusters itself.
fn disk(written: bool) -> Arc<Disk> {
    let store = MemoryStore::new();
    let header = Header::new(Version::V2, 128, CLUSTERS * 128).unwrap();
    for name in ["/template", "/top"] {
        format::create(&store, Path::new(name), &header, 0o600).unwrap();
    }
    let file = |name, access| -> Arc<dyn StoreFile> {
        let file = store.open(Path::new(name), access).unwrap();
        Arc::new(Blank { inner: file })
    };
    let open = |name, below| {
        let top = Top::open(file(name, Access::Write)).unwrap();
        Disk::writable(below, top, None).unwrap()
    };
    let fill = |disk: &Disk| {
        let bytes = vec![9; CLUSTER as usize];
        for k in 0..CLUSTERS {
            disk.write(k * CLUSTER, &bytes).unwrap();
        }
    };
    let template = open("/template", None);
    fill(&template);
    template.close().unwrap();
    let template = file("/template", Access::Read);
    let delta = Arc::new(PloopDelta::open(template).unwrap());
    let disk = open("/top", Some(Arc::new(Chain::new(vec![delta]).unwrap())));
    if written {
        fill(&disk);
    }
    Arc::new(disk)
}

/// A file of tables only: behind the first cluster nothing is read or written.
#[derive(Debug)]
struct Blank {
    inner: Arc<dyn StoreFile>,
}

impl StoreFile for Blank {
    ploop::delegate! { path, id, len, set_len }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        match offset < CLUSTER {
            true => self.inner.read_at(buf, offset),
            false => Ok(buf.len()),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        match offset < CLUSTER {
            true => self.inner.write_at(buf, offset),
            false => Ok(()),
        }
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn punch(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn reserve(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn set_mode(&self, _: u32) -> Result<()> {
        Ok(())
    }

    fn next_data(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        Ok((from < to).then_some(from..to))
    }

    fn lock_bytes(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn unlock_bytes(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn foreign_lock(&self, _: u64, _: u64) -> Result<bool> {
        Ok(false)
    }
}
