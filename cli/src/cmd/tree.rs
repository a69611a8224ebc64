//! `snapshot …`, `tree`, `export`, `jobs`, and OpenVZ's verbs for the same.

use std::path::Path;

use nbd_server::control::Agent;
use nbd_server::control::client::resource;
use nbd_server::control::model::{
    GroupSnapshot, Job, Merge, Node, Rename, SnapshotCreate, SnapshotTaken, Switch,
};
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::{Error, Result};
use serde_json::json;
use snapshots::Root;
use snapshots::convert::{self, Target};
use snapshots::place::Place;
use snapshots::snapshot::{NewSnapshot, take_offline};

use crate::args::{self, ExportTo, Snapshot};
use crate::output::{Bar, age, line, print_json, size, table};

/// Nothing is taken for another format in a tree.
pub(super) const PLAIN: args::From = args::From {
    from: None,
    allow_dir: Vec::new(),
};

/// Who works on the disk that `text` names, and what it is called there.
pub(super) fn agent(root: &Path, text: &str) -> Result<(Agent, String)> {
    let (source, options) = super::locate(root, text, &PLAIN)?;
    if source.snapshot.is_some() {
        return Err(Error::invalid(format!(
            "{text:?} is a snapshot: name the disk, and the snapshot on its own"
        )));
    }
    let agent = match super::container_of(&source) {
        Some((store, name)) => Agent::of_store(&store, &[&name])?,
        None => Agent::of_disk(text, source, options)?,
    };
    let name = agent.name().to_owned();
    Ok((agent, name))
}

pub(crate) fn snapshot(root: &Path, s: &args::SnapshotArgs) -> Result<()> {
    match &s.command {
        None => openvz_snapshot(&s.openvz),
        Some(Snapshot::Create {
            disks,
            name,
            description,
            group,
            json,
        }) => create(root, disks, name.as_ref(), description, *group, *json),
        Some(Snapshot::List(of)) => list(root, &of.disk, of.json),
        Some(Snapshot::Switch {
            disk,
            snapshot,
            discard,
            force,
            json,
        }) => {
            let request = Switch {
                snapshot: snapshot.clone(),
                discard: *discard,
                force: *force,
            };
            switch(root, disk, &request, *json)
        }
        Some(Snapshot::Delete {
            disk,
            snapshot,
            json,
        }) => {
            let (agent, name) = agent(root, disk)?;
            let bar = Bar::new(true);
            let job = agent.delete(&name, snapshot, &mut |done, total| {
                bar.at("merge", done, Some(total));
            })?;
            drop(bar);
            ended(&format!("snapshot {snapshot} of {disk}"), &job, *json)
        }
        Some(Snapshot::Merge {
            disk,
            snapshot,
            all,
            go_on,
            rate,
            json,
        }) => {
            let request = Merge {
                snapshot: snapshot.clone(),
                all: *all,
                go_on: *go_on,
                rate: *rate,
            };
            merge(root, disk, &request, *json)
        }
        Some(Snapshot::Rename {
            disk,
            snapshot,
            name,
        }) => rename(root, disk, snapshot, Some(name), None),
        Some(Snapshot::Describe {
            disk,
            snapshot,
            text,
        }) => rename(root, disk, snapshot, None, Some(text)),
    }
}

fn create(
    root: &Path,
    disks: &[String],
    name: Option<&String>,
    description: &str,
    group: bool,
    json: args::Json,
) -> Result<()> {
    let mut taken: Vec<SnapshotTaken> = Vec::new();
    if group {
        for disk in disks {
            snapshots::name::check(disk)
                .map_err(|e| e.fix("A group is of containers of one store, by name"))?;
        }
        let names: Vec<&str> = disks.iter().map(String::as_str).collect();
        let agent = Agent::of_store(root, &names)?;
        taken = agent.snapshot_group(&GroupSnapshot {
            containers: disks.to_vec(),
            name: name.cloned(),
            description: description.to_owned(),
        })?;
    } else {
        for disk in disks {
            let (agent, called) = agent(root, disk)?;
            let new = SnapshotCreate {
                name: name.cloned(),
                description: description.to_owned(),
            };
            taken.push(agent.snapshot_create(&called, &new)?);
        }
    }
    if json.json {
        return print_json(&taken);
    }
    for t in taken {
        let called = t.name.as_deref().unwrap_or(&t.guid);
        let pause = crate::output::duration(std::time::Duration::from_secs_f64(t.pause));
        line(format!(
            "snapshot {}@{called}: writers waited {pause}",
            t.container
        ))?;
        if let Some(note) = t.note {
            line(format!("  {note}"))?;
        }
    }
    Ok(())
}

fn list(root: &Path, disk: &str, json: args::Json) -> Result<()> {
    let (agent, name) = agent(root, disk)?;
    let all = agent.snapshots(&name)?;
    if json.json {
        return print_json(&all);
    }
    let rows = all.into_iter().map(|s| {
        vec![
            if s.current { "*" } else { "" }.into(),
            s.name.unwrap_or_else(|| "-".into()),
            s.guid,
            s.created.map_or_else(|| "-".into(), age),
            s.description,
        ]
    });
    table(&["", "NAME", "GUID", "AGE", "DESCRIPTION"], rows.collect())
}

fn switch(root: &Path, disk: &str, request: &Switch, json: args::Json) -> Result<()> {
    let (agent, name) = agent(root, disk)?;
    let done = agent.switch(&name, request)?;
    if json.json {
        return print_json(&done);
    }
    let kept = match &done.kept {
        Some(kept) => format!("; what it was is kept as {kept}"),
        None => String::new(),
    };
    line(format!("{disk} is as at {}{kept}", request.snapshot))?;
    if done.ended > 0 {
        line(format!("{} connections were ended", done.ended))?;
    }
    done.note.map_or(Ok(()), line)
}

fn merge(root: &Path, disk: &str, request: &Merge, json: args::Json) -> Result<()> {
    let (agent, name) = agent(root, disk)?;
    let bar = Bar::new(true);
    let job = agent.merge(&name, request, &mut |done, total| {
        bar.at("merge", done, Some(total));
    })?;
    drop(bar);
    ended(disk, &job, json)
}

pub(super) fn ended(what: &str, job: &Job, json: args::Json) -> Result<()> {
    if json.json {
        return print_json(job);
    }
    let state = job.state.name();
    match &job.message {
        Some(message) => line(format!("{what}: {state}: {message}")),
        None => line(format!("{what}: {state}")),
    }
}

fn rename(
    root: &Path,
    disk: &str,
    snapshot: &str,
    name: Option<&String>,
    text: Option<&String>,
) -> Result<()> {
    let (agent, called) = agent(root, disk)?;
    let to = Rename {
        name: name.cloned(),
        description: text.cloned(),
    };
    agent.rename(&called, snapshot, &to).map(drop)
}

pub(crate) fn tree(root: &Path, t: &args::Tree) -> Result<()> {
    let (agent, name) = agent(root, &t.disk)?;
    let tree = agent.tree(&name)?;
    if t.json.json {
        return print_json(&tree);
    }
    let mut rows = Vec::new();
    let bases = tree.nodes.iter().filter(|n| {
        let known = |p: &String| tree.nodes.iter().any(|o| o.guid == *p);
        !n.parent.as_ref().is_some_and(known)
    });
    // A tree is drawn without recursion: it may be deeper than a stack.
    let mut todo: Vec<(&Node, String, String)> =
        bases.map(|n| (n, String::new(), String::new())).collect();
    todo.reverse();
    while let Some((node, prefix, below)) = todo.pop() {
        rows.push(row(node, &prefix));
        let children: Vec<&Node> = tree
            .nodes
            .iter()
            .filter(|c| c.parent.as_deref() == Some(&node.guid))
            .collect();
        let last = children.len().saturating_sub(1);
        for (i, child) in children.into_iter().enumerate().rev() {
            // A single line of descent is drawn straight down.
            let (mark, rest) = match (i == last, last) {
                (_, 0) => ("", ""),
                (true, _) => ("└─ ", "   "),
                (false, _) => ("├─ ", "│  "),
            };
            todo.push((child, format!("{below}{mark}"), format!("{below}{rest}")));
        }
    }
    let header = ["NODE", ">EXCLUSIVE", ">SHARED", ">FREED IF DELETED", "AGE"];
    table(&header, rows)
}

fn row(node: &Node, prefix: &str) -> Vec<String> {
    let called = match (&node.name, node.top) {
        (_, true) => "(now)".to_owned(),
        (Some(name), _) => name.clone(),
        (None, _) => node.guid.clone(),
    };
    let marks = match (node.hidden, node.shared) {
        (true, _) => " (being removed)",
        (false, true) => " (layer)",
        (false, false) => "",
    };
    vec![
        format!("{prefix}{called}{marks}"),
        size(node.exclusive_bytes),
        size(node.shared_bytes),
        match node.top {
            true => "-".into(),
            false => size(node.freed_if_deleted),
        },
        node.created.map_or_else(|| "-".into(), age),
    ]
}

pub(crate) fn export(root: &Path, e: &args::Export) -> Result<()> {
    let (source, options) = super::locate(root, &e.disk, &PLAIN)?;
    let opener = Opener::host();
    let bar = Bar::new(true);
    let progress = |done, total| bar.at("copy", done, Some(total));
    let kind = match e.to {
        ExportTo::Disk => None,
        ExportTo::Raw => Some(convert::Kind::Raw),
        ExportTo::Ploop => Some(convert::Kind::Ploop),
        ExportTo::Qcow2 => Some(convert::Kind::Qcow2),
    };
    let (data, virtual_size) = match kind {
        Some(kind) => {
            let target = Target::File(e.target.clone());
            let to = convert::To::from(kind);
            let done = convert::convert(&opener, &source, &options, target, to, &progress)?;
            (done.bytes_written, done.virtual_bytes)
        }
        None => {
            let done = match super::container_of(&source) {
                Some((store, name)) => {
                    let store = Root::open(&store, false)?;
                    let place = Place::container(&store, &name)?;
                    export_disk(&place, &source, e, &progress)?
                }
                None => {
                    let place = Place::disk(&opener, &source, &options.allow, true)?;
                    export_disk(&place, &source, e, &progress)?
                }
            };
            (done.data, done.size)
        }
    };
    drop(bar);
    if e.json.json {
        return print_json(&json!({
            "target": e.target, "data": data, "virtual_size": virtual_size,
        }));
    }
    let target = e.target.display();
    line(format!(
        "{target}: {} of {}",
        size(data),
        size(virtual_size)
    ))
}

fn export_disk(
    place: &Place<'_>,
    source: &Source,
    e: &args::Export,
    progress: &dyn Fn(u64, u64),
) -> Result<snapshots::export::Exported> {
    let node = match &source.snapshot {
        Some(text) => Some(place.find(&place.descriptor()?, &place.meta()?, text)?),
        None => None,
    };
    snapshots::export::export_disk(place, node, &e.target, progress)
}

pub(crate) fn jobs(root: &Path, j: &args::JobsArgs) -> Result<()> {
    let socket = j
        .control
        .clone()
        .unwrap_or_else(|| root.join("control.sock"));
    let agent = Agent::at(&socket)?;
    let Some(client) = agent.client() else {
        return Ok(());
    };
    if let Some(id) = j.cancel {
        let id = id.to_string();
        let job: Job = client.post(&resource(&["jobs", &id, "cancel"]), &json!({}))?;
        return match j.json.json {
            true => print_json(&job),
            false => line(format!("job {}: {}", job.id, job.state.name())),
        };
    }
    let all: Vec<Job> = client.get(&resource(&["jobs"]))?;
    if j.json.json {
        return print_json(&all);
    }
    let rows = all.into_iter().map(|j| {
        let done = match j.total {
            0 => size(j.done),
            total => format!("{} of {}", size(j.done), size(total)),
        };
        let moves = j.migration.filter(|_| !j.state.is_over()).map(|m| {
            let (left, dirty) = (size(m.left), size(m.dirty_rate));
            let ends = m
                .expected
                .map_or("no end in sight".to_owned(), |s| format!("{s:.0} s"));
            format!(
                "{}: round {}, {left} left, {dirty}/s written, {ends}",
                j.what, m.round
            )
        });
        let said = j.error.map(|e| e.text).or(j.message).or(moves);
        let text = said.unwrap_or(j.what);
        vec![
            j.id.to_string(),
            j.kind,
            j.container,
            j.state.name().into(),
            done,
            format!("{}/s", size(j.rate)),
            text,
        ]
    });
    let header = [">JOB", "KIND", "CONTAINER", "STATE", ">DONE", ">RATE", ""];
    table(&header, rows.collect())
}

/// A disk by its descriptor, as OpenVZ's verbs name it.
fn by_descriptor(text: &str) -> Result<(Agent, String)> {
    let opener = Opener::host();
    let source = Source::parse(opener.store().as_ref(), text)?;
    if !source.descriptor {
        return Err(Error::invalid("not a DiskDescriptor.xml").on(&source.path));
    }
    agent(Path::new(snapshots::DEFAULT_ROOT), text)
}

fn openvz_snapshot(s: &args::OpenvzSnapshot) -> Result<()> {
    let text = s.descriptor.as_deref().ok_or_else(|| {
        Error::invalid("what of snapshots?").fix("`ploop snapshot --help` lists it")
    })?;
    let Some(guid) = &s.guid else {
        let (agent, name) = by_descriptor(text)?;
        let taken = agent.snapshot_create(&name, &SnapshotCreate::default())?;
        return line(taken.guid);
    };
    let opener = Opener::host();
    let source = Source::parse(opener.store().as_ref(), text)?;
    let options = OpenOptions::default().of_store(opener.store().as_ref(), &source);
    let place = Place::disk(&opener, &source, &options.allow, true)?;
    let new = NewSnapshot {
        guid: Some(ploop::descriptor::Guid::parse(guid)?),
        ..NewSnapshot::default()
    };
    line(take_offline(&place, &new)?.guid)
}

pub(crate) fn openvz_delete(n: &args::OpenvzNode) -> Result<()> {
    let (agent, name) = by_descriptor(&n.descriptor)?;
    agent.delete(&name, &n.guid, &mut |_, _| ()).map(drop)
}

pub(crate) fn openvz_switch(n: &args::OpenvzNode) -> Result<()> {
    let (agent, name) = by_descriptor(&n.descriptor)?;
    let request = Switch {
        snapshot: n.guid.clone(),
        discard: true,
        force: false,
    };
    agent.switch(&name, &request).map(drop)
}

pub(crate) fn openvz_merge(m: &args::OpenvzMerge) -> Result<()> {
    let (agent, name) = by_descriptor(&m.descriptor)?;
    let request = Merge {
        snapshot: m.guid.clone(),
        all: m.all,
        ..Merge::default()
    };
    agent.merge(&name, &request, &mut |_, _| ()).map(drop)
}
