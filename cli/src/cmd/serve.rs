//! `serve`: one disk, or a store.

use std::path::Path;
use std::sync::Arc;

use nbd_server::export::{Exports, Single, StoreExports};
use nbd_server::{Config, Server};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::{Error, Result};
use snapshots::Root;

use crate::args;
use crate::output::line;

pub(crate) fn serve(root: &Path, s: &args::Serve) -> Result<()> {
    raise_file_limit();
    match &s.source {
        None => {
            let root = Root::open(root, false)?;
            // One that we may not read is refused before anybody connects.
            snapshots::list::names(&root)?;
            run(Arc::new(StoreExports::new(root, s.read_only)), s)
        }
        Some(text) => {
            let (source, options) = super::locate(root, text, &s.from)?;
            let write = !s.read_only && source.snapshot.is_none();
            let options = OpenOptions { write, ..options };
            let disk = Arc::new(Opener::host().open(&source, &options)?);
            let name = s.name.clone().unwrap_or_else(|| export_name(&source));
            let description = source.path.display().to_string();
            let device: Arc<dyn Device> = disk.clone();
            let served = Single::new(device, name, description).and_then(|e| run(Arc::new(e), s));
            // The mark is cleared whatever ended the service; a latched disk keeps it.
            close(&disk, served)
        }
    }
}

fn close(disk: &Disk, served: Result<()>) -> Result<()> {
    let closed = disk.close();
    served.and(closed)
}

fn run(exports: Arc<dyn Exports>, s: &args::Serve) -> Result<()> {
    let mut server = Server::new(exports, Config::default());
    let mut places = Vec::new();
    if let Some(path) = &s.socket {
        server.listen_unix(path)?;
        places.push(path.display().to_string());
    }
    if let Some(address) = &s.listen {
        let bound = server.listen_tcp(address, s.insecure_listen)?;
        places.extend(bound.iter().map(ToString::to_string));
    }
    if s.activation && server.listen_activated(s.insecure_listen)? == 0 {
        return Err(Error::invalid(
            "--activation: systemd passed no sockets (LISTEN_FDS)",
        ));
    }
    server.run_ready(|| {
        places
            .iter()
            .try_for_each(|p| line(format!("listening on {p}")))
    })
}

/// A container's name, or the file's: `…/NAME/DiskDescriptor.xml`, `…/NAME.hds`.
fn export_name(source: &Source) -> String {
    let real = std::fs::canonicalize(&source.path).unwrap_or_else(|_| source.path.clone());
    let named = match source.descriptor {
        true => real.parent().and_then(Path::file_name),
        false => real.file_stem(),
    };
    let name = named
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    match &source.snapshot {
        Some(snapshot) => format!("{name}@{snapshot}"),
        None => name,
    }
}

/// A store can have thousands of disks open, two files each.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(e) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(error = %e, "the limit of open files stays as it is");
    }
}
