//! What is to be done to a disk: its images, its descriptor, what lies beside them.
//!
//! * An image that a merge is being made into, and its child, are left to the merge.
//! * A conversion is taken back in every image of the disk, the base last: OpenVZ's tool takes the
//!   base's flag for that of all.
//! * Files that nothing names are put into `.ploop/lost+found`, never removed.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::descriptor::{Descriptor, Guid, Temporary};
use ploop::disk::open::{MERGING, Opener};
use ploop::format::ploop::header::{FLAG_CONVERTING, HEADER_BYTES, IN_USE_DIRTY};
use ploop::store::{Access, EntryKind, StoreFile, read_exact};
use ploop::{Kind, Result};

use super::changes::{Changes, Notes};
use super::fields::{Fields, HeaderBytes};
use super::files::Files;
use super::image::{self, Backup};
use super::journal::{self, Journal};
use super::leftovers::free_place;
use super::tree::Tree;

use super::{Move, Plan, Remark, Step};
use crate::progress::Meter;

/// Where files go that nothing names.
pub(super) const LOST: &str = "lost+found";
/// Our own directory in a disk's.
pub(super) const SIDE: &str = ".ploop";

/// What there is to do. Two surveys of the same files are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Survey {
    pub(super) images: Vec<Surveyed>,
    pub(super) unrepairable: Vec<Remark>,
    pub(super) left: Vec<Remark>,
    pub(super) moves: Vec<Move>,
    pub(super) descriptor: Option<Rewrite>,
    /// Every image that was looked into.
    pub(super) seen: HashSet<PathBuf>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Surveyed {
    pub(super) path: PathBuf,
    pub(super) steps: Vec<Step>,
    pub(super) changes: Option<Changes>,
}

impl Surveyed {
    /// Every step of it is one that asks nobody.
    pub(super) fn automatic(&self) -> bool {
        self.steps.iter().all(|s| s.automatic)
    }
}

/// A descriptor with values that are stale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rewrite {
    pub(super) path: PathBuf,
    pub(super) old: Vec<u8>,
    pub(super) new: Vec<u8>,
    what: String,
}

impl Survey {
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps: Vec<Step> = self.images.iter().flat_map(|i| i.steps.clone()).collect();
        steps.extend(self.moves.iter().map(Move::step));
        steps.extend(self.descriptor.iter().map(Rewrite::step));
        steps
    }

    pub(super) fn cannot(&mut self, file: &Path, what: impl Into<String>) {
        self.unrepairable.push(Remark {
            file: file.to_path_buf(),
            what: what.into(),
        });
    }

    pub(super) fn leave(&mut self, file: &Path, what: impl Into<String>) {
        self.left.push(Remark {
            file: file.to_path_buf(),
            what: what.into(),
        });
    }
}

impl Move {
    pub(super) fn step(&self) -> Step {
        let what = match &self.with {
            Some(_) => format!("it is done with: move it to {}", self.to.display()),
            None => format!("nothing names it: move it to {}", self.to.display()),
        };
        Step {
            automatic: self.automatic,
            ..Step::new(&self.from, what)
        }
    }
}

impl Rewrite {
    pub(super) fn step(&self) -> Step {
        Step {
            automatic: true,
            ..Step::new(&self.path, self.what.clone())
        }
    }
}

/// Looks at the images of the plan's source. Files are opened through `files` only.
pub(super) fn survey(
    opener: &Opener,
    files: &mut Files<'_>,
    real: &Path,
    plan: &Plan,
    meter: &mut Meter<'_>,
) -> Result<Survey> {
    let mut surveyor = Surveyor {
        opener,
        files,
        meter,
        root: &plan.root,
        survey: Survey::default(),
    };
    match plan.source.descriptor {
        true => surveyor.disk(real, plan)?,
        false => {
            surveyor.meter.expect(1);
            let file = surveyor.files.image(real)?;
            surveyor.image(&file, false, None, false)?;
            surveyor.meter.add(1);
        }
    }
    Ok(surveyor.survey)
}

struct Surveyor<'a, 'b, 'm> {
    opener: &'a Opener,
    files: &'a mut Files<'b>,
    meter: &'a mut Meter<'m>,
    root: &'a Path,
    survey: Survey,
}

/// An image of the disk and where its node is.
struct Node {
    guid: Guid,
    path: PathBuf,
    /// Images below it.
    depth: usize,
}

impl Surveyor<'_, '_, '_> {
    fn disk(&mut self, xml: &Path, plan: &Plan) -> Result<()> {
        let d = match self.opener.read_descriptor(xml) {
            Ok(d) => d,
            Err(e) if e.kind() == Kind::Corrupt => {
                let what = format!("{}: what it was to say cannot be known", e.what());
                self.survey.cannot(xml, what);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let tree = Tree::of(&d);
        let nodes = self.nodes(&d, &tree, xml, plan)?;
        let mut converting = false;
        let mut heads = Vec::new();
        for node in &nodes {
            let file = self.files.image(&node.path)?;
            let fields = fields_of(file.as_ref())?;
            converting |= fields.is_some_and(is_converting);
            heads.push((file, fields));
        }
        let merging = self.merging(&d, &tree, &nodes, &heads)?;
        self.meter.expect(nodes.len() as u64);
        // The top last: its bitmaps must have what changes below it.
        let (top, others): (Vec<_>, Vec<_>) =
            nodes.iter().zip(&heads).partition(|(n, _)| n.guid == d.top);
        let mut others_end = 0;
        for (node, (file, _)) in others.into_iter().chain(top) {
            self.meter.add(1);
            if merging.contains(&node.guid) {
                let what = "a merge of this image and another was interrupted: the next `ploop \
                            snapshot delete` or `ploop snapshot merge` of the disk finishes it";
                self.survey.leave(&node.path, what);
                continue;
            }
            if let Some(fields) = fields_of(file.as_ref())?
                && fields.cluster_sectors() != d.cluster_sectors
            {
                let what = format!(
                    "clusters of {} sectors, the descriptor says {}",
                    fields.cluster_sectors(),
                    d.cluster_sectors
                );
                self.survey.cannot(&node.path, what);
                continue;
            }
            let before = self.survey.images.len();
            let below = (node.guid != d.top).then_some(node.guid);
            let changed_below = below.is_none() && self.changed_below(&tree, d.top);
            self.image(file, converting, below, changed_below)?;
            for image in &mut self.survey.images[before..] {
                let readers = tree.readers(node.guid);
                for step in &mut image.steps {
                    step.snapshots = readers.clone();
                }
            }
            if below.is_some() {
                others_end = self.survey.images.len();
            }
        }
        // And the first to be repaired, as before all that it stands on.
        let top = self.survey.images.split_off(others_end);
        self.survey.images.splice(0..0, top);
        self.pairs(&tree, &nodes)?;
        self.stale(&d, xml, &nodes)
    }

    /// Whether repairing the images below `top` changes what it shows.
    fn changed_below(&self, tree: &Tree, top: Guid) -> bool {
        let mut chain = HashSet::new();
        let mut next = tree.parents.get(&top);
        while let Some(node) = next.filter(|n| chain.insert(**n)) {
            next = tree.parents.get(node);
        }
        let mut steps = self.survey.images.iter().flat_map(|i| &i.steps);
        steps.any(|s| {
            let of = s.snapshots.first();
            s.changes_what_is_shown() && of.is_some_and(|node| chain.contains(node))
        })
    }

    /// The header that an image is to have.
    fn header(&mut self, path: &Path) -> Result<Option<Fields>> {
        let planned = self.survey.images.iter().find(|i| i.path == path);
        let planned = planned.and_then(|i| i.changes.as_ref());
        match planned {
            Some(changes) => Ok(Some(changes.fields)),
            None => fields_of(self.files.image(path)?.as_ref()),
        }
    }

    /// Refuses a repair after which images would not fit those below them.
    fn pairs(&mut self, tree: &Tree, nodes: &[Node]) -> Result<()> {
        let mut headers = HashMap::new();
        for node in nodes {
            headers.insert(node.guid, self.header(&node.path)?);
        }
        for node in nodes {
            let below = tree.parents.get(&node.guid).and_then(|p| headers.get(p));
            let (Some(Some(own)), Some(Some(below))) = (headers.get(&node.guid), below) else {
                continue;
            };
            if own.version() != below.version() {
                self.survey
                    .cannot(&node.path, "v1 and v2 images in one chain");
            } else if own.size_sectors() < below.size_sectors() {
                let what = format!(
                    "{} sectors on a parent of {}: one of the sizes is wrong",
                    own.size_sectors(),
                    below.size_sectors()
                );
                self.survey.cannot(&node.path, what);
            }
        }
        Ok(())
    }

    /// The ploop images of the disk, those with most below them first.
    fn nodes(&mut self, d: &Descriptor, tree: &Tree, xml: &Path, plan: &Plan) -> Result<Vec<Node>> {
        let depths = tree.depths();
        let raw_base = d.base_is_raw();
        let (mut nodes, mut seen): (Vec<Node>, HashSet<PathBuf>) = Default::default();
        for image in &d.images {
            let path = match self.opener.confine(self.root, &image.file, &plan.options) {
                Ok(path) => path,
                Err(e) if matches!(e.kind(), Kind::Io | Kind::InUse) => return Err(e),
                Err(e) => {
                    self.survey.cannot(e.path().unwrap_or(xml), e.what());
                    continue;
                }
            };
            if !seen.insert(path.clone()) {
                self.survey.cannot(&path, "two images are this one file");
                continue;
            }
            if !path.starts_with(self.root) {
                let what = "it lies outside of the disk's directory and is not repaired from here; \
                            name it by itself";
                self.survey.leave(&path, what);
                continue;
            }
            let depth = depths.get(&image.guid).copied().unwrap_or(0);
            if raw_base && tree.parents.get(&image.guid) == Some(&Guid::NONE) {
                continue;
            }
            match self.opener.store().open(&path, Access::Read) {
                Ok(_) => {}
                Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Invalid) => {
                    self.survey.cannot(&path, e.what());
                    continue;
                }
                Err(e) => return Err(e),
            }
            nodes.push(Node {
                guid: image.guid,
                path,
                depth,
            });
        }
        nodes.sort_by_key(|n| std::cmp::Reverse(n.depth));
        Ok(nodes)
    }

    /// Nodes that a merge is rewriting: their marks are part of it.
    fn merging(
        &self,
        d: &Descriptor,
        tree: &Tree,
        nodes: &[Node],
        heads: &[(Arc<dyn StoreFile>, Option<Fields>)],
    ) -> Result<HashSet<Guid>> {
        let mut out = HashSet::new();
        for shot in d.shots.iter().filter(|s| s.temporary != Temporary::No) {
            let at = nodes.iter().position(|n| n.guid == shot.guid);
            let head = at.and_then(|at| heads.get(at)).and_then(|h| h.1);
            let dirty = head.is_some_and(|f| f.in_use() == IN_USE_DIRTY);
            let marker = format!("{MERGING}{}", shot.guid);
            let marker = self.root.join(SIDE).join(marker);
            let ours = self.opener.store().kind(&marker)?.is_some();
            if dirty || ours || shot.temporary != Temporary::Temporary {
                out.insert(shot.guid);
                out.extend(tree.children.get(&shot.guid).into_iter().flatten());
            }
        }
        Ok(out)
    }

    /// One image. `converting`: one of its disk's says that a conversion was interrupted. `below`:
    /// its node, where that is not the top. `changed_below`: what it shows changes below it.
    fn image(
        &mut self,
        file: &Arc<dyn StoreFile>,
        converting: bool,
        below: Option<Guid>,
        changed_below: bool,
    ) -> Result<()> {
        let path = file.path().to_path_buf();
        self.survey.seen.insert(path.clone());
        let mut notes = Notes::on(&path);
        let journal = match journal::judge(self.opener, file, &mut notes, below, &mut self.survey)?
        {
            Journal::Kept => return Ok(()),
            Journal::Nothing => None,
            Journal::Useless(path) => Some(path),
        };
        let backup = self.backup(file)?;
        let wanted = match &backup {
            Some(backup) => put_back(file, backup, converting)?,
            None => false,
        };
        let mut planned =
            match image::plan(file, backup.as_ref().filter(|_| wanted), changed_below)? {
                Ok(planned) => planned,
                Err(why) => {
                    self.survey.cannot(&path, why);
                    return Ok(());
                }
            };
        planned.steps.splice(0..0, notes.steps);
        if let Some(backup) = backup {
            self.put_away(&backup.path, wanted.then(|| path.clone()), wanted)?;
        }
        if let Some(journal) = journal {
            self.put_away(&journal, Some(path.clone()), false)?;
        }
        if !planned.steps.is_empty() {
            self.survey.images.push(Surveyed {
                path,
                steps: planned.steps,
                changes: planned.changes,
            });
        }
        Ok(())
    }

    /// The copy of header and BAT that OpenVZ's tool keeps while it converts an image.
    fn backup(&self, file: &Arc<dyn StoreFile>) -> Result<Option<Backup>> {
        let mut path = OsString::from(file.path());
        path.push(".idx");
        let path = PathBuf::from(path);
        match self.opener.store().kind(&path)? {
            Some(EntryKind::File) => Ok(Some(Backup {
                file: self.opener.store().open(&path, Access::Read)?,
                path,
            })),
            _ => Ok(None),
        }
    }

    /// Plans to move `path` to where lost files go, under a name that is free.
    fn put_away(&mut self, path: &Path, with: Option<PathBuf>, automatic: bool) -> Result<()> {
        let store = self.opener.store();
        let to = free_place(store.as_ref(), self.root, path, &self.survey.moves)?;
        self.survey.moves.push(Move {
            from: path.to_path_buf(),
            to,
            with,
            automatic,
        });
        Ok(())
    }

    /// Values of the descriptor that the header of the top overrules.
    fn stale(&mut self, d: &Descriptor, xml: &Path, nodes: &[Node]) -> Result<()> {
        let Some(top) = nodes.iter().find(|n| n.guid == d.top) else {
            return Ok(());
        };
        let fields = self.header(&top.path)?;
        let Some(size) = fields.map(|f| f.size_sectors()) else {
            return Ok(());
        };
        let stale = |value: Option<u64>| value.is_some_and(|v| v != size);
        if size == 0 || !stale(d.disk_sectors) && !stale(d.end) {
            return Ok(());
        }
        let mut new = d.clone();
        new.set_disk_sectors(size);
        let file = self.opener.store().open(xml, Access::Read)?;
        let mut old = vec![0; file.len()? as usize];
        read_exact(file.as_ref(), &mut old, 0)?;
        self.survey.descriptor = Some(Rewrite {
            path: xml.to_path_buf(),
            old,
            new: new.to_xml(),
            what: format!(
                "it says a disk of {} sectors, the top image has {size}: write that",
                d.disk_sectors.or(d.end).unwrap_or(0)
            ),
        });
        Ok(())
    }
}

/// The header of an image, if it has one.
fn fields_of(file: &dyn StoreFile) -> Result<Option<Fields>> {
    let mut head: HeaderBytes = [0; HEADER_BYTES as usize];
    let got = file.read_at(&mut head, 0)?;
    Ok((got == head.len()).then_some(Fields(head)))
}

fn is_converting(fields: Fields) -> bool {
    fields.version().is_some() && fields.flags() & FLAG_CONVERTING != 0
}

/// Whether the image is to become what `backup` says. An image that is not marked itself is, when
/// another one of the disk is and it was converted already.
fn put_back(file: &Arc<dyn StoreFile>, backup: &Backup, converting: bool) -> Result<bool> {
    let (now, before) = (fields_of(file.as_ref())?, fields_of(backup.file.as_ref())?);
    Ok(match (now, before) {
        (Some(now), _) if is_converting(now) => true,
        (Some(now), Some(before)) => converting && now.version() != before.version(),
        _ => false,
    })
}
