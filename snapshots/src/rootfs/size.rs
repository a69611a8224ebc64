//! How large a disk must be for a tree, and what mke2fs is told.
//!
//! An estimate from above: a disk that is a few MiB too large costs nothing (its blocks are holes),
//! one that is too small costs the import.

use std::collections::HashSet;

use super::stage::BLOCK;
use super::tree::{Inode, Kind, Tree};

pub(super) const MIB: u64 = 1 << 20;
/// The smallest disk that is computed.
const SMALLEST: u64 = 64 * MIB;
/// Disk bytes per inode, unless the tree needs more of them.
const BYTES_PER_INODE: u64 = 16 << 10;
const INODE_BYTES: u64 = 256;
/// Blocks of a block group.
const GROUP_BLOCKS: u64 = 32768;
/// Descriptors in a block, and the most blocks that are kept for more of them.
const DESCS_PER_BLOCK: u64 = 64;
const RESERVED_MAX: u64 = 1024;
/// What two files of quota take before they know anybody. Every id adds a block at most: three
/// levels of the tree to it, 1 KiB each, and its entry.
const QUOTA_BLOCKS: u64 = 4;
/// Inodes that no member can have.
const OWN_INODES: u64 = 11;

/// What a tree takes in an ext4 file system, apart from the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) inodes: u64,
    pub(super) blocks: u64,
}

/// Counts what `tree` takes.
pub(super) fn needs(tree: &Tree, user_quota: bool) -> Needs {
    let mut out = Needs {
        inodes: OWN_INODES,
        blocks: 4,
    };
    for (_, inode) in tree.inodes() {
        out.inodes += 1;
        out.blocks += blocks(inode);
    }
    if user_quota {
        let owners = |of: fn(&Inode) -> u32| {
            let ids: HashSet<u32> = tree.inodes().map(|(_, inode)| of(inode)).collect();
            ids.len() as u64
        };
        let ids = owners(|i| i.meta.uid) + owners(|i| i.meta.gid);
        out.blocks += QUOTA_BLOCKS + ids;
    }
    out
}

fn blocks(inode: &Inode) -> u64 {
    let own = match &inode.kind {
        Kind::File(content) => {
            // Four extents fit into the inode, 340 into a block.
            let extents = content.runs + content.blocks / GROUP_BLOCKS;
            let tree = if extents > 4 {
                extents.div_ceil(340) * 2
            } else {
                0
            };
            content.blocks + tree
        }
        Kind::Dir(names) => {
            // Worst case: every block ends with room that the longest name did not fit in.
            let bytes: u64 = names
                .keys()
                .map(|n| 8 + (n.len() as u64).next_multiple_of(4))
                .sum();
            1 + (bytes + 24).div_ceil(BLOCK - 12 - 264)
        }
        Kind::Symlink(target) => u64::from(target.len() >= 60),
        _ => 0,
    };
    own + u64::from(!inode.meta.xattrs.is_empty())
}

/// Inodes that the file system of `fs_bytes` is made with: a quarter more than the tree has.
pub(super) fn inodes(needs: &Needs, fs_bytes: u64) -> u64 {
    (fs_bytes / BYTES_PER_INODE).max(needs.inodes + needs.inodes / 4 + 64)
}

/// The journal of a file system of that many bytes, in MiB.
pub(super) fn journal_mib(fs_bytes: u64) -> u64 {
    match fs_bytes / MIB {
        0..128 => 4,
        128..1024 => 16,
        1024..8192 => 32,
        _ => 64,
    }
}

/// Blocks that the file system itself takes of `fs_bytes`, at most.
fn overhead(needs: &Needs, fs_bytes: u64, reserve: u64) -> u64 {
    let groups = (fs_bytes / BLOCK).div_ceil(GROUP_BLOCKS);
    let descs = groups.div_ceil(DESCS_PER_BLOCK);
    let room = (reserve / BLOCK)
        .div_ceil(GROUP_BLOCKS)
        .div_ceil(DESCS_PER_BLOCK);
    // Copies stand in groups 0, 1, and the powers of 3, 5 and 7.
    let copies = (0..groups).filter(|&g| has_copy(g)).count() as u64;
    let tables = inodes(needs, fs_bytes) * INODE_BYTES / BLOCK + groups;
    let journal = journal_mib(fs_bytes) * MIB / BLOCK;
    2 * groups + copies * (1 + descs + room.min(RESERVED_MAX)) + 1 + tables + journal
}

fn has_copy(group: u64) -> bool {
    let power = |base: u64| {
        let mut n = base;
        while n < group {
            n *= base;
        }
        n == group
    };
    group < 2 || power(3) || power(5) || power(7)
}

/// Bytes of the file system that holds the tree with a quarter to spare; a multiple of 1 MiB.
pub(super) fn computed(needs: &Needs, reserve: u64, frame: u64) -> u64 {
    let wanted = needs.blocks + needs.blocks / 4 + MIB / BLOCK;
    let mut bytes = SMALLEST - frame.min(SMALLEST);
    loop {
        // 1 % stays reserved for root.
        let blocks = (wanted + overhead(needs, bytes, reserve)) * 100 / 99 + 1;
        if blocks * BLOCK <= bytes {
            return bytes;
        }
        bytes = (blocks * BLOCK).next_multiple_of(MIB);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_computed_size_holds_what_it_is_for() {
        for blocks in [4, 10_000, 1 << 20, 1 << 26] {
            for inodes in [12, 1_000_000] {
                let needs = Needs { inodes, blocks };
                let bytes = computed(&needs, 16 << 40, 2 * MIB);
                assert_eq!((bytes + 2 * MIB) % MIB, 0);
                assert!(bytes + 2 * MIB >= SMALLEST);
                assert!(blocks * 5 / 4 + overhead(&needs, bytes, 16 << 40) <= bytes / BLOCK);
            }
        }
    }

    #[test]
    fn copies_of_the_descriptors() {
        let groups: Vec<u64> = (0..60).filter(|&g| has_copy(g)).collect();
        assert_eq!(groups, [0, 1, 3, 5, 7, 9, 25, 27, 49]);
    }
}
