//! Two services, and who of them has `ct`.

use nbd_server::control::model::JobState;
use ploop::Kind;
use ploop::owner::{self, Record};
use ploop::store::RealStore;
use ploop::store::arriving::Missing;
use ploop_tests::client::Client;
use ploop_tests::daemon::Daemon;
use ploop_tests::mount::wait_for;
use ploop_tests::store::Rig;

use super::*;

/// A store, and its service while that is there.
pub(crate) struct Side {
    pub(crate) rig: Rig,
    pub(crate) daemon: Option<Daemon>,
}

impl Side {
    pub(crate) fn new() -> Side {
        Side {
            rig: Rig::new(),
            daemon: None,
        }
    }

    pub(crate) fn start(&mut self) {
        if self.daemon.is_none() {
            self.daemon = Some(Daemon::start(&self.rig));
        }
    }

    pub(crate) fn kill(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            calm(&daemon);
            daemon.kill();
        }
    }

    pub(crate) fn here(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    /// Its files have the container.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.dir(name).exists()
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.rig.root().join("containers").join(name)
    }

    /// The record of a move, if there is one.
    pub(crate) fn record(&self) -> Option<Record> {
        let read = || owner::read(RealStore::shared().as_ref(), &self.dir("ct"));
        match read() {
            // Its directory went under our eyes.
            Err(_) if !self.has("ct") => None,
            record => record.unwrap(),
        }
    }

    /// `none`, `gone`, or the record's state.
    pub(crate) fn state(&self) -> &'static str {
        match (self.record(), self.has("ct")) {
            (Some(record), _) => record.state.name(),
            (None, true) => "none",
            (None, false) => "gone",
        }
    }

    /// Bytes that it lacks, of which it knows that.
    pub(crate) fn lacks(&self) -> u64 {
        let store = RealStore::shared();
        let images = Missing::images(store.as_ref(), &self.dir("ct"));
        let missing = |image: PathBuf| match Missing::bytes(store.as_ref(), &image) {
            // It went under our eyes.
            Err(e) if e.kind() == Kind::NotFound => 0,
            bytes => bytes.unwrap(),
        };
        images.map_or(0, |all| all.into_iter().map(missing).sum())
    }

    /// By its files it may be opened for writing.
    pub(crate) fn owns(&self) -> bool {
        let there = self.has("ct");
        match self.record() {
            Some(record) => record.state.owns(),
            None => there && self.has("ct"),
        }
    }

    /// The service lets a client open it for writing; by the files, where there is no service.
    pub(crate) fn serves(&self) -> bool {
        let Some(daemon) = &self.daemon else {
            return self.owns();
        };
        // One that is cut in the middle of its question is not served, either.
        let asked = std::panic::catch_unwind(|| {
            let mut client = Client::connect(daemon.socket());
            let answer = client.go("ct");
            (client, answer)
        });
        let Ok((client, answer)) = asked else {
            return false;
        };
        match answer {
            Ok(()) => {
                // NBD_FLAG_READ_ONLY
                assert_eq!(client.flags & 2, 0, "it is served for reading");
                client.disconnect();
                true
            }
            Err((_, why)) => {
                println!("not served: {why}");
                false
            }
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.as_ref().filter(|_| std::thread::panicking()) {
            println!("{}: {}", daemon.socket().display(), daemon.log());
        }
    }
}

/// Its log has no panic in it.
pub(crate) fn calm(daemon: &Daemon) {
    let log = daemon.log();
    assert!(!log.contains("panicked"), "{log}");
}

/// Never both, and the source does not drop what the destination lacks. The destination is asked first:
/// it has it only after the source has given it up.
pub(crate) fn look(source: &Side, destination: &Side) {
    for asks in [Side::owns, Side::serves] {
        let there = asks(destination);
        let here = asks(source);
        assert!(
            !(here && there),
            "two owners: {} and {}",
            source.state(),
            destination.state()
        );
    }
    if !source.has("ct") {
        assert_eq!(destination.lacks(), 0, "what it lacks is gone");
    }
}

/// With both there, one comes to have it, and nothing is left at the other; whether that is the
/// destination.
pub(crate) fn settled(source: &Side, destination: &Side) -> bool {
    let mut there = false;
    // What is on its way there still may become one yet.
    let arriving = || {
        let room = fs::read_dir(destination.rig.root().join("tmp"));
        room.is_ok_and(|mut names| names.next().is_some())
    };
    wait_for("one owner", || {
        there = destination.owns();
        match there {
            true => !source.has("ct"),
            false => !arriving() && source.state() == "none" && !destination.has("ct"),
        }
    });
    there
}

/// Moves `ct`, to its end.
pub(crate) fn moved(from: &Side, to: &str, change: impl FnOnce(&mut Migrate)) {
    let id = begin(from.here(), to, change);
    let job: Job = from.here().api().wait(id, |_| ()).unwrap();
    assert_eq!(job.state, JobState::Done, "{job:?}");
}
