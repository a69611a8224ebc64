//! `ploop compact`.

use std::path::Path;

use nbd_server::control::model::Compact;
use ploop::Result;

use super::tree::{agent, ended};
use crate::args;
use crate::output::Bar;

pub(crate) fn compact(root: &Path, c: &args::Compact) -> Result<()> {
    let (agent, name) = agent(root, &c.disk)?;
    let request = Compact {
        dry_run: c.dry_run,
        rate: c.rate,
    };
    let bar = Bar::new(true);
    let job = agent.compact(&name, &request, &mut |done, total| {
        bar.at("compact", done, Some(total));
    })?;
    drop(bar);
    ended(&c.disk, &job, c.json)
}
