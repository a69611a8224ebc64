//! `migrate`, `migrate-receive`.

use std::path::Path;
use std::sync::mpsc;

use nbd_server::control::Agent;
use nbd_server::control::model::{self, Job, JobState, MigrateHolder, MigrationPhase};
use nbd_server::migrate::link::bridge;
use ploop::{Error, Kind, Result};
use snapshots::Root;

use super::frozen::{self, Hooks};
use super::tree::agent;
use crate::args;
use crate::output::{Bar, line, print_json, size};

pub(crate) fn migrate(root: &Path, m: &args::Migrate) -> Result<()> {
    let (agent, name) = agent(root, &m.container)?;
    if let Some(decision) = m.resolve {
        return resolve(&agent, &name, decision, m);
    }
    let Some(dest) = &m.dest else {
        return Err(Error::invalid("a move to where?"));
    };
    let request = model::Migrate {
        to: dest.clone(),
        name: m.name.clone(),
        downtime_ms: u64::try_from(m.downtime.as_millis()).ok(),
        rate: m.rate,
        holder: match (&m.holder, &m.holder_to) {
            (Some(control), Some(to)) => Some(MigrateHolder {
                control: whole(control)?,
                to: to.clone(),
            }),
            _ => None,
        },
        keep: m.keep,
        no_brake: m.no_brake,
        post_copy: m.post_copy,
        freeze: m.hooks.freeze.is_some(),
        // Nobody says it who was killed; the command itself has the time of one.
        freeze_seconds: m
            .hooks
            .freeze
            .as_ref()
            .map(|_| 2 * u64::from(m.hooks.hook_timeout)),
    };
    let bar = Bar::new(!m.json.json);
    let mut follow = |job: &Job| {
        let stage = match job.migration.as_ref().map(|m| (m.phase, m.round)) {
            None | Some((MigrationPhase::Tree, _)) => "tree",
            Some((MigrationPhase::Rounds, 1)) => "round 1",
            Some((MigrationPhase::Rounds, 2)) => "round 2",
            Some((MigrationPhase::Rounds, _)) => "more rounds",
            Some((MigrationPhase::Freeze, _)) => "freeze",
            Some((MigrationPhase::HandOver, _)) => "hand-over",
            Some((MigrationPhase::PostCopy, _)) => "post-copy",
        };
        bar.at(stage, job.done, Some(job.total));
    };
    let job = match Hooks::of(&m.hooks, "The move has ended") {
        Some(hooks) => frozen_move(&agent, &name, &request, hooks)?,
        None => agent.migrate(&name, &request, &mut follow)?,
    };
    drop(bar);
    if m.json.json {
        print_json(&job)?;
    }
    if job.state != JobState::Done {
        let what = format!("{name} was not moved: {}", job.state.name());
        return Err(Error::new(Kind::Io, what).fix("It goes on here"));
    }
    match m.json.json {
        true => Ok(()),
        false => told(&name, dest, &job),
    }
}

fn told(name: &str, dest: &str, job: &Job) -> Result<()> {
    let migration = job.migration.clone().unwrap_or_default();
    let moved = migration.moved.unwrap_or_default();
    line(format!(
        "{name} is at {dest}: {} in {} rounds, the last of {}; its clients waited {:.1} ms",
        size(moved.bytes),
        migration.round,
        size(moved.last),
        moved.gap * 1000.0
    ))
}

fn whole(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).map_err(|e| Error::io("find", path, e))?;
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::invalid("the path is not UTF-8").on(path))
}

/// What a move has come to that waits for its hooks.
enum Stage {
    /// It waits until what is inside is frozen; its job.
    Waits(u64),
    /// The destination has it, and the rest of its data follows.
    Moved,
}

/// A move that waits, before its last rounds, until the user's command has frozen what is inside; that is
/// thawed when the destination has it.
fn frozen_move(
    agent: &Agent,
    name: &str,
    request: &model::Migrate,
    hooks: Hooks<'_>,
) -> Result<Job> {
    std::thread::scope(|scope| {
        let (tells, told) = mpsc::channel();
        let mover = scope.spawn(move || {
            let mut last = MigrationPhase::Tree;
            agent.migrate(name, request, &mut |job| {
                let now = job.migration.as_ref().map_or(last, |m| m.phase);
                let stage = match now {
                    MigrationPhase::Freeze => Stage::Waits(job.id),
                    MigrationPhase::PostCopy => Stage::Moved,
                    _ => return,
                };
                if std::mem::replace(&mut last, now) != now {
                    // Nobody listens to a move that has ended.
                    tells.send(stage).ok();
                }
            })
        });
        let end = || {
            let panicked = |_| Err(Error::new(Kind::Io, "the move panicked"));
            mover.join().unwrap_or_else(panicked)
        };
        // Its end is the channel's.
        let Ok(Stage::Waits(id)) = told.recv() else {
            return end();
        };
        let (mut ended, mut moved) = (Some(end), false);
        let done = frozen::during(
            hooks,
            || {
                agent.migrate_frozen(name)?;
                match (told.recv(), ended.take()) {
                    (Ok(Stage::Moved), end) => {
                        (ended, moved) = (end, true);
                        Ok(None)
                    }
                    (_, Some(end)) => end().map(Some),
                    (_, None) => Err(Error::invalid("a move that ends twice")),
                }
            },
            |job| match job.is_none_or(|job| job.state == JobState::Done) {
                true => "It has moved, as it was after the thaw: consistent as after a power cut. \
                         Give it more time with --hook-timeout"
                    .to_owned(),
                false => "It was not moved; give it more time with --hook-timeout".to_owned(),
            },
        );
        match (done, ended) {
            (Ok(Some(job)), _) => Ok(job),
            (Ok(None), Some(end)) => end(),
            (Ok(None), None) => Err(Error::invalid("a move without an end")),
            (Err(failed), end) => {
                if let Some(end) = end {
                    // What was to be frozen is not: it goes on here. What is said is what failed first.
                    if !moved {
                        agent.cancel(id).ok();
                    }
                    end().ok();
                }
                Err(failed)
            }
        }
    })
}

fn resolve(agent: &Agent, name: &str, decision: args::Resolve, m: &args::Migrate) -> Result<()> {
    let to = model::Resolve {
        decision: match decision {
            args::Resolve::Take => model::Decision::Take,
            args::Resolve::Give => model::Decision::Give,
        },
    };
    let done = agent.migrate_resolve(name, &to)?;
    if m.json.json {
        return print_json(&done);
    }
    let now = match done.owned {
        true => "is this service's",
        false => "is not here any more",
    };
    line(format!(
        "{name} was {}, and {now}. What may be lost: {}",
        done.was, done.lost
    ))
}

pub(crate) fn receive(root: &Path, m: &args::MigrateReceive) -> Result<()> {
    let socket = match &m.socket {
        Some(path) => path.clone(),
        None => Root::open(root, false)?.dir().join("migrate.sock"),
    };
    bridge(&socket)
}
