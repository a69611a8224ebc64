//! `template …`, `create`, `list`, `rm`.

use std::path::Path;
use std::time::Instant;

use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::store::{EntryKind, Store};
use ploop::{Error, Kind, Result};
use serde_json::json;
use snapshots::rootfs::{BuildOptions, RootSource, Step};
use snapshots::{CreateOptions, ImportOptions, ImportSource, ImportStep, Root, list as listing};

use crate::args::{self, Json, Template};
use crate::output::{Bar, duration, line, print_json, size, table};

pub(crate) fn template(root: &Path, command: &Template) -> Result<()> {
    match command {
        Template::Import(i) => import(root, i),
        Template::List(j) => template_list(root, *j),
        Template::Info { name, json } => template_info(root, name, *json),
        Template::Rm { name } => snapshots::remove_template(&Root::open(root, false)?, name),
    }
}

/// A directory with a descriptor is a disk, any other a root filesystem; a file is an archive when
/// its name says so.
fn import_source(store: &dyn Store, i: &args::Import) -> Result<ImportSource> {
    let path = Path::new(&i.source);
    let archive = [
        ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".txz", ".tbz2",
    ];
    if store
        .resolve(path)
        .is_ok_and(|p| matches!(store.kind(&p), Ok(Some(EntryKind::Dir))))
        && !path.join(ploop::disk::open::DESCRIPTOR).exists()
    {
        return Ok(ImportSource::Root(RootSource::Dir(path.to_path_buf())));
    }
    if i.from.from.is_none() && archive.iter().any(|ending| i.source.ends_with(ending)) {
        return Ok(ImportSource::Root(RootSource::Tar(path.to_path_buf())));
    }
    Ok(ImportSource::Disk(Source::parse(store, &i.source)?))
}

fn import(root: &Path, i: &args::Import) -> Result<()> {
    let opener = Opener::host();
    let source = import_source(opener.store().as_ref(), i)?;
    let cluster_sectors = cluster_sectors(i.cluster)?;
    let open = match &source {
        ImportSource::Disk(_) => super::locate(root, &i.source, &i.from)?.1,
        ImportSource::Root(_) => OpenOptions::default(),
    };
    let options = ImportOptions {
        cluster_sectors,
        build: BuildOptions {
            size: i.size,
            partition: !i.no_partition,
            label: i.label.clone(),
            ..BuildOptions::default()
        },
        open,
        source_text: i.source.clone(),
    };
    let root = Root::open(root, true)?;
    let bar = Bar::new(true);
    let began = Instant::now();
    let done = snapshots::import(&root, &i.name, &source, &options, &|step| match step {
        ImportStep::Copy(done, total) => bar.at("copy", done, Some(total)),
        ImportStep::Build(p) => {
            let stage = match p.step {
                Step::Read => "read",
                Step::Make => "make",
                Step::Attributes => "attributes",
                Step::Check => "check",
            };
            bar.at(stage, p.done, p.total);
        }
    })?;
    drop(bar);
    if i.json.json {
        return print_json(&json!({
            "name": i.name, "dir": done.dir, "size": done.size, "data": done.data,
            "entries": done.entries, "seconds": began.elapsed().as_secs_f64(),
        }));
    }
    let took = duration(began.elapsed());
    line(format!(
        "template {}: {} of {} in {took}",
        i.name,
        size(done.data),
        size(done.size)
    ))
}

/// A cluster size from bytes, as the format wants it.
pub(super) fn cluster_sectors(bytes: u64) -> Result<u32> {
    let fits = bytes.is_power_of_two() && (32 << 10..=64 << 20).contains(&bytes);
    let sectors = u32::try_from(bytes / 512).ok().filter(|_| fits);
    sectors.ok_or_else(|| {
        Error::invalid(format!(
            "cluster size of {bytes} bytes: a power of two from 32K to 64M"
        ))
    })
}

fn template_list(root: &Path, json: Json) -> Result<()> {
    let entries = listing::templates(&Root::open(root, false)?)?;
    if json.json {
        return print_json(&entries);
    }
    let row = |t: listing::TemplateEntry| {
        let fs = t.filesystem.unwrap_or_else(|| "-".into());
        vec![
            t.name,
            size(t.size),
            size(t.data),
            t.clones.to_string(),
            fs,
            t.source,
        ]
    };
    let header = ["TEMPLATE", ">SIZE", ">DATA", ">CLONES", "FS", "SOURCE"];
    table(&header, entries.into_iter().map(row).collect())
}

fn template_info(root: &Path, name: &str, json: Json) -> Result<()> {
    let t = listing::template(&Root::open(root, false)?, name)?;
    if json.json {
        return print_json(&t);
    }
    line(format!("name        {}", t.name))?;
    line(format!("size        {} ({} bytes)", size(t.size), t.size))?;
    line(format!("data        {}", size(t.data)))?;
    line(format!("cluster     {}", size(t.cluster)))?;
    line(format!("clones      {}", t.clones))?;
    if let Some(fs) = t.filesystem {
        line(format!("filesystem  {fs} at byte {}", t.partition_offset))?;
    }
    line(format!("source      {}", t.source))
}

pub(crate) fn create(root: &Path, c: &args::Create) -> Result<()> {
    let root = Root::open(root, false)?;
    let bar = Bar::new(true);
    let options = CreateOptions { size: c.size };
    let mut made = Vec::new();
    for name in &c.names {
        let began = Instant::now();
        let done =
            snapshots::create_container(&root, name, &c.template, &options, &|done, total| {
                bar.at("grow", done, Some(total));
            })?;
        let took = began.elapsed();
        if c.json.json {
            made.push(json!({
                "name": name, "dir": done.dir, "size": done.size,
                "grown": done.grown.as_ref().map(|g| json!({ "data": g.data, "cached": g.cached })),
                "seconds": took.as_secs_f64(),
            }));
            continue;
        }
        let grown = match &done.grown {
            Some(g) if !g.cached => format!(", {} to grow the filesystem", size(g.data)),
            _ => String::new(),
        };
        line(format!(
            "container {name}: {} in {}{grown}",
            size(done.size),
            duration(took)
        ))?;
    }
    if c.json.json {
        print_json(&made)
    } else {
        Ok(())
    }
}

pub(crate) fn list(root: &Path, json: Json) -> Result<()> {
    let entries = listing::containers(&Root::open(root, false)?)?;
    if json.json {
        return print_json(&entries);
    }
    let row = |c: listing::ContainerEntry| {
        let template = c.error.or(c.template).unwrap_or_else(|| "-".into());
        vec![
            c.name,
            size(c.size),
            size(c.data),
            c.depth.to_string(),
            template,
        ]
    };
    let header = ["CONTAINER", ">SIZE", ">DATA", ">DEPTH", "TEMPLATE"];
    table(&header, entries.into_iter().map(row).collect())
}

pub(crate) fn remove(root: &Path, r: &args::Rm) -> Result<()> {
    let root = Root::open(root, false)?;
    let mut missing = None;
    for name in &r.names {
        match snapshots::remove_container(&root, name) {
            // One that is gone does not keep the others.
            Err(e) if e.kind() == Kind::NotFound => missing = Some(e),
            other => other?,
        }
    }
    missing.map_or(Ok(()), Err)
}
