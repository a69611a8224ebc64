//! Printing: sizes, tables, JSON, errors, progress.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use ploop::{Error, Kind, Result};
use serde::Serialize;
use serde_json::json;
use tracing_subscriber::EnvFilter;

/// Logs go to standard error; `RUST_LOG` overrides.
pub(crate) fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        // A job of this process fails with the command, which says so itself.
        0 => "warn,nbd_server::control::jobs=error",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();
}

/// Prints an error on standard error (as JSON, too, for programs); the exit code is its kind's.
pub(crate) fn report(e: Error, as_json: bool) -> ExitCode {
    if is_broken_pipe(&e) {
        return ExitCode::SUCCESS;
    }
    let e = advised(e);
    if as_json {
        let v = json!({ "error": {
            "kind": e.kind().name(), "what": e.what(), "file": e.path(), "offset": e.offset(),
            "text": e.to_string(), "fix": e.fix_text(),
        }});
        drop(writeln!(io::stderr(), "{v}"));
    } else {
        drop(writeln!(io::stderr(), "ploop: {e}"));
    }
    ExitCode::from(e.kind().exit_code())
}

/// What to do about a refusal of the operating system's, where nothing better was said.
fn advised(e: Error) -> Error {
    if e.fix_text().is_some() || e.raw_os_error().is_none() {
        return e;
    }
    match e.kind() {
        Kind::Permission => e.fix("Run it as the user who may do that, or choose another place"),
        Kind::NoSpace => e.fix("Make room there, and run it again"),
        _ => e,
    }
}

/// Whoever read our output has enough of it.
fn is_broken_pipe(e: &Error) -> bool {
    e.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error())
}

fn stdout_error(e: io::Error) -> Error {
    Error::io("write", "standard output", e)
}

/// Prints a line on standard output.
pub(crate) fn line(text: impl AsRef<str>) -> Result<()> {
    writeln!(io::stdout(), "{}", text.as_ref()).map_err(stdout_error)
}

/// Prints a line on standard error, where standard output has something else.
pub(crate) fn note(text: impl AsRef<str>) -> Result<()> {
    let written = writeln!(io::stderr(), "{}", text.as_ref());
    written.map_err(|e| Error::io("write", "standard error", e))
}

/// Prints a value as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::new(Kind::Invalid, "cannot be written as JSON").caused_by(e))?;
    line(text)
}

/// A table: left-aligned, except for columns whose header begins with `>`.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) -> Result<()> {
    let mut t = Table::new();
    t.load_style(presets::NOTHING);
    t.set_header(header.iter().map(|h| h.trim_start_matches('>')));
    for row in rows {
        t.add_row(row);
    }
    for (i, h) in header.iter().enumerate() {
        if let Some(column) = t.column_mut(i) {
            column.set_padding((0, 2));
            if h.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    for l in t.lines() {
        line(l.trim_end())?;
    }
    Ok(())
}

/// `1.5G`, with three digits at most.
pub(crate) fn size(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["K", "M", "G", "T", "P"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    match value {
        v if v >= 100.0 || v.fract() == 0.0 => format!("{v:.0}{unit}"),
        v if v >= 10.0 => format!("{v:.1}{unit}"),
        v => format!("{v:.2}{unit}"),
    }
}

/// `10G`, `512`, `1.5T`.
pub(crate) fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let bad = || format!("{text:?} is no size; write a number and B, K, M, G or T, like 10G");
    let plain = text.trim_end_matches(['i', 'B', 'b']);
    let (number, shift) = match plain.char_indices().last() {
        Some((i, c)) if c.is_ascii_alphabetic() => {
            let shift = match c.to_ascii_uppercase() {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => return Err(bad()),
            };
            (&plain[..i], shift)
        }
        _ => (plain, 0),
    };
    if let Ok(n) = number.parse::<u64>() {
        return n
            .checked_mul(1 << shift)
            .filter(|&n| n <= i64::MAX as u64)
            .ok_or_else(bad);
    }
    match number.parse::<f64>() {
        Ok(n) if n >= 0.0 && n * (1u64 << shift) as f64 <= i64::MAX as f64 => {
            Ok((n * (1u64 << shift) as f64) as u64)
        }
        _ => Err(bad()),
    }
}

/// Durations as people write them.
pub(crate) fn duration(d: Duration) -> String {
    match d.as_secs_f64() {
        s if s < 0.001 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

/// How long ago a time in seconds since 1970 is.
pub(crate) fn age(then: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.map_or(0, |d| d.as_secs()).saturating_sub(then);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

const BYTES: &str = "{msg:12} {bar:32} {bytes:>10}/{total_bytes:10} {eta}";

/// A bar on standard error, when that is a terminal; silent otherwise.
pub(crate) struct Bar {
    bar: ProgressBar,
    stage: Cell<&'static str>,
}

impl Bar {
    pub(crate) fn new(show: bool) -> Bar {
        let bar = match show && io::stderr().is_terminal() {
            true => ProgressBar::new(0),
            false => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template(BYTES) {
            bar.set_style(style);
        }
        Bar {
            bar,
            stage: Cell::new(""),
        }
    }

    /// Shows how far `stage` is.
    pub(crate) fn at(&self, stage: &'static str, done: u64, total: Option<u64>) {
        if self.stage.replace(stage) != stage {
            self.bar.set_message(stage);
            self.bar.reset();
        }
        self.bar.set_length(total.unwrap_or(done));
        self.bar.set_position(done);
    }
}

impl fsck::Progress for Bar {
    fn at(&mut self, stage: fsck::Stage, done: u64, total: u64) {
        let template = match stage.counts_bytes() {
            true => BYTES,
            false => "{msg:12} {bar:32} {pos}/{len} images",
        };
        if self.stage.get() != stage.name()
            && let Ok(style) = ProgressStyle::with_template(template)
        {
            self.bar.set_style(style);
        }
        Bar::at(self, stage.name(), done, Some(total));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_operators_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("10G", 10 << 30),
            ("1.5k", 1536),
            ("2TiB", 2 << 40),
            ("7B", 7),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "G", "-1", "10X", "1e30T", "99999999999T", "1.5.5G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(
            (size(512), size(1536), size(10 << 30)),
            ("512B".into(), "1.50K".into(), "10G".into())
        );
    }
}
