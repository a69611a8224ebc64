//! `template …`, `create`, `list`, `rm`.

use std::path::Path;
use std::time::Instant;

use nbd_server::control::Agent;
use nbd_server::control::model::{CreateContainers, CreatedContainer};
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::store::{EntryKind, Store};
use ploop::{Error, Kind, Result};
use serde::Serialize;
use serde_json::json;
use snapshots::rootfs::{BuildOptions, RootSource, Step};
use snapshots::{ImportOptions, ImportSource, ImportStep, Root, list as listing};

use crate::args::{self, Json, Template};
use crate::output::{Bar, duration, line, print_json, size, table};

pub(crate) fn template(root: &Path, command: &Template) -> Result<()> {
    match command {
        Template::Import(i) => import(root, i),
        Template::List(j) => template_list(root, *j),
        Template::Info { name, json } => template_info(root, name, *json),
        Template::Rm { name } => snapshots::remove_template(&Root::open(root, false)?, name),
        Template::Create { name, from } => template_create(root, name, from),
        Template::Verify { name } => {
            let bar = Bar::new(true);
            let agent = Agent::of_store(root, &[])?;
            let job = agent.template_verify(name, &mut |done, total| {
                bar.at("read", done, Some(total));
            })?;
            drop(bar);
            line(job.message.unwrap_or_default())
        }
        Template::Flatten { name } => {
            let bar = Bar::new(true);
            let agent = Agent::of_store(root, &[])?;
            let job = agent.template_flatten(name, &mut |done, total| {
                bar.at("copy", done, Some(total));
            })?;
            drop(bar);
            line(format!(
                "template {name}: {}",
                job.message.unwrap_or_default()
            ))
        }
    }
}

fn template_create(root: &Path, name: &str, from: &str) -> Result<()> {
    let (container, snapshot) = from.split_once('@').ok_or_else(|| {
        Error::invalid(format!("{from:?} is no CONTAINER@SNAPSHOT"))
            .fix("A template of a live disk would change under its clones: make a snapshot first")
    })?;
    let root = Root::open(root, false)?;
    let made = snapshots::template::from_snapshot(&root, name, container, snapshot)?;
    line(format!("template {name}: {}", size(made.size)))
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
            user_quota: i.user_quota,
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
        let fs = match t.filesystem {
            Some(fs) if t.user_quota => format!("{fs}, quota"),
            other => other.unwrap_or_else(|| "-".into()),
        };
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
    if t.user_quota {
        line("quota       of users and groups")?;
    }
    line(format!("source      {}", t.source))
}

pub(crate) fn create(root: &Path, c: &args::Create) -> Result<()> {
    let began = Instant::now();
    let source = c.from.as_deref();
    let source = source.map(|f| f.split_once('@').map_or(f, |(container, _)| container));
    // A clone of a container is made by whoever has that open.
    let held: Vec<&str> = source.into_iter().collect();
    let agent = Agent::of_store(root, &held)?;
    let made = agent.create(&CreateContainers {
        names: c.names.clone(),
        count: c.count,
        template: c.template.clone(),
        from: c.from.clone(),
        size: c.size,
    })?;
    let took = began.elapsed();
    if c.json.json {
        let each = took.as_secs_f64() / made.len().max(1) as f64;
        let entry = |m: &CreatedContainer| {
            json!({
                "name": m.name, "dir": m.dir, "size": m.size, "grown": m.grown, "seconds": each,
            })
        };
        return print_json(&made.iter().map(entry).collect::<Vec<_>>());
    }
    if let [one] = &made[..] {
        let grown = match &one.grown {
            Some(g) if !g.cached => format!(", {} to grow the filesystem", size(g.data)),
            _ => String::new(),
        };
        return line(format!(
            "container {}: {} in {}{grown}",
            one.name,
            size(one.size),
            duration(took)
        ));
    }
    for m in &made {
        line(format!("container {}: {}", m.name, size(m.size)))?;
    }
    line(format!("{} containers in {}", made.len(), duration(took)))
}

/// A container, and what it is charged for where that is known.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    entry: listing::ContainerEntry,
    charged: Option<u64>,
}

pub(crate) fn list(root: &Path, l: &args::List) -> Result<()> {
    let root = Root::open(root, false)?;
    let entries = listing::containers(&root)?;
    // What the store's service has in memory; anything else has to be counted.
    let mut known = Agent::quotas_in_force(&root);
    let charged = |mut entry: listing::ContainerEntry| {
        let name = &entry.name;
        let mut charged = known.remove(name);
        if l.charge && charged.is_none() && entry.error.is_none() {
            let agent = Agent::of_store(root.dir(), &[name]);
            match agent.and_then(|agent| agent.quota(agent.name())) {
                Ok(quota) => charged = Some(quota.charged),
                Err(e) => entry.error = Some(e.to_string()),
            }
        }
        Listed { entry, charged }
    };
    let entries: Vec<Listed> = entries.into_iter().map(charged).collect();
    if l.json.json {
        return print_json(&entries);
    }
    let row = |Listed { entry: c, charged }| {
        let mut template = c.error.or(c.template).unwrap_or_else(|| "-".into());
        if let Some(moving) = &c.moving {
            template = format!("{template}, {}", moving.state);
        }
        vec![
            c.name,
            size(c.size),
            size(c.data),
            charged.map_or("-".into(), size),
            Some(c.quota).filter(|&q| q > 0).map_or("-".into(), size),
            c.depth.to_string(),
            template,
        ]
    };
    let header = [
        "CONTAINER",
        ">SIZE",
        ">DATA",
        ">CHARGED",
        ">QUOTA",
        ">DEPTH",
        "TEMPLATE",
    ];
    table(&header, entries.into_iter().map(row).collect())
}

pub(crate) fn remove(root: &Path, r: &args::Rm) -> Result<()> {
    let root = Root::open(root, false)?;
    let (there, missing): (Vec<String>, Vec<String>) = r
        .names
        .iter()
        .cloned()
        .partition(|n| root.container(n).exists());
    let mut held = None;
    if !r.force {
        match snapshots::remove::remove_containers(&root, &r.names) {
            // The store's service knows the clients of those it holds.
            Err(e) if e.kind() == Kind::InUse => held = Some(e),
            done => return done,
        }
    }
    let mut failed = Ok(());
    for name in there.iter().filter(|n| root.container(n).exists()) {
        let removed = Agent::of_store(root.dir(), &[name]).and_then(|agent| {
            match held.take_if(|_| !agent.is_of_store()) {
                Some(e) => Err(e),
                None => agent.remove(name, r.force).map(drop),
            }
        });
        failed = failed.and(removed);
    }
    failed.and(snapshots::remove::remove_containers(&root, &missing))
}
