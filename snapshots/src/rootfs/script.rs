//! A debugfs script: commands in, silence out.
//!
//! debugfs ends with success whatever failed, so the only proof of a command is what it said: the
//! echo of each line, the number of an inode that it made, and nothing else. Whatever else comes
//! out is an error. An argument is quoted, with quotes in it doubled; a line feed or carriage
//! return would end the line, and no quoting helps.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use ploop::error::{Error, Result};

use super::tool;

/// debugfs cuts longer lines in two.
const LINE_MAX: usize = 8190;

/// Commands in the order in which they will run.
#[derive(Debug, Default)]
pub(super) struct Script {
    text: Vec<u8>,
    lines: u64,
}

impl Script {
    /// Adds a command of our own words.
    pub(super) fn add(&mut self, line: &str) {
        self.text.extend_from_slice(line.as_bytes());
        self.text.push(b'\n');
        self.lines += 1;
    }

    /// Adds a command whose arguments are anybody's bytes. False when debugfs could not take them.
    #[must_use]
    pub(super) fn add_quoted(&mut self, command: &str, args: &[&[u8]]) -> bool {
        let start = self.text.len();
        self.text.extend_from_slice(command.as_bytes());
        for arg in args {
            self.text.extend_from_slice(b" \"");
            for &b in *arg {
                if b == b'"' {
                    self.text.push(b'"');
                }
                self.text.push(b);
            }
            self.text.push(b'"');
        }
        let line = &self.text[start..];
        if line.len() > LINE_MAX || line.iter().any(|b| matches!(b, b'\n' | b'\r')) {
            self.text.truncate(start);
            return false;
        }
        self.text.push(b'\n');
        self.lines += 1;
        true
    }

    /// Runs the commands on the file system in `image`, which is a bare name in `dir` with
    /// debugfs's options after it. `name` is the script's own file name there.
    pub(super) fn run(&self, dir: &Path, name: &str, image: &str) -> Result<()> {
        if self.lines == 0 {
            return Ok(());
        }
        let path = dir.join(name);
        let mut out =
            BufWriter::new(File::create(&path).map_err(|e| Error::io("create", &path, e))?);
        out.write_all(&self.text)
            .and_then(|()| out.flush())
            .map_err(|e| Error::io("write", &path, e))?;
        let out = tool::run("debugfs", &["-w", "-f", name, image], dir)?;
        if let Some(said) = self.complaint(&out.stdout, &out.stderr) {
            let kind = tool::kind_of(&said);
            let what = format!("debugfs could not put everything into the image: {said}");
            return Err(Error::new(kind, what).on(dir.join(image)));
        }
        if out.code != Some(0) {
            return Err(tool::failed("debugfs", &dir.join(image), &out));
        }
        Ok(())
    }

    /// The first thing that was said beyond what a success says.
    fn complaint(&self, stdout: &[u8], stderr: &[u8]) -> Option<String> {
        let stderr = String::from_utf8_lossy(stderr);
        if let Some(line) = stderr.lines().find(|l| !tool::is_banner(l.trim())) {
            return Some(line.to_owned());
        }
        let mut sent = self.text.split(|&b| b == b'\n').filter(|l| !l.is_empty());
        for line in stdout.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
            if line.starts_with(b"Allocated inode: ") {
                continue;
            }
            if line
                .strip_prefix(b"debugfs: ")
                .is_none_or(|echo| sent.next() != Some(echo))
            {
                return Some(String::from_utf8_lossy(line).into_owned());
            }
        }
        let unsent = sent.next()?;
        Some(format!(
            "it stopped before: {}",
            String::from_utf8_lossy(unsent)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_quoted_and_line_ends_refused() {
        let mut s = Script::default();
        assert!(s.add_quoted("symlink", &[b"a \"b\"", b"-\\\xff"]));
        assert_eq!(s.text, b"symlink \"a \"\"b\"\"\" \"-\\\xff\"\n");
        assert!(!s.add_quoted("mknod", &[b"a\nb"]));
        assert!(!s.add_quoted("mknod", &[b"a\rb"]));
        assert!(!s.add_quoted("symlink", &[b"a", &[b'"'; 4095]]));
        assert_eq!(s.lines, 1);
    }

    #[test]
    fn everything_but_the_echo_is_a_complaint() {
        let mut s = Script::default();
        s.add("cd <2>");
        s.add("mknod x p");
        let good = b"debugfs: cd <2>\ndebugfs: mknod x p\nAllocated inode: 12\n";
        let banner = b"debugfs 1.47.0 (5-Feb-2023)\n";
        assert_eq!(s.complaint(good, banner), None);
        let said = s.complaint(good, b"debugfs 1.47.0 (5-Feb-2023)\nmknod: no room\n");
        assert_eq!(said.unwrap(), "mknod: no room");
        assert!(
            s.complaint(b"debugfs: cd <2>\n", banner)
                .unwrap()
                .contains("mknod x p")
        );
        let said = s.complaint(b"debugfs: cd <2>\noops\ndebugfs: mknod x p\n", banner);
        assert_eq!(said.unwrap(), "oops");
    }
}
