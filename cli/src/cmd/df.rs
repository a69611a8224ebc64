//! `ploop df`.

use std::path::Path;

use nbd_server::control::model::DiskSpace;
use ploop::Result;
use serde::Serialize;
use snapshots::space::{StoreSpace, of_store};
use snapshots::{Root, list};

use super::tree::agent;
use crate::args;
use crate::output::{line, print_json, size, table};

#[derive(Serialize)]
struct Said {
    disks: Vec<DiskSpace>,
    /// Of the store, when all of it was asked for.
    store: Option<StoreSpace>,
}

pub(crate) fn df(root: &Path, d: &args::Df) -> Result<()> {
    let (mut names, mut store) = (d.disks.clone(), None);
    if names.is_empty() {
        let root = Root::open(root, false)?;
        names = list::containers(&root)?
            .into_iter()
            .map(|c| c.name)
            .collect();
        store = Some(of_store(&root)?);
    }
    // One that is damaged or just removed hides no other.
    let (mut disks, mut failed) = (Vec::with_capacity(names.len()), Ok(()));
    for name in &names {
        let asked = agent(root, name).and_then(|(agent, called)| agent.disk_space(&called));
        match asked {
            Ok(space) => disks.push(space),
            Err(e) if failed.is_ok() => failed = Err(e),
            Err(e) => tracing::warn!(disk = name, error = %e, "not counted"),
        }
    }
    if d.json.json {
        print_json(&Said { disks, store })?;
        return failed;
    }
    let head = [
        "DISK",
        "HOST",
        "DATA",
        "SNAPSHOTS",
        "UNNAMED",
        "METADATA",
        "ROOM",
        "SHARED",
    ];
    let row = |s: &DiskSpace| {
        let numbers = [
            s.host,
            s.data,
            s.snapshots,
            s.unnamed,
            s.metadata,
            s.room,
            s.shared,
        ];
        let mut row = vec![s.container.clone()];
        row.extend(numbers.map(size));
        row
    };
    table(&head, disks.iter().map(row).collect())?;
    if let Some(s) = store {
        line(format!(
            "store: {} of the host: containers {}, layers {}, templates {}, work {}, other {}",
            size(s.host),
            size(s.containers),
            size(s.layers),
            size(s.templates),
            size(s.work),
            size(s.other)
        ))?;
    }
    failed
}
