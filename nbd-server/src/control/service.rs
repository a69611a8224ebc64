//! The socket, its thread, and an orderly end.
//!
//! The API has a thread and a runtime of its own: it answers whatever the NBD side is doing, and
//! `ploop serve` has it as well as `ploopd`. Stopping: all jobs are told to stop, and whoever waits
//! for one learns what it came to; then no new connection is accepted and the file goes; requests
//! in progress are finished and answered. When [`Control::stop`] returns, no operation runs any
//! more, and none will.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use ploop::error::{Error, Kind, Result};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::jobs::Jobs;
use super::metrics::Meter;
use super::model::Info;
use super::openapi;
use super::ops::Operations;
use super::patient::Patient;
use super::socket::{self, Listening};
use super::steward::{Parts, operations};
use crate::export::Disks;
use crate::migrate::link::Tls;
use crate::serve::Connections;
use crate::serve::listen::Listener;

/// What the API answers from.
#[derive(Debug)]
pub struct Service {
    /// Of whom.
    pub info: Info,
    /// The NBD side.
    pub connections: Connections,
    /// Work that takes long.
    pub jobs: Jobs,
    /// What operations measure.
    pub meter: Arc<Meter>,
    /// What it can do.
    pub operations: Arc<dyn Operations>,
    /// Bounds on what clients do.
    pub limits: Limits,
}

impl Service {
    /// What `disks` can do, which the NBD side of `connections` serves.
    /// `tls`: by what other services know this one.
    pub fn of(
        info: Info,
        disks: Arc<Disks>,
        connections: Connections,
        tls: Option<Tls>,
    ) -> Service {
        let meter = Arc::new(Meter::default());
        Service {
            info,
            connections: connections.clone(),
            jobs: Jobs::default(),
            meter: meter.clone(),
            operations: operations(Parts {
                disks,
                connections,
                meter,
                tls,
            }),
            limits: Limits::default(),
        }
    }
}

/// Bounds on the clients of the API.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; the next ones wait.
    pub connections: usize,
    /// For a request's head to come, and for a client between two requests.
    pub head: Duration,
    /// For a request's body to come.
    pub body: Duration,
    /// For a client to take anything of its answer.
    pub answer: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 128,
            head: Duration::from_secs(10),
            body: Duration::from_secs(10),
            answer: Duration::from_secs(30),
        }
    }
}

/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Most bytes of a request's head.
const MAX_HEAD: usize = 64 << 10;

/// A control API that is being served; stops when dropped.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    jobs: Jobs,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Serves the API on a unix socket at `path`, of any length, mode 0600; a socket file that
    /// nobody listens on is replaced. It is reachable on return. Errors: `InUse` when a live server
    /// has it, `Exists` when there is something else of that name. Blocks for at most two seconds.
    pub fn start(path: &Path, service: Service) -> Result<Control> {
        let listening = socket::listen(path)?;
        let failed = |e| Error::new(Kind::Io, "start the control API").caused_by(e);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("control-work")
            .build()
            .map_err(failed)?;
        let jobs = service.jobs.clone();
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new().name("control".into());
        let thread = thread.spawn(move || {
            let limits = service.limits;
            let router = openapi::router(Arc::new(service));
            if let Err(e) = runtime.block_on(serve(listening, router, limits, stopped)) {
                tracing::error!(error = %e, "the control API failed");
            }
            // Waits for operations whose client is gone.
            drop(runtime);
        });
        tracing::info!(path = %path.display(), "control API");
        Ok(Control {
            path: path.to_owned(),
            jobs,
            stop,
            thread: Some(thread.map_err(failed)?),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops, and waits for the end (see the module text). Blocks.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.jobs.shutdown();
        self.stop.send_replace(true);
        let ended = self.thread.take().map(JoinHandle::join);
        if ended.is_some_and(|ended| ended.is_err()) {
            tracing::error!("the control API ended in a panic; please report it");
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.end();
    }
}

/// Who sent a request, for the log.
#[derive(Clone, Debug)]
pub(super) struct Peer(pub(super) Arc<str>);

/// Answers at a control socket by `router` until `stop`, then what is in progress.
pub(crate) async fn serve(
    listening: Listening,
    router: Router,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) -> Result<()> {
    let failed = |e| Error::new(Kind::Io, "listen for the control API").caused_by(e);
    let Listener::Unix(_, socket) = &listening.listener else {
        return Err(Error::invalid("the control API is on unix sockets only"));
    };
    socket.set_nonblocking(true).map_err(failed)?;
    let socket = socket.try_clone().map_err(failed)?;
    let listener = UnixListener::from_std(socket).map_err(failed)?;
    let slots = Arc::new(Semaphore::new(limits.connections.max(1)));
    let mut clients = JoinSet::new();
    loop {
        let accept = async {
            let slot = slots.clone().acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            _ = stop.wait_for(|s| *s) => break,
            Some(_) = clients.join_next() => continue,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let client = attend(stream, router.clone(), limits, stop.clone());
                clients.spawn(async move {
                    client.await;
                    drop(slot);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "accept on the control socket failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // The file goes first: a successor's could be taken for ours.
    drop(listening);
    drop(listener);
    while clients.join_next().await.is_some() {}
    Ok(())
}

/// Answers one client until its end, or until all that is in progress is answered.
async fn attend(
    stream: UnixStream,
    router: Router,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) {
    let peer = match stream.peer_cred() {
        Ok(c) => format!("pid {} uid {}", c.pid().unwrap_or(0), c.uid()),
        Err(_) => "unknown".into(),
    };
    let peer = Peer(peer.into());
    let stream = TokioIo::new(Patient::new(stream, limits.answer));
    let routes = TowerToHyperService::new(router);
    let service = service_fn(|mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        routes.call(request)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_buf_size(MAX_HEAD)
        .serve_connection(stream, service);
    tokio::pin!(connection);
    // What it returns is a lock, which must not be held while others run.
    let stopped = async { drop(stop.wait_for(|s| *s).await) };
    let ended = tokio::select! {
        ended = &mut connection => Some(ended),
        () = stopped => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = ended {
        tracing::debug!(peer = %peer.0, error = %e, "a client of the control API broke off");
    }
}

/// Seconds since 1970.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
