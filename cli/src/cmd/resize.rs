//! `resize`.

use std::path::Path;

use nbd_server::control::model::{Resize, Resized};
use ploop::Result;
use ploop::store::SECTOR;

use crate::args;
use crate::output::{Bar, line, print_json, size};

pub(crate) fn resize(root: &Path, r: &args::Resize) -> Result<()> {
    let request = Resize {
        size: match (r.size, r.sectors) {
            (Some(bytes), _) => bytes,
            (None, sectors) => sectors.unwrap_or_default().saturating_mul(SECTOR),
        },
        shrink: r.shrink,
        flatten: r.flatten,
        no_filesystem: r.no_filesystem,
    };
    let (agent, name) = super::tree::agent(root, &r.disk)?;
    let bar = Bar::new(true);
    let job = agent.resize(&name, &request, &mut |done, total| {
        bar.at("resize", done, Some(total));
    })?;
    drop(bar);
    let Some(done) = &job.resized else {
        // Cancelled by somebody else.
        return super::tree::ended(&r.disk, &job, r.json);
    };
    if r.json.json {
        return print_json(done);
    }
    show(&r.disk, done)
}

fn show(disk: &str, r: &Resized) -> Result<()> {
    let inside = match (r.filesystem, &r.reason) {
        (Some(bytes), _) => format!("; its filesystem has {}", size(bytes)),
        (None, Some(why)) => format!("; only the disk: {why}"),
        (None, None) => "; only the disk".to_owned(),
    };
    let (now, before) = (size(r.size), size(r.before));
    line(format!("{disk}: {now} ({}), from {before}{inside}", r.size))?;
    r.note.as_ref().map_or(Ok(()), line)
}
