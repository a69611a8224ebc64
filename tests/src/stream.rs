//! Disks in stores in memory, sent from one to another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::Result;
use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::open::{DESCRIPTOR, Opener};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, EntryKind, SECTOR, Store};
use snapshots::Root;
use snapshots::limits::Limits;
use snapshots::meta::Meta;
use snapshots::place::Place;
use snapshots::snapshot::{NewSnapshot, take_offline};
use snapshots::stream::{self, ReceiveOptions, Received, SendOptions};
use snapshots::switch::{SwitchOptions, switch};

/// The store's directory on every host.
pub const DIR: &str = "/store";

/// A host with an empty store.
pub fn host() -> (MemoryStore, Root) {
    let store = MemoryStore::new();
    store.create_dir(Path::new(DIR)).unwrap();
    let root = on(Arc::new(store.clone()));
    (store, root)
}

/// The store of a host, as a program that starts now opens it.
pub fn on(store: Arc<dyn Store>) -> Root {
    Root::on(Opener::on(store), Path::new(DIR), true, false).unwrap()
}

/// Makes an empty container of one image, which stands on no template.
pub fn container(root: &Root, name: &str, version: Version, cluster_sectors: u32, size: u64) {
    let store = root.opener().store();
    let dir = root.container(name);
    store.create_dir(&dir).unwrap();
    let header = Header::new(version, cluster_sectors, size / SECTOR).unwrap();
    drop(create(store.as_ref(), &dir.join("root.hds"), &header, 0o600).unwrap());
    let sectors = size / SECTOR;
    let d = Descriptor::new_single(sectors, cluster_sectors, false, Guid::TOP, "root.hds").unwrap();
    let xml = store.create(&dir.join(DESCRIPTOR), 0o600).unwrap();
    xml.write_at(&d.to_xml(), 0).unwrap();
    let meta = Meta {
        id: Some(
            Guid::new_v4()
                .to_string()
                .trim_matches(['{', '}'])
                .to_owned(),
        ),
        quota: Some(77 << 20),
        limits: Limits {
            iops: 500,
            ..Limits::default()
        },
        ..Meta::default()
    };
    meta.write(store.as_ref(), &dir).unwrap();
}

/// Writes to a container.
pub fn write(root: &Root, name: &str, offset: u64, bytes: &[u8]) {
    let disk = Place::container(root, name).unwrap().open().unwrap();
    disk.write(offset, bytes).unwrap();
    disk.close().unwrap();
}

/// Makes a snapshot of it.
pub fn snapshot(root: &Root, name: &str, called: &str) {
    let new = NewSnapshot {
        name: Some(called.to_owned()),
        description: format!("what {called} is for"),
        ..NewSnapshot::default()
    };
    take_offline(&Place::container(root, name).unwrap(), &new).unwrap();
}

/// Goes back to a snapshot; what was there is kept.
pub fn go_back(root: &Root, name: &str, to: &str) {
    let options = SwitchOptions {
        to: to.to_owned(),
        ..SwitchOptions::default()
    };
    switch(&Place::container(root, name).unwrap(), &options).unwrap();
}

/// What a container shows; of a snapshot by its name or GUID.
pub fn shows(root: &Root, name: &str, snapshot: Option<&str>) -> Vec<u8> {
    let place = Place::container(root, name).unwrap();
    let d = place.descriptor().unwrap();
    let node = snapshot.map(|s| place.find(&d, &place.meta().unwrap(), s).unwrap());
    let disk = root
        .opener()
        .open(&place.source(node), &root.open_options(false))
        .unwrap();
    let mut bytes = vec![0; disk.size() as usize];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

/// A container with snapshots `a`, `b` (written to in part, in part with zeros), a branch off `a`,
/// and a state.
pub fn grown(root: &Root, name: &str, version: Version, cluster_sectors: u32) {
    let cluster = u64::from(cluster_sectors) * SECTOR;
    container(root, name, version, cluster_sectors, 8 * cluster);
    write(root, name, 0, &vec![1; cluster as usize]);
    write(root, name, 2 * cluster + 5000, &vec![2; 9000]);
    write(root, name, 5 * cluster, &vec![3; 4096]);
    snapshot(root, name, "a");
    write(root, name, 4096, &[4; 100]);
    write(root, name, 5 * cluster, &vec![0; cluster as usize]);
    snapshot(root, name, "b");
    write(root, name, 7 * cluster, &vec![5; cluster as usize]);
    go_back(root, name, "a");
    write(root, name, 3 * cluster + 4096, &vec![6; 4096]);
    snapshot(root, name, "c");
    write(root, name, 6 * cluster, &[7; 1]);
}

/// The bytes that are sent of a container.
pub fn sent(root: &Root, name: &str, options: &SendOptions) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let place = Place::container(root, name)?;
    stream::send(&place, options, &mut bytes, &|_, _| ())?;
    Ok(bytes)
}

/// The options that send one snapshot.
pub fn state(snapshot: &str) -> SendOptions {
    SendOptions {
        snapshot: Some(snapshot.to_owned()),
        ..SendOptions::default()
    }
}

/// Receives bytes; with `resumable`, what came stays.
pub fn received(root: &Root, name: &str, bytes: &[u8], resumable: bool) -> Result<Received> {
    let options = ReceiveOptions {
        resumable,
        arriving: None,
    };
    stream::receive(root, name, options, &mut { bytes }, &|_, _| ())
}

/// Everything below the store, with its bytes.
pub fn everything(store: &dyn Store) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut all = BTreeMap::new();
    let mut todo = vec![PathBuf::from(DIR)];
    while let Some(path) = todo.pop() {
        if store.kind(&path).unwrap() == Some(EntryKind::Dir) {
            todo.extend(store.list(&path).unwrap().iter().map(|n| path.join(n)));
            all.insert(path, None);
            continue;
        }
        let file = store.open(&path, Access::Read).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        all.insert(path, Some(bytes));
    }
    all
}

/// Where each frame of a stream begins; the last one is its end.
pub fn frames(stream: &[u8]) -> Vec<usize> {
    use snapshots::stream::frame::{HEADER_BYTES, PREAMBLE_BYTES};
    let mut at = PREAMBLE_BYTES;
    let mut found = vec![at];
    while at < stream.len() {
        let len = u32::from_le_bytes(stream[at + 4..at + 8].try_into().unwrap());
        at += HEADER_BYTES + len as usize;
        found.push(at);
    }
    found
}

/// The stream with its images said to be of this version, right in every checksum of a frame.
pub fn of_version(stream: &[u8], version: u32) -> Vec<u8> {
    use snapshots::stream::frame::{HEADER_BYTES, Type, Writer};
    let at = frames(stream);
    let mut bytes = Vec::new();
    let mut writer = Writer::begin(&mut bytes, 0).unwrap();
    for frame in at.windows(2) {
        let (kind, payload) = (stream[frame[0]], &stream[frame[0] + HEADER_BYTES..frame[1]]);
        if kind != Type::Image as u8 {
            writer.raw(kind, payload).unwrap();
            continue;
        }
        let mut record: serde_json::Value = serde_json::from_slice(payload).unwrap();
        record["version"] = version.into();
        writer.raw(kind, record.to_string().as_bytes()).unwrap();
    }
    bytes
}
