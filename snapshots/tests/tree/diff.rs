//! Where two nodes may differ: all that does, and what was written, without a look at any data.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ploop::Result;
use ploop::chain::Chain;
use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::Delta;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, PloopDelta, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store, StoreFile};
use snapshots::diff::{between, differing};

use crate::common::{CLUSTER, CLUSTER_SECTORS, CLUSTERS, Host};
use crate::tree::branched;

/// The extents, and that they are in order, apart and counted.
fn extents(host: &Host, a: Option<Guid>, b: Option<Guid>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    let sum = differing(&host.place(), a, b, &mut |extent| {
        assert!(extent.start < extent.end, "{extent:?}");
        assert!(all.last().is_none_or(|last| last.end < extent.start));
        all.push(extent);
        Ok(())
    });
    let sum = sum.unwrap();
    let bytes: u64 = all.iter().map(|e| e.end - e.start).sum();
    assert_eq!((sum.bytes, sum.extents), (bytes, all.len() as u64));
    all
}

fn clusters(extents: &[Range<u64>]) -> BTreeSet<u64> {
    let clusters = extents.iter().flat_map(|e| {
        assert_eq!((e.start % CLUSTER, e.end % CLUSTER), (0, 0));
        e.start / CLUSTER..e.end / CLUSTER
    });
    clusters.collect()
}

/// The clusters that the table of an image names, read by hand.
fn table(host: &Host, file: &str) -> BTreeSet<u64> {
    let path = host.place().dir().join(file);
    let file = host.store().open(&path, Access::Read).unwrap();
    let mut entries = vec![0; CLUSTERS as usize * 4];
    file.read_at(&mut entries, 64).unwrap();
    let entries = (0..).zip(entries.chunks_exact(4));
    entries
        .filter(|(_, e)| e.iter().any(|b| *b != 0))
        .map(|(cluster, _)| cluster)
        .collect()
}

/// All nodes, the top as none.
fn nodes(host: &Host) -> Vec<Option<Guid>> {
    let d = host.place().descriptor().unwrap();
    let nodes = d.shots.iter().map(|s| Some(s.guid).filter(|g| *g != d.top));
    nodes.collect()
}

#[test]
fn what_differs_is_found_and_what_is_found_was_written() {
    let host = branched();
    let d = host.place().descriptor().unwrap();
    let path = |node: Option<Guid>| {
        let chain = d.chain(node.unwrap_or(d.top)).unwrap();
        chain
            .iter()
            .map(|i| i.file.clone())
            .collect::<BTreeSet<_>>()
    };
    let (mut compared, mut in_vain) = (0, 0);
    for a in nodes(&host) {
        for b in nodes(&host) {
            let found = clusters(&extents(&host, a, b));
            let (one, other) = (host.shows(a).unwrap(), host.shows(b).unwrap());
            let pieces = one
                .chunks(CLUSTER as usize)
                .zip(other.chunks(CLUSTER as usize));
            for (cluster, (x, y)) in (0..).zip(pieces) {
                assert!(x == y || found.contains(&cluster), "{a:?} {b:?} {cluster}");
                in_vain += u64::from(x == y && found.contains(&cluster));
            }
            let (to_a, to_b) = (path(a), path(b));
            let own = to_a.symmetric_difference(&to_b);
            let written: BTreeSet<u64> = own.flat_map(|file| table(&host, file)).collect();
            assert_eq!(found, written, "{a:?} {b:?}");
            compared += 1;
        }
    }
    assert_eq!(compared, 25);
    // Of any two of this tree, what both have written is not the same by chance.
    assert_eq!(in_vain, 0);
}

/// Files of which only what is before byte `CLUSTER` can be read: header and table.
#[derive(Debug)]
struct Blind {
    inner: Arc<dyn Store>,
    refused: Arc<AtomicU64>,
}

impl Store for Blind {
    ploop::delegate! {
        create, rename, rename_new, hard_link, remove_file, create_dir, remove_dir, sync_dir,
        file_system, list, kind, resolve,
    }

    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        let inner = self.inner.open(path, access)?;
        if !path.to_string_lossy().contains(".hds") {
            return Ok(inner);
        }
        let refused = self.refused.clone();
        Ok(Arc::new(BlindFile { inner, refused }))
    }
}

#[derive(Debug)]
struct BlindFile {
    inner: Arc<dyn StoreFile>,
    refused: Arc<AtomicU64>,
}

impl StoreFile for BlindFile {
    ploop::delegate! {
        path, id, len, write_at, sync, set_len, punch, zero, reserve, set_mode, next_data,
        lock_bytes, unlock_bytes, foreign_lock,
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        if offset + buf.len() as u64 > CLUSTER {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(ploop::Error::invalid("data was read").on(self.path()));
        }
        self.inner.read_at(buf, offset)
    }
}

#[test]
fn no_data_is_read() {
    let seeing = branched();
    let refused = Arc::new(AtomicU64::new(0));
    let blind = Host::on(Arc::new(Blind {
        inner: seeing.opener.store().clone(),
        refused: refused.clone(),
    }));
    for a in nodes(&seeing) {
        for b in nodes(&seeing) {
            assert_eq!(extents(&blind, a, b), extents(&seeing, a, b));
        }
    }
    assert_eq!(refused.load(Ordering::Relaxed), 0);
    // Of this, a read would have been noticed.
    assert!(blind.shows(None).is_err());
    assert!(refused.load(Ordering::Relaxed) > 0);
}

#[test]
fn what_is_being_written_is_compared_by_the_granule() {
    let host = branched();
    let place = host.place();
    let d = place.descriptor().unwrap();
    let c = d.shot(d.top).unwrap().parent;
    let live = place.open().unwrap();
    let sealed = host
        .opener
        .open(&place.source(Some(c)), &place.open_options(false))
        .unwrap();
    let found = |a: &Disk, b: &Disk| {
        let mut all = Vec::new();
        between(a, b, &mut |extent| {
            all.push(extent);
            Ok(())
        })
        .unwrap();
        all
    };
    let own = 5 * CLUSTER..6 * CLUSTER;
    assert_eq!(found(&sealed, &live), std::slice::from_ref(&own));
    live.write(8192, &[9; 4096]).unwrap();
    for (a, b) in [(&sealed, &live), (&live, &sealed)] {
        assert_eq!(found(a, b), [8192..12288, own.clone()]);
    }
    assert_eq!(found(&live, &live), []);

    // By depth: a 4, b 3, c 2.
    let mut depths = Vec::new();
    live.depths(0..CLUSTERS * CLUSTER, 100, &mut depths)
        .unwrap();
    let said: Vec<_> = depths.iter().map(|d| (d.len, d.depth)).collect();
    let expected = [
        (8192, 2),
        (4096, 1),
        (CLUSTER - 12288, 2),
        (CLUSTER, 4),
        (CLUSTER, 0),
        (CLUSTER, 2),
        (CLUSTER, 0),
        (CLUSTER, 1),
    ];
    assert_eq!(said, expected);
    live.depths(8192..12288, 1, &mut depths).unwrap();
    assert_eq!((depths.len(), depths[0].len, depths[0].depth), (1, 4096, 1));
    sealed.depths(0..4096, 1, &mut depths).unwrap();
    assert_eq!((depths[0].len, depths[0].depth), (4096, 1));
    live.close().unwrap();
}

/// A chain of one layer for each of (clusters of its size, clusters that are written).
fn chain(store: &MemoryStore, layers: &[(u64, &[u64])]) -> Vec<Arc<dyn Delta>> {
    let mut deltas: Vec<Arc<dyn Delta>> = Vec::new();
    for (n, (clusters, written)) in layers.iter().enumerate() {
        let path = format!("/layer{n}");
        let path = Path::new(&path);
        let sectors = clusters * u64::from(CLUSTER_SECTORS);
        let header = Header::new(Version::V2, CLUSTER_SECTORS, sectors).unwrap();
        let file = create(store, path, &header, 0o600).unwrap();
        let disk = Disk::writable(None, Top::open(file).unwrap(), None).unwrap();
        for cluster in *written {
            disk.write(cluster * CLUSTER, &vec![n as u8 + 1; CLUSTER as usize])
                .unwrap();
        }
        disk.close().unwrap();
        let file = store.open(path, Access::Read).unwrap();
        deltas.push(Arc::new(PloopDelta::open(file).unwrap()));
    }
    deltas
}

#[test]
fn what_a_smaller_layer_hides_differs_from_where_it_is_shown() {
    let store = MemoryStore::new();
    // base, a smaller layer on it, a larger one on that.
    let all = chain(&store, &[(10, &[0, 4, 7, 9]), (6, &[1]), (12, &[2, 11])]);
    let disk = |n: usize| Disk::sealed(Arc::new(Chain::new(all[..n].to_vec()).unwrap()));
    let shows = |disk: &Disk, cluster: u64| {
        let mut byte = [0];
        if cluster * CLUSTER < disk.size() {
            disk.read(cluster * CLUSTER, &mut byte).unwrap();
        }
        byte[0]
    };
    for (a, b, expected) in [
        (1, 2, &[1, 7, 9][..]),
        (1, 3, &[1, 2, 7, 9, 11]),
        (2, 3, &[2, 11]),
    ] {
        let (a, b) = (disk(a), disk(b));
        for (a, b) in [(&a, &b), (&b, &a)] {
            let mut found = Vec::new();
            between(a, b, &mut |extent| {
                found.push(extent);
                Ok(())
            })
            .unwrap();
            assert_eq!(clusters(&found), expected.iter().copied().collect());
            let differs = (0..12).filter(|n| shows(a, *n) != shows(b, *n));
            assert_eq!(clusters(&found), differs.collect());
        }
    }
}
