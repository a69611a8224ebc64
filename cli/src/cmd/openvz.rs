//! OpenVZ's own verbs, as far as they make sense without its kernel.

use std::path::Path;

use ploop::descriptor::{Descriptor, Guid};
use ploop::disk::open::{DESCRIPTOR, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::Store;
use ploop::{Error, Kind, Result};
use serde_json::json;

use crate::args::{Init, SnapshotList};
use crate::output::{line, print_json};

/// `ploop init`: the image, then its descriptor; on error neither stays.
pub(crate) fn init(i: &Init) -> Result<()> {
    if i.fstype != "none" {
        return Err(
            Error::unsupported(format!("-t {}: no filesystem is made here", i.fstype))
                .fix("Use -t none, or `ploop template import` and `ploop create`"),
        );
    }
    let version = match (i.format.as_str(), i.version) {
        ("expanded", 2) => Version::V2,
        ("expanded", _) | ("ploop1", _) => Version::V1,
        (other, _) => {
            return Err(Error::unsupported(format!(
                "-f {other}: expanded and ploop1 are made here"
            )));
        }
    };
    let opener = Opener::host();
    let store = opener.store().as_ref();
    let name = i.delta.file_name().and_then(|n| n.to_str());
    let name = name.ok_or_else(|| Error::invalid("no file name").on(&i.delta))?;
    let dir = match i.delta.parent() {
        Some(d) if d != Path::new("") => d,
        _ => Path::new("."),
    };
    let xml = dir.join(DESCRIPTOR);
    if store.kind(&xml)?.is_some() {
        return Err(Error::new(Kind::Exists, "there is a disk here already").on(xml));
    }
    let cluster = u64::from(i.blocksize.max(1));
    let sectors = i.size.checked_next_multiple_of(cluster);
    let sectors = sectors.ok_or_else(|| Error::invalid("the size is too large"))?;
    let header = Header::new(version, i.blocksize, sectors)?;
    let d = Descriptor::new_single(sectors, i.blocksize, false, Guid::TOP, name)?;
    drop(create(store, &i.delta, &header, 0o600)?);
    let written = write_descriptor(store, dir, &d);
    if written.is_err() {
        store.remove_file(&i.delta)?;
    }
    written
}

fn write_descriptor(store: &dyn Store, dir: &Path, d: &Descriptor) -> Result<()> {
    let tmp = dir.join(format!("{DESCRIPTOR}.{}", Guid::new_v4()));
    let file = store.create(&tmp, 0o600)?;
    let write = || {
        file.write_at(&d.to_xml(), 0)?;
        file.sync()?;
        store.rename_new(&tmp, &dir.join(DESCRIPTOR))?;
        store.sync_dir(dir)
    };
    write().inspect_err(|_| drop(store.remove_file(&tmp)))
}

/// `ploop snapshot-list`.
pub(crate) fn snapshot_list(s: &SnapshotList) -> Result<()> {
    let opener = Opener::host();
    let source = Source::parse(opener.store().as_ref(), &s.descriptor)?;
    if !source.descriptor {
        return Err(
            Error::invalid("snapshots are listed of a DiskDescriptor.xml").on(&source.path),
        );
    }
    let d = opener.read_descriptor(&source.path)?;
    let xml = opener.store().resolve(&source.path)?;
    let dir = xml.parent().unwrap_or(Path::new("/"));
    let only = s.id.as_deref().map(Guid::parse).transpose()?;
    let columns: Vec<&str> = s.columns.split(',').collect();
    let mut rows = Vec::new();
    for shot in &d.shots {
        let current = shot.guid == d.top;
        if only.is_some_and(|g| g != shot.guid) || (s.snapshots_only && current) {
            continue;
        }
        let file = d.image(shot.guid).map(|i| dir.join(&i.file));
        let file = file.unwrap_or_default().display().to_string();
        rows.push((
            shot.parent.to_string(),
            current,
            shot.guid.to_string(),
            file,
        ));
    }
    if let Some(guid) = only
        && rows.is_empty()
    {
        let what = format!("the disk has no snapshot {guid}");
        return Err(Error::new(Kind::NotFound, what).on(&source.path));
    }
    if s.json.json {
        let v: Vec<_> = rows
            .iter()
            .map(|r| json!({ "parent_uuid": r.0, "current": r.1, "uuid": r.2, "fname": r.3 }))
            .collect();
        return print_json(&v);
    }
    let width = |c: &str| if c == "current" { 1 } else { 38 };
    let format = |cells: Vec<String>| {
        let padded = cells
            .iter()
            .zip(&columns)
            .map(|(v, c)| format!("{v:<w$}", w = width(c)));
        padded.collect::<Vec<_>>().join(" ").trim_end().to_owned()
    };
    if !s.no_header {
        let title = |c: &&str| {
            if *c == "current" {
                "C".to_owned()
            } else {
                c.to_uppercase()
            }
        };
        line(format(columns.iter().map(title).collect()))?;
    }
    for (parent, current, uuid, fname) in rows {
        let mut cells = Vec::new();
        for c in &columns {
            cells.push(match *c {
                "parent_uuid" => parent.clone(),
                "current" => if current { "*" } else { " " }.to_owned(),
                "uuid" => uuid.clone(),
                "fname" => fname.clone(),
                other => {
                    let what = format!("no column {other:?}: uuid, parent_uuid, current, fname");
                    return Err(Error::invalid(what));
                }
            });
        }
        line(format(cells))?;
    }
    Ok(())
}

/// What to do instead of a verb of OpenVZ's that is not here.
pub(crate) fn refuse(words: &[String]) -> Error {
    let verb = words.first().map_or("", String::as_str);
    let instead = match verb {
        "mount" | "umount" | "start" | "stop" => {
            "needs OpenVZ's kernel; serve the disk instead: ploop serve SOURCE --socket PATH"
        }
        "tsnapshot" => {
            "mounts a snapshot; serve it instead: ploop serve DISK@SNAPSHOT --socket PATH"
        }
        "merge" => "merges bare images; a disk's are merged by `ploop snapshot merge`",
        "grow" | "balloon" => "a disk is resized by `ploop resize`",
        "copy" | "replace" | "encrypt" | "cbt" | "stat" | "restore-descriptor" | "degrade"
        | "fscheck" | "clear" | "delete" => "this verb of OpenVZ's is not here",
        _ if verb.starts_with("tg-") => "this verb of OpenVZ's is not here",
        _ => {
            return Error::invalid(format!("there is no command {verb:?}"))
                .fix("`ploop help` lists them");
        }
    };
    Error::unsupported(format!("`ploop {verb}`: {instead}"))
}
