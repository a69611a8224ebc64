//! Disks with trees, what each node of them reads, and what is done to them.
//!
//! | plan | the tree before |
//! |---|---|
//! | `levels` | snapshots one above the other, the first on the base, then the top |
//! | `aside` | the last of them, and what the top was, hang on a side branch |
//! | `raw` | the base is a raw image |
//! | `shared` | a container on a template's layer, whose last snapshot another was cloned from |
//!
//! Names are those of snapshots. Sector numbers of the second disk of a group begin where those of
//! the first end, so that one history tells about both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::Result;
use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use snapshots::place::Place;
use snapshots::snapshot::{NewSnapshot, take_offline};
use snapshots::switch::{SwitchOptions, switch};
use snapshots::{Root, clone};

use super::fixture::words_of;
use super::history::payload;
use super::tree::{self, Operation};
use super::{CLUSTER_SECTORS, SECTOR};

/// Clusters of most disks.
pub const CLUSTERS: u64 = 8;
/// The container that `shared` is about.
const CONTAINER: &str = "src";
/// "Operation" that wrote the first level; the next has the next number.
const LEVEL: u64 = 0xFFFF_0100;
/// "Operation" that wrote a raw base.
const RAW_BASE: u64 = 0xFFFF_0200;

/// One thing that is done to the disks of a scene.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A snapshot of all disks at one instant.
    Create(&'static str),
    /// The deletion of a snapshot of the first disk: its commit, and no more.
    Delete(&'static str),
    /// Whatever deletions left to do, a cluster at a time (true) or as much as goes at once. Pauses
    /// once in the middle.
    Run(bool),
}

/// How the disks are made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// For reports.
    pub name: &'static str,
    /// Of all images.
    pub version: Version,
    /// Names of snapshots and the clusters written before each.
    pub levels: Vec<(&'static str, Vec<u64>)>,
    /// Clusters written after the last of them.
    pub top: Vec<u64>,
    /// The level that the disk was switched to then. What it showed is named `kept`.
    pub aside: Option<&'static str>,
    /// The base is a raw image.
    pub raw: bool,
    /// A container on a shared layer.
    pub shared: bool,
    /// Disks.
    pub disks: usize,
    /// Clusters of each; a container has those of its template.
    pub clusters: u64,
    /// What is done.
    pub ops: Vec<Op>,
}

/// See the module text.
#[derive(Clone, Debug)]
pub struct Scene {
    /// How it was made.
    pub plan: Plan,
    /// What is there at the start, all durable.
    pub start: MemoryStore,
    /// What the disks show, one after the other.
    pub initial: Vec<u64>,
    /// What each snapshot of each disk reads.
    pub contents: BTreeMap<(usize, String), Vec<u64>>,
    /// Sectors of each disk.
    pub sectors: u64,
}

/// A program with the scene's disks in front of it.
#[derive(Debug)]
pub struct Host {
    opener: Option<Opener>,
    root: Option<Root>,
}

impl Host {
    /// On a disk directory, or a store of containers.
    pub fn on(store: Arc<dyn Store>, shared: bool) -> Result<Host> {
        Ok(match shared {
            true => Host {
                opener: None,
                root: Some(tree::open(store)?),
            },
            false => Host {
                opener: Some(Opener::on(store)),
                root: None,
            },
        })
    }

    /// The place of disk `k`.
    pub fn place(&self, k: usize) -> Result<Place<'_>> {
        match (&self.root, &self.opener) {
            (Some(root), _) => Place::container(root, CONTAINER),
            (None, Some(opener)) => {
                let source = Source {
                    path: dir(k).join(DESCRIPTOR),
                    descriptor: true,
                    snapshot: None,
                };
                Place::disk(opener, &source, &[], false)
            }
            (None, None) => unreachable!("a host has one of them"),
        }
    }

    /// What a node of disk `k`, or its top, reads.
    pub fn reads(
        &self,
        k: usize,
        node: Option<Guid>,
    ) -> std::result::Result<Vec<u64>, ploop::Error> {
        let place = self.place(k)?;
        let opened = place
            .opener()
            .open(&place.source(node), &place.open_options(false))?;
        words_of(&opened).map_err(|e| ploop::Error::corrupt(e).on(place.dir()))
    }

    /// What the clone of the shared snapshot reads.
    pub fn clone_reads(&self) -> std::result::Result<Option<Vec<u64>>, String> {
        let Some(root) = &self.root else {
            return Ok(None);
        };
        let source = Source {
            path: root.container("clone").join(DESCRIPTOR),
            descriptor: true,
            snapshot: None,
        };
        let disk = root.opener().open(&source, &root.open_options(false));
        words_of(&disk.map_err(|e| e.to_string())?).map(Some)
    }
}

/// The directory of disk `k`.
fn dir(k: usize) -> PathBuf {
    PathBuf::from(format!("/disk{k}"))
}

impl Plan {
    /// A chain of that many levels under a top, without anything to do.
    pub fn chain(name: &'static str, levels: &[(&'static str, &[u64])], top: &[u64]) -> Plan {
        Plan {
            name,
            version: Version::V2,
            levels: levels.iter().map(|(n, c)| (*n, c.to_vec())).collect(),
            top: top.to_vec(),
            aside: None,
            raw: false,
            shared: false,
            disks: 1,
            clusters: CLUSTERS,
            ops: Vec::new(),
        }
    }

    /// The same, and this is done.
    #[must_use]
    pub fn does(mut self, ops: &[Op]) -> Plan {
        self.ops = ops.to_vec();
        self
    }

    /// A single disk that is one raw image.
    pub fn is_bare_raw(&self) -> bool {
        self.raw && self.levels.is_empty()
    }

    /// Makes it.
    pub fn build(&self) -> Scene {
        let store = MemoryStore::new();
        match self.shared {
            true => found(&store),
            false => (0..self.disks).for_each(|k| self.init(&store, k)),
        }
        let mut contents = BTreeMap::new();
        let mut initial = Vec::new();
        for k in 0..self.disks {
            let host = Host::on(Arc::new(store.clone()), self.shared).unwrap();
            let place = host.place(k).unwrap();
            let sectors = self.sectors();
            for (n, (name, clusters)) in (0..).zip(&self.levels) {
                write_level(&place, LEVEL + n, clusters, k as u64 * sectors);
                contents.insert((k, (*name).into()), host.reads(k, None).unwrap());
                let new = NewSnapshot {
                    name: Some((*name).into()),
                    ..NewSnapshot::default()
                };
                take_offline(&place, &new).unwrap();
            }
            let top = LEVEL + self.levels.len() as u64;
            write_level(&place, top, &self.top, k as u64 * sectors);
            if let Some(to) = self.aside {
                contents.insert((k, "kept".into()), host.reads(k, None).unwrap());
                let options = SwitchOptions {
                    to: to.into(),
                    discard: false,
                    keep_as: Some("kept".into()),
                };
                switch(&place, &options).unwrap();
                write_level(&place, top + 1, &[1, 5], k as u64 * sectors);
            }
            if let Some(root) = &host.root {
                clone_last(root, self.levels.last().unwrap().0);
            }
            // Without what an operation that is done leaves to the next one.
            place.sweep().unwrap();
            initial.extend(host.reads(k, None).unwrap());
        }
        Scene {
            sectors: self.sectors(),
            plan: self.clone(),
            start: store,
            initial,
            contents,
        }
    }

    fn sectors(&self) -> u64 {
        match self.shared {
            true => 3 * CLUSTER_SECTORS,
            false => self.clusters * CLUSTER_SECTORS,
        }
    }

    fn init(&self, store: &MemoryStore, k: usize) {
        let dir = dir(k);
        let sectors = self.sectors();
        let cluster = CLUSTER_SECTORS as u32;
        store.create_dir(&dir).unwrap();
        match self.raw {
            true => {
                let raw = store.create(&dir.join("root.hds"), 0o600).unwrap();
                raw.set_len(sectors * SECTOR).unwrap();
                for first in [3, 2 * CLUSTER_SECTORS, 5 * CLUSTER_SECTORS + 60] {
                    let bytes = payload(RAW_BASE, first..first + 5);
                    raw.write_at(&bytes, first * SECTOR).unwrap();
                }
            }
            false => {
                let header = Header::new(self.version, cluster, sectors).unwrap();
                drop(create(store, &dir.join("root.hds"), &header, 0o600).unwrap());
            }
        }
        let d = Descriptor::new_single(sectors, cluster, self.raw, Guid::TOP, "root.hds").unwrap();
        let file = store.create(&dir.join(DESCRIPTOR), 0o600).unwrap();
        file.write_at(&d.to_xml(), 0).unwrap();
    }
}

/// A store with a template and a container of it.
fn found(store: &MemoryStore) {
    let start = tree::start();
    copy(&start, store, Path::new("/"));
    let root = tree::open(Arc::new(store.clone())).unwrap();
    tree::perform(&root, Operation::Import).unwrap();
    tree::perform(&root, Operation::Create(CONTAINER)).unwrap();
}

fn copy(from: &MemoryStore, to: &MemoryStore, dir: &Path) {
    for name in from.list(dir).unwrap() {
        let path = dir.join(name);
        if from.kind(&path).unwrap() == Some(ploop::store::EntryKind::Dir) {
            to.create_dir(&path).unwrap();
            copy(from, to, &path);
            continue;
        }
        let file = from.open(&path, ploop::store::Access::Read).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        to.create(&path, 0o600)
            .unwrap()
            .write_at(&bytes, 0)
            .unwrap();
    }
}

fn clone_last(root: &Root, snapshot: &str) {
    let from = clone::CloneSource::Snapshot {
        container: CONTAINER.into(),
        snapshot: snapshot.into(),
    };
    let options = clone::CreateOptions::default();
    let durable = clone::Durable::OneByOne;
    let names = ["clone".to_owned()];
    clone::create_containers_by(root, &names, &from, &options, durable, &|_, _| ()).unwrap();
}

/// A few sectors of each cluster, another place in each level.
fn write_level(place: &Place<'_>, id: u64, clusters: &[u64], first: u64) {
    if clusters.is_empty() {
        return;
    }
    let d = place.descriptor().unwrap();
    if d.base_is_raw() && d.images.len() == 1 {
        return;
    }
    let disk: Disk = place.open().unwrap();
    for cluster in clusters {
        let at = cluster * CLUSTER_SECTORS + (id - LEVEL) * 3;
        let bytes = payload(id, first + at..first + at + 5);
        disk.write(at * SECTOR, &bytes).unwrap();
    }
    disk.close().unwrap();
}
