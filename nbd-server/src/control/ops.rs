//! What a service can do. One method per endpoint; all may block, and are called where that hurts
//! nobody else. Errors say what an offline run would say.

use std::fmt::Debug;

use ploop::error::Result;

use super::jobs::{Ended, JobHandle};
use super::model::{
    Container, CreateContainers, CreatedContainer, Export, GroupSnapshot, Merge, Removed, Rename,
    Snapshot, SnapshotCreate, SnapshotTaken, Switch, Switched, Template, Tree,
};

/// The operations of a service on its store. `container` is a container's name, `snapshot` a GUID
/// or a snapshot's name, both as the user wrote them: unchecked.
///
/// Where a [`JobHandle`] is given, the operation reports its progress there, looks at
/// [`JobHandle::cancelled`] often, and throttles itself by [`JobHandle::sleep`].
pub trait Operations: Send + Sync + Debug {
    /// What clients can open. [`Export::clients`] is filled in by the caller.
    fn exports(&self) -> Result<Vec<Export>>;

    /// Disks that are open now.
    fn open_disks(&self) -> usize;

    /// All containers; a damaged one with its error.
    fn containers(&self) -> Result<Vec<Container>>;

    /// One container.
    fn container(&self, container: &str) -> Result<Container>;

    /// Makes containers: all of them, durable together, or none.
    fn create_containers(&self, request: &CreateContainers) -> Result<Vec<CreatedContainer>>;

    /// Removes a container; with `force`, one that clients use, by ending their connections.
    fn remove_container(&self, container: &str, force: bool) -> Result<Removed>;

    /// The whole tree, with sizes.
    fn tree(&self, container: &str) -> Result<Tree>;

    /// The snapshots of a container.
    fn snapshots(&self, container: &str) -> Result<Vec<Snapshot>>;

    /// Makes a snapshot; durable on return.
    fn snapshot_create(&self, container: &str, request: &SnapshotCreate) -> Result<SnapshotTaken>;

    /// Makes snapshots of several containers at one instant; durable on return.
    fn snapshot_group(&self, request: &GroupSnapshot) -> Result<Vec<SnapshotTaken>>;

    /// Changes a snapshot's name or description.
    fn snapshot_rename(
        &self,
        container: &str,
        snapshot: &str,
        request: &Rename,
    ) -> Result<Snapshot>;

    /// Deletes a snapshot. The text of `Done` says what was freed.
    fn snapshot_delete(&self, container: &str, snapshot: &str, job: &JobHandle) -> Result<Ended>;

    /// Makes a container's disk what it was at a snapshot.
    fn switch(&self, container: &str, request: &Switch) -> Result<Switched>;

    /// Merges snapshots.
    fn merge(&self, container: &str, request: &Merge, job: &JobHandle) -> Result<Ended>;

    /// Goes on with what earlier merges and deletions of a container left.
    fn go_on(&self, container: &str, job: &JobHandle) -> Result<Ended>;

    /// All templates.
    fn templates(&self) -> Result<Vec<Template>>;

    /// One template.
    fn template(&self, template: &str) -> Result<Template>;

    /// Removes a template that nobody uses.
    fn template_remove(&self, template: &str) -> Result<Removed>;

    /// Compares a template with the hash recorded at its import.
    fn template_verify(&self, template: &str, job: &JobHandle) -> Result<Ended>;

    /// Makes a template's chain one layer.
    fn template_flatten(&self, template: &str, job: &JobHandle) -> Result<Ended>;
}
