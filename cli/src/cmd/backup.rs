//! `backup`, `restore`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nbd_server::control::model::{Backup, BackupFormat, BackupRun, BackupStart, JobState};
use ploop::disk::open::Opener;
use ploop::{Error, Kind, Result};
use snapshots::Root;
use snapshots::backup;

use super::frozen::{self, Hooks};
use super::tree::{agent, ended};
use crate::args::{self, BackupTo, NewBackup};
use crate::output::{Bar, age, duration, line, print_json, size, table};

pub(crate) fn backup(root: &Path, b: &args::BackupArgs) -> Result<()> {
    match &b.command {
        Some(args::Backup::Verify { file, json }) => verify(file, *json),
        Some(args::Backup::List(of)) => list(root, &of.disk, of.json),
        None => make(root, &b.new),
    }
}

/// By its whole path: who does the work may have another working directory.
fn whole(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("find", path, e))
}

fn text(path: &Path) -> Result<String> {
    let path = whole(path)?;
    let utf8 = path.to_str().map(str::to_owned);
    utf8.ok_or_else(|| Error::invalid("the path is not UTF-8").on(path))
}

fn make(root: &Path, b: &NewBackup) -> Result<()> {
    let (Some(disk), Some(target)) = (&b.disk, &b.target) else {
        return Err(Error::invalid("a backup of what, and to where?"));
    };
    let (agent, name) = agent(root, disk)?;
    let target = text(target)?;
    // As the service will have it.
    let resolved = resolved(Path::new(&target))?;
    let begun = agent.backups(&name)?;
    let begun = begun.into_iter().find(|p| Path::new(&p.target) == resolved);
    let bar = Bar::new(true);
    if b.abandon {
        let pending = begun.ok_or_else(|| {
            let what = "no backup to this file has begun";
            Error::new(Kind::NotFound, what).on(&target)
        })?;
        let job = agent.abandon_backup(&name, &pending.id, &mut |done, total| {
            bar.at("merge", done, Some(total));
        })?;
        drop(bar);
        return ended(disk, &job, b.json);
    }
    let start = BackupStart {
        target,
        format: match b.to {
            BackupTo::Qcow2 => BackupFormat::Qcow2,
            BackupTo::Raw => BackupFormat::Raw,
            BackupTo::Ploop => BackupFormat::Ploop,
        },
        tracker: b.tracker.clone(),
        granularity: b.granularity,
        since: b.since.clone(),
        base: b.base.as_deref().map(text).transpose()?,
        content: b.content,
    };
    let begin = || agent.begin_backup(&name, &start);
    let drop_it = |begun: Backup| {
        let job = agent.abandon_backup(&name, &begun.id, &mut |_, _| ())?;
        match job.state {
            JobState::Done => Ok(()),
            _ => Err(Error::new(Kind::Io, job.message.unwrap_or_default())),
        }
    };
    let late = |begun: Backup| match drop_it(begun) {
        Ok(()) => "The backup was dropped; give it more time with --hook-timeout".to_owned(),
        Err(e) => format!(
            "Drop the backup with --abandon, which failed here ({e}); give it more time with \
             --hook-timeout"
        ),
    };
    let done = "The backup has begun: the same command goes on with it, and --abandon drops it";
    let pending = match Hooks::of(&b.hooks, done) {
        // One that goes on has its instant behind it.
        Some(hooks) if begun.is_none() => frozen::during(hooks, begin, late)?,
        Some(_) => {
            let pending = begin()?;
            if !pending.resumed {
                drop_it(pending)?;
                let what = "the backup that was to go on is gone, and nothing was frozen";
                return Err(Error::new(Kind::InUse, what).fix("Run the command again"));
            }
            pending
        }
        None => begin()?,
    };
    let run = BackupRun { rate: b.rate };
    let job = agent.run_backup(&name, &pending.id, &run, &mut |done, total| {
        bar.at("backup", done, Some(total));
    })?;
    drop(bar);
    if b.json.json {
        print_json(&job)?;
    }
    if job.state != JobState::Done {
        let what = format!("the backup is not whole, it is {}", job.state.name());
        let how = job.message.unwrap_or_default();
        return Err(Error::new(Kind::Io, what).on(&pending.target).fix(how));
    }
    if b.json.json {
        return Ok(());
    }
    told(&pending, job.message.as_deref().unwrap_or_default())
}

fn resolved(target: &Path) -> Result<PathBuf> {
    let name = target.file_name();
    let name = name.ok_or_else(|| Error::invalid("not the name of a file").on(target))?;
    let dir = target.parent().unwrap_or(Path::new("/"));
    let dir = dir
        .canonicalize()
        .map_err(|e| Error::io("find the directory of", target, e))?;
    Ok(dir.join(name))
}

fn told(pending: &Backup, message: &str) -> Result<()> {
    let what = match (&pending.base, pending.resumed) {
        (_, true) => "gone on with",
        (Some(_), _) => "an increment",
        (None, _) => "full",
    };
    let pause = duration(Duration::from_secs_f64(pending.pause));
    line(format!(
        "{}: {what}, {message}; writers waited {pause}",
        pending.target
    ))?;
    match &pending.base {
        Some(base) => line(format!("  stands on {base}")),
        None => Ok(()),
    }
}

fn list(root: &Path, disk: &str, json: args::Json) -> Result<()> {
    let (agent, name) = agent(root, disk)?;
    let all = agent.backups(&name)?;
    if json.json {
        return print_json(&all);
    }
    let rows = all.into_iter().map(|b| {
        vec![
            b.target,
            age(b.time),
            b.tracker.unwrap_or_else(|| "-".into()),
            b.base.unwrap_or_else(|| "-".into()),
        ]
    });
    table(&["TARGET", "AGE", "TRACKER", "STANDS ON"], rows.collect())
}

fn verify(file: &Path, json: args::Json) -> Result<()> {
    let bar = Bar::new(true);
    let progress = |done, total| bar.at("verify", done, Some(total));
    let found = backup::verify(&Opener::host(), file, &progress)?;
    drop(bar);
    if json.json {
        print_json(&found)?;
    } else {
        for f in &found.files {
            let state = f.wrong.as_deref().unwrap_or("sound");
            line(format!("{}: {state}", f.file.display()))?;
        }
    }
    match found.files.iter().find(|f| f.wrong.is_some()) {
        None => Ok(()),
        Some(bad) => Err(Error::corrupt("the backup is damaged")
            .on(&bad.file)
            .fix("What stands on it is not to be trusted either; make a full one")),
    }
}

pub(crate) fn restore(root: &Path, r: &args::Restore) -> Result<()> {
    let name = r.name.as_deref().unwrap_or_default();
    snapshots::name::check(name)?;
    let root = Root::open(root, true)?;
    let files = r
        .files
        .iter()
        .map(|f| whole(f))
        .collect::<Result<Vec<_>>>()?;
    let bar = Bar::new(true);
    let began = Instant::now();
    let progress = |done, total| bar.at("restore", done, Some(total));
    let done = backup::restore(&root, name, &files, &progress)?;
    drop(bar);
    if r.json.json {
        return print_json(&done);
    }
    let held = match done.verified {
        true => "as it was recorded",
        false => "nothing was recorded to compare it with",
    };
    line(format!(
        "container {name}: {} of {} in {}, {held}",
        size(done.data),
        size(done.size),
        duration(began.elapsed())
    ))
}
