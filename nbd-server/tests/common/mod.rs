//! A server in this process, and required tools.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;

use nbd_server::{Config, Exports, Server};
use tokio::sync::oneshot;

#[path = "../../src/testing.rs"]
pub(crate) mod testing;

#[path = "../../src/sleepy.rs"]
pub(crate) mod sleepy;

#[allow(unused_imports, reason = "each test file uses its own part")]
pub(crate) use testing::{CLUSTER, FileDevice};

/// A server on a unix socket, in a thread of its own.
pub(crate) struct Running {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<ploop::Result<()>>>,
    pub(crate) socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Running {
    pub(crate) fn start(exports: Arc<dyn Exports>, config: Config) -> Running {
        Running::start_with(exports, config, |_| ())
    }

    /// `more` adds places to listen. The environment may choose the engine.
    pub(crate) fn start_with(
        exports: Arc<dyn Exports>,
        mut config: Config,
        more: impl FnOnce(&mut Server),
    ) -> Running {
        if let Ok(engine) = std::env::var("PLOOP_ENGINE") {
            config.engine = engine.parse().unwrap();
        }
        Running::start_as(exports, config, more)
    }

    /// The same with the engine of `config`, whatever the environment says.
    pub(crate) fn start_as(
        exports: Arc<dyn Exports>,
        config: Config,
        more: impl FnOnce(&mut Server),
    ) -> Running {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let mut server = Server::new(exports, config);
        server.listen_unix(&socket).unwrap();
        more(&mut server);
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(server.run_until(async {
                stopped.await.ok();
            }))
        });
        Running {
            stop: Some(stop),
            thread: Some(thread),
            socket,
            _dir: dir,
        }
    }

    /// The address of an export for NBD tools.
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// The thread that the server's runtime runs on.
    pub(crate) fn thread_id(&self) -> std::thread::ThreadId {
        self.thread.as_ref().unwrap().thread().id()
    }

    /// Stops the server and waits for its end.
    pub(crate) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.take().map(|stop| stop.send(()));
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs a required tool; its standard output. Fails, with how to install it, when it is missing.
pub(crate) fn tool(program: &str, package: &str, args: &[&str]) -> String {
    let (ok, out, err) = try_tool(program, package, args);
    assert!(ok, "{program} {args:?} failed\n{out}{err}");
    out
}

/// The same for a run that may fail: success, standard output, standard error.
pub(crate) fn try_tool(program: &str, package: &str, args: &[&str]) -> (bool, String, String) {
    let done = match Command::new(program).args(args).output() {
        Ok(done) => done,
        Err(e) => panic!("{program} is needed and was not run ({e}): apt-get install -y {package}"),
    };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (done.status.success(), text(done.stdout), text(done.stderr))
}

/// `len` bytes that repeat nowhere near.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ ((i >> 8) as u8) ^ ((i >> 16) as u8) ^ seed)
        .collect()
}

/// The path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
