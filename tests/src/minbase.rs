//! A real root filesystem: Debian's minbase, by debootstrap from the machine's own mirror, kept as
//! a tar archive below the build directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::mount::need_root;
use crate::tools::{run, tool};

/// The archive. The first call on a machine takes minutes; other processes wait for it.
pub fn tar() -> PathBuf {
    need_root();
    let test = std::env::current_exe().unwrap();
    // TARGET/PROFILE/deps/TEST-HASH
    let dir = test.ancestors().nth(3).unwrap().join("ploop-tests");
    fs::create_dir_all(&dir).unwrap();
    let lock = File::create(dir.join("minbase.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let tar = dir.join("minbase.tar");
    if !tar.exists() {
        make(&tar);
    }
    tar
}

/// Unpacks the archive as root does, with everything that is in it.
pub fn unpack(tar: &Path, to: &Path) {
    let mut command = tool("tar");
    command.args([
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "--numeric-owner",
        "-xpf",
    ]);
    run(command.arg(tar).arg("-C").arg(to));
}

/// Debian's packages of these names, into the empty directory `to`, by the machine's own apt, so that
/// the container needs no network of its own.
pub fn download(to: &Path, packages: &[&str]) -> Vec<PathBuf> {
    let get = || {
        let mut apt = tool("apt-get");
        apt.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]);
        apt.args(packages).current_dir(to).output().unwrap()
    };
    let mut out = get();
    if !out.status.success() {
        // A machine whose lists were removed, as container images have it.
        run(tool("apt-get").args(["-qq", "update"]));
        out = get();
    }
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success(),
        "apt-get download {packages:?}: {said}"
    );
    let files = fs::read_dir(to).unwrap().map(|e| e.unwrap().path());
    let debs: Vec<PathBuf> = files
        .filter(|p| p.extension().is_some_and(|e| e == "deb"))
        .collect();
    assert_eq!(debs.len(), packages.len(), "{debs:?}");
    debs
}

fn make(tar: &Path) {
    let mirror = mirror().expect(
        "no `deb` line with the component main in /etc/apt/sources.list.d/debian.sources or \
         /etc/apt/sources.list: debootstrap needs a mirror",
    );
    let dir = tempfile::Builder::new()
        .prefix("ploop-minbase-")
        .tempdir()
        .unwrap();
    let tree = dir.path().join("root");
    let mut command = tool("debootstrap");
    command.arg("--variant=minbase");
    if let Some(keyring) = &mirror.keyring {
        command.arg(format!("--keyring={keyring}"));
    }
    run(command.arg(&mirror.suite).arg(&tree).arg(&mirror.uri));
    let partial = tar.with_extension("partial");
    let mut command = tool("tar");
    command.args([
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "--numeric-owner",
        "-cpf",
    ]);
    run(command.arg(&partial).arg("-C").arg(&tree).arg("."));
    fs::rename(partial, tar).unwrap();
}

#[derive(Debug, PartialEq)]
struct Mirror {
    uri: String,
    suite: String,
    keyring: Option<String>,
}

fn mirror() -> Option<Mirror> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    deb822(&read("/etc/apt/sources.list.d/debian.sources"))
        .or_else(|| one_line(&read("/etc/apt/sources.list")))
}

/// The first stanza with packages of main.
fn deb822(text: &str) -> Option<Mirror> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            let mut lines = stanza.lines().filter(|l| !l.starts_with('#'));
            lines
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        let has = |name: &str, word| field(name).is_some_and(|v| v.split(' ').any(|w| w == word));
        let mirror = Mirror {
            uri: field("URIs")?.split(' ').next()?.to_owned(),
            suite: field("Suites")?.split(' ').next()?.to_owned(),
            keyring: field("Signed-By")
                .filter(|k| k.starts_with('/'))
                .map(str::to_owned),
        };
        (has("Types", "deb") && has("Components", "main")).then_some(mirror)
    })
}

/// The first line like `deb [options] URI SUITE main …`.
fn one_line(text: &str) -> Option<Mirror> {
    text.lines().find_map(|line| {
        let mut rest = line.strip_prefix("deb ")?.trim();
        if rest.starts_with('[') {
            rest = rest.split_once(']')?.1.trim();
        }
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?.to_owned(), words.next()?.to_owned());
        words.any(|w| w == "main").then_some(Mirror {
            uri,
            suite,
            keyring: None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_notations_of_apt_name_a_mirror() {
        let new = "# c\nTypes: deb deb-src\nURIs: file:/a\nSuites: x x-updates\n\
                   Components: main contrib\nSigned-By: /k.gpg\n\nTypes: deb\n";
        let uri = "file:/a".to_owned();
        let want = Mirror {
            uri,
            suite: "x".into(),
            keyring: Some("/k.gpg".into()),
        };
        assert_eq!(deb822(new), Some(want));
        assert_eq!(
            deb822("Types: deb-src\nURIs: u\nSuites: s\nComponents: main\n"),
            None
        );
        let old = "# deb file:/b y main\ndeb [arch=a] file:/a x main contrib\n";
        let uri = "file:/a".to_owned();
        assert_eq!(
            one_line(old),
            Some(Mirror {
                uri,
                suite: "x".into(),
                keyring: None
            })
        );
    }
}
