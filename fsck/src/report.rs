//! The answer of a check, and how it is collected.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::Error;
use ploop::descriptor::Guid;
use ploop::verify::Class;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use crate::kinds::{self, Kind};

/// Findings kept; more are counted only, and still count for the class.
pub const FINDINGS_MAX: usize = 10_000;
/// Snapshots that a finding names; more are counted only.
pub const SNAPSHOTS_MAX: usize = 64;

/// What a check found. FINDINGS.md has its JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst class of all that was found.
    #[serde(serialize_with = "name")]
    pub class: Class,
    /// What was found, file by file; [`FINDINGS_MAX`] at most, and a last one that counts the rest.
    pub findings: Vec<Finding>,
    /// The worst class of those that are only counted.
    #[serde(skip)]
    pub omitted: Option<Class>,
}

impl Report {
    /// One thing more.
    pub(crate) fn add(&mut self, finding: Finding) {
        self.class = self.class.max(finding.class);
        self.findings.push(finding);
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The name of its [`Kind`].
    pub kind: &'static str,
    /// How bad it is.
    pub class: Class,
    /// In which file.
    pub file: PathBuf,
    /// At which byte of it; 0 where it is about the file as a whole.
    pub offset: u64,
    /// The cluster of that file concerned, counted from its first byte, where there is one.
    pub cluster: Option<u64>,
    /// The guest bytes concerned, where there are any.
    pub guest: Option<Range<u64>>,
    /// The disk's snapshots that read the file.
    pub snapshots: Owners,
    /// One sentence with all operands.
    pub what: String,
}

/// Snapshots of a disk whose data is read from one file. Shared by all findings about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// The nearest ones; [`SNAPSHOTS_MAX`] at most.
    pub first: Arc<[Guid]>,
    /// How many there are beside these.
    pub more: u64,
}

impl Finding {
    /// Something about a file as a whole.
    pub(crate) fn new(kind: &'static str, class: Class, file: &Path, what: String) -> Finding {
        Finding {
            kind,
            class,
            file: file.to_path_buf(),
            offset: 0,
            cluster: None,
            guest: None,
            snapshots: Owners::default(),
            what,
        }
    }

    /// Its kind: what it means, and what a repair does.
    pub fn about(&self) -> Option<&'static Kind> {
        kinds::find(self.kind)
    }
}

impl Serialize for Finding {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let about = self.about();
        let guids: Vec<String> = self.snapshots.first.iter().map(Guid::to_string).collect();
        let mut out = s.serialize_struct("Finding", 11)?;
        out.serialize_field("kind", self.kind)?;
        out.serialize_field("class", self.class.name())?;
        // As text; what is not UTF-8 in it is replaced.
        out.serialize_field("file", &self.file.to_string_lossy())?;
        out.serialize_field("offset", &self.offset)?;
        out.serialize_field("cluster", &self.cluster)?;
        out.serialize_field("guest", &self.guest.as_ref().map(|g| [g.start, g.end]))?;
        out.serialize_field("snapshots", &guids)?;
        out.serialize_field("snapshots_more", &self.snapshots.more)?;
        out.serialize_field("what", &self.what)?;
        out.serialize_field("means", &about.map(|k| k.means))?;
        out.serialize_field("repair", &about.map(|k| k.repair))?;
        out.end()
    }
}

fn name<S: Serializer>(class: &Class, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(class.name())
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
    worst_omitted: Option<Class>,
}

impl Default for Findings {
    fn default() -> Findings {
        Findings {
            class: Class::Clean,
            list: Vec::new(),
            omitted: 0,
            worst_omitted: None,
        }
    }
}

impl Findings {
    pub(crate) fn class(&self) -> Class {
        self.class
    }

    pub(crate) fn add(&mut self, finding: Finding) {
        debug_assert!(
            finding
                .about()
                .is_some_and(|k| k.classes.contains(&finding.class)),
            "{finding} is not in the table of kinds"
        );
        self.class = self.class.max(finding.class);
        match self.list.len() < FINDINGS_MAX {
            true => self.list.push(finding),
            false => {
                self.omitted += 1;
                self.worst_omitted = self.worst_omitted.max(Some(finding.class));
            }
        }
    }

    /// Something about a file as a whole.
    pub(crate) fn file(&mut self, kind: &'static str, class: Class, file: &Path, what: String) {
        self.add(Finding::new(kind, class, file, what));
    }

    /// An error that says that `file` contradicts its format.
    pub(crate) fn corrupt(&mut self, kind: &'static str, file: &Path, e: &Error) {
        let what = match e.fix_text() {
            Some(fix) => format!("{}. {fix}", e.what()),
            None => e.what().to_owned(),
        };
        let file = e.path().unwrap_or(file);
        self.add(Finding {
            offset: e.offset().unwrap_or(0),
            ..Finding::new(kind, Class::Corrupt, file, what)
        });
    }

    /// How many findings there are; for [`Findings::since`].
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// The findings from number `first` on.
    pub(crate) fn since(&mut self, first: usize) -> &mut [Finding] {
        self.list.get_mut(first..).unwrap_or_default()
    }

    pub(crate) fn into_report(mut self) -> Report {
        if let (Some(last), 1..) = (self.list.last(), self.omitted) {
            let what = format!("… and {} more findings", self.omitted);
            let last = Finding::new(last.kind, last.class, &last.file, what);
            self.list.push(last);
        }
        Report {
            class: self.class,
            findings: self.list,
            omitted: self.worst_omitted,
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
            offset: 68,
            cluster: Some(1),
            guest: Some(32_768..65_536),
            snapshots: Owners {
                first: [Guid::TOP].into(),
                more: 2,
            },
            ..Finding::new(
                "duplicate-entry",
                Class::Corrupt,
                Path::new("/d/root.hds"),
                "w".into(),
            )
        });
        found.file("orphan-file", Class::Leak, Path::new("/d/x"), "v".into());
        let mut json = serde_json::to_value(found.into_report()).unwrap();
        for f in json["findings"].as_array_mut().unwrap() {
            for sentence in ["means", "repair"] {
                let said = f.as_object_mut().unwrap().remove(sentence).unwrap();
                assert!(said.as_str().unwrap().ends_with('.'));
            }
        }
        let expected = serde_json::json!({
            "class": "corrupt",
            "findings": [
                { "kind": "duplicate-entry", "class": "corrupt", "file": "/d/root.hds",
                  "offset": 68, "cluster": 1, "guest": [32_768, 65_536],
                  "snapshots": ["{5fbaabe3-6958-40ff-92a7-860e329aab41}"], "snapshots_more": 2,
                  "what": "w" },
                { "kind": "orphan-file", "class": "leak", "file": "/d/x",
                  "offset": 0, "cluster": null, "guest": null,
                  "snapshots": [], "snapshots_more": 0, "what": "v" },
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
            let (kind, class) = match i == FINDINGS_MAX + 2 {
                true => ("bad-type", Class::Corrupt),
                false => ("leaked-tail", Class::Leak),
            };
            found.file(kind, class, Path::new("/f"), String::new());
        }
        let report = found.into_report();
        assert_eq!(report.class, Class::Corrupt);
        assert_eq!(report.omitted, Some(Class::Corrupt));
        assert_eq!(report.findings.len(), FINDINGS_MAX + 1);
        assert_eq!(report.findings[FINDINGS_MAX].what, "… and 5 more findings");
    }
}
