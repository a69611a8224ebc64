//! A holder that listens.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ploop::error::{Error, Kind, Result};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, LocalSet};

use crate::control::socket;
use crate::hold::control;
use crate::hold::hall::Hall;
use crate::hold::line::{Address, Line, Socket};
use crate::hold::run::attend;
use crate::serve::listen::{self, Listener, SocketFile};

/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a holder holds.
#[derive(Clone, Debug)]
pub struct Options {
    /// The server.
    pub to: Address,
    /// Bytes of requests and of answered changes that are kept, of all exports together. Each export
    /// has an equal share, and one request beyond it.
    pub buffer: usize,
    /// How long a client waits for a server before its requests fail; `None`: for ever.
    pub patience: Option<Duration>,
    /// Connections at once.
    pub connections: usize,
}

/// See [`super`].
#[derive(Debug)]
pub struct Holder {
    hall: Arc<Hall>,
    connections: usize,
    listeners: Vec<Listener>,
    control: Option<PathBuf>,
}

impl Holder {
    /// One that does not listen yet. No server is asked before a client comes.
    pub fn new(options: Options) -> Holder {
        Holder {
            hall: Arc::new(Hall::new(options.to, options.buffer, options.patience)),
            connections: options.connections,
            listeners: Vec::new(),
            control: None,
        }
    }

    /// Listens on a unix socket of mode 0600; one that nobody listens on is replaced. Errors: as
    /// [`crate::Server::listen_unix`].
    pub fn listen_unix(&mut self, path: &Path) -> Result<()> {
        self.listeners.push(listen::unix(path)?);
        Ok(())
    }

    /// Listens on TCP, loopback addresses only unless `insecure`; where.
    pub fn listen_tcp(&mut self, address: &str, insecure: bool) -> Result<Vec<SocketAddr>> {
        let listening = listen::tcp(address, insecure)?;
        let bound = listening.iter().map(|(a, _)| *a).collect();
        self.listeners.extend(listening.into_iter().map(|(_, l)| l));
        Ok(bound)
    }

    /// Answers the control API at `path`.
    pub fn control(&mut self, path: &Path) {
        self.control = Some(path.to_owned());
    }

    /// Holds until SIGINT or SIGTERM, then lets its clients go: what they were answered is flushed if
    /// there is a server. Calls `ready` as soon as a signal ends it in order. Blocks.
    pub fn run(self, ready: impl FnOnce() -> Result<()>) -> Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let failed = |e| Error::new(Kind::Io, "start the runtime").caused_by(e);
        // One thread: a request costs less than handing it to another.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let all = async {
            let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
            let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
            let mut doors = JoinSet::new();
            let mut files = Vec::new();
            let slots = Arc::new(Semaphore::new(self.connections.max(1)));
            for listener in self.listeners {
                let (file, door) = Door::open(listener)?;
                files.push(file);
                doors.spawn_local(door.accept(self.hall.clone(), slots.clone()));
            }
            let mut control = JoinSet::new();
            if let Some(path) = &self.control {
                let listening = socket::listen(path)?;
                control.spawn_local(control::serve(listening, self.hall.clone()));
            }
            ready()?;
            tokio::select! {
                _ = interrupt.recv() => tracing::info!("stopping on SIGINT"),
                _ = terminate.recv() => tracing::info!("stopping on SIGTERM"),
            }
            doors.shutdown().await;
            drop(files);
            self.hall.stop();
            let all = u32::try_from(self.connections.max(1)).unwrap_or(u32::MAX);
            // Each client's end is bounded in time.
            drop(slots.acquire_many(all).await);
            while let Some(ended) = control.join_next().await {
                if let Ok(Err(e)) = ended {
                    tracing::error!(error = %e, "the control API failed");
                }
            }
            Ok(())
        };
        let tasks = LocalSet::new();
        runtime.map_err(failed)?.block_on(tasks.run_until(all))
    }
}

enum Door {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Door {
    fn open(listener: Listener) -> Result<(Option<SocketFile>, Door)> {
        let failed = |e| Error::new(Kind::Io, "start listening").caused_by(e);
        Ok(match listener {
            Listener::Unix(file, l) => {
                l.set_nonblocking(true).map_err(failed)?;
                (file, Door::Unix(UnixListener::from_std(l).map_err(failed)?))
            }
            Listener::Tcp(l) => {
                l.set_nonblocking(true).map_err(failed)?;
                (None, Door::Tcp(TcpListener::from_std(l).map_err(failed)?))
            }
        })
    }

    async fn accept(self, hall: Arc<Hall>, slots: Arc<Semaphore>) {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            let accepted = match &self {
                Door::Unix(l) => l.accept().await.map(|(s, _)| Socket::Unix(s)),
                Door::Tcp(l) => l.accept().await.map(|(s, _)| {
                    s.set_nodelay(true).ok();
                    Socket::Tcp(s)
                }),
            };
            match accepted {
                Ok(socket) => {
                    let client = attend(Line::new(socket), hall.clone());
                    tokio::task::spawn_local(async move {
                        client.await;
                        drop(slot);
                    });
                }
                Err(e) => {
                    tracing::warn!(error = %e, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}
