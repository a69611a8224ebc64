//! A file system that is mounted, and used, moves.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use ploop_tests::daemon::Daemon;
use ploop_tests::holder::Holder;
use ploop_tests::minbase;
use ploop_tests::mount::MountedExport;
use ploop_tests::store::Rig;
use ploop_tests::tools::tool;
use rustix::process::Signal;

use super::*;

/// What runs in the container: one transaction after another; the number of each that was committed.
const INSERTS: &str = "n=0; while :; do n=$((n+1)); sqlite3 /root/db \"PRAGMA synchronous=FULL; \
                       INSERT INTO t VALUES($n, hex(randomblob(500)));\" && echo $n; done";

/// The running workload; killed when dropped.
struct Workload {
    child: Child,
    committed: Receiver<u64>,
    last: u64,
}

impl Workload {
    fn start(root: &std::path::Path) -> Workload {
        let mut command = tool("chroot");
        command.arg(root).args(["/bin/sh", "-c", INSERTS]);
        command.env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
        // It and what it runs end together.
        command.process_group(0);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, committed) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                sender
                    .send(line.trim().parse().unwrap())
                    .unwrap_or_default();
            }
        });
        Workload {
            child,
            committed,
            last: 0,
        }
    }

    /// Waits for so many more transactions.
    fn commits(&mut self, more: u64) {
        for _ in 0..more {
            let patience = Duration::from_secs(60);
            self.last = self.committed.recv_timeout(patience).unwrap();
        }
    }

    fn end(&mut self) {
        let group = rustix::process::Pid::from_child(&self.child);
        // It may have ended.
        let _ended = rustix::process::kill_process_group(group, Signal::KILL);
        drop(self.child.wait());
    }

    /// Kills it; the number of the last transaction that was committed.
    fn kill(mut self) -> u64 {
        self.end();
        self.committed.iter().last().unwrap_or(self.last)
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.end();
    }
}

/// Goal: a database in a container that is used while its disk moves, there and back, is whole, and no
/// transaction that was committed is missing. Method: a Debian with SQLite in a chroot; what the disk
/// holds then is read past everybody's cache.
#[test]
fn a_database_that_is_written_to_moves() {
    let (a, b) = (Rig::new(), Rig::new());
    fs::copy(minbase::tar(), a.path("debian.tar")).unwrap();
    let tar = a.arg("debian.tar");
    a.run(["template", "import", "debian", &tar]);
    a.run(["create", "ct", "--template", "debian"]);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    let holder = Holder::start(&nbd(&a), &[]);
    let mounted = MountedExport::new(&holder.uri("ct"));
    fs::create_dir(a.path("deb")).unwrap();
    let packages = ["sqlite3", "libsqlite3-0", "libreadline8", "readline-common"];
    for deb in minbase::download(&a.path("deb"), &packages) {
        fs::copy(
            &deb,
            mounted.path().join("tmp").join(deb.file_name().unwrap()),
        )
        .unwrap();
    }
    mounted.chroot("dpkg -i /tmp/*.deb >/dev/null");
    mounted.chroot("sqlite3 /root/db 'CREATE TABLE t(n INTEGER PRIMARY KEY, data TEXT)'");
    let mut workload = Workload::start(mounted.path());
    for (from, to) in [(&here, &b), (&there, &a), (&here, &b)] {
        workload.commits(20);
        let id = begin(from, &address(to), |m| {
            m.holder = Some(with_holder(&holder, to));
            m.downtime_ms = Some(500);
        });
        let job: Job = from.api().wait(id, |_| ()).unwrap();
        let moved = job.migration.unwrap().moved.unwrap();
        println!("gap {:.1} ms, {} bytes", moved.gap * 1000.0, moved.bytes);
    }
    workload.commits(20);
    let committed = workload.kill();
    mounted.unmount();
    let mounted = MountedExport::new(&there.uri("ct"));
    let asks = |sql: &str| mounted.chroot(&format!("sqlite3 /root/db '{sql}'"));
    assert_eq!(asks("PRAGMA integrity_check").trim(), "ok");
    let missing = format!("SELECT count(*), max(n) FROM t WHERE n <= {committed}");
    assert_eq!(asks(&missing).trim(), format!("{committed}|{committed}"));
    let file = mounted.unmount();
    file.e2fsck(1 << 20);
}
