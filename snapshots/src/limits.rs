//! I/O limits of a container, as they are stored with it and changed.
//!
//! A rate of 0 is no limit: one that lets nothing pass would be of no use. What is missing in the
//! file is not limited, and of the default burst and priority.

use std::collections::BTreeMap;

use ploop::error::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::place::Place;

/// The priority of who has none set; OpenVZ's default, too.
pub const PRIORITY: u8 = 4;
/// The highest priority.
pub const PRIORITY_MAX: u8 = 7;
/// How much of a rate may be saved up, in milliseconds of it, where nothing else is set.
pub const BURST_MS: u64 = 100;
/// The least and the most that may be set. Below, the operating system's own delays would cost
/// part of the rate.
pub const BURST_MS_RANGE: std::ops::RangeInclusive<u64> = 10..=3_600_000;
/// The highest rate; far beyond any device, and small enough for every calculation.
pub const RATE_MAX: u64 = 1 << 50;

/// Limits of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Requests per second.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub iops: u64,
    /// Of these, reads.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub read_iops: u64,
    /// Of these, changes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub write_iops: u64,
    /// Bytes per second.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bps: u64,
    /// Of these, read.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub read_bps: u64,
    /// Of these, written.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub write_bps: u64,
    /// How much of each rate may be saved up, in milliseconds of it; 0 is [`BURST_MS`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub burst_ms: u64,
    /// Its priority, where one was set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// What another version wrote.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// A change of limits: what is missing stays, 0 takes a limit away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// [`Limits::iops`], reads, writes.
    pub iops: [Option<u64>; 3],
    /// [`Limits::bps`], read, written.
    pub bps: [Option<u64>; 3],
    /// [`Limits::burst_ms`].
    pub burst_ms: Option<u64>,
    /// [`Limits::priority`].
    pub priority: Option<u8>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(rate: &u64) -> bool {
    *rate == 0
}

impl Limits {
    /// True when nothing is set.
    pub fn is_default(&self) -> bool {
        *self == Limits::default()
    }

    /// The same, changed. Error: `Invalid`, with what may be set.
    pub fn changed(&self, change: &Change) -> Result<Limits> {
        let mut new = self.clone();
        let iops = [&mut new.iops, &mut new.read_iops, &mut new.write_iops];
        let bps = [&mut new.bps, &mut new.read_bps, &mut new.write_bps];
        let all = iops.into_iter().zip(change.iops);
        for (rate, to) in all.chain(bps.into_iter().zip(change.bps)) {
            *rate = to.unwrap_or(*rate);
        }
        new.burst_ms = change.burst_ms.unwrap_or(new.burst_ms);
        new.priority = change.priority.or(new.priority);
        new.check()?;
        Ok(new)
    }

    /// Error: `Invalid`, with what may be set.
    pub fn check(&self) -> Result<()> {
        for rate in self.iops().into_iter().chain(self.bps()) {
            if rate > RATE_MAX {
                let what = format!("a limit of {rate} per second; {RATE_MAX} is the highest");
                return Err(Error::invalid(what).fix("`none` takes a limit away"));
            }
        }
        if self.burst_ms != 0 && !BURST_MS_RANGE.contains(&self.burst_ms) {
            let (least, most) = (BURST_MS_RANGE.start(), BURST_MS_RANGE.end());
            let what = format!(
                "a burst of {} ms; it may be of {least} to {most} ms",
                self.burst_ms
            );
            return Err(Error::invalid(what));
        }
        if self.priority.is_some_and(|p| p > PRIORITY_MAX) {
            let what = format!("priority {}; they are 0 to {PRIORITY_MAX}", self.priority());
            return Err(Error::invalid(what).fix("7 is the highest; 4 is the default"));
        }
        Ok(())
    }

    /// Requests per second: in all, reads, writes.
    pub fn iops(&self) -> [u64; 3] {
        [self.iops, self.read_iops, self.write_iops]
    }

    /// Bytes per second: in all, read, written.
    pub fn bps(&self) -> [u64; 3] {
        [self.bps, self.read_bps, self.write_bps]
    }

    /// The burst that is in force, in milliseconds.
    pub fn burst_ms(&self) -> u64 {
        match self.burst_ms {
            0 => BURST_MS,
            set => set,
        }
    }

    /// The priority that is in force.
    pub fn priority(&self) -> u8 {
        self.priority.unwrap_or(PRIORITY)
    }
}

/// Reads a rate: a number, perhaps with B, K, M, G or T (powers of 1024); `none` is 0.
pub fn parse_rate(text: &str) -> std::result::Result<u64, String> {
    if text == "none" {
        return Ok(0);
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1u64 << 40,
        other => return Err(format!("'{other}' is none of B, K, M, G, T")),
    };
    let number = digits.parse::<u64>();
    let number = number.map_err(|_| format!("'{text}' is neither a number nor `none`"))?;
    match number.checked_mul(unit) {
        Some(0) => Err("0 would let nothing pass; `none` is no limit".into()),
        Some(rate) if rate <= RATE_MAX => Ok(rate),
        _ => Err(format!("{RATE_MAX} is the highest")),
    }
}

/// Reads a time in milliseconds: `500ms`, `2s`; `none` is 0.
pub fn parse_burst(text: &str) -> std::result::Result<u64, String> {
    if text == "none" {
        return Ok(0);
    }
    let (digits, unit) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1),
        (None, Some(digits)) => (digits, 1000),
        (None, None) => return Err(format!("'{text}' has neither ms nor s")),
    };
    let number = digits.parse::<u64>();
    let number = number.map_err(|_| format!("'{text}' is no time: 500ms, 2s"))?;
    let ms = number.saturating_mul(unit);
    match BURST_MS_RANGE.contains(&ms) {
        true => Ok(ms),
        false => {
            let (least, most) = (BURST_MS_RANGE.start(), BURST_MS_RANGE.end());
            Err(format!("a burst is of {least} to {most} ms"))
        }
    }
}

/// Changes the limits that are stored with a disk; durable on return. The caller holds the disk's
/// lock, or is the process that does and arranges one such change at a time.
///
/// 1. COMMIT: the new metadata in the place of the old.
pub fn change_limits(place: &Place<'_>, change: &Change) -> Result<Limits> {
    let mut meta = place.meta()?;
    let limits = meta.limits.changed(change)?;
    if meta.limits != limits {
        meta.limits = limits.clone();
        // 1. COMMIT
        place.set_meta(&meta)?;
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_touches_what_it_names_and_keeps_what_others_wrote() {
        let json = r#"{"iops":100,"write_bps":5,"x":{"y":1}}"#;
        let before: Limits = serde_json::from_str(json).unwrap();
        let change = Change {
            iops: [Some(0), None, Some(7)],
            priority: Some(0),
            ..Change::default()
        };
        let after = before.changed(&change).unwrap();
        assert_eq!(after.iops(), [0, 0, 7]);
        assert_eq!(after.bps(), [0, 0, 5]);
        assert_eq!((after.priority(), after.burst_ms()), (0, BURST_MS));
        let text = serde_json::to_string(&after).unwrap();
        assert_eq!(
            text,
            r#"{"write_iops":7,"write_bps":5,"priority":0,"x":{"y":1}}"#
        );
    }

    #[test]
    fn rates_and_times_are_read_as_people_write_them() {
        for (text, rate) in [("500", 500), ("10M", 10 << 20), ("4k", 4096), ("none", 0)] {
            assert_eq!(parse_rate(text), Ok(rate), "{text}");
        }
        for bad in ["", "0", "-1", "1.5M", "5X", "M", "99999999999T", "None"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
        for (text, ms) in [("100ms", 100), ("2s", 2000), ("none", 0)] {
            assert_eq!(parse_burst(text), Ok(ms), "{text}");
        }
        for bad in ["", "5", "5ms", "2m", "9999999999999999999s", "s"] {
            assert!(parse_burst(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_no_calculation_could_hold_is_refused() {
        let none = Limits::default();
        for change in [
            Change {
                bps: [None, Some(RATE_MAX + 1), None],
                ..Change::default()
            },
            Change {
                burst_ms: Some(9),
                ..Change::default()
            },
            Change {
                burst_ms: Some(u64::MAX),
                ..Change::default()
            },
            Change {
                priority: Some(8),
                ..Change::default()
            },
        ] {
            let refused = none.changed(&change).unwrap_err();
            assert_eq!(refused.kind(), ploop::Kind::Invalid, "{change:?}");
        }
    }
}
