//! The tree of a disk, looked up quickly: a descriptor may have thousands of nodes.

use std::collections::HashMap;

use ploop::descriptor::{Descriptor, Guid};

/// Nodes named of one step, at most: OpenVZ's tool has no more in a chain.
const READERS_MAX: usize = 128;

/// The tree of a descriptor, for looking things up.
pub(super) struct Tree {
    pub(super) parents: HashMap<Guid, Guid>,
    pub(super) children: HashMap<Guid, Vec<Guid>>,
}

impl Tree {
    pub(super) fn of(d: &Descriptor) -> Tree {
        let parents: HashMap<Guid, Guid> = d.shots.iter().map(|s| (s.guid, s.parent)).collect();
        let mut children: HashMap<Guid, Vec<Guid>> = HashMap::new();
        for shot in &d.shots {
            children.entry(shot.parent).or_default().push(shot.guid);
        }
        Tree { parents, children }
    }

    /// Nodes from every one of `d` to its base. The descriptor has no cycle.
    pub(super) fn depths(&self) -> HashMap<Guid, usize> {
        let mut depths = HashMap::new();
        let base = |g: &Guid| !self.parents.contains_key(&self.parents[g]);
        let mut todo: Vec<(Guid, usize)> = self
            .parents
            .keys()
            .filter(|g| base(g))
            .map(|g| (*g, 0))
            .collect();
        while let Some((guid, depth)) = todo.pop() {
            depths.insert(guid, depth);
            let above = self.children.get(&guid).into_iter().flatten();
            todo.extend(above.map(|g| (*g, depth + 1)));
        }
        depths
    }

    /// The nodes whose chain `guid` is in, itself first; [`READERS_MAX`] at most.
    pub(super) fn readers(&self, guid: Guid) -> Vec<Guid> {
        let (mut out, mut next) = (vec![guid], 0);
        while next < out.len() && out.len() < READERS_MAX {
            out.extend(self.children.get(&out[next]).into_iter().flatten());
            next += 1;
        }
        out.truncate(READERS_MAX);
        out
    }
}
