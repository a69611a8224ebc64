//! Operations on the set of containers, and readers of snapshots.

use ploop::descriptor::{Descriptor, Guid};
use ploop::disk::open::DESCRIPTOR;
use ploop::error::Kind;
use ploop::format::ploop::{Header, Version, create};
use snapshots::clone::{CloneSource, CreateOptions, create_containers};
use snapshots::remove::{remove_container, sweep};
use snapshots::share;
use snapshots::snapshot::{NewSnapshot, take_offline};

use super::oracle::{Ct, empty};
use super::world::{Done, Failure, Held, World, ensure};
use super::{CLUSTER, CONTAINERS, SECTORS, SIZE, data};

impl World {
    /// A container that was cloned from nothing, as an old disk directory is that was put there. A
    /// raw base gets its first snapshot at once: before that it cannot be written.
    pub(super) fn create(&mut self, raw: bool, v1: bool) -> Done {
        if self.cts.len() >= CONTAINERS {
            return Ok(());
        }
        let name = format!("ct-{:06}", self.stamp());
        let (dir, store) = (self.dir(&name), self.root.opener().store().clone());
        store.create_dir(&dir)?;
        let base = dir.join("root.hds");
        let mut top = empty();
        if raw {
            top[SECTORS / 8..SECTORS / 4].fill(self.stamp());
            data::write_raw(store.create(&base, 0o600)?.as_ref(), &top)?;
        } else {
            let version = if v1 { Version::V1 } else { Version::V2 };
            let header = Header::new(version, CLUSTER as u32, SIZE as u64)?;
            drop(create(store.as_ref(), &base, &header, 0o600)?);
        }
        let d = Descriptor::new_single(SIZE as u64, CLUSTER as u32, raw, Guid::TOP, "root.hds")?;
        store
            .create(&dir.join(DESCRIPTOR), 0o600)?
            .write_at(&d.to_xml(), 0)?;
        let mut ct = Ct::new(top);
        if raw {
            let root = self.root.clone();
            let taken = take_offline(&World::place(&root, &name)?, &NewSnapshot::default())?;
            let guid = Guid::parse(&taken.guid)?;
            ct.push(guid, None);
            ct.node_mut(guid).raw = true;
            self.tally.add("raw bases");
        }
        self.cts.insert(name.clone(), ct);
        self.touch(&name, None);
        Ok(())
    }

    /// Containers from a snapshot. Of one that is open it is shared first, by who has it open.
    pub(super) fn clone_from(&mut self, ct: u8, node: u16, count: u8) -> Done {
        let name = self.name(ct);
        let Some(guid) = self.pick(&name, node) else {
            return Ok(());
        };
        let room = CONTAINERS.saturating_sub(self.cts.len());
        let count = usize::from(count).min(room);
        let names: Vec<String> = (0..count)
            .map(|_| format!("ct-{:06}", self.stamp()))
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        let root = self.root.clone();
        let shared = match self.disks.get(&name) {
            Some(disk) if !self.cts[&name].node(guid).marked => {
                let place = World::place(&root, &name)?;
                let _arranging = disk.arrange();
                disk.settle(place.opener())?;
                share::share(&place, guid)
            }
            _ => Ok(()),
        };
        let from = CloneSource::Snapshot {
            container: name.clone(),
            snapshot: self.text_of(&name, guid),
        };
        let options = CreateOptions::default();
        let made =
            shared.and_then(|()| create_containers(&root, &names, &from, &options, &|_, _| ()));
        let ct = self.ct(&name);
        let chain = ct.chain(Some(guid));
        let may = match () {
            () if ct.node(guid).marked => vec![Kind::NotFound],
            () if ct.nodes.iter().any(|n| n.raw) => vec![Kind::Unsupported],
            () if chain.iter().any(|g| ct.node(*g).marked) => vec![Kind::InUse],
            () => vec![],
        };
        match made {
            Err(e) if may.contains(&e.kind()) => {
                self.tally.add("refused: clones");
                self.touch(&name, None);
                return Ok(());
            }
            made => drop(made?),
        }
        ensure!(
            may.is_empty() || may == [Kind::InUse],
            "a clone was made, {may:?} is right"
        );
        for g in chain {
            ct.node_mut(g).shared = true;
        }
        let new = ct.cloned(guid);
        self.touch_around(&name, Some(guid));
        for clone in names {
            self.cts.insert(clone.clone(), new.clone());
            self.touch(&clone, None);
            self.touch(&clone, Some(guid));
            self.tally.add("clones");
        }
        self.shape(&name)
    }

    /// How a node is called: by its name, if it has one.
    pub(super) fn text_of(&self, name: &str, guid: Guid) -> String {
        let node = self.cts[name].node(guid);
        let named = node.name.clone().filter(|_| !node.marked);
        named.unwrap_or_else(|| guid.to_string())
    }

    /// Removes a container; while it is open here that is refused.
    pub(super) fn remove(&mut self, ct: u8) -> Done {
        let name = self.name(ct);
        if self.merging.as_ref().is_some_and(|(ct, ..)| *ct == name) {
            return Ok(());
        }
        let root = self.root.clone();
        if self.disks.contains_key(&name) {
            match remove_container(&root, &name) {
                Err(e) if e.kind() == Kind::InUse => {}
                other => return Err(Failure(format!("removed while it is open: {other:?}"))),
            }
            self.close(&name)?;
        }
        match remove_container(&root, &name) {
            Err(e) if self.is_held(&name, &e) => return Ok(()),
            removed => removed?,
        }
        // Who reads it still reads it.
        for held in self.held.iter().filter(|h| h.ct == name) {
            self.compare_held(held)?;
        }
        self.held.retain(|h| h.ct != name);
        self.cts.remove(&name);
        self.touched.retain(|(ct, _)| *ct != name);
        self.tally.add("removed containers");
        for other in self.cts.keys().cloned().collect::<Vec<_>>() {
            self.touch(&other, None);
        }
        Ok(())
    }

    pub(super) fn sweep(&mut self, ct: u8, store: bool) -> Done {
        let name = self.name(ct);
        let root = self.root.clone();
        if store {
            sweep(&root)?;
        } else {
            let place = World::place(&root, &name)?;
            match self.disks.get(&name) {
                Some(disk) => {
                    let _arranging = disk.arrange();
                    place.sweep()?;
                }
                None => {
                    let _held = place.lock()?;
                    place.sweep()?;
                }
            }
        }
        self.touch_around(&name, None);
        self.shape(&name)
    }

    /// Opens a snapshot for reading.
    pub(super) fn hold(&mut self, ct: u8, node: u16) -> Done {
        let name = self.name(ct);
        let found = self
            .pick(&name, node)
            .filter(|g| !self.cts[&name].node(*g).marked);
        let Some(guid) = found.filter(|_| self.held.len() < 2) else {
            return Ok(());
        };
        let root = self.root.clone();
        let place = World::place(&root, &name)?;
        let opened = root
            .opener()
            .open(&place.source(Some(guid)), &place.open_options(false));
        match opened {
            Err(e) if e.kind() == Kind::InUse && self.is_taken(&name, guid) => {}
            opened => {
                let held = Held {
                    disk: opened?,
                    sectors: self.cts[&name].node(guid).sectors.clone(),
                    ct: name,
                    guid,
                };
                self.compare_held(&held)?;
                self.held.push_back(held);
                self.tally.add("held");
            }
        }
        Ok(())
    }
}
