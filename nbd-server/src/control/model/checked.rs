//! What a check says, and the way back to the checker's own words.

use fsck::Class;
use ploop::descriptor::Guid;
use ploop::{Error, Result};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a check found; FINDINGS.md of `fsck` has all kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Checked {
    /// The worst class of all that was found: `clean`, `leak`, `dirty`, `corrupt`.
    pub class: String,
    /// What was found, file by file.
    pub findings: Vec<Found>,
}

/// One thing that a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Found {
    /// Its kind.
    pub kind: String,
    /// How bad it is.
    pub class: String,
    /// In which file.
    pub file: String,
    /// At which byte of it; 0 where it is about the file as a whole.
    #[serde(default)]
    pub offset: u64,
    /// The cluster of that file concerned, counted from its first byte.
    #[serde(default)]
    pub cluster: Option<u64>,
    /// The guest bytes concerned: from, to.
    #[serde(default)]
    pub guest: Option<[u64; 2]>,
    /// GUIDs of the snapshots that read the file.
    #[serde(default)]
    pub snapshots: Vec<String>,
    /// How many more there are.
    #[serde(default)]
    pub snapshots_more: u64,
    /// One sentence with all operands.
    pub what: String,
    /// What it means.
    #[serde(default)]
    pub means: Option<String>,
    /// What a repair does about it.
    #[serde(default)]
    pub repair: Option<String>,
}

impl From<fsck::Finding> for Found {
    fn from(f: fsck::Finding) -> Found {
        let about = f.about();
        Found {
            kind: f.kind.to_owned(),
            class: f.class.name().to_owned(),
            file: f.file.to_string_lossy().into_owned(),
            offset: f.offset,
            cluster: f.cluster,
            guest: f.guest.map(|g| [g.start, g.end]),
            snapshots: f.snapshots.first.iter().map(ToString::to_string).collect(),
            snapshots_more: f.snapshots.more,
            what: f.what,
            means: about.map(|k| k.means.to_owned()),
            repair: about.map(|k| k.repair.to_owned()),
        }
    }
}

impl From<fsck::Report> for Checked {
    fn from(report: fsck::Report) -> Checked {
        Checked {
            class: report.class.name().to_owned(),
            findings: report.findings.into_iter().map(Found::from).collect(),
        }
    }
}

impl Checked {
    /// As the checker would give it here. Error: `Unsupported` for what this version has no word for.
    pub fn into_report(self) -> Result<fsck::Report> {
        let strange = |what: &str| {
            let what = format!("the service found {what:?}, which this version does not know");
            Error::unsupported(what).fix("Run the command of the service's version")
        };
        let class = |name: &str| {
            let all = [Class::Clean, Class::Leak, Class::Dirty, Class::Corrupt];
            let found = all.into_iter().find(|c| c.name() == name);
            found.ok_or_else(|| strange(name))
        };
        let mut findings = Vec::with_capacity(self.findings.len());
        for f in self.findings {
            let guids = f.snapshots.iter().map(|g| Guid::parse(g));
            findings.push(fsck::Finding {
                kind: fsck::kinds::find(&f.kind)
                    .ok_or_else(|| strange(&f.kind))?
                    .name,
                class: class(&f.class)?,
                file: f.file.into(),
                offset: f.offset,
                cluster: f.cluster,
                guest: f.guest.map(|[start, end]| start..end),
                snapshots: fsck::Owners {
                    first: guids.collect::<Result<_>>()?,
                    more: f.snapshots_more,
                },
                what: f.what,
            });
        }
        let class = class(&self.class)?;
        Ok(fsck::Report {
            class,
            // No worse than all of it.
            omitted: (findings.len() > fsck::FINDINGS_MAX).then_some(class),
            findings,
        })
    }
}
