//! What fsck(8) and people type.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;

const AFTER: &str = "\
Without -p, -n or -y it shows what it would do and asks at the terminal, once for each SOURCE; without a
terminal that is an error (8), before anything is looked at.
A repair writes an undo file first, beside the image or in .ploop of the disk; `ploop check --undo FILE`
takes the repair back. What is lost is named, by guest ranges.
An interrupt (SIGINT) ends a check at once, with nothing written; a repair that has begun is finished
first, and the sources behind it are left alone.

Exit codes, added up over all sources:
  0  clean, or nothing to do: what opening or another command finishes is said and is no error
  1  errors were corrected
  4  errors are left
  8  it could not be looked at
 16  usage
 32  interrupted
2 (the system should be rebooted) is never given.";

/// Check and repair ploop images and disks, as fsck(8) calls for it.
#[derive(Debug, Parser)]
#[command(name = "fsck.ploop", version, after_help = AFTER)]
pub(crate) struct Args {
    /// Image files, disk directories or DiskDescriptor.xml files.
    #[arg(required = true, value_name = "SOURCE")]
    pub(crate) sources: Vec<String>,
    /// Repair without asking what can be repaired without loss; leave a file that has more.
    #[arg(short = 'p', visible_short_alias = 'a', group = "how")]
    pub(crate) preen: bool,
    /// Write nothing; say what would be done.
    #[arg(short = 'n', group = "how")]
    pub(crate) no: bool,
    /// Repair all without asking, and name what is lost.
    #[arg(short = 'y', group = "how")]
    pub(crate) yes: bool,
    /// Ask; this is what is done without -p, -n and -y, which win.
    #[arg(short = 'r')]
    pub(crate) ask: bool,
    /// Correct also what is only stale (a size in the descriptor, say). What is marked clean is
    /// checked with and without this: a check reads tables only.
    #[arg(short = 'f')]
    pub(crate) force: bool,
    /// Progress: 0 or nothing, a bar on a terminal; a file descriptor, lines of "PASS CURRENT MAX
    /// SOURCE" on it; negative, none.
    #[arg(short = 'C', value_name = "FD", num_args = 0..=1, default_missing_value = "0",
          allow_negative_numbers = true)]
    pub(crate) progress: Option<i32>,
    /// Have the file system inside checked, too (ext2–4, XFS), on a copy of its data in TMPDIR or
    /// /var/tmp; what a repair loses is named by files.
    #[arg(long)]
    pub(crate) fs: bool,
    /// A further directory that files named by a source may lie in.
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_dir: Vec<PathBuf>,
    /// The undo file, of a single SOURCE [default: a new one beside the image, or in .ploop].
    #[arg(long, value_name = "FILE")]
    pub(crate) undo_file: Option<PathBuf>,
}

/// The words of the command line, with the value of every `-C` attached: behind it there may be
/// one, or a source.
pub(crate) fn attached(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut out = Vec::new();
    let mut words = words.peekable();
    while let Some(mut word) = words.next() {
        let text = word.to_string_lossy();
        if text == "--" {
            out.push(word);
            out.extend(words);
            return out;
        }
        let ends = text.starts_with('-') && !text.starts_with("--") && text.ends_with('C');
        if ends {
            let is_number = |w: &OsString| w.to_string_lossy().parse::<i32>().is_ok();
            word.push(words.next_if(is_number).unwrap_or_else(|| "0".into()));
        }
        out.push(word);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        let words = std::iter::once("fsck.ploop").chain(words.iter().copied());
        Args::try_parse_from(attached(words.map(OsString::from)))
    }

    #[test]
    fn what_fsck_passes_is_understood() {
        Args::command().debug_assert();
        for (words, progress) in [
            (&["-a", "x"][..], None),
            (&["-p", "-C0", "x"], Some(0)),
            (&["-C", "x", "-y"], Some(0)),
            (&["-fC", "x"], Some(0)),
            (&["-fC5", "x"], Some(5)),
            (&["-C", "5", "x"], Some(5)),
            (&["-C-3", "x"], Some(-3)),
            (&["-n", "-f", "x", "-C"], Some(0)),
            (&["-r", "x"], None),
        ] {
            let args = parse(words).unwrap();
            assert_eq!((args.progress, args.sources.len()), (progress, 1));
        }
        assert!(parse(&["-a", "x"]).unwrap().preen);
        assert_eq!(
            parse(&["-n", "--", "-C", "y"]).unwrap().sources,
            ["-C", "y"]
        );
        for words in [
            &["-p", "-n", "x"][..],
            &["-y", "-a", "x"],
            &["-n", "-y", "x"],
            &["-p"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }
}
