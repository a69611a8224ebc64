//! Which snapshots of a disk read an image: its own node, and all that lie on it.

use std::collections::HashMap;

use ploop::descriptor::{Descriptor, Guid};

use crate::report::{Owners, SNAPSHOTS_MAX};

/// The tree of a disk, downside up.
pub(crate) struct Family {
    children: HashMap<Guid, Vec<Guid>>,
    /// How many nodes read each image.
    sizes: HashMap<Guid, u64>,
    /// Nodes whose parent is in a parent volume.
    outer: Vec<Guid>,
}

impl Family {
    /// Of a descriptor that was parsed: its parents form no cycle.
    pub(crate) fn of(d: &Descriptor) -> Family {
        let mut children: HashMap<Guid, Vec<Guid>> = HashMap::new();
        let known: std::collections::HashSet<Guid> = d.shots.iter().map(|s| s.guid).collect();
        for shot in &d.shots {
            children.entry(shot.parent).or_default().push(shot.guid);
        }
        let outside = |s: &&ploop::descriptor::Shot| !known.contains(&s.parent);
        let roots: Vec<Guid> = d.shots.iter().filter(outside).map(|s| s.guid).collect();
        let mut order = roots;
        let mut next = 0;
        while let Some(guid) = order.get(next) {
            order.extend(
                children
                    .get(guid)
                    .into_iter()
                    .flatten()
                    .copied()
                    .collect::<Vec<_>>(),
            );
            next += 1;
        }
        let mut sizes: HashMap<Guid, u64> = HashMap::new();
        for guid in order.iter().rev() {
            let above = children.get(guid).into_iter().flatten();
            let count = above.filter_map(|c| sizes.get(c)).sum::<u64>();
            sizes.insert(*guid, count + 1);
        }
        let foreign = d
            .shots
            .iter()
            .filter(|s| outside(s) && s.parent != Guid::NONE);
        let outer = foreign.map(|s| s.guid).collect();
        Family {
            children,
            sizes,
            outer,
        }
    }

    /// The nodes that read the image of `guid`; of a parent volume's, when it is `None`.
    pub(crate) fn owners(&self, guid: Option<Guid>) -> Owners {
        let mut first = match guid {
            Some(guid) => vec![guid],
            None => self.outer.clone(),
        };
        let all: u64 = first.iter().filter_map(|g| self.sizes.get(g)).sum();
        let mut next = 0;
        while first.len() < SNAPSHOTS_MAX
            && let Some(at) = first.get(next)
        {
            let above = self.children.get(at).cloned().unwrap_or_default();
            first.extend(above);
            next += 1;
        }
        first.truncate(SNAPSHOTS_MAX);
        Owners {
            more: all.saturating_sub(first.len() as u64),
            first: first.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_read_by_its_node_and_all_above() {
        let mut d = Descriptor::new_single(2048, 2048, false, Guid::TOP, "a").unwrap();
        let guid = |n: u8| Guid::from_bytes([n; 16]);
        for n in 1..=100 {
            d.push_overlay(guid(n), format!("f{n}")).unwrap();
        }
        let family = Family::of(&d);
        let base = family.owners(Some(guid(1)));
        assert_eq!((base.first.len(), base.more), (SNAPSHOTS_MAX, 101 - 64));
        assert_eq!(base.first[..2], [guid(1), guid(2)]);
        let top = family.owners(Some(Guid::TOP));
        assert_eq!((&top.first[..], top.more), (&[Guid::TOP][..], 0));
        assert_eq!(family.owners(None), Owners::default());
    }
}
