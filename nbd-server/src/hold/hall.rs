//! All that a holder holds: its exports, their share of its memory, and where the server is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::hold::dial::{Dialer, Moved};
use crate::hold::line::Address;
use crate::hold::model::{Export, Status};
use crate::hold::terms::Terms;
use crate::hold::volume::{SeatId, Volume};

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole between two statements: nothing here panics half-way.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An export and the tasks that attend to its connections.
#[derive(Debug)]
pub(super) struct Shared {
    volume: Mutex<Volume>,
    tasks: Mutex<HashMap<SeatId, Arc<Notify>>>,
}

impl Shared {
    /// Does something with the volume, and wakes whom that concerns.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut Volume) -> T) -> T {
        let mut volume = lock(&self.volume);
        let done = f(&mut volume);
        let woken = volume.woken();
        drop(volume);
        if !woken.is_empty() {
            let tasks = lock(&self.tasks);
            for id in woken {
                if let Some(task) = tasks.get(&id) {
                    task.notify_one();
                }
            }
        }
        done
    }

    pub(super) fn sit(&self, terms: &Terms, task: Arc<Notify>) -> SeatId {
        let id = self.with(|v| v.sit(terms.clone()));
        lock(&self.tasks).insert(id, task);
        id
    }

    pub(super) fn leave(&self, id: SeatId) {
        self.with(|v| v.leave(id));
        lock(&self.tasks).remove(&id);
    }
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Hall {
    exports: Mutex<HashMap<String, (Arc<Shared>, usize)>>,
    buffer: usize,
    patience: Option<Duration>,
    to: watch::Sender<Address>,
    moved: Moved,
    stop: watch::Sender<bool>,
}

impl Hall {
    pub(super) fn new(to: Address, buffer: usize, patience: Option<Duration>) -> Hall {
        Hall {
            exports: Mutex::default(),
            buffer,
            patience,
            to: watch::Sender::new(to),
            moved: Moved::default(),
            stop: watch::Sender::new(false),
        }
    }

    pub(super) fn dialer(&self) -> Dialer {
        Dialer {
            to: self.to.subscribe(),
            patience: self.patience,
            moved: self.moved.clone(),
        }
    }

    pub(super) fn stopped(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    /// Lets all clients go, in order.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// The server is there from now on.
    pub(super) fn move_to(&self, to: Address) {
        tracing::info!(server = %to, "moving");
        *lock(&self.moved) = Some(Instant::now());
        self.to.send_replace(to);
    }

    /// One more connection to an export.
    pub(super) fn enter(&self, export: &str) -> Arc<Shared> {
        let mut exports = lock(&self.exports);
        if let Some((shared, users)) = exports.get_mut(export) {
            *users += 1;
            return shared.clone();
        }
        let shared = Arc::new(Shared {
            volume: Mutex::new(Volume::new(self.buffer)),
            tasks: Mutex::default(),
        });
        exports.insert(export.to_owned(), (shared.clone(), 1));
        self.share(&exports);
        shared
    }

    /// Error: the disk of this export is held by another name, too. What is kept of the one would be
    /// played over what was written to the other.
    pub(super) fn refuse_second_name(&self, export: &str) -> Result<(), String> {
        let exports = lock(&self.exports);
        let disk = |shared: &Shared| lock(&shared.volume).disk.clone();
        let Some(mine) = exports.get(export).and_then(|(shared, _)| disk(shared)) else {
            return Ok(());
        };
        let same = |(name, (shared, _)): &(&String, &(Arc<Shared>, usize))| {
            name.as_str() != export && disk(shared).as_ref() == Some(&mine)
        };
        match exports.iter().find(same) {
            Some((other, _)) => Err(format!(
                "'{export}' is the disk that others have as '{other}': use one name for it"
            )),
            None => Ok(()),
        }
    }

    /// One less.
    pub(super) fn leave(&self, export: &str) {
        let mut exports = lock(&self.exports);
        if let Some((_, users)) = exports.get_mut(export) {
            *users -= 1;
            if *users == 0 {
                exports.remove(export);
                self.share(&exports);
            }
        }
    }

    fn share(&self, exports: &HashMap<String, (Arc<Shared>, usize)>) {
        let share = self.buffer / exports.len().max(1);
        for (shared, _) in exports.values() {
            shared.with(|v| v.set_share(share));
        }
    }

    pub(super) fn status(&self) -> Status {
        let of = |(name, (shared, users)): (&String, &(Arc<Shared>, usize))| {
            let volume = lock(&shared.volume);
            Export {
                name: name.clone(),
                connections: *users as u64,
                kept_changes: volume.kept.len() as u64,
                bytes: volume.charged() as u64,
                waiting: !volume.is_flowing(),
            }
        };
        let mut exports: Vec<Export> = lock(&self.exports).iter().map(of).collect();
        exports.sort_by(|a, b| a.name.cmp(&b.name));
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            to: self.to.borrow().to_string(),
            buffer: self.buffer as u64,
            patience: self.patience.map(|p| p.as_secs()),
            exports,
        }
    }
}
