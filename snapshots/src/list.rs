//! What is in a store.

use std::collections::HashMap;
use std::path::Path;

use ploop::disk::open::DESCRIPTOR;
use ploop::error::Result;
use ploop::format::ploop::delta::read_header;
use ploop::store::{Access, SECTOR};
use serde::Serialize;

use crate::layer;
use crate::meta::Meta;
use crate::store::Root;
use crate::template::data_of;

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
    /// Containers (and grown layers) that stand on it.
    pub clones: usize,
    /// `ext4`, when it was built from a root filesystem.
    pub filesystem: Option<String>,
    /// First byte of the filesystem.
    pub partition_offset: u64,
    /// When it was imported, in seconds since 1970.
    pub created: u64,
    /// What it was imported from.
    pub source: String,
}

/// The containers of a store, by name. A damaged one is listed with its error.
pub fn containers(root: &Root) -> Result<Vec<ContainerEntry>> {
    let mut templates = HashMap::new();
    for name in root.names("templates")? {
        let dir = root.template(&name);
        let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
        if let Some(base) = d.images.first() {
            templates.insert(layer_name(&base.file), name);
        }
    }
    let mut entries = Vec::new();
    for name in root.names("containers")? {
        match container(root, name.clone(), &templates) {
            Ok(entry) => entries.push(entry),
            // It was removed since we read the directory.
            Err(_) if root.store().kind(&root.container(&name))?.is_none() => {}
            Err(e) => entries.push(ContainerEntry {
                name,
                size: 0,
                data: 0,
                template: None,
                depth: 0,
                error: Some(e.to_string()),
            }),
        }
    }
    Ok(entries)
}

/// The layer's directory name in a path like `../../layers/UUID/image.hds`.
fn layer_name(file: &str) -> String {
    let dir = Path::new(file).parent().and_then(Path::file_name);
    dir.map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn container(
    root: &Root,
    name: String,
    templates: &HashMap<String, String>,
) -> Result<ContainerEntry> {
    let dir = root.container(&name);
    let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
    let chain = d.chain(d.top)?;
    let mut entry = ContainerEntry {
        name,
        size: d.disk_sectors.unwrap_or(0) * SECTOR,
        data: 0,
        template: chain
            .first()
            .and_then(|base| templates.get(&layer_name(&base.file)).cloned()),
        depth: chain.len(),
        error: None,
    };
    for image in &d.images {
        let path = root.store().resolve(&dir.join(&image.file))?;
        if path.starts_with(&dir) {
            entry.data += data_of(root, &path)?;
        }
        if image.guid == d.top {
            let (header, _) = read_header(root.store().open(&path, Access::Read)?.as_ref())?;
            entry.size = header.size();
        }
    }
    Ok(entry)
}

/// The templates of a store, by name.
pub fn templates(root: &Root) -> Result<Vec<TemplateEntry>> {
    root.names("templates")?
        .into_iter()
        .map(|name| template(root, &name))
        .collect()
}

/// One template. Error: `NotFound`.
pub fn template(root: &Root, name: &str) -> Result<TemplateEntry> {
    let disk = crate::template::open(root, name)?;
    let meta = Meta::read(root.store(), &root.template(name))?
        .template
        .unwrap_or_default();
    let (mut data, mut clones) = (0, 0);
    for l in &disk.layers {
        data += data_of(root, &l.image)?;
        clones = layer::references(root, l.id)?.saturating_sub(1);
    }
    Ok(TemplateEntry {
        name: name.to_owned(),
        size: disk.size,
        data,
        cluster: u64::from(disk.cluster_sectors) * SECTOR,
        clones,
        filesystem: meta.filesystem,
        partition_offset: meta.partition_offset,
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
