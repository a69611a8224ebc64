//! The tools of e2fsprogs, run with a clean environment and judged by all that they say.
//!
//! They run in the directory of the image and get its bare name: a path could hold the `?` that
//! begins their options. Messages come in English, whatever the caller's language.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use ploop::error::{Error, Kind, Result};

/// What a tool left behind.
#[derive(Debug)]
pub(super) struct Output {
    /// `None`: ended by a signal.
    pub(super) code: Option<i32>,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

/// Runs `tool` in `dir` with no input, and waits for it.
pub(super) fn run<S: AsRef<OsStr>>(tool: &str, args: &[S], dir: &Path) -> Result<Output> {
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    path.push(":/usr/sbin:/sbin");
    let out = Command::new(tool)
        .args(args)
        .current_dir(dir)
        .env_clear()
        .env("PATH", path)
        .env("LC_ALL", "C")
        .env("MKE2FS_CONFIG", super::make::CONFIG)
        .stdin(Stdio::null())
        .output();
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
        .fix("Install it: apt-get install e2fsprogs")),
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
    let known = ["debugfs", "mke2fs", "e2fsck", "resize2fs", "dumpe2fs"];
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
