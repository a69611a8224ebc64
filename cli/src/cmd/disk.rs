//! `info`, `convert`: one disk or image at a time.

use std::io;
use std::path::{Path, PathBuf};

use ploop::disk::open::Opener;
use ploop::{Error, Result};
use serde_json::json;
use snapshots::convert::{self, Kind, Target};
use snapshots::moving::Unended;

use crate::args::{self, To};
use crate::output::{Bar, line, print_json, size, table};

pub(crate) fn info(root: &Path, i: &args::Info) -> Result<()> {
    let (source, options) = super::locate(root, &i.source, &i.from)?;
    let info = Opener::host().describe(&source, &options)?;
    let limits = info.top_guid.as_ref();
    let limits = limits.and_then(|_| super::set::limits_of(root, &i.source));
    let quota = info.top_guid.as_ref();
    let quota = quota.and_then(|_| super::set::quota_of(root, &i.source));
    // Of a disk that is damaged, too, and one whose record is.
    let dir = source.path.parent().filter(|_| source.descriptor);
    let moving = dir.map(|dir| Unended::of(Opener::host().store().as_ref(), dir));
    if i.json.json {
        let mut shown = serde_json::to_value(&info)
            .map_err(|e| Error::invalid("a description that JSON cannot hold").caused_by(e))?;
        if let Some(limits) = limits {
            shown["limits"] = json!(limits);
        }
        if let Some(quota) = quota {
            shown["quota"] = json!(quota);
        }
        match moving {
            Some(Ok(Some(moving))) => shown["move"] = json!(moving),
            Some(Err(e)) => shown["move"] = json!({ "error": e.to_string() }),
            _ => {}
        }
        return print_json(&shown);
    }
    if i.sizes {
        line(format!("size:\t\t{}", info.virtual_size / 512))?;
        line(format!("blocksize:\t{}", info.cluster_size / 512))?;
        let version = if info.format == "ploop" {
            info.version
        } else {
            0
        };
        return line(format!("fmt_version:\t{version}"));
    }
    line(format!("path      {}", info.path.display()))?;
    line(format!("format    {} v{}", info.format, info.version))?;
    line(format!(
        "size      {} ({} bytes)",
        size(info.virtual_size),
        info.virtual_size
    ))?;
    line(format!("cluster   {}", size(info.cluster_size)))?;
    line(format!("data      {}", size(info.data)))?;
    line(format!(
        "in use    {}",
        if info.in_use {
            "marked (open, or not closed cleanly)"
        } else {
            "no"
        }
    ))?;
    match moving {
        Some(Ok(Some(m))) => line(format!(
            "move      {} (epoch {}), to or from {}: {}",
            m.state,
            m.epoch,
            ploop::owner::shown(&m.peer),
            m.id
        ))
        .and_then(|()| match m.missing {
            0 => Ok(()),
            missing => line(format!(
                "missing   {}: it needs that service until they have come",
                size(missing)
            )),
        })?,
        Some(Err(e)) => line(format!("move      {e}"))?,
        _ => {}
    }
    if let Some(key) = &info.encryption_key {
        line(format!("encrypted with key {key}"))?;
    }
    if let Some(quota) = &quota {
        super::set::show_quota(quota)?;
    }
    if let Some(limits) = &limits {
        super::set::show(limits)?;
    }
    let Some(top) = &info.top_guid else {
        return Ok(());
    };
    let rows = info.images.iter().map(|image| {
        let guid = image.guid.clone().unwrap_or_default();
        let current = if guid == *top { "*" } else { "" };
        let file = image
            .file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let parent = image.parent.clone().unwrap_or_else(|| "-".into());
        vec![current.into(), guid, parent, size(image.data), file]
    });
    table(&["", "GUID", "PARENT", ">DATA", "FILE"], rows.collect())
}

pub(crate) fn convert(root: &Path, c: &args::Convert) -> Result<()> {
    let (source, options) = super::locate(root, &c.source, &c.from)?;
    let kind = match c.to {
        To::Raw => Kind::Raw,
        To::Ploop => Kind::Ploop,
        To::PloopV1 => Kind::PloopV1,
        To::Qcow2 => Kind::Qcow2,
    };
    let cluster_sectors = c.cluster.map(super::store::cluster_sectors).transpose()?;
    let to = convert::To {
        kind,
        cluster_sectors,
    };
    let bar = Bar::new(true);
    let progress = |done, total| bar.at("copy", done, Some(total));
    let mut out = io::stdout().lock();
    let to_stdout = c.target == "-";
    let target = match to_stdout {
        true if kind != Kind::Raw => {
            return Err(Error::invalid("only --to raw can go to standard output"));
        }
        true => Target::Writer(&mut out),
        false => Target::File(PathBuf::from(&c.target)),
    };
    let done = convert::convert(&Opener::host(), &source, &options, target, to, &progress)?;
    drop(out);
    drop(bar);
    match (to_stdout, c.json.json) {
        (true, _) => Ok(()),
        (false, true) => print_json(&json!({
            "target": c.target, "source_size": done.source_bytes,
            "virtual_size": done.virtual_bytes, "data": done.bytes_written,
        })),
        (false, false) => line(format!(
            "{}: {} of {}",
            c.target,
            size(done.bytes_written),
            size(done.virtual_bytes)
        )),
    }
}
