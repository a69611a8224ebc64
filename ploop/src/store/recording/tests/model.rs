//! The enumeration against a definition of it that is slow and obvious.
//!
//! The definition keeps every change ever made with the set of syncs it still needs, and replays
//! every subset of the losable ones from an empty disk: no base, no folding, no short cuts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::store::memory::MemoryStore;
use crate::store::recording::{Budget, Fault, RecordingStore};
use crate::store::{Access, EntryKind, Store, StoreFile};

/// A readable disk: path to content.
type Plain = BTreeMap<PathBuf, Vec<u8>>;

#[derive(Clone, Debug)]
enum Piece {
    Bytes {
        file: usize,
        at: usize,
        len: usize,
        byte: u8,
    },
    Len {
        file: usize,
        len: usize,
    },
    Name {
        file: usize,
        path: PathBuf,
    },
    Move {
        file: usize,
        from: PathBuf,
        to: PathBuf,
    },
    Gone {
        path: PathBuf,
    },
}

#[derive(Clone, Debug)]
struct Change {
    piece: Piece,
    /// Syncs that it still needs: a file's number, or a directory.
    file: Option<usize>,
    dirs: BTreeSet<PathBuf>,
    stuck: bool,
}

impl Change {
    fn losable(&self) -> bool {
        self.stuck || self.file.is_some() || !self.dirs.is_empty()
    }
}

fn parent(path: &Path) -> PathBuf {
    path.parent().unwrap().to_path_buf()
}

const SIZE: usize = 4 * 512;

/// Replays the changes that `keep` says.
fn replay(changes: &[Change], keep: impl Fn(usize) -> bool) -> Plain {
    let mut names: BTreeMap<PathBuf, usize> = BTreeMap::new();
    let mut files: BTreeMap<usize, (usize, [u8; SIZE])> = BTreeMap::new();
    for change in changes
        .iter()
        .enumerate()
        .filter(|(n, _)| keep(*n))
        .map(|(_, change)| change)
    {
        let mut body = |file: usize, act: &dyn Fn(&mut usize, &mut [u8])| {
            let (len, bytes) = files.entry(file).or_insert((0, [0; SIZE]));
            act(len, bytes);
        };
        match &change.piece {
            Piece::Bytes {
                file,
                at,
                len,
                byte,
            } => {
                body(*file, &|_, bytes| bytes[*at..at + len].fill(*byte));
            }
            Piece::Len { file, len: new } => body(*file, &|len, bytes| {
                if new < len {
                    bytes[*new..].fill(0);
                }
                *len = *new;
            }),
            Piece::Name { file, path } => drop(names.insert(path.clone(), *file)),
            Piece::Move { file, from, to } => {
                names.retain(|_, there| there != file);
                names.remove(from);
                names.insert(to.clone(), *file);
            }
            Piece::Gone { path } => drop(names.remove(path)),
        }
    }
    let content = |file: usize| {
        files
            .get(&file)
            .map_or(Vec::new(), |(len, b)| b[..*len].to_vec())
    };
    names
        .into_iter()
        .map(|(path, file)| (path, content(file)))
        .collect()
}

fn expected(changes: &[Change]) -> BTreeSet<Plain> {
    let losable: Vec<usize> = (0..changes.len())
        .filter(|&n| changes[n].losable())
        .collect();
    let subset = |mask: u32| {
        replay(changes, |n| match losable.binary_search(&n) {
            Ok(bit) => mask >> bit & 1 == 1,
            Err(_) => true,
        })
    };
    (0..1u32 << losable.len()).map(subset).collect()
}

fn read_all(store: &MemoryStore, dir: &Path, out: &mut Plain) {
    for name in store.list(dir).unwrap() {
        let path = dir.join(name);
        if store.kind(&path).unwrap() == Some(EntryKind::Dir) {
            read_all(store, &path, out);
            continue;
        }
        let file = store.open(&path, Access::Read).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
        out.insert(path, bytes);
    }
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) as usize % n
    }
}

/// The store under test and the definition, driven together.
struct Pair {
    rec: RecordingStore,
    changes: Vec<Change>,
    files: Vec<Arc<dyn StoreFile>>,
    names: BTreeMap<PathBuf, usize>,
}

impl Pair {
    fn new() -> Pair {
        let base = MemoryStore::new();
        base.create_dir(Path::new("/d")).unwrap();
        let rec = RecordingStore::on(&base);
        Pair {
            rec,
            changes: Vec::new(),
            files: Vec::new(),
            names: BTreeMap::new(),
        }
    }

    fn change(&mut self, piece: Piece, file: Option<usize>, dirs: &[&Path]) {
        let dirs = dirs.iter().map(|path| parent(path)).collect();
        self.changes.push(Change {
            piece,
            file,
            dirs,
            stuck: false,
        });
    }

    fn bytes(&mut self, file: usize, at: usize, len: usize, byte: u8) {
        let mut from = at;
        while from < at + len {
            let to = (from / 512 + 1) * 512;
            let n = to.min(at + len) - from;
            self.change(
                Piece::Bytes {
                    file,
                    at: from,
                    len: n,
                    byte,
                },
                Some(file),
                &[],
            );
            from += n;
        }
    }

    fn synced(&mut self, ok: bool, covers: impl Fn(&mut Change) -> bool) {
        for change in self.changes.iter_mut().filter(|change| change.losable()) {
            if covers(change) && !ok {
                change.stuck = true;
            }
        }
    }

    fn sync(&mut self, rng: &mut Rng, file: Option<usize>) {
        let dir = PathBuf::from(["/", "/d"][rng.below(2)]);
        let ok = rng.below(8) > 0;
        if !ok {
            self.rec.fail_sync(self.rec.syncs(), Fault::Eio);
        }
        let done = match file {
            Some(file) => self.files[file].sync(),
            None => self.rec.sync_dir(&dir),
        };
        assert_eq!(done.is_ok(), ok);
        self.synced(ok, |change| match file {
            Some(file) if change.file == Some(file) => {
                change.file = None;
                true
            }
            Some(_) => false,
            None => change.dirs.remove(&dir),
        });
    }

    fn names_step(&mut self, rng: &mut Rng) {
        let paths = ["/a", "/b", "/d/a", "/d/b"].map(PathBuf::from);
        let (path, to) = (paths[rng.below(4)].clone(), paths[rng.below(4)].clone());
        match (rng.below(3), self.names.get(&path).copied()) {
            (_, None) => {
                let file = self.files.len();
                self.files.push(self.rec.create(&path, 0o600).unwrap());
                self.names.insert(path.clone(), file);
                self.change(
                    Piece::Name {
                        file,
                        path: path.clone(),
                    },
                    None,
                    &[&path],
                );
            }
            (0, Some(_)) => {
                self.rec.remove_file(&path).unwrap();
                self.names.remove(&path);
                self.change(Piece::Gone { path: path.clone() }, None, &[&path]);
            }
            (_, Some(file)) if path != to => {
                self.rec.rename(&path, &to).unwrap();
                self.names.remove(&path);
                self.names.insert(to.clone(), file);
                let piece = Piece::Move {
                    file,
                    from: path.clone(),
                    to: to.clone(),
                };
                self.change(piece, None, &[&path, &to]);
            }
            _ => {}
        }
    }

    fn step(&mut self, rng: &mut Rng) {
        let kind = rng.below(10);
        if self.files.is_empty() || kind < 3 {
            return self.names_step(rng);
        }
        let file = rng.below(self.files.len());
        let handle = Arc::clone(&self.files[file]);
        let old = handle.len().unwrap() as usize;
        let at = rng.below(SIZE - 1);
        let len = 1 + rng.below((SIZE - at).min(700));
        match kind {
            3 | 4 => {
                let byte = 1 + rng.below(255) as u8;
                handle.write_at(&vec![byte; len], at as u64).unwrap();
                self.bytes(file, at, len, byte);
                if at + len > old {
                    self.change(
                        Piece::Len {
                            file,
                            len: at + len,
                        },
                        Some(file),
                        &[],
                    );
                }
            }
            5 => {
                handle.set_len(at as u64).unwrap();
                self.change(Piece::Len { file, len: at }, Some(file), &[]);
            }
            6 => {
                handle.punch(at as u64, len as u64).unwrap();
                self.bytes(file, at, len.min(old.saturating_sub(at)), 0);
            }
            7 | 8 => self.sync(rng, Some(file)),
            _ => self.sync(rng, None),
        }
    }
}

#[test]
fn the_states_are_exactly_those_of_the_definition() {
    let budget = Budget {
        exhaustive_units: 32,
        ..Budget::default()
    };
    let (mut points, mut states) = (0, 0);
    for seed in 0..150 {
        let (mut pair, mut rng) = (Pair::new(), Rng(seed));
        let mut wanted = Vec::new();
        while pair
            .changes
            .iter()
            .filter(|change| change.losable())
            .count()
            <= 9
            && wanted.len() < 40
        {
            wanted.push((pair.rec.log().len(), expected(&pair.changes)));
            pair.step(&mut rng);
        }
        // Half of the seeds ask backwards, which starts the replay anew each time.
        if seed % 2 == 0 {
            wanted.reverse();
        }
        for (point, expected) in wanted {
            let mut found = BTreeSet::new();
            for state in pair.rec.states_at(point, &budget) {
                let mut plain = Plain::new();
                read_all(&state.build(), Path::new("/"), &mut plain);
                assert!(expected.contains(&plain), "seed {seed}: not legal: {state}");
                found.insert(plain);
            }
            assert_eq!(
                found.len(),
                expected.len(),
                "seed {seed} point {point}: some are missing"
            );
            points += 1;
            states += found.len();
        }
    }
    assert!(
        points > 1500 && states > 20_000,
        "{points} points, {states} states"
    );
}
