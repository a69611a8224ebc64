//! Mounts, each taken down when its guard drops, also while a test fails.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::tools::{run, tool};

/// How long to wait for something that should come at once, on a host that has other things to do.
const PATIENCE: Duration = Duration::from_secs(180);

/// Fails the test for anybody but root: mounting needs it.
pub fn need_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test mounts filesystems: run it as root"
    );
}

/// Tries until `done`, or panics with `what`.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Unmounts, as often as somebody (an idle loop device, most of the time) still has it open.
fn umount(path: &Path) {
    let began = Instant::now();
    loop {
        let out = tool("umount").arg(path).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        if out.status.success() || text.contains("not mounted") {
            return;
        }
        if began.elapsed() > PATIENCE {
            eprintln!("cannot unmount {}: {text}", path.display());
            drop(tool("umount").arg("-l").arg(path).status());
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An NBD export as a file, by nbdfuse.
#[derive(Debug)]
pub struct NbdFile {
    fuse: Child,
    file: PathBuf,
    _dir: TempDir,
}

impl NbdFile {
    /// Attaches the export at `uri`.
    pub fn attach(uri: &str) -> NbdFile {
        need_root();
        let dir = tempfile::Builder::new()
            .prefix("ploop-nbd-")
            .tempdir()
            .unwrap();
        let file = dir.path().join("disk");
        fs::write(&file, "").unwrap();
        let fuse = tool("nbdfuse")
            .arg(&file)
            .arg(uri)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut attached = NbdFile {
            fuse,
            file,
            _dir: dir,
        };
        wait_for("nbdfuse", || {
            let ended = attached.fuse.try_wait().unwrap();
            assert!(ended.is_none(), "nbdfuse {uri}: {ended:?}");
            fs::metadata(&attached.file).is_ok_and(|m| m.len() > 0)
        });
        attached
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// Checks the filesystem at byte `offset` of it; panics unless it is clean.
    pub fn e2fsck(&self, offset: u64) {
        e2fsck(&self.file, offset);
    }
}

impl Drop for NbdFile {
    fn drop(&mut self) {
        umount(&self.file);
        // It ends with its mount; one that hangs must not hang the test.
        let began = Instant::now();
        while self.fuse.try_wait().is_ok_and(|ended| ended.is_none()) {
            if began.elapsed() > PATIENCE {
                drop(self.fuse.kill());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Checks the ext4 at byte `offset` of an image or device that nobody has mounted.
pub fn e2fsck(image: &Path, offset: u64) {
    run(tool("e2fsck")
        .arg("-fn")
        .arg(format!("{}?offset={offset}", image.display())));
}

/// A mounted filesystem.
#[derive(Debug)]
pub struct Mounted {
    dir: TempDir,
}

impl Mounted {
    /// Mounts `what` with `-o options`.
    pub fn new(what: &Path, options: &str) -> Mounted {
        need_root();
        Mounted::run(tool("mount").args(["-o", options]).arg(what))
    }

    /// An empty filesystem in memory that holds `bytes`.
    pub fn tmpfs(bytes: u64) -> Mounted {
        need_root();
        let size = format!("size={bytes},mode=0755");
        Mounted::run(tool("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]))
    }

    /// An empty ext4 of `bytes` in a new file `image`, nothing of it kept for root.
    pub fn ext4(image: &Path, bytes: u64) -> Mounted {
        need_root();
        fs::File::create(image).unwrap().set_len(bytes).unwrap();
        run(tool("mke2fs")
            .args(["-q", "-t", "ext4", "-b", "4096", "-m", "0"])
            .arg(image));
        Mounted::new(image, "loop")
    }

    fn run(command: &mut Command) -> Mounted {
        let dir = tempfile::Builder::new()
            .prefix("ploop-mnt-")
            .tempdir()
            .unwrap();
        run(command.arg(dir.path()));
        Mounted { dir }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs a shell command in it, as root of it; what it printed.
    pub fn chroot(&self, script: &str) -> String {
        let mut command = tool("chroot");
        command.arg(self.path()).args(["/bin/sh", "-ec", script]);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        String::from_utf8_lossy(&run(&mut command).stdout).into_owned()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount(self.path());
    }
}

/// The partition of a served disk, mounted through nbdfuse and a loop device.
#[derive(Debug)]
pub struct MountedExport {
    // In this order: the mount goes first.
    mounted: Mounted,
    file: NbdFile,
}

impl MountedExport {
    /// Mounts the first partition of the export at `uri`.
    pub fn new(uri: &str) -> MountedExport {
        let file = NbdFile::attach(uri);
        let mounted = Mounted::new(file.path(), "loop,offset=1048576");
        MountedExport { mounted, file }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.mounted.path()
    }

    /// See [`Mounted::chroot`].
    pub fn chroot(&self, script: &str) -> String {
        self.mounted.chroot(script)
    }

    /// Unmounts the filesystem; the file stays.
    pub fn unmount(self) -> NbdFile {
        drop(self.mounted);
        self.file
    }
}

/// Takes all the room of a file system, to the last block, until it is dropped.
#[derive(Debug)]
pub struct Filler {
    path: PathBuf,
}

impl Filler {
    /// Fills the file system that `dir` is on, up to `leave` bytes.
    pub fn new(dir: &Path, leave: u64) -> Filler {
        let filler = Filler {
            path: dir.join(format!("filler-{leave}")),
        };
        filler.take(leave);
        filler
    }

    /// Takes what there is now, up to `leave` bytes.
    pub fn take(&self, leave: u64) {
        use rustix::fs::{FallocateFlags, fallocate, statvfs};
        let file = fs::File::options();
        let file = file.clone().create(true).append(true).open(&self.path);
        let file = file.unwrap();
        for piece in [16 << 20, 1 << 20, 64 << 10, 4096] {
            loop {
                let stat = statvfs(&self.path).unwrap();
                if stat.f_bavail * stat.f_frsize < leave + piece && leave > 0 {
                    break;
                }
                let end = file.metadata().unwrap().len();
                if fallocate(&file, FallocateFlags::empty(), end, piece).is_err() {
                    break;
                }
            }
        }
        file.sync_all().unwrap();
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}
