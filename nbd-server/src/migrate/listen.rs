//! Where a service takes containers, and where it ends moves that were cut.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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

/// Containers whose move this process works on: their records are not to be touched.
#[derive(Clone, Debug, Default)]
pub struct Leaving(Arc<Mutex<HashSet<String>>>);

/// A container that leaves, until this is dropped.
#[derive(Debug)]
pub struct Left {
    all: Leaving,
    name: String,
}

impl Leaving {
    /// The container leaves. Error: `InUse` when it does already.
    pub fn enter(&self, name: &str) -> Result<Left> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.insert(name.to_owned()) {
            return Err(moves(name));
        }
        Ok(Left {
            all: self.clone(),
            name: name.to_owned(),
        })
    }

    /// Refuses what a move would miss. Error: `InUse`.
    pub fn refuse(&self, name: &str) -> Result<()> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.contains(name) {
            true => Err(moves(name)),
            false => Ok(()),
        }
    }
}

fn moves(name: &str) -> Error {
    Error::new(Kind::InUse, format!("{name} is being moved"))
        .fix("Wait for the end of the move, or cancel it: `ploop jobs` shows it")
}

impl Drop for Left {
    fn drop(&mut self) {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(&self.name);
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

    /// Ends the moves that were cut and whose source this service is, now and whenever one is cut;
    /// `leaving`: not those.
    pub fn settle(
        &mut self,
        connections: Connections,
        tls: Option<Tls>,
        leaving: Leaving,
    ) -> Result<()> {
        let (disks, stopping) = (self.disks.clone(), self.stopping.clone());
        self.spawn("moves", move || {
            let mut pause = PAUSE_MIN;
            while !stopping.load(Ordering::Acquire) {
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
        let Ok(_left) = leaving.enter(&name) else {
            continue;
        };
        let said = stopping.clone();
        let stop: Stop = Arc::new(move || said.load(Ordering::Acquire));
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
