//! `ploop tracker`: dirty bitmaps of a disk.

use std::path::Path;

use nbd_server::control::model::{Tracker, TrackerChange, TrackerMerge, TrackerStart};
use ploop::Result;

use super::tree::agent;
use crate::args;
use crate::output::{line, print_json, size};

pub(crate) fn tracker(root: &Path, t: &args::Tracker) -> Result<()> {
    let (disk, json) = match t {
        args::Tracker::List(of) => {
            let (agent, name) = agent(root, &of.disk)?;
            let all = agent.trackers(&name)?;
            return match of.json.json {
                true => print_json(&all),
                false => all.iter().try_for_each(|t| show(t, "written")),
            };
        }
        args::Tracker::Start { disk, json, .. }
        | args::Tracker::Stop { disk, json, .. }
        | args::Tracker::Clear { disk, json, .. }
        | args::Tracker::Merge { disk, json, .. } => (disk, json),
    };
    let (agent, container) = agent(root, disk)?;
    let change = |name: &str, change| agent.change_tracker(&container, name, &change);
    let (tracker, what) = match t {
        args::Tracker::List(_) => return Ok(()),
        args::Tracker::Start {
            name, granularity, ..
        } => {
            let request = TrackerStart {
                name: name.clone(),
                granularity: *granularity,
            };
            (agent.start_tracker(&container, &request)?, "written")
        }
        args::Tracker::Stop { name, .. } => (change(name, TrackerChange::Stop)?, "had"),
        args::Tracker::Clear { name, .. } => (change(name, TrackerChange::Clear)?, "had"),
        args::Tracker::Merge { from, into, .. } => {
            let merge = TrackerMerge { from: from.clone() };
            (change(into, TrackerChange::Merge(merge))?, "written")
        }
    };
    match json.json {
        true => print_json(&tracker),
        false => show(&tracker, what),
    }
}

fn show(t: &Tracker, what: &str) -> Result<()> {
    line(format!(
        "{}  {what} {} ({} bytes), {} for a bit, {}",
        t.name,
        size(t.dirty),
        t.dirty,
        size(t.granularity),
        t.id
    ))
}
