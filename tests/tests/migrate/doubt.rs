//! Moves whose end one side does not know: nobody opens what is in doubt, everybody is told what it is
//! and what may be done, and what was decided is what comes.

use ploop::owner;
use ploop_tests::mount::wait_for;

use super::proxy::{ANSWER, Flow, Proxy, READY, SAYS};
use super::sides::{Side, look, moved, settled};
use super::*;

/// Two services, the link between them cut for good at a frame.
struct Cut {
    source: Side,
    destination: Side,
    proxy: Proxy,
    bytes: Vec<u8>,
}

fn sides() -> (Side, Side, Vec<u8>) {
    let (mut source, mut destination) = (Side::new(), Side::new());
    let bytes = store(&source.rig);
    import(&destination.rig);
    source.start();
    destination.start();
    (source, destination, bytes)
}

impl Cut {
    /// The frame does not come through, and leaves these states.
    fn at(kind: u8, states: (&str, &str)) -> Cut {
        Cut::of(kind, states, |_| ())
    }

    fn of(kind: u8, states: (&str, &str), change: impl FnOnce(&mut Migrate)) -> Cut {
        let (source, destination, bytes) = sides();
        let proxy = Proxy::new(&socket(&destination.rig));
        proxy.stop_at(kind, Flow::Cut);
        let id = begin(source.here(), &proxy.address(), change);
        let failed = source.here().api().wait(id, |_| ()).unwrap_err();
        let is = || (source.state(), destination.state());
        wait_for("the states of both", || is() == states);
        println!("{failed}");
        Cut {
            source,
            destination,
            proxy,
            bytes,
        }
    }

    /// `given` and `ready`.
    fn in_doubt() -> Cut {
        Cut::at(SAYS, ("given", "ready"))
    }

    /// The link is there again, and both come to know.
    fn heal(&self) -> bool {
        self.proxy.open();
        settled(&self.source, &self.destination)
    }

    fn is_right(&self, at: &Side) {
        look(&self.source, &self.destination);
        assert!(content(at.here(), "ct") == self.bytes);
    }
}

/// The service may still be at it, after its link was cut.
fn decide(side: &Side, what: &str) -> String {
    let mut said = String::new();
    wait_for("the decision", || {
        let mut command = side.rig.ploop();
        command.args(["migrate", "ct", "--resolve", what]);
        let out = command.output().unwrap();
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        let busy = out.status.code() == Some(5) && error.contains("the disk is in use by");
        assert!(busy || out.status.success(), "{error}");
        said = String::from_utf8(out.stdout).unwrap();
        !busy
    });
    said
}

/// `info` and `list` work, and say how it is; everything that would change it is refused with what can
/// be done about it.
fn is_shown_and_refused(side: &Side, state: &str, peer: &str) {
    let rig = &side.rig;
    let shown = rig.json(["info", "ct", "--json"]);
    let record = side.record().unwrap();
    assert_eq!(shown["move"]["state"], state, "{shown}");
    assert_eq!(shown["move"]["id"], record.id.to_string());
    assert_eq!(shown["move"]["peer"], record.peer);
    assert_eq!(shown["move"]["epoch"], record.epoch);
    let info = rig.run(["info", "ct"]);
    assert!(info.contains(state) && info.contains(peer), "{info}");
    let list = rig.json(["list", "--json"]);
    assert_eq!(list[0]["move"], shown["move"], "{list}");
    assert_eq!(list[0]["size"], SIZE, "{list}");
    let list = rig.run(["list"]);
    assert!(list.contains(state), "{list}");
    let says = [peer, "--resolve take"];
    rig.refused(5, ["snapshot", "create", "ct", "--name", "s"], &says);
    rig.refused(5, ["rm", "ct"], &says);
    rig.refused(5, ["rm", "--force", "ct"], &says);
    assert!(!side.serves());
    assert_eq!(side.state(), state);
}

#[test]
fn what_is_in_doubt_is_opened_by_nobody() {
    let cut = Cut::in_doubt();
    let to = cut.proxy.address();
    look(&cut.source, &cut.destination);
    is_shown_and_refused(&cut.source, "given", &format!("{to} (as ct)"));
    is_shown_and_refused(&cut.destination, "ready", "migrate.sock");
    // By a service that starts, too, and without one.
    let Cut {
        mut source,
        mut destination,
        proxy,
        bytes,
    } = cut;
    for side in [&mut source, &mut destination] {
        let state = side.state();
        side.kill();
        let peer = owner::shown(&side.record().unwrap().peer);
        let says = [&peer, "--resolve take"];
        side.rig.refused(5, ["set", "ct", "--quota", "64M"], &[]);
        side.rig.refused(5, ["compact", "ct"], &says);
        side.rig.refused(5, ["rm", "ct"], &says);
        side.start();
        assert!(!side.serves());
        assert_eq!(side.state(), state);
    }
    source.rig.refused(5, ["migrate", "ct", &to], &["ct", &to]);
    proxy.open();
    assert!(settled(&source, &destination));
    look(&source, &destination);
    assert!(content(destination.here(), "ct") == bytes);
}

/// Goal: what was decided on one side is what comes, whatever the other side had; what may be lost is
/// said.
#[test]
fn a_source_that_takes_it_back_has_it() {
    let cut = Cut::in_doubt();
    let said = decide(&cut.source, "take");
    assert!(
        said.contains("what was written at the destination"),
        "{said}"
    );
    assert!(!cut.heal());
    cut.is_right(&cut.source);
}

#[test]
fn a_source_that_gives_it_up_leaves_it_to_the_destination() {
    let cut = Cut::in_doubt();
    let said = decide(&cut.source, "give");
    assert!(said.contains("nobody has"), "{said}");
    cut.proxy.open();
    assert_eq!(
        (cut.source.state(), cut.destination.state()),
        ("gone", "ready")
    );
    decide(&cut.destination, "take");
    assert!(cut.destination.owns());
    cut.is_right(&cut.destination);
}

#[test]
fn a_destination_that_takes_it_has_it() {
    let cut = Cut::in_doubt();
    let said = decide(&cut.destination, "take");
    assert!(said.contains("what was written at the source"), "{said}");
    look(&cut.source, &cut.destination);
    assert!(cut.heal());
    cut.is_right(&cut.destination);
}

#[test]
fn a_destination_that_gives_it_back_leaves_it_to_the_source() {
    let cut = Cut::in_doubt();
    decide(&cut.destination, "give");
    assert_eq!(cut.destination.state(), "gone");
    cut.proxy.open();
    // Its word is not the destination's: that may be another service by now.
    assert_eq!(cut.source.state(), "given");
    decide(&cut.source, "take");
    assert!(!cut.heal());
    cut.is_right(&cut.source);
}

/// Method: the destination has it, and the source was not told.
#[test]
fn one_that_was_taken_steps_down_for_who_decided_later() {
    let cut = Cut::at(ANSWER, ("given", "taken"));
    look(&cut.source, &cut.destination);
    decide(&cut.source, "take");
    cut.proxy.open();
    wait_for("the destination to step down", || {
        (cut.source.state(), cut.destination.state()) == ("none", "given")
    });
    look(&cut.source, &cut.destination);
    // What was written there is kept until somebody gives it up.
    decide(&cut.destination, "give");
    assert_eq!(cut.destination.state(), "gone");
    cut.is_right(&cut.source);
}

#[test]
fn one_that_was_taken_stays() {
    let cut = Cut::at(ANSWER, ("given", "taken"));
    let refused = ["migrate", "ct", "--resolve", "give"];
    cut.destination.rig.refused(2, refused, &["move it back"]);
    assert!(cut.heal());
    cut.is_right(&cut.destination);
}

/// Goal: what was taken may move on before the source knows, and nothing stays in doubt for that. Method:
/// it moves on, the service that it went through is killed, and comes back.
#[test]
fn one_that_moved_on_is_let_go_of_where_it_began() {
    let mut cut = Cut::at(ANSWER, ("given", "taken"));
    let mut third = Side::new();
    import(&third.rig);
    third.start();
    moved(&cut.destination, &address(&third.rig), |_| ());
    assert_eq!(
        (cut.source.state(), cut.destination.state()),
        ("given", "gone")
    );
    cut.destination.kill();
    cut.destination.start();
    cut.proxy.open();
    wait_for("the first to know", || !cut.source.has("ct"));
    look(&cut.source, &third);
    assert!(content(third.here(), "ct") == cut.bytes);
    let side = cut.destination.rig.root().join(".ploop");
    wait_for("nobody to be told any more", || {
        fs::read_dir(&side).unwrap().next().is_none()
    });
}

/// Goal: who was decided against steps down also where it tried to move on meanwhile, and failed.
#[test]
fn one_that_could_not_move_on_steps_down() {
    let cut = Cut::at(ANSWER, ("given", "taken"));
    let mut third = Side::new();
    import(&third.rig);
    third.start();
    let on = Proxy::new(&socket(&third.rig));
    on.stop_at(READY, Flow::Cut);
    let id = begin(cut.destination.here(), &on.address(), |_| ());
    cut.destination.here().api().wait(id, |_| ()).unwrap_err();
    assert_eq!(
        (cut.destination.state(), third.state()),
        ("offered", "ready")
    );
    decide(&cut.source, "take");
    cut.proxy.open();
    on.open();
    wait_for("the decision to be known", || {
        cut.destination.state() == "given" && cut.source.state() == "none"
    });
    assert!(!third.has("ct"));
    cut.is_right(&cut.source);
}

/// Method: the destination was ready, and the source did not hear of it: it has it, and goes on.
#[test]
fn one_that_was_not_given_goes_on_at_the_source() {
    let cut = Cut::at(READY, ("offered", "ready"));
    look(&cut.source, &cut.destination);
    assert!(cut.source.serves() && !cut.destination.serves());
    let rig = &cut.source.rig;
    rig.run(["snapshot", "create", "ct", "--name", "s"]);
    let to = cut.proxy.address();
    let args = ["migrate", "ct", &to];
    rig.refused(5, args, &["has not ended", &to, "--resolve take"]);
    rig.refused(5, ["rm", "ct"], &[&to, "--resolve take"]);
    assert_eq!(rig.json(["list", "--json"])[0]["move"]["state"], "offered");
    assert!(!cut.heal());
    cut.is_right(&cut.source);
    moved(&cut.source, &to, |_| ());
    cut.is_right(&cut.destination);
}

#[test]
fn a_retry_ends_what_was_cut_first() {
    let cut = Cut::at(READY, ("offered", "ready"));
    cut.proxy.open();
    // Whoever is the first to tell the destination.
    moved(&cut.source, &cut.proxy.address(), |_| ());
    assert!(settled(&cut.source, &cut.destination));
    cut.is_right(&cut.destination);
}

#[test]
fn a_source_steps_down_for_a_destination_that_was_decided() {
    let cut = Cut::at(READY, ("offered", "ready"));
    let mut client = cut.source.here().open("ct");
    decide(&cut.destination, "take");
    cut.proxy.open();
    assert!(client.is_closed(), "the client of the one that steps down");
    assert!(settled(&cut.source, &cut.destination));
    cut.is_right(&cut.destination);
}

/// Goal: one that does not answer keeps nobody from deciding.
#[test]
fn a_silent_peer_does_not_keep_one_from_deciding() {
    let cut = Cut::in_doubt();
    cut.proxy.judge(|_| Flow::Hold);
    cut.proxy.let_in();
    wait_for("a link that hangs", || cut.proxy.links() > 1);
    decide(&cut.source, "take");
    assert!(cut.source.serves());
    cut.proxy.cut();
    assert!(!cut.heal());
    cut.is_right(&cut.source);
}

/// Goal: files that are to stay do, also when the source hears only later that the move has ended.
#[test]
fn what_is_kept_is_kept_by_who_comes_back() {
    let mut cut = Cut::of(ANSWER, ("given", "taken"), |m| m.keep = true);
    cut.source.kill();
    cut.proxy.open();
    cut.source.start();
    let confirmed = || cut.destination.state() == "none";
    wait_for("the destination to know", confirmed);
    assert!(cut.destination.owns());
    cut.is_right(&cut.destination);
    let rig = &cut.source.rig;
    rig.refused(5, ["snapshot", "create", "ct"], &["was given"]);
    // Whoever takes it all the same is told what he has.
    let said = decide(&cut.source, "take");
    assert!(said.contains("two containers"), "{said}");
    assert!(content(cut.source.here(), "ct") == cut.bytes);
}
