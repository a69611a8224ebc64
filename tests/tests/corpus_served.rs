//! The corpus through the real binary: `ploop convert … --to raw`, and `ploop serve` read by the
//! `nbd` crate's client and libnbd's block status. And the list of what is refused.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use ploop_tests::corpus::{self, Case};
use ploop_tests::tools::{ploop, ploop_path, run, tool};
use sha2::{Digest, Sha256};

/// Readable images that are refused, one `CASE reason` a line. The test fails when it is not exact.
const REFUSED: &str = include_str!("../refused.txt");

/// Larger disks are compared by the corpus's sparse digest.
const FULL_MAX: u64 = 1 << 30;
/// Address space of one conversion: code, stacks and all of the work.
const MEMORY: &str = "--as=67108864";

fn readable(case: &Case) -> bool {
    matches!(
        case.read_rule(),
        "exact" | "exact-or-refuse" | "needs-permission"
    )
}

fn allow<'a>(case: &Case, dir: &'a Path, command: &'a mut Command) -> &'a mut Command {
    if case.read_rule() == "needs-permission" || case.text("group") == "volume" {
        command.arg("--allow-dir").arg(dir);
    }
    command
}

fn named_nodes(case: &Case) -> Vec<String> {
    let nodes: Vec<String> = case.hashes().into_keys().collect();
    match nodes.is_empty() {
        true => vec!["top".into()],
        false => nodes
            .into_iter()
            .filter(|n| !n.starts_with("snapshot:"))
            .collect(),
    }
}

fn source(case: &Case, dir: &Path, node: &str) -> String {
    let entry = dir.join(case.text("entry")).display().to_string();
    if node == "top" {
        entry
    } else {
        format!("{entry}@{node}")
    }
}

/// A digest of the file that a conversion made: the full one, or the sparse one.
fn digest_of(file: &Path, full: bool) -> String {
    let disk = ploop::disk::Disk::sealed(std::sync::Arc::new(
        ploop::chain::Chain::new(vec![std::sync::Arc::new(
            ploop::format::raw::RawDelta::new(
                ploop::store::RealStore::shared()
                    .open(file, ploop::store::Access::Read)
                    .unwrap(),
            )
            .unwrap(),
        )])
        .unwrap(),
    ));
    match full {
        true => corpus::full_digest(&disk).unwrap(),
        false => corpus::blocks_digest(&disk).unwrap(),
    }
}

/// A failed command must have said so clearly: our exit code, one line that names a file, no panic.
fn check_refusal(case: &Case, out: &Output, wrong: &mut Vec<String>) {
    let text = String::from_utf8_lossy(&out.stderr);
    let code = out.status.code();
    let clear = code.is_some_and(|c| (1..=9).contains(&c)) && text.contains("ploop: /");
    if !clear || text.contains("panicked") || text.trim().lines().count() > 3 {
        wrong.push(format!("{}: unclear refusal ({code:?}): {text}", case.name));
    }
}

// Goal: whatever is in a file, `convert` gives exactly the guest's bytes or a clear error, in less
// than 64 MiB, and leaves no file behind when it fails. Method: every node of every case.
#[test]
fn convert_gives_the_expected_bytes_or_a_clear_error_in_little_memory() {
    let refused: BTreeMap<&str, &str> = REFUSED
        .lines()
        .filter(|l| !l.starts_with('#'))
        .filter_map(|l| l.split_once(' '))
        .collect();
    let (mut wrong, mut now_refused) = (Vec::new(), Vec::new());
    for case in corpus::cases() {
        let tmp = case.unpack();
        let dir = std::fs::canonicalize(tmp.path()).unwrap();
        let out_dir = tempfile::tempdir().unwrap();
        for node in named_nodes(&case) {
            let target = out_dir.path().join("out.raw");
            let mut command = tool("prlimit");
            command
                .arg(MEMORY)
                .arg(ploop_path())
                .arg("convert")
                .arg(source(&case, &dir, &node));
            allow(&case, &dir, command.arg(&target).args(["--to", "raw"]));
            let out = command.output().unwrap();
            let ok = out.status.success();
            if !ok {
                check_refusal(&case, &out, &mut wrong);
                if std::fs::read_dir(out_dir.path()).unwrap().count() != 0 {
                    wrong.push(format!("{}: a failed conversion left a file", case.name));
                }
            }
            match (case.read_rule(), ok) {
                ("any", _) => drop(std::fs::remove_file(&target)),
                ("refuse" | "fault", true) if !case.hashes().contains_key(&node) => {
                    wrong.push(format!("{} {node}: must fail, did not", case.name));
                }
                (_, true) => {
                    let (full, blocks) = case.hashes().remove(&node).unwrap();
                    let len = std::fs::metadata(&target).unwrap().len();
                    let small = len <= FULL_MAX && full.is_some();
                    let expected = if small { full } else { blocks };
                    if Some(digest_of(&target, small)) != expected {
                        wrong.push(format!("{} {node}: other bytes", case.name));
                    }
                    std::fs::remove_file(&target).unwrap();
                }
                _ if readable(&case) && node == "top" => now_refused.push(case.name.clone()),
                ("exact", false) => wrong.push(format!("{} {node}: refused", case.name)),
                _ => {}
            }
        }
    }
    let listed: Vec<String> = refused.keys().map(|k| (*k).to_owned()).collect();
    assert_eq!(
        now_refused, listed,
        "refused.txt must name exactly the readable cases refused"
    );
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Serves a node read-only; the error output when there is no export.
fn serve(case: &Case, dir: &Path, node: &str, socket: &Path) -> Result<Server, Output> {
    let mut command = ploop();
    command
        .arg("serve")
        .arg(source(case, dir, node))
        .args(["--read-only", "--name", "x"]);
    allow(case, dir, command.arg("--socket").arg(socket));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    for _ in 0..60_000 {
        if UnixStream::connect(socket).is_ok() {
            return Ok(Server(child));
        }
        if child.try_wait().unwrap().is_some() {
            return Err(child.wait_with_output().unwrap());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("{}: the server neither listens nor ends", case.name);
}

/// The digest of an export, read with the `nbd` crate; of a large one only where libnbd says data.
fn read_export(socket: &Path, full: bool) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    let export = nbd::client::handshake(&mut stream, b"x")?;
    let mut client = nbd::client::NbdClient::new(stream, &export);
    let mut hash = Sha256::new();
    let mut buf = vec![0; 1 << 20];
    if full {
        let mut at = 0;
        while at < export.size {
            let n = (export.size - at).min(buf.len() as u64) as usize;
            client.read_exact(&mut buf[..n])?;
            hash.update(&buf[..n]);
            at += n as u64;
        }
        return Ok(corpus::hex(hash));
    }
    let uri = format!("nbd+unix:///x?socket={}", socket.display());
    let map = run(tool("nbdinfo").args(["--map", "--json", &uri])).stdout;
    let map: serde_json::Value = serde_json::from_slice(&map).unwrap();
    let mut next = 0;
    for extent in map.as_array().unwrap().iter().filter(|e| e["type"] != 3) {
        let (from, len) = (
            extent["offset"].as_u64().unwrap(),
            extent["length"].as_u64().unwrap(),
        );
        let mut at = (from / 4096 * 4096).max(next);
        while at < from + len {
            let n = (export.size - at).min(4096) as usize;
            client.seek(SeekFrom::Start(at))?;
            client.read_exact(&mut buf[..n])?;
            if buf[..n].iter().any(|&b| b != 0) {
                hash.update(at.to_le_bytes());
                hash.update(&buf[..n]);
            }
            at += 4096;
        }
        next = at;
    }
    Ok(corpus::hex(hash))
}

// Goal: the bytes of every readable case arrive through NBD, and a damaged one gives an I/O error
// or no export, never other bytes. Method: our server, two independent clients, the top of each.
#[test]
fn serve_gives_the_expected_bytes_or_an_error() {
    let mut wrong = Vec::new();
    let room = tempfile::tempdir().unwrap();
    for case in corpus::cases() {
        let tmp = case.unpack();
        let dir = std::fs::canonicalize(tmp.path()).unwrap();
        let socket = room.path().join("s");
        let server = match serve(&case, &dir, "top", &socket) {
            Ok(server) => server,
            Err(out) => {
                check_refusal(&case, &out, &mut wrong);
                if case.read_rule() == "exact" && !REFUSED.contains(&case.name) {
                    wrong.push(format!("{}: no export", case.name));
                }
                continue;
            }
        };
        let Some((full, blocks)) = case.hashes().remove("top") else {
            // Nothing is known of it but that it must not be read whole as if it were sound.
            let size = case.expect["virtual_bytes"].as_u64().unwrap_or(0);
            if case.read_rule() != "any" && read_export(&socket, size <= FULL_MAX).is_ok() {
                wrong.push(format!("{}: must fail, did not", case.name));
            }
            continue;
        };
        let size = case.expect["virtual_bytes"].as_u64().unwrap_or(0);
        let small = size <= FULL_MAX && full.is_some();
        let got = read_export(&socket, small);
        let right = got
            .as_ref()
            .is_ok_and(|g| Some(g) == if small { full } else { blocks }.as_ref());
        let excused =
            got.is_err() && matches!(case.read_rule(), "exact-or-refuse" | "fault" | "any");
        if !right && !excused {
            wrong.push(format!("{} [{}]: {got:?}", case.name, case.read_rule()));
        }
        drop(server);
        std::fs::remove_file(&socket).ok();
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
