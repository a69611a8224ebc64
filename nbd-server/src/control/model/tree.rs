//! Snapshots, the tree that they are in, and what is asked of it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The group that a snapshot was made with, at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupOf {
    /// The same in all of them.
    pub id: String,
    /// Its containers.
    pub members: Vec<String>,
    /// Each of them has its snapshot: it was not cut half-way, and none was deleted since.
    pub whole: bool,
}

/// A snapshot of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Its GUID.
    pub guid: String,
    /// Its name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default)]
    pub description: String,
    /// When it was made, if that is known.
    #[serde(default)]
    pub created: Option<u64>,
    /// The snapshot below.
    #[serde(default)]
    pub parent: Option<String>,
    /// The live disk stands on it.
    pub current: bool,
    /// It is being removed.
    #[serde(default)]
    pub temporary: bool,
    /// The group that it was made with, if it was.
    #[serde(default)]
    pub group: Option<GroupOf>,
}

/// A snapshot that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotTaken {
    /// Of which container.
    pub container: String,
    /// Its GUID.
    pub guid: String,
    /// Its name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// How long writers had to wait, in seconds.
    pub pause: f64,
    /// Images from base to top, now.
    pub depth: u64,
    /// What the user should know.
    #[serde(default)]
    pub note: Option<String>,
}

/// A container's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tree {
    /// The container.
    pub container: String,
    /// Its nodes, parents before children.
    pub nodes: Vec<Node>,
}

/// A node of a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its GUID.
    pub guid: String,
    /// Its name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default)]
    pub description: String,
    /// When it was made, if that is known.
    #[serde(default)]
    pub created: Option<u64>,
    /// The node below.
    #[serde(default)]
    pub parent: Option<String>,
    /// It is the live disk.
    pub top: bool,
    /// It is kept only because others stand on it, or is being removed.
    #[serde(default)]
    pub hidden: bool,
    /// Its image's file.
    pub file: String,
    /// Other disks use its image too.
    pub shared: bool,
    /// Bytes that only this node's disk uses.
    pub exclusive_bytes: u64,
    /// Bytes that other disks use too.
    pub shared_bytes: u64,
    /// Bytes that deleting the node gives back.
    pub freed_if_deleted: u64,
}

/// To make a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Its name; unique in the container.
    #[serde(default)]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default)]
    pub description: String,
}

/// To make snapshots of several containers at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupSnapshot {
    /// The containers.
    pub containers: Vec<String>,
    /// The name of each.
    #[serde(default)]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default)]
    pub description: String,
}

/// To switch a container to a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// GUID or name of the snapshot.
    pub snapshot: String,
    /// Throw away what was written since the last snapshot, instead of keeping it.
    #[serde(default)]
    pub discard: bool,
    /// End the connections of the clients that use it.
    #[serde(default)]
    pub force: bool,
}

/// What a switch did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Switched {
    /// GUID of the snapshot that the live disk now stands on.
    pub snapshot: String,
    /// GUID of the snapshot that keeps what was abandoned.
    #[serde(default)]
    pub kept: Option<String>,
    /// Connections that were ended.
    #[serde(default)]
    pub ended: u64,
    /// What the user should know.
    #[serde(default)]
    pub note: Option<String>,
}

/// To merge a node with its parent, which goes, or with all of its chain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// GUID or name of the node; the live disk when not given.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// Merge all, down to the base.
    #[serde(default)]
    pub all: bool,
    /// Only go on with what was begun before.
    #[serde(default)]
    pub go_on: bool,
    /// Bytes per second at most.
    #[serde(default)]
    pub rate: Option<u64>,
}

/// To change what a snapshot is called; what is missing stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rename {
    /// Its new name; the empty one takes the name away.
    #[serde(default)]
    pub name: Option<String>,
    /// Its new description.
    #[serde(default)]
    pub description: Option<String>,
}

impl From<snapshots::tree::Snapshot> for Snapshot {
    fn from(s: snapshots::tree::Snapshot) -> Snapshot {
        Snapshot {
            guid: s.guid,
            name: s.name,
            description: s.description,
            created: Some(s.created).filter(|c| *c > 0),
            parent: s.parent,
            current: s.current,
            temporary: false,
            group: s.group.map(|g| GroupOf {
                id: g.id,
                members: g.members,
                whole: false,
            }),
        }
    }
}

impl From<snapshots::tree::Node> for Node {
    fn from(n: snapshots::tree::Node) -> Node {
        Node {
            guid: n.guid,
            name: n.name,
            description: n.description,
            created: Some(n.created).filter(|c| *c > 0),
            parent: n.parent,
            top: n.top,
            hidden: n.hidden,
            file: n.file,
            shared: n.references.is_some(),
            exclusive_bytes: n.exclusive,
            shared_bytes: n.shared,
            freed_if_deleted: n.freed_if_deleted.unwrap_or(0),
        }
    }
}
