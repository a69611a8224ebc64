//! The server: listeners, the connections they made, and an orderly end.
//!
//! Stopping: no new connection is accepted and the socket files go; handshakes are told so and end
//! within a second; every connection answers what it has received in full, then closes. After
//! [`Config::stop_grace`] the sockets of those whose client does not take its answers are cut. When
//! [`Server::run_until`] returns, every thread is joined and every device let go: the caller may
//! close them.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ploop::error::{Error, Kind, Result};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::task::JoinSet;

use super::connection::Socket;
use super::greet::{Outcome, greet};
use super::hall::{Connections, Hall};
use super::listen::{Listener, SocketFile};
use super::plane::EngineKind;
use super::{activation, listen};
use crate::export::Exports;

/// Limits of a [`Server`].
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Connections at once, those in the handshake included; the next ones wait to be accepted.
    pub max_connections: u32,
    /// Time for a whole handshake.
    pub handshake_timeout: Duration,
    /// Time for clients to take their last answers when the server stops.
    pub stop_grace: Duration,
    /// How requests are executed. One that this process may not use does without what it lacks.
    pub engine: EngineKind,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            max_connections: 4096,
            handshake_timeout: Duration::from_secs(30),
            stop_grace: Duration::from_secs(10),
            engine: EngineKind::best(),
        }
    }
}

/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An NBD server. Made with [`Server::new`], given places to listen, then run.
#[derive(Debug)]
pub struct Server {
    hall: Arc<Hall>,
    ends: mpsc::UnboundedReceiver<()>,
    listeners: Vec<Listener>,
}

impl Server {
    /// A server of `exports` that listens nowhere yet.
    pub fn new(exports: Arc<dyn Exports>, config: Config) -> Server {
        tracing::info!(engine = config.engine.name(), "data plane");
        let (hall, ends) = Hall::new(exports, config);
        Server {
            hall,
            ends,
            listeners: Vec::new(),
        }
    }

    /// Its connections, present and to come.
    pub fn connections(&self) -> Connections {
        Connections::new(self.hall.clone())
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
        self.run_until_signal(ready, || ())
    }

    /// The same; calls `stopping` after the signal, on a thread where it may block. The clients are
    /// served until it returns.
    pub fn run_until_signal(
        self,
        ready: impl FnOnce() -> Result<()>,
        stopping: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
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
                if tokio::task::spawn_blocking(stopping).await.is_err() {
                    tracing::error!("a step of stopping panicked; please report it");
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
        let (hall, mut ends) = (self.hall, self.ends);
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
                Some(()) = ends.recv() => hall.join(),
            }
        }
        hall.stopping.store(true, Ordering::Release);
        stopper.send_replace(true);
        while doors.join_next().await.is_some() {}
        hall.close_inputs();
        let grace = tokio::time::sleep(hall.config.stop_grace);
        tokio::pin!(grace);
        let mut patient = true;
        let all = hall.slots.clone().acquire_many_owned(hall.max);
        tokio::pin!(all);
        loop {
            tokio::select! {
                _ = &mut all => break,
                Some(()) = ends.recv() => hall.join(),
                () = &mut grace, if patient => {
                    patient = false;
                    hall.cut_all();
                }
            }
        }
        hall.join();
        hall.plane.pool.close();
        Ok(())
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
    let seat = hall.seat(slot, &peer);
    let outcome = match &mut stream {
        Stream::Unix(s) => greet(s, seat, exports, deadline, stop).await,
        Stream::Tcp(s) => greet(s, seat, exports, deadline, stop).await,
    };
    let guest = match outcome {
        Outcome::Negotiated(guest) => guest,
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
            let negotiated = &guest.get().0;
            let export = negotiated.export.name.as_str();
            tracing::info!(export, peer, style = ?negotiated.style, "connected");
            hall.start(socket, *guest);
        }
        Err(e) => tracing::warn!(peer, error = %e, "the socket failed after the handshake"),
    }
}
