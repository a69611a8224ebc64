//! The image corpus beside the project: cases written by OpenVZ's tool and by QEMU, with what is
//! expected of each. Its own README says how a case is unpacked and judged.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use ploop::device::{Device, Extent};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// One case, not yet unpacked.
#[derive(Debug)]
pub struct Case {
    /// `NNN-name`.
    pub name: String,
    /// Its expect.json.
    pub expect: Value,
    dir: PathBuf,
}

/// Where the corpus is: `PLOOP_CORPUS`, or `../shared/corpus` beside the project.
pub fn root() -> PathBuf {
    match std::env::var_os("PLOOP_CORPUS") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus"),
    }
}

/// All cases, in order. Panics when there are none: the corpus is required.
pub fn cases() -> Vec<Case> {
    let root = root();
    let list = fs::read_dir(&root).unwrap_or_else(|e| {
        panic!(
            "the corpus at {} is required (or set PLOOP_CORPUS): {e}",
            root.display()
        )
    });
    let mut cases: Vec<Case> = list
        .filter_map(|entry| {
            let dir = entry.unwrap().path();
            let text = fs::read(dir.join("expect.json")).ok()?;
            let expect = serde_json::from_slice(&text).unwrap();
            let name = dir.file_name().unwrap().to_string_lossy().into_owned();
            Some(Case { name, expect, dir })
        })
        .collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(
        cases.len() >= 274,
        "the corpus has only {} cases",
        cases.len()
    );
    cases
}

impl Case {
    /// A string of expect.json.
    pub fn text(&self, key: &str) -> &str {
        self.expect[key].as_str().unwrap_or_default()
    }

    /// The rule for reading: `exact`, `refuse`, …
    pub fn read_rule(&self) -> &str {
        self.text("read")
    }

    /// Whether its files may be opened only where the caller allows them to lie.
    pub fn needs_allow(&self) -> bool {
        self.read_rule() == "needs-permission" || self.text("group") == "volume"
    }

    /// The nodes that can be read: `top` and GUIDs.
    pub fn nodes(&self) -> Vec<String> {
        match self.hashes().into_keys().collect::<Vec<_>>() {
            none if none.is_empty() => vec!["top".into()],
            some => some
                .into_iter()
                .filter(|n| !n.starts_with("snapshot:"))
                .collect(),
        }
    }

    /// Whether reading a node may end so: with the right bytes, with others, or with an error. An
    /// error must name its file.
    pub fn accepts(&self, node: &str, read: &ploop::Result<bool>) -> bool {
        let right = matches!(read, Ok(true));
        let ok = match self.read_rule() {
            "exact" | "needs-permission" => right,
            "exact-or-refuse" => right || read.is_err(),
            "refuse" | "fault" => read.is_err() || (node != "top" && right),
            "any" => true,
            rule => panic!("{}: unknown rule {rule}", self.name),
        };
        let named = read.as_ref().err().is_none_or(|e| e.path().is_some());
        ok && named
    }

    /// Unpacks the case into a fresh directory.
    pub fn unpack(&self) -> TempDir {
        let tmp = tempfile::Builder::new()
            .prefix("corpus-")
            .tempdir()
            .unwrap();
        let to = fs::canonicalize(tmp.path()).unwrap();
        for dir in self.expect["mkdirs"].as_array().into_iter().flatten() {
            fs::create_dir_all(to.join(dir.as_str().unwrap())).unwrap();
        }
        for record in self.expect["stored"].as_array().unwrap() {
            self.unpack_file(record, &to);
        }
        for (link, target) in self.expect["symlinks"].as_object().into_iter().flatten() {
            fs::create_dir_all(to.join(link).parent().unwrap()).unwrap();
            symlink(target.as_str().unwrap(), to.join(link)).unwrap();
        }
        tmp
    }

    fn stored_bytes(&self, name: &str, packed: bool) -> Vec<u8> {
        let bytes = fs::read(self.dir.join(name)).unwrap();
        if !packed {
            return bytes;
        }
        let mut out = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice())
            .read_to_end(&mut out)
            .unwrap();
        out
    }

    fn unpack_file(&self, record: &Value, to: &Path) {
        let name = record["file"].as_str().unwrap();
        let path = to.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = File::create(&path).unwrap();
        let len = record["bytes"].as_u64().unwrap();
        for piece in record["pieces"].as_array().into_iter().flatten() {
            let stored = piece["stored_as"].as_str().unwrap();
            let bytes = self.stored_bytes(stored, true);
            file.write_all_at(&bytes, piece["offset"].as_u64().unwrap())
                .unwrap();
        }
        let mut len_is_known = true;
        if let Some(stored) = record["stored_as"].as_str() {
            let mut bytes = self.stored_bytes(stored, stored != name);
            if record["substitute"].is_array() || record["substitute"].as_bool() == Some(true) {
                let text = String::from_utf8(bytes).unwrap();
                bytes = text
                    .replace("@CASE_DIR@", to.to_str().unwrap())
                    .into_bytes();
                len_is_known = false;
            } else if !record["substitute"].is_null() {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                bytes = text
                    .replace("@CASE_DIR@", to.to_str().unwrap())
                    .into_bytes();
                len_is_known = false;
            }
            file.write_all_at(&bytes, 0).unwrap();
        }
        if len_is_known {
            file.set_len(len).unwrap();
        }
    }

    /// The expected hashes: node (`top` or a GUID) → (sha256, sparse digest), either may be null.
    pub fn hashes(&self) -> BTreeMap<String, (Option<String>, Option<String>)> {
        let mut out: BTreeMap<String, (Option<String>, Option<String>)> = BTreeMap::new();
        for (node, hash) in self.expect["guest_sha256"]
            .as_object()
            .into_iter()
            .flatten()
        {
            out.entry(node.clone()).or_default().0 = hash.as_str().map(str::to_owned);
        }
        for (node, hash) in self.expect["guest_blocks_sha256"]
            .as_object()
            .into_iter()
            .flatten()
        {
            out.entry(node.clone()).or_default().1 = hash.as_str().map(str::to_owned);
        }
        out
    }
}

/// Hex of a finished hash.
pub fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// The corpus's digest for sparse reading: offset and bytes of every 4 KiB block that is not all
/// zeros. Holes, of the image or of its file, are not read.
pub fn blocks_digest(device: &dyn Device) -> ploop::Result<String> {
    const WINDOW: u64 = 1 << 30;
    let mut hash = Sha256::new();
    let mut extents: Vec<Extent> = Vec::new();
    let mut block = [0u8; 4096];
    // `next`: the first block not yet hashed; a block may lie in two extents.
    let (mut at, mut next) = (0, 0);
    while at < device.size() {
        let end = (at + WINDOW).min(device.size());
        device.allocation(at..end, 1 << 16, &mut extents)?;
        for e in &extents {
            if !e.zero {
                let mut b = next.max(at / 4096 * 4096);
                while b < at + e.len {
                    let n = (device.size() - b).min(4096) as usize;
                    device.read(b, &mut block[..n])?;
                    if block[..n].iter().any(|&x| x != 0) {
                        hash.update(b.to_le_bytes());
                        hash.update(&block[..n]);
                    }
                    b += 4096;
                }
                next = b;
            }
            at += e.len;
        }
    }
    Ok(hex(hash))
}

/// SHA-256 of the whole guest content.
pub fn full_digest(device: &dyn Device) -> ploop::Result<String> {
    let mut hash = Sha256::new();
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < device.size() {
        let n = (device.size() - at).min(buf.len() as u64) as usize;
        device.read(at, &mut buf[..n])?;
        hash.update(&buf[..n]);
        at += n as u64;
    }
    Ok(hex(hash))
}
