//! What a service can do. One method per endpoint; all may block, and are called where that hurts
//! nobody else. Errors say what an offline run would say.

use std::fmt::Debug;

use ploop::error::Result;

use super::jobs::{Ended, JobHandle};
use super::model::{
    Backup, BackupRun, BackupStart, Checked, Compact, Container, CreateContainers,
    CreatedContainer, DiskSpace, Export, GroupSnapshot, Limits, LimitsChange, Merge, Migrate,
    Quota, QuotaChange, QuotaNow, Removed, Rename, Resize, Resolve, Resolved, Snapshot,
    SnapshotCreate, SnapshotTaken, Space, Switch, Switched, Template, Tracker, TrackerChange,
    TrackerStart, Tree,
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

    /// Looks whether the disk and all its images are sound, open or not; nobody who uses it is
    /// held up while it is. Error: `InUse` while a job rewrites it.
    fn check(&self, container: &str) -> Result<Checked>;

    /// What a container is charged for, and may be.
    fn quota(&self, container: &str) -> Result<Quota>;

    /// Changes what it may be: in force and durable on return.
    fn quota_change(&self, container: &str, request: &QuotaChange) -> Result<Quota>;

    /// What the containers that are open under a quota take now. Costs no file system call, however
    /// many there are.
    fn quotas(&self) -> Vec<QuotaNow>;

    /// The I/O limits of a container, and what they do.
    fn limits(&self, container: &str) -> Result<Limits>;

    /// Changes them: in force and durable on return.
    fn limits_change(&self, container: &str, request: &LimitsChange) -> Result<Limits>;

    /// The limits of all containers that are or were open, and what the store allows them
    /// together: requests and bytes per second.
    fn all_limits(&self) -> (Vec<Limits>, (u64, u64));

    /// The host's room, where it is looked after.
    fn space(&self) -> Option<Space>;

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

    /// Resizes a container's disk, and what is on it. Error: `InUse` while clients have it.
    fn resize(&self, container: &str, request: &Resize, job: &JobHandle) -> Result<Ended>;

    /// Merges snapshots.
    fn merge(&self, container: &str, request: &Merge, job: &JobHandle) -> Result<Ended>;

    /// Goes on with what earlier merges and deletions of a container left.
    fn go_on(&self, container: &str, job: &JobHandle) -> Result<Ended>;

    /// The trackers of a container, with what they have now.
    fn trackers(&self, container: &str) -> Result<Vec<Tracker>>;

    /// Begins one; durable on return.
    fn tracker_start(&self, container: &str, request: &TrackerStart) -> Result<Tracker>;

    /// Ends, clears or fills one; durable on return.
    fn tracker_change(
        &self,
        container: &str,
        tracker: &str,
        change: &TrackerChange,
    ) -> Result<Tracker>;

    /// Moves a container to another service, under its clients.
    fn migrate(&self, container: &str, request: &Migrate, job: &JobHandle) -> Result<Ended>;

    /// Says that what is inside a container is frozen, to the move that waits for it. Error: `NotFound`
    /// where none does.
    fn migrate_frozen(&self, container: &str) -> Result<()>;

    /// Decides a move whose other side is gone.
    fn migrate_resolve(&self, container: &str, request: &Resolve) -> Result<Resolved>;

    /// The backups of a container that have begun and not ended.
    fn backups(&self, container: &str) -> Result<Vec<Backup>>;

    /// Begins one: its instant is before this returns; durable.
    fn backup_begin(&self, container: &str, request: &BackupStart) -> Result<Backup>;

    /// Copies one that has begun, to its end. The text of `Done` says what it holds.
    fn backup_run(
        &self,
        container: &str,
        backup: &str,
        request: &BackupRun,
        job: &JobHandle,
    ) -> Result<Ended>;

    /// Drops one that has begun: the tracker has its bits again.
    fn backup_abandon(&self, container: &str, backup: &str, job: &JobHandle) -> Result<Ended>;

    /// Where the bytes are that a container takes of its host.
    fn disk_space(&self, container: &str) -> Result<DiskSpace>;

    /// Gives back the space that a container does not need. The text of `Done` says how much.
    fn compact(&self, container: &str, request: &Compact, job: &JobHandle) -> Result<Ended>;

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
