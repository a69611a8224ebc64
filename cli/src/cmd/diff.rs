//! `diff`: extents, printed as they are found.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use ploop::disk::open::Opener;
use ploop::{Error, Result};
use serde_json::json;
use snapshots::diff::Pair;

use crate::args;
use crate::output::{line, size};

const PLAIN: args::From = args::From {
    from: None,
    allow_dir: Vec::new(),
};

fn stdout_error(e: io::Error) -> Error {
    Error::io("write", "standard output", e)
}

pub(crate) fn diff(root: &Path, d: &args::Diff) -> Result<()> {
    let a = super::locate(root, &d.from, &PLAIN)?;
    let b = match &d.to {
        Some(to) => super::locate(root, to, &PLAIN)?,
        None => {
            let (mut top, options) = a.clone();
            top.snapshot = None;
            (top, options)
        }
    };
    let pair = Pair::open(&Opener::host(), (&a.0, &a.1), (&b.0, &b.1))?;
    let (from_size, to_size) = pair.sizes();
    let mut out = BufWriter::new(io::stdout().lock());
    if d.json.json {
        let to = d.to.as_deref().unwrap_or_else(|| bare(&d.from));
        let head = json!({
            "from": d.from, "to": to, "from_size": from_size, "to_size": to_size,
        });
        let head = head.to_string();
        let head = head.trim_end_matches('}');
        write!(out, "{head},\"extents\":[").map_err(stdout_error)?;
        let mut comma = "";
        let sum = pair.compare(&mut |extent| {
            let (offset, length) = (extent.start, extent.end - extent.start);
            let text = json!({ "offset": offset, "length": length });
            write!(out, "{comma}\n{text}").map_err(stdout_error)?;
            comma = ",";
            Ok(())
        })?;
        writeln!(out, "],\n\"bytes\":{}}}", sum.bytes).map_err(stdout_error)?;
        return out.flush().map_err(stdout_error);
    }
    writeln!(out, "{:>16} {:>16}", "OFFSET", "LENGTH").map_err(stdout_error)?;
    let sum = pair.compare(&mut |extent| {
        let length = extent.end - extent.start;
        writeln!(out, "{:>16} {length:>16}", extent.start).map_err(stdout_error)
    })?;
    out.flush().map_err(stdout_error)?;
    drop(out);
    line(format!(
        "{} in {} extents may differ",
        size(sum.bytes),
        sum.extents
    ))
}

/// The disk of `DISK@SNAPSHOT`.
fn bare(text: &str) -> &str {
    text.rsplit_once('@').map_or(text, |(disk, _)| disk)
}
