//! What the tree shows, and whether what it foretells is so.

use std::path::Path;
use std::sync::Arc;

use ploop::descriptor::{Guid, Temporary};
use ploop::device::Device;
use ploop::disk::info::data_bytes;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store, StoreFile};
use snapshots::delete;
use snapshots::foretell::{Part, direction, freed_by_merge};
use snapshots::merge::Direction;
use snapshots::place::Place;
use snapshots::rootfs::BuildOptions;
use snapshots::snapshot::{Live, NewSnapshot, take_offline};
use snapshots::switch::{SwitchOptions, switch};
use snapshots::tree::{self, Node, depth_note};
use snapshots::{CreateOptions, ImportOptions, ImportSource, Root, create_container, template};

use crate::common::{CLUSTER, CLUSTER_SECTORS, Host, alone};

fn nodes(host: &Host) -> Vec<Node> {
    tree::tree(&host.place()).unwrap().nodes
}

/// base ─ a ─ b ─ c ─ top, and on a also rollback-1.
pub(crate) fn branched() -> Host {
    let host = Host::on(MemoryStore::shared());
    host.init(Version::V2);
    host.write(0, 2 * CLUSTER, 1);
    host.snap("a");
    host.write(CLUSTER, 512, 2);
    super::switch::to(&host, "a").unwrap();
    host.write(0, 8192, 3);
    host.snap("b");
    host.write(8192, 4096, 4);
    host.write(3 * CLUSTER, 4096, 5);
    host.snap("c");
    host.write(5 * CLUSTER, 4096, 6);
    host
}

#[test]
fn every_node_is_shown_once_with_its_place_and_its_size() {
    let host = branched();
    let tree = tree::tree(&host.place()).unwrap();
    let shown: Vec<_> = tree
        .nodes
        .iter()
        .map(|n| (n.name.as_deref().unwrap_or("top"), n.depth, n.top))
        .collect();
    let expected = [
        ("a", 1, false),
        ("rollback-1", 2, false),
        ("b", 2, false),
        ("c", 3, false),
        ("top", 4, true),
    ];
    assert_eq!(shown, expected);
    assert_eq!((tree.depth, tree.shared, &tree.note), (4, 0, &None));
    for n in &tree.nodes {
        let path = host.place().dir().join(&n.file);
        let file = host.store().open(&path, Access::Read).unwrap();
        assert_eq!(n.exclusive, data_bytes(file.as_ref()).unwrap(), "{n:?}");
        assert!(n.created > 1_700_000_000 || n.top, "{n:?}");
        assert!(n.error.is_none() && !n.hidden && n.references.is_none());
    }
    let freed: Vec<_> = tree.nodes.iter().map(|n| n.freed_if_deleted).collect();
    // a: two stand on it. rollback-1: header, and a cluster of which all was completed from a. b
    // with c: a header, and the part of a cluster that c has too. The top is no snapshot.
    assert_eq!(freed[0], Some(0));
    assert_eq!(freed[1], Some(tree.nodes[1].exclusive));
    assert!(
        freed[2].unwrap() > 4096 && freed[3].unwrap() >= 4096,
        "{freed:?}"
    );
    assert_eq!(freed[4], Some(0));
    let sum: u64 = tree.nodes.iter().map(|n| n.exclusive).sum();
    assert_eq!(tree.exclusive, sum);
    serde_json::to_string(&tree).unwrap();
}

struct Unwatched;

impl delete::Watch for Unwatched {
    fn go_on(&self, _moved: u64) -> bool {
        true
    }

    fn progress(&self, _progress: snapshots::merge::Progress) {}
}

fn all_data(host: &Host) -> u64 {
    let place = host.place();
    let files = host
        .files()
        .into_iter()
        .filter(|f| f != "DiskDescriptor.xml");
    files
        .map(|f| {
            let path = place.dir().join(f);
            let file = host.store().open(&path, Access::Read).unwrap();
            data_bytes(file.as_ref()).unwrap()
        })
        .sum()
}

/// Deletes a node, with all that follows; the data that this gave back.
fn freed_by_deleting(host: &Host, node: &Node) -> u64 {
    let before = all_data(host);
    let place = host.place();
    let disk = place.open().unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    delete::delete(live, Guid::parse(&node.guid).unwrap()).unwrap();
    delete::run(live, &Unwatched).unwrap();
    disk.close().unwrap();
    drop(disk);
    place.sweep().unwrap();
    before - all_data(host)
}

#[test]
fn what_is_foretold_comes_true() {
    for n in 0..4 {
        let host = branched();
        let node = nodes(&host).remove(n);
        let freed = freed_by_deleting(&host, &node);
        assert_eq!(node.freed_if_deleted, Some(freed), "{node:?}");
    }
}

#[test]
fn a_node_that_was_deleted_is_hidden_and_its_children_hang_on_what_is_shown() {
    let host = branched();
    let place = host.place();
    let all = nodes(&host);
    let guid = |n: usize| Guid::parse(&all[n].guid).unwrap();
    let mut d = place.descriptor().unwrap();
    d.shot_mut(guid(2)).unwrap().temporary = Temporary::Temporary;
    host.put(&d);
    let list = tree::list(&place).unwrap();
    let shown: Vec<_> = list.iter().map(|s| s.name.as_deref().unwrap()).collect();
    assert_eq!(shown, ["a", "rollback-1", "c"]);
    assert_eq!(list[2].parent.as_deref(), Some(&*all[0].guid));
    assert_eq!(
        list.iter().map(|s| s.current).collect::<Vec<_>>(),
        [false, false, true]
    );
    assert!(nodes(&host)[2].hidden);
}

#[test]
fn a_damaged_image_costs_its_own_numbers_only() {
    let host = branched();
    let before = nodes(&host);
    let place = host.place();
    let path = place.dir().join(&before[3].file);
    let file = host.store().open(&path, Access::Write).unwrap();
    file.write_at(&[0; 16], 0).unwrap();
    let after = nodes(&host);
    // c is damaged, and b would be merged with it.
    assert_eq!(
        (after[2].freed_if_deleted, after[3].freed_if_deleted),
        (None, None)
    );
    assert!(
        after[3].error.as_deref().unwrap().contains("signature"),
        "{after:?}"
    );
    for n in [0, 1, 4] {
        assert_eq!(after[n].freed_if_deleted, before[n].freed_if_deleted);
    }
    host.store().remove_file(&path).unwrap();
    assert_eq!(nodes(&host).len(), 5);
    assert_eq!(tree::list(&place).unwrap().len(), 4);
}

/// A store in memory with template `t`, which has data, and containers of it.
fn store_with(containers: &[&str]) -> Root {
    let store = MemoryStore::new();
    store.create_dir(Path::new("/store")).unwrap();
    let raw = store.create(Path::new("/source.raw"), 0o600).unwrap();
    raw.set_len(4 * CLUSTER).unwrap();
    raw.write_at(&[1; 4096], CLUSTER).unwrap();
    let opener = Opener::on(Arc::new(store));
    let root = Root::on(opener, Path::new("/store"), true, false).unwrap();
    let source = ImportSource::Disk(Source {
        path: "/source.raw".into(),
        descriptor: false,
        snapshot: None,
    });
    let options = ImportOptions {
        cluster_sectors: CLUSTER_SECTORS,
        build: BuildOptions::default(),
        open: OpenOptions::default(),
        source_text: String::new(),
    };
    template::import(&root, "t", &source, &options, &|_| ()).unwrap();
    for name in containers {
        create_container(&root, name, "t", &CreateOptions::default(), &|_, _| ()).unwrap();
    }
    root
}

#[test]
fn a_layer_that_others_use_is_shared_and_frees_nothing() {
    let root = store_with(&["c", "d"]);
    let place = Place::container(&root, "c").unwrap();
    let disk = place.open().unwrap();
    disk.write(0, &[2; 512]).unwrap();
    disk.close().unwrap();
    drop(disk);
    let new = NewSnapshot {
        name: Some("a".into()),
        ..NewSnapshot::default()
    };
    take_offline(&place, &new).unwrap();
    let tree = tree::tree(&place).unwrap();
    let [layer, a, top] = &tree.nodes[..] else {
        panic!("{tree:?}");
    };
    // Of the template, of c and of d.
    assert_eq!(layer.references, Some(3));
    assert_eq!((layer.exclusive, layer.freed_if_deleted), (0, Some(0)));
    assert!(layer.shared >= 8192, "{layer:?}");
    assert_eq!((a.references, a.shared), (None, 0));
    assert_eq!(a.freed_if_deleted, Some(4096));
    assert_eq!(
        (tree.shared, tree.exclusive),
        (layer.shared, a.exclusive + top.exclusive)
    );

    // With everybody else gone it is this disk's alone.
    snapshots::remove_container(&root, "d").unwrap();
    assert_eq!(tree::tree(&place).unwrap().nodes[0].references, Some(2));
    // A rollback keeps the container's hold on it, whatever files go.
    let options = SwitchOptions {
        to: "a".into(),
        discard: true,
        keep_as: None,
    };
    switch(&place, &options).unwrap();
    let first = place.descriptor().unwrap().images[0].guid.to_string();
    let options = SwitchOptions {
        to: first,
        ..options
    };
    switch(&place, &options).unwrap();
    snapshots::remove_container(&root, "nobody").unwrap_err();
    create_container(&root, "e", "t", &CreateOptions::default(), &|_, _| ()).unwrap();
    snapshots::remove_container(&root, "e").unwrap();
    let node = &tree::tree(&place).unwrap().nodes[0];
    assert_eq!((node.references, &node.error), (Some(2), &None));
}

#[test]
fn a_chain_that_other_tools_do_not_open_is_said_to_be_one() {
    assert_eq!(depth_note(127), None);
    assert!(depth_note(128).unwrap().contains("128"));
}

const SIZE: u64 = 5000 * CLUSTER;

/// An image of [`SIZE`] with data in `pieces` (offset, length), every cluster that they touch
/// allocated; what is `holes` is punched again.
fn image(store: &dyn Store, name: &str, pieces: &[(u64, u64)], holes: &[(u64, u64)]) -> Part {
    let path = Path::new(name);
    let header = Header::new(Version::V2, CLUSTER_SECTORS, SIZE / 512).unwrap();
    let file = create(store, path, &header, 0o600).unwrap();
    let top = Top::open(file).unwrap();
    let disk = ploop::disk::Disk::writable(None, top, None).unwrap();
    for (at, len) in pieces {
        disk.write(*at, &vec![7; *len as usize]).unwrap();
    }
    for (at, len) in holes {
        disk.discard(*at..at + len).unwrap();
    }
    disk.close().unwrap();
    Part::ploop(store.open(path, Access::Read).unwrap()).unwrap()
}

fn data(file: &Arc<dyn StoreFile>) -> u64 {
    data_bytes(file.as_ref()).unwrap()
}

#[test]
fn a_foretold_merge_counts_extents_holes_and_tables() {
    let store = MemoryStore::new();
    let k = CLUSTER;
    let none = image(&store, "/none", &[], &[]);
    let one = image(&store, "/one", &[(0, 4096)], &[]);
    let far = image(&store, "/far", &[(4000 * k, 8192)], &[]);
    let many = image(&store, "/many", &[(0, 3 * k), (10 * k, k)], &[]);
    let both = [Direction::Up, Direction::Down];
    for direction in both {
        let freed = |g, c| freed_by_merge(g, c, direction).unwrap();
        // Nothing and nothing: one header.
        assert_eq!(freed(&none, &none), 4096);
        // What only one has is moved, and only a header goes.
        assert_eq!(freed(&one, &none), 4096);
        assert_eq!(freed(&none, &one), 4096);
        // The far entries are in a block of the table that the other has not: it moves along.
        assert_eq!(freed(&one, &far), 4096);
        assert_eq!(freed(&far, &one), 4096);
        // The child's cluster wins, holes of it included.
        assert_eq!(freed(&many, &one), 4096 + k);
        assert_eq!(freed(&one, &many), 4096 + 4096);
        assert_eq!(freed(&many, &many), 4096 + 4 * k);
    }
    // A child that punched a cluster frees the parent's.
    let punched = image(&store, "/punched", &[(0, 4 * k)], &[(0, 2 * k)]);
    for direction in both {
        assert_eq!(
            freed_by_merge(&many, &punched, direction).unwrap(),
            4096 + 3 * k
        );
    }
    assert_eq!(direction(&many, &one, false).unwrap(), Direction::Down);
    assert_eq!(direction(&one, &many, false).unwrap(), Direction::Up);
    assert_eq!(direction(&many, &one, true).unwrap(), Direction::Up);
    assert_eq!(direction(&one, &far, false).unwrap(), Direction::Up);
}

#[test]
fn a_raw_base_gives_every_cluster_an_entry() {
    let store = MemoryStore::new();
    let raw = store.create(Path::new("/raw"), 0o600).unwrap();
    raw.set_len(SIZE).unwrap();
    raw.write_at(&[1; 4096], 0).unwrap();
    raw.write_at(&[1; 4096], 2 * CLUSTER).unwrap();
    let child = image(&store, "/child", &[(0, 4096)], &[]);
    let base = Part::raw(raw.clone(), CLUSTER).unwrap();
    assert_eq!(direction(&base, &child, false).unwrap(), Direction::Up);
    // Of two raw blocks the child hides one, and 5000 entries take four more blocks.
    assert_eq!(freed_by_merge(&base, &child, Direction::Up).unwrap(), 0);
    raw.write_at(&vec![1; CLUSTER as usize], 0).unwrap();
    let file = store.open(Path::new("/child"), Access::Read).unwrap();
    let blocks = Header::slot_offset(5000).div_ceil(4096);
    let after = data(&file) + (blocks - 1) * 4096 + 4096;
    assert_eq!(
        freed_by_merge(&base, &child, Direction::Up).unwrap(),
        data(&raw) + data(&file) - after
    );
}

/// Random pairs on real files, merged by what the library does, in both directions.
#[test]
fn foretold_and_done_agree_on_files() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    for round in 0..24 {
        let at = dir.join(round.to_string());
        let host = Host::at(ploop::store::RealStore::shared(), at.to_str().unwrap());
        host.init(if round % 2 == 0 {
            Version::V2
        } else {
            Version::V1
        });
        for name in ["a", "b", "c"] {
            for _ in 0..next(6) {
                let at = next(4 * CLUSTER / 512) * 512;
                host.write(at, (1 + next(24)) * 2048 - 512, 1 + next(200) as u8);
            }
            if next(3) == 0 {
                let disk = host.place().open().unwrap();
                let at = next(5);
                disk.discard(at * CLUSTER..(at + 1) * CLUSTER).unwrap();
                disk.close().unwrap();
            }
            host.snap(name);
        }
        let node = nodes(&host).remove(next(3) as usize);
        let freed = freed_by_deleting(&host, &node);
        assert_eq!(
            node.freed_if_deleted,
            Some(freed),
            "round {round}: {node:?}"
        );
    }
}
