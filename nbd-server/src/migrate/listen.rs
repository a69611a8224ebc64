//! Where a service takes containers, and where it ends moves that were cut.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ploop::error::{Error, Kind, Result};
use snapshots::moving;
use snapshots::owner as rules;

use super::destination::Destination;
use super::link::{Link, Listener, Stop, Tls};
use super::settle::{Settled, settle};
use crate::export::Disks;
use crate::serve::Connections;

/// Links at once.
const LINKS: usize = 32;
/// Between two tries to end moves that were cut.
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
    /// With a word for it where the work is the end of a move that was cut: that makes way.
    all: Mutex<HashMap<String, Option<Arc<AtomicBool>>>>,
    changed: Condvar,
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
        let mut all = self.book();
        while let Some(work) = all.get(name) {
            let way = work.as_ref().ok_or_else(|| moves(name))?;
            way.store(true, Ordering::Release);
            let waited = self.0.changed.wait(all);
            all = waited.unwrap_or_else(PoisonError::into_inner);
        }
        all.insert(name.to_owned(), None);
        drop(all);
        Ok(self.left(name))
    }

    /// The last move of the container is to end, unless somebody works on that; set: it makes way.
    fn end(&self, name: &str) -> Option<(Left, Arc<AtomicBool>)> {
        let mut all = self.book();
        if all.contains_key(name) {
            return None;
        }
        let way = Arc::new(AtomicBool::new(false));
        all.insert(name.to_owned(), Some(way.clone()));
        drop(all);
        Some((self.left(name), way))
    }

    /// Refuses what a move would miss. Error: `InUse`.
    pub fn refuse(&self, name: &str) -> Result<()> {
        match self.book().get(name) {
            Some(None) => Err(moves(name)),
            Some(Some(_)) | None => Ok(()),
        }
    }

    fn book(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<AtomicBool>>>> {
        self.0.all.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.all.book().remove(&self.name);
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
        let (disks, stopping) = (self.disks.clone(), self.stopping.clone());
        let destination = self.destination.clone();
        self.spawn("moves", move || {
            let mut pause = PAUSE_MIN;
            while !stopping.load(Ordering::Acquire) {
                destination.clear();
                pause = match end_all((&disks, &connections), tls.as_ref(), &leaving, &stopping) {
                    true => PAUSE_MIN,
                    false => (pause * 2).min(PAUSE_MAX),
                };
                let until = Instant::now() + pause;
                while Instant::now() < until && !stopping.load(Ordering::Acquire) {
                    std::thread::sleep(LOOK);
                }
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
    if links.fetch_add(1, Ordering::AcqRel) >= LINKS {
        links.fetch_sub(1, Ordering::AcqRel);
        tracing::warn!(peer = link.peer(), links = LINKS, "too many moves at once");
        return;
    }
    let one = One(links.clone());
    let destination = destination.clone();
    let thread = std::thread::Builder::new().name("arrival".into());
    let spawned = thread.spawn(move || {
        destination.attend(link);
        drop(one);
    });
    if let Err(e) = spawned {
        tracing::error!(error = %e, "no thread for a move");
    }
}

/// One try for each move; false while some are left.
fn end_all(
    (disks, connections): (&Disks, &Connections),
    tls: Option<&Tls>,
    leaving: &Leaving,
    stopping: &Arc<AtomicBool>,
) -> bool {
    let Some(root) = disks.root().filter(|_| !disks.read_only()) else {
        return true;
    };
    let all = match moving::unsettled(root) {
        Ok(all) => all,
        Err(e) => {
            tracing::warn!(error = %e, "containers that move cannot be listed");
            return false;
        }
    };
    let mut done = true;
    let sources = all
        .into_iter()
        .filter(|(_, r)| rules::verdict(r.state, r.epoch).is_some());
    for (name, _) in sources {
        // Nobody begins to move it meanwhile.
        let Some((_left, way)) = leaving.end(&name) else {
            continue;
        };
        let said = stopping.clone();
        let stop: Stop =
            Arc::new(move || said.load(Ordering::Acquire) || way.load(Ordering::Acquire));
        match settle((disks, connections), &name, tls, stop) {
            Ok(Settled::Here | Settled::There) => {}
            Ok(Settled::InDoubt) => done = false,
            Err(e) => {
                done = false;
                tracing::debug!(container = name, error = %e, "its move has not ended yet");
            }
        }
    }
    done
}
