use std::sync::atomic::AtomicBool;
use std::thread;

use super::*;
use crate::disk::open::{OpenOptions, Opener, Source};
use crate::store::memory::MemoryStore;
use crate::store::recording::{Calls, Fault, RecordingStore};

const DISK: &str = "/disk";
const IMAGE: &str = "/disk/image";
const LEN: u64 = 300 * GRANULE + 1234;

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Where the bytes come from; fails the test when two ask for one granule at once, or one asks for
/// what another one got.
#[derive(Debug, Default)]
pub(super) struct Origin {
    pub(super) bytes: Vec<u8>,
    pub(super) fails: AtomicBool,
    /// It may be asked twice: after an error or a crash.
    pub(super) again: bool,
    pub(super) flying: Mutex<Vec<Range<u64>>>,
    pub(super) got: Mutex<Vec<Range<u64>>>,
}

impl Origin {
    pub(super) fn of(bytes: Vec<u8>) -> Origin {
        Origin {
            bytes,
            ..Origin::default()
        }
    }
}

fn overlap(all: &[Range<u64>], one: &Range<u64>) -> bool {
    all.iter().any(|r| r.start < one.end && one.start < r.end)
}

impl Fetch for Origin {
    fn fetch(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = offset..offset + buf.len() as u64;
        assert!(offset.is_multiple_of(GRANULE) && buf.len() as u64 <= FETCH_MAX);
        if self.fails.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Io, "the source is gone"));
        }
        {
            let mut flying = self.flying.lock().unwrap();
            assert!(!overlap(&flying, &range), "{range:?} twice at once");
            let mut got = self.got.lock().unwrap();
            assert!(self.again || !overlap(&got, &range), "{range:?} twice");
            flying.push(range.clone());
            got.push(range.clone());
        }
        thread::yield_now();
        buf.copy_from_slice(&self.bytes[range.start as usize..range.end as usize]);
        self.flying.lock().unwrap().retain(|f| *f != range);
        Ok(())
    }
}

pub(super) fn noise(len: u64, random: &mut Random) -> Vec<u8> {
    (0..len).map(|_| random.below(255) as u8 + 1).collect()
}

/// Some ranges of `len` bytes, ascending.
pub(super) fn ranges(len: u64, from: u64, random: &mut Random) -> Vec<Range<u64>> {
    let (mut at, mut out) = (from, Vec::new());
    loop {
        let start = at + random.below(20 * GRANULE);
        let end = start + 1 + random.below(40 * GRANULE);
        if end > len {
            return out;
        }
        out.push(start..end);
        at = end;
    }
}

/// An image that lacks `missing` of `bytes`.
pub(super) fn partial(store: &dyn Store, bytes: &[u8], missing: &[Range<u64>]) {
    let file = store.create(Path::new(IMAGE), 0o600).unwrap();
    file.write_at(bytes, 0).unwrap();
    for range in missing {
        let start = range.start / GRANULE * GRANULE;
        let end = range.end.next_multiple_of(GRANULE).min(bytes.len() as u64);
        file.punch(start, end - start).unwrap();
    }
    Missing::create(store, Path::new(IMAGE), bytes.len() as u64, missing).unwrap();
}

struct Case {
    memory: MemoryStore,
    store: ArrivingStore,
    origin: Arc<Origin>,
    bytes: Vec<u8>,
}

fn case(seed: u64, again: bool) -> Case {
    let mut random = Random(seed);
    let bytes = noise(LEN, &mut random);
    let memory = MemoryStore::new();
    memory.create_dir(Path::new(DISK)).unwrap();
    let missing = ranges(LEN, 0, &mut random);
    partial(&memory, &bytes, &missing);
    let store = ArrivingStore::new(Arc::new(memory.clone()));
    let origin = Arc::new(Origin {
        again,
        ..Origin::of(bytes.clone())
    });
    store.register(Path::new(IMAGE), origin.clone()).unwrap();
    Case {
        memory,
        store,
        origin,
        bytes,
    }
}

impl Case {
    fn open(&self) -> Arc<dyn StoreFile> {
        self.store.open(Path::new(IMAGE), Access::Read).unwrap()
    }

    fn fill(&self) {
        while self
            .store
            .fill_next(Path::new(IMAGE), 10 * GRANULE)
            .unwrap()
            == Filled::More
        {}
    }

    fn is_complete(&self) -> bool {
        let file = self.memory.open(Path::new(IMAGE), Access::Read).unwrap();
        let mut all = vec![0; self.bytes.len()];
        read_exact(file.as_ref(), &mut all, 0).unwrap();
        all == self.bytes && !Missing::is_there(&self.memory, Path::new(IMAGE)).unwrap()
    }
}

fn read_some(file: &dyn StoreFile, bytes: &[u8], random: &mut Random) {
    let at = random.below(LEN + 100);
    let mut buf = vec![7; random.below(30_000) as usize];
    let got = file.read_at(&mut buf, at).unwrap();
    let end = (at + buf.len() as u64).min(LEN).max(at);
    assert_eq!(got as u64, end - at);
    let there = bytes.get(at as usize..end as usize).unwrap_or(&[]);
    assert!(buf[..got] == *there, "{at}+{}", buf.len());
}

#[test]
fn any_read_gives_the_bytes_of_the_source() {
    for seed in 0..20 {
        let case = case(seed, false);
        let (file, mut random) = (case.open(), Random(seed ^ 99));
        let before = case.store.remaining(Path::new(IMAGE));
        assert!(before > 0);
        for _ in 0..60 {
            read_some(file.as_ref(), &case.bytes, &mut random);
        }
        assert!(case.store.remaining(Path::new(IMAGE)) < before);
        case.fill();
        assert!(case.is_complete());
        assert!(case.store.registered().is_empty());
        read_some(file.as_ref(), &case.bytes, &mut random);
        assert_eq!(case.store.remaining(Path::new(IMAGE)), 0);
        case.store.open(Path::new(IMAGE), Access::Write).unwrap();
        assert_eq!(
            case.store.fill_next(Path::new(IMAGE), 1).unwrap(),
            Filled::Done
        );
    }
}

/// Method: readers and two that fill, on many threads; the origin fails the test where one granule is
/// fetched twice.
#[test]
fn many_read_while_it_is_filled() {
    for seed in 0..10 {
        let case = case(seed, false);
        thread::scope(|scope| {
            for n in 0..6 {
                let (case, file) = (&case, case.open());
                scope.spawn(move || {
                    let mut random = Random(seed * 100 + n);
                    for _ in 0..100 {
                        read_some(file.as_ref(), &case.bytes, &mut random);
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| case.fill());
            }
        });
        assert!(case.is_complete());
    }
}

/// A fetch that waits until the test lets it go on.
#[derive(Debug)]
struct Slow {
    bytes: Vec<u8>,
    held: u64,
    begun: std::sync::Barrier,
    go: std::sync::Barrier,
}

impl Fetch for Slow {
    fn fetch(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        if offset == self.held {
            self.begun.wait();
            self.go.wait();
        }
        buf.copy_from_slice(&self.bytes[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }
}

/// Goal: a reader waits for its own granules only. Method: while one fetch is held, another granule is
/// read, and filled.
#[test]
fn readers_of_other_granules_do_not_wait() {
    let store = MemoryStore::new();
    store.create_dir(Path::new(DISK)).unwrap();
    let bytes = noise(LEN, &mut Random(3));
    let half = 150 * GRANULE;
    partial(
        &store,
        &bytes,
        &[
            0..GRANULE,
            half..half + GRANULE,
            half * 2 - GRANULE..half * 2,
        ],
    );
    let store = ArrivingStore::new(Arc::new(store));
    let slow = Arc::new(Slow {
        bytes: bytes.clone(),
        held: 0,
        begun: std::sync::Barrier::new(2),
        go: std::sync::Barrier::new(2),
    });
    store.register(Path::new(IMAGE), slow.clone()).unwrap();
    let file = store.open(Path::new(IMAGE), Access::Read).unwrap();
    thread::scope(|scope| {
        let held = scope.spawn(|| {
            let mut buf = [0; 100];
            read_exact(file.as_ref(), &mut buf, 50).unwrap();
            buf == bytes[50..150]
        });
        slow.begun.wait();
        let mut buf = [0; 100];
        read_exact(file.as_ref(), &mut buf, half).unwrap();
        assert!(buf == bytes[half as usize..][..100]);
        let filled = store.fill_next(Path::new(IMAGE), 1).unwrap();
        assert_eq!(filled, Filled::More);
        assert_eq!(store.remaining(Path::new(IMAGE)), GRANULE);
        slow.go.wait();
        assert!(held.join().unwrap());
    });
}

#[test]
fn missing_bytes_are_data_and_not_there_now() {
    for seed in 0..20 {
        let case = case(seed, true);
        let (file, mut random) = (case.open(), Random(seed));
        for _ in 0..30 {
            let (at, n) = (random.below(LEN), random.below(9000) + 1);
            let missing = case.store.at(Path::new(IMAGE)).unwrap().missing(at, at + n);
            let mut buf = vec![0; n as usize];
            let now = file.read_now(&mut buf, at).unwrap();
            assert_eq!(now.is_none(), missing.is_some());
            if let Some(got) = now {
                assert!(buf[..got] == case.bytes[at as usize..at as usize + got]);
            }
            // All of it is noise: not a byte is in a hole.
            let (mut from, to) = (at, (at + n).min(LEN));
            while from < to {
                let data = file.next_data(from, to).unwrap().unwrap();
                assert!(data.start == from && data.end > from && data.end <= to);
                from = data.end;
            }
            read_some(file.as_ref(), &case.bytes, &mut random);
        }
        assert!(file.recall().is_none());
    }
}

#[test]
fn a_fetch_that_fails_is_an_error_and_later_works() {
    let case = case(1, false);
    let file = case.open();
    let first = case
        .store
        .at(Path::new(IMAGE))
        .unwrap()
        .missing(0, LEN)
        .unwrap();
    let mut buf = vec![0; 100];
    case.origin.fails.store(true, Ordering::Relaxed);
    for _ in 0..3 {
        let e = file.read_at(&mut buf, first.start).unwrap_err();
        assert_eq!((e.kind(), e.what()), (Kind::Io, "the source is gone"));
        let e = case.store.fill_next(Path::new(IMAGE), 1).unwrap_err();
        assert_eq!(e.what(), "the source is gone");
    }
    case.origin.fails.store(false, Ordering::Relaxed);
    assert_eq!(file.read_at(&mut buf, first.start).unwrap(), 100);
    assert!(buf == case.bytes[first.start as usize..][..100]);
    case.fill();
    assert!(case.is_complete());
}

#[test]
fn another_source_may_take_over() {
    let case = case(1, false);
    case.origin.fails.store(true, Ordering::Relaxed);
    case.store.fill_next(Path::new(IMAGE), 1).unwrap_err();
    let other = Arc::new(Origin::of(case.bytes.clone()));
    case.store.register(Path::new(IMAGE), other).unwrap();
    case.fill();
    assert!(case.is_complete());
}

#[test]
fn it_takes_nothing_but_what_arrives() {
    let case = case(5, false);
    let (store, image) = (&case.store, Path::new(IMAGE));
    let file = case.open();
    let busy = |done: Result<()>| assert_eq!(done.unwrap_err().kind(), Kind::InUse);
    busy(file.write_at(&[1], 0));
    busy(file.set_len(0));
    busy(file.punch(0, 1));
    busy(file.zero(0, 1));
    busy(file.reserve(0, 1));
    busy(store.open(image, Access::Write).map(drop));
    busy(store.hard_link(image, Path::new("/disk/other")));
    busy(store.rename(image, Path::new("/disk/other")));
    busy(store.rename_new(image, Path::new("/disk/other")));
    file.keep(7);
    assert!(file.recall().is_none());
    case.fill();
    store.hard_link(image, Path::new("/disk/other")).unwrap();
}

#[test]
fn its_directory_may_be_renamed() {
    let case = case(5, false);
    let file = case.open();
    case.store.fill_next(Path::new(IMAGE), 1).unwrap();
    case.store
        .rename_new(Path::new(DISK), Path::new("/new"))
        .unwrap();
    assert_eq!(case.store.registered(), [Path::new("/new/image")]);
    read_some(file.as_ref(), &case.bytes, &mut Random(1));
    let image = Path::new("/new/image");
    while case.store.fill_next(image, 1 << 20).unwrap() == Filled::More {}
    assert!(!Missing::is_there(&case.memory, image).unwrap());
    assert!(
        case.memory
            .list(Path::new("/new/.ploop"))
            .unwrap()
            .is_empty()
    );
}

#[test]
fn it_may_be_removed() {
    let case = case(5, false);
    case.store.remove_file(Path::new(IMAGE)).unwrap();
    assert!(case.store.registered().is_empty());
    assert!(
        case.memory
            .list(Path::new("/disk/.ploop"))
            .unwrap()
            .is_empty()
    );
    // A new one of that name lacks nothing.
    let file = case.store.create(Path::new(IMAGE), 0o600).unwrap();
    file.write_at(&[1; 100], 0).unwrap();
    drop(file);
    Opener::on(Arc::new(case.memory.clone()))
        .refuse_arriving(Path::new(IMAGE))
        .unwrap();
}

/// Goal: a full host is no error to a reader. Method: every write fails; then they work.
#[test]
fn a_full_host_is_no_error_to_a_reader() {
    let case = case(7, true);
    let recorded = RecordingStore::on(&case.memory);
    let store = ArrivingStore::new(recorded.store());
    store
        .register(Path::new(IMAGE), case.origin.clone())
        .unwrap();
    let file = store.open(Path::new(IMAGE), Access::Read).unwrap();
    let before = store.remaining(Path::new(IMAGE));
    recorded.count(Calls::Changes);
    recorded.fail_from(0, Fault::Enospc);
    let mut random = Random(7);
    for _ in 0..50 {
        read_some(file.as_ref(), &case.bytes, &mut random);
    }
    let e = store.fill_next(Path::new(IMAGE), 1).unwrap_err();
    assert_eq!(e.kind(), Kind::NoSpace);
    assert_eq!(store.remaining(Path::new(IMAGE)), before);
    recorded.clear_faults();
    while store.fill_next(Path::new(IMAGE), 1 << 20).unwrap() == Filled::More {}
    let mut all = vec![0; LEN as usize];
    read_exact(file.as_ref(), &mut all, 0).unwrap();
    assert!(all == case.bytes);
}

#[test]
fn a_record_that_is_damaged_is_refused() {
    let store = MemoryStore::new();
    store.create_dir(Path::new(DISK)).unwrap();
    let bytes = noise(20 * GRANULE, &mut Random(1));
    let missing = GRANULE..2 * GRANULE;
    partial(&store, &bytes, std::slice::from_ref(&missing));
    let origin = Arc::new(Origin::of(bytes));
    let side = Missing::path(Path::new(IMAGE)).unwrap();
    let file = store.open(&side, Access::Write).unwrap();
    let len = file.len().unwrap();
    let mut whole = vec![0; len as usize];
    read_exact(file.as_ref(), &mut whole, 0).unwrap();
    let refused = |what: &dyn std::fmt::Display| {
        let arriving = ArrivingStore::new(Arc::new(store.clone()));
        let e = arriving
            .register(Path::new(IMAGE), origin.clone())
            .unwrap_err();
        assert_eq!(
            (e.kind(), e.path()),
            (Kind::Corrupt, Some(side.as_path())),
            "{what}"
        );
        let e = Missing::refuse(&store, Path::new(IMAGE)).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt, "{what}");
    };
    for bit in 0..whole.len() * 8 {
        let byte = whole[bit / 8] ^ (1 << (bit % 8));
        file.write_at(&[byte], bit as u64 / 8).unwrap();
        refused(&format_args!("bit {bit}"));
        file.write_at(&whole[bit / 8..=bit / 8], bit as u64 / 8)
            .unwrap();
    }
    for short in (0..len).chain([len + 1, len + 512, 1 << 40]) {
        file.set_len(short).unwrap();
        refused(&format_args!("{short} bytes"));
        file.set_len(len).unwrap();
        file.write_at(&whole, 0).unwrap();
    }
    // Another image of that name.
    let image = store.open(Path::new(IMAGE), Access::Write).unwrap();
    image.set_len(21 * GRANULE).unwrap();
    refused(&"another length");
    image.set_len(20 * GRANULE).unwrap();
    let e = Missing::refuse(&store, Path::new(IMAGE)).unwrap_err();
    assert_eq!(e.kind(), Kind::InUse);
}

#[test]
fn ranges_that_are_none_are_refused() {
    let store = MemoryStore::new();
    store.create_dir(Path::new(DISK)).unwrap();
    for range in [
        5..5,
        Range { start: 9, end: 3 },
        0..101,
        101..102,
        0..u64::MAX,
    ] {
        let e = Missing::create(&store, Path::new(IMAGE), 100, std::slice::from_ref(&range));
        assert_eq!(e.unwrap_err().kind(), Kind::Invalid, "{range:?}");
    }
    let origin = Arc::new(Origin::default());
    drop(store.create(Path::new(IMAGE), 0o600).unwrap());
    let store = ArrivingStore::new(Arc::new(store));
    let e = store.register(Path::new(IMAGE), origin).unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound);
}

#[test]
fn who_does_not_fetch_is_refused() {
    let case = case(5, false);
    let options = OpenOptions {
        format: Some(crate::disk::open::Format::Raw),
        ..OpenOptions::default()
    };
    let opener = Opener::on(Arc::new(case.memory.clone()));
    let source = Source::parse(&case.memory, IMAGE).unwrap();
    let e = opener.open(&source, &options).unwrap_err();
    assert_eq!((e.kind(), e.path()), (Kind::InUse, Some(Path::new(IMAGE))));
    assert!(e.to_string().contains("have not arrived"), "{e}");
    assert!(opener.is_arriving(Path::new(IMAGE)).unwrap());
    let (opener, store) = Opener::on(Arc::new(case.memory.clone())).arriving();
    let e = opener.open(&source, &options).unwrap_err();
    assert_eq!(e.kind(), Kind::InUse);
    store
        .register(Path::new(IMAGE), case.origin.clone())
        .unwrap();
    opener.open(&source, &options).unwrap();
    let e = opener.refuse_arriving(Path::new(IMAGE)).unwrap_err();
    assert!(e.to_string().contains("still arriving"), "{e}");
    assert_eq!(
        Missing::images(&case.memory, Path::new(DISK)).unwrap(),
        [Path::new(IMAGE)]
    );
    assert!(
        Missing::images(&case.memory, Path::new("/"))
            .unwrap()
            .is_empty()
    );
}

/// A source that cannot read one granule.
#[derive(Debug)]
struct Holed {
    origin: Origin,
    bad: u64,
}

impl Fetch for Holed {
    fn fetch(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        if (offset..offset + buf.len() as u64).contains(&self.bad) {
            return Err(Error::new(Kind::Io, "a bad block"));
        }
        self.origin.fetch(offset, buf)
    }
}

/// Goal: what the source cannot read keeps nothing else from coming.
#[test]
fn all_but_what_cannot_be_had_comes() {
    let memory = MemoryStore::new();
    memory.create_dir(Path::new(DISK)).unwrap();
    let bytes = noise(LEN, &mut Random(5));
    partial(&memory, &bytes, std::slice::from_ref(&(0..LEN)));
    let store = ArrivingStore::new(Arc::new(memory.clone()));
    let holed = Holed {
        origin: Origin::of(bytes.clone()),
        bad: 70 * GRANULE,
    };
    store.register(Path::new(IMAGE), Arc::new(holed)).unwrap();
    let mut budget = 32 * GRANULE;
    let mut failed = 0;
    while store.remaining(Path::new(IMAGE)) > GRANULE {
        match store.fill_next(Path::new(IMAGE), budget) {
            Ok(filled) => {
                assert_eq!(filled, Filled::More);
                budget = 32 * GRANULE;
            }
            Err(_) => (budget, failed) = (GRANULE, failed + 1),
        }
        assert!(failed < 100, "the rest does not come");
    }
    assert!(store.fill_next(Path::new(IMAGE), GRANULE).is_err());
    let file = store.open(Path::new(IMAGE), Access::Read).unwrap();
    let mut read = vec![0; 4];
    file.read_at(&mut read, 71 * GRANULE).unwrap();
    assert!(read == bytes[71 * GRANULE as usize..][..4]);
    assert!(file.read_at(&mut read, 70 * GRANULE).is_err());
}
