//! Operations that do nothing, visibly. A container named like a kind of error fails with it.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use ploop::error::{Error, Kind, Result};

use crate::control::model::*;
use crate::control::{Ended, JobHandle, Operations};

pub(super) const STEPS: u64 = 3;

#[derive(Debug, Default)]
pub(super) struct Fake {
    /// Steps that the test allows, and whether somebody waits for one.
    steps: Mutex<(u64, bool)>,
    changed: Condvar,
}

/// The failure of that kind, with all that an error can have.
pub(super) fn failure(kind: &str) -> Error {
    let os = std::io::Error::from_raw_os_error;
    let e = match kind {
        "not-found" => Error::new(Kind::NotFound, "no such thing"),
        "exists" => Error::new(Kind::Exists, "is there: already").on("/a/b"),
        "corrupt" => Error::corrupt("not so").on("/a/b.hds").at(4096),
        "in-use" => Error::new(Kind::InUse, "held by 7").caused_by("because"),
        "no-space" => Error::io("write", "/a/b.hds", os(28)),
        "panic" => panic!("on purpose"),
        _ => Error::io("read", "/a/b.hds", os(5)).at(512),
    };
    e.fix("Do this. Then that")
}

const FAILING: [&str; 7] = [
    "io",
    "not-found",
    "exists",
    "corrupt",
    "in-use",
    "no-space",
    "panic",
];

fn check(name: &str) -> Result<()> {
    match FAILING.contains(&name) {
        true => Err(failure(name)),
        false => Ok(()),
    }
}

fn snapshot(name: &str) -> Snapshot {
    Snapshot {
        guid: "{0}".into(),
        name: Some(name.into()),
        description: String::new(),
        created: Some(1),
        parent: None,
        current: true,
        temporary: false,
        group: None,
    }
}

impl Fake {
    /// Allows one more step.
    pub(super) fn step(&self) {
        self.steps.lock().unwrap().0 += 1;
        self.changed.notify_all();
    }

    pub(super) fn wait_until_stuck(&self) {
        let steps = self.steps.lock().unwrap();
        drop(self.changed.wait_while(steps, |s| !s.1).unwrap());
    }

    fn take_step(&self, patience: Duration) -> bool {
        let mut steps = self.steps.lock().unwrap();
        steps.1 = true;
        self.changed.notify_all();
        let (mut steps, _) = self
            .changed
            .wait_timeout_while(steps, patience, |s| s.0 == 0)
            .unwrap();
        let got = steps.0 > 0;
        steps.0 -= u64::from(got);
        got
    }

    fn taken(&self, container: &str, name: &Option<String>) -> Result<SnapshotTaken> {
        check(container)?;
        if container == "stuck" {
            self.take_step(Duration::from_secs(60));
        }
        Ok(SnapshotTaken {
            container: container.into(),
            guid: "{0}".into(),
            name: name.clone(),
            pause: 0.0005,
            depth: 2,
            note: None,
        })
    }
}

impl Operations for Fake {
    fn exports(&self) -> Result<Vec<Export>> {
        Ok(vec![Export {
            name: "disk".into(),
            kind: ExportKind::Disk,
            open: false,
            clients: 0,
        }])
    }

    fn open_disks(&self) -> usize {
        7
    }

    fn containers(&self) -> Result<Vec<Container>> {
        Ok(vec![self.container("ct")?])
    }

    fn container(&self, container: &str) -> Result<Container> {
        check(container)?;
        Ok(Container {
            name: container.into(),
            ..Container::default()
        })
    }

    fn create_containers(&self, r: &CreateContainers) -> Result<Vec<CreatedContainer>> {
        r.names.iter().try_for_each(|n| check(n))?;
        let made = |n: &String| CreatedContainer {
            name: n.clone(),
            ..CreatedContainer::default()
        };
        Ok(r.names.iter().map(made).collect())
    }

    fn remove_container(&self, container: &str, force: bool) -> Result<Removed> {
        check(container)?;
        Ok(Removed {
            name: container.into(),
            freed: Some(u64::from(force)),
        })
    }

    fn check(&self, container: &str) -> Result<Checked> {
        check(container)?;
        Ok(Checked {
            class: "clean".into(),
            ..Checked::default()
        })
    }

    fn quota(&self, container: &str) -> Result<Quota> {
        self.quota_change(container, &QuotaChange::default())
    }

    fn quota_change(&self, container: &str, request: &QuotaChange) -> Result<Quota> {
        check(container)?;
        Ok(Quota {
            container: container.into(),
            quota: request.quota,
            ..Quota::default()
        })
    }

    fn quotas(&self) -> Vec<QuotaNow> {
        vec![QuotaNow {
            container: "ct".into(),
            charged: 4096,
            quota: 8192,
            refused: 3,
        }]
    }

    fn trackers(&self, container: &str) -> Result<Vec<Tracker>> {
        check(container)?;
        Ok(vec![Tracker::default()])
    }

    fn tracker_start(&self, container: &str, request: &TrackerStart) -> Result<Tracker> {
        check(container)?;
        Ok(Tracker {
            name: request.name.clone(),
            granularity: request.granularity.unwrap_or(5),
            ..Tracker::default()
        })
    }

    fn tracker_change(&self, container: &str, tracker: &str, _: &TrackerChange) -> Result<Tracker> {
        check(container)?;
        Ok(Tracker {
            name: tracker.into(),
            ..Tracker::default()
        })
    }

    fn migrate(&self, container: &str, request: &Migrate, _: &JobHandle) -> Result<Ended> {
        check(container)?;
        Ok(Ended::Done(format!("moved to {}", request.to)))
    }

    fn migrate_frozen(&self, container: &str) -> Result<()> {
        check(container)
    }

    fn migrate_resolve(&self, container: &str, _: &Resolve) -> Result<Resolved> {
        check(container)?;
        Ok(Resolved {
            name: container.to_owned(),
            ..Resolved::default()
        })
    }

    fn backups(&self, container: &str) -> Result<Vec<Backup>> {
        check(container)?;
        Ok(vec![Backup::default()])
    }

    fn backup_begin(&self, container: &str, request: &BackupStart) -> Result<Backup> {
        check(container)?;
        Ok(Backup {
            target: request.target.clone(),
            ..Backup::default()
        })
    }

    fn backup_run(&self, container: &str, _: &str, _: &BackupRun, _: &JobHandle) -> Result<Ended> {
        check(container)?;
        Ok(Ended::Done("copied".into()))
    }

    fn backup_abandon(&self, container: &str, _: &str, _: &JobHandle) -> Result<Ended> {
        check(container)?;
        Ok(Ended::Done("dropped".into()))
    }

    fn limits(&self, container: &str) -> Result<Limits> {
        self.limits_change(container, &LimitsChange::default())
    }

    fn limits_change(&self, container: &str, request: &LimitsChange) -> Result<Limits> {
        check(container)?;
        Ok(Limits {
            container: container.into(),
            iops: request.iops.unwrap_or(0),
            ..Limits::default()
        })
    }

    fn space(&self) -> Option<Space> {
        Some(Space {
            level: "low".into(),
            free: 9,
            waiting: 3,
            reserve_given: 4,
            ..Space::default()
        })
    }

    fn all_limits(&self) -> (Vec<Limits>, (u64, u64)) {
        let limited = Limits {
            container: "ct".into(),
            write_bps: 5,
            throttled_requests: 2,
            throttled_seconds: 0.5,
            ..Limits::default()
        };
        (vec![limited, Limits::default()], (0, 7))
    }

    fn tree(&self, container: &str) -> Result<Tree> {
        check(container)?;
        let nodes = match container {
            "large" => vec![
                Node {
                    description: "x".repeat(1000),
                    ..Node::default()
                };
                20_000
            ],
            _ => vec![Node::default()],
        };
        Ok(Tree {
            container: container.into(),
            nodes,
        })
    }

    fn snapshots(&self, container: &str) -> Result<Vec<Snapshot>> {
        check(container)?;
        Ok(vec![snapshot("s")])
    }

    fn snapshot_create(&self, container: &str, r: &SnapshotCreate) -> Result<SnapshotTaken> {
        self.taken(container, &r.name)
    }

    fn snapshot_group(&self, r: &GroupSnapshot) -> Result<Vec<SnapshotTaken>> {
        let taken = r.containers.iter().map(|c| self.taken(c, &r.name));
        taken.collect()
    }

    fn snapshot_rename(&self, container: &str, name: &str, _: &Rename) -> Result<Snapshot> {
        check(container)?;
        Ok(snapshot(name))
    }

    fn snapshot_delete(&self, container: &str, _: &str, _: &JobHandle) -> Result<Ended> {
        check(container)?;
        Ok(Ended::Done("freed".into()))
    }

    fn switch(&self, container: &str, r: &Switch) -> Result<Switched> {
        check(container)?;
        Ok(Switched {
            snapshot: r.snapshot.clone(),
            ..Switched::default()
        })
    }

    fn resize(&self, container: &str, r: &Resize, job: &JobHandle) -> Result<Ended> {
        check(container)?;
        job.resized(Resized {
            size: r.size,
            ..Resized::default()
        });
        Ok(Ended::Done("resized".into()))
    }

    fn merge(&self, container: &str, _: &Merge, job: &JobHandle) -> Result<Ended> {
        check(container)?;
        let mut done = 0;
        while done < STEPS {
            if job.cancelled() {
                return Ok(Ended::Paused("goes on".into()));
            }
            if self.take_step(Duration::from_millis(10)) {
                done += 1;
                job.progress(done, STEPS);
            }
        }
        Ok(Ended::Done("merged".into()))
    }

    fn go_on(&self, container: &str, _: &JobHandle) -> Result<Ended> {
        check(container)?;
        Ok(Ended::Done("went on".into()))
    }

    fn disk_space(&self, container: &str) -> Result<DiskSpace> {
        check(container)?;
        Ok(DiskSpace {
            container: container.to_owned(),
            ..DiskSpace::default()
        })
    }

    fn compact(&self, container: &str, _: &Compact, _: &JobHandle) -> Result<Ended> {
        check(container)?;
        Ok(Ended::Done("compacted".into()))
    }

    fn templates(&self) -> Result<Vec<Template>> {
        Ok(vec![self.template("t")?])
    }

    fn template(&self, template: &str) -> Result<Template> {
        check(template)?;
        Ok(Template {
            name: template.into(),
            ..Template::default()
        })
    }

    fn template_remove(&self, template: &str) -> Result<Removed> {
        check(template)?;
        Ok(Removed::default())
    }

    /// Works until it is cancelled.
    fn template_verify(&self, template: &str, job: &JobHandle) -> Result<Ended> {
        while !job.cancelled() {
            job.sleep(Duration::from_secs(60));
        }
        Ok(match template {
            "a" => Ended::Cancelled,
            _ => Ended::Paused("goes on".into()),
        })
    }

    fn template_flatten(&self, template: &str, _: &JobHandle) -> Result<Ended> {
        check(template)?;
        Ok(Ended::Done("flat".into()))
    }
}
