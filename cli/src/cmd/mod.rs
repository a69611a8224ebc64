//! One file per group of commands.

mod backup;
mod check;
mod check_openvz;
mod compact;
mod demo;
mod df;
mod diff;
mod disk;
mod frozen;
mod hold;
mod migrate;
mod openvz;
mod resize;
mod serve;
mod set;
mod store;
mod stream;
mod tracker;
mod tree;

use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use ploop::descriptor::Guid;
use ploop::disk::open::{Format, OpenOptions, Opener, Source};
use ploop::{Error, Kind, Result};
use snapshots::Root;
use snapshots::place::Place;

use crate::args::{self, Cli, Command};

pub(crate) use check_openvz::{USAGE as OPENVZ_USAGE, asked_for as speaks_openvz};

pub(crate) fn run(cli: &Cli) -> Result<ExitCode> {
    let root = cli.root.as_path();
    match &cli.command {
        Command::Template(t) => store::template(root, t)?,
        Command::Create(c) => store::create(root, c)?,
        Command::List(l) => store::list(root, l)?,
        Command::Rm(r) => store::remove(root, r)?,
        Command::Info(i) => disk::info(root, i)?,
        Command::Set(s) => set::set(root, s)?,
        Command::Df(d) => df::df(root, d)?,
        Command::Compact(c) => compact::compact(root, c)?,
        Command::Resize(r) => resize::resize(root, r)?,
        Command::Snapshot(s) => tree::snapshot(root, s)?,
        Command::Tree(t) => tree::tree(root, t)?,
        Command::Diff(d) => diff::diff(root, d)?,
        Command::Tracker(t) => tracker::tracker(root, t)?,
        Command::Backup(b) => backup::backup(root, b)?,
        Command::Restore(r) => backup::restore(root, r)?,
        Command::Export(e) => tree::export(root, e)?,
        Command::Send(s) => stream::send(root, s)?,
        Command::Receive(r) => stream::receive(root, r)?,
        Command::Migrate(m) => migrate::migrate(root, m)?,
        Command::MigrateReceive(m) => migrate::receive(root, m)?,
        Command::Jobs(j) => tree::jobs(root, j)?,
        Command::SnapshotDelete(n) => tree::openvz_delete(n)?,
        Command::SnapshotSwitch(n) => tree::openvz_switch(n)?,
        Command::SnapshotMerge(m) => tree::openvz_merge(m)?,
        Command::Convert(c) => disk::convert(root, c)?,
        Command::Check(c) => return check::check(root, c),
        Command::Serve(s) => serve::serve(root, s)?,
        Command::Hold(h) => hold::hold(h)?,
        Command::HoldTo(h) => hold::hold_to(h)?,
        Command::Demo(d) => demo::demo(d)?,
        Command::Init(i) => openvz::init(i)?,
        Command::SnapshotList(s) => openvz::snapshot_list(s)?,
        Command::Completions { shell } => {
            let mut out = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "ploop", &mut out);
            crate::output::line(String::from_utf8_lossy(&out).trim_end())?;
        }
        Command::Other(words) => return Err(openvz::refuse(words)),
    }
    Ok(ExitCode::SUCCESS)
}

/// What `text` names, and how to open it: a path wins, then a container of the store. A snapshot is
/// named by its GUID in the result, whatever it was called.
fn locate(root: &Path, text: &str, from: &args::From) -> Result<(Source, OpenOptions)> {
    let (mut source, options) = locate_any(root, text, from)?;
    // A GUID is looked up by the open: it reads nodes that have no name any more, as far as they are
    // whole.
    let named = |s: &mut String| Guid::parse(s).is_err();
    if let Some(snapshot) = source.snapshot.take_if(named) {
        let opener = Opener::host();
        let disk = Place::disk(&opener, &source, &options.allow, true);
        // Of a single image the open says what is wrong with that.
        source.snapshot = Some(match disk {
            Ok(place) => {
                let place = place.called(text.rsplit_once('@').map_or(text, |(disk, _)| disk));
                let found = place.find(&place.descriptor()?, &place.meta()?, &snapshot);
                found?.to_string()
            }
            Err(_) => snapshot,
        });
    }
    Ok((source, options))
}

fn locate_any(root: &Path, text: &str, from: &args::From) -> Result<(Source, OpenOptions)> {
    let opener = Opener::host();
    let mut options = OpenOptions {
        format: from.from.map(|f| match f {
            args::Format::Raw => Format::Raw,
            args::Format::Ploop => Format::Ploop,
            args::Format::Qcow2 => Format::Qcow2,
        }),
        allow: from.allow_dir.clone(),
        ..OpenOptions::default()
    };
    let direct = Source::parse(opener.store().as_ref(), text);
    let (name, snapshot) = text
        .split_once('@')
        .map_or((text, None), |(n, s)| (n, Some(s)));
    match direct {
        Err(e) if e.kind() == Kind::NotFound && snapshots::name::check(name).is_ok() => {
            // No store at all is no better answer than the path's.
            let store = match Root::open(root, false) {
                Err(closed) if closed.kind() == Kind::Permission => return Err(closed),
                Err(_) => return Err(e),
                Ok(store) => store,
            };
            let dir = store.container(name);
            let there = dir.try_exists();
            if !there.map_err(|e| Error::io("look for a container", &dir, e))? {
                if Path::new(text).exists() {
                    return Err(e);
                }
                let what = "no such image, disk directory, descriptor or container";
                return Err(Error::new(Kind::NotFound, what).on(text).fix(format!(
                    "`ploop list` shows the containers of {}",
                    store.dir().display()
                )));
            }
            options.allow.push(store.dir().join("layers"));
            let path = dir.join(ploop::disk::open::DESCRIPTOR);
            let snapshot = snapshot.map(str::to_owned);
            Ok((
                Source {
                    path,
                    descriptor: true,
                    snapshot,
                },
                options,
            ))
        }
        Err(e) => Err(e),
        Ok(source) => {
            let options = options.of_store(opener.store().as_ref(), &source);
            Ok((source, options))
        }
    }
}

/// The store and the name of a source that is a container's directory.
fn container_of(source: &Source) -> Option<(std::path::PathBuf, String)> {
    let real = std::fs::canonicalize(&source.path).ok()?;
    let dir = real.parent().filter(|_| source.descriptor)?;
    let room = dir.parent().filter(|r| r.ends_with("containers"))?;
    let store = room.parent()?;
    let name = dir.file_name()?.to_str()?;
    let is_one = snapshots::name::check(name).is_ok() && Root::open(store, false).is_ok();
    is_one.then(|| (store.to_path_buf(), name.to_owned()))
}
