//! A disk in memory, with snapshots.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::open::{Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, SECTOR, Store};
use ploop::{Error, Result};
use snapshots::place::Place;
use snapshots::snapshot::{NewSnapshot, take_offline};

/// Sectors of a cluster: 32 KiB, the smallest.
pub(crate) const CLUSTER_SECTORS: u32 = 64;
/// Bytes of a cluster.
pub(crate) const CLUSTER: u64 = CLUSTER_SECTORS as u64 * SECTOR;
/// Clusters of a disk.
pub(crate) const CLUSTERS: u64 = 6;
/// The disk's directory.
pub(crate) const DIR: &str = "/d";

/// Held by tests on files: a process that one of them starts holds the locks of the others for an
/// instant.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static FILES: Mutex<()> = Mutex::new(());
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A program that has a disk's host in front of it.
pub(crate) struct Host {
    pub(crate) opener: Opener,
    dir: String,
}

impl Host {
    pub(crate) fn on(store: Arc<dyn Store>) -> Host {
        Host::at(store, DIR)
    }

    pub(crate) fn at(store: Arc<dyn Store>, dir: &str) -> Host {
        Host {
            opener: Opener::on(store),
            dir: dir.to_owned(),
        }
    }

    /// A program that starts after a crash.
    pub(crate) fn after(state: &MemoryStore) -> Host {
        Host::on(Arc::new(state.clone()))
    }

    pub(crate) fn store(&self) -> &dyn Store {
        self.opener.store().as_ref()
    }

    /// Makes an empty disk.
    pub(crate) fn init(&self, version: Version) {
        self.init_of(version, CLUSTERS);
    }

    /// Makes an empty disk of so many clusters.
    pub(crate) fn init_of(&self, version: Version, clusters: u64) {
        let size = clusters * u64::from(CLUSTER_SECTORS);
        let header = Header::new(version, CLUSTER_SECTORS, size).unwrap();
        let dir = Path::new(&self.dir);
        self.store().create_dir(dir).unwrap();
        drop(create(self.store(), &dir.join("root.hds"), &header, 0o600).unwrap());
        let d = Descriptor::new_single(size, CLUSTER_SECTORS, false, Guid::TOP, "root.hds");
        self.put(&d.unwrap());
        let above = dir.parent().unwrap();
        self.store().sync_dir(dir).unwrap();
        self.store().sync_dir(above).unwrap();
    }

    /// Makes a disk that is one raw image of zeros.
    pub(crate) fn init_raw(&self, bytes: u64) {
        let dir = Path::new(&self.dir);
        self.store().create_dir(dir).unwrap();
        let raw = self.store().create(&dir.join("root.hds"), 0o600).unwrap();
        raw.set_len(bytes).unwrap();
        let sectors = bytes / SECTOR;
        let d = Descriptor::new_single(sectors, CLUSTER_SECTORS, true, Guid::TOP, "root.hds");
        self.put(&d.unwrap());
    }

    /// Writes the descriptor as it is.
    pub(crate) fn put(&self, d: &Descriptor) {
        let path = Path::new(&self.dir).join("DiskDescriptor.xml");
        if self.store().kind(&path).unwrap().is_some() {
            self.store().remove_file(&path).unwrap();
        }
        let file = self.store().create(&path, 0o600).unwrap();
        file.write_at(&d.to_xml(), 0).unwrap();
        file.sync().unwrap();
    }

    pub(crate) fn place(&self) -> Place<'_> {
        self.try_place().unwrap()
    }

    pub(crate) fn try_place(&self) -> Result<Place<'_>> {
        let source = Source {
            path: Path::new(&self.dir).join("DiskDescriptor.xml"),
            descriptor: true,
            snapshot: None,
        };
        Place::disk(&self.opener, &source, &[], false)
    }

    /// Writes `len` bytes of `byte`, durably.
    pub(crate) fn write(&self, offset: u64, len: u64, byte: u8) {
        let disk = self.place().open().unwrap();
        disk.write(offset, &vec![byte; len as usize]).unwrap();
        disk.close().unwrap();
    }

    /// Opens the disk for writing, writes, flushes, and is killed.
    pub(crate) fn write_and_die(&self, offset: u64, len: u64, byte: u8) {
        let disk = self.place().open().unwrap();
        disk.write(offset, &vec![byte; len as usize]).unwrap();
        disk.flush().unwrap();
    }

    pub(crate) fn snap(&self, name: &str) -> Guid {
        let new = NewSnapshot {
            name: Some(name.to_owned()),
            ..NewSnapshot::default()
        };
        let taken = take_offline(&self.place(), &new).unwrap();
        Guid::parse(&taken.guid).unwrap()
    }

    /// All bytes that a node, or the top, shows.
    pub(crate) fn shows(&self, node: Option<Guid>) -> Result<Vec<u8>> {
        let place = self.place();
        let disk = self
            .opener
            .open(&place.source(node), &place.open_options(false))?;
        let mut bytes = vec![0; disk.size() as usize];
        disk.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// The names in the disk's directory, its side room left out.
    pub(crate) fn files(&self) -> Vec<String> {
        let names = self.store().list(Path::new(&self.dir)).unwrap();
        names
            .iter()
            .map(|n| n.to_string_lossy().into_owned())
            .filter(|n| n != ".ploop")
            .collect()
    }

    /// The names that the descriptor needs, itself among them.
    pub(crate) fn named(&self) -> Vec<String> {
        let d = self.place().descriptor().unwrap();
        let mut all: Vec<String> = d.images.into_iter().map(|i| i.file).collect();
        all.push("DiskDescriptor.xml".into());
        all.sort();
        all
    }

    /// What the check of each image of the descriptor finds.
    pub(crate) fn findings(&self) -> Result<Vec<String>> {
        let place = self.place();
        let mut all = Vec::new();
        let d = place.descriptor()?;
        for image in &d.images {
            let file = self.store().open(&place.file_of(image)?, Access::Read)?;
            if d.base_is_raw() && image.kind == ploop::descriptor::ImageKind::Plain {
                continue;
            }
            let scan = ploop::verify::scan_image(file.as_ref())?;
            all.extend(scan.findings.into_iter().map(|f| f.what));
        }
        Ok(all)
    }
}

/// The kind of an error that must be there.
pub(crate) fn kind<T>(result: Result<T>) -> ploop::Kind {
    match result {
        Ok(_) => panic!("succeeded"),
        Err(e) => Error::kind(&e),
    }
}
