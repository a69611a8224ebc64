//! `set`: what a container may take, changed while it runs; and how `info` shows it.

use std::path::Path;

use nbd_server::control::model::{Limits, LimitsChange, Quota, QuotaChange};
use ploop::{Error, Result};
use serde_json::json;

use crate::args;
use crate::output::{line, print_json, size};

pub(crate) fn set(root: &Path, s: &args::Set) -> Result<()> {
    let l = &s.limits;
    let change = LimitsChange {
        iops: l.iops,
        read_iops: l.read_iops,
        write_iops: l.write_iops,
        bps: l.bps,
        read_bps: l.read_bps,
        write_bps: l.write_bps,
        burst_ms: l.burst,
        priority: l.ioprio,
    };
    if change == LimitsChange::default() && s.quota.is_none() {
        return Err(Error::invalid("nothing is to be set").fix("`ploop set --help` shows what can"));
    }
    // Two requests, each of them all or nothing; the values are checked already.
    let (agent, name) = super::tree::agent(root, &s.disk)?;
    let quota = match s.quota {
        Some(quota) => agent.set_quota(&name, &QuotaChange { quota })?,
        None => agent.quota(&name)?,
    };
    let limits = match change == LimitsChange::default() {
        true => agent.limits(&name),
        false => agent.set_limits(&name, &change),
    };
    let limits = limits.map_err(|e| match s.quota {
        Some(_) => e.while_doing("the quota is set, and the I/O limits are not"),
        None => e,
    })?;
    if s.json.json {
        return print_json(&json!({ "limits": limits, "quota": quota }));
    }
    show_quota(&quota)?;
    show(&limits)
}

/// What the disk that `text` names is charged for, where somebody can tell.
pub(super) fn quota_of(root: &Path, text: &str) -> Option<Quota> {
    let (agent, name) = super::tree::agent(root, text).ok()?;
    agent.quota(&name).ok()
}

/// Prints a charge beside what the host gave.
pub(super) fn show_quota(q: &Quota) -> Result<()> {
    let of = match q.quota {
        0 => "no quota".to_owned(),
        quota => format!("of {} ({quota})", size(quota)),
    };
    line(format!(
        "charge    {} ({} bytes), {of}; on the host {} ({})",
        size(q.charged),
        q.charged,
        size(q.host),
        q.host
    ))
}

/// The limits of the disk that `text` names, where it has some or could.
pub(super) fn limits_of(root: &Path, text: &str) -> Option<Limits> {
    // A disk whose holder does not answer is described without them.
    let (agent, name) = super::tree::agent(root, text).ok()?;
    let limits = agent.limits(&name).ok()?;
    (agent.is_of_store() || rates(&limits).any(|r| r.1 > 0)).then_some(limits)
}

/// Names, rates, and whether they are of bytes.
fn rates(l: &Limits) -> impl Iterator<Item = (&'static str, u64, bool)> {
    [
        ("iops", l.iops, false),
        ("read-iops", l.read_iops, false),
        ("write-iops", l.write_iops, false),
        ("bps", l.bps, true),
        ("read-bps", l.read_bps, true),
        ("write-bps", l.write_bps, true),
    ]
    .into_iter()
}

/// Prints limits, and what they did.
pub(super) fn show(l: &Limits) -> Result<()> {
    let mut words: Vec<String> = rates(l)
        .filter(|r| r.1 > 0)
        .map(|(name, rate, bytes)| match bytes {
            true => format!("{name} {}", size(rate)),
            false => format!("{name} {rate}"),
        })
        .collect();
    match words.is_empty() {
        true => words.push("none".into()),
        false => words.push(format!("burst {} ms", l.burst_ms)),
    }
    line(format!(
        "limits    {}; priority {}",
        words.join(", "),
        l.priority
    ))?;
    if l.throttled_requests + l.waiting == 0 {
        return Ok(());
    }
    line(format!(
        "throttled {} requests, {:.1} s together; {} wait now",
        l.throttled_requests, l.throttled_seconds, l.waiting
    ))
}
