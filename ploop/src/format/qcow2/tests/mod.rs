//! Images made by hand and by `qemu-img`, whole and damaged, through the public interface.

mod audit;
mod chains;
mod damage;
mod valid;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::store::{Access, RealStore, Store};

/// Clusters of the image made by hand: 512 bytes, the smallest, so that a test can afford to
/// damage every byte of it.
const CLUSTER: usize = 512;
const L1: usize = 3 * CLUSTER;
const L2: [usize; 2] = [4 * CLUSTER, 5 * CLUSTER];
const DATA: usize = 6 * CLUSTER;
const PACKED: usize = 8 * CLUSTER + 100;
/// Guest bytes: one L2 table stands for 64 clusters, so this needs two.
const SIZE: u64 = 70 * CLUSTER as u64;
const COPIED: u64 = 1 << 63;

/// A directory with one image in it.
struct Image {
    dir: tempfile::TempDir,
    bytes: Vec<u8>,
}

impl Image {
    /// Guest clusters 0 and 64 plain, 1 compressed, 2 zero, the rest unallocated.
    fn new() -> Image {
        let dir = tempfile::tempdir().unwrap();
        let mut image = Image {
            dir,
            bytes: vec![0; 10 * CLUSTER],
        };
        image.bytes[..4].copy_from_slice(b"QFI\xfb");
        image
            .be32(4, 3)
            .be32(20, 9)
            .be64(24, SIZE)
            .be32(36, 2)
            .be64(40, L1 as u64);
        image
            .be64(48, CLUSTER as u64)
            .be32(56, 1)
            .be32(96, 4)
            .be32(100, 104);
        image.be64(CLUSTER, 2 * CLUSTER as u64);
        image
            .be64(L1, COPIED | L2[0] as u64)
            .be64(L1 + 8, COPIED | L2[1] as u64);
        image.be64(L2[0], COPIED | DATA as u64).be64(L2[0] + 16, 1);
        image.be64(L2[1], COPIED | (DATA + CLUSTER) as u64);
        image.bytes[DATA..DATA + CLUSTER].fill(0xa1);
        image.bytes[DATA + CLUSTER..DATA + 2 * CLUSTER].fill(0xb2);
        image.packed(&stored(true, &[0xc3; CLUSTER]));
        image
    }

    /// Makes guest cluster 1 of `stream`.
    fn packed(&mut self, stream: &[u8]) {
        self.bytes[PACKED..PACKED + stream.len()].copy_from_slice(stream);
        self.be64(L2[0] + 8, 1 << 62 | 1 << 61 | PACKED as u64);
    }

    fn be32(&mut self, at: usize, value: u32) -> &mut Image {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        self
    }

    fn be64(&mut self, at: usize, value: u64) -> &mut Image {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk.qcow2")
    }

    fn write(&self) -> Arc<dyn StoreFile> {
        std::fs::write(self.path(), &self.bytes).unwrap();
        RealStore.open(&self.path(), Access::Read).unwrap()
    }

    fn open(&self) -> Result<Qcow2Delta> {
        Qcow2Delta::open(self.write())
    }
}

/// A stored (uncompressed) deflate block.
fn stored(last: bool, bytes: &[u8]) -> Vec<u8> {
    let len = u16::try_from(bytes.len()).unwrap();
    let mut out = vec![u8::from(last)];
    out.extend(len.to_le_bytes());
    out.extend((!len).to_le_bytes());
    out.extend(bytes);
    out
}

fn map(delta: &dyn Delta) -> Vec<Run> {
    let mut runs = Vec::new();
    delta.map(0..delta.size(), &mut runs).unwrap();
    runs
}

/// The guest bytes of a chain, base first: the trivially right way.
fn read_all(chain: &[Arc<dyn Delta>]) -> Result<Vec<u8>> {
    let mut disk: Vec<u8> = Vec::new();
    for delta in chain {
        disk.resize(delta.size() as usize, 0);
        for run in map(delta.as_ref()) {
            let part = &mut disk[run.offset as usize..(run.offset + run.len) as usize];
            match run.place {
                Place::Parent => {}
                Place::Zero => part.fill(0),
                Place::File(at) => crate::store::read_exact(delta.file().as_ref(), part, at)?,
                Place::Through => delta.read(run.offset, part)?,
                Place::Fault => return Err(delta.fault(run.offset)),
            }
        }
    }
    Ok(disk)
}

fn run(program: &str, args: &[&str], dir: &Path) {
    let out = Command::new(program).args(args).current_dir(dir).output();
    let out = out.expect("this test needs qemu-img and qemu-io: apt-get install qemu-utils");
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}
