//! Short ways to serve an image and to run the tools of others on it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use crate::store::Server;
use crate::tools::{ploop, run, tool};

/// An image of `ploop init` in a directory of its own.
#[derive(Debug)]
pub struct Bare {
    dir: TempDir,
    image: PathBuf,
}

impl Bare {
    /// Makes one of `size`; `args` may add `-f` and `-b`.
    pub fn new(size: &str, args: &[&str]) -> Bare {
        let dir = tempfile::Builder::new()
            .prefix("ploop-bare-")
            .tempdir()
            .unwrap();
        let image = dir.path().join("root.hds");
        run(ploop().args(["init", "-s", size]).args(args).arg(&image));
        Bare { dir, image }
    }

    /// The image file; its export is named `root`.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// A file of the test's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Serves the image, with further arguments of `ploop serve`.
    pub fn serve(&self, args: &[&str]) -> Server {
        Server::start(
            ploop().arg("serve").arg(&self.image).args(args),
            self.dir.path(),
        )
    }

    /// `in_use` of the header, as it is in the file.
    pub fn mark(&self) -> u32 {
        crate::server::mark(&self.image)
    }
}

/// `in_use` of an image's header.
pub fn mark(image: &Path) -> u32 {
    u32_at(&std::fs::read(image).unwrap(), 44)
}

/// The little-endian number at byte `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

/// A `ploop serve` that is asked to listen in several places; killed when dropped.
#[derive(Debug)]
pub struct Listening {
    child: Child,
    /// What it said it listens on, in order.
    pub on: Vec<String>,
}

impl Listening {
    /// Starts `command` and waits until it listens in `places` places.
    pub fn start(command: &mut Command, places: usize) -> Listening {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut listening = Listening {
            child: command.spawn().unwrap(),
            on: Vec::new(),
        };
        let mut lines = BufReader::new(listening.child.stdout.take().unwrap()).lines();
        while listening.on.len() < places {
            let line = lines
                .next()
                .unwrap_or_else(|| panic!("{command:?} did not start"))
                .unwrap();
            let place = line
                .strip_prefix("listening on ")
                .unwrap_or_else(|| panic!("{line}"));
            listening.on.push(place.to_owned());
        }
        listening
    }

    /// Ends it by SIGTERM and waits; panics unless it ended well.
    pub fn stop(mut self) {
        terminate(self.child.id());
        let ended = self.child.wait().unwrap();
        assert!(ended.success(), "{ended}");
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // After `stop` there is nothing left to kill.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Sends SIGTERM to a child of this test.
pub fn terminate(pid: u32) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

/// The path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What a required tool prints when it succeeds.
pub fn out(name: &str, args: &[&str]) -> String {
    stdout(&run(tool(name).args(args)))
}

/// What a command prints, on both channels, when it fails; panics when it succeeds.
pub fn refused(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let text = stdout(&out) + &String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "{command:?} succeeded\n{text}");
    text
}

fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Runs a script with libnbd's Python module, in the interpreter that Debian made it for. It begins
/// with `h`, not connected, and a few helpers.
pub fn nbd_python(script: &str, args: &[&str]) -> String {
    // nbdsh and the module come in one package: when it is missing, this says so.
    tool("nbdsh");
    let script = format!("{PRELUDE}\n{script}");
    stdout(&run(Command::new("/usr/bin/python3")
        .arg("-c")
        .arg(script)
        .args(args)))
}

const PRELUDE: &str = r"
import errno, nbd, sys
uri = sys.argv[1]
h = nbd.NBD()
# Send what the test says, not what libnbd thinks right.
h.set_strict_mode(0)

def refused(number, call, *args, **kw):
    try:
        call(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == number, (e, call, args, kw)
    else:
        raise AssertionError(('not refused', call, args, kw))

def extents(h, count, offset, flags=0):
    got = []
    h.block_status(count, offset, lambda ctx, at, e, err: got.append((ctx, at, e)), flags)
    assert len(got) == 1, got
    assert got[0][:2] == ('base:allocation', offset), got
    e = got[0][2]
    return list(zip(e[::2], e[1::2]))
";

/// `len` bytes of which no two sectors are alike.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = crate::fsx::Rng(seed);
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes);
    bytes
}

/// `qemu-img check` of a closed ploop image; panics unless it is clean.
pub fn qemu_check(image: &Path) {
    let said = out("qemu-img", &["check", "-f", "parallels", text(image)]);
    assert!(said.contains("No errors were found"), "{said}");
}

/// `qemu-img compare` of two images; panics unless they hold the same bytes.
pub fn qemu_compare(format: &str, image: &Path, raw: &Path) {
    let said = out(
        "qemu-img",
        &["compare", "-f", format, "-F", "raw", text(image), text(raw)],
    );
    assert!(said.contains("identical"), "{said}");
}

/// Every line of what ploop's userspace, its kernel driver and QEMU demand together of a closed
/// image, on the bytes of the file.
pub fn assert_acceptable(image: &Path, v1: bool) {
    let file = std::fs::read(image).unwrap();
    let signature: &[u8] = if v1 {
        b"WithoutFreeSpace"
    } else {
        b"WithouFreSpacExt"
    };
    assert_eq!(&file[..16], signature, "signature");
    assert_eq!(u32_at(&file, 16), 2, "type");
    let sectors = u32_at(&file, 28);
    assert!(
        sectors.is_power_of_two() && (64..=131_072).contains(&sectors),
        "cluster {sectors}"
    );
    let cluster = sectors as usize * 512;
    let entries = u32_at(&file, 32) as usize;
    let size = u64::from(u32_at(&file, 36)) | u64::from(u32_at(&file, 40)) << 32;
    assert!(!v1 || u32_at(&file, 40) == 0, "v1 sizes have 32 bits");
    assert_eq!(
        size,
        entries as u64 * u64::from(sectors),
        "size = entries × cluster"
    );
    assert_eq!(u32_at(&file, 44), 0, "in_use of a closed image");
    let bat_clusters = (64 + 4 * entries).div_ceil(cluster);
    assert_eq!(
        u32_at(&file, 48) as usize * 512,
        bat_clusters * cluster,
        "data_off is minimal"
    );
    assert!(u32_at(&file, 52) <= 1, "flags");
    assert_eq!(file[56..64], [0; 8], "no extension");
    assert!(
        file[64 + 4 * entries..bat_clusters * cluster]
            .iter()
            .all(|b| *b == 0),
        "spare slots"
    );
    assert!(
        file.len().is_multiple_of(cluster) && file.len() >= bat_clusters * cluster,
        "length"
    );
    let unit = if v1 { 512 } else { cluster };
    let mut named = std::collections::BTreeSet::new();
    for slot in 0..entries {
        let offset = u32_at(&file, 64 + 4 * slot) as usize * unit;
        if offset != 0 {
            assert!(
                offset.is_multiple_of(cluster) && offset >= bat_clusters * cluster,
                "entry {slot}"
            );
            assert!(
                offset + cluster <= file.len(),
                "entry {slot} ends past the end of the file"
            );
            assert!(
                named.insert(offset),
                "entry {slot} names a cluster that another one names"
            );
        }
    }
}
