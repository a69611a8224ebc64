//! A memory store that remembers what a power cut could undo.
//!
//! ```text
//!   code under test ──► RecordingStore ──► MemoryStore     what a running program sees
//!                            │
//!                            └─► log: changes, syncs, marks
//!                                  │  crash_points, states_at
//!                                  ▼
//!                        CrashState ──build──► MemoryStore  what the next boot finds
//! ```
//!
//! The model, as strict as the rules of [`super`] allow:
//!
//! * A *unit* is one change that is not durable: a sector of a write (or the part of it that was
//!   written), a length, a run of a punch or zero (a sector of a small one, else 4 KiB or a 16th),
//!   a new name, a removed name, a rename. A write past the end is its sectors and a length.
//! * A crash keeps any subset of the units, each applied in program order. Data past the surviving
//!   length does not exist; a length that outlived its data reads as zeros.
//! * A file's units become durable when a sync of that file has returned that *began* after them;
//!   names when each directory that they touch was synced (both, for a rename across two). A file's
//!   sync says nothing about its name, nor the other way round.
//! * A rename is one unit: it never leaves both names or neither. But two renames without a sync
//!   between are two units, and the second alone may survive: what it replaced is gone, though the
//!   first one, which was to save that, is lost.
//! * A removed name is gone whatever it named; a directory that is lost takes all in it along.
//! * A sync of the whole file system does so for everything that was changed before it began.
//! * A sync that failed leaves its units losable for ever, whatever later syncs report.
//!
//! All changes and syncs pass one mutex, so the log is an order that all threads agree on.

mod fault;
mod file;
mod log;
mod replay;
mod states;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::memory::MemoryStore;
use super::{Access, EntryKind, FileSystem, Store, StoreFile};
use crate::error::Result;
use fault::{Class, Faults, Verdict};
use file::{RecordingFile, RecordingFileSystem};
use log::{Action, Event, Name, Outcome};
use replay::Replay;

pub use fault::{Calls, Fault, Tear};
pub use states::{Budget, CrashState, States};

/// See the module text. A clone is the same store. Test code keeps one clone to ask questions and
/// hands another to the code under test.
#[derive(Clone)]
pub struct RecordingStore {
    shared: Arc<Shared>,
}

type Hook = Arc<dyn Fn(u64) + Send + Sync>;

struct Shared {
    memory: MemoryStore,
    log: Mutex<Log>,
    replay: Mutex<Replay>,
    hook: Mutex<Option<Hook>>,
}

#[derive(Default)]
struct Log {
    events: Vec<Event>,
    faults: Faults,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for RecordingStore {
    fn default() -> RecordingStore {
        RecordingStore::new()
    }
}

impl fmt::Debug for RecordingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordingStore({:?})", self.shared.memory)
    }
}

/// Running the code under test.
impl RecordingStore {
    /// An empty file system.
    pub fn new() -> RecordingStore {
        RecordingStore::on(&MemoryStore::new())
    }

    /// A copy of `start`, all of it durable. The original is not touched.
    pub fn on(start: &MemoryStore) -> RecordingStore {
        let memory = start.snapshot();
        let replay = Mutex::new(Replay::new(memory.to_disk()));
        let shared = Shared {
            memory,
            log: Mutex::default(),
            replay,
            hook: Mutex::default(),
        };
        RecordingStore {
            shared: Arc::new(shared),
        }
    }

    /// This store as the trait object that the rest of the core takes.
    pub fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.clone())
    }

    /// What a program that starts now would see without a power cut: kill -9 loses nothing.
    pub fn snapshot(&self) -> MemoryStore {
        let _log = self.log_state();
        self.shared.memory.snapshot()
    }

    /// Puts a mark into the log: "request 7 was answered". Its meaning is the test's.
    pub fn mark(&self, mark: u64) {
        self.log_state()
            .events
            .push(Event::new(Path::new(""), Action::Mark(mark)));
    }

    /// The log, a line per event; line `n` is what happened between points `n` and `n + 1`.
    pub fn log(&self) -> Vec<String> {
        self.log_state()
            .events
            .iter()
            .map(Event::to_string)
            .collect()
    }

    /// Calls made so far, of the kind that [`RecordingStore::count`] set. The next call has this
    /// number.
    pub fn calls(&self) -> u64 {
        self.log_state().faults.calls
    }

    /// Syncs made so far, of files and directories. The next sync has this number.
    pub fn syncs(&self) -> u64 {
        self.log_state().faults.syncs
    }

    /// Sets which calls are counted, and starts their count again at 0.
    pub fn count(&self, calls: Calls) {
        let faults = &mut self.log_state().faults;
        faults.counting = calls;
        faults.calls = 0;
    }

    /// Call number `n` (see [`RecordingStore::calls`]) fails.
    pub fn fail_at(&self, n: u64, fault: Fault) {
        self.log_state().faults.plan(false, n, false, fault);
    }

    /// Call number `n` and every later one fail.
    pub fn fail_from(&self, n: u64, fault: Fault) {
        self.log_state().faults.plan(false, n, true, fault);
    }

    /// Sync number `n` (see [`RecordingStore::syncs`]) fails; later ones succeed, and lie.
    pub fn fail_sync(&self, n: u64, fault: Fault) {
        self.log_state().faults.plan(true, n, false, fault);
    }

    /// Sync number `n` reports success and does nothing, as if the code had left it out.
    pub fn drop_sync(&self, n: u64) {
        self.log_state().faults.drop_sync(n);
    }

    /// Sets how much of a failing write reaches the file.
    pub fn tear(&self, tear: Tear) {
        self.log_state().faults.tear = tear;
    }

    /// Forgets all planned faults; after [`Fault::Crash`] the store answers again.
    pub fn clear_faults(&self) {
        self.log_state().faults.clear();
    }

    /// Calls `hook` with the sync's number inside of each sync of a file or directory, after it
    /// began and before it returns: what the hook writes is not covered by that sync.
    pub fn during_sync(&self, hook: impl Fn(u64) + Send + Sync + 'static) {
        *locked(&self.shared.hook) = Some(Arc::new(hook));
    }
}

/// Asking what a power cut leaves.
impl RecordingStore {
    /// The points worth a crash: before the first event, and after each change and sync (there
    /// after the marks that follow it, when most was promised). Ascending.
    pub fn crash_points(&self) -> impl Iterator<Item = usize> + use<> {
        let log = self.log_state();
        let points =
            (0..=log.events.len()).filter(|&n| log.events.get(n).is_none_or(|e| !e.is_mark()));
        points.collect::<Vec<_>>().into_iter()
    }

    /// The marks made before a point, in order.
    pub fn marks_before(&self, point: usize) -> Vec<u64> {
        let mark = |event: &Event| match event.action {
            Action::Mark(mark) => Some(mark),
            _ => None,
        };
        self.log_state()
            .events
            .iter()
            .take(point)
            .filter_map(mark)
            .collect()
    }

    /// The distinct states that a power cut at `point` can leave, within the budget, one at a time.
    /// A point past the log means its end. Cheapest when asked with ascending points.
    pub fn states_at(&self, point: usize, budget: &Budget) -> States {
        let mut replay = locked(&self.shared.replay);
        let point = replay.go_to(point, &self.log_state().events);
        States::new(Arc::new(point), budget.clone())
    }

    /// The one state at `point` in which of the units exactly those numbered in `kept` survive:
    /// what [`CrashState`] prints, to build it again.
    pub fn state(&self, point: usize, kept: &[usize]) -> CrashState {
        let mut replay = locked(&self.shared.replay);
        let point = replay.go_to(point, &self.log_state().events);
        CrashState::of(Arc::new(point), kept)
    }
}

impl RecordingStore {
    fn log_state(&self) -> MutexGuard<'_, Log> {
        locked(&self.shared.log)
    }

    /// A call that only looks.
    fn look(&self, what: &str, path: &Path) -> Result<()> {
        self.log_state()
            .faults
            .enter(Class::Look)
            .error(what, path)
            .map_or(Ok(()), Err)
    }

    /// A call that changes something and, if it did, names its event.
    fn change<T>(
        &self,
        what: &str,
        path: &Path,
        act: impl FnOnce() -> Result<(T, Option<Action>)>,
    ) -> Result<T> {
        let mut log = self.log_state();
        let verdict = log.faults.enter(Class::Change);
        if let (Verdict::Fail(_, false), Some(error)) = (verdict, verdict.error(what, path)) {
            return Err(error);
        }
        let done = act().map(|(value, action)| {
            log.events
                .extend(action.map(|action| Event::new(path, action)));
            value
        });
        verdict.error(what, path).map_or(done, Err)
    }

    /// A sync; `action` makes its event.
    fn sync_call(
        &self,
        what: &str,
        path: &Path,
        action: impl FnOnce(usize, Outcome) -> Action,
    ) -> Result<()> {
        let mut log = self.log_state();
        let (started, number) = (log.events.len(), log.faults.syncs);
        let verdict = log.faults.enter(Class::Sync);
        drop(log);
        let outcome = match verdict {
            Verdict::Go => Outcome::Done,
            Verdict::Drop => Outcome::Dropped,
            Verdict::Fail(Fault::Crash, _) => return verdict.error(what, path).map_or(Ok(()), Err),
            Verdict::Fail(..) => Outcome::Failed,
        };
        let hook = locked(&self.shared.hook).clone();
        if let Some(hook) = hook {
            hook(number);
        }
        let mut log = self.log_state();
        if log.faults.is_dead() {
            let cut = Verdict::Fail(Fault::Crash, false);
            return cut.error(what, path).map_or(Ok(()), Err);
        }
        let action = action(started, outcome);
        log.events.push(Event::new(path, action));
        verdict.error(what, path).map_or(Ok(()), Err)
    }

    /// The entry that `path` means, and what is there now.
    fn entry(&self, path: &Path) -> Option<(Name, Option<u64>)> {
        let (dir, name, ino) = self.shared.memory.locate(path)?;
        Some((
            Name {
                dir,
                name,
                path: path.to_path_buf(),
            },
            ino,
        ))
    }

    fn file(&self, inner: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(RecordingFile {
            store: self.clone(),
            inner,
        })
    }

    fn rename_with(
        &self,
        from: &Path,
        to: &Path,
        act: impl FnOnce(&MemoryStore) -> Result<()>,
    ) -> Result<()> {
        self.change(&format!("rename to {}", to.display()), from, || {
            let names = self.entry(from).zip(self.entry(to));
            act(&self.shared.memory)?;
            let action = names.and_then(|((from, ino), (to, old))| {
                let ino = ino.filter(|_| ino != old)?;
                Some(Action::Rename { ino, from, to })
            });
            Ok(((), action))
        })
    }
}

impl Store for RecordingStore {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn StoreFile>> {
        self.look("open", path)?;
        Ok(self.file(self.shared.memory.open(path, access)?))
    }

    fn create(&self, path: &Path, mode: u32) -> Result<Arc<dyn StoreFile>> {
        let made = self.change("create", path, || {
            let file = self.shared.memory.create(path, mode)?;
            let entry = self.entry(path);
            let action = entry.map(|(name, _)| Action::Create {
                file: file.id().ino,
                name,
            });
            Ok((file, action))
        });
        Ok(self.file(made?))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.rename_with(from, to, |memory| memory.rename(from, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        self.rename_with(from, to, |memory| memory.rename_new(from, to))
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        self.change("link", from, || {
            self.shared.memory.hard_link(from, to)?;
            let made = self.entry(to);
            let action = made.and_then(|(name, ino)| Some(Action::HardLink { file: ino?, name }));
            Ok(((), action))
        })
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.change("remove", path, || {
            let entry = self.entry(path);
            self.shared.memory.remove_file(path)?;
            Ok(((), entry.map(|(name, _)| Action::Remove { name })))
        })
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.change("create directory", path, || {
            self.shared.memory.create_dir(path)?;
            let entry = self.entry(path);
            let action = entry.and_then(|(name, dir)| Some(Action::CreateDir { dir: dir?, name }));
            Ok(((), action))
        })
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        self.change("remove directory", path, || {
            let entry = self.entry(path);
            self.shared.memory.remove_dir(path)?;
            Ok(((), entry.map(|(name, _)| Action::RemoveDir { name })))
        })
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        let dir = self.shared.memory.dir_id(path)?;
        let action = |started, outcome| Action::SyncDir {
            dir,
            started,
            outcome,
        };
        self.sync_call("sync directory", path, action)
    }

    fn file_system(&self, path: &Path) -> Result<Option<Box<dyn FileSystem>>> {
        self.look("open directory", path)?;
        self.shared.memory.dir_id(path)?;
        Ok(Some(Box::new(RecordingFileSystem {
            store: self.clone(),
            path: path.to_path_buf(),
        })))
    }

    fn list(&self, path: &Path) -> Result<Vec<PathBuf>> {
        self.look("list directory", path)?;
        self.shared.memory.list(path)
    }

    fn kind(&self, path: &Path) -> Result<Option<EntryKind>> {
        self.look("stat", path)?;
        self.shared.memory.kind(path)
    }

    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        self.look("find", path)?;
        self.shared.memory.resolve(path)
    }
}
