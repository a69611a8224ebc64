//! `serve`: one disk, or a store.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbd_server::control::model::Info;
use nbd_server::control::{Control, Service, go_on_with_merges};
use nbd_server::export::{Disks, Exports, Single, space};
use nbd_server::{Config, EngineKind, Server, raise_file_limit};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::{Error, Result};
use snapshots::Root;

use crate::args;
use crate::output::line;

pub(crate) fn serve(root: &Path, s: &args::Serve) -> Result<()> {
    let limit = raise_file_limit();
    let Some(text) = &s.source else {
        let store = Root::open(root, false)?;
        // One that we may not read is refused before anybody connects.
        snapshots::list::names(&store)?;
        let dir = store.dir().to_path_buf();
        let control = s.control.clone().unwrap_or_else(|| free_socket(&dir));
        let opener = Opener::host().with_control(absolute(&control)?);
        let store = Root::on(opener, &dir, false, true)?;
        let disks = Arc::new(Disks::new(store, s.read_only));
        let (iops, bps) = (s.iops.unwrap_or(0), s.bps.unwrap_or(0));
        disks.throttle().set_store(iops, bps);
        disks.watch_space(&s.space)?;
        let served = run_disks(disks.clone(), &absolute(&control)?, Some(&dir), limit, s);
        let closed = disks.wait_all_closed();
        return served.and(closed);
    };
    let (source, options) = super::locate(root, text, &s.from)?;
    let write = !s.read_only && source.snapshot.is_none();
    let options = OpenOptions { write, ..options };
    let name = s.name.clone().unwrap_or_else(|| export_name(&source));
    if !source.descriptor || !write {
        if !s.space.is_default() {
            let what = "room on the host is looked after for stores, containers and disk directories \
                        that are served for writing";
            return Err(Error::unsupported(what)
                .on(&source.path)
                .fix(space::LEAVE_OUT));
        }
        let disk = Arc::new(Opener::host().open(&source, &options)?);
        let description = source.path.display().to_string();
        let device: Arc<dyn Device> = disk.clone();
        let served = Single::new(device, name, description).and_then(|e| run(Arc::new(e), s));
        // The mark is cleared whatever ended the service; a latched disk keeps it.
        return close(&disk, served);
    }
    let real =
        std::fs::canonicalize(&source.path).map_err(|e| Error::io("find", &source.path, e))?;
    let dir = real.parent().unwrap_or(Path::new("/")).to_path_buf();
    let control = absolute(
        &s.control
            .clone()
            .unwrap_or_else(|| dir.join(".ploop/control.sock")),
    )?;
    let opener = Opener::host().with_control(control.clone());
    let disks = match super::container_of(&source) {
        // A container of a store stays one: its layers are the store's.
        Some((store, container)) => {
            let store = Root::on(opener, &store, false, true)?;
            Disks::of_container(store, &container, name)?
        }
        None => Disks::of_disk(opener, name, source, options),
    };
    let disks = Arc::new(disks);
    disks.watch_space(&s.space)?;
    // Open as long as it is served: whoever is refused is told at once, and nobody else takes it.
    let held = disks.keep_open()?;
    let served = run_disks(disks.clone(), &control, None, limit, s);
    let closed = held.disk().close();
    drop(held);
    let all = disks.wait_all_closed();
    served.and(closed).and(all)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("resolve", path, e))
}

/// The store's control socket, or one beside it while another service has that.
fn free_socket(dir: &Path) -> PathBuf {
    let usual = dir.join("control.sock");
    match std::os::unix::net::UnixStream::connect(&usual) {
        Ok(_) => dir.join(format!("control.{}.sock", std::process::id())),
        Err(_) => usual,
    }
}

/// Serves disks, and answers the control API beside it.
fn run_disks(
    disks: Arc<Disks>,
    control: &Path,
    root: Option<&Path>,
    open_files_limit: u64,
    s: &args::Serve,
) -> Result<()> {
    let config = config(s)?;
    let mut server = Server::new(disks.clone(), config);
    let info = Info {
        program: "ploop serve".into(),
        root: root.map(|r| r.display().to_string()),
        read_only: s.read_only,
        open_files_limit,
        ..Info::of_this_process(&config)
    };
    let places = listen(&mut server, s)?;
    let service = Service::of(info, disks.clone(), server.connections(), None);
    let (jobs, operations) = (service.jobs.clone(), service.operations.clone());
    let control = Control::start(control, service)?;
    if let Some(space) = disks.space() {
        space.begin()?;
    }
    go_on_with_merges(&disks, jobs, &operations);
    server.run_until_signal(|| announce(&places), move || control.stop())
}

fn config(s: &args::Serve) -> Result<Config> {
    Ok(Config {
        engine: EngineKind::choose(s.engine)?,
        ..Config::default()
    })
}

fn close(disk: &Disk, served: Result<()>) -> Result<()> {
    let closed = disk.close();
    served.and(closed)
}

fn run(exports: Arc<dyn Exports>, s: &args::Serve) -> Result<()> {
    let mut server = Server::new(exports, config(s)?);
    let places = listen(&mut server, s)?;
    server.run_ready(|| announce(&places))
}

fn announce(places: &[String]) -> Result<()> {
    places
        .iter()
        .try_for_each(|p| line(format!("listening on {p}")))
}

fn listen(server: &mut Server, s: &args::Serve) -> Result<Vec<String>> {
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
    Ok(places)
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
