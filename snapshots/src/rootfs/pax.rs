//! PAX records: `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record, so that a value may
//! hold any byte.

use ploop::error::{Error, Result};

use super::rules::show;
use super::tree::Time;

/// The records in force for a member; a later one of the same key wins, an empty value unsets.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    list: Vec<(Vec<u8>, Vec<u8>)>,
    bytes: usize,
}

/// Most bytes of records in force: 64 KiB for each of many attributes.
pub(super) const PAX_MAX: usize = 4 << 20;

impl Records {
    /// Adds the records of one extended header, which stands at `at` in the stream.
    pub(super) fn extend(&mut self, mut block: &[u8], at: u64) -> Result<()> {
        while block.iter().any(|&b| b != 0) {
            let bad = || Error::corrupt("an extended header that is no PAX record").at(at);
            let space = block
                .iter()
                .take(20)
                .position(|&b| b == b' ')
                .ok_or_else(bad)?;
            let len = usize::try_from(decimal(&block[..space]).ok_or_else(bad)?).ok();
            let len = len
                .filter(|&l| l > space + 1 && l <= block.len())
                .ok_or_else(bad)?;
            let (record, rest) = block.split_at(len);
            let text = record[space + 1..].strip_suffix(b"\n").ok_or_else(bad)?;
            let equal = text.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            self.bytes += len;
            if self.bytes > PAX_MAX {
                let what = format!("more than {PAX_MAX} bytes of extended headers for a member");
                return Err(Error::unsupported(what).at(at));
            }
            self.list
                .push((text[..equal].to_vec(), text[equal + 1..].to_vec()));
            block = rest;
        }
        Ok(())
    }

    /// These records with `own` on top.
    pub(super) fn overlaid(&self, own: Records) -> Records {
        let mut out = self.clone();
        out.list.extend(own.list);
        out
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&[u8]> {
        let last = self.list.iter().rev().find(|(k, _)| k == key);
        last.map(|(_, v)| v.as_slice()).filter(|v| !v.is_empty())
    }

    /// All records in order, also those of one key.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.list.iter().map(|(k, v)| (k.as_slice(), v.as_slice()))
    }

    pub(super) fn number(&self, key: &[u8]) -> Result<Option<u64>> {
        let Some(text) = self.get(key) else {
            return Ok(None);
        };
        decimal(text).map(Some).ok_or_else(|| {
            Error::corrupt(format!(
                "the record {} is no number: {}",
                show(key),
                show(text)
            ))
        })
    }

    /// The member's name: a sparse file's real one, the record's, GNU's long one, the header's.
    pub(super) fn take_name(
        &self,
        long: Option<Vec<u8>>,
        in_header: impl FnOnce() -> Vec<u8>,
    ) -> Vec<u8> {
        match self.get(b"GNU.sparse.name").or_else(|| self.get(b"path")) {
            Some(name) => name.to_vec(),
            None => long.unwrap_or_else(in_header),
        }
    }
}

/// A decimal number without sign.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with sign and fraction; what lies below a nanosecond is cut toward the past.
pub(super) fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = text.iter().position(|&b| b == b'.').unwrap_or(text.len());
    let sec = i64::try_from(decimal(&text[..dot])?).ok()?;
    let fraction = text.get(dot + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let (digits, below) = fraction.split_at(fraction.len().min(9));
    let mut nsec = 0;
    for i in 0..9 {
        nsec = nsec * 10 + u32::from(digits.get(i).map_or(0, |d| d - b'0'));
    }
    if !negative {
        return Some(Time { sec, nsec });
    }
    // −1.25 is 0.75 after −2.
    nsec += u32::from(below.iter().any(|&d| d != b'0'));
    match nsec {
        0 => Some(Time { sec: -sec, nsec: 0 }),
        n => Some(Time {
            sec: -sec - 1,
            nsec: 1_000_000_000 - n,
        }),
    }
}

/// Undoes what GNU tar does to `=` and `%` in the name of an attribute.
pub(super) fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, next) = match rest.get(..3) {
            Some(b"%3D") => (b'=', &rest[3..]),
            Some(b"%25") => (b'%', &rest[3..]),
            _ => (first, tail),
        };
        out.push(byte);
        rest = next;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_may_hold_line_ends_and_equal_signs() {
        let mut r = Records::default();
        r.extend(b"13 a=b\nc\n=d\0\n12 path=a/b\n\0\0", 0).unwrap();
        assert_eq!(r.get(b"a"), Some(&b"b\nc\n=d\0"[..]));
        assert_eq!(r.get(b"path"), Some(&b"a/b"[..]));
    }

    #[test]
    fn damaged_records_are_errors() {
        for bad in [
            "5 a=b", "99 a=b\n", "0 a=b\n", "x a=b\n", "6 a=bc\n", "6 abc\n", " 6 a=b\n",
        ] {
            let e = Records::default().extend(bad.as_bytes(), 512);
            assert!(e.is_err(), "{bad}");
        }
        let mut endless = Records::default();
        let record = format!("100007 a={}\n", "b".repeat(99_997));
        let ends = (0..1000).find(|_| endless.extend(record.as_bytes(), 0).is_err());
        assert_eq!(ends, Some(41), "records without end");
        assert!(
            Records::default()
                .extend(b"99999999999999999999 a=b\n", 0)
                .is_err()
        );
    }

    #[test]
    fn times_with_fractions_before_and_after_1970() {
        let t = |s: &str| time(s.as_bytes()).map(|t| (t.sec, t.nsec));
        assert_eq!(t("12"), Some((12, 0)));
        assert_eq!(t("12.5"), Some((12, 500_000_000)));
        assert_eq!(t("12.0000000019"), Some((12, 1)));
        assert_eq!(t("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(t("-3"), Some((-3, 0)));
        assert_eq!(t("-0.0000000001"), Some((-1, 999_999_999)));
        assert_eq!(t("1e3"), None);
        assert_eq!(t("1.x"), None);
        assert_eq!(t(""), None);
    }

    #[test]
    fn escaped_attribute_names() {
        assert_eq!(unescape(b"user.a%3Db%25%2"), b"user.a=b%%2");
    }
}
