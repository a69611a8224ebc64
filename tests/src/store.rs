//! A store in a temporary directory, and servers for it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ploop::disk::open::DESCRIPTOR;
use serde_json::Value;
use tempfile::TempDir;

use crate::mount::wait_for;
use crate::tools::{ploop, ploop_path, run, tool};
use crate::treehash::{file_digest, reader_digest};

/// Debian's nobody.
pub const NOBODY: u32 = 65534;

/// Path → type, mode, length and hash: what "nothing is lost or left behind" compares.
pub type Listing = BTreeMap<PathBuf, String>;

/// A store and a directory for the test's own files.
#[derive(Debug)]
pub struct Rig {
    dir: TempDir,
    root: PathBuf,
    nobody: bool,
}

impl Default for Rig {
    fn default() -> Rig {
        Rig::new()
    }
}

impl Rig {
    /// For whoever runs the test. The store is made by the first import.
    pub fn new() -> Rig {
        let dir = tempfile::Builder::new()
            .prefix("ploop-rig-")
            .tempdir()
            .unwrap();
        let root = dir.path().join("store");
        Rig {
            dir,
            root,
            nobody: false,
        }
    }

    /// The same with its store in another place.
    pub fn with_root(self, root: &Path) -> Rig {
        Rig {
            root: root.to_path_buf(),
            ..self
        }
    }

    /// For nobody, who has the directory to himself. Needs root.
    pub fn of_nobody() -> Rig {
        crate::mount::need_root();
        let rig = Rig {
            nobody: true,
            ..Rig::new()
        };
        std::os::unix::fs::chown(rig.dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        // The build directory may be closed to him.
        fs::copy(ploop_path(), rig.path("ploop")).unwrap();
        fs::set_permissions(rig.path("ploop"), fs::Permissions::from_mode(0o755)).unwrap();
        rig
    }

    /// A file of the test's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same as text, for an argument.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A `ploop` that uses this store, in the test's directory.
    pub fn ploop(&self) -> Command {
        let mut command = match self.nobody {
            false => ploop(),
            true => {
                let mut command = tool("setpriv");
                let id = NOBODY.to_string();
                command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
                command.arg(self.path("ploop")).env_remove("RUST_LOG");
                command
            }
        };
        command
            .env("PLOOP_ROOT", &self.root)
            .current_dir(self.dir.path());
        command
    }

    /// Runs it; what it printed. Panics when it fails.
    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> String {
        String::from_utf8(run(self.ploop().args(args)).stdout).unwrap()
    }

    /// Runs it, for what it prints as JSON.
    pub fn json<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Value {
        let text = self.run(args);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// Runs it and expects this exit code and a message with all of `says`; the message.
    pub fn refused<A: AsRef<OsStr>>(
        &self,
        code: i32,
        args: impl IntoIterator<Item = A>,
        says: &[&str],
    ) -> String {
        expect_refusal(self.ploop().args(args), code, says)
    }

    /// The store as it is, but for what locks leave in their files.
    pub fn listing(&self) -> Listing {
        listing(&self.root)
    }

    /// The store, wherever it is, and the test's own files.
    pub fn everything(&self) -> (Listing, Listing) {
        (self.listing(), listing(self.dir.path()))
    }

    /// A directory with a few files of each sort, for a template that is made in an instant.
    pub fn small_rootfs(&self) -> PathBuf {
        let root = self.path("rootfs");
        for dir in ["bin", "etc", "home/user"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::write(root.join("etc/hostname"), "template\n").unwrap();
        fs::write(root.join("etc/data"), vec![0x5A; 300_000]).unwrap();
        symlink("hostname", root.join("etc/link")).unwrap();
        fs::hard_link(root.join("etc/data"), root.join("home/user/same")).unwrap();
        fs::set_permissions(root.join("home/user"), fs::Permissions::from_mode(0o1770)).unwrap();
        root
    }

    /// A template of 64 MiB from [`Rig::small_rootfs`], and these containers.
    pub fn small_template(&self, template: &str, containers: &[&str]) {
        let source = self.small_rootfs();
        let source = source.to_str().unwrap();
        self.run(["template", "import", template, source, "--size", "64M"]);
        if !containers.is_empty() {
            self.run(["create", "--template", template].iter().chain(containers));
        }
    }

    /// SHA-256 of a container's content, or of any other source's.
    pub fn content(&self, source: &str) -> String {
        let mut command = self.ploop();
        command
            .args(["convert", source, "-", "--to", "raw"])
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let digest = reader_digest(child.stdout.as_mut().unwrap());
        let status = child.wait().unwrap();
        assert!(status.success(), "convert {source}: {status}");
        digest
    }

    /// SHA-256 of a template's content.
    pub fn template_content(&self, name: &str) -> String {
        self.content(self.root.join("templates").join(name).to_str().unwrap())
    }

    /// The image file that a container writes to.
    pub fn top(&self, container: &str) -> PathBuf {
        // Not the only image, and with what an operation left that was killed not the only file.
        let dir = self.root.join("containers").join(container);
        let xml = fs::read(dir.join(DESCRIPTOR)).unwrap();
        let d = ploop::descriptor::parse(&xml).unwrap();
        dir.join(&d.image(d.top).unwrap().file)
    }

    /// The image file of the only layer.
    pub fn layer(&self) -> PathBuf {
        let mut layers = fs::read_dir(self.root.join("layers")).unwrap();
        let layer = layers.next().unwrap().unwrap().path();
        assert!(layers.next().is_none(), "one layer");
        layer.join("image.hds")
    }

    /// A server for one disk or image, with further arguments.
    pub fn serve<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Server {
        Server::start(self.ploop().arg("serve").args(args), self.dir.path())
    }
}

/// Everything below `dir`, but for what locks leave in their files, and for what goes meanwhile.
pub fn listing(dir: &Path) -> Listing {
    let mut out = Listing::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            meta => meta.unwrap(),
        };
        if meta.is_dir() {
            match fs::read_dir(&path) {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                names => todo.extend(names.unwrap().map(|e| e.unwrap().path())),
            }
        }
        let content = match meta.is_file() && path.file_name() != Some(OsStr::new("lock")) {
            true => format!("{} bytes {}", meta.len(), file_digest(&path)),
            false => String::new(),
        };
        let name = path.strip_prefix(dir).unwrap().to_path_buf();
        out.insert(name, format!("{:06o} {content}", meta.mode()));
    }
    out
}

/// Panics with what differs unless both are the same.
pub fn assert_unchanged(before: &(Listing, Listing), after: &(Listing, Listing), what: &str) {
    let changes = |a: &Listing, b: &Listing| {
        let names = a.keys().chain(b.keys()).filter(|n| a.get(*n) != b.get(*n));
        let show = |n: &PathBuf| format!("\n{n:?}: {:?}, was {:?}", b.get(n), a.get(n));
        names.map(show).collect::<String>()
    };
    let text = changes(&before.0, &after.0) + &changes(&before.1, &after.1);
    assert!(text.is_empty(), "{what} left something behind:{text}");
}

/// Runs a command that must fail with this exit code and say all of `says`; its message.
pub fn expect_refusal(command: &mut Command, code: i32, says: &[&str]) -> String {
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // What should be refused may as well serve for ever. It says less than a pipe holds.
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    let said = String::from_utf8_lossy(&out.stdout);
    let all = format!("{command:?}: {}\n{said}{text}", out.status);
    assert_eq!(out.status.code(), Some(code), "{all}");
    assert!(!text.contains("panicked"), "{all}");
    assert!(!text.contains('\x1b'), "colours where nobody looks: {all}");
    // A host that is nearly full is said in the log before.
    let error = text.lines().find(|line| !line.contains(" WARN "));
    assert!(
        error.is_some_and(|line| line.starts_with("ploop: ") || line.starts_with("error: ")),
        "{all}"
    );
    for word in says {
        assert!(text.contains(word), "{word:?} is not in: {all}");
    }
    text
}

/// A running `ploop serve`; killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    _dir: TempDir,
}

impl Server {
    /// Starts `command` (a `serve` without a place to listen) on a socket of its own in `room`.
    pub fn start(command: &mut Command, room: &Path) -> Server {
        let dir = tempfile::Builder::new()
            .prefix("s")
            .tempdir_in(room)
            .unwrap();
        let meta = fs::metadata(room).unwrap();
        std::os::unix::fs::chown(dir.path(), Some(meta.uid()), Some(meta.gid())).unwrap();
        let (socket, log) = (dir.path().join("nbd"), dir.path().join("log"));
        command
            .arg("--socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command.stderr(File::create(&log).unwrap());
        let mut server = Server {
            child: command.spawn().unwrap(),
            socket,
            log,
            _dir: dir,
        };
        let mut line = String::new();
        BufReader::new(server.child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(
            line.starts_with("listening on "),
            "{command:?}: {line:?} {}",
            server.log()
        );
        server
    }

    /// The URI of an export.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said on standard error so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Asks it to end, waits, and panics unless it ended well.
    pub fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut ended = None;
        wait_for("the server's end", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        assert!(
            ended.unwrap().success(),
            "the server ended: {ended:?}\n{}",
            self.log()
        );
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After `stop` there is nothing left to kill.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Runs qemu-io's commands on an export or image; everything it said, and whether it succeeded.
pub fn qemu_io(format: &str, read_only: bool, target: &OsStr, commands: &[&str]) -> (bool, String) {
    let mut qemu = tool("qemu-io");
    qemu.args(["-f", format]);
    if read_only {
        qemu.arg("-r");
    }
    for c in commands {
        qemu.args(["-c", c]);
    }
    let out = qemu.arg(target).stdin(Stdio::null()).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    // It exits 0 after a failed request, too.
    (out.status.success() && !text.contains("failed"), text)
}

/// The same for commands that must succeed on an export.
pub fn on_export(uri: &str, commands: &[&str]) {
    let (ok, text) = qemu_io("raw", false, OsStr::new(uri), commands);
    assert!(ok, "{commands:?} on {uri}: {text}");
}
