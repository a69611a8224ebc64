//! What is in a store.

use std::collections::HashMap;
use std::path::Path;

use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::delta::read_header;
use ploop::store::{Access, SECTOR};
use serde::Serialize;

use crate::meta::Meta;
use crate::moving::Unended;
use crate::store::Root;
use crate::template::{self, data_of};
use crate::uses::{self, Found, Uses};

/// A container, as `ploop list` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct ContainerEntry {
    /// Its name, which is also its export's.
    pub name: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of data in its own files.
    pub data: u64,
    /// The template that it stands on, while that exists.
    pub template: Option<String>,
    /// Images from base to top.
    pub depth: usize,
    /// What its files may take of the host, in bytes; 0 without a quota.
    pub quota: u64,
    /// A move of it that has not ended.
    #[serde(rename = "move", skip_serializing_if = "Option::is_none")]
    pub moving: Option<Unended>,
    /// Why the rest is not known: the container is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A template, as `ploop template list` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct TemplateEntry {
    /// Its name.
    pub name: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of data in its layer.
    pub data: u64,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Containers that are cloned from it.
    pub clones: usize,
    /// Its layers, base first.
    pub layers: Vec<LayerEntry>,
    /// The hash of its content, where it was recorded.
    pub content: Option<String>,
    /// `ext4`, when it was built from a root filesystem.
    pub filesystem: Option<String>,
    /// First byte of the filesystem.
    pub partition_offset: u64,
    /// The filesystem was given user and group quota.
    pub user_quota: bool,
    /// When it was imported, in seconds since 1970.
    pub created: u64,
    /// What it was imported from.
    pub source: String,
}

/// One layer of a template.
#[derive(Clone, Debug, Serialize)]
pub struct LayerEntry {
    /// Its id, and its directory in `layers`.
    pub id: String,
    /// Bytes of data in it.
    pub data: u64,
    /// Disks that stand on it: containers and templates.
    pub disks: usize,
}

/// The containers of a store, by name. A damaged one is listed with its error. Takes no lock.
pub fn containers(root: &Root) -> Result<Vec<ContainerEntry>> {
    let templates = by_layer(root)?;
    Ok(root
        .names("containers")?
        .into_iter()
        .filter_map(|name| described(root, name, &templates))
        .collect())
}

/// One container. Error: `NotFound`.
pub fn one(root: &Root, name: &str) -> Result<ContainerEntry> {
    crate::name::check(name)?;
    let found = described(root, name.to_owned(), &by_layer(root)?);
    found.ok_or_else(|| {
        let what = format!("there is no container {name}");
        Error::new(Kind::NotFound, what).on(root.container(name))
    })
}

/// What is known of a container; `None` when it is not there, or not any more.
fn described(root: &Root, name: String, templates: &Templates) -> Option<ContainerEntry> {
    let look = || container(root, name.clone(), templates);
    unless_removed(root, &root.container(&name), look).unwrap_or_else(|e| {
        Some(ContainerEntry {
            name,
            size: 0,
            data: 0,
            template: None,
            depth: 0,
            quota: 0,
            moving: None,
            error: Some(e.to_string()),
        })
    })
}

fn by_layer(root: &Root) -> Result<Templates> {
    let mut templates = Templates::new();
    for name in root.names("templates")? {
        let dir = root.template(&name);
        let read = || -> Result<_> {
            let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
            Ok((d, Meta::read(root.store(), &dir)?))
        };
        let Some((d, meta)) = unless_removed(root, &dir, read)? else {
            continue;
        };
        let origin = meta.template.and_then(|t| t.origin);
        if let Some(top) = d.image(d.top) {
            let of = templates.entry(layer_name(&top.file)).or_default();
            of.push((name, origin));
        }
    }
    Ok(templates)
}

/// By the uppermost layer of each template: its name, and the id of the container whose snapshot it
/// is.
type Templates = HashMap<String, Vec<(String, Option<String>)>>;

/// How often a disk that cannot be read is looked at again.
const LOOK_AGAIN: u32 = 8;

/// What `look` finds in the disk in `dir`; `None` when somebody removed it meanwhile.
fn unless_removed<T>(root: &Root, dir: &Path, look: impl Fn() -> Result<T>) -> Result<Option<T>> {
    let mut again = 0;
    loop {
        match look() {
            Ok(found) => return Ok(Some(found)),
            Err(_) if root.store().kind(dir)?.is_none() => return Ok(None),
            Err(e) if again == LOOK_AGAIN => return Err(e),
            // It may have been removed and made again under our eyes.
            Err(_) => again += 1,
        }
    }
}

/// The layer's directory name in a path like `../../layers/UUID/image.hds`.
fn layer_name(file: &str) -> String {
    let dir = Path::new(file).parent().and_then(Path::file_name);
    dir.map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn container(root: &Root, name: String, templates: &Templates) -> Result<ContainerEntry> {
    let dir = root.container(&name);
    let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
    let meta = Meta::read(root.store(), &dir)?;
    let chain = d.chain(d.top)?;
    // The uppermost that it stands on, unless that is a snapshot of its own.
    let is_ours = |origin: &Option<String>| origin.is_some() && *origin == meta.id;
    let template = chain.iter().rev().find_map(|image| {
        let of = templates.get(&layer_name(&image.file))?;
        let of = of.iter().find(|(_, origin)| !is_ours(origin));
        of.map(|(name, _)| name.clone())
    });
    let mut entry = ContainerEntry {
        name,
        size: d.disk_sectors.unwrap_or(0) * SECTOR,
        data: 0,
        template,
        depth: chain.len(),
        quota: meta.quota.unwrap_or(0),
        moving: None,
        error: None,
    };
    match Unended::of(root.store(), &dir) {
        Ok(moving) => entry.moving = moving,
        Err(e) => entry.error = Some(e.to_string()),
    }
    for image in &d.images {
        let path = root.store().resolve(&dir.join(&image.file))?;
        if path.starts_with(&dir) {
            entry.data += data_of(root, &path)?;
        }
        if image.guid == d.top {
            let (header, _) = read_header(root.store().open(&path, Access::Read)?.as_ref())?;
            let limit = meta.size_of(&d, d.top).unwrap_or(u64::MAX);
            entry.size = header.size().min(limit);
        }
    }
    Ok(entry)
}

/// The templates of a store, by name. Takes no lock.
pub fn templates(root: &Root) -> Result<Vec<TemplateEntry>> {
    let disks = uses::scan(root)?;
    let mut entries = Vec::new();
    for name in root.names("templates")? {
        let look = || template_among(root, &name, &disks);
        entries.extend(unless_removed(root, &root.template(&name), look)?);
    }
    Ok(entries)
}

/// One template. Error: `NotFound`.
pub fn template(root: &Root, name: &str) -> Result<TemplateEntry> {
    template::checked(root, name)?;
    template_among(root, name, &uses::scan(root)?)
}

fn template_among(root: &Root, name: &str, disks: &[Found]) -> Result<TemplateEntry> {
    let disk = template::open(root, name)?;
    let own = uses::of(root, &root.template(name), true)?;
    let meta = own.meta.template.clone().unwrap_or_default();
    // What damaged disks stand on is not known.
    let known: Vec<(bool, &Uses)> = disks
        .iter()
        .filter_map(|f| Some((f.is_template, f.uses.as_ref().ok()?)))
        .collect();
    let mut layers = Vec::new();
    for l in &disk.layers {
        layers.push(LayerEntry {
            id: l.id.to_string(),
            data: data_of(root, &l.image)?,
            disks: known
                .iter()
                .filter(|(_, u)| u.layers.contains(&l.id))
                .count(),
        });
    }
    let top = disk.top()?.id;
    let is_clone =
        |(is_template, uses): &&(bool, &Uses)| !is_template && uses.is_clone_of(top, &own);
    Ok(TemplateEntry {
        name: name.to_owned(),
        size: disk.shows(),
        data: layers.iter().map(|l| l.data).sum(),
        cluster: u64::from(disk.cluster_sectors) * SECTOR,
        clones: known.iter().filter(is_clone).count(),
        layers,
        content: meta.content,
        filesystem: meta.filesystem,
        partition_offset: meta.partition_offset,
        user_quota: meta.user_quota,
        created: meta.created,
        source: meta.source,
    })
}

/// The names in a store, sorted.
#[derive(Clone, Debug)]
pub struct Names {
    /// Containers.
    pub containers: Vec<String>,
    /// Templates.
    pub templates: Vec<String>,
}

/// What there is, without opening any of it.
pub fn names(root: &Root) -> Result<Names> {
    Ok(Names {
        containers: root.names("containers")?,
        templates: root.names("templates")?,
    })
}
