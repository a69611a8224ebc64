//! The README's story: a container from a Debian template, a package installed, a snapshot while it
//! is mounted, everything broken, rolled back, run again. With `PLOOP_STORY=FILE` its commands and
//! what they printed are written there.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

use ploop_tests::daemon::Daemon;
use ploop_tests::minbase;
use ploop_tests::mount::{Mounted, MountedExport, NbdFile};
use ploop_tests::store::Rig;
use ploop_tests::tools::{run, tool};

/// First byte of the partition.
const PARTITION: u64 = 1 << 20;

/// What was done, for people.
struct Story {
    rig: Rig,
    text: String,
}

impl Story {
    fn note(&mut self, prompt: &str, command: &str, out: &Output) {
        let said = [&out.stdout[..], &out.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        writeln!(self.text, "{prompt} {command}").unwrap();
        for line in said.lines() {
            writeln!(self.text, "{line}").unwrap();
        }
    }

    /// Runs `ploop`, which must succeed; what it printed.
    fn ploop(&mut self, args: &[&str]) -> String {
        let out = run(self.rig.ploop().args(args));
        self.note("#", &format!("ploop {}", args.join(" ")), &out);
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs a command in the container; everything it printed, and whether it succeeded.
    fn chroot(&mut self, root: &Path, script: &str) -> (bool, String) {
        let mut command = tool("chroot");
        command.arg(root).args(["/bin/sh", "-ec", script]);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        let out = command.output().unwrap();
        self.note("#", &format!("chroot mnt {script}"), &out);
        let said = [&out.stdout[..], &out.stderr].concat();
        (
            out.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    /// The same for a command that must succeed.
    fn does(&mut self, root: &Path, script: &str) -> String {
        let (ok, said) = self.chroot(root, script);
        assert!(ok, "{script}: {said}");
        said
    }
}

/// Everything written is in the file system, and nothing more is until the result is dropped.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(mounted: &'a Path) -> Frozen<'a> {
        run(tool("fsfreeze").arg("-f").arg(mounted));
        Frozen(mounted)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        drop(tool("fsfreeze").arg("-u").arg(self.0).status());
    }
}

/// e2fsck on a node, past the server.
fn sound(rig: &Rig, source: &str) {
    rig.run(["convert", source, "node.raw", "--to", "raw"]);
    ploop_tests::mount::e2fsck(&rig.path("node.raw"), PARTITION);
    fs::remove_file(rig.path("node.raw")).unwrap();
}

/// Goal: what the README tells, happens. Method: the README's commands, on a real Debian.
#[test]
fn a_container_that_was_broken_runs_again_after_a_rollback() {
    let tar = minbase::tar();
    let mut story = Story {
        rig: Rig::new(),
        text: String::new(),
    };
    fs::copy(&tar, story.rig.path("debian.tar")).unwrap();
    fs::create_dir(story.rig.path("deb")).unwrap();
    let debs = minbase::download(&story.rig.path("deb"), &["hello"]);

    story.ploop(&["template", "import", "debian", "debian.tar"]);
    story.ploop(&["create", "web", "--template", "debian", "--size", "2G"]);
    let daemon = Daemon::start(&story.rig);
    let mounted = MountedExport::new(&daemon.uri("web"));
    let cache = mounted.path().join("var/cache/apt/archives");
    fs::copy(&debs[0], cache.join(debs[0].file_name().unwrap())).unwrap();
    let said = story.does(mounted.path(), "apt-get -y install hello");
    assert!(said.contains("hello"), "{said}");
    let greets = "hello -g 'Hello from the container'";
    assert_eq!(
        story.does(mounted.path(), greets),
        "Hello from the container\n"
    );

    // While it is mounted, and other files are written.
    let frozen = Frozen::new(mounted.path());
    story.ploop(&["snapshot", "create", "web", "--name", "good"]);
    drop(frozen);
    story.does(mounted.path(), "rm -rf /usr 2> /dev/null || true");
    let (ok, said) = story.chroot(mounted.path(), "hello");
    assert!(!ok, "{said}");
    rustix::fs::syncfs(File::open(mounted.path()).unwrap()).unwrap();

    // A disk in use is not switched under its user.
    let args = ["snapshot", "switch", "web", "good"];
    story.rig.refused(5, args, &["in use", "--force"]);
    mounted.unmount().e2fsck(PARTITION);
    let said = story.ploop(&args);
    assert!(said.contains("kept as"), "{said}");
    let kept = said.trim_end().rsplit(' ').next().unwrap().to_owned();

    let mounted = MountedExport::new(&daemon.uri("web"));
    assert_eq!(
        story.does(mounted.path(), greets),
        "Hello from the container\n"
    );
    let said = story.does(mounted.path(), "dpkg -l hello | tail -1");
    assert!(said.starts_with("ii  hello"), "{said}");
    mounted.unmount().e2fsck(PARTITION);

    // What was broken is still there, and can be looked at and left again.
    story.ploop(&["tree", "web"]);
    let file = NbdFile::attach(&daemon.uri(&format!("web@{kept}")));
    let broken = Mounted::new(file.path(), "loop,ro,offset=1048576");
    assert!(!broken.path().join("usr/bin").exists());
    assert!(broken.path().join("var/lib/dpkg/info/hello.list").exists());
    drop((broken, file));
    there_and_back(&mut story, &daemon, &kept);
    daemon.stop();
    for source in ["web", "web@good", &format!("web@{kept}")] {
        sound(&story.rig, source);
    }
    assert!(story.rig.run(["check", "web"]).contains("clean"));
    if let Some(path) = std::env::var_os("PLOOP_STORY") {
        fs::write(path, story.text).unwrap();
    }
}

/// To the broken state and back.
fn there_and_back(story: &mut Story, daemon: &Daemon, kept: &str) {
    let run_it = |what: &str| {
        let mounted = MountedExport::new(&daemon.uri("web"));
        let mut chroot: Command = tool("chroot");
        chroot.arg(mounted.path()).arg("/usr/bin/hello");
        assert_eq!(chroot.output().unwrap().status.success(), what == "good");
        mounted.unmount().e2fsck(PARTITION);
    };
    story.ploop(&["snapshot", "switch", "web", kept]);
    run_it("broken");
    story.ploop(&["snapshot", "switch", "web", "good"]);
    run_it("good");
}
