//! The sending side. It writes to the stream and to nothing else.

use std::collections::BTreeMap;
use std::io::Write;

use ploop::descriptor::Guid;
use ploop::error::{Error, Result};
use serde::Serialize;

use super::base::{self, Have};
use super::frame::{CONTINUES, Type, Writer};
use super::manifest::{Base, Disk, Manifest, What, json};
use super::partial::Token;
use super::source::{self, Opened};
use super::{Begin, Done, End, Position, Whole};
use crate::convert::Progress;
use crate::hash::Hasher;
use crate::limits::Limits;
use crate::place::Place;
use crate::snapshot::Live;

/// What is sent.
#[derive(Clone, Debug, Default)]
pub struct SendOptions {
    /// A snapshot, by name or GUID: what it shows, as one image. `None`: the whole tree, and its
    /// state.
    pub snapshot: Option<String>,
    /// A snapshot below that one, which the receiver has: only what came after it.
    pub from: Option<String>,
    /// What the receiver has ([`super::have`]): layers of a template in it are not sent.
    pub have: Vec<Have>,
    /// A template of this store that the receiver has, too.
    pub reference: Option<String>,
    /// Where an earlier stream was cut, as the receiver said.
    pub resume: Option<Token>,
}

/// What was sent.
#[derive(Clone, Debug, Serialize)]
pub struct Sent {
    /// Images of the disk.
    pub images: usize,
    /// Bytes of their data that were sent.
    pub data: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// What was not sent because the receiver has it, for people.
    pub base: Option<String>,
    /// The images, the top last.
    #[serde(skip)]
    pub nodes: Vec<Guid>,
}

/// Writes a disk to `out`. Blocks for as long as the receiver does; `progress` gets bytes of data
/// that were looked at, and the total.
///
/// What is sent is what the disk is at one instant. A snapshot is sent while its disk is in use; its
/// files are locked as by a reader, so that nobody rewrites them meanwhile. A whole tree is sent
/// under the disk's lock.
///
/// Errors: `InUse` for the whole tree of a disk in use, and for a snapshot that is not closed;
/// `NotFound`; `Invalid` for options that do not go together, and for another disk than the one that
/// `resume` is of; `Unsupported` for what a stream has no place for: encrypted disks, and those that
/// go on in another directory.
pub fn send(
    place: &Place<'_>,
    options: &SendOptions,
    out: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<Sent> {
    let opened = Opened::open(place, options.snapshot.as_deref())?;
    write(place, &opened, options, None, out, progress)
}

/// Writes the whole tree of a disk that is open here, under its clients, without what its top has: what
/// was written since the last snapshot. The caller keeps the tree as it is meanwhile. Nodes that wait
/// for a merge are sent, and wait for it at the receiver. Otherwise as [`send`].
///
/// `hollow`: no image's data is sent, and an empty one more stands below the top, under this name.
pub fn send_below(
    live: Live<'_>,
    have: &[Have],
    hollow: Option<Guid>,
    out: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<Sent> {
    let opened = Opened::live(live)?;
    let options = SendOptions {
        have: have.to_vec(),
        ..SendOptions::default()
    };
    write(live.place, &opened, &options, hollow, out, progress)
}

fn write(
    place: &Place<'_>,
    opened: &Opened,
    options: &SendOptions,
    hollow: Option<Guid>,
    out: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<Sent> {
    let (mut manifest, mut images, base) = plan(place, opened, options)?;
    if let Some(guid) = hollow {
        images = source::hollow(images, guid);
        manifest.images = images.iter().map(|i| i.record.clone()).collect();
        manifest.disk.images = images.len();
        manifest.check().map_err(|e| e.on(place.dir()))?;
    }
    let records = manifest.hash()?;
    let (features, begin) = match &options.resume {
        Some(token) if token.records() == records => (CONTINUES, token.position()),
        Some(_) => {
            let what = "what would be sent is not what the stream that was cut was of";
            return Err(Error::invalid(what).on(place.dir()).fix(
                "Give the options of that time, and change nothing of the disk meanwhile; or \
                 send it from the beginning",
            ));
        }
        None => (0, Position::default()),
    };
    let mut out = Writer::begin(out, features)?;
    manifest.send(&mut out)?;
    if options.resume.is_some() {
        out.frame(Type::Position, &[&json(&begin)?])?;
    }
    let mut whole = Whole::new(&records);
    let total = images.iter().map(source::Sent::data).sum::<Result<u64>>()?;
    let (mut looked, mut data) = (0, 0);
    for (n, image) in images.iter().enumerate() {
        if n < begin.image {
            looked += image.data()?;
            continue;
        }
        out.frame(Type::Begin, &[&json(&Begin { image: n })?])?;
        // What was received before is looked at, too: its hash must be that of all.
        let skip = if n == begin.image { begin.offset } else { 0 };
        let mut hasher = Hasher::new(image.record.size);
        image.walk(&mut |offset, bytes| {
            source::hash(&mut hasher, offset, bytes);
            looked += bytes.len() as u64;
            progress(looked.min(total), total);
            if offset < skip {
                return Ok(());
            }
            data += bytes.len() as u64;
            out.frame(Type::Data, &[&offset.to_le_bytes(), bytes])
        })?;
        let hash = hasher.text();
        whole.add(&hash);
        out.frame(Type::Done, &[&json(&Done { hash })?])?;
    }
    let end = End {
        frames: out.frames(),
        hash: whole.text(),
    };
    out.frame(Type::End, &[&json(&end)?])?;
    out.flush()?;
    Ok(Sent {
        images: images.len(),
        data,
        bytes: out.bytes(),
        base,
        nodes: images
            .iter()
            .filter_map(|i| Guid::parse(&i.record.guid).ok())
            .collect(),
    })
}

/// What is sent of an open disk: its records, its images, and what is not sent.
fn plan(
    place: &Place<'_>,
    opened: &Opened,
    options: &SendOptions,
) -> Result<(Manifest, Vec<source::Sent>, Option<String>)> {
    let node = match &options.snapshot {
        Some(text) => Some(opened.find(place, text)?),
        None => None,
    };
    let (base, shown, images) = match (node, &options.from) {
        (Some(node), Some(from)) => {
            refuse_both(options)?;
            let (base, own) = since(place, opened, node, from)?;
            (
                Some(base),
                Some(from.clone()),
                vec![opened.sent(&own, None, true)?],
            )
        }
        (None, Some(_)) => {
            let what = "a difference is one of two snapshots: name the later one, too";
            return Err(Error::invalid(what).fix(format!(
                "Make one of the state that it has now: ploop snapshot create {0} --name NAME; \
                 ploop send {0}@NAME --from SNAPSHOT",
                place.shown()
            )));
        }
        (Some(node), None) => {
            let below = base::choose(place, opened, Some(node), options)?;
            let chain = opened.chain(node)?;
            let own = match &below {
                Some(b) => above(&chain, b.node),
                None => chain,
            };
            let image = opened.sent(&own, None, below.is_some())?;
            let (base, shown) = base::split(below);
            (base, shown, vec![image])
        }
        (None, None) => {
            let below = base::choose(place, opened, None, options)?;
            let images = tree(opened, below.as_ref().map(|b| b.node))?;
            let (base, shown) = base::split(below);
            (base, shown, images)
        }
    };
    let manifest = Manifest {
        disk: Disk {
            name: place.shown().to_owned(),
            what: if node.is_some() {
                What::State
            } else {
                What::Tree
            },
            cluster_sectors: opened.d.cluster_sectors,
            images: images.len(),
            base,
            quota: opened.meta.quota,
            limits: Limits {
                other: BTreeMap::new(),
                ..opened.meta.limits.clone()
            },
        },
        images: images.iter().map(|i| i.record.clone()).collect(),
    };
    // The other side would say the same, later.
    manifest.check().map_err(|e| e.on(place.dir()))?;
    Ok((manifest, images, shown))
}

fn refuse_both(options: &SendOptions) -> Result<()> {
    if options.reference.is_some() || !options.have.is_empty() {
        return Err(Error::invalid(
            "a difference stands on its snapshot, not on a template",
        ));
    }
    Ok(())
}

/// The images of a whole tree, without `below` and what that stands on.
fn tree(opened: &Opened, below: Option<Guid>) -> Result<Vec<source::Sent>> {
    let left = match below {
        Some(below) => opened.chain(below)?,
        None => Vec::new(),
    };
    let mut images = Vec::new();
    for node in opened.nodes().into_iter().filter(|n| !left.contains(n)) {
        let parent = opened.d.shot(node).map(|s| s.parent);
        let parent = parent.filter(|p| *p != Guid::NONE && !left.contains(p));
        images.push(opened.sent(&[node], parent, below.is_some())?);
    }
    Ok(images)
}

/// The nodes from behind `from` to `node`, and what the receiver must have.
fn since(place: &Place<'_>, opened: &Opened, node: Guid, from: &str) -> Result<(Base, Vec<Guid>)> {
    let below = opened.find(place, from)?;
    let chain = opened.chain(node)?;
    if below == node || !chain.contains(&below) {
        let what = format!("{from} is not below the snapshot that is to be sent");
        return Err(Error::invalid(what).on(place.dir()).fix(format!(
            "`ploop tree {}` shows what stands on what",
            place.shown()
        )));
    }
    let base = Base::Snapshot {
        guid: below.to_string(),
        content: opened.content(place, below, &|_, _| ())?,
    };
    Ok((base, above(&chain, below)))
}

fn above(chain: &[Guid], below: Guid) -> Vec<Guid> {
    let mut own = chain.iter().copied().skip_while(|g| *g != below);
    own.next();
    own.collect()
}
