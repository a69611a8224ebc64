//! Programs of the host that know a file system.
//!
//! What they read a guest wrote. So what is kept of their words is bounded, and so is the time that
//! they get.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ploop::{Error, Kind, Result};

/// Bytes that are kept of each stream of a tool's output; the rest is read and thrown away.
pub(super) const KEPT_MAX: u64 = 4 << 20;
/// How often it is looked whether a tool has ended: at once, then ever more seldom.
const LOOK: std::ops::Range<Duration> = Duration::from_millis(1)..Duration::from_millis(50);
/// Lines of a tool that are repeated, and characters of each.
const LINES_MAX: usize = 12;
const LINE_MAX: usize = 200;

/// What a tool said.
#[derive(Debug)]
pub struct Said {
    /// Its exit status.
    pub code: i32,
    /// Its standard output, what is no UTF-8 replaced; 4 MiB at most.
    pub out: String,
    /// The same of standard error.
    pub err: String,
    /// It said more than was kept.
    pub cut: bool,
}

/// [`run_command`] for `tool` of `package`, with a clean environment. Messages come in English.
pub(super) fn run<S: AsRef<OsStr>>(
    tool: &str,
    package: &str,
    args: &[S],
    patience: Duration,
) -> Result<Said> {
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    path.push(":/usr/sbin:/sbin");
    let mut command = Command::new(tool);
    command.args(args).env_clear();
    command.env("PATH", path).env("LC_ALL", "C");
    run_command(&mut command, package, patience)
}

/// Runs a program of `package` with no input, and waits for it. Errors: `NotFound` when it is not
/// installed; `Io` for one that was ended by a signal, which has said nothing about the file system,
/// and for one that takes longer than `patience`, which is killed.
pub fn run_command(command: &mut Command, package: &str, patience: Duration) -> Result<Said> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let tool = tool.as_str();
    let started = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = started.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            let what = format!("the program {tool} is not installed");
            Error::new(Kind::NotFound, what).fix(format!("Install it: apt-get install {package}"))
        }
        _ => Error::io("run", tool, e),
    })?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (status, out, err) = thread::scope(|s| {
        let out = s.spawn(|| kept(out));
        let err = s.spawn(|| kept(err));
        let status = wait(&mut child, patience);
        (status, out.join(), err.join())
    });
    let failed = |e| Error::io("run", tool, e);
    let status = status.map_err(failed)?.ok_or_else(|| {
        let what = format!(
            "{tool} had not ended after {} seconds, and was killed",
            patience.as_secs()
        );
        Error::new(Kind::Io, what).fix("Serve the disk, and run the file system's own check on it")
    })?;
    let lost = |_| io::Error::other("the thread that reads its output ended");
    let (out, more_out) = out.map_err(lost).flatten().map_err(failed)?;
    let (err, more_err) = err.map_err(lost).flatten().map_err(failed)?;
    let code = status.code();
    let code = code.ok_or_else(|| Error::new(Kind::Io, format!("{tool}: {status}")))?;
    Ok(Said {
        code,
        out: String::from_utf8_lossy(&out).into_owned(),
        err: String::from_utf8_lossy(&err).into_owned(),
        cut: more_out || more_err,
    })
}

/// Reads a stream to its end; the first bytes of it, and whether there were more.
fn kept(stream: Option<impl Read>) -> io::Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    let Some(mut stream) = stream else {
        return Ok((bytes, false));
    };
    stream.by_ref().take(KEPT_MAX).read_to_end(&mut bytes)?;
    let more = io::copy(&mut stream, &mut io::sink())?;
    Ok((bytes, more > 0))
}

/// Waits for the end of `child`; `None`: it had to be killed.
fn wait(child: &mut Child, patience: Duration) -> io::Result<Option<ExitStatus>> {
    let (start, mut look) = (Instant::now(), LOOK.start);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= patience {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(look);
        look = (look * 2).min(LOOK.end);
    }
}

/// The lines that `keep` lets pass, as one: the first of them, and how many there are more.
/// Control characters, which a guest may have put into a name, do not get out.
pub(super) fn words(said: &Said, view: &Path, keep: impl Fn(&str) -> bool) -> String {
    let text = format!("{}\n{}", said.out, said.err);
    let view = view.display().to_string();
    let all: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && keep(l))
        .collect();
    let first = all.iter().take(LINES_MAX).map(|l| {
        let plain = plain(&l.replace(&view, "the file system"));
        plain.chars().take(LINE_MAX).collect::<String>()
    });
    let mut out = first.collect::<Vec<_>>().join("; ");
    if all.len() > LINES_MAX {
        let more = if said.cut { "at least " } else { "" };
        out += &format!("; … and {more}{} more lines", all.len() - LINES_MAX);
    }
    out
}

/// `text` without control characters.
pub(super) fn plain(text: &str) -> String {
    let shown = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(1000);

    #[test]
    fn what_a_tool_says_is_kept_up_to_a_bound() {
        let script = "yes out | head -c 30000000; yes err | head -c 30000000 >&2; exit 3";
        let said = run("sh", "dash", &["-c", script], LONG).unwrap();
        let kept = KEPT_MAX as usize;
        assert_eq!((said.code, said.cut), (3, true));
        assert_eq!((said.out.len(), said.err.len()), (kept, kept));
        let shown = words(&said, Path::new("/x"), |l| l == "err");
        assert!(shown.contains("; … and at least 10"), "{shown}");
        assert!(!run("sh", "dash", &["-c", "echo a"], LONG).unwrap().cut);
    }

    #[test]
    fn a_tool_that_does_not_end_is_killed_and_named() {
        let e = run("sleep", "coreutils", &["1000000"], Duration::ZERO).unwrap_err();
        assert_eq!(e.kind(), Kind::Io);
        assert!(
            e.what().starts_with("sleep had not ended after 0 seconds"),
            "{e}"
        );
    }

    #[test]
    fn a_missing_tool_is_named_with_its_package() {
        let e = run("no-such-tool-here", "some-package", &["-x"], LONG).unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound);
        assert!(e.what().contains("no-such-tool-here"));
        assert!(e.fix_text().unwrap().contains("install some-package"));
    }

    #[test]
    fn a_guests_words_are_cut_and_tamed() {
        let text = "banner\n a\x1b[2J \n/proc/1/fd/2: b\n".to_owned() + &"c\n".repeat(20);
        let said = Said {
            code: 0,
            out: text,
            err: String::new(),
            cut: false,
        };
        let out = words(&said, Path::new("/proc/1/fd/2"), |l| l != "banner");
        assert!(out.starts_with("a?[2J; the file system: b; c; "), "{out}");
        assert!(out.ends_with("; … and 10 more lines"), "{out}");
    }
}
