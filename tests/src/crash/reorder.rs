//! A store that performs one sync at another time than the code says: the error that a review does
//! not see. Tests must turn red on it.
//!
//! * *Early*: before the last change that it should cover.
//! * *Late*: it returns at once, and is performed after the next change, of whatever.
//!
//! Each sync also says from which line of the code it came ([`SyncCall::site`]).
//!
//! Which change is the last one is known only afterwards, so an early run needs a run before it
//! that writes them down ([`ReorderingStore::calls`]); both runs must do the same.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ploop::Result;
use ploop::store::recording::RecordingStore;
use ploop::store::{Access, FileId, FileSystem, Store, StoreFile};

/// What is done to one sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As the code says.
    Unchanged,
    /// Sync number `sync` comes before change number `change`, of which `of` says what it syncs.
    Early {
        /// Which sync, counted as the recording store does.
        sync: u64,
        /// Before which change.
        change: u64,
        /// Synced then.
        of: Target,
    },
    /// Sync number `.0` comes after the next change.
    Late(u64),
}

/// What a change touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The file itself.
    File,
    /// The directory that a name goes from, or is in.
    From,
    /// The directory that a name comes into.
    To,
    /// Whatever it is: the sync is of everything.
    All,
}

/// One sync that was called.
#[derive(Clone, Debug)]
pub struct SyncCall {
    /// `FILE:LINE` of the caller, relative to the workspace.
    pub site: String,
    /// The last change that it covers, and what it was to that change. `None`: nothing to cover.
    pub last: Option<(u64, Target)>,
}

#[derive(Debug)]
struct State {
    order: Order,
    changes: u64,
    /// For each change what it touched: the file, or the two directories.
    touched: Vec<Touched>,
    calls: Vec<SyncCall>,
    late: Option<Object>,
}

#[derive(Clone, Debug)]
enum Touched {
    File(FileId),
    Names(PathBuf, PathBuf),
}

#[derive(Clone, Debug)]
enum Object {
    File(PathBuf),
    Dir(PathBuf),
    All(PathBuf),
}

/// See the module text. A clone is the same store.
#[derive(Clone, Debug)]
pub struct ReorderingStore {
    inner: RecordingStore,
    state: Arc<Mutex<State>>,
}

impl ReorderingStore {
    /// In front of `inner`.
    pub fn new(inner: &RecordingStore, order: Order) -> ReorderingStore {
        let (touched, calls) = (Vec::new(), Vec::new());
        let state = State {
            order,
            changes: 0,
            touched,
            calls,
            late: None,
        };
        ReorderingStore {
            inner: inner.clone(),
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// The syncs so far.
    pub fn calls(&self) -> Vec<SyncCall> {
        self.state.lock().unwrap().calls.clone()
    }

    /// A change: the early sync before it, the late one after it.
    fn change<T>(
        &self,
        touched: &Touched,
        file: Option<&Arc<dyn StoreFile>>,
        act: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let (early, late) = {
            let mut state = self.state.lock().unwrap();
            let number = state.changes;
            state.changes += 1;
            state.touched.push(touched.clone());
            let early = match state.order {
                Order::Early { change, of, .. } if change == number => Some(of),
                _ => None,
            };
            (early, state.late.take())
        };
        match (early, touched, file) {
            (Some(Target::File), _, Some(file)) => file.sync()?,
            (Some(Target::From), Touched::Names(from, _), _) => self.inner.sync_dir(from)?,
            (Some(Target::To), Touched::Names(_, to), _) => self.inner.sync_dir(to)?,
            (Some(Target::All), ..) => self.sync_all(Path::new("/"))?,
            _ => {}
        }
        let done = act()?;
        // What is not there any more needs no sync. Opened anew, so that no lock is kept.
        match late {
            Some(Object::File(path)) => {
                self.inner
                    .open(&path, Access::Read)
                    .map_or(Ok(()), |file| file.sync())?;
            }
            Some(Object::Dir(dir)) => drop(self.inner.sync_dir(&dir)),
            Some(Object::All(path)) => self.sync_all(&path)?,
            None => {}
        }
        Ok(done)
    }

    /// A sync of what `covers` says of a change; `act` performs it.
    fn sync(
        &self,
        object: Object,
        covers: impl Fn(&Touched) -> Option<Target>,
        act: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let site = site();
        {
            let mut state = self.state.lock().unwrap();
            let number = state.calls.len() as u64;
            let numbered = (0..).zip(&state.touched);
            let last = numbered.filter_map(|(n, t)| Some((n, covers(t)?))).last();
            state.calls.push(SyncCall { site, last });
            match state.order {
                Order::Early { sync, .. } if sync == number => return Ok(()),
                Order::Late(sync) if sync == number => {
                    state.late = Some(object);
                    return Ok(());
                }
                _ => {}
            }
        }
        act()
    }

    fn sync_all(&self, path: &Path) -> Result<()> {
        self.inner.file_system(path)?.map_or(Ok(()), |fs| fs.sync())
    }

    fn name<T>(&self, from: &Path, to: &Path, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let dir = |path: &Path| path.parent().unwrap_or(Path::new("/")).to_path_buf();
        self.change(&Touched::Names(dir(from), dir(to)), None, act)
    }

    fn wrap(&self, inner: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(ReorderingFile {
            store: self.clone(),
            inner,
        })
    }
}

impl Store for ReorderingStore {
    ploop::delegate! { list, kind, resolve }

    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        Ok(self.wrap(self.inner.open(path, access)?))
    }

    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>> {
        Ok(self.wrap(self.name(path, path, || self.inner.create(path, mode))?))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.name(from, to, || self.inner.rename(from, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        self.name(from, to, || self.inner.rename_new(from, to))
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        self.name(from, to, || self.inner.hard_link(from, to))
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.name(path, path, || self.inner.remove_file(path))
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.name(path, path, || self.inner.create_dir(path))
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        self.name(path, path, || self.inner.remove_dir(path))
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        let covers = |touched: &Touched| match touched {
            Touched::Names(_, to) if to == path => Some(Target::To),
            Touched::Names(from, _) if from == path => Some(Target::From),
            _ => None,
        };
        self.sync(Object::Dir(path.to_path_buf()), covers, || {
            self.inner.sync_dir(path)
        })
    }

    fn file_system(&self, path: &Path) -> Result<Option<Box<dyn FileSystem>>> {
        let wrap = |inner| -> Box<dyn FileSystem> {
            Box::new(ReorderingFileSystem {
                store: self.clone(),
                path: path.to_path_buf(),
                inner,
            })
        };
        Ok(self.inner.file_system(path)?.map(wrap))
    }
}

#[derive(Debug)]
struct ReorderingFileSystem {
    store: ReorderingStore,
    path: PathBuf,
    inner: Box<dyn FileSystem>,
}

impl FileSystem for ReorderingFileSystem {
    fn sync(&self) -> Result<()> {
        let object = Object::All(self.path.clone());
        self.store
            .sync(object, |_| Some(Target::All), || self.inner.sync())
    }
}

#[derive(Debug)]
struct ReorderingFile {
    store: ReorderingStore,
    inner: Arc<dyn StoreFile>,
}

impl ReorderingFile {
    fn change(&self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        self.store
            .change(&Touched::File(self.inner.id()), Some(&self.inner), act)
    }
}

impl StoreFile for ReorderingFile {
    ploop::delegate! {
        path, id, len, read_at, reserve, set_mode, next_data, lock_bytes, unlock_bytes,
        foreign_lock,
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change(|| self.inner.write_at(buf, offset))
    }

    fn sync(&self) -> Result<()> {
        let id = self.inner.id();
        let covers = |touched: &Touched| match touched {
            Touched::File(file) => (*file == id).then_some(Target::File),
            Touched::Names(..) => None,
        };
        let object = Object::File(self.inner.path().to_path_buf());
        self.store.sync(object, covers, || self.inner.sync())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(|| self.inner.set_len(len))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.punch(offset, len))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.zero(offset, len))
    }
}

/// The innermost line of the code under test on this thread's stack.
fn site() -> String {
    let trace = std::backtrace::Backtrace::force_capture().to_string();
    let lines = trace
        .lines()
        .filter_map(|line| line.trim().strip_prefix("at "));
    let ours = |line: &&str| {
        [
            "ploop/src/",
            "snapshots/src/",
            "nbd-server/src/",
            "fsck/src/",
        ]
        .iter()
        .any(|part| line.contains(part))
    };
    let line = lines.filter(ours).map(str::to_owned).next();
    let line = line.expect("the tests are built with line tables (see the profiles)");
    let start = [
        "ploop/src/",
        "snapshots/src/",
        "nbd-server/src/",
        "fsck/src/",
    ];
    let at = start
        .iter()
        .filter_map(|part| line.find(part))
        .min()
        .unwrap_or(0);
    // Without the column.
    line[at..]
        .rsplit_once(':')
        .map_or(line.clone(), |(line, _)| line.to_owned())
}
