//! The server: listeners, the connections they made, and an orderly end.
//!
//! Stopping: no new connection is accepted and the socket files go; handshakes are told so and end
//! within a second; every connection answers what it has received in full, then closes. After
//! [`Config::stop_grace`] the sockets of those whose client does not take its answers are cut. When
//! [`Server::run_until`] returns, every thread is joined and every device let go: the caller may
//! close them.

use std::collections::HashMap;
use std::future::Future;
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ploop::error::{Error, Kind, Result};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::connection::{self, Socket};
use super::greet::{Greeted, Outcome, greet};
use super::listen::{Listener, SocketFile};
use super::{activation, listen};
use crate::export::Exports;
use crate::session::Negotiated;

/// Limits of a [`Server`].
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Connections at once, those in the handshake included; the next ones wait to be accepted.
    pub max_connections: u32,
    /// Time for a whole handshake.
    pub handshake_timeout: Duration,
    /// Time for clients to take their last answers when the server stops.
    pub stop_grace: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            max_connections: 4096,
            handshake_timeout: Duration::from_secs(30),
            stop_grace: Duration::from_secs(10),
        }
    }
}

/// Stack of a connection's thread. The engine's buffers are on the heap.
const STACK: usize = 512 << 10;

/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An NBD server. Made with [`Server::new`], given places to listen, then run.
#[derive(Debug)]
pub struct Server {
    exports: Arc<dyn Exports>,
    config: Config,
    listeners: Vec<Listener>,
}

impl Server {
    /// A server of `exports` that listens nowhere yet.
    pub fn new(exports: Arc<dyn Exports>, config: Config) -> Server {
        Server {
            exports,
            config,
            listeners: Vec::new(),
        }
    }

    /// Listens on a unix socket at `path`, mode 0600, removed at the end. A socket file that nobody
    /// listens on is replaced. Blocks for at most two seconds. Errors: `InUse` when a live server
    /// has it, `Exists` when there is something else of that name.
    pub fn listen_unix(&mut self, path: &Path) -> Result<()> {
        self.listeners.push(listen::unix(path)?);
        tracing::info!(path = %path.display(), "listening");
        Ok(())
    }

    /// Listens on TCP at "HOST:PORT" (IPv6 in brackets, port 0 for any); returns what was bound.
    /// May block while a name is looked up. Error: `Permission` for an address beyond loopback
    /// without `insecure`.
    pub fn listen_tcp(&mut self, address: &str, insecure: bool) -> Result<Vec<SocketAddr>> {
        let (addresses, listeners): (Vec<_>, Vec<_>) =
            listen::tcp(address, insecure)?.into_iter().unzip();
        self.listeners.extend(listeners);
        tracing::info!(?addresses, "listening");
        Ok(addresses)
    }

    /// Listens on the sockets that systemd passed to this process; returns how many there are, 0
    /// when it was not started that way. `insecure` as for [`Server::listen_tcp`].
    pub fn listen_activated(&mut self, insecure: bool) -> Result<usize> {
        let listeners = activation::take(insecure)?;
        let count = listeners.len();
        self.listeners.extend(listeners);
        Ok(count)
    }

    /// Serves until SIGINT or SIGTERM, on a runtime of its own. Blocks.
    pub fn run(self) -> Result<()> {
        self.run_ready(|| Ok(()))
    }

    /// The same; calls `ready` as soon as a signal ends it in order and not before, so that who is
    /// told then may send one. Its error ends the server.
    pub fn run_ready(self, ready: impl FnOnce() -> Result<()>) -> Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let failed = |e| Error::new(Kind::Io, "start the runtime").caused_by(e);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.map_err(failed)?.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
            let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
            ready()?;
            self.run_until(async move {
                tokio::select! {
                    _ = interrupt.recv() => tracing::info!("stopping on SIGINT"),
                    _ = terminate.recv() => tracing::info!("stopping on SIGTERM"),
                }
            })
            .await
        })
    }

    /// Serves until `stop` is ready, then stops in order (see the module text).
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> Result<()> {
        if self.listeners.is_empty() {
            return Err(Error::invalid("the server has nowhere to listen"));
        }
        let (ended, mut ends) = mpsc::unbounded_channel();
        let max = self
            .config
            .max_connections
            .clamp(1, Semaphore::MAX_PERMITS as u32);
        let hall = Arc::new(Hall {
            exports: self.exports,
            config: self.config,
            slots: Arc::new(Semaphore::new(max as usize)),
            stopping: AtomicBool::new(false),
            live: Mutex::default(),
            next: AtomicU64::new(0),
            ended,
        });
        let (stopper, stopped) = watch::channel(false);
        let mut doors = JoinSet::new();
        for listener in self.listeners {
            let door = Door::open(listener)?;
            doors.spawn(door.accept(hall.clone(), stopped.clone()));
        }
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                Some(id) = ends.recv() => hall.join(id),
            }
        }
        hall.stopping.store(true, Ordering::Release);
        stopper.send_replace(true);
        while doors.join_next().await.is_some() {}
        hall.shutdown(Shutdown::Read);
        let grace = tokio::time::sleep(hall.config.stop_grace);
        tokio::pin!(grace);
        let mut patient = true;
        let all = hall.slots.clone().acquire_many_owned(max);
        tokio::pin!(all);
        loop {
            tokio::select! {
                _ = &mut all => break,
                Some(id) = ends.recv() => hall.join(id),
                () = &mut grace, if patient => {
                    patient = false;
                    hall.shutdown(Shutdown::Both);
                }
            }
        }
        hall.join_all();
        Ok(())
    }
}

/// What all connections share.
#[derive(Debug)]
struct Hall {
    exports: Arc<dyn Exports>,
    config: Config,
    slots: Arc<Semaphore>,
    stopping: AtomicBool,
    live: Mutex<HashMap<u64, Live>>,
    next: AtomicU64,
    ended: mpsc::UnboundedSender<u64>,
}

/// A connection with its thread.
#[derive(Debug)]
struct Live {
    socket: Arc<Socket>,
    thread: JoinHandle<()>,
}

/// Reports the end of a connection's thread, also when it ends in a panic.
struct Ended(u64, mpsc::UnboundedSender<u64>);

impl Drop for Ended {
    fn drop(&mut self) {
        // Nobody listens any more when the server has already joined all threads.
        self.1.send(self.0).ok();
    }
}

impl Hall {
    fn live(&self) -> MutexGuard<'_, HashMap<u64, Live>> {
        // The map is whole whatever panicked: every change of it is one insertion or removal.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a negotiated connection its thread.
    fn start(
        self: &Arc<Self>,
        socket: Socket,
        negotiated: Negotiated,
        greeted: Greeted,
        peer: String,
    ) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let socket = Arc::new(socket);
        let (hall, shared) = (self.clone(), socket.clone());
        // The lock is held until the thread is entered: whoever stops the server sees all of them.
        let mut live = self.live();
        if self.stopping.load(Ordering::Acquire) {
            return;
        }
        let thread = std::thread::Builder::new()
            .name(format!("nbd-{id}"))
            .stack_size(STACK);
        let spawned = thread.spawn(move || {
            let _ended = Ended(id, hall.ended.clone());
            let Greeted { input, slot, .. } = greeted;
            connection::run(&shared, negotiated, input, &peer, &hall.stopping);
            drop(shared);
            drop(slot);
        });
        match spawned {
            Ok(thread) => drop(live.insert(id, Live { socket, thread })),
            Err(e) => tracing::error!(error = %e, "no thread for a connection; it is closed"),
        }
    }

    /// Waits for a thread that has reported its end.
    fn join(&self, id: u64) {
        let gone = self.live().remove(&id);
        if gone.is_some_and(|live| live.thread.join().is_err()) {
            tracing::error!("a connection ended in a panic; please report it");
        }
    }

    fn join_all(&self) {
        let ids: Vec<_> = self.live().keys().copied().collect();
        ids.into_iter().for_each(|id| self.join(id));
    }

    fn shutdown(&self, how: Shutdown) {
        for live in self.live().values() {
            live.socket.shutdown(how);
        }
    }
}

/// A listener on the runtime. The file is first, so that it is gone before the socket is closed:
/// the other way round, a successor's file could be taken for ours.
enum Door {
    Unix {
        _file: Option<SocketFile>,
        listener: UnixListener,
    },
    Tcp(TcpListener),
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Door {
    fn open(listener: Listener) -> Result<Door> {
        let failed = |e| Error::new(Kind::Io, "start listening").caused_by(e);
        match listener {
            Listener::Unix(file, l) => {
                l.set_nonblocking(true).map_err(failed)?;
                let listener = UnixListener::from_std(l).map_err(failed)?;
                Ok(Door::Unix {
                    _file: file,
                    listener,
                })
            }
            Listener::Tcp(l) => {
                l.set_nonblocking(true).map_err(failed)?;
                Ok(Door::Tcp(TcpListener::from_std(l).map_err(failed)?))
            }
        }
    }

    /// Accepts until the server stops.
    async fn accept(self, hall: Arc<Hall>, mut stop: watch::Receiver<bool>) {
        loop {
            let stopped = stop.wait_for(|s| *s);
            let next = async {
                let slot = slot(&hall).await?;
                Some((slot, self.next().await))
            };
            let accepted = tokio::select! {
                _ = stopped => return,
                accepted = next => accepted,
            };
            match accepted {
                None => return,
                Some((slot, Ok((stream, peer)))) => {
                    tokio::spawn(welcome(stream, peer, slot, hall.clone(), stop.clone()));
                }
                Some((_, Err(e))) => {
                    tracing::warn!(error = %e, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn next(&self) -> std::io::Result<(Stream, String)> {
        match self {
            Door::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                let peer = match stream.peer_cred() {
                    Ok(c) => format!("unix pid {} uid {}", c.pid().unwrap_or(0), c.uid()),
                    Err(_) => "unix".into(),
                };
                Ok((Stream::Unix(stream), peer))
            }
            Door::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Small answers of the handshake go out at once.
                stream.set_nodelay(true).ok();
                Ok((Stream::Tcp(stream), address.to_string()))
            }
        }
    }
}

/// Waits for a place among the connections.
async fn slot(hall: &Hall) -> Option<OwnedSemaphorePermit> {
    if let Ok(slot) = hall.slots.clone().try_acquire_owned() {
        return Some(slot);
    }
    tracing::warn!(
        limit = hall.config.max_connections,
        "all connections are taken; others wait"
    );
    hall.slots.clone().acquire_owned().await.ok()
}

/// The handshake of one connection, and what follows it.
async fn welcome(
    mut stream: Stream,
    peer: String,
    slot: OwnedSemaphorePermit,
    hall: Arc<Hall>,
    stop: watch::Receiver<bool>,
) {
    let (exports, deadline) = (hall.exports.clone(), hall.config.handshake_timeout);
    let outcome = match &mut stream {
        Stream::Unix(s) => greet(s, slot, exports, deadline, stop).await,
        Stream::Tcp(s) => greet(s, slot, exports, deadline, stop).await,
    };
    let (negotiated, greeted) = match outcome {
        Outcome::Negotiated(negotiated, greeted) => (*negotiated, *greeted),
        Outcome::Closed(why) => {
            return tracing::info!(peer, why, "handshake ended without an export");
        }
    };
    let socket = match stream {
        Stream::Unix(s) => s.into_std().map(Socket::Unix),
        Stream::Tcp(s) => s.into_std().map(Socket::Tcp),
    };
    match socket.and_then(|socket| socket.prepare().map(|()| socket)) {
        Ok(socket) => {
            let export = negotiated.export.name.as_str();
            tracing::info!(export, peer, style = ?negotiated.style, "connected");
            hall.start(socket, negotiated, greeted, peer);
        }
        Err(e) => tracing::warn!(peer, error = %e, "the socket failed after the handshake"),
    }
}
