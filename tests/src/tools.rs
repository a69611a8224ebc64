//! Programs of the host that tests need. A missing one fails the test with the line that installs
//! it.

use std::process::{Command, Output};

/// Tool → Debian package.
const PACKAGES: &[(&str, &str)] = &[
    ("debootstrap", "debootstrap"),
    ("e2fsck", "e2fsprogs"),
    ("fio", "fio"),
    ("mke2fs", "e2fsprogs"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("nbdsh", "python3-libnbd"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("sgdisk", "gdisk"),
];

/// A command for a required tool. Panics with the line that installs it when it is missing.
pub fn tool(name: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = path.split(':').map(|d| std::path::Path::new(d).join(name)).find(|p| p.exists());
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
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        out.status.success(),
        "{command:?}: {}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    out
}
