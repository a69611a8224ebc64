//! The memory store against the host's files, and what only it promises.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::MemoryStore;
use crate::error::{Kind, Result};
use crate::store::{Access, EntryKind, RealStore, Store, StoreFile};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) % n
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

/// One side of the comparison: a store and the directory in it that the operations are kept to.
struct Side {
    store: Arc<dyn Store>,
    top: PathBuf,
    open: Vec<Arc<dyn StoreFile>>,
}

/// Whatever a call gives, as text; errors by their kind.
fn said<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(e) => format!("error {:?}", e.kind()),
    }
}

const NAMES: &[&str] = &[
    "a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "d/../b", "a/../b", "d/e/..", "./a", "no/a", "",
];

#[derive(Debug)]
enum Op {
    Open(&'static str, Access),
    Create(&'static str),
    Rename(&'static str, &'static str, bool),
    RemoveFile(&'static str),
    CreateDir(&'static str),
    RemoveDir(&'static str),
    Look(&'static str),
    Close(usize),
    Read(usize, u64, usize),
    Write(usize, u64, usize, u8),
    SetLen(usize, u64),
    Punch(usize, u64, u64),
    Zero(usize, u64, u64),
    Lock(usize, u64, u64),
    Foreign(usize, u64, u64),
}

impl Op {
    fn random(rng: &mut Rng) -> Op {
        let (path, other) = (*rng.pick(NAMES), *rng.pick(NAMES));
        let file = rng.below(6) as usize;
        let at = *rng.pick(&[0, 1, 511, 512, 4095, 4096, 6000, 9000, 40_000, u64::MAX]);
        let n = *rng.pick(&[0, 1, 512, 513, 4096, 10_000, 20_000]);
        let access = *rng.pick(&[Access::Read, Access::Write, Access::Write]);
        match rng.below(18) {
            0 | 1 => Op::Open(path, access),
            2 | 3 => Op::Create(path),
            4 => Op::Rename(path, other, true),
            5 => Op::Rename(path, other, false),
            6 => Op::RemoveFile(path),
            7 => Op::CreateDir(path),
            8 => Op::RemoveDir(path),
            9 => Op::Look(path),
            10 => Op::Close(file),
            11 => Op::Read(file, at, n as usize),
            12 | 13 => Op::Write(file, at, n as usize, rng.below(256) as u8),
            14 => Op::SetLen(file, at),
            15 => Op::Punch(file, at, n),
            16 => Op::Zero(file, at, n),
            _ if rng.below(2) == 0 => Op::Lock(file, at % 4096, n % 600),
            _ => Op::Foreign(file, at % 4096, n % 600),
        }
    }
}

impl Side {
    fn at(&self, path: &str) -> PathBuf {
        if path.is_empty() {
            PathBuf::new()
        } else {
            self.top.join(path)
        }
    }

    fn keep(&mut self, made: Result<Arc<dyn StoreFile>>) -> String {
        said(made.map(|file| self.open.push(file)))
    }

    fn apply(&mut self, op: &Op) -> String {
        let store = Arc::clone(&self.store);
        match *op {
            // What the trait says about directories is tested below.
            Op::Open(path, Access::Write)
                if store.kind(&self.at(path)).unwrap() == Some(EntryKind::Dir) =>
            {
                String::new()
            }
            Op::Open(path, access) => self.keep(store.open(&self.at(path), access)),
            Op::Create(path) => self.keep(store.create(&self.at(path), 0o600)),
            Op::Rename(a, b, true) => said(store.rename(&self.at(a), &self.at(b))),
            Op::Rename(a, b, false) => said(store.rename_new(&self.at(a), &self.at(b))),
            Op::RemoveFile(path) => said(store.remove_file(&self.at(path))),
            Op::CreateDir(path) => said(store.create_dir(&self.at(path))),
            Op::RemoveDir(path) => said(store.remove_dir(&self.at(path))),
            Op::Look(path) => self.look(path),
            _ => self.apply_to_file(op),
        }
    }

    fn look(&self, path: &str) -> String {
        let full = self.at(path);
        let found = self.store.resolve(&full);
        let found = found.map(|p| p.strip_prefix(&self.top).unwrap().to_path_buf());
        let kind = said(self.store.kind(&full));
        format!("{kind} {} {}", said(self.store.list(&full)), said(found))
    }

    fn apply_to_file(&mut self, op: &Op) -> String {
        if let Op::Close(n) = *op {
            if n < self.open.len() {
                self.open.remove(n);
            }
            return String::new();
        }
        let (Op::Read(n, ..)
        | Op::Write(n, ..)
        | Op::SetLen(n, _)
        | Op::Punch(n, ..)
        | Op::Zero(n, ..)
        | Op::Lock(n, ..)
        | Op::Foreign(n, ..)) = *op
        else {
            unreachable!("{op:?}");
        };
        let Some(file) = self.open.get(n) else {
            return String::new();
        };
        match *op {
            Op::Read(_, at, n) => {
                let mut buf = vec![0xee; n];
                format!("{} {buf:?}", said(file.read_at(&mut buf, at)))
            }
            Op::Write(_, at, n, byte) => said(file.write_at(&vec![byte; n], at)),
            Op::SetLen(_, len) => said(file.set_len(len)),
            Op::Punch(_, at, n) => said(file.punch(at, n)),
            Op::Zero(_, at, n) => said(file.zero(at, n)),
            Op::Lock(_, at, n) => said(file.lock_bytes(at, n)),
            _ => match *op {
                Op::Foreign(_, at, n) => said(file.foreign_lock(at, n)),
                _ => unreachable!("{op:?}"),
            },
        }
    }

    /// Every name and byte under `path`, and every open file; checks `next_data` on the way.
    fn dump(&self, path: &Path, out: &mut Vec<String>) {
        for name in self.store.list(path).unwrap() {
            let full = path.join(&name);
            out.push(full.strip_prefix(&self.top).unwrap().display().to_string());
            match self.store.kind(&full).unwrap() {
                Some(EntryKind::Dir) => self.dump(&full, out),
                _ => out.push(whole(&*self.store.open(&full, Access::Read).unwrap())),
            }
        }
        if path == self.top {
            out.extend(self.open.iter().map(|file| whole(&**file)));
            let same = |a: &Arc<dyn StoreFile>| self.open.iter().position(|b| a.id() == b.id());
            out.extend(
                self.open
                    .iter()
                    .map(|a| format!("first handle {:?}", same(a))),
            );
        }
    }
}

fn whole(file: &dyn StoreFile) -> String {
    let len = file.len().unwrap();
    let mut buf = vec![0; len as usize];
    assert_eq!(file.read_at(&mut buf, 0).unwrap(), buf.len());
    let (mut from, mut seen) = (0, vec![0; buf.len()]);
    while let Some(data) = file.next_data(from, len).unwrap() {
        assert!(
            data.start >= from && data.end > data.start && data.end <= len,
            "{data:?}"
        );
        let range = data.start as usize..data.end as usize;
        seen[range.clone()].copy_from_slice(&buf[range]);
        from = data.end;
    }
    assert!(seen == buf, "{file:?}: bytes outside of the reported data");
    format!("{len} bytes {buf:?}")
}

#[test]
fn answers_as_the_host_does() {
    for seed in 0..12 {
        let real_top = tempfile::tempdir().unwrap();
        let memory = MemoryStore::shared();
        memory.create_dir(Path::new("/top")).unwrap();
        let mut real = Side {
            store: RealStore::shared(),
            top: RealStore.resolve(real_top.path()).unwrap(),
            open: Vec::new(),
        };
        let mut memory = Side {
            store: memory,
            top: "/top".into(),
            open: Vec::new(),
        };
        let mut rng = Rng(seed);
        for step in 0..1500 {
            let op = Op::random(&mut rng);
            let (a, b) = (real.apply(&op), memory.apply(&op));
            assert!(
                a == b,
                "seed {seed} step {step} {op:?}:\nhost   {a:.200}\nmemory {b:.200}"
            );
            if step % 25 == 0 {
                let (mut a, mut b) = (Vec::new(), Vec::new());
                real.dump(&real.top, &mut a);
                memory.dump(&memory.top, &mut b);
                assert!(
                    a == b,
                    "seed {seed} step {step} after {op:?}: {a:.60?} {b:.60?}"
                );
            }
        }
    }
}

#[test]
fn a_sparse_file_costs_its_pages() {
    let store = MemoryStore::new();
    let file = store.create(Path::new("/big"), 0o600).unwrap();
    file.set_len(1 << 50).unwrap();
    file.write_at(b"end", (1 << 40) - 3).unwrap();
    assert_eq!(
        file.next_data(0, u64::MAX).unwrap(),
        Some((1 << 40) - 4096..1 << 40)
    );
    file.punch(0, 1 << 49).unwrap();
    assert_eq!(file.next_data(0, u64::MAX).unwrap(), None);
    assert_eq!(file.len().unwrap(), 1 << 50);
}

#[test]
fn data_is_cut_to_what_was_asked() {
    let file = MemoryStore::new().create(Path::new("f"), 0o600).unwrap();
    file.write_at(&[1; 10_000], 4096).unwrap();
    assert_eq!(file.next_data(0, 4096).unwrap(), None);
    assert_eq!(file.next_data(0, 5000).unwrap(), Some(4096..5000));
    assert_eq!(file.next_data(6000, u64::MAX).unwrap(), Some(6000..14_096));
    file.punch(8192, 4096).unwrap();
    assert_eq!(file.next_data(6000, u64::MAX).unwrap(), Some(6000..8192));
}

#[test]
fn a_clone_is_the_same_store_and_a_snapshot_is_not() {
    let store = MemoryStore::new();
    let file = store.clone().create(Path::new("/f"), 0o600).unwrap();
    file.write_at(&[1; 8192], 0).unwrap();
    let copy = store.snapshot();
    file.write_at(&[2; 10], 0).unwrap();
    store.rename(Path::new("/f"), Path::new("/g")).unwrap();
    let old = copy.open(Path::new("/f"), Access::Write).unwrap();
    assert_eq!(whole(&*old), format!("8192 bytes {:?}", vec![1; 8192]));
    old.write_at(&[3; 10], 0).unwrap();
    let mut buf = [0; 10];
    file.read_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [2; 10]);
    assert_ne!(old.id(), file.id(), "files of two stores are two files");
}

#[test]
fn directories_are_not_files() {
    let store = MemoryStore::new();
    store.create_dir(Path::new("/d")).unwrap();
    for access in [Access::Read, Access::Write] {
        assert_eq!(
            store.open(Path::new("/d"), access).unwrap_err().kind(),
            Kind::Invalid
        );
    }
    assert!(store.sync_dir(Path::new("/d")).is_ok());
    assert_eq!(
        store.sync_dir(Path::new("/e")).unwrap_err().kind(),
        Kind::NotFound
    );
    assert!(store.remove_dir(Path::new("/")).is_err());
    assert_eq!(
        store.resolve(Path::new("d/.././../d")).unwrap(),
        Path::new("/d")
    );
}

#[test]
fn locks_belong_to_the_open_file() {
    let store = MemoryStore::new();
    let a = store.create(Path::new("/f"), 0o600).unwrap();
    let b = store.open(Path::new("/f"), Access::Read).unwrap();
    a.lock_bytes(100, 2).unwrap();
    b.lock_bytes(101, 1).unwrap();
    assert!(b.foreign_lock(100, 1).unwrap());
    assert!(
        !a.foreign_lock(100, 1).unwrap(),
        "one's own lock is not foreign"
    );
    assert!(a.foreign_lock(0, 0).unwrap(), "length 0 reaches to the end");
    assert!(!b.foreign_lock(102, 50).unwrap());
    drop(a);
    assert!(!b.foreign_lock(0, 0).unwrap());
}

#[test]
fn many_threads_write_one_file() {
    let store = MemoryStore::new();
    let file = store.create(Path::new("/f"), 0o600).unwrap();
    std::thread::scope(|scope| {
        for t in 0..4u8 {
            let file = Arc::clone(&file);
            scope.spawn(move || {
                for i in 0..500 {
                    file.write_at(&[t + 1; 100], (i * 4 + u64::from(t)) * 100)
                        .unwrap();
                }
            });
        }
    });
    let mut buf = vec![0; 200_000];
    assert_eq!(file.read_at(&mut buf, 0).unwrap(), buf.len());
    assert!(
        buf.chunks(100)
            .enumerate()
            .all(|(i, c)| c.iter().all(|&b| b == (i % 4) as u8 + 1))
    );
}
