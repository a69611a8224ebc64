//! Templates that the other side has: known by the hash of what they show, and not sent.

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use ploop::store::SECTOR;
use serde::{Deserialize, Serialize};

use super::manifest::{Base, Manifest};
use super::send::SendOptions;
use super::source::Opened;
use crate::layer::{self, Sealed};
use crate::meta::Meta;
use crate::place::Place;
use crate::store::Root;
use crate::template;

/// A template that a store has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Have {
    /// Its name there.
    pub template: String,
    /// The hash of what it shows, recorded when it was made.
    pub content: String,
    /// Size in bytes.
    pub size: u64,
    /// Cluster in bytes.
    pub cluster: u64,
}

/// The templates of a store that a sender need not send: those whose hash is recorded. Reads no
/// data.
pub fn have(root: &Root) -> Result<Vec<Have>> {
    let _shared = root.lock(false)?;
    Ok(all(root)?.into_iter().map(|(have, _)| have).collect())
}

fn all(root: &Root) -> Result<Vec<(Have, Sealed)>> {
    let mut found = Vec::new();
    for name in root.names("templates")? {
        let read = template::open(root, &name)
            .and_then(|sealed| Ok((sealed, Meta::read(root.store(), &root.template(&name))?)));
        let (sealed, meta) = match read {
            Ok(read) => read,
            Err(e) => {
                tracing::warn!(template = %name, error = %e, "nothing can stand on it");
                continue;
            }
        };
        let Some(content) = meta.template.and_then(|t| t.content) else {
            continue;
        };
        let have = Have {
            template: name,
            content,
            size: sealed.size,
            cluster: u64::from(sealed.cluster_sectors) * SECTOR,
        };
        found.push((have, sealed));
    }
    Ok(found)
}

/// The template of this store that `content` and `size` mean, and that the images of `manifest` can
/// stand on. Error: `NotFound`, with what to do. The caller holds the store's lock.
pub(super) fn find(root: &Root, manifest: &Manifest, content: &str, size: u64) -> Result<Sealed> {
    let cluster = u64::from(manifest.disk.cluster_sectors) * SECTOR;
    let version = manifest.images.first().map(|i| i.version);
    let fits = |h: &Have, s: &Sealed| {
        let same = h.content == content && h.size == size && h.cluster == cluster;
        // A chain has one version.
        same && version.is_none_or(|v| v == s.version.number())
    };
    let found = all(root)?.into_iter().find(|(have, s)| fits(have, s));
    found.map(|(_, sealed)| sealed).ok_or_else(|| {
        let what = format!(
            "the stream stands on a template of {size} bytes with clusters of {cluster}, in format \
             version {}, that shows {content}, and this store has none",
            version.unwrap_or_default()
        );
        Error::new(Kind::NotFound, what).on(root.dir()).fix(
            "Import that template here, or send without --have and --reference: all of it comes \
             then",
        )
    })
}

/// A node of a disk that the other side has as a template.
#[derive(Debug)]
pub(super) struct Below {
    pub(super) node: Guid,
    base: Base,
    name: String,
}

/// For the stream, and for people.
pub(super) fn split(below: Option<Below>) -> (Option<Base>, Option<String>) {
    below.map_or((None, None), |b| (Some(b.base), Some(b.name)))
}

/// The highest node of the disk that need not be sent.
pub(super) fn choose(
    place: &Place<'_>,
    opened: &Opened,
    node: Option<Guid>,
    options: &SendOptions,
) -> Result<Option<Below>> {
    if options.reference.is_none() && options.have.is_empty() {
        return Ok(None);
    }
    let root = place.root().ok_or_else(|| {
        Error::unsupported("only a container of a store stands on a template").on(place.dir())
    })?;
    let templates = {
        let _shared = root.lock(false)?;
        all(root)?
    };
    let named = options.reference.as_deref();
    if let Some(name) = named {
        refuse_unknown(root, name, templates.iter().map(|(h, _)| h))?;
    }
    let wanted = |h: &Have| match named {
        Some(name) => h.template == name,
        None => options
            .have
            .iter()
            .any(|o| o.content == h.content && o.size == h.size && o.cluster == h.cluster),
    };
    let chain = opened.chain(node.unwrap_or(opened.d.top))?;
    let mut best: Option<(usize, Below)> = None;
    for (have, sealed) in templates.into_iter().filter(|(h, _)| wanted(h)) {
        let top = sealed.top()?.id;
        let Some(at) = position(place, root, opened, &chain, top)? else {
            continue;
        };
        // A tree may have branches that begin below it: then its layers are needed.
        let whole = node.is_some() || chain[..at].iter().all(|g| opened.d.children(*g).len() == 1);
        if at + 1 == chain.len() || !whole || best.as_ref().is_some_and(|(b, _)| *b >= at) {
            continue;
        }
        let below = Below {
            node: chain[at],
            base: Base::Template {
                content: have.content,
                size: have.size,
            },
            name: have.template,
        };
        best = Some((at, below));
    }
    if let (Some(name), None) = (named, &best) {
        let what = format!("{} does not stand on template {name} alone", place.shown());
        return Err(Error::invalid(what)
            .on(place.dir())
            .fix("Send it without --reference: all of it is sent then"));
    }
    Ok(best.map(|(_, below)| below))
}

fn refuse_unknown<'a>(
    root: &Root,
    name: &str,
    mut known: impl Iterator<Item = &'a Have>,
) -> Result<()> {
    template::checked(root, name)?;
    if known.any(|h| h.template == name) {
        return Ok(());
    }
    let what = format!("of template {name} no hash is recorded, so another store cannot tell it");
    Err(Error::unsupported(what)
        .on(root.template(name))
        .fix("Send without --reference: all of it is sent then"))
}

/// Where in a chain the layer is.
fn position(
    place: &Place<'_>,
    root: &Root,
    opened: &Opened,
    chain: &[Guid],
    id: uuid::Uuid,
) -> Result<Option<usize>> {
    for (n, node) in chain.iter().enumerate() {
        if let Some(image) = opened.d.image(*node)
            && layer::of(root, &place.file_of(image)?) == Some(id)
        {
            return Ok(Some(n));
        }
    }
    Ok(None)
}
