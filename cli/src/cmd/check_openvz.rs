//! `ploop check` as OpenVZ's tool has it: its options in our words, and its exit codes.

use std::path::Path;

use fsck::{Class, Report};
use ploop::descriptor::Guid;
use ploop::disk::open::{Format, OpenOptions, Opener, Source};
use ploop::{Error, Kind, Result};

use crate::args::OpenvzCheck;

const OPEN: u8 = 4;
const READ: u8 = 6;
const WRITE: u8 = 7;
const DAMAGED: u8 = 11;
const CONVERTING: u8 = 17;
const LOCK: u8 = 23;
const IN_USE: u8 = 37;
const FSCK: u8 = 41;
/// Usage, and parameters that do not go together.
pub(crate) const USAGE: u8 = 38;
const CLUSTER_SECTORS: std::ops::RangeInclusive<u32> = 64..=131_072;

/// True when the command line asks for OpenVZ's exit codes, be it understood or not.
pub(crate) fn asked_for() -> bool {
    std::env::args_os().any(|word| word == "--openvz-exit-codes")
}

/// What is to be checked: the source, as a raw image, or one delta of it.
pub(super) fn narrowed(
    opener: &Opener,
    o: &OpenvzCheck,
    mut source: Source,
    mut options: OpenOptions,
) -> Result<(Source, OpenOptions)> {
    let fits = |b: u32| b.is_power_of_two() && CLUSTER_SECTORS.contains(&b);
    if let Some(b) = o.blocksize.filter(|b| !fits(*b)) {
        return Err(Error::invalid(format!("-b {b}: no cluster size"))
            .fix("A power of two from 64 to 131072, in sectors"));
    }
    if o.raw {
        if o.blocksize.is_none() {
            return Err(Error::invalid("-R needs the cluster of the image").fix("Add -b SECTORS"));
        }
        options.format = Some(Format::Raw);
    }
    let Some(guid) = &o.guid else {
        return Ok((source, options));
    };
    if !o.read_only && (o.drop_in_use || o.hard_force) {
        return Err(Error::invalid("a repair is one of the whole disk").fix("Leave out -u"));
    }
    if !source.descriptor {
        return Err(Error::invalid("-u names a delta of a DiskDescriptor.xml").on(&source.path));
    }
    let guid = Guid::parse(guid)?;
    let xml = opener.store().resolve(&source.path)?;
    let d = opener.read_descriptor(&xml)?;
    let image = d.image(guid).ok_or_else(|| {
        Error::invalid(format!("the descriptor has no delta {guid}"))
            .on(&xml)
            .fix("`ploop snapshot-list` shows them")
    })?;
    let dir = xml.parent().unwrap_or(Path::new("/"));
    source.path = opener.confine(dir, &image.file, &options)?;
    source.descriptor = false;
    let is_base = d.shot(guid).is_some_and(|s| s.parent == Guid::NONE);
    options.format = Some(match d.base_is_raw() && is_base {
        true => Format::Raw,
        false => Format::Ploop,
    });
    Ok((source, options))
}

/// OpenVZ's code for what was found: of several, the one that its tool would have come to first.
pub(super) fn code(source: &Source, report: &Report) -> u8 {
    let xml = std::fs::canonicalize(&source.path).ok();
    let about_xml = |file: &Path| source.descriptor && xml.as_deref() == Some(file);
    let rank = |code: &u8| match *code {
        LOCK => 7,
        OPEN | READ => 6,
        USAGE => 5,
        CONVERTING => 4,
        DAMAGED => 3,
        IN_USE => 2,
        _ => 1,
    };
    let codes = report.findings.iter().filter_map(|f| match f.kind {
        "missing-file" | "path-outside" | "bad-path" => Some(OPEN),
        "cluster-size-mismatch" => Some(USAGE),
        "header-truncated" => Some(READ),
        "conversion-interrupted" => Some(CONVERTING),
        "fs-errors" => Some(FSCK),
        "fs-unclean" => None,
        _ => match f.class {
            Class::Corrupt if about_xml(&f.file) => Some(LOCK),
            Class::Corrupt => Some(DAMAGED),
            Class::Dirty => Some(IN_USE),
            Class::Leak | Class::Clean => None,
        },
    });
    // Of what is only counted the class alone is known.
    let counted = match report.omitted {
        Some(Class::Corrupt) => Some(DAMAGED),
        Some(Class::Dirty) => Some(IN_USE),
        Some(Class::Leak | Class::Clean) | None => None,
    };
    codes.chain(counted).max_by_key(rank).unwrap_or(0)
}

/// OpenVZ's code for a check that came to no result.
pub(super) fn code_of(e: &Error) -> u8 {
    match e.kind() {
        Kind::NotFound | Kind::Permission => OPEN,
        Kind::Invalid | Kind::Exists => USAGE,
        Kind::InUse => LOCK,
        Kind::Corrupt => LOCK,
        Kind::Unsupported => DAMAGED,
        Kind::NoSpace | Kind::ReadOnly | Kind::Latched => WRITE,
        _ => READ,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsck::{FINDINGS_MAX, Finding, Owners};

    fn finding(kind: &'static str, class: Class) -> Finding {
        Finding {
            kind,
            class,
            file: "/d/root.hds".into(),
            offset: 0,
            cluster: None,
            guest: None,
            snapshots: Owners::default(),
            what: String::new(),
        }
    }

    /// Goal: the code is that of what was found, however much there is of it. Method: leaks up to and
    /// beyond what is kept, then a file system with errors, as `--fs` adds it.
    #[test]
    fn a_flood_of_leaks_is_no_damage_to_the_image() {
        let source = Source {
            path: "/d/root.hds".into(),
            descriptor: false,
            snapshot: None,
        };
        for (leaks, omitted) in [(1, None), (0, None), (1, Some(Class::Leak))] {
            let mut report = Report {
                class: Class::Leak,
                findings: vec![finding("leaked-tail", Class::Leak); FINDINGS_MAX + leaks],
                omitted,
            };
            assert_eq!(code(&source, &report), 0);
            report.class = Class::Corrupt;
            report.findings.push(finding("fs-errors", Class::Corrupt));
            assert_eq!(code(&source, &report), FSCK);
            report.omitted = Some(Class::Dirty);
            assert_eq!(code(&source, &report), IN_USE);
            report.omitted = Some(Class::Corrupt);
            assert_eq!(code(&source, &report), DAMAGED);
        }
    }
}
