//! What the other side of a move says. Input: bit 0 of the first byte: what follows are frames (type, two
//! bytes of length, payload), which get their right checksums; else it is what comes on the link. Bit 1:
//! to a source, else to a destination. Bits 2 and 3, of a source: its data follows; its files stay.

use std::collections::BTreeSet;
use std::io::{Cursor, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use nbd_server::export::Disks;
use nbd_server::migrate::source::{Deadline, Failed, Options, Progress, Source, Watch};
use nbd_server::migrate::{Destination, bytes};
use nbd_server::{Config, Connections, Server};
use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::open::{DESCRIPTOR, Opener};
use ploop::format::ploop::{Header, Version, create};
use ploop::owner::{self, Owner, Record, State};
use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use snapshots::Root;
use snapshots::place::Place;
use snapshots::snapshot::{NewSnapshot, take_offline};

const DIR: &str = "/store";
/// Containers that are there: one that may leave, and two whose move has not ended.
const THERE: &str = "there";
const UNENDED: [(&str, State, u8); 2] = [("a", State::Ready, 3), ("b", State::Taken, 4)];
/// What comes is called.
const NEW: &str = "new";
/// Bytes of a disk.
const SIZE: u64 = 128 << 10;

const FRAMES: u8 = 1;
const TO_SOURCE: u8 = 2;
const LATER: u8 = 4;
const KEEP: u8 = 8;

fn on(store: &MemoryStore) -> Root {
    let opener = Opener::on(Arc::new(store.clone()));
    Root::on(opener, Path::new(DIR), true, false).unwrap()
}

fn container(root: &Root, name: &str) {
    let dir = root.container(name);
    root.store().create_dir(&dir).unwrap();
    let header = Header::new(Version::V2, 64, SIZE / 512).unwrap();
    drop(create(root.store(), &dir.join("root.hds"), &header, 0o600).unwrap());
    let d = Descriptor::new_single(SIZE / 512, 64, false, Guid::TOP, "root.hds").unwrap();
    let xml = root.store().create(&dir.join(DESCRIPTOR), 0o600).unwrap();
    xml.write_at(&d.to_xml(), 0).unwrap();
}

fn base() -> &'static MemoryStore {
    static BASE: OnceLock<MemoryStore> = OnceLock::new();
    BASE.get_or_init(|| {
        let store = MemoryStore::new();
        store.create_dir(Path::new(DIR)).unwrap();
        let root = on(&store);
        container(&root, THERE);
        let place = Place::container(&root, THERE).unwrap();
        let write = |offset: u64, bytes: &[u8]| {
            let disk = place.open().unwrap();
            disk.write(offset, bytes).unwrap();
            disk.close().unwrap();
        };
        write(4096, &[1; 512]);
        let new = NewSnapshot {
            name: Some("s".into()),
            description: String::new(),
            guid: Some(Guid::from_bytes([1; 16])),
            ..NewSnapshot::default()
        };
        take_offline(&place, &new).unwrap();
        write(40_000, &[2; 100]);
        place.sweep().unwrap();
        for (name, state, id) in UNENDED {
            container(&root, name);
            let record = Record {
                state,
                id: Guid::from_bytes([id; 16]),
                epoch: 1,
                peer: "unix:/other".into(),
            };
            Owner::write(root.store(), &root.container(name), record).unwrap();
        }
        store
    })
}

/// A service of a store.
struct Service {
    disks: Arc<Disks>,
    connections: Connections,
    _server: Server,
}

fn service(store: &MemoryStore) -> Service {
    let disks = Arc::new(Disks::new(on(store), false));
    let server = Server::new(disks.clone(), Config::default());
    Service {
        disks,
        connections: server.connections(),
        _server: server,
    }
}

struct Nobody;

impl Watch for Nobody {
    fn cancelled(&self) -> bool {
        false
    }

    fn pace(&self, _: u64) {}

    fn progress(&self, _: Progress) {}

    fn freeze(&self, _: &mut dyn FnMut() -> ploop::Result<()>) -> ploop::Result<()> {
        Ok(())
    }

    fn fed(&self) {}
}

fn options(flags: u8) -> Options {
    Options {
        name: NEW.into(),
        downtime: Duration::from_secs(1),
        holder: None,
        keep: flags & KEEP != 0,
        later: flags & LATER != 0,
        brake: true,
    }
}

fn leave(
    service: &Service,
    flags: u8,
    link: impl Read + Write + Send + 'static,
) -> Result<(), Failed> {
    let options = options(flags);
    let source = Source {
        disks: &service.disks,
        connections: &service.connections,
        disk: service.disks.live(THERE).unwrap(),
        place: service.disks.place(THERE).unwrap(),
        options: &options,
        watch: &Nobody,
        peer: format!("{NEW} unix:/other"),
        deadline: Arc::new(Deadline::default()),
    };
    bytes::leave(source, link).map(drop)
}

/// Bytes that come; what is said goes nowhere.
struct Tape(Cursor<Vec<u8>>);

impl Read for Tape {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Tape {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn tape(bytes: &[u8]) -> Tape {
    Tape(Cursor::new(bytes.to_vec()))
}

/// The frames of an input, with their sums.
fn made(mut input: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut number = 0u64;
    while let [kind, a, b, rest @ ..] = input {
        let len = usize::from(u16::from_le_bytes([*a, *b])).min(rest.len());
        let mut head = vec![*kind, 0, 0, 0];
        head.extend((len as u32).to_le_bytes());
        let mut sum = crc32fast::Hasher::new();
        sum.update(&number.to_le_bytes());
        sum.update(&head);
        sum.update(&rest[..len]);
        out.extend(head);
        out.extend(sum.finalize().to_le_bytes());
        out.extend(&rest[..len]);
        (number, input) = (number + 1, &rest[len..]);
    }
    out
}

/// All that a container shows; it can be written to, too.
fn shows(root: &Root, name: &str) -> Vec<u8> {
    let place = Place::container(root, name).unwrap();
    let disk = place.open().unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut bytes = vec![0; disk.size().min(SIZE) as usize];
    disk.read(0, &mut bytes)
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    disk.write(0, &[7; 512])
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    disk.close().unwrap_or_else(|e| panic!("{name}: {e}"));
    bytes
}

fn names(store: &MemoryStore, room: &str) -> Vec<String> {
    let all = store.list(&Path::new(DIR).join(room));
    let all = all.unwrap().into_iter();
    all.map(|n| n.to_string_lossy().into_owned()).collect()
}

fn state(root: &Root, name: &str) -> Option<State> {
    let record = owner::read(root.store(), &root.container(name));
    record.unwrap().map(|r| r.state)
}

/// Says it to one of them.
pub fn run(input: &[u8]) {
    let Some((&flags, rest)) = input.split_first() else {
        return;
    };
    let said = match flags & FRAMES {
        0 => rest.to_vec(),
        _ => made(rest),
    };
    let store = base().snapshot();
    match flags & TO_SOURCE {
        0 => to_destination(&store, &said),
        _ => to_source(&store, flags, &said),
    }
}

fn to_destination(store: &MemoryStore, said: &[u8]) {
    let service = service(store);
    // What was taken is kept open for a time, unless it leaves.
    let hello = bytes::frames(tape(said)).0.into_iter().next();
    let hello = hello.and_then(|(_, p)| serde_json::from_slice::<serde_json::Value>(&p).ok());
    let name = hello.and_then(|h| Some(h.get("name")?.as_str()?.to_owned()));
    let _leaves = name.and_then(|name| service.disks.leaving().enter(&name).ok());
    let to = Arc::new(Destination::new(
        service.disks.clone(),
        service.connections.clone(),
    ));
    let done = bytes::attend(&to, tape(said));
    drop((to, service));
    let root = on(store);
    assert!(
        names(store, "tmp").is_empty(),
        "{done:?}: something is left"
    );
    for name in names(store, "containers") {
        match state(&root, &name) {
            Some(State::Arriving) => panic!("{done:?}: half of {name} is left"),
            Some(State::Ready | State::Given) => {}
            Some(_) | None => drop(shows(&root, &name)),
        }
    }
}

fn to_source(store: &MemoryStore, flags: u8, said: &[u8]) {
    let service = service(store);
    let done = leave(&service, flags, tape(said));
    drop(service);
    let root = on(store);
    let has = || names(store, "containers").iter().any(|n| n == THERE);
    match done {
        Ok(()) if flags & KEEP == 0 => assert!(!has(), "it moved, and is here"),
        Ok(()) | Err(Failed::Given(_) | Failed::Fed(_)) => {
            assert_eq!(state(&root, THERE), Some(State::Given));
        }
        Err(Failed::Here(e)) => {
            let here = state(&root, THERE);
            assert!(matches!(here, None | Some(State::Offered)), "{here:?}: {e}");
            assert!(
                shows(&root, THERE) == shows(&on(&base().snapshot()), THERE),
                "{e}"
            );
        }
    }
}

/// Both ends of a link, the other of which is heard.
struct Tee(UnixStream, Arc<Mutex<Vec<u8>>>);

impl Read for Tee {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.0.read(buf)?;
        self.1.lock().unwrap().extend_from_slice(&buf[..n]);
        Ok(n)
    }
}

impl Write for Tee {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A move from one store to another; what each side heard.
fn moved(flags: u8) -> [Vec<u8>; 2] {
    let (from, to) = (service(&base().snapshot()), service(&base().snapshot()));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let heard = [(); 2].map(|()| Arc::<Mutex<Vec<u8>>>::default());
    std::thread::scope(|scope| {
        let hears = Tee(theirs, heard[0].clone());
        let _leaves = to.disks.leaving().enter(NEW).unwrap();
        let to = Arc::new(Destination::new(to.disks.clone(), to.connections.clone()));
        let taken = scope.spawn(move || bytes::attend(&to, hears));
        let left = leave(&from, flags, Tee(ours, heard[1].clone()));
        let taken = taken.join().unwrap();
        // Nobody fetches what is missing here.
        assert!(
            left.is_ok() && taken.is_ok() || flags & LATER != 0,
            "{left:?} {taken:?}"
        );
    });
    heard.map(|h| std::mem::take(&mut *h.lock().unwrap()))
}

/// What is sent to either side of a move, as it is and as frames; and what ends one that was cut.
pub fn seeds() -> BTreeSet<Vec<u8>> {
    let mut all = BTreeSet::new();
    let mut add = |flags: u8, said: &[u8]| {
        let mut frames = Vec::new();
        for (kind, payload) in bytes::frames(tape(said)).0 {
            frames.push(kind);
            frames.extend((payload.len() as u16).to_le_bytes());
            frames.extend(payload);
        }
        all.insert([&[flags | FRAMES], frames.as_slice()].concat());
        all.insert([&[flags], said].concat());
    };
    for flags in [0, KEEP, LATER] {
        let [destination, source] = moved(flags);
        add(0, &destination);
        add(flags | TO_SOURCE, &source);
    }
    for (name, _, id) in UNENDED {
        for verdict in ["\"given\"", "{\"aborted\":{\"epoch\":3}}"] {
            let hello = serde_json::json!({
                "version": 1, "id": Guid::from_bytes([id; 16]).to_string(), "name": name,
                "purpose": "settle",
            });
            let mut frames = Vec::new();
            for (kind, payload) in [
                (1u8, hello.to_string()),
                (9, verdict.into()),
                (10, String::new()),
            ] {
                frames.push(kind);
                frames.extend((payload.len() as u16).to_le_bytes());
                frames.extend(payload.into_bytes());
            }
            add(0, &made(&frames));
        }
    }
    all
}
