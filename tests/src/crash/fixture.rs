//! Start images: a disk directory as it lies there when the first request comes.
//!
//! | shape | the top image |
//! |---|---|
//! | `Empty` | as created |
//! | `Used` | three clusters in use |
//! | `Holes` | and a cluster between them that nothing names, full of leftovers |
//! | `Tail` | and two and a half clusters behind the last one, full of leftovers |
//! | `Dirty` | holes and tail, and the in-use mark: as after a crash |
//!
//! Over a base, the base has whole clusters, half ones, single sectors and holes; or data everywhere.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::device::{Device, Segment, SegmentPlace};
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::header::IN_USE_DIRTY;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, PloopDelta, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store, StoreFile};
use ploop::tracker::{Id, Tracker};
use ploop::verify::{FindingKind, scan_image};
use ploop_fuzz::base::descriptor;

use super::history::{BASE, JUNK, START, Words, payload};
use super::{CLUSTER, CLUSTER_SECTORS, SECTOR};

const DIR: &str = "/disk";
const XML: &str = "/disk/DiskDescriptor.xml";
const BOTTOM: &str = "/disk/root.hds";
const OVERLAY: &str = "/disk/root.hds.top";
/// The trackers of a disk that has some, and what a bit of them stands for.
const TRACKERS: [(Id, u64); 2] = [(Id([1; 16]), SECTOR), (Id([2; 16]), 2 * CLUSTER)];

/// See the module text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// As created.
    Empty,
    /// Three clusters in use.
    Used,
    /// With a free cluster between them.
    Holes,
    /// With leftovers behind the end.
    Tail,
    /// All of that, and marked in use.
    Dirty,
}

impl Shape {
    /// All of them.
    pub const ALL: [Shape; 5] = [
        Shape::Empty,
        Shape::Used,
        Shape::Holes,
        Shape::Tail,
        Shape::Dirty,
    ];
}

/// A start image, and what is known of it.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// For reports.
    pub name: String,
    /// The store with the disk in it. Never changed: runs work on copies.
    pub start: MemoryStore,
    /// What the disk reads.
    pub initial: Words,
    /// What the base reads; zeros without one.
    pub below: Words,
    /// Clusters of the disk.
    pub clusters: u64,
    /// Clusters that are compared: more than the disk's where it is to grow.
    pub shown: u64,
    /// What the checker finds in the top image.
    pub findings: Vec<FindingKind>,
    overlay: bool,
    tracked: bool,
    /// Sectors that no run writes to.
    untouched: std::ops::Range<u64>,
}

/// What the top image lies on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Base {
    None,
    Patchy,
    Full,
}

impl Fixture {
    /// A disk of `clusters` clusters, on a base when `overlay`.
    pub fn new(version: Version, shape: Shape, overlay: bool, clusters: u64) -> Fixture {
        let base = if overlay { Base::Patchy } else { Base::None };
        Fixture::on_base(version, shape, base, clusters)
    }

    /// The same on a base that has data in every sector.
    pub fn on_data(version: Version, shape: Shape, clusters: u64) -> Fixture {
        Fixture::on_base(version, shape, Base::Full, clusters)
    }

    fn on_base(version: Version, shape: Shape, base: Base, clusters: u64) -> Fixture {
        let store = MemoryStore::new();
        store.create_dir(Path::new(DIR)).unwrap();
        let overlay = base != Base::None;
        let mut base_words = vec![0; (clusters * CLUSTER_SECTORS) as usize];
        if overlay {
            // A patchy one is smaller than the top: what lies behind its end is zeros.
            let size = clusters - u64::from(base == Base::Patchy);
            let disk = new_image(&store, BOTTOM, version, size, None);
            for cluster in 0..size {
                // Every fifth cluster of a patchy base is full.
                let like = if base == Base::Full { 0 } else { cluster };
                write_base(&disk, cluster, like);
            }
            disk.close().unwrap();
            let words = words_of(&disk).unwrap();
            base_words[..words.len()].copy_from_slice(&words);
        }
        let top = if overlay { OVERLAY } else { BOTTOM };
        let below = overlay.then(|| sealed(&store, BOTTOM));
        let disk = new_image(&store, top, version, clusters, below);
        if shape != Shape::Empty {
            for cluster in [1, 3, clusters - 2] {
                let sectors = cluster * CLUSTER_SECTORS + 2..(cluster + 1) * CLUSTER_SECTORS - 3;
                let at = sectors.start * SECTOR;
                disk.write(at, &payload(START, sectors)).unwrap();
            }
        }
        disk.close().unwrap();
        drop(disk);
        damage(&store, Path::new(top), shape);
        write_descriptor(&store, clusters, overlay);

        let name = format!(
            "{version:?}, {shape:?}, {}",
            match base {
                Base::None => "bare",
                Base::Patchy => "on a base",
                Base::Full => "on a base full of data",
            }
        );
        let initial = Words::default();
        let mut fixture = Fixture {
            name,
            start: store,
            initial,
            below: Arc::new(base_words),
            clusters,
            shown: clusters,
            findings: vec![],
            overlay,
            tracked: false,
            untouched: 0..0,
        };
        let disk = fixture.open(&fixture.start, false).unwrap();
        fixture.initial = Arc::new(words_of(&disk).unwrap());
        let scan = scan_image(fixture.top_file(&fixture.start).as_ref()).unwrap();
        fixture.findings = scan.findings.iter().map(|f| f.kind).collect();
        fixture
    }

    /// The same for a disk that is to grow: `shown` clusters are compared.
    #[must_use]
    pub fn showing(mut self, shown: u64) -> Fixture {
        self.shown = shown;
        for words in [&mut self.initial, &mut self.below] {
            Arc::make_mut(words).resize((shown * CLUSTER_SECTORS) as usize, 0);
        }
        self
    }

    /// The same for a disk whose writes are tracked from here on, by trackers of a sector and of two
    /// clusters for a bit.
    #[must_use]
    pub fn tracked(mut self) -> Fixture {
        let known = TRACKERS.map(|(id, granularity)| {
            format!("\"{id}\": {{\"name\": \"{granularity}\", \"granularity\": {granularity}}}")
        });
        let text = format!("{{\"trackers\": {{{}}}}}", known.join(", "));
        self.start
            .create_dir(&Path::new(DIR).join(".ploop"))
            .unwrap();
        let meta = Path::new(DIR).join(".ploop/meta.json");
        let file = self.start.create(&meta, 0o600).unwrap();
        file.write_at(text.as_bytes(), 0).unwrap();
        let disk = self.open(&self.start, true).unwrap();
        for (id, _) in TRACKERS {
            disk.clear_tracker(id).unwrap();
        }
        disk.close().unwrap();
        self.tracked = true;
        self
    }

    /// The trackers of the disk, as whoever opens it next finds them.
    pub fn trackers(&self, store: &(impl Store + Clone + 'static)) -> ploop::Result<Vec<Tracker>> {
        let store: Arc<dyn Store> = Arc::new(store.clone());
        let file = self.top_file(store.as_ref());
        Opener::on(store).trackers(Path::new(DIR), file.as_ref())
    }

    /// The same for runs that never write to `sectors`: no tracker may say that they did.
    #[must_use]
    pub fn leaving(mut self, sectors: std::ops::Range<u64>) -> Fixture {
        self.untouched = sectors;
        self
    }

    /// See [`Fixture::leaving`].
    pub fn untouched(&self) -> std::ops::Range<u64> {
        self.untouched.clone()
    }

    /// True for a disk with trackers.
    pub fn is_tracked(&self) -> bool {
        self.tracked
    }

    /// Sectors that are compared.
    pub fn sectors(&self) -> u64 {
        self.shown * CLUSTER_SECTORS
    }

    /// Those of an open disk. Error: as [`words_of`], and data behind them.
    pub fn words(&self, disk: &Disk) -> Result<Vec<u64>, String> {
        words_within(disk, self.sectors() as usize)
    }

    /// True when the start image says that it is closed.
    pub fn closed(&self) -> bool {
        !self.findings.contains(&FindingKind::InUse)
    }

    /// True when the disk has a base.
    pub fn overlay(&self) -> bool {
        self.overlay
    }

    /// Where the writable image is.
    pub fn top_path(&self) -> PathBuf {
        if self.overlay {
            OVERLAY.into()
        } else {
            BOTTOM.into()
        }
    }

    /// Opens the disk in `store` the way the program does.
    pub fn open(&self, store: &(impl Store + Clone + 'static), write: bool) -> ploop::Result<Disk> {
        let store: Arc<dyn Store> = Arc::new(store.clone());
        self.open_on(&store, write)
    }

    /// The same, on a store behind a pointer.
    pub fn open_on(&self, store: &Arc<dyn Store>, write: bool) -> ploop::Result<Disk> {
        let source = Source {
            path: XML.into(),
            descriptor: true,
            snapshot: None,
        };
        let options = OpenOptions {
            write,
            ..OpenOptions::default()
        };
        // Every third flush with parts begins a new journal.
        let opener = Opener::on(store.clone()).with_journal_limit(1024);
        opener.open(&source, &options)
    }

    /// The writable image's file in `store`, for looking at.
    pub fn top_file(&self, store: &dyn Store) -> Arc<dyn StoreFile> {
        store.open(&self.top_path(), Access::Read).unwrap()
    }
}

/// Reads a whole disk. Holes are not read. Error: a sector that is no single value.
pub fn words_of(disk: &Disk) -> Result<Vec<u64>, String> {
    words_within(disk, (disk.size() / SECTOR) as usize)
}

fn words_within(disk: &Disk, sectors: usize) -> Result<Vec<u64>, String> {
    let mut words = vec![0; sectors];
    let mut segments: Vec<Segment> = Vec::new();
    let lease = disk
        .map(0..disk.size(), &mut segments)
        .map_err(|e| format!("map: {e}"))?;
    let mut buf = Vec::new();
    for s in &segments {
        let SegmentPlace::File { layer, offset } = s.place else {
            if s.place == SegmentPlace::Hole {
                continue;
            }
            return Err(format!("{s:?}: {:?}", lease.read(s, 0, &mut [0; 1])));
        };
        let (mut at, end) = (offset, offset + s.len);
        let file = lease.file(layer);
        while let Some(data) = file.next_data(at, end).map_err(|e| e.to_string())? {
            buf.resize((data.end - data.start) as usize, 0);
            lease
                .read(s, data.start - offset, &mut buf)
                .map_err(|e| format!("read: {e}"))?;
            let first = (s.offset + (data.start - offset)) / SECTOR;
            for (sector, bytes) in (first..).zip(buf.chunks(SECTOR as usize)) {
                let word = uniform(bytes)
                    .ok_or_else(|| format!("sector {sector} holds more than one value"))?;
                match words.get_mut(sector as usize) {
                    Some(place) => *place = word,
                    None if word == 0 => {}
                    None => return Err(format!("sector {sector} has data, behind the end")),
                }
            }
            at = data.end;
        }
    }
    Ok(words)
}

/// The number that a sector holds 64 times.
pub fn uniform(sector: &[u8]) -> Option<u64> {
    let (first, rest) = sector.split_first_chunk()?;
    // Equal to itself shifted by one number: all numbers are equal.
    (sector[..rest.len()] == *rest).then(|| u64::from_le_bytes(*first))
}

fn new_image(
    store: &MemoryStore,
    path: &str,
    version: Version,
    clusters: u64,
    below: Option<Arc<Chain>>,
) -> Disk {
    let header = Header::new(version, CLUSTER_SECTORS as u32, clusters * CLUSTER_SECTORS).unwrap();
    let file = create(store, Path::new(path), &header, 0o600).unwrap();
    Disk::writable(below, Top::open(file).unwrap(), None).unwrap()
}

fn sealed(store: &MemoryStore, path: &str) -> Arc<Chain> {
    let file = store.open(Path::new(path), Access::Read).unwrap();
    Arc::new(Chain::new(vec![Arc::new(PloopDelta::open(file).unwrap())]).unwrap())
}

/// Fills `cluster` in the way of cluster `like` of a patchy base.
fn write_base(disk: &Disk, cluster: u64, like: u64) {
    let first = cluster * CLUSTER_SECTORS;
    let sectors = match like % 5 {
        0 => first..first + CLUSTER_SECTORS,
        1 => first + 8..first + 9,
        2 => first + 20..first + CLUSTER_SECTORS,
        3 => first..first + 3,
        _ => return,
    };
    disk.write(sectors.start * SECTOR, &payload(BASE, sectors))
        .unwrap();
}

/// Makes the shape out of an image whose file clusters 0, 1 and 2 are in use.
fn damage(store: &MemoryStore, path: &Path, shape: Shape) {
    let file = store.open(path, Access::Write).unwrap();
    let (header, len) = read_header(file.as_ref()).unwrap();
    if matches!(shape, Shape::Holes | Shape::Dirty) {
        file.write_at(&[0; 4], Header::slot_offset(3)).unwrap();
        // What was a good cluster's bytes must not be taken for an operation's.
        file.write_at(
            &payload(JUNK, 0..CLUSTER_SECTORS),
            header.data_start + CLUSTER,
        )
        .unwrap();
    }
    if matches!(shape, Shape::Tail | Shape::Dirty) {
        let half = if shape == Shape::Tail {
            0
        } else {
            CLUSTER_SECTORS / 2
        };
        file.write_at(&payload(JUNK, 1000..1000 + 2 * CLUSTER_SECTORS + half), len)
            .unwrap();
    }
    if shape == Shape::Dirty {
        file.write_at(header.marked(IN_USE_DIRTY).bytes(), 0)
            .unwrap();
    }
}

fn write_descriptor(store: &MemoryStore, clusters: u64, overlay: bool) {
    let d = descriptor(clusters * CLUSTER_SECTORS, CLUSTER_SECTORS as u32, overlay);
    let file = store.create(Path::new(XML), 0o600).unwrap();
    file.write_at(&d.to_xml(), 0).unwrap();
}
