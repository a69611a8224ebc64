//! `/metrics`, in Prometheus' text format 0.0.4.
//!
//! A series exists for an export that has clients or was used, at most
//! [`REMEMBERED`](crate::serve::traffic::REMEMBERED) of the latter; what was before them is added
//! up under one name, so that sums never go back.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::model::{JobState, Limits, QuotaNow};
use super::service::Service;
use crate::export::space::Level;

/// The type of the answer.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of the buckets of a pause, in microseconds.
const PAUSES: [u64; 10] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 20_000, 100_000, 1_000_000,
];

/// What operations measure.
#[derive(Debug, Default)]
pub struct Meter {
    /// How many were in each bucket, the unbounded one last; not added up.
    pauses: [AtomicU64; PAUSES.len() + 1],
    pause_nanos: AtomicU64,
}

impl Meter {
    /// Notes how long the writers of one disk waited for a snapshot.
    pub fn snapshot_pause(&self, pause: Duration) {
        let bucket = PAUSES
            .iter()
            .position(|&us| pause <= Duration::from_micros(us));
        self.pauses[bucket.unwrap_or(PAUSES.len())].fetch_add(1, Relaxed);
        let nanos = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        self.pause_nanos.fetch_add(nanos, Relaxed);
    }
}

/// Writes metrics. Writing to a string does not fail.
#[derive(Debug, Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}").ok();
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let before = if i == 0 { '{' } else { ',' };
            write!(self.0, "{before}{label}=\"").ok();
            for c in text.chars() {
                match c {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    c => self.0.push(c),
                }
            }
            self.0.push('"');
        }
        let after = if labels.is_empty() { "" } else { "}" };
        writeln!(self.0, "{after} {value}").ok();
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.head(name, kind, help);
        self.sample(name, &[], value);
    }
}

/// All metrics now. May block.
pub fn render(service: &Service) -> String {
    let mut text = Text::default();
    let info = &service.info;
    text.head("ploop_build_info", "gauge", "The program; always 1.");
    let labels = [
        ("version", info.version.as_str()),
        ("program", &info.program),
    ];
    text.sample("ploop_build_info", &labels, 1);
    let help = "How requests are executed; always 1.";
    text.head("ploop_engine_info", "gauge", help);
    text.sample("ploop_engine_info", &[("engine", &info.engine)], 1);
    let help = "Start of the process, in seconds since 1970.";
    text.one("process_start_time_seconds", "gauge", help, info.started);
    connections(service, &mut text);
    traffic(service, &mut text);
    let help = "Files made durable by this process (fdatasync); flushes share them.";
    let syncs = ploop::store::real::syncs();
    text.one("ploop_syncs_total", "counter", help, syncs);
    let help = "Those of them that made a journal durable for a flush.";
    let syncs = ploop::format::ploop::journal::syncs();
    text.one("ploop_journal_syncs_total", "counter", help, syncs);
    let help = "Disks that are open.";
    let disks = service.operations.open_disks();
    text.one("ploop_open_disks", "gauge", help, disks);
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        let help = "Open files of the process.";
        text.one("ploop_open_files", "gauge", help, files.count());
    }
    let help = "Open files that the operating system allows the process.";
    text.one(
        "ploop_open_files_limit",
        "gauge",
        help,
        info.open_files_limit,
    );
    limits(service, &mut text);
    quotas(service, &mut text);
    space(service, &mut text);
    jobs(service, &mut text);
    pauses(&service.meter, &mut text);
    text.0
}

fn connections(service: &Service, text: &mut Text) {
    let name = "ploop_connections_limit";
    text.one(
        name,
        "gauge",
        "NBD connections at once.",
        service.info.max_connections,
    );
    let mut clients: Vec<_> = service.connections.clients().into_iter().collect();
    clients.sort();
    let name = "ploop_export_clients";
    text.head(name, "gauge", "NBD clients connected to an export.");
    for (export, count) in clients {
        text.sample(name, &[("export", &export)], count);
    }
}

fn traffic(service: &Service, text: &mut Text) {
    let totals = service.connections.totals();
    let name = "ploop_requests_total";
    text.head(
        name,
        "counter",
        "Requests of NBD clients; a long read counts once a piece.",
    );
    for (export, t) in &totals {
        let ops = [
            ("read", t.reads),
            ("write", t.writes),
            ("zero", t.zeroes),
            ("discard", t.discards),
            ("flush", t.flushes),
        ];
        for (op, count) in ops {
            text.sample(name, &[("export", export), ("op", op)], count);
        }
    }
    let name = "ploop_bytes_total";
    text.head(name, "counter", "Bytes that NBD clients read and wrote.");
    for (export, t) in &totals {
        for (op, bytes) in [("read", t.read_bytes), ("write", t.write_bytes)] {
            text.sample(name, &[("export", export), ("op", op)], bytes);
        }
    }
    let name = "ploop_errors_total";
    text.head(name, "counter", "Requests of NBD clients that failed.");
    for (export, t) in &totals {
        text.sample(name, &[("export", export)], t.errors);
    }
    let name = "ploop_flushes_total";
    text.head(
        name,
        "counter",
        "Flushes of NBD clients, those by FUA included.",
    );
    for (export, t) in &totals {
        text.sample(name, &[("export", export)], t.flushes);
    }
}

/// Limits that are set, and what they do. A container without any, that never waited, has no series.
fn limits(service: &Service, text: &mut Text) {
    let (mut all, (iops, bps)) = service.operations.all_limits();
    let rates = |l: &Limits| {
        [
            ("iops", "total", l.iops),
            ("iops", "read", l.read_iops),
            ("iops", "write", l.write_iops),
            ("bytes_per_second", "total", l.bps),
            ("bytes_per_second", "read", l.read_bps),
            ("bytes_per_second", "write", l.write_bps),
        ]
    };
    all.retain(|l| {
        let set = rates(l).iter().any(|(_, _, rate)| *rate > 0);
        set || l.throttled_requests + l.waiting > 0
    });
    for (unit, help) in [
        ("iops", "Requests that a container may send in a second."),
        (
            "bytes_per_second",
            "Bytes that a container may read or write in a second.",
        ),
    ] {
        let name = format!("ploop_limit_{unit}");
        text.head(&name, "gauge", help);
        for l in &all {
            let set = rates(l).into_iter().filter(|r| r.0 == unit && r.2 > 0);
            for (_, op, rate) in set {
                text.sample(&name, &[("container", &l.container), ("op", op)], rate);
            }
        }
    }
    let name = "ploop_throttled_requests_total";
    text.head(name, "counter", "Requests that had to wait for their turn.");
    for l in &all {
        text.sample(name, &[("container", &l.container)], l.throttled_requests);
    }
    let name = "ploop_throttled_seconds_total";
    text.head(name, "counter", "How long they waited, together.");
    for l in &all {
        text.sample(name, &[("container", &l.container)], l.throttled_seconds);
    }
    let name = "ploop_throttled_requests";
    text.head(name, "gauge", "Requests that wait for their turn now.");
    for l in &all {
        text.sample(name, &[("container", &l.container)], l.waiting);
    }
    for (name, help, rate) in [
        (
            "ploop_store_limit_iops",
            "Requests in a second, of all containers together; 0: no limit.",
            iops,
        ),
        (
            "ploop_store_limit_bytes_per_second",
            "Bytes in a second, of all containers together; 0: no limit.",
            bps,
        ),
    ] {
        text.one(name, "gauge", help, rate);
    }
}

/// What a series says of a quota.
type Figure = fn(&QuotaNow) -> u64;

/// Quotas of containers that are open. One that is not has no series: its charge would have to be
/// counted.
fn quotas(service: &Service, text: &mut Text) {
    let all = service.operations.quotas();
    let series: [(&str, &str, &str, Figure); 3] = [
        (
            "ploop_quota_bytes",
            "gauge",
            "Bytes of the host that an open container may take.",
            |q| q.quota,
        ),
        (
            "ploop_charged_bytes",
            "gauge",
            "Bytes of the host that an open container with a quota is charged for.",
            |q| q.charged,
        ),
        (
            "ploop_quota_refused_total",
            "counter",
            "Requests that needed more than the quota left, since the container was opened.",
            |q| q.refused,
        ),
    ];
    for (name, kind, help, value) in series {
        text.head(name, kind, help);
        for q in &all {
            text.sample(name, &[("container", &q.container)], value(q));
        }
    }
}

/// The host's room, where it is looked after.
fn space(service: &Service, text: &mut Text) {
    let Some(s) = service.operations.space() else {
        return;
    };
    let name = "ploop_host_level";
    text.head(name, "gauge", "How full the host is; 1 for what holds.");
    for level in Level::ALL {
        let holds = u8::from(level.name() == s.level);
        text.sample(name, &[("level", level.name())], holds);
    }
    let gauges = [
        (
            "ploop_host_total_bytes",
            "The store's file system.",
            s.total,
        ),
        (
            "ploop_host_free_bytes",
            "What is left of it, without the reserve and what that lacks.",
            s.free,
        ),
        ("ploop_host_soft_bytes", "Below this it is low.", s.soft),
        (
            "ploop_host_hard_bytes",
            "Below this containers get nothing more.",
            s.hard,
        ),
        (
            "ploop_host_waiting_requests",
            "Requests that wait for room now.",
            s.waiting,
        ),
        ("ploop_reserve_bytes", "What the reserve holds.", s.reserve),
        (
            "ploop_reserve_wanted_bytes",
            "What the reserve is to hold.",
            s.reserve_wanted,
        ),
    ];
    for (name, help, value) in gauges {
        text.one(name, "gauge", help, value);
    }
    let name = "ploop_host_became_total";
    text.head(name, "counter", "How often the host became low, and full.");
    for (level, times) in [(Level::Low, s.became_low), (Level::Full, s.became_full)] {
        text.sample(name, &[("level", level.name())], times);
    }
    let counters = [
        (
            "ploop_host_refused_requests_total",
            "Requests that failed because the host was full.",
            s.refused,
        ),
        (
            "ploop_host_waited_requests_total",
            "Requests that had to wait for room.",
            s.waited,
        ),
        (
            "ploop_reserve_uses_total",
            "How often some of the reserve was given up.",
            s.reserve_uses,
        ),
        (
            "ploop_reserve_given_bytes_total",
            "How much of it was given up, together.",
            s.reserve_given,
        ),
    ];
    for (name, help, value) in counters {
        text.one(name, "counter", help, value);
    }
}

fn jobs(service: &Service, text: &mut Text) {
    let jobs = service.jobs.list();
    let name = "ploop_jobs";
    text.head(name, "gauge", "Jobs that are listed, by state.");
    for state in JobState::ALL {
        let count = jobs.iter().filter(|j| j.state == state).count();
        text.sample(name, &[("state", state.name())], count);
    }
}

fn pauses(meter: &Meter, text: &mut Text) {
    let name = "ploop_snapshot_pause_seconds";
    text.head(
        name,
        "histogram",
        "How long the writers of a disk waited for a snapshot.",
    );
    let (bucket, mut sum) = (format!("{name}_bucket"), 0);
    for (i, count) in meter.pauses.iter().enumerate() {
        sum += count.load(Relaxed);
        let bound = PAUSES.get(i).map(|&us| us as f64 / 1e6);
        let bound = bound.map_or("+Inf".into(), |s| s.to_string());
        text.sample(&bucket, &[("le", &bound)], sum);
    }
    let seconds = meter.pause_nanos.load(Relaxed) as f64 / 1e9;
    text.sample(&format!("{name}_sum"), &[], seconds);
    text.sample(&format!("{name}_count"), &[], sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_cannot_break_out() {
        let mut text = Text::default();
        text.sample("m", &[("a", "x\"} 1\nm{b=\"\\")], 7);
        assert_eq!(text.0, "m{a=\"x\\\"} 1\\nm{b=\\\"\\\\\"} 7\n");
    }

    #[test]
    fn a_pause_is_in_every_bucket_from_its_own_up() {
        let meter = Meter::default();
        for us in [10, 50, 51, 900, 30_000_000] {
            meter.snapshot_pause(Duration::from_micros(us));
        }
        let mut text = Text::default();
        pauses(&meter, &mut text);
        for line in [
            "_bucket{le=\"0.00005\"} 2",
            "_bucket{le=\"0.0001\"} 3",
            "_bucket{le=\"0.001\"} 4",
            "_bucket{le=\"1\"} 4",
            "_bucket{le=\"+Inf\"} 5",
            "_sum 30.001011",
            "_count 5",
        ] {
            let line = format!("ploop_snapshot_pause_seconds{line}\n");
            assert!(text.0.contains(&line), "{line}{}", text.0);
        }
    }
}
