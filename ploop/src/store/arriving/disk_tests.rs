use std::path::Path;
use std::sync::Arc;

use super::tests::{Origin, Random, noise};
use super::*;
use crate::chain::Chain;
use crate::device::{Device, ZeroMode};
use crate::disk::Disk;
use crate::disk::open::Opener;
use crate::format::ploop::top::Top;
use crate::format::ploop::{Header, Version, create};
use crate::store::memory::MemoryStore;

const CLUSTER: u64 = 32 << 10;
const CLUSTERS: u64 = 24;
const SIZE: u64 = CLUSTER * CLUSTERS;

fn writable(opener: &Opener, path: &str, below: Option<Arc<Chain>>) -> Disk {
    let header = Header::new(Version::V2, 64, 64 * CLUSTERS).unwrap();
    create(opener.store().as_ref(), Path::new(path), &header, 0o600).unwrap();
    let file = opener.store().open(Path::new(path), Access::Write).unwrap();
    Disk::writable(below, Top::open(file).unwrap(), None).unwrap()
}

/// Two sealed images, some of which is data, zeros and nothing.
fn sealed(opener: &Opener, random: &mut Random) {
    let mut below = None;
    for path in ["/base", "/middle"] {
        let disk = writable(opener, path, below.clone());
        for _ in 0..12 {
            let at = random.below(SIZE - 1);
            let n = (random.below(3 * CLUSTER) + 1).min(SIZE - at);
            disk.write(at, &noise(n, random)).unwrap();
        }
        let at = random.below(CLUSTERS) * CLUSTER;
        disk.zero(at..at + CLUSTER, ZeroMode::default()).unwrap();
        disk.close().unwrap();
        let delta = opener.sealed_delta(Path::new(path)).unwrap();
        below = Some(opener.chain_over(below.as_ref(), delta).unwrap());
    }
}

fn over_both(opener: &Opener, path: &str) -> Disk {
    let mut below = None;
    for path in ["/base", "/middle"] {
        let delta = opener.sealed_delta(Path::new(path)).unwrap();
        below = Some(opener.chain_over(below.as_ref(), delta).unwrap());
    }
    writable(opener, path, below)
}

/// Lets the image at `path` arrive: its data becomes holes.
fn empty(store: &dyn Store, path: &Path) -> Vec<u8> {
    let file = store.open(path, Access::Write).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    read_exact(file.as_ref(), &mut bytes, 0).unwrap();
    let (mut at, end, mut missing) = (CLUSTER, bytes.len() as u64, Vec::new());
    while at < end
        && let Some(data) = file.next_data(at, end).unwrap()
    {
        at = data.end;
        missing.push(data);
    }
    file.punch(CLUSTER, end - CLUSTER).unwrap();
    begin(store, path, &missing).unwrap();
    bytes
}

fn same(a: &Disk, b: &Disk, range: Range<u64>) {
    let [mut one, mut two] = [0, 1].map(|_| vec![0; (range.end - range.start) as usize]);
    a.read(range.start, &mut one).unwrap();
    b.read(range.start, &mut two).unwrap();
    assert!(one == two, "{range:?}");
}

fn extents(disk: &Disk) -> String {
    let mut extents = Vec::new();
    disk.allocation(0..SIZE, 10_000, &mut extents).unwrap();
    format!("{extents:?}")
}

/// Method: the same operations on a disk whose lower images arrive and on one that has all; they show
/// the same at every instant, and after the end.
#[test]
fn a_disk_over_images_that_arrive_shows_what_a_complete_one_does() {
    for seed in 0..12 {
        let mut random = Random(seed);
        let whole = Arc::new(MemoryStore::new());
        sealed(&Opener::on(whole.clone()), &mut random);
        let copy = whole.snapshot();
        let a = over_both(&Opener::on(whole.clone()), "/top");

        let mut origins = Vec::new();
        for path in ["/base", "/middle"] {
            origins.push((Path::new(path), empty(&copy, Path::new(path))));
        }
        let (opener, arriving) = Opener::on(Arc::new(copy.clone())).arriving();
        for (path, bytes) in origins {
            let e = opener.sealed_delta(path).unwrap_err();
            assert_eq!(e.kind(), Kind::InUse);
            let origin = Arc::new(Origin::of(bytes));
            arriving.register(path, origin).unwrap();
        }
        let b = over_both(&opener, "/top");
        // Nothing that is missing passes for a hole.
        assert_eq!(extents(&a), extents(&b));
        let mut sealed = Vec::new();
        for step in 0..120 {
            let at = random.below(SIZE - 1);
            let end = (at + random.below(2 * CLUSTER) + 1).min(SIZE);
            match random.below(9) {
                0..=2 => {
                    let bytes = noise(end - at, &mut random);
                    a.write(at, &bytes).unwrap();
                    b.write(at, &bytes).unwrap();
                }
                3 => {
                    a.zero(at..end, ZeroMode::default()).unwrap();
                    b.zero(at..end, ZeroMode::default()).unwrap();
                }
                4 => {
                    a.discard(at..end).unwrap();
                    b.discard(at..end).unwrap();
                }
                5 => {
                    a.flush().unwrap();
                    b.flush().unwrap();
                }
                6 if step > 60 => {
                    for path in arriving.registered() {
                        arriving.fill_next(&path, 3 * GRANULE).unwrap();
                    }
                }
                _ => same(&a, &b, at..end),
            }
            assert_eq!(extents(&a), extents(&b), "seed {seed}, step {step}");
        }
        for path in arriving.registered() {
            while arriving.fill_next(&path, 1 << 20).unwrap() == Filled::More {}
        }
        same(&a, &b, 0..SIZE);
        for disk in [a, b] {
            disk.close().unwrap();
            drop(disk);
        }
        // From here on any program may have them.
        for store in [&*whole, &copy] {
            let opener = Opener::on(Arc::new(store.clone()));
            sealed.push([0, 1].map(|n| {
                let path = Path::new(["/base", "/middle"][n]);
                let delta = opener.sealed_delta(path).unwrap();
                let mut bytes = vec![0; delta.file().len().unwrap() as usize];
                read_exact(delta.file().as_ref(), &mut bytes, 0).unwrap();
                bytes
            }));
        }
        assert!(sealed[0] == sealed[1]);
    }
}
