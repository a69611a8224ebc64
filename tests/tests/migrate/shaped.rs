//! Moves between two hosts (network namespaces), over TLS, on a link of a known rate, under fio.

use nbd_server::control::model::JobState;
use ploop_tests::daemon::Daemon;
use ploop_tests::fio::Fio;
use ploop_tests::holder::Holder;
use ploop_tests::hosts::{Hosts, program};
use ploop_tests::store::Rig;
use ploop_tests::tools::ploopd;

use super::*;

/// Bytes per second of the link.
const LINK: u64 = 10 << 20;
const PORT: &str = "7301";

/// Goal: a running disk moves whatever its clients write; none of them reads a wrong byte. Method: fio
/// writes at no, half and twice the rate of the link through a holder, and checks what it reads with
/// its own sums, before, while and after the disk moves.
#[test]
fn a_disk_moves_between_hosts_whatever_is_written() {
    let hosts = Hosts::new(&format!("{}bit", LINK * 8));
    for (name, per_job) in [
        ("no writes", 0),
        ("half the link's rate", LINK / 8),
        ("twice", LINK / 2),
    ] {
        let (a, b) = (Rig::new(), Rig::new());
        // As much of data as the template has, and room for fio's four.
        import(&a);
        a.run(["create", "ct", "--template", "base"]);
        a.run(["resize", "ct", "64M", "--no-filesystem"]);
        let tls = hosts.certificates(&a.path(""));
        let listens: Vec<String> = [0, 1]
            .map(|h| format!("{}:{PORT}", hosts.address(h)))
            .to_vec();
        let start = |host: usize, rig: &Rig| {
            let mut args: Vec<&str> = tls[host].iter().map(String::as_str).collect();
            args.extend(["--migrate-listen", &listens[host]]);
            Daemon::by(hosts.on(host, &program(&ploopd())), rig, &args)
        };
        let (here, there) = (start(0, &a), start(1, &b));
        let holder = Holder::start(&nbd(&a), &[]);
        let before = (per_job == 0).then(|| content(&here, "ct"));
        let fio = (per_job > 0).then(|| {
            let rate = format!("--rate={per_job},{per_job}");
            Fio::start(&holder.uri("ct"), 15, &[&rate, "--size=4m"])
        });
        let id = begin(&here, &format!("tcp:{}", listens[1]), |m| {
            m.holder = Some(with_holder(&holder, &b));
        });
        let job: Job = here.api().wait(id, |_| ()).unwrap();
        assert_eq!(job.state, JobState::Done, "{name}: {job:?}");
        let migration = job.migration.unwrap();
        let moved = migration.moved.unwrap();
        println!(
            "{name}: {} rounds, {:.1} MiB for {:.1} MiB that had to move, gap {:.1} ms, brake {}",
            migration.round,
            moved.bytes as f64 / 1048576.0,
            (moved.data + moved.written) as f64 / 1048576.0,
            moved.gap * 1000.0,
            migration.brake,
        );
        if let Some(mut fio) = fio {
            if !fio.runs() {
                println!("{name}: fio ended before the move did");
            }
            fio.wait();
        }
        if let Some(before) = before {
            assert!(content(&there, "ct") == before, "{name}");
        }
        a.refused(3, ["info", "ct"], &["ct"]);
    }
}

/// Goal: nobody who has no certificate takes or brings a container.
#[test]
fn a_stranger_is_not_let_in() {
    let hosts = Hosts::new("1gbit");
    let (a, b) = (Rig::new(), Rig::new());
    let bytes = store(&a);
    let (ours, theirs) = (
        hosts.certificates(&a.path("")),
        hosts.certificates(&b.path("")),
    );
    let listen = format!("{}:{PORT}", hosts.address(1));
    let start = |host: usize, rig: &Rig, tls: &[String], more: &[&str]| {
        let args: Vec<&str> = tls
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        Daemon::by(hosts.on(host, &program(&ploopd())), rig, &args)
    };
    let here = start(0, &a, &ours[0], &[]);
    // Another CA; none.
    let _there = start(1, &b, &theirs[1], &["--migrate-listen", &listen]);
    let to = format!("tcp:{listen}");
    a.refused(9, ["migrate", "ct", &to], &["certificate"]);
    assert!(content(&here, "ct") == bytes);
    drop(here);
    let here = start(0, &a, &[], &[]);
    a.refused(9, ["migrate", "ct", &to], &["--tls-cert"]);
    assert!(content(&here, "ct") == bytes);
    // Nor does a service listen for strangers.
    let mut open = hosts.on(1, &program(&ploopd()));
    open.arg("--root").arg(b.path("other"));
    let open = open
        .args(["--migrate-listen", "10.97.0.2:7302"])
        .output()
        .unwrap();
    assert_eq!(open.status.code(), Some(9), "{open:?}");
}
