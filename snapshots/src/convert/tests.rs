//! On stores in memory: what comes out is what went in, and a failure leaves nothing.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use ploop::device::{Device, ZeroMode};
use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, Calls, Fault, RecordingStore};
use ploop::verify::scan_image;

use super::*;

const KINDS: [Kind; 4] = [Kind::Raw, Kind::Ploop, Kind::PloopV1, Kind::Qcow2];

fn quiet(_: u64, _: u64) {}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn new_disk(store: &dyn Store, path: &str, cluster_sectors: u32, clusters: u64) -> Disk {
    let sectors = clusters * u64::from(cluster_sectors);
    let header = Header::new(Version::V2, cluster_sectors, sectors).unwrap();
    let file = image::create(store, Path::new(path), &header, MODE).unwrap();
    Disk::writable(None, Top::open(file).unwrap(), None).unwrap()
}

/// `/src`: pieces of any size at any place, some of them zeros that were written. The content.
fn random_source(store: &dyn Store, seed: u64, cluster_sectors: u32, clusters: u64) -> Vec<u8> {
    let disk = new_disk(store, "/src", cluster_sectors, clusters);
    let size = disk.size();
    let mut content = vec![0; size as usize];
    let mut rng = Rng(seed);
    for _ in 0..clusters.max(4) {
        let at = rng.below(size);
        let len = (rng.below(size / 8) + 1).min(size - at);
        let fill = [0, 1, 255][rng.below(3) as usize];
        content[at as usize..(at + len) as usize].fill(fill);
        disk.write(at, &vec![fill; len as usize]).unwrap();
    }
    disk.close().unwrap();
    content
}

fn source(path: &str) -> Source {
    Source {
        path: path.into(),
        descriptor: false,
        snapshot: None,
    }
}

fn run(store: &Arc<dyn Store>, from: &str, to: &str, kind: impl Into<To>) -> Result<Converted> {
    let opener = Opener::on(store.clone());
    let target = Target::File(to.into());
    let options = OpenOptions::default();
    convert(&opener, &source(from), &options, target, kind, &quiet)
}

/// What an image shows, or why it does not.
fn content(store: &Arc<dyn Store>, path: &str, kind: Kind) -> std::result::Result<Vec<u8>, String> {
    let options = OpenOptions {
        format: (kind == Kind::Raw).then_some(Format::Raw),
        ..OpenOptions::default()
    };
    let opened = Opener::on(store.clone()).open(&source(path), &options);
    let disk = opened.map_err(|e| e.to_string())?;
    let mut bytes = vec![0; disk.size() as usize];
    disk.read(0, &mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

#[test]
fn every_format_holds_what_the_source_shows() {
    for seed in 0..8 {
        let memory = MemoryStore::new();
        let bytes = random_source(&memory, seed, 64 << (seed % 3), 1 + seed * 7);
        let store: Arc<dyn Store> = Arc::new(memory);
        for (i, kind) in KINDS.into_iter().enumerate() {
            let to = format!("/to{i}");
            let done = run(&store, "/src", &to, kind).unwrap();
            assert_eq!(done.source_bytes, bytes.len() as u64);
            let got = content(&store, &to, kind).unwrap();
            assert!(got == bytes, "seed {seed} {kind:?}");
            let again = format!("/back{i}");
            if kind != Kind::Raw {
                run(&store, &to, &again, Kind::Raw).unwrap();
                assert!(content(&store, &again, Kind::Raw).unwrap() == bytes);
            }
        }
        for made in ["/to1", "/to2"] {
            let file = store.open(Path::new(made), Access::Read).unwrap();
            let scan = scan_image(file.as_ref()).unwrap();
            assert_eq!(scan.findings, [], "{made}");
            assert_eq!(scan.header.cluster_sectors, 64 << (seed % 3));
        }
    }
}

#[test]
fn an_odd_size_is_padded_with_zeros_where_the_format_wants_it() {
    let memory = MemoryStore::new();
    let file = memory.create(Path::new("/s.raw"), 0o600).unwrap();
    file.write_at(&[7; 5000], 200_000).unwrap();
    let store: Arc<dyn Store> = Arc::new(memory);
    for (to, kind, size) in [
        ("/r", Kind::Raw, 205_000),
        ("/p", Kind::Ploop, 262_144),
        ("/q", Kind::Qcow2, 205_312),
    ] {
        let done = run(&store, "/s.raw", to, kind).unwrap();
        assert_eq!(
            (done.source_bytes, done.virtual_bytes),
            (205_000, size),
            "{to}"
        );
        let got = content(&store, to, kind).unwrap();
        assert_eq!(got.len() as u64, size);
        assert!(got[200_000..205_000].iter().all(|&b| b == 7));
        assert!(got[205_000..].iter().all(|&b| b == 0));
    }
}

#[test]
fn zeros_and_holes_are_not_written_however_large_the_disk() {
    let memory = MemoryStore::new();
    let disk = new_disk(&memory, "/src", 2048, 1 << 20);
    disk.write(5 << 30, &vec![0; 3 << 20]).unwrap();
    disk.write((700 << 30) + 512, &[1; 512]).unwrap();
    disk.zero(0..1 << 20, ZeroMode::default()).unwrap();
    disk.close().unwrap();
    drop(disk);
    let store: Arc<dyn Store> = Arc::new(memory);
    for (i, kind) in [Kind::Raw, Kind::Ploop, Kind::Qcow2]
        .into_iter()
        .enumerate()
    {
        let to = format!("/to{i}");
        let done = run(&store, "/src", &to, kind).unwrap();
        assert_eq!((done.bytes_written, done.virtual_bytes), (4096, 1 << 40));
        let len = store.open(Path::new(&to), Access::Read).unwrap().len();
        assert!(kind == Kind::Raw || len.unwrap() < 8 << 20, "{kind:?}");
    }
}

#[test]
fn a_stream_is_every_byte_of_the_disk_and_only_raw() {
    let memory = MemoryStore::new();
    let bytes = random_source(&memory, 3, 64, 20);
    let opener = Opener::on(Arc::new(memory));
    let options = OpenOptions::default();
    let (mut out, last) = (Vec::new(), Cell::new((0, 0)));
    let progress = |done, all| {
        assert!(done >= last.get().0, "progress goes forward");
        last.set((done, all));
    };
    let target = Target::Writer(&mut out);
    convert(
        &opener,
        &source("/src"),
        &options,
        target,
        Kind::Raw,
        &progress,
    )
    .unwrap();
    assert!(out == bytes);
    let all = bytes.len() as u64;
    assert_eq!(last.get(), (all, all));

    let target = Target::Writer(&mut out);
    let e = convert(
        &opener,
        &source("/src"),
        &options,
        target,
        Kind::Qcow2,
        &quiet,
    );
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Invalid);
    let mut full: &mut [u8] = &mut [0; 100];
    let target = Target::Writer(&mut full);
    convert(
        &opener,
        &source("/src"),
        &options,
        target,
        Kind::Raw,
        &quiet,
    )
    .unwrap_err();
}

#[test]
fn what_a_format_cannot_hold_is_refused_and_an_existing_target_stays_as_it_is() {
    let memory = MemoryStore::new();
    drop(new_disk(&memory, "/src", 131_072, 1 << 15));
    drop(new_disk(&memory, "/huge", 131_072, 1 << 26));
    let there = memory.create(Path::new("/there"), 0o600).unwrap();
    there.write_at(b"mine", 0).unwrap();
    let store: Arc<dyn Store> = Arc::new(memory);
    let refused = |from: &str, to: &str, kind: To| run(&store, from, to, kind).unwrap_err().kind();
    for kind in KINDS {
        assert_eq!(refused("/src", "/there", kind.into()), ErrorKind::Exists);
    }
    let mut text = [0; 5];
    assert_eq!(there.read_at(&mut text, 0).unwrap(), 4);
    assert_eq!(&text[..4], b"mine");
    assert_eq!(
        refused("/src", "/v1", Kind::PloopV1.into()),
        ErrorKind::Invalid
    );
    assert_eq!(
        refused("/huge", "/q", Kind::Qcow2.into()),
        ErrorKind::Unsupported
    );
    let with = |kind, sectors| To {
        kind,
        cluster_sectors: Some(sectors),
    };
    for (kind, sectors) in [
        (Kind::Raw, 128),
        (Kind::Ploop, 0),
        (Kind::Ploop, 96),
        (Kind::Ploop, 1 << 18),
    ] {
        assert_eq!(
            refused("/src", "/x", with(kind, sectors)),
            ErrorKind::Invalid
        );
    }
    assert_eq!(
        refused("/src", "/x", with(Kind::Qcow2, 64)),
        ErrorKind::Unsupported
    );
    let left = store.list(Path::new("/")).unwrap();
    assert_eq!(left, ["huge", "src", "there"].map(PathBuf::from));
}

#[test]
fn one_unreadable_cluster_fails_it_all_names_the_place_and_leaves_nothing() {
    let memory = MemoryStore::new();
    random_source(&memory, 5, 64, 30);
    let file = memory.open(Path::new("/src"), Access::Write).unwrap();
    file.write_at(&0x00FF_FFFFu32.to_le_bytes(), 64 + 4 * 29)
        .unwrap();
    let store: Arc<dyn Store> = Arc::new(memory);
    for kind in KINDS {
        let e = run(&store, "/src", "/to", kind).unwrap_err();
        assert_eq!((e.kind(), e.offset()), (ErrorKind::Corrupt, Some(180)));
        assert_eq!(e.path(), Some(Path::new("/src")));
        assert_eq!(
            store.list(Path::new("/")).unwrap(),
            [PathBuf::from("src")],
            "{kind:?}"
        );
    }
}

#[test]
fn whichever_call_fails_nothing_is_left_behind() {
    let memory = MemoryStore::new();
    random_source(&memory, 1, 64, 12);
    for kind in KINDS {
        let good = RecordingStore::on(&memory);
        good.count(Calls::All);
        run(&good.store(), "/src", "/to", kind).unwrap();
        for n in 0..good.calls() {
            for fault in [Fault::Eio, Fault::Enospc] {
                let store = RecordingStore::on(&memory);
                store.count(Calls::All);
                store.fail_at(n, fault);
                let done = run(&store.store(), "/src", "/to", kind);
                let left = store.list(Path::new("/")).unwrap();
                assert!(done.is_err(), "{kind:?} call {n} {fault:?}");
                assert_eq!(
                    left,
                    [PathBuf::from("src")],
                    "{kind:?} call {n} {fault:?}: {done:?}"
                );
            }
        }
    }
}

/// Runs a conversion with sync number `dropped` left out, and looks at what power cuts leave.
/// Returns the states without and with the target, or the first state that breaks the promise.
fn power_cuts(kind: Kind, dropped: Option<u64>) -> std::result::Result<(u32, u32), String> {
    let memory = MemoryStore::new();
    let bytes = random_source(&memory, 9, 64, 5);
    let budget = Budget {
        exhaustive_units: 6,
        seeded: 20,
        seed: 1,
    };
    let store = RecordingStore::on(&memory);
    dropped.into_iter().for_each(|n| store.drop_sync(n));
    run(&store.store(), "/src", "/to", kind).unwrap();
    let (mut absent, mut whole) = (0, 0);
    let points: Vec<_> = store.crash_points().collect();
    let end = *points.last().unwrap();
    for point in points {
        for state in store.states_at(point, &budget) {
            let found: Arc<dyn Store> = Arc::new(state.build());
            if found.kind(Path::new("/to")).unwrap().is_none() {
                if point == end {
                    return Err(format!("gone after it was reported done: {state}"));
                }
                absent += 1;
            } else if content(&found, "/to", kind) != Ok(bytes.clone()) {
                return Err(format!("there and not whole: {state}"));
            } else {
                whole += 1;
            }
        }
    }
    Ok((absent, whole))
}

#[test]
fn after_a_power_cut_the_target_is_whole_or_not_there() {
    for kind in KINDS {
        let (absent, whole) = power_cuts(kind, None).unwrap();
        assert!(absent > 0 && whole > 0, "{kind:?}");
    }
    // And each sync is needed for that: of the file before its name, of the name at the end.
    for n in 0..2 {
        power_cuts(Kind::Raw, Some(n)).unwrap_err();
    }
}
