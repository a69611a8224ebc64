//! A disk is checked while clients write to it.
//!
//! What a user would lose: a check that cries wolf at a sound disk in use, one that overlooks what is
//! damaged under it, one that writes, or one that the clients notice as an error.

use std::os::unix::fs::FileExt;

use nbd_server::control::model::Checked;
use ploop::format::ploop::Header;

use super::*;

fn checked(daemon: &Daemon) -> Checked {
    let path = resource(&["containers", "ct", "check"]);
    daemon.api().post(&path, &()).unwrap()
}

#[test]
fn a_sound_disk_is_clean_whatever_its_clients_do() {
    let rounds = env("PLOOP_LIVE_CHECKS", 60);
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let writers: Vec<Writer> = (0..WRITERS)
        .map(|w| Writer::start(daemon.open("ct"), w, FIRST + w * REGION))
        .collect();
    for round in 0..rounds {
        if round % 8 == 3 {
            take(&daemon.api(), "ct", &format!("s{round}"));
        }
        let report = checked(&daemon);
        assert_eq!(report.findings, [], "round {round}");
        assert_eq!(report.class, "clean");
    }
    assert!(rig.run(["check", "ct"]).contains("ct: clean"));
    for writer in writers {
        assert!(writer.is_well(), "{}", daemon.log());
        writer.stop();
    }
    daemon.stop();
    assert!(rig.run(["check", "ct"]).contains("clean"));
}

/// Method: entries are written into the image behind the service's back, where it has none.
#[test]
fn damage_under_an_open_disk_is_found_and_nothing_is_written() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    client.write(FIRST, &[7; 4096]);
    client.flush();
    assert_eq!(checked(&daemon).class, "clean");
    let top = rig.top("ct");
    let file = fs::File::options().write(true).open(&top).unwrap();
    file.write_all_at(&[0, 0, 0, 0x7F], Header::slot_offset(3))
        .unwrap();
    let before = fs::read(&top).unwrap();

    let report = checked(&daemon);
    assert_eq!(report.class, "corrupt");
    let found = &report.findings[0];
    assert_eq!(
        (found.kind.as_str(), found.offset),
        ("entry-beyond-eof", Header::slot_offset(3))
    );
    assert!(found.guest.is_some() && found.means.is_some() && found.repair.is_some());
    let said = rig
        .ploop()
        .args(["check", "ct", "--json"])
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(6), "{said:?}");
    let json: Checked = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(
        json, report,
        "what the command says is what the service says"
    );
    assert_eq!(fs::read(&top).unwrap(), before);
    // Its clients go on.
    assert_eq!(client.read(FIRST, 4096), [7; 4096]);
    client.write(FIRST, &[8; 4096]);
    client.flush();
    drop(client);
    daemon.kill();
}

/// Goal: nobody has to be there. Method: a service that has the disk closed looks at its files as
/// they are, and opens nothing for it.
#[test]
fn a_disk_that_is_not_open_is_checked_and_stays_so() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let before = rig.listing();
    assert_eq!(checked(&daemon).class, "clean");
    assert_eq!(rig.listing(), before, "a check leaves nothing behind");
    let missing = daemon
        .api()
        .post::<Checked>(&resource(&["containers", "no", "check"]), &());
    assert_eq!(missing.unwrap_err().kind(), ploop::Kind::NotFound);
    daemon.stop();
}
