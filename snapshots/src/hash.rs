//! The hash of what a disk shows its guest, in proportion to its data.
//!
//! SHA-256 over the disk's blocks of 4096 bytes (the last may be shorter) that are not all zeros, in
//! ascending order: of each its byte offset, a u64, little-endian, and then its bytes. So it is the
//! same whatever format, cluster size or chain the bytes are stored in, and holes cost nothing.

use ploop::device::Device;
use ploop::error::{Error, Kind, Result};
use sha2::{Digest, Sha256};

use crate::convert::{Progress, pieces};
use crate::meta::Meta;
use crate::store::Root;
use crate::template;

/// How a hash is written in metadata: with this before the hexadecimal digits.
const NAME: &str = "sha256-blocks:";

const BLOCK: usize = 4096;

/// Takes a disk's data piece by piece.
#[derive(Clone, Debug)]
pub(crate) struct Hasher {
    size: u64,
    sha: Sha256,
}

impl Hasher {
    /// For a disk of `size` bytes.
    pub(crate) fn new(size: u64) -> Hasher {
        Hasher {
            size,
            sha: Sha256::new(),
        }
    }

    /// Adds blocks that are not all zeros; `offset` is a multiple of the block, and above all that
    /// was added. A short last block is continued with zeros as far as the disk goes: what is
    /// hashed may be smaller than the disk that it is copied to.
    pub(crate) fn add(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        for block in bytes.chunks(BLOCK) {
            let len = (self.size - at).min(BLOCK as u64) as usize;
            self.sha.update(at.to_le_bytes());
            self.sha.update(block);
            self.sha
                .update(&[0; BLOCK][..len.saturating_sub(block.len())]);
            at += BLOCK as u64;
        }
    }

    /// Adds that there is nothing at `offset` where there could be something of a disk below.
    pub(crate) fn mark(&mut self, offset: u64) {
        self.sha.update((offset | 1 << 63).to_le_bytes());
    }

    /// The hash as metadata has it.
    pub(crate) fn text(self) -> String {
        let hex = self.sha.finalize();
        let hex = hex.iter().map(|b| format!("{b:02x}"));
        NAME.chars()
            .chain(hex.collect::<String>().chars())
            .collect()
    }
}

/// The hash of what `device` shows, as `sha256-blocks:HEX`. Reads all of its data. `progress`: bytes
/// looked at, and the size.
pub fn content(device: &dyn Device, progress: Progress<'_>) -> Result<String> {
    let mut hasher = Hasher::new(device.size());
    pieces(device, progress, &mut |offset, bytes| {
        hasher.add(offset, bytes);
        Ok(())
    })?;
    Ok(hasher.text())
}

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Verified {
    /// The hash of what the template shows now.
    pub content: String,
    /// The hash that was recorded when it was made; none for a template from a snapshot, which is
    /// made without reading it, and one from before hashes were recorded.
    pub expected: Option<String>,
    /// Nothing that was recorded says otherwise.
    pub ok: bool,
}

/// Reads all of template `name` and compares it with the hash that was recorded. Errors: `NotFound`,
/// `Corrupt` when it cannot be read at all, `Unsupported` for a recorded hash of another kind.
pub fn verify(root: &Root, name: &str, progress: Progress<'_>) -> Result<Verified> {
    let (disk, meta) = {
        let _shared = root.lock(false)?;
        let sealed = template::open(root, name)?;
        let disk = root
            .opener()
            .open(&sealed.source, &root.open_options(false))?;
        (disk, Meta::read(root.store(), &root.template(name))?)
    };
    let expected = meta.template.and_then(|t| t.content);
    if let Some(text) = &expected
        && !text.starts_with(NAME)
    {
        let what = format!("the recorded hash {text:?} is of a kind that is not known here");
        return Err(Error::new(Kind::Unsupported, what).on(root.template(name)));
    }
    let content = content(&disk, progress)?;
    Ok(Verified {
        ok: expected.as_ref().is_none_or(|e| *e == content),
        content,
        expected,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop::disk::Disk;
    use ploop::format::ploop::top::Top;
    use ploop::format::ploop::{Header, Version, create};
    use ploop::store::memory::MemoryStore;
    use std::path::Path;

    fn disk(cluster_sectors: u32, size: u64) -> Disk {
        let store = MemoryStore::new();
        let header = Header::new(Version::V2, cluster_sectors, size / 512).unwrap();
        let file = create(&store, Path::new("/d"), &header, 0o600).unwrap();
        Disk::writable(None, Top::open(file).unwrap(), None).unwrap()
    }

    fn of(disk: &Disk) -> String {
        content(disk, &|_, _| ()).unwrap()
    }

    #[test]
    fn it_is_the_hash_of_the_definition() {
        let disk = disk(64, 1 << 20);
        let (a, b) = (vec![1; 4096], vec![2; 4096]);
        disk.write(4096, &a).unwrap();
        disk.write(600_000, &[2; 1]).unwrap();
        let mut sha = Sha256::new();
        sha.update(4096u64.to_le_bytes());
        sha.update(&a);
        let mut block = vec![0; b.len()];
        block[600_000 % 4096] = 2;
        sha.update((600_000u64 / 4096 * 4096).to_le_bytes());
        sha.update(&block);
        let hex: String = sha.finalize().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(of(&disk), format!("{NAME}{hex}"));
    }

    #[test]
    fn it_does_not_depend_on_the_cluster_and_sees_every_bit() {
        let (small, large) = (disk(64, 1 << 21), disk(2048, 1 << 21));
        for disk in [&small, &large] {
            disk.write(100_000, &vec![7; 70_000]).unwrap();
        }
        assert_eq!(of(&small), of(&large));
        // Zeros that were written are as good as none.
        small.write(1 << 20, &vec![0; 40_000]).unwrap();
        assert_eq!(of(&small), of(&large));
        small.write(130_000, &[6]).unwrap();
        assert_ne!(of(&small), of(&large));
    }

    #[test]
    fn a_source_with_a_short_last_block_hashes_as_the_larger_disk_it_is_copied_to() {
        let (source, target) = (vec![9; 1024], disk(64, 1 << 16));
        target.write(0, &source).unwrap();
        let mut hasher = Hasher::new(1 << 16);
        hasher.add(0, &source);
        assert_eq!(hasher.text(), of(&target));
    }
}
