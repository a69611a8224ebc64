//! How room of the host is divided: what is said when a service is started.

use std::fmt;
use std::str::FromStr;

use snapshots::limits::parse_rate;

/// The reserve, unless another is asked for: this, or a hundredth of a smaller file system.
const RESERVE: u64 = 64 << 20;
const RESERVE_PART: u64 = 100;

/// The soft mark, unless another is asked for.
const SOFT: Amount = Amount::Percent(5);

/// What to do where they do not apply.
pub const LEAVE_OUT: &str = "Leave --reserve, --space-soft, --space-hard and --on-full out";

/// Room of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// So many bytes.
    Bytes(u64),
    /// So much of all that it has.
    Percent(u8),
}

impl Amount {
    /// Bytes, of a file system of `total` bytes.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Amount::Bytes(bytes) => bytes,
            Amount::Percent(percent) => (u128::from(total) * u128::from(percent) / 100) as u64,
        }
    }
}

impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Amount, String> {
        if let Some(percent) = text.strip_suffix('%') {
            let percent = percent.parse().ok().filter(|&p: &u8| p <= 100);
            return percent
                .map(Amount::Percent)
                .ok_or_else(|| format!("'{text}' is not between 0% and 100%"));
        }
        match text {
            "0" => Ok(Amount::Bytes(0)),
            _ => parse_rate(text).map(Amount::Bytes),
        }
    }
}

/// What becomes of a write that needs room which the host does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnFull {
    /// It gets ENOSPC.
    #[default]
    Error,
    /// It waits until there is room.
    Pause,
}

impl fmt::Display for OnFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnFull::Error => "error",
            OnFull::Pause => "pause",
        })
    }
}

/// The options of a service, as they are given to it.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// Room that the store keeps for flushes, snapshots, deletions and merges, in a file of its own,
    /// which containers never get; 0 is none [default: 64M, or 1 % of a smaller file system].
    #[arg(long, value_name = "SIZE|PERCENT")]
    pub reserve: Option<Amount>,
    /// Say so, in the log and the metrics, when the host has less room than this [default: 5%].
    #[arg(long, value_name = "SIZE|PERCENT")]
    pub space_soft: Option<Amount>,
    /// Give containers nothing more when the host has less room than this, the reserve not counted
    /// [default: 0].
    #[arg(long, value_name = "SIZE|PERCENT")]
    pub space_hard: Option<Amount>,
    /// What becomes of a write that needs room then, or that the host has no room for: it gets ENOSPC
    /// (error), or waits until there is some (pause) [default: error].
    #[arg(long, value_enum, value_name = "WHAT", hide_possible_values = true)]
    pub on_full: Option<OnFull>,
}

impl Options {
    /// True when nothing was said.
    pub fn is_default(&self) -> bool {
        let marks = [self.reserve, self.space_soft, self.space_hard];
        marks.iter().all(Option::is_none) && self.on_full.is_none()
    }

    /// Bytes to keep in reserve, of a file system of `total` bytes.
    pub(super) fn reserve_of(&self, total: u64) -> u64 {
        let usual = || RESERVE.min(total / RESERVE_PART);
        let reserve = self.reserve.map_or_else(usual, |r| r.of(total));
        reserve.min(total)
    }

    /// The soft and the hard mark in bytes.
    pub(super) fn marks_of(&self, total: u64) -> (u64, u64) {
        let hard = self.space_hard.unwrap_or(Amount::Bytes(0)).of(total);
        let soft = self.space_soft.unwrap_or(SOFT).of(total);
        // Said at the latest when writes are refused.
        (soft.max(hard), hard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_parts_are_read_and_nothing_else_is() {
        for (text, amount) in [
            ("0", Amount::Bytes(0)),
            ("none", Amount::Bytes(0)),
            ("64M", Amount::Bytes(64 << 20)),
            ("5%", Amount::Percent(5)),
            ("100%", Amount::Percent(100)),
        ] {
            assert_eq!(text.parse(), Ok(amount));
        }
        for text in ["", "%", "101%", "-1", "5 %", "x", "1.5%"] {
            assert!(text.parse::<Amount>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_was_not_said_follows_the_size_of_the_file_system() {
        let usual = Options::default();
        assert!(usual.is_default());
        assert_eq!(usual.reserve_of(1 << 40), 64 << 20);
        assert_eq!(usual.reserve_of(100 << 20), 1 << 20);
        assert_eq!(usual.marks_of(1000), (50, 0));
        let asked = Options {
            reserve: Some(Amount::Percent(50)),
            space_hard: Some(Amount::Bytes(70)),
            ..Options::default()
        };
        assert!(!asked.is_default());
        assert_eq!((asked.reserve_of(10), asked.marks_of(1000)), (5, (70, 70)));
        assert_eq!(Amount::Percent(100).of(u64::MAX), u64::MAX);
    }
}
