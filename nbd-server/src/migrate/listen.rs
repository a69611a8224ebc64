//! Where a service takes containers, and where it ends moves that were cut.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ploop::error::{Error, Kind, Result};
use ploop::owner;
use snapshots::moving;

use super::destination::Destination;
use super::link::{Link, Listener, Stop, Tls};
use super::settle::{SILENCE, Settled, settle, verdict};
use crate::export::Disks;
use crate::serve::Connections;

/// Links at once.
const LINKS: usize = 32;
/// Between two tries to end a move that was cut, and at most between two looks for such.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(50);

/// The threads that take containers and end moves; they end when this is dropped.
#[derive(Debug)]
pub struct Arrivals {
    destination: Arc<Destination>,
    disks: Arc<Disks>,
    stopping: Arc<AtomicBool>,
    links: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

/// See [`Arrivals::coming`].
#[derive(Debug)]
pub struct Coming(Arc<Destination>);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Containers whose move this process works on: their records are not to be touched.
#[derive(Clone, Debug, Default)]
pub struct Leaving(Arc<Book>);

#[derive(Debug, Default)]
struct Book {
    state: Mutex<Names>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Names {
    /// With a word for it where the work is the end of a move that was cut: that makes way.
    at_work: HashMap<String, Option<Arc<AtomicBool>>>,
    /// Moves that are over; they may have left something to be ended.
    over: u64,
}

/// A container that leaves, until this is dropped.
#[derive(Debug)]
pub struct Left {
    all: Leaving,
    name: String,
}

impl Leaving {
    /// The container leaves. Whoever tries to end its last move makes way, and is waited for. Error:
    /// `InUse` when it leaves already.
    pub fn enter(&self, name: &str) -> Result<Left> {
        let mut names = self.book();
        while let Some(work) = names.at_work.get(name) {
            let way = work.as_ref().ok_or_else(|| moves(name))?;
            way.store(true, Ordering::Release);
            let waited = self.0.changed.wait(names);
            names = waited.unwrap_or_else(PoisonError::into_inner);
        }
        names.at_work.insert(name.to_owned(), None);
        drop(names);
        Ok(self.left(name))
    }

    /// The last move of the container is to end, unless somebody works on that; set: it makes way.
    fn end(&self, name: &str) -> Option<(Left, Arc<AtomicBool>)> {
        let mut names = self.book();
        if names.at_work.contains_key(name) {
            return None;
        }
        let way = Arc::new(AtomicBool::new(false));
        names.at_work.insert(name.to_owned(), Some(way.clone()));
        drop(names);
        Some((self.left(name), way))
    }

    /// Refuses what a move would miss. Error: `InUse`.
    pub fn refuse(&self, name: &str) -> Result<()> {
        match self.book().at_work.get(name) {
            Some(None) => Err(moves(name)),
            Some(Some(_)) | None => Ok(()),
        }
    }

    /// Waits until more than `seen` moves are over, or `stopping`, for `patience` at most. Gives how many
    /// are.
    fn wait(&self, seen: u64, patience: Duration, stopping: &AtomicBool) -> u64 {
        let waits = |names: &mut Names| names.over <= seen && !stopping.load(Ordering::Acquire);
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.book(), patience, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.over
    }

    /// Who waits looks whether it is to stop.
    fn wake(&self) {
        let _names = self.book();
        self.0.changed.notify_all();
    }

    fn book(&self) -> MutexGuard<'_, Names> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn left(&self, name: &str) -> Left {
        Left {
            all: self.clone(),
            name: name.to_owned(),
        }
    }
}

fn moves(name: &str) -> Error {
    Error::new(Kind::InUse, format!("{name} is being moved"))
        .fix("Wait for the end of the move, or cancel it: `ploop jobs` shows it")
}

impl Drop for Left {
    fn drop(&mut self) {
        let mut names = self.all.book();
        if let Some(None) = names.at_work.remove(&self.name) {
            names.over += 1;
        }
        drop(names);
        self.all.0.changed.notify_all();
    }
}

impl Arrivals {
    /// For a service of the store of `disks`; what is left of moves that were cut half-way is removed.
    /// Error: `Unsupported` for a service of a single disk.
    pub fn new(destination: Destination, disks: Arc<Disks>) -> Result<Arrivals> {
        let root = disks.root().ok_or_else(|| {
            Error::unsupported("a single disk is served here, and no container can come to it")
        })?;
        if !disks.read_only() {
            moving::clear(root)?;
        }
        Ok(Arrivals {
            destination: {
                let destination = Arc::new(destination);
                if !disks.read_only() {
                    destination.resume()?;
                }
                destination
            },
            disks,
            stopping: Arc::default(),
            links: Arc::default(),
            threads: Vec::new(),
        })
    }

    /// What goes on behind the end of this, until it is dropped, too: the data of containers that were
    /// taken, as long as clients may ask for it.
    pub fn coming(&self) -> Coming {
        Coming(self.destination.clone())
    }

    /// Takes containers at a unix socket of mode 0600.
    pub fn listen_unix(&mut self, path: &Path) -> Result<()> {
        let listener = Listener::unix(path)?;
        self.accept(listener)
    }

    /// Takes containers at a TCP address: with TLS, or on loopback; where.
    pub fn listen_tcp(&mut self, address: &str, tls: Option<Tls>) -> Result<Vec<SocketAddr>> {
        let (bound, listener) = Listener::tcp(address, tls)?;
        self.accept(listener)?;
        Ok(bound)
    }

    fn accept(&mut self, listener: Listener) -> Result<()> {
        let (destination, stopping) = (self.destination.clone(), self.stopping.clone());
        let links = self.links.clone();
        self.spawn("arrivals", move || {
            let said = stopping.clone();
            let stop: Stop = Arc::new(move || said.load(Ordering::Acquire));
            while !stopping.load(Ordering::Acquire) {
                match listener.accept(&stop) {
                    Ok(Some(link)) => attend(&destination, &links, link),
                    Ok(None) => return,
                    Err(e) => {
                        tracing::warn!(error = %e, "accept of a move failed");
                        std::thread::sleep(LOOK);
                    }
                }
            }
        })
    }

    /// Ends the moves that were cut, now and whenever one is cut: those whose source this service is by
    /// asking, except for `leaving`; of those that came to half by removing what came.
    pub fn settle(
        &mut self,
        connections: Connections,
        tls: Option<Tls>,
        leaving: Leaving,
    ) -> Result<()> {
        let destination = self.destination.clone();
        let ender = Arc::new(Ender {
            disks: self.disks.clone(),
            connections,
            tls,
            leaving,
            stopping: self.stopping.clone(),
        });
        self.spawn("moves", move || {
            let mut at_work: HashMap<String, JoinHandle<()>> = HashMap::new();
            let mut seen = 0;
            while !ender.stopping.load(Ordering::Acquire) {
                destination.clear();
                at_work.retain(|_, thread| !thread.is_finished());
                // Each by itself: one is fed for hours, and another's destination is gone.
                for name in ender.sources() {
                    if at_work.contains_key(&name) {
                        continue;
                    }
                    let (ender, of) = (ender.clone(), name.clone());
                    let thread = std::thread::Builder::new().name("move".into());
                    match thread.spawn(move || ender.end(&of)) {
                        Ok(thread) => drop(at_work.insert(name, thread)),
                        Err(e) => tracing::error!(error = %e, "no thread to end a move"),
                    }
                }
                seen = ender.leaving.wait(seen, PAUSE_MAX, &ender.stopping);
            }
            for thread in at_work.into_values() {
                drop(thread.join());
            }
        })
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(work);
        let thread =
            thread.map_err(|e| Error::new(Kind::Io, "start a thread for moves").caused_by(e))?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.destination.stop();
        self.disks.leaving().wake();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
        while self.links.load(Ordering::Acquire) > 0 {
            std::thread::sleep(LOOK);
        }
    }
}

/// Serves a link on a thread of its own.
fn attend(destination: &Arc<Destination>, links: &Arc<AtomicUsize>, link: Link) {
    /// Counts one link.
    struct One(Arc<AtomicUsize>);
    impl Drop for One {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::AcqRel);
        }
    }
    let before = links.fetch_add(1, Ordering::AcqRel);
    let one = One(links.clone());
    if before >= LINKS {
        tracing::warn!(peer = link.peer(), links = LINKS, "too many moves at once");
    }
    // Who is not told why would try again at once.
    if before >= 2 * LINKS {
        return;
    }
    let destination = destination.clone();
    let thread = std::thread::Builder::new().name("arrival".into());
    let spawned = thread.spawn(move || {
        match before < LINKS {
            true => destination.attend(link),
            false => destination.turn_away(link, LINKS),
        }
        drop(one);
    });
    if let Err(e) = spawned {
        tracing::error!(error = %e, "no thread for a move");
    }
}

/// Who ends the moves that were cut, of containers whose source this service is.
struct Ender {
    disks: Arc<Disks>,
    connections: Connections,
    tls: Option<Tls>,
    leaving: Leaving,
    stopping: Arc<AtomicBool>,
}

impl Ender {
    /// The containers that have such a move.
    fn sources(&self) -> Vec<String> {
        let Some(root) = self.disks.root().filter(|_| !self.disks.read_only()) else {
            return Vec::new();
        };
        let all = moving::unsettled(root).unwrap_or_else(|e| {
            tracing::warn!(error = %e, "containers that move cannot be listed");
            Vec::new()
        });
        let sources = all.into_iter().filter(|(_, r)| verdict(r).is_some());
        sources.map(|(name, _)| name).collect()
    }

    /// Tries until the move has ended.
    fn end(&self, name: &str) {
        let mut pause = PAUSE_MIN;
        while !self.stopping.load(Ordering::Acquire) && self.is_source(name) {
            let began = Instant::now();
            if self.try_end(name) {
                return;
            }
            // What went on for long was no vain try.
            pause = match began.elapsed() > SILENCE {
                true => PAUSE_MIN,
                false => pause,
            };
            self.leaving.wait(u64::MAX, pause, &self.stopping);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn is_source(&self, name: &str) -> bool {
        let Some(root) = self.disks.root() else {
            return false;
        };
        let read = root
            .existing_container(name)
            .and_then(|dir| owner::read(root.store(), &dir));
        match read {
            Ok(record) => record.is_some_and(|r| verdict(&r).is_some()),
            Err(e) => e.kind() != Kind::NotFound,
        }
    }

    /// One try; whether nothing is left to be ended.
    fn try_end(&self, name: &str) -> bool {
        // Nobody begins to move it meanwhile.
        let Some((_left, way)) = self.leaving.end(name) else {
            return false;
        };
        let said = self.stopping.clone();
        let stop: Stop =
            Arc::new(move || said.load(Ordering::Acquire) || way.load(Ordering::Acquire));
        let with = (self.disks.as_ref(), &self.connections);
        match settle(with, name, self.tls.as_ref(), stop) {
            Ok(settled) => settled != Settled::InDoubt,
            Err(e) => {
                tracing::debug!(container = name, error = %e, "its move has not ended yet");
                false
            }
        }
    }
}
