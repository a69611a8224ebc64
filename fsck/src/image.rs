//! One ploop image.

use std::ffi::OsString;
use std::path::Path;

use ploop::format::ploop::Header;
use ploop::format::ploop::header::HEADER_BYTES;
use ploop::store::{EntryKind, Store, StoreFile};
use ploop::verify::{self, Class, FindingKind, check_image, explain_header};
use ploop::{Error, Kind, Result};

use crate::report::{Finding, Findings};

/// Checks the image; `None` when its header cannot be used. The file is open and locked. Of kinds in
/// `known` nothing is said.
pub(crate) fn check(
    file: &dyn StoreFile,
    known: &[&str],
    found: &mut Findings,
) -> Result<Option<Header>> {
    let scan = match check_image(file) {
        Ok(scan) => scan,
        Err(e) if e.kind() == Kind::Corrupt => {
            found.corrupt(header_kind(&e, file.len()?), file.path(), &e);
            for f in explain_header(file)? {
                add(f, found);
            }
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    // In the middle of a conversion the entries are of two units, and the signature may be the
    // other one's: whatever else seems wrong is no finding.
    let mixed = scan
        .findings
        .iter()
        .any(|f| f.kind == FindingKind::ConversionInterrupted);
    let marks = [FindingKind::ConversionInterrupted, FindingKind::InUse];
    for f in scan.findings {
        if mixed && !marks.contains(&f.kind) || known.contains(&f.kind.name()) {
            continue;
        }
        add(f, found);
    }
    Ok(Some(scan.header))
}

fn add(f: verify::Finding, found: &mut Findings) {
    found.add(Finding {
        offset: f.offset,
        cluster: f.cluster,
        guest: f.guest,
        ..Finding::new(f.kind.name(), class(f.kind), &f.path, f.what)
    });
}

/// How bad a finding is to the image's owner. Free clusters between others are noted and no worse:
/// every writer uses them before it lets the file grow, so their space is not lost.
fn class(kind: FindingKind) -> Class {
    match kind {
        FindingKind::UnreferencedClusters => Class::Clean,
        kind => kind.class(),
    }
}

/// The name for a header that cannot be used, by the field that the error is about.
fn header_kind(e: &Error, file_len: u64) -> &'static str {
    match e.offset() {
        _ if file_len < HEADER_BYTES => "header-truncated",
        Some(0) => "bad-signature",
        Some(16) => "bad-type",
        Some(28) => "bad-cluster-size",
        Some(32) => "bat-truncated",
        Some(36) => "size-overflow",
        Some(48) => "bad-data-off",
        _ => "unreadable",
    }
}

/// Looks for the copy of header and BAT that OpenVZ's tool keeps while it converts an image.
pub(crate) fn check_backup(store: &dyn Store, image: &Path, found: &mut Findings) -> Result<()> {
    let mut backup = OsString::from(image);
    backup.push(".idx");
    let backup = Path::new(&backup);
    if store.kind(backup)? == Some(EntryKind::File) {
        let what = format!(
            "a conversion of {} between v1 and v2 was not finished: this is the BAT from before it",
            image.display()
        );
        found.file("conversion-interrupted", Class::Dirty, backup, what);
    }
    Ok(())
}
