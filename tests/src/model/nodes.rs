//! Operations on the tree of a container.

use std::cell::Cell;

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind};
use snapshots::delete::{self, Deleted, Ran, Watch};
use snapshots::merge::Progress;
use snapshots::snapshot::{Live, NewSnapshot, OPENVZ_DEPTH, Taken, take, take_group, take_offline};
use snapshots::switch::{SwitchOptions, switch};
use snapshots::{rename, tree};

use super::SNAPSHOTS;
use super::data::Wish;
use super::world::{Done, Failure, Home, World, ensure};

/// Bytes of the tables of a node and its child.
const TABLES: u64 = 2 * 4 * 4096;

/// Lets a job go so many steps.
struct Steps(Cell<usize>);

impl Watch for Steps {
    fn go_on(&self, _: u64) -> bool {
        let left = self.0.get();
        self.0.set(left.saturating_sub(1));
        left > 0
    }

    fn progress(&self, _: Progress) {}
}

impl World {
    /// A name of a small pool: some are taken.
    fn new_name(&mut self) -> String {
        format!("name-{}", self.stamp() % 50)
    }

    pub(super) fn snapshot(&mut self, ct: u8, named: bool, offline: bool) -> Done {
        let name = self.name(ct);
        if self.cts[&name].nodes.len() >= SNAPSHOTS {
            return Ok(());
        }
        let new = NewSnapshot {
            name: named.then(|| self.new_name()),
            ..NewSnapshot::default()
        };
        let taken_name = new
            .name
            .as_deref()
            .is_some_and(|n| self.cts[&name].names().contains(n));
        let busy = self.merging.as_ref().is_some_and(|(ct, ..)| *ct == name);
        let root = self.root.clone();
        let place = World::place(&root, &name)?;
        let mut late = None;
        let taken = if offline && !busy {
            self.close(&name)?;
            take_offline(&place, &new)
        } else {
            let disk = self.open(&name)?;
            let stamp = self.stamp();
            let wish = Wish::new(stamp as usize * 53, 1 + stamp as usize % 100, stamp);
            let wish = Some(wish).filter(|_| stamp.is_multiple_of(3));
            let live = Live {
                place: &place,
                disk: &disk,
            };
            let (taken, written) = self.watched(&name, wish.clone(), || take(live, &new))?;
            late = wish.filter(|_| written);
            taken
        };
        match taken {
            Err(e) if taken_name && e.kind() == Kind::Exists => self.touch(&name, None),
            taken => {
                let taken = taken?;
                ensure!(!taken_name, "a name was given twice");
                self.taken(&name, &taken)?;
                // After the barrier: in the new top only.
                if let Some(wish) = late {
                    wish.enter(self.ct(&name));
                    self.tally.add("writes while a snapshot was sealed");
                }
            }
        }
        self.shape(&name)
    }

    fn taken(&mut self, name: &str, taken: &Taken) -> Done {
        let guid = Guid::parse(&taken.guid)?;
        let ct = self.ct(name);
        ct.push(guid, taken.name.clone());
        let depth = ct.depth();
        ensure!(
            taken.depth == depth,
            "{} images, counted {depth}",
            taken.depth
        );
        let noted = taken.note.is_some();
        ensure!(
            noted == (depth > OPENVZ_DEPTH),
            "{depth} images: {:?}",
            taken.note
        );
        self.touch(name, Some(guid));
        self.touch(name, None);
        self.tally.add("snapshots");
        self.tally.most("most images in a chain", depth);
        if let Some((ct, _, child)) = &mut self.merging
            && ct == name
            && child.is_none()
        {
            *child = Some(guid);
            self.tally.add("snapshots while merging into the top");
        }
        Ok(())
    }

    pub(super) fn group(&mut self, ct: u8, more: u8) -> Done {
        let mut names = vec![self.name(ct)];
        for n in 1..=more {
            names.push(self.name(ct.wrapping_add(n)));
        }
        names.sort();
        names.dedup();
        names.retain(|n| self.cts[n].nodes.len() < SNAPSHOTS);
        let root = self.root.clone();
        let mut open = Vec::new();
        for name in &names {
            open.push((World::place(&root, name)?, self.open(name)?));
        }
        let live: Vec<_> = open
            .iter()
            .map(|(place, disk)| Live { place, disk })
            .collect();
        let all = take_group(&live, &NewSnapshot::default())?;
        ensure!(
            all.len() == names.len(),
            "{} of {} snapshots",
            all.len(),
            names.len()
        );
        for taken in &all {
            self.taken(&taken.disk, taken)?;
            self.shape(&taken.disk)?;
        }
        self.tally.add("groups");
        Ok(())
    }

    pub(super) fn rename(&mut self, ct: u8, node: u16, named: bool) -> Done {
        let name = self.name(ct);
        let Some(guid) = self.pick(&name, node) else {
            return Ok(());
        };
        let new = if named {
            self.new_name()
        } else {
            String::new()
        };
        let root = self.root.clone();
        let place = World::place(&root, &name)?;
        let described = match self.disks.get(&name) {
            Some(disk) => {
                let _arranging = disk.arrange();
                rename::describe(&place, guid, Some(&new), None)
            }
            None => {
                let _held = place.lock()?;
                rename::describe(&place, guid, Some(&new), None)
            }
        };
        let ct = self.ct(&name);
        let is_same = ct.node(guid).name.as_deref() == Some(&new);
        let wrong = match () {
            () if ct.node(guid).marked => Some(Kind::NotFound),
            () if !is_same && ct.names().contains(new.as_str()) => Some(Kind::Exists),
            () => None,
        };
        match described {
            Ok(_) if wrong.is_none() => {
                ct.node_mut(guid).name = Some(new).filter(|n| !n.is_empty())
            }
            Err(e) if Some(e.kind()) == wrong => {}
            other => return Err(Failure(format!("{other:?}, right is {wrong:?}"))),
        }
        Ok(())
    }

    pub(super) fn switch(
        &mut self,
        ct: u8,
        node: u16,
        discard: bool,
        named: bool,
        open: bool,
    ) -> Done {
        let name = self.name(ct);
        let Some(guid) = self.pick(&name, node) else {
            return Ok(());
        };
        let options = SwitchOptions {
            to: self.text_of(&name, guid),
            discard,
            keep_as: named.then(|| self.new_name()),
        };
        let root = self.root.clone();
        let place = World::place(&root, &name)?;
        if open {
            let _disk = self.open(&name)?;
            let refused = switch(&place, &options);
            let right = |e: &Error| e.kind() == Kind::InUse || self.cts[&name].node(guid).marked;
            let right = refused.as_ref().is_err_and(right) || options.keep_as.is_some();
            ensure!(right, "switched while it is open: {refused:?}");
        }
        self.close(&name)?;
        let taken_name = options.keep_as.as_deref();
        let taken_name = taken_name.is_some_and(|n| self.cts[&name].names().contains(n));
        let marked = self.cts[&name].node(guid).marked;
        let switched = match switch(&place, &options) {
            Err(e) if marked && e.kind() == Kind::NotFound => return self.shape(&name),
            Err(e) if taken_name && e.kind() == Kind::Exists => return self.shape(&name),
            switched => switched?,
        };
        ensure!(
            !marked && !taken_name,
            "switched to what is not there, or a name given twice"
        );
        let ct = self.ct(&name);
        match switched.kept {
            Some(kept) => {
                ensure!(!discard, "what was to be discarded is kept");
                let kept_guid = Guid::parse(&kept.guid)?;
                ct.push(kept_guid, kept.name);
                self.touch(&name, Some(kept_guid));
                self.tally.add("switched, branch kept");
            }
            None if discard => self.tally.add("switched, discarded"),
            None => {
                let parent = ct.parent.map(|p| ct.node(p));
                let same = parent.is_some_and(|p| !p.marked && p.sectors == ct.top);
                ensure!(same, "what was written is not kept");
                self.tally.add("switched, nothing to keep");
            }
        }
        let ct = self.ct(&name);
        ct.top = ct.node(guid).sectors.clone();
        ct.parent = Some(guid);
        ct.flushed();
        ensure!(switched.depth == ct.depth(), "{} images", switched.depth);
        self.touch_around(&name, Some(guid));
        self.shape(&name)
    }

    pub(super) fn delete(&mut self, ct: u8, node: u16, run: bool) -> Done {
        let name = self.name(ct);
        let nodes = self.cts[&name].nodes.len();
        let nth = usize::from(node) % (nodes + 1);
        let root = self.root.clone();
        let place = World::place(&root, &name)?;
        if nth == nodes {
            let disk = self.open(&name)?;
            let top = place.descriptor()?.top;
            let refused = delete::delete(
                Live {
                    place: &place,
                    disk: &disk,
                },
                top,
            );
            let right = refused.as_ref().is_err_and(|e| e.kind() == Kind::Invalid);
            ensure!(right, "the top was deleted: {refused:?}");
            return self.shape(&name);
        }
        let guid = self.cts[&name].nodes[nth].guid;
        if self.delete_node(&name, guid)? && run {
            self.go_on(&name, None)?;
        }
        Ok(())
    }

    /// Deletes a node; false when that was refused because somebody uses it.
    pub(super) fn delete_node(&mut self, name: &str, guid: Guid) -> Done<bool> {
        let root = self.root.clone();
        let place = World::place(&root, name)?;
        let disk = self.open(name)?;
        let ct = self.ct(name);
        let right = match ct.children(guid).len() {
            0 => Deleted::Gone,
            1 if ct.node(guid).marked || ct.mergeable(guid) => Deleted::Merging,
            n => Deleted::Hidden(n),
        };
        let live = Live {
            place: &place,
            disk: &disk,
        };
        let (deleted, _) = self.watched(name, None, || delete::delete(live, guid))?;
        let deleted = match deleted {
            Err(e) if self.is_held(name, &e) => {
                self.touch_around(name, Some(guid));
                self.shape(name)?;
                return Ok(false);
            }
            deleted => deleted?,
        };
        ensure!(deleted == right, "deleted: {deleted:?}, right is {right:?}");
        let ct = self.ct(name);
        match deleted {
            Deleted::Gone => {
                ct.remove(guid);
                self.tally.add("deleted leaves");
            }
            Deleted::Merging => {
                ct.node_mut(guid).marked = true;
                self.tally.add("deleted with one child");
            }
            Deleted::Hidden(_) => {
                ct.node_mut(guid).marked = true;
                self.tally.add("deleted and hidden");
            }
        }
        self.touch_around(name, Some(guid));
        self.shape(name)?;
        Ok(true)
    }

    /// A disk at rest gives back what was foretold.
    pub(super) fn delete_foretold(&mut self, ct: u8, node: u16) -> Done {
        let name = self.name(ct);
        let busy = self.merging.is_some() || self.held.iter().any(|h| h.ct == name);
        let Some(guid) = self.pick(&name, node).filter(|_| !busy) else {
            return Ok(());
        };
        self.go_on(&name, None)?;
        if !self.cts[&name].has(guid) {
            return Ok(());
        }
        for other in self.cts.keys().cloned().collect::<Vec<_>>() {
            self.close(&other)?;
        }
        let root = self.root.clone();
        let place = World::place(&root, &name)?;
        let before = self.data()?;
        let tree = tree::tree(&place)?;
        let found = tree.nodes.into_iter().find(|n| n.guid == guid.to_string());
        let foretold = found.and_then(|n| n.freed_if_deleted);
        let foretold = foretold.ok_or_else(|| Failure(format!("nothing foretold of {guid}")))?;
        // Alone, or with others that only waited for it.
        let mut after = self.cts[&name].clone();
        after.node_mut(guid).marked = true;
        let gone = after.settle();
        // What others go on using is copied; a raw base has all clusters.
        let node = self.cts[&name].node(guid);
        let may_grow = node.raw || node.shared;
        ensure!(self.delete_node(&name, guid)?, "nobody uses it");
        self.go_on(&name, None)?;
        self.close(&name)?;
        let left = self.data()?;
        let freed = before.saturating_sub(left);
        if gone.len() > 1 {
            self.tally.add("foretold, and others went too");
            return Ok(());
        }
        // Of room that a table has and never used the host says "data" once somebody has read it.
        let off = match self.home {
            Home::Files if self.roomy => TABLES,
            _ => 0,
        };
        ensure!(
            foretold.abs_diff(freed) <= off && (left <= before + off || may_grow),
            "{guid} of {name} was to free {foretold} bytes: {before} before, {left} after"
        );
        self.tally.add(if freed > 0 {
            "foretold, and it came true"
        } else {
            "foretold: nothing"
        });
        Ok(())
    }

    /// Goes on with all that waits, so many steps, or (none) to the end.
    pub(super) fn go_on(&mut self, name: &str, steps: Option<usize>) -> Done {
        // One job at a time.
        if self.merging.as_ref().is_some_and(|(ct, ..)| ct == name) {
            return Ok(());
        }
        let root = self.root.clone();
        let place = World::place(&root, name)?;
        let disk = self.open(name)?;
        let watch = Steps(Cell::new(steps.unwrap_or(usize::MAX)));
        let live = Live {
            place: &place,
            disk: &disk,
        };
        let (ran, _) = self.watched(name, None, || delete::run(live, &watch))?;
        let gone = self.gone(name)?;
        match ran {
            Err(e) if self.is_held(name, &e) => {}
            ran => self.ran(name, ran?, gone, steps.is_none())?,
        }
        self.touch_around(name, None);
        self.shape(name)
    }

    fn ran(&mut self, name: &str, ran: Ran, gone: usize, to_the_end: bool) -> Done {
        let ct = self.ct(name);
        ensure!(
            ran.removed == gone,
            "{} removed, {gone} are gone",
            ran.removed
        );
        ensure!(
            ran.paused != ct.waiting().is_empty(),
            "paused: {}",
            ran.paused
        );
        ensure!(!(ran.paused && to_the_end), "paused by nobody");
        let hidden = ct.nodes.iter().filter(|n| n.marked).count();
        ensure!(
            ran.paused || ran.hidden == hidden,
            "{} hidden, not {hidden}",
            ran.hidden
        );
        Ok(())
    }

    /// Takes out of the model what a job removed; how many. Each must have been able to go.
    fn gone(&mut self, name: &str) -> Done<usize> {
        let d = World::place(&self.root, name)?.descriptor()?;
        let ct = self.ct(name);
        let mut gone = 0;
        loop {
            let found = ct.waiting().into_iter().find(|g| d.shot(*g).is_none());
            let Some(guid) = found else {
                break;
            };
            ct.remove(guid);
            gone += 1;
        }
        let lost = ct.nodes.iter().find(|n| d.shot(n.guid).is_none());
        ensure!(
            lost.is_none(),
            "{:?} of {name} is gone",
            lost.map(|n| n.guid)
        );
        for _ in 0..gone {
            self.tally.add("nodes that went in the end");
        }
        Ok(gone)
    }
}
