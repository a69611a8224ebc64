//! Something done while the user's command has a file system frozen.
//!
//! The thaw is in the hands of a process of its own from before the freeze on: it runs when our end of
//! a pipe is closed, which we do, or our death does, or when the time is up. It is in a process group
//! of its own, so an interrupt at the terminal does not reach it.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use ploop::{Error, Kind, Result};

use crate::args;

const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Waits for the end of the pipe, at most so many seconds, and thaws.
const GUARD: &str = r#"timeout "$1" cat > /dev/null; exec sh -c "$2""#;

const BY_HAND: &str = "See whether it is still frozen, and thaw it by hand";

/// The two commands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hooks<'a> {
    pub(super) freeze: &'a str,
    pub(super) thaw: &'a str,
    /// What each of the two may take, and what is between them.
    pub(super) limit: Duration,
    /// How it stands when only the thaw failed.
    pub(super) done: &'a str,
}

impl<'a> Hooks<'a> {
    /// Those that were asked for, if they were.
    pub(super) fn of(args: &'a args::Hooks, done: &'a str) -> Option<Hooks<'a>> {
        Some(Hooks {
            freeze: args.freeze.as_deref()?,
            thaw: args.thaw.as_deref()?,
            limit: Duration::from_secs(u64::from(args.hook_timeout)),
            done,
        })
    }
}

/// Runs `work` between the two commands; each of the three has `limit`. Whatever happens, `thaw` runs
/// once. Error: theirs, and `Io` when it was thawed before `work` had ended: what that did is then
/// not of a frozen file system; `late` takes it back where it can, and says what to do.
pub(super) fn during<T>(
    hooks: Hooks<'_>,
    work: impl FnOnce() -> Result<T>,
    late: impl FnOnce(T) -> String,
) -> Result<T> {
    let Hooks {
        freeze,
        thaw,
        limit,
        done: begun,
    } = hooks;
    // Both of what happens before it.
    let frozen = limit * 2;
    // Before the guard looks at its own clock: who is late here is late there.
    let began = Instant::now();
    let mut guard = Command::new("sh")
        .args(["-c", GUARD, "sh"])
        .arg(frozen.as_secs().max(1).to_string())
        .arg(thaw)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|e| Error::io("start", "sh", e))?;
    let done = run(freeze, limit).and_then(|()| work());
    let is_late = began.elapsed() >= frozen || !matches!(guard.try_wait(), Ok(None));
    drop(guard.stdin.take());
    let thawed = wait(&mut guard, limit, thaw);
    let done = match (done, &thawed) {
        (Ok(done), _) => done,
        (Err(e), Ok(())) => return Err(e),
        (Err(e), Err(left)) => {
            let what = format!("{e}; and then {left}");
            return Err(Error::new(e.kind(), what).fix(BY_HAND));
        }
    };
    if is_late {
        let what = format!(
            "it was thawed after {} s, before the instant",
            frozen.as_secs()
        );
        let mut fix = late(done);
        if let Err(left) = thawed {
            fix += &format!(". And {left}. {BY_HAND}");
        }
        return Err(Error::new(Kind::Io, what).fix(fix));
    }
    thawed.map_err(|e| e.fix(format!("Thaw it by hand. {begun}")))?;
    Ok(done)
}

fn run(command: &str, limit: Duration) -> Result<()> {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|e| Error::io("start", "sh", e))?;
    wait(&mut child, limit, command)
}

/// Waits for a command that succeeds; one that takes too long is killed with all that it started.
fn wait(child: &mut Child, limit: Duration, command: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => {
                let what = format!("`{command}` failed: {}", shown(status));
                return Err(Error::new(Kind::Io, what));
            }
            Ok(None) if began.elapsed() < limit => std::thread::sleep(LOOK_AGAIN),
            Ok(None) => {
                let group = rustix::process::Pid::from_child(child);
                let kill = rustix::process::Signal::KILL;
                if let Err(e) = rustix::process::kill_process_group(group, kill) {
                    tracing::warn!(command, error = %e, "a command that takes too long goes on");
                }
                drop(child.wait());
                let what = format!("`{command}` took more than {} s", limit.as_secs());
                return Err(Error::new(Kind::Io, what));
            }
            Err(e) => return Err(Error::io("wait for", command, e)),
        }
    }
}

fn shown(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => "no exit code".to_owned(),
    }
}

#[cfg(test)]
mod tests;
