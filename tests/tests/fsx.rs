//! Random operations through NBD against a model, a million by default.
//!
//! Most run in this process: the engine that ships, fed with request bytes, over a disk on a store
//! in memory. The rest go through the sockets of a real server. `PLOOP_OPS` sets the number of
//! operations of each test, `PLOOP_SEED` the seed; a failure prints both.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbd_server::wire::reply::Style;
use ploop::chain::Chain;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::Delta;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as format, Header, PloopDelta, Version};
use ploop::format::raw::RawDelta;
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, RealStore, Store};
use ploop::verify::{Class, class_of, scan_image};
use ploop_tests::client::Client;
use ploop_tests::fsx::{Fsx, InProcess, Link, Rng, env};
use ploop_tests::server::{Bare, qemu_check, qemu_compare};
use ploop_tests::store::{Rig, Server};

const CLUSTER: u64 = 32 << 10;
const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

/// What lies below the top.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Below {
    Nothing,
    /// A raw template.
    Raw,
    /// Two sealed ploop deltas.
    Ploop,
}

/// A disk in a directory of a store: a top, and what is sealed below it, base first.
struct Shelf {
    store: Arc<dyn Store>,
    dir: PathBuf,
    version: Version,
    sealed: Vec<(PathBuf, bool)>,
}

impl Shelf {
    /// Makes the top and what is below; returns also the bytes that the guest sees.
    fn new(
        store: Arc<dyn Store>,
        dir: &Path,
        version: Version,
        below: Below,
        rng: &mut Rng,
    ) -> (Shelf, Vec<u8>) {
        let clusters = 48 + rng.below(16);
        let dir = dir.to_path_buf();
        let mut shelf = Shelf {
            store,
            dir,
            version,
            sealed: Vec::new(),
        };
        let mut bytes = vec![0; (clusters * CLUSTER) as usize];
        // What is below may be smaller; then the end reads as zeros.
        let smaller = clusters - rng.below(6);
        match below {
            Below::Nothing => {}
            Below::Raw => shelf.raw_base(smaller, rng, &mut bytes),
            Below::Ploop => {
                shelf.ploop_layer("base", smaller, rng, &mut bytes);
                shelf.ploop_layer("middle", clusters, rng, &mut bytes);
            }
        }
        shelf.create("top", clusters);
        (shelf, bytes)
    }

    fn create(&self, name: &str, clusters: u64) {
        let sectors = CLUSTER / 512;
        let header = Header::new(self.version, sectors as u32, clusters * sectors).unwrap();
        format::create(self.store.as_ref(), &self.dir.join(name), &header, 0o600).unwrap();
    }

    fn raw_base(&mut self, clusters: u64, rng: &mut Rng, bytes: &mut [u8]) {
        let part = &mut bytes[..(clusters * CLUSTER) as usize];
        some_data(rng, part);
        let file = self
            .store
            .create(&self.dir.join("base.raw"), 0o600)
            .unwrap();
        file.write_at(part, 0).unwrap();
        self.sealed.push((self.dir.join("base.raw"), true));
    }

    fn ploop_layer(&mut self, name: &str, clusters: u64, rng: &mut Rng, bytes: &mut [u8]) {
        self.create(name, clusters);
        let disk = self.open_as(name);
        let size = clusters * CLUSTER;
        for _ in 0..clusters / 3 {
            let at = rng.below(size);
            let end = size.min(at + 1 + rng.below(2 * CLUSTER));
            let part = &mut bytes[at as usize..end as usize];
            some_data(rng, part);
            disk.write(at, part).unwrap();
        }
        disk.close().unwrap();
        self.sealed.push((self.dir.join(name), false));
    }

    fn open(&self) -> Disk {
        self.open_as("top")
    }

    /// Opens an image for writing, over everything that is sealed.
    fn open_as(&self, name: &str) -> Disk {
        let delta = |(path, raw): &(PathBuf, bool)| -> Arc<dyn Delta> {
            let file = self.store.open(path, Access::Read).unwrap();
            match raw {
                true => Arc::new(RawDelta::with_cluster(file, CLUSTER).unwrap()),
                false => Arc::new(PloopDelta::open(file).unwrap()),
            }
        };
        let deltas: Vec<_> = self.sealed.iter().map(delta).collect();
        let chain = (!deltas.is_empty()).then(|| Arc::new(Chain::new(deltas).unwrap()));
        let file = self
            .store
            .open(&self.dir.join(name), Access::Write)
            .unwrap();
        Disk::writable(chain, Top::open(file).unwrap(), None).unwrap()
    }

    /// The closed top is clean, and no larger than its clusters.
    fn check(&self) {
        let file = self
            .store
            .open(&self.dir.join("top"), Access::Read)
            .unwrap();
        let scan = scan_image(file.as_ref()).unwrap();
        assert!(
            class_of(&scan.findings) == Class::Clean,
            "{:?}",
            scan.findings
        );
        let used = scan.header.data_start + scan.used.count() * CLUSTER;
        assert_eq!(file.len().unwrap(), used, "no space is lost");
    }
}

/// Fills about half of `part`, in pieces, with random bytes; some of them zeros.
fn some_data(rng: &mut Rng, part: &mut [u8]) {
    for piece in part.chunks_mut(6000) {
        match rng.below(4) {
            0 | 1 => rng.fill(piece),
            2 => piece.fill(0),
            _ => {}
        }
    }
}

/// The operations of one test, divided among the styles.
fn in_process(version: Version, below: Below, ops: u64, real: bool) {
    let seed = env(
        "PLOOP_SEED",
        1 + version.number() as u64 * 10 + below as u64,
    );
    let ops = env("PLOOP_OPS", ops) / STYLES.len() as u64;
    let dir = tempfile::tempdir().unwrap();
    for style in STYLES {
        let mut rng = Rng(seed);
        let room = dir.path().join(format!("{style:?}"));
        let store: Arc<dyn Store> = match real {
            true => RealStore::shared(),
            false => MemoryStore::shared(),
        };
        let room = if real { room.as_path() } else { Path::new("/") };
        if real {
            std::fs::create_dir(room).unwrap();
        }
        let (shelf, bytes) = Shelf::new(store, room, version, below, &mut rng);
        let mut fsx = Fsx::new(seed, bytes, CLUSTER);
        let mut disk = Arc::new(shelf.open());
        // Two sessions on one disk: what one wrote, the other reads.
        let sessions = |disk: &Arc<Disk>| -> [InProcess; 2] {
            [1, 2].map(|n| InProcess::new(disk.clone(), style, seed + n))
        };
        let mut links = sessions(&disk);
        while fsx.done < ops {
            let turn = fsx.rng().below(2) as usize;
            fsx.step(&mut links[turn]);
            if fsx.rng().once_in(4000) {
                fsx.check_all(&mut links[0]);
                drop(links);
                disk.close().unwrap();
                shelf.check();
                disk = Arc::new(shelf.open());
                links = sessions(&disk);
                fsx.check_all(&mut links[1]);
            } else if fsx.rng().once_in(4000) {
                // A crash of ours alone: what was answered is in the page cache, and the next open
                // needs no help. The entries of unflushed clusters are lost, so flush first.
                disk.flush().unwrap();
                drop(links);
                drop(disk);
                disk = Arc::new(shelf.open());
                links = sessions(&disk);
                fsx.check_all(&mut links[0]);
            }
        }
        fsx.check_all(&mut links[0]);
        drop(links);
        disk.close().unwrap();
        shelf.check();
    }
}

/// Operations of each test in this process; together with the rest, a million.
const OPS: u64 = 225_000;

#[test]
fn a_bare_v2_image() {
    in_process(Version::V2, Below::Nothing, OPS, false);
}

#[test]
fn a_bare_v1_image() {
    in_process(Version::V1, Below::Nothing, OPS, false);
}

#[test]
fn a_top_over_a_raw_template() {
    in_process(Version::V2, Below::Raw, OPS, false);
}

#[test]
fn a_top_over_two_layers() {
    in_process(Version::V2, Below::Ploop, OPS, false);
}

#[test]
fn a_top_over_two_layers_on_real_files() {
    in_process(Version::V2, Below::Ploop, 30_000, true);
}

/// Connections of every style to one export, in turns; the server is restarted now and then, half
/// of the times by SIGKILL after a flush.
fn through_sockets(seed: u64, bytes: Vec<u8>, export: &str, serve: &dyn Fn() -> Server) -> Vec<u8> {
    let seed = env("PLOOP_SEED", seed);
    let ops = env("PLOOP_OPS", 40_000);
    let mut fsx = Fsx::new(seed, bytes, 64 << 10);
    while fsx.done < ops {
        let server = serve();
        let mut links: Vec<Client> = STYLES
            .iter()
            .map(|s| Client::open(server.socket(), export, *s))
            .collect();
        fsx.check_all(&mut links[0]);
        let until = ops.min(fsx.done + ops / 6);
        while fsx.done < until {
            let turn = fsx.rng().below(STYLES.len() as u64) as usize;
            fsx.step(&mut links[turn]);
            if fsx.rng().once_in(500) {
                let style = links[turn].style();
                let gone = std::mem::replace(
                    &mut links[turn],
                    Client::open(server.socket(), export, style),
                );
                gone.disconnect();
            }
        }
        if fsx.done >= ops || fsx.rng().once_in(2) {
            fsx.check_all(&mut links[1]);
            server.stop();
        } else {
            links[2].flush();
            drop(server);
        }
    }
    fsx.model.clone()
}

#[test]
fn a_bare_image_through_sockets() {
    let bare = Bare::new("16M", &["-b", "128"]);
    let bytes = vec![0; 16 << 20];
    let model = through_sockets(31, bytes, "root", &|| bare.serve(&[]));
    qemu_check(bare.image());
    std::fs::write(bare.path("model"), model).unwrap();
    qemu_compare("parallels", bare.image(), &bare.path("model"));
}

#[test]
fn a_container_through_sockets() {
    let rig = Rig::new();
    let mut bytes = vec![0; 16 << 20];
    some_data(&mut Rng(5), &mut bytes);
    std::fs::write(rig.path("template.raw"), &bytes).unwrap();
    rig.run(["template", "import", "t", &rig.arg("template.raw")]);
    rig.run(["create", "ct", "--template", "t"]);
    let model = through_sockets(32, bytes, "ct", &|| rig.serve(["--store"]));
    qemu_check(&rig.top("ct"));
    rig.run(["convert", "ct", &rig.arg("whole.raw"), "--to", "raw"]);
    std::fs::write(rig.path("model"), model).unwrap();
    qemu_compare("raw", &rig.path("whole.raw"), &rig.path("model"));
}
