//! One file per group of commands.

mod demo;
mod disk;
mod openvz;
mod serve;
mod store;

use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use ploop::disk::open::{Format, OpenOptions, Opener, Source};
use ploop::{Error, Kind, Result};
use snapshots::Root;

use crate::args::{self, Cli, Command};

pub(crate) fn run(cli: &Cli) -> Result<ExitCode> {
    let root = cli.root.as_path();
    match &cli.command {
        Command::Template(t) => store::template(root, t)?,
        Command::Create(c) => store::create(root, c)?,
        Command::List(j) => store::list(root, *j)?,
        Command::Rm(r) => store::remove(root, r)?,
        Command::Info(i) => disk::info(root, i)?,
        Command::Convert(c) => disk::convert(root, c)?,
        Command::Check(c) => return disk::check(root, c),
        Command::Serve(s) => serve::serve(root, s)?,
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

/// What `text` names, and how to open it: a path wins, then a container of the store.
fn locate(root: &Path, text: &str, from: &args::From) -> Result<(Source, OpenOptions)> {
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
            allow_own_store(&source, &mut options);
            Ok((source, options))
        }
    }
}

/// A disk directory that lies in a store (`ROOT/containers/NAME`) may use that store's layers.
fn allow_own_store(source: &Source, options: &mut OpenOptions) {
    let Ok(real) = std::fs::canonicalize(&source.path) else {
        return;
    };
    let mut up = real.ancestors().skip(2);
    let (room, store) = (up.next(), up.next());
    let in_room = room
        .and_then(Path::file_name)
        .is_some_and(|r| r == "containers" || r == "templates");
    if let Some(store) = store
        && source.descriptor
        && in_room
        && Root::open(store, false).is_ok()
    {
        options.allow.push(store.join("layers"));
    }
}
