//! `demo`: the main job on real input, step by step, in a temporary store.
//!
//! The root filesystem is taken from this machine: a shell, a few tools and the libraries they need.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ploop::device::Device;
use ploop::{Error, Kind, Result};
use sha2::{Digest, Sha256};
use snapshots::rootfs::{BuildOptions, RootSource};
use snapshots::{CreateOptions, ImportOptions, ImportSource, Root};

use crate::args::Demo;
use crate::output::{duration, line, size};

/// What goes into the root filesystem, as far as this machine has it.
const TOOLS: [&str; 5] = ["sh", "ls", "cat", "uname", "sha256sum"];
/// The container that is served and mounted.
const CT: &str = "ct001";

pub(crate) fn demo(d: &Demo) -> Result<()> {
    let tmp = tempfile::Builder::new().prefix("ploop-demo-").tempdir();
    let tmp = tmp.map_err(|e| Error::io("create a directory in", std::env::temp_dir(), e))?;
    let dir = tmp.path().to_path_buf();
    line(format!("a store in {}", dir.join("store").display()))?;
    let result = run(d, &dir);
    if d.keep {
        line(format!("kept: {}", tmp.keep().display()))?;
    }
    result
}

fn step(began: Instant, text: &str) -> Result<()> {
    line(format!("  {:>9}  {text}", duration(began.elapsed())))
}

fn run(d: &Demo, dir: &Path) -> Result<()> {
    let began = Instant::now();
    let rootfs = dir.join("rootfs");
    let files = collect_rootfs(&rootfs)?;
    step(
        began,
        &format!("a root filesystem of {files} files from this machine"),
    )?;

    let began = Instant::now();
    let root = Root::open(&dir.join("store"), true)?;
    let options = ImportOptions {
        cluster_sectors: snapshots::template::DEFAULT_CLUSTER_SECTORS,
        build: BuildOptions {
            size: Some(256 << 20),
            ..BuildOptions::default()
        },
        open: Default::default(),
        source_text: "this machine".into(),
    };
    let source = ImportSource::Root(RootSource::Dir(rootfs));
    let made = snapshots::import(&root, "mini", &source, &options, &|_| {})?;
    let text = format!(
        "template mini: ext4, {} of data in {}",
        size(made.data),
        size(made.size)
    );
    step(began, &text)?;

    let began = Instant::now();
    for i in 1..=d.clones.max(1) {
        let name = format!("ct{i:03}");
        snapshots::create_container(&root, &name, "mini", &CreateOptions::default(), &|_, _| {})?;
    }
    let each = began.elapsed() / d.clones.max(1);
    step(
        began,
        &format!("{} containers, {} each", d.clones.max(1), duration(each)),
    )?;

    let socket = dir.join("nbd.sock");
    let mut server = Serving::start(&dir.join("store"), &socket)?;
    let began = Instant::now();
    read_back(&root, &socket)?;
    step(
        began,
        &format!("{CT} read through the `nbd` crate's client: equal to the template"),
    )?;
    let began = Instant::now();
    match mount_and_run(dir, &socket)? {
        Ok(said) => step(began, &format!("mounted (nbdfuse + loop), chroot: {said}"))?,
        Err(why) => line(format!("             not mounted: {why}"))?,
    }
    server.stop()?;

    let entries = snapshots::list::containers(&root)?;
    if let Some(ct) = entries.iter().find(|c| c.name == CT) {
        line(format!(
            "             {CT} now has {} of its own",
            size(ct.data)
        ))?;
    }
    line("try next:")?;
    line("  ploop template import debian /path/to/rootfs.tar --root ./store")?;
    line("  ploop create web01 --template debian --size 10G --root ./store")?;
    line("  ploop serve --store --socket ./nbd.sock --root ./store")?;
    line("  nbdinfo --list nbd+unix:///?socket=./nbd.sock")
}

/// Copies the tools and the libraries that `ldd` names to `to`; returns how many files.
fn collect_rootfs(to: &Path) -> Result<usize> {
    let mut files: Vec<PathBuf> = Vec::new();
    for tool in TOOLS {
        let found = ["/usr/bin", "/bin"]
            .iter()
            .map(|d| Path::new(d).join(tool))
            .find(|p| p.exists());
        let Some(path) = found else { continue };
        let out = Command::new("ldd").arg(&path).output();
        let out = out.map_err(|e| Error::io("run ldd for", &path, e))?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let libraries = text.split_whitespace().filter(|w| w.starts_with('/'));
        files.extend(libraries.map(PathBuf::from));
        files.push(path);
    }
    files.sort();
    files.dedup();
    for file in &files {
        let name = file.strip_prefix("/").unwrap_or(file);
        let target = to.join(name);
        let io = |e| Error::io("copy to", &target, e);
        fs::create_dir_all(target.parent().unwrap_or(to)).map_err(io)?;
        fs::copy(file, &target).map_err(io)?;
    }
    let bin = to.join("bin");
    if !bin.exists() {
        std::os::unix::fs::symlink("usr/bin", &bin).map_err(|e| Error::io("link", &bin, e))?;
    }
    fs::create_dir_all(to.join("etc")).map_err(|e| Error::io("create", to.join("etc"), e))?;
    let hello = to.join("etc/motd");
    fs::write(&hello, "hello from a container\n").map_err(|e| Error::io("write", &hello, e))?;
    Ok(files.len())
}

/// Our own server, as a process.
struct Serving(Child);

impl Serving {
    fn start(store: &Path, socket: &Path) -> Result<Serving> {
        let exe = std::env::current_exe().map_err(|e| Error::io("find", "the ploop command", e))?;
        let mut command = Command::new(&exe);
        command
            .args(["serve", "--store", "--root"])
            .arg(store)
            .arg("--socket")
            .arg(socket);
        let child = command.stdout(Stdio::null()).spawn();
        let mut serving = Serving(child.map_err(|e| Error::io("start", exe, e))?);
        for _ in 0..6000 {
            if UnixStream::connect(socket).is_ok() {
                return Ok(serving);
            }
            if let Ok(Some(status)) = serving.0.try_wait() {
                return Err(Error::new(Kind::Io, format!("the server ended: {status}")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(Error::new(Kind::Io, "the server does not answer").on(socket))
    }

    fn stop(&mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.0);
        let failed = |e| Error::new(Kind::Io, "stop the server").caused_by(e);
        let signal = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        signal.map_err(|e| failed(std::io::Error::from(e)))?;
        let status = self.0.wait().map_err(failed)?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::new(Kind::Io, format!("the server ended: {status}"))),
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // After `stop` there is nothing left to kill.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Compares the whole container, read by an independent client, with the template.
fn read_back(root: &Root, socket: &Path) -> Result<()> {
    let failed = |e| Error::io("read through NBD from", socket, e);
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    let export = nbd::client::handshake(&mut stream, CT.as_bytes()).map_err(failed)?;
    let mut client = nbd::client::NbdClient::new(stream, &export);
    let template = snapshots::template::source(root, "mini");
    let template = root.opener().open(&template, &root.open_options(false))?;
    let (mut served, mut direct) = (Sha256::new(), Sha256::new());
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < template.size() {
        let n = (template.size() - at).min(buf.len() as u64) as usize;
        client.read_exact(&mut buf[..n]).map_err(failed)?;
        served.update(&buf[..n]);
        template.read(at, &mut buf[..n])?;
        direct.update(&buf[..n]);
        at += n as u64;
    }
    match export.size == template.size() && served.finalize() == direct.finalize() {
        true => Ok(()),
        false => Err(Error::corrupt("the container differs from its template").on(socket)),
    }
}

/// Mounts the container and runs its shell in it. The inner error says why that may not be done.
fn mount_and_run(dir: &Path, socket: &Path) -> Result<std::result::Result<String, String>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(Err("that needs root".into()));
    }
    let has = |tool| {
        std::env::var("PATH")
            .unwrap_or_default()
            .split(':')
            .any(|d| Path::new(d).join(tool).exists())
    };
    if !has("nbdfuse") || !Path::new("/dev/fuse").exists() {
        return Ok(Err("nbdfuse is missing: apt-get install libnbd-bin".into()));
    }
    let (file, mnt) = (dir.join("disk"), dir.join("mnt"));
    fs::write(&file, "").map_err(|e| Error::io("create", &file, e))?;
    fs::create_dir(&mnt).map_err(|e| Error::io("create", &mnt, e))?;
    let uri = format!("nbd+unix:///{CT}?socket={}", socket.display());
    let fuse = Command::new("nbdfuse")
        .arg(&file)
        .arg(uri)
        .stderr(Stdio::null())
        .spawn();
    let mut fuse = fuse.map_err(|e| Error::io("start", "nbdfuse", e))?;
    let said = mounted(&file, &mnt);
    drop(
        Command::new("umount")
            .arg(&mnt)
            .stderr(Stdio::null())
            .status(),
    );
    // Whoever looks at new devices may have the loop device open for an instant.
    for _ in 0..600 {
        drop(
            Command::new("umount")
                .arg(&file)
                .stderr(Stdio::null())
                .status(),
        );
        if !matches!(fuse.try_wait(), Ok(None)) {
            return Ok(said);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(fuse.kill());
    drop(fuse.wait());
    Ok(said)
}

fn mounted(file: &Path, mnt: &Path) -> std::result::Result<String, String> {
    for _ in 0..6000 {
        if fs::metadata(file).is_ok_and(|m| m.len() > 0) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let run = |c: &mut Command| match c.output() {
        Ok(out) if out.status.success() => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
        Ok(out) => Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
        Err(e) => Err(e.to_string()),
    };
    // The partition begins at 1 MiB.
    run(Command::new("mount")
        .args(["-o", "loop,offset=1048576"])
        .arg(file)
        .arg(mnt))?;
    let script = "cat /etc/motd > /written && cat /written";
    let said = run(Command::new("chroot")
        .arg(mnt)
        .args(["/bin/sh", "-c", script]))?;
    Ok(said.trim().to_owned())
}
