//! The model: a container is a list of snapshots and a top, and each of them is a list of sectors.

use std::collections::{BTreeMap, BTreeSet};

use ploop::descriptor::Guid;

use super::SECTORS;

/// What a disk reads, sector by sector: who wrote it, or 0.
pub type Sectors = Vec<u32>;

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name in the tree.
    pub guid: Guid,
    /// None: it is a base.
    pub parent: Option<Guid>,
    /// What people call it.
    pub name: Option<String>,
    /// What it reads.
    pub sectors: Sectors,
    /// It was deleted, and is still needed.
    pub marked: bool,
    /// Its image is a layer of the store.
    pub shared: bool,
    /// Its image is a raw base.
    pub raw: bool,
}

/// A container.
#[derive(Clone, Debug, Default)]
pub struct Ct {
    /// In the order in which they were made.
    pub nodes: Vec<Node>,
    /// What the top stands on.
    pub parent: Option<Guid>,
    /// What the top reads.
    pub top: Sectors,
    /// What a kill cannot take away.
    pub durable: Sectors,
    /// What may be there instead, by sector.
    pub since: BTreeMap<usize, Vec<u32>>,
}

/// Who stands on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Child {
    /// The top.
    Top,
    /// A snapshot.
    Node(Guid),
}

impl Ct {
    /// A container whose top reads like this.
    pub fn new(top: Sectors) -> Ct {
        Ct {
            durable: top.clone(),
            top,
            ..Ct::default()
        }
    }

    /// A node. Panics without it.
    pub fn node(&self, guid: Guid) -> &Node {
        self.nodes.iter().find(|n| n.guid == guid).unwrap()
    }

    pub(super) fn node_mut(&mut self, guid: Guid) -> &mut Node {
        self.nodes.iter_mut().find(|n| n.guid == guid).unwrap()
    }

    /// Whether there is such a node.
    pub fn has(&self, guid: Guid) -> bool {
        self.nodes.iter().any(|n| n.guid == guid)
    }

    /// Who stands on `guid`.
    pub fn children(&self, guid: Guid) -> Vec<Child> {
        let on = |n: &&Node| n.parent == Some(guid);
        let mut all: Vec<Child> = self
            .nodes
            .iter()
            .filter(on)
            .map(|n| Child::Node(n.guid))
            .collect();
        if self.parent == Some(guid) {
            all.push(Child::Top);
        }
        all
    }

    /// The nodes below `from`, itself included, from above.
    pub fn chain(&self, from: Option<Guid>) -> Vec<Guid> {
        let mut all = Vec::new();
        let mut at = from;
        while let Some(guid) = at {
            all.push(guid);
            at = self.node(guid).parent;
        }
        all
    }

    /// Images in the chain of the top.
    pub fn depth(&self) -> usize {
        self.chain(self.parent).len() + 1
    }

    /// Whether a node with one child can be merged with it: the child's file is written.
    pub fn mergeable(&self, guid: Guid) -> bool {
        match self.children(guid)[..] {
            [Child::Top] => true,
            [Child::Node(child)] => !self.node(child).shared,
            _ => false,
        }
    }

    /// The nodes that wait and can go now.
    pub fn waiting(&self) -> Vec<Guid> {
        let goes =
            |n: &&Node| n.marked && (self.children(n.guid).is_empty() || self.mergeable(n.guid));
        self.nodes.iter().filter(goes).map(|n| n.guid).collect()
    }

    /// Takes a node out; who stood on it stands on its parent.
    pub fn remove(&mut self, guid: Guid) {
        let parent = self.node(guid).parent;
        for node in self.nodes.iter_mut().filter(|n| n.parent == Some(guid)) {
            node.parent = parent;
        }
        if self.parent == Some(guid) {
            self.parent = parent;
        }
        self.nodes.retain(|n| n.guid != guid);
    }

    /// All that waits goes; those that went.
    pub fn settle(&mut self) -> Vec<Guid> {
        let mut gone = Vec::new();
        while let Some(&guid) = self.waiting().first() {
            self.remove(guid);
            gone.push(guid);
        }
        gone
    }

    /// The top becomes a node.
    pub fn push(&mut self, guid: Guid, name: Option<String>) {
        self.nodes.push(Node {
            guid,
            parent: self.parent,
            name,
            sectors: self.top.clone(),
            marked: false,
            shared: false,
            raw: false,
        });
        self.parent = Some(guid);
        self.flushed();
    }

    /// All that was written is durable.
    pub fn flushed(&mut self) {
        self.since.clear();
        self.durable.clone_from(&self.top);
    }

    /// A sector was written.
    pub fn write(&mut self, sector: usize, value: u32) {
        self.top[sector] = value;
        self.since.entry(sector).or_default().push(value);
    }

    /// What may be in a sector of the top after a kill.
    pub fn may_be(&self, sector: usize, value: u32) -> bool {
        let written = self.since.get(&sector);
        self.durable[sector] == value || written.is_some_and(|all| all.contains(&value))
    }

    /// What the top reads after a kill.
    pub fn survived(&mut self, found: Sectors) {
        self.top = found;
        self.flushed();
    }

    /// Names that are taken.
    pub fn names(&self) -> BTreeSet<&str> {
        let visible = self.nodes.iter().filter(|n| !n.marked);
        visible.filter_map(|n| n.name.as_deref()).collect()
    }

    /// What the chain of `on` looks like to a clone, and the clone's top.
    pub fn cloned(&self, on: Guid) -> Ct {
        let chain = self.chain(Some(on));
        let node = |guid: &Guid| Node {
            name: None,
            marked: false,
            shared: true,
            ..self.node(*guid).clone()
        };
        let mut ct = Ct::new(self.node(on).sectors.clone());
        ct.nodes = chain.iter().rev().map(node).collect();
        ct.parent = Some(on);
        ct
    }
}

/// A disk of zeros.
pub fn empty() -> Sectors {
    vec![0; SECTORS]
}
