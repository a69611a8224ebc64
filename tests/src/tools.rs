//! Programs of the host that tests need. A missing one fails the test with the line that installs
//! it.

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
    ("mke2fs", "e2fsprogs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("nbdsh", "python3-libnbd"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("setpriv", "util-linux"),
    ("sgdisk", "gdisk"),
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
/// Built at the first call of a process, so it is never older than the sources.
pub fn ploop() -> Command {
    let mut command = Command::new(ploop_path());
    command
        .env("LC_ALL", "C")
        .env_remove("PLOOP_ROOT")
        .env_remove("RUST_LOG");
    command
}

/// Where the `ploop` of [`ploop()`] is.
pub fn ploop_path() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| build("ploop-cli", "ploop"))
}

/// A command for the `ploopd` of this checkout, as [`ploop()`].
pub fn ploopd() -> Command {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(BUILT.get_or_init(|| build("ploop-nbd-server", "ploopd")));
    command
        .env("LC_ALL", "C")
        .env_remove("PLOOP_ROOT")
        .env_remove("RUST_LOG");
    command
}

/// A command for the `fsck.ploop` of this checkout, as [`ploop()`].
pub fn fsck_ploop() -> Command {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(BUILT.get_or_init(|| build("ploop-fsck", "fsck-ploop")));
    command.env("LC_ALL", "C");
    command
}

fn build(package: &str, program: &str) -> PathBuf {
    // TARGET/PROFILE/deps/TEST-HASH
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let profile_name = match profile.file_name().unwrap().to_str().unwrap() {
        "debug" => "dev",
        other => other,
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--quiet", "-p", package, "--bin", program])
        .args(["--profile", profile_name])
        .args(["--message-format", "json-render-diagnostics"])
        .arg("--target-dir")
        .arg(profile.parent().unwrap());
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    let out = run(&mut cargo).stdout;
    let messages = out
        .split(|&b| b == b'\n')
        .filter_map(|l| serde_json::from_slice(l).ok());
    let path = messages
        .filter(|m: &Value| m["target"]["name"] == program)
        .find_map(|m| Some(PathBuf::from(m["executable"].as_str()?)));
    path.unwrap_or_else(|| panic!("cargo names no executable of {program}"))
}
