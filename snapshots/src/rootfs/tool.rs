//! The tools of e2fsprogs, run with a clean environment and judged by all that they say.
//!
//! They run in the directory of the image and get its bare name: a path could hold the `?` that
//! begins their options. Messages come in English, whatever the caller's language.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use fsck::inside;
use ploop::error::{Error, Kind, Result};

const PACKAGE: &str = "e2fsprogs";

/// What a tool left behind.
#[derive(Debug)]
pub(super) struct Output {
    /// `None`: ended by a signal.
    pub(super) code: Option<i32>,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

/// What a tool may take for a file, and more for each GiB of data in it: far longer than any needs
/// that gets on.
const PATIENCE: Duration = Duration::from_secs(600);
const PATIENCE_PER_GIB: Duration = Duration::from_secs(300);

fn command<S: AsRef<OsStr>>(tool: &str, args: &[S], dir: &Path) -> Command {
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    path.push(":/usr/sbin:/sbin");
    let mut command = Command::new(tool);
    command.args(args).current_dir(dir).env_clear();
    command.env("PATH", path).env("LC_ALL", "C");
    command.env("MKE2FS_CONFIG", super::make::CONFIG);
    command
}

/// Runs `tool` in `dir` on the file system in `image`, which a guest wrote: so what is kept of its
/// words is bounded, and so is the time that it gets.
pub(super) fn run_on<S: AsRef<OsStr>>(
    image: &Path,
    tool: &str,
    args: &[S],
    dir: &Path,
) -> Result<Output> {
    let of = std::fs::metadata(image).map_err(|e| Error::io("stat", image, e))?;
    let gib = u32::try_from((of.blocks() * 512) >> 30).unwrap_or(u32::MAX);
    let patience = PATIENCE.saturating_add(PATIENCE_PER_GIB.saturating_mul(gib));
    let said = inside::run_command(&mut command(tool, args, dir), PACKAGE, patience);
    let said = said.map_err(|e| match e.kind() {
        Kind::NotFound => e,
        _ => e.on(image),
    })?;
    Ok(Output {
        code: Some(said.code),
        stdout: said.out.into_bytes(),
        stderr: said.err.into_bytes(),
    })
}

/// Runs `tool` in `dir` with no input, and waits for it.
pub(super) fn run<S: AsRef<OsStr>>(tool: &str, args: &[S], dir: &Path) -> Result<Output> {
    let out = command(tool, args, dir).stdin(Stdio::null()).output();
    match out {
        Ok(out) => Ok(Output {
            code: out.status.code(),
            stdout: out.stdout,
            stderr: out.stderr,
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound && dir.is_dir() => Err(Error::new(
            Kind::NotFound,
            format!("the program {tool} is not installed"),
        )
        .fix(format!("Install it: apt-get install {PACKAGE}"))),
        Err(e) => Err(Error::io(format!("run {tool} in"), dir, e)),
    }
}

/// The error for a run of `tool` on `image` that failed.
pub(super) fn failed(tool: &str, image: &Path, out: &Output) -> Error {
    let text = String::from_utf8_lossy(&out.stderr);
    let said = said(&text).or_else(|| said(&String::from_utf8_lossy(&out.stdout)));
    let said = said.unwrap_or_else(|| "it said nothing".to_owned());
    let end = match out.code {
        Some(code) => format!("status {code}"),
        None => "a signal".to_owned(),
    };
    Error::new(kind_of(&text), format!("{tool} ended with {end}: {said}")).on(image)
}

/// `NoSpace` when that is what the tool complains about.
pub(super) fn kind_of(text: &str) -> Kind {
    let full = [
        "No space left on device",
        "Could not allocate",
        "Disk quota exceeded",
    ];
    if full.iter().any(|f| text.contains(f)) {
        Kind::NoSpace
    } else {
        Kind::Io
    }
}

/// The lines of a tool's words that are not its banner, joined and cut.
fn said(text: &str) -> Option<String> {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !is_banner(l))
        .collect();
    let mut out = lines.join("; ");
    if out.len() > 1000 {
        let end = (0..=1000)
            .rev()
            .find(|&i| out.is_char_boundary(i))
            .unwrap_or(0);
        out.truncate(end);
        out.push('…');
    }
    (!out.is_empty()).then_some(out)
}

/// An empty line or the name, version and date that these tools begin with.
pub(super) fn is_banner(line: &str) -> bool {
    let mut words = line.split(' ');
    let tool = words.next().unwrap_or_default();
    let known = [
        "debugfs",
        "mke2fs",
        "e2fsck",
        "resize2fs",
        "dumpe2fs",
        "tune2fs",
    ];
    let version = words
        .next()
        .is_some_and(|w| w.starts_with(|c: char| c.is_ascii_digit()));
    let date = words
        .next()
        .is_some_and(|w| w.starts_with('(') && w.ends_with(')'));
    line.is_empty() || known.contains(&tool) && version && date && words.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_says_what_to_install() {
        let e = run("mke2fs-that-is-not-there", &[""], Path::new("/")).unwrap_err();
        assert!(e.to_string().contains("apt-get install e2fsprogs"), "{e}");
    }

    /// Goal: who wrote the file system cannot fill the memory of whoever resizes it.
    #[test]
    fn what_is_said_of_a_guests_file_system_is_kept_up_to_a_bound() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let script = "yes | head -c 30000000; exit 1";
        let out = run_on(image.path(), "sh", &["-c", script], Path::new("/")).unwrap();
        assert_eq!(out.code, Some(1));
        assert!((1..10_000_000).contains(&out.stdout.len()));
        let e = run_on(image.path(), "no-such-e2fsck", &[""], Path::new("/")).unwrap_err();
        assert!(e.to_string().contains("apt-get install e2fsprogs"), "{e}");
    }

    #[test]
    fn the_banner_is_no_message() {
        assert!(is_banner("debugfs 1.47.0 (5-Feb-2023)"));
        assert!(!is_banner("debugfs: Command not found bogus"));
        assert!(!is_banner("debugfs 1.47.0 (5-Feb-2023) x"));
    }

    #[test]
    fn a_full_disk_is_told_from_other_failures() {
        let out = |stderr: &str| Output {
            code: Some(1),
            stdout: Vec::new(),
            stderr: stderr.as_bytes().to_vec(),
        };
        let e = failed("mke2fs", Path::new("x"), &out("x: No space left on device"));
        assert_eq!(e.kind(), Kind::NoSpace);
        let e = failed(
            "mke2fs",
            Path::new("x"),
            &out("mke2fs 1.47.0 (5-Feb-2023)\n\nbad\nworse"),
        );
        assert_eq!(e.kind(), Kind::Io);
        assert!(
            e.to_string()
                .ends_with("mke2fs ended with status 1: bad; worse"),
            "{e}"
        );
    }
}
