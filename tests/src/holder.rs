//! `ploop hold`, started, asked, killed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use nbd_server::control::Client;
use nbd_server::control::client::resource;
use nbd_server::hold::model::Status;
use nbd_server::wire::reply::Style;
use tempfile::TempDir;

use crate::mount::wait_for;
use crate::tools::ploop;

/// A running holder; killed when dropped.
#[derive(Debug)]
pub struct Holder {
    child: Child,
    dir: TempDir,
}

/// The address of a server's unix socket.
pub fn unix(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

impl Holder {
    /// Starts one for the server at `to`, with further arguments.
    pub fn start(to: &str, args: &[&str]) -> Holder {
        let dir = tempfile::Builder::new()
            .prefix("ploop-hold-")
            .tempdir()
            .unwrap();
        let (socket, control) = (dir.path().join("nbd.sock"), dir.path().join("control.sock"));
        let mut command = ploop();
        command.args(["-v", "hold", "--to", to]).args(args);
        command.arg("--socket").arg(&socket);
        command.arg("--control").arg(&control);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(File::create(dir.path().join("log")).unwrap());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said: Vec<String> = lines.take(2).map(Result::unwrap).collect();
        let holder = Holder { child, dir };
        assert_eq!(said.len(), 2, "{command:?} did not start: {}", holder.log());
        holder
    }

    /// Where clients connect.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// The URI of an export.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// A client of an export.
    pub fn open(&self, export: &str, style: Style) -> crate::client::Client {
        crate::client::Client::open(&self.socket(), export, style)
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    fn api(&self) -> Client {
        Client::connect(&self.control()).unwrap()
    }

    /// What it says of itself.
    pub fn status(&self) -> Status {
        self.api().get(&resource(&["holder"])).unwrap()
    }

    /// Gives its clients another server, by the command for that.
    pub fn move_to(&self, to: &str) {
        let control = self.dir.path().join("control.sock");
        let said = crate::tools::run(ploop().arg("hold-to").arg(control).args([to, "--json"]));
        let status: Status = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(status.to, to);
    }

    /// What it said on standard error so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// The most memory that it had, in bytes.
    pub fn memory_max(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib << 10
    }

    /// Asks it to end by SIGTERM, waits, and panics unless it ended well.
    pub fn stop(mut self) {
        crate::server::terminate(self.child.id());
        let mut ended = None;
        wait_for("the holder's end", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        assert!(ended.unwrap().success(), "{ended:?}\n{}", self.log());
    }

    /// Kills it at once.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // After `stop` there is nothing left to kill.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
