//! Programs of the host that tests need. A missing one fails the test with the line that installs
//! it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::Value;

/// Tool → Debian package.
const PACKAGES: &[(&str, &str)] = &[
    ("debootstrap", "debootstrap"),
    ("debugfs", "e2fsprogs"),
    ("dumpe2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("fio", "fio"),
    ("fsfreeze", "util-linux"),
    ("ip", "iproute2"),
    ("mke2fs", "e2fsprogs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("nbdsh", "python3-libnbd"),
    ("openssl", "openssl"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("setpriv", "util-linux"),
    ("sgdisk", "gdisk"),
    ("tc", "iproute2"),
    ("valgrind", "valgrind"),
    ("xfs_db", "xfsprogs"),
];

/// A command for a required tool. Panics with the line that installs it when it is missing.
pub fn tool(name: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = path
        .split(':')
        .map(|d| std::path::Path::new(d).join(name))
        .find(|p| p.exists());
    let Some(found) = found else {
        let package = PACKAGES.iter().find(|p| p.0 == name).map_or(name, |p| p.1);
        panic!("{name} is required: apt-get install {package}");
    };
    let mut command = Command::new(found);
    command.env("LC_ALL", "C");
    command
}

/// Runs a command; panics with everything it printed unless it exits 0.
pub fn run(command: &mut Command) -> Output {
    let out = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        out.status.success(),
        "{command:?}: {}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    out
}

/// A command for the `ploop` of this checkout, in the profile that the running test was built in.
/// Built at the first call of a process, so it is never older than the sources, unless
/// `PLOOP_BIN` says where it is.
pub fn ploop() -> Command {
    program("ploop")
}

/// Where the `ploop` of [`ploop()`] is.
pub fn ploop_path() -> &'static Path {
    path_of("ploop")
}

/// A command for the `ploopd` of this checkout, as [`ploop()`].
pub fn ploopd() -> Command {
    program("ploopd")
}

/// A command for the `fsck.ploop` of this checkout, as [`ploop()`].
pub fn fsck_ploop() -> Command {
    program("fsck-ploop")
}

fn program(name: &str) -> Command {
    let mut command = Command::new(path_of(name));
    command
        .env("LC_ALL", "C")
        .env_remove("PLOOP_ROOT")
        .env_remove("RUST_LOG");
    command
}

fn path_of(program: &str) -> &'static Path {
    static BUILT: OnceLock<HashMap<String, PathBuf>> = OnceLock::new();
    let path = BUILT.get_or_init(programs).get(program);
    path.unwrap_or_else(|| panic!("there is no executable of {program}"))
}

/// All programs: those in the directory that `PLOOP_BIN` names, for who has just built them, or
/// newly built ones.
fn programs() -> HashMap<String, PathBuf> {
    let Some(dir) = std::env::var_os("PLOOP_BIN") else {
        return build();
    };
    let files = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
    let named = files.filter(|f| f.is_file());
    named
        .filter_map(|f| Some((f.file_name()?.to_str()?.to_owned(), f)))
        .collect()
}

/// Builds all programs, with the features that the whole workspace asks for: one program alone would
/// be built on libraries of its own.
fn build() -> HashMap<String, PathBuf> {
    // TARGET/PROFILE/deps/TEST-HASH
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let profile_name = match profile.file_name().unwrap().to_str().unwrap() {
        "debug" => "dev",
        other => other,
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--quiet", "--workspace", "--bins"])
        .args(["--profile", profile_name])
        .args(["--message-format", "json-render-diagnostics"])
        .arg("--target-dir")
        .arg(profile.parent().unwrap());
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    let out = run(&mut cargo).stdout;
    let messages = out
        .split(|&b| b == b'\n')
        .filter_map(|l| serde_json::from_slice::<Value>(l).ok());
    messages
        .filter_map(|m| {
            let path = PathBuf::from(m["executable"].as_str()?);
            Some((m["target"]["name"].as_str()?.to_owned(), path))
        })
        .collect()
}
