//! The answer of a check, and how it is collected.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ploop::Error;
use ploop::verify::Class;
use serde::{Serialize, Serializer};

/// Findings kept; more are counted only, and still count for the class.
pub const FINDINGS_MAX: usize = 10_000;

/// What a check found. In JSON:
/// `{ "class": "clean|leak|dirty|corrupt", "findings": [ … ] }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst class of all that was found.
    #[serde(serialize_with = "name")]
    pub class: Class,
    /// What was found, file by file; [`FINDINGS_MAX`] at most, and a last one that counts the rest.
    pub findings: Vec<Finding>,
}

/// One thing that was found. In JSON: `{ "kind", "class", "file", "offset", "guest", "what" }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its stable name.
    pub kind: &'static str,
    /// How bad it is.
    #[serde(serialize_with = "name")]
    pub class: Class,
    /// In which file. In JSON as text; what is not UTF-8 in it is replaced.
    #[serde(serialize_with = "lossy")]
    pub file: PathBuf,
    /// At which byte of it; 0 where it is about the file as a whole.
    pub offset: u64,
    /// The guest bytes concerned, first and end, where there are any: `[start, end]` or null.
    #[serde(serialize_with = "pair")]
    pub guest: Option<Range<u64>>,
    /// One sentence with all operands.
    pub what: String,
}

fn name<S: Serializer>(class: &Class, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(class.name())
}

fn lossy<S: Serializer>(path: &Path, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&path.to_string_lossy())
}

fn pair<S: Serializer>(guest: &Option<Range<u64>>, s: S) -> Result<S::Ok, S::Error> {
    guest.as_ref().map(|g| [g.start, g.end]).serialize(s)
}

impl fmt::Display for Finding {
    /// One line: `corrupt duplicate-entry: FILE: offset 0x44 (68): …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (class, kind) = (self.class.name(), self.kind);
        write!(f, "{class} {kind}: {}: ", self.file.display())?;
        if self.offset != 0 {
            write!(f, "offset {0:#x} ({0}): ", self.offset)?;
        }
        f.write_str(&self.what)?;
        match &self.guest {
            Some(g) => write!(f, " (guest bytes {}..{})", g.start, g.end),
            None => Ok(()),
        }
    }
}

/// Findings under way.
#[derive(Debug)]
pub(crate) struct Findings {
    class: Class,
    list: Vec<Finding>,
    omitted: u64,
}

impl Default for Findings {
    fn default() -> Findings {
        Findings {
            class: Class::Clean,
            list: Vec::new(),
            omitted: 0,
        }
    }
}

impl Findings {
    pub(crate) fn class(&self) -> Class {
        self.class
    }

    pub(crate) fn add(&mut self, finding: Finding) {
        self.class = self.class.max(finding.class);
        match self.list.len() < FINDINGS_MAX {
            true => self.list.push(finding),
            false => self.omitted += 1,
        }
    }

    /// Something about a file as a whole.
    pub(crate) fn file(&mut self, kind: &'static str, class: Class, file: &Path, what: String) {
        self.add(Finding {
            kind,
            class,
            file: file.to_path_buf(),
            offset: 0,
            guest: None,
            what,
        });
    }

    /// An error that says that `file` contradicts its format.
    pub(crate) fn corrupt(&mut self, kind: &'static str, file: &Path, e: &Error) {
        let what = match e.fix_text() {
            Some(fix) => format!("{}. {fix}", e.what()),
            None => e.what().to_owned(),
        };
        self.add(Finding {
            kind,
            class: Class::Corrupt,
            file: e.path().unwrap_or(file).to_path_buf(),
            offset: e.offset().unwrap_or(0),
            guest: None,
            what,
        });
    }

    pub(crate) fn into_report(mut self) -> Report {
        if let (Some(last), 1..) = (self.list.last(), self.omitted) {
            let what = format!("… and {} more findings", self.omitted);
            let (kind, class, file) = (last.kind, last.class, last.file.clone());
            self.list.push(Finding {
                kind,
                class,
                file,
                offset: 0,
                guest: None,
                what,
            });
        }
        Report {
            class: self.class,
            findings: self.list,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_is_the_documented_one() {
        let mut found = Findings::default();
        found.add(Finding {
            kind: "duplicate-entry",
            class: Class::Corrupt,
            file: "/d/root.hds".into(),
            offset: 68,
            guest: Some(32_768..65_536),
            what: "w".into(),
        });
        found.file("orphan-file", Class::Leak, Path::new("/d/x"), "v".into());
        let json = serde_json::to_value(found.into_report()).unwrap();
        let expected = serde_json::json!({
            "class": "corrupt",
            "findings": [
                { "kind": "duplicate-entry", "class": "corrupt", "file": "/d/root.hds",
                  "offset": 68, "guest": [32_768, 65_536], "what": "w" },
                { "kind": "orphan-file", "class": "leak", "file": "/d/x",
                  "offset": 0, "guest": null, "what": "v" },
            ],
        });
        assert_eq!(json, expected);
        assert_eq!(
            serde_json::to_string(&Findings::default().into_report()).unwrap(),
            r#"{"class":"clean","findings":[]}"#
        );
    }

    #[test]
    fn a_flood_is_counted_and_keeps_its_worst_class() {
        let mut found = Findings::default();
        for i in 0..FINDINGS_MAX + 5 {
            let class = if i == FINDINGS_MAX + 2 {
                Class::Corrupt
            } else {
                Class::Leak
            };
            found.file("leaked-tail", class, Path::new("/f"), String::new());
        }
        let report = found.into_report();
        assert_eq!(report.class, Class::Corrupt);
        assert_eq!(report.findings.len(), FINDINGS_MAX + 1);
        assert_eq!(report.findings[FINDINGS_MAX].what, "… and 5 more findings");
    }
}
