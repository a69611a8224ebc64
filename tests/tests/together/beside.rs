//! A user's own hands, and servers, in what somebody wants removed.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::mount::wait_for;
use ploop_tests::server::{pattern, text};
use ploop_tests::store::{Rig, on_export};
use ploop_tests::treehash::file_digest;

use super::kit::{Kit, Sound, listed, names};

/// The only layer of a new store with the container `one-0`, which somebody wrote to.
fn one_container(rig: &Rig, kit: &Kit) -> PathBuf {
    rig.run(kit.import(0));
    rig.run(kit.create(0, "one-0"));
    let server = rig.serve(["one-0"]);
    on_export(&server.uri("one-0"), &["write -P 7 4k 8k", "flush"]);
    server.stop();
    rig.layer()
}

/// Goal: a directory that a user renamed is still his disk. Method: to names that are none of ours,
/// while its template is removed and everything that nobody needs is collected; then back.
#[test]
fn a_container_that_was_renamed_by_hand_keeps_its_layer() {
    for name in [&b".hidden"[..], b"with space", b"not utf-8 \xff"] {
        let name = OsStr::from_bytes(name);
        let rig = Rig::new();
        let kit = Kit::new(&rig);
        let layer = one_container(&rig, &kit);
        let (content, sealed) = (rig.content("one-0"), file_digest(&layer));
        let containers = rig.root().join("containers");
        fs::rename(containers.join("one-0"), containers.join(name)).unwrap();

        let rm = rig
            .ploop()
            .args(["template", "rm", "one"])
            .output()
            .unwrap();
        let code = rm.status.code().unwrap();
        assert!([0, 5].contains(&code), "{rm:?}");
        assert_eq!(listed(&rig, &["list"]).len(), 0);
        // Whoever collects next takes it no more than the first one.
        rig.run(kit.import(1));
        rig.run(kit.create(1, "two-0"));
        rig.run(["rm", "two-0"]);
        rig.run(["template", "rm", "two"]);
        assert_eq!(file_digest(&layer), sealed, "{name:?}");

        fs::rename(containers.join(name), containers.join("one-0")).unwrap();
        assert_eq!(rig.content("one-0"), content, "{name:?}");
        assert!(rig.run(["check", "one-0"]).contains("clean"));
        Sound::Superset.expect(&rig);
        Kit::clear(&rig);
        assert!(names(&rig.root().join("layers")).is_empty());
    }
}

/// Goal: a disk is not taken from who reads it, however he came to it. Method: servers of the
/// container that may not write, and of its image file by its name.
#[test]
fn a_container_is_not_removed_while_somebody_serves_any_of_it() {
    let rig = Rig::new();
    let kit = Kit::new(&rig);
    one_container(&rig, &kit);
    let content = rig.content("one-0");
    let top = rig.top("one-0");
    let image = top.file_name().unwrap().to_str().unwrap();
    let refused = |server: &str| {
        let before = rig.everything();
        let says = [image, "another program has the image open", "lslocks"];
        rig.refused(5, ["rm", "one-0"], &says);
        assert!(
            rig.everything() == before,
            "{server}: rm left something behind"
        );
    };

    let server = rig.serve(["one-0", "--read-only"]);
    refused("a container, read-only");
    let mut client = Client::open(server.socket(), "one-0", Style::Structured);
    assert_eq!(client.read(4 << 10, 8 << 10), [7; 8 << 10]);
    refused("a container, read-only, with a client");
    assert_eq!(
        client.read(64 << 10, 4 << 10),
        pattern(256 << 10, 1)[64 << 10..][..4 << 10]
    );
    client.disconnect();
    server.stop();

    for (args, what) in [
        (vec![text(&top)], "an image file"),
        (vec![text(&top), "--read-only"], "an image file, read-only"),
    ] {
        let server = rig.serve(args);
        refused(what);
        server.stop();
    }
    assert_eq!(rig.content("one-0"), content);

    // A store's server has open what somebody is connected to.
    let server = rig.serve(["--store", "--read-only"]);
    let mut client = Client::open(server.socket(), "one-0", Style::Structured);
    refused("a store, read-only, with a client");
    assert_eq!(client.read(4 << 10, 8 << 10), [7; 8 << 10]);
    client.disconnect();
    wait_for("the server to close the disk", || {
        rig.ploop()
            .args(["rm", "one-0"])
            .output()
            .unwrap()
            .status
            .success()
    });
    server.stop();
    Kit::clear(&rig);
}
