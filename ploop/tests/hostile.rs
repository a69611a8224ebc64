//! Disks made to hurt: numbers that no file backs, and links that lead elsewhere.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use ploop::Kind;
use ploop::chain::Chain;
use ploop::device::{Device, Extent};
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::format::ploop::{Header, PloopDelta, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, RealStore, Store};
use ploop::verify::scan_image;

/// An image of `len` bytes with a v2 header whose fields are then set by `poke` (offset, bytes).
fn image(store: &MemoryStore, version: Version, len: u64, poke: &[(u64, &[u8])]) {
    let header = Header::new(version, 64, 64).unwrap();
    let file = create(store, Path::new("/i"), &header, 0o600).unwrap();
    for (at, bytes) in poke {
        file.write_at(bytes, *at).unwrap();
    }
    file.set_len(len).unwrap();
}

// Goal: memory and time follow the table that is in the file, not the size that the header claims.
#[test]
fn a_huge_size_over_an_empty_table_costs_nothing_and_reads_as_zeros() {
    let store = MemoryStore::new();
    let sectors = ((1u64 << 54) - 1).to_le_bytes();
    let one_sector = 1u32.to_le_bytes();
    let none = 0u32.to_le_bytes();
    for cluster in [None, Some((28, one_sector.as_slice()))] {
        let mut poke: Vec<(u64, &[u8])> = vec![(32, &none), (36, &sectors)];
        poke.extend(cluster);
        store.remove_file(Path::new("/i")).ok();
        image(&store, Version::V2, 32_768, &poke);
        let file = store.open(Path::new("/i"), Access::Read).unwrap();
        let delta = PloopDelta::open(file).unwrap();
        let disk = Disk::sealed(Arc::new(Chain::new(vec![Arc::new(delta)]).unwrap()));
        let size = ((1 << 54) - 1) * 512;
        assert_eq!(disk.size(), size);
        let mut extents = Vec::new();
        disk.allocation(0..size, 16, &mut extents).unwrap();
        let hole = Extent {
            len: size,
            hole: true,
            zero: true,
        };
        assert_eq!(extents, [hole]);
        let mut end = [1; 4096];
        disk.read(size - 4096, &mut end).unwrap();
        assert_eq!(end, [0; 4096]);
    }
}

// Goal: an entry that means a file offset past what a map entry can hold is damage, not other bytes.
#[test]
fn an_entry_beyond_the_end_of_the_file_is_a_fault_whatever_it_means() {
    let store = MemoryStore::new();
    let entry = u32::MAX.to_le_bytes();
    image(&store, Version::V2, 65_536, &[(64, &entry)]);
    let file = store.open(Path::new("/i"), Access::Read).unwrap();
    let delta = PloopDelta::open(file).unwrap();
    let disk = Disk::sealed(Arc::new(Chain::new(vec![Arc::new(delta)]).unwrap()));
    let e = disk.read(0, &mut [0; 512]).unwrap_err();
    assert_eq!((e.kind(), e.offset()), (Kind::Corrupt, Some(64)), "{e}");
}

// Goal: the check does not stumble over the one layout whose data area may begin past the file.
#[test]
fn a_v1_image_that_ends_behind_its_table_is_checked() {
    let store = MemoryStore::new();
    image(&store, Version::V1, 68, &[(48, &0u32.to_le_bytes())]);
    let file = store.open(Path::new("/i"), Access::Read).unwrap();
    scan_image(file.as_ref()).unwrap();
}

// Goal: a disk directory from a stranger cannot make us read another customer's disk.
#[test]
fn a_descriptor_that_is_a_link_to_another_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (theirs, upload) = (dir.path().join("theirs"), dir.path().join("upload"));
    fs::create_dir(&theirs).unwrap();
    fs::create_dir(&upload).unwrap();
    let header = Header::new(Version::V2, 64, 64).unwrap();
    drop(create(&RealStore, &theirs.join("root.hds"), &header, 0o600).unwrap());
    let top = ploop::descriptor::Guid::TOP;
    let d = ploop::descriptor::Descriptor::new_single(64, 64, false, top, "root.hds").unwrap();
    fs::write(theirs.join("DiskDescriptor.xml"), d.to_xml()).unwrap();
    symlink(
        theirs.join("DiskDescriptor.xml"),
        upload.join("DiskDescriptor.xml"),
    )
    .unwrap();
    let opener = Opener::host();
    let open = |text: &Path| {
        let source = Source::parse(opener.store().as_ref(), text.to_str().unwrap())?;
        opener.open(&source, &OpenOptions::default())
    };
    open(&theirs).unwrap();
    for name in [upload.clone(), upload.join("DiskDescriptor.xml")] {
        assert_eq!(
            open(&name).unwrap_err().kind(),
            Kind::Permission,
            "{}",
            name.display()
        );
    }
}
