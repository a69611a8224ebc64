//! Where the server listens, and where it refuses to.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::mount::wait_for;
use ploop_tests::server::{Bare, Listening, nbd_python, terminate, text};
use ploop_tests::store::expect_refusal;
use ploop_tests::tools::{ploop, ploop_path};

/// Exit codes of the command.
const IN_USE: i32 = 5;
const PERMISSION: i32 = 9;

fn serve(bare: &Bare, args: &[&str]) -> Command {
    let mut command = ploop();
    command
        .arg("serve")
        .arg(bare.image())
        .arg("--read-only")
        .args(args);
    command
}

#[test]
fn a_unix_socket_is_its_owners_alone() {
    let bare = Bare::new("16M", &[]);
    let path = bare.path("sock");
    let mut command = Command::new("sh");
    // The most generous umask there is.
    command.args([
        "-c",
        "umask 0; exec \"$@\"",
        "sh",
        text(ploop_path()),
        "serve",
    ]);
    command.arg(bare.image()).arg("--socket").arg(&path);
    let server = Listening::start(&mut command, 1);
    assert_eq!(server.on, [text(&path)]);
    let meta = std::fs::symlink_metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o7777, 0o600);
    server.stop();
    assert!(!path.exists(), "the socket goes with the server");
}

#[test]
fn a_second_server_is_refused_and_a_dead_ones_socket_replaced() {
    let bare = Bare::new("16M", &[]);
    let path = bare.path("sock");
    let first = Listening::start(&mut serve(&bare, &["--socket", text(&path)]), 1);
    expect_refusal(
        &mut serve(&bare, &["--socket", text(&path)]),
        IN_USE,
        &["already in use", text(&path)],
    );
    Client::open(&path, "root", Style::Simple).disconnect();
    // Dropped, it is killed, and leaves its socket behind.
    drop(first);
    assert!(path.exists() && UnixStream::connect(&path).is_err());
    let second = Listening::start(&mut serve(&bare, &["--socket", text(&path)]), 1);
    Client::open(&path, "root", Style::Simple).disconnect();
    second.stop();

    std::fs::write(&path, "precious").unwrap();
    expect_refusal(
        &mut serve(&bare, &["--socket", text(&path)]),
        4,
        &["not a socket"],
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn tcp_on_both_loopbacks() {
    let bare = Bare::new("16M", &[]);
    for address in ["127.0.0.1:0", "[::1]:0", "localhost:0"] {
        let server = Listening::start(&mut serve(&bare, &["--listen", address]), 1);
        let uri = format!("nbd://{}/root", server.on[0]);
        nbd_python(
            "h.connect_uri(uri)\nassert h.get_size() == 16 << 20\nh.shutdown()",
            &[&uri],
        );
        server.stop();
    }
}

#[test]
fn tcp_beyond_loopback_needs_a_word() {
    let bare = Bare::new("16M", &[]);
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:10809"] {
        let mut command = serve(&bare, &["--listen", address]);
        expect_refusal(
            &mut command,
            PERMISSION,
            &["--insecure-listen", "no encryption"],
        );
    }
    let args = ["--listen", "0.0.0.0:0", "--insecure-listen"];
    let server = Listening::start(&mut serve(&bare, &args), 1);
    let port = server.on[0]
        .strip_prefix("0.0.0.0:")
        .unwrap()
        .parse()
        .unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    server.stop();
}

#[test]
fn an_address_that_cannot_be_had_is_said_so() {
    let bare = Bare::new("16M", &[]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    expect_refusal(
        &mut serve(&bare, &["--listen", &address]),
        IN_USE,
        &[&address],
    );
    expect_refusal(
        &mut serve(&bare, &["--listen", "nowhere"]),
        2,
        &["nowhere", "HOST:PORT"],
    );
    let long = format!("/tmp/{}", "x".repeat(103));
    expect_refusal(
        &mut serve(&bare, &["--socket", &long]),
        2,
        &["107", "shorter"],
    );
    let missing = bare.path("no/such/dir/sock");
    expect_refusal(
        &mut serve(&bare, &["--socket", text(&missing)]),
        3,
        &["no/such/dir"],
    );
    let said = expect_refusal(&mut serve(&bare, &["--activation"]), 2, &["LISTEN_FDS"]);
    assert!(said.contains("systemd"), "{said}");
}

/// As systemd does it: descriptor 3 listens, and two variables say so.
#[test]
fn sockets_passed_by_systemd() {
    let bare = Bare::new("16M", &["-b", "128"]);
    let path = bare.path("activated");
    let listener = UnixListener::bind(&path).unwrap();
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 0</dev/null";
    let mut command = Command::new("sh");
    command.args([
        "-c",
        script,
        "sh",
        text(ploop_path()),
        "serve",
        "--activation",
    ]);
    command
        .arg(bare.image())
        .stdin(Stdio::from(OwnedFd::from(listener)));
    let mut child = Guard(command.spawn().unwrap());
    drop(command);
    let mut client = Client::open(&path, "root", Style::Extended);
    client.write(0, &[5; 4096]);
    client.flush();
    drop(client);
    terminate(child.0.id());
    assert!(child.0.wait().unwrap().success());
    assert!(
        path.exists(),
        "a socket that systemd made is not ours to remove"
    );
    assert_eq!(bare.mark(), 0);
    // Variables meant for another process are none of ours.
    let mut command = Command::new("sh");
    let script = "LISTEN_PID=1 LISTEN_FDS=1 exec \"$@\"";
    command.args([
        "-c",
        script,
        "sh",
        text(ploop_path()),
        "serve",
        "--activation",
    ]);
    expect_refusal(command.arg(bare.image()), 2, &["LISTEN_FDS"]);
}

/// A child that does not outlive the test.
struct Guard(std::process::Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It has ended already, or it is ended now.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Two servers that are started at the same instant on one path: one wins, the other is refused,
/// and the winner can be reached.
#[test]
fn of_two_servers_at_once_one_wins() {
    let bare = Bare::new("16M", &[]);
    let path = bare.path("sock");
    for _ in 0..5 {
        let start = || {
            let mut command = serve(&bare, &["--socket", text(&path)]);
            Guard(
                command
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap(),
            )
        };
        let mut both = [start(), start()];
        let mut loser = None;
        wait_for("one of two servers to give up", || {
            loser = both.iter_mut().find_map(|c| c.0.try_wait().unwrap());
            loser.is_some()
        });
        assert_eq!(loser.unwrap().code(), Some(IN_USE));
        reachable(&path);
        let alive = |c: &mut Guard| c.0.try_wait().unwrap().is_none();
        let winner = both.iter_mut().find_map(|c| alive(c).then_some(c));
        let winner = winner.unwrap();
        terminate(winner.0.id());
        assert!(winner.0.wait().unwrap().success());
    }
}

fn reachable(path: &Path) {
    wait_for("the winner's socket", || UnixStream::connect(path).is_ok());
    Client::open(path, "root", Style::Simple).disconnect();
}
