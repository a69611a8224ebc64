//! A disk some of whose images are still arriving.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::Kind;
use ploop::descriptor::{Descriptor, Guid, Temporary};
use ploop::device::Device;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::format::ploop::Version;
use ploop::store::arriving::{ArrivingStore, Fetch, Filled, Missing, begin};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store, read_exact};
use snapshots::delete::{self, Deleted};
use snapshots::export::export_disk;
use snapshots::merge::Progress;
use snapshots::moving::{self, later};
use snapshots::owner::Decision;
use snapshots::place::Place;
use snapshots::snapshot::Live;
use snapshots::store::Root;
use snapshots::{compact, remove_container, template};

use crate::common::{CLUSTER, DIR, Host, kind};

struct GoOn;

impl delete::Watch for GoOn {
    fn go_on(&self, _: u64) -> bool {
        true
    }
    fn progress(&self, _: Progress) {}
}

#[derive(Debug)]
struct Origin(Vec<u8>);

impl Fetch for Origin {
    fn fetch(&self, offset: u64, buf: &mut [u8]) -> ploop::Result<()> {
        buf.copy_from_slice(&self.0[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }
}

fn path_of(d: &Descriptor, dir: &str, node: Guid) -> PathBuf {
    Path::new(dir).join(&d.image(node).unwrap().file)
}

/// Lets the image at `path` lack all of its data.
fn empty(store: &dyn Store, path: &Path) -> Origin {
    let file = store.open(path, Access::Write).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    read_exact(file.as_ref(), &mut bytes, 0).unwrap();
    let missing = CLUSTER..bytes.len() as u64;
    file.punch(CLUSTER, missing.end - CLUSTER).unwrap();
    begin(store, path, std::slice::from_ref(&missing)).unwrap();
    Origin(bytes)
}

fn fill(arriving: &ArrivingStore) {
    for path in arriving.registered() {
        while arriving.fill_next(&path, 1 << 20).unwrap() == Filled::More {}
    }
}

/// Snapshots a, b and c in a row; of b the data is missing. What each shows, the top last.
struct Case {
    store: MemoryStore,
    origin: Arc<Origin>,
    nodes: [Guid; 3],
    shown: Vec<Vec<u8>>,
    b: PathBuf,
}

fn case(dir: &str) -> Case {
    let store = MemoryStore::new();
    if dir != DIR {
        store.create_dir(Path::new("/store")).unwrap();
        drop(
            Root::on(
                Opener::on(Arc::new(store.clone())),
                Path::new("/store"),
                true,
                false,
            )
            .unwrap(),
        );
    }
    let host = Host::at(Arc::new(store.clone()), dir);
    host.init(Version::V2);
    let nodes = ["a", "b", "c"].map(|name| {
        let n = name.as_bytes()[0];
        host.write(u64::from(n - b'a') * CLUSTER, 2 * CLUSTER, n);
        host.write(5 * CLUSTER, 5000, n);
        host.snap(name)
    });
    host.write(0, 3000, 9);
    let shown = nodes.map(Some).into_iter().chain([None]);
    let shown = shown.map(|node| host.shows(node).unwrap()).collect();
    let b = path_of(&host.place().descriptor().unwrap(), dir, nodes[1]);
    let origin = Arc::new(empty(&store, &b));
    Case {
        store,
        origin,
        nodes,
        shown,
        b,
    }
}

impl Case {
    fn opener(&self) -> (Opener, Arc<ArrivingStore>) {
        let (opener, arriving) = Opener::on(Arc::new(self.store.clone())).arriving();
        arriving.register(&self.b, self.origin.clone()).unwrap();
        (opener, arriving)
    }

    fn host(&self) -> (Host, Arc<ArrivingStore>) {
        let (opener, arriving) = self.opener();
        let mut host = Host::on(Arc::new(self.store.clone()));
        host.opener = opener;
        (host, arriving)
    }

    fn shows(&self, host: &Host, nodes: &[Option<Guid>]) {
        for node in nodes {
            let n = self
                .nodes
                .iter()
                .position(|g| Some(*g) == *node)
                .unwrap_or(3);
            assert!(host.shows(*node).unwrap() == self.shown[n], "{n}");
        }
    }
}

fn mark(host: &Host, nodes: &[Guid]) {
    let mut d = host.place().descriptor().unwrap();
    for node in nodes {
        d.shot_mut(*node).unwrap().temporary = Temporary::Temporary;
    }
    host.put(&d);
}

fn run(host: &Host) -> delete::Ran {
    let place = host.place();
    let disk = place.open().unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    let ran = delete::run(live, &GoOn).unwrap();
    disk.close().unwrap();
    ran
}

#[test]
fn it_is_read_where_it_is_fetched_and_nowhere_else() {
    let case = case(DIR);
    let [a, b, c] = case.nodes;
    let host = Host::on(Arc::new(case.store.clone()));
    for node in [Some(b), Some(c), None] {
        assert_eq!(kind(host.shows(node)), Kind::InUse);
    }
    case.shows(&host, &[Some(a)]);
    assert_eq!(kind(host.place().open()), Kind::InUse);
    let export = |host: &Host, to: &str| {
        export_disk(&host.place(), Some(c), Path::new(to), &|_, _| ()).map(drop)
    };
    assert_eq!(kind(export(&host, "/out")), Kind::InUse);

    let (host, arriving) = case.host();
    let before = arriving.remaining(&case.b);
    case.shows(&host, &[Some(b), None]);
    // A copy has all of it, and is closed.
    export(&host, "/out").unwrap();
    let out = Host::at(Arc::new(case.store.clone()), "/out");
    assert!(out.shows(None).unwrap() == case.shown[2]);
    assert_eq!(out.findings().unwrap(), [""; 0]);
    assert!(before > 0 && arriving.remaining(&case.b) < before);
    fill(&arriving);
    let host = Host::on(Arc::new(case.store.clone()));
    case.shows(&host, &[Some(a), Some(b), Some(c), None]);
    assert_eq!(host.findings().unwrap(), [""; 0]);
}

/// Goal: a merge that has to wait keeps nothing else waiting.
#[test]
fn merges_with_it_wait_and_others_go_on() {
    let case = case(DIR);
    let [a, b, c] = case.nodes;
    let (host, arriving) = case.host();
    // a would be merged into b, b into c; c can be.
    mark(&host, &[a, b, c]);
    let ran = run(&host);
    assert_eq!((ran.removed, ran.hidden, ran.paused), (1, 2, false));
    case.shows(&host, &[None]);
    fill(&arriving);
    let ran = run(&host);
    assert_eq!((ran.removed, ran.hidden), (2, 0));
    case.shows(&host, &[None]);
    assert_eq!(host.findings().unwrap(), [""; 0]);
}

#[test]
fn deleting_it_is_refused_by_name_while_something_stands_on_it() {
    let case = case(DIR);
    let (host, arriving) = case.host();
    let delete = || {
        let place = host.place();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        let deleted = delete::delete(live, case.nodes[1]);
        disk.close().unwrap();
        deleted
    };
    let e = delete().unwrap_err();
    assert_eq!(e.kind(), Kind::InUse);
    assert!(e.to_string().contains("still arriving"), "{e}");
    fill(&arriving);
    assert_eq!(delete().unwrap(), Deleted::Merging);
}

/// A leaf goes at once, and its record with it, whether or not it is fetched here.
#[test]
fn a_leaf_goes_at_once() {
    for fetched in [true, false] {
        let case = case(DIR);
        let [a, b, c] = case.nodes;
        let (mut host, arriving) = case.host();
        super::switch::discard(&host, "a").unwrap();
        if !fetched {
            host = Host::on(Arc::new(case.store.clone()));
        }
        mark(&host, &[b, c]);
        let ran = run(&host);
        assert_eq!((ran.removed, ran.hidden), (2, 0));
        assert!(!ploop::store::arriving::Missing::is_there(&case.store, &case.b).unwrap());
        assert!(!fetched || arriving.registered().is_empty());
        assert_eq!(host.files(), host.named());
        case.shows(&host, &[Some(a)]);
    }
}

#[test]
fn it_is_not_compacted() {
    let case = case(DIR);
    for (host, _) in [
        case.host(),
        (Host::on(Arc::new(case.store.clone())), case.host().1),
    ] {
        let report = compact::sealed(&host.place(), false, &GoOn).unwrap();
        assert!(
            report
                .left
                .iter()
                .any(|l| l.contains(&case.nodes[1].to_string()))
        );
    }
}

#[test]
fn it_is_not_shared_and_may_be_removed() {
    let case = case("/store/containers/ct");
    let (opener, arriving) = case.opener();
    let root = Root::on(opener, Path::new("/store"), false, false).unwrap();
    let e = template::from_snapshot(&root, "t", "ct", "c").unwrap_err();
    assert_eq!(e.kind(), Kind::InUse);
    assert!(e.to_string().contains("still arriving"), "{e}");
    let place = Place::container(&root, "ct").unwrap();
    let disk = place.open().unwrap();
    let mut bytes = vec![0; disk.size() as usize];
    disk.read(0, &mut bytes).unwrap();
    assert!(bytes == case.shown[3]);
    disk.close().unwrap();
    drop(disk);
    remove_container(&root, "ct").unwrap();
    assert!(arriving.registered().is_empty());
    assert!(case.store.list(Path::new("/store/tmp")).unwrap().is_empty());
}

#[test]
fn what_nobody_fetches_any_more_may_be_removed() {
    let case = case("/store/containers/ct");
    let opener = Opener::on(Arc::new(case.store.clone()));
    let root = Root::on(opener, Path::new("/store"), false, false).unwrap();
    remove_container(&root, "ct").unwrap();
    assert!(case.store.list(Path::new("/store/tmp")).unwrap().is_empty());
}

/// Goal: what nobody fetches any more is not taken for whole, though nobody knows where it was to come
/// from.
#[test]
fn a_damaged_record_does_not_make_it_whole() {
    let case = case("/store/containers/ct");
    let opener = Opener::on(Arc::new(case.store.clone()));
    let root = Root::on(opener, Path::new("/store"), false, false).unwrap();
    let owner = Path::new("/store/containers/ct/.ploop/owner");
    let record = case.store.create(owner, 0o600).unwrap();
    record.write_at(b"no record", 0).unwrap();
    let take = || moving::decide(&root, "ct", Decision::Take);
    let e = take().unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt);
    assert!(e.to_string().contains("bytes have not come"), "{e}");
    assert!(case.store.kind(owner).unwrap().is_some());
}

/// Goal: what is still to come is no damage, and no repair clears its mark.
#[test]
fn a_check_says_that_it_arrives() {
    let case = case(DIR);
    let options = OpenOptions::default();
    let disk = Source::parse(&case.store, DIR).unwrap();
    let image = Source::parse(&case.store, case.b.to_str().unwrap()).unwrap();
    let host = Host::on(Arc::new(case.store.clone()));
    for source in [&disk, &image] {
        let e = fsck::check(&host.opener, source, &options).unwrap_err();
        assert_eq!((e.kind(), e.path()), (Kind::InUse, Some(case.b.as_path())));
        assert!(e.to_string().contains("have not arrived"), "{e}");
        let e = fsck::repair::plan(&host.opener, source, &options).unwrap_err();
        assert_eq!(e.kind(), Kind::InUse);
    }
    let (host, arriving) = case.host();
    for source in [&disk, &image] {
        let report = fsck::check(&host.opener, source, &options).unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        let e = fsck::repair::plan(&host.opener, source, &options).unwrap_err();
        assert_eq!(e.kind(), Kind::InUse);
    }
    fill(&arriving);
    let host = Host::on(Arc::new(case.store.clone()));
    let report = fsck::check(&host.opener, &disk, &options).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert!(
        fsck::repair::plan(&host.opener, &disk, &options)
            .unwrap()
            .is_empty()
    );
}

/// Goal: what a peer says of an image's data is refused where no image can have it, and nothing is told
/// twice: what was missing by the first word would pass for zeros.
#[test]
fn runs_that_no_image_has_are_refused() {
    let store = MemoryStore::new();
    let host = Host::on(Arc::new(store.clone()));
    host.init(Version::V2);
    host.snap("a");
    let node = host.place().descriptor().unwrap().images[0].guid;
    let size = host.shows(None).unwrap().len() as u64;
    for runs in [
        &[(u64::MAX / 4096 * 4096, 4096)][..],
        &[(size, 0)],
        &[(size - 4096, 8192)],
        &[(0, u64::MAX)],
        &[(1, 4096)],
        &[(0, 0), (4096, 4096)],
    ] {
        let refused = later::lay_out(&host.place(), node, runs);
        assert_eq!(kind(refused), Kind::Corrupt, "{runs:?}");
    }
    later::lay_out(&host.place(), node, &[(CLUSTER, 4096)]).unwrap();
    let refused = later::lay_out(&host.place(), node, &[(3 * CLUSTER, 4096)]);
    assert_eq!(kind(refused), Kind::Corrupt);
    let path = path_of(&host.place().descriptor().unwrap(), DIR, node);
    assert_eq!(Missing::bytes(&store, &path).unwrap(), 4096);
}
