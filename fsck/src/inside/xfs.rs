//! XFS: xfs_repair.

use ploop::Result;

use super::Found;
use super::tool;
use super::view::View;

const PACKAGE: &str = "xfsprogs";

/// What is wrong with it.
pub(super) fn check(view: &View) -> Result<Vec<Found>> {
    let path = view.path();
    let args = ["-n".as_ref(), "-f".as_ref(), path.as_os_str()];
    let said = tool::run("xfs_repair", PACKAGE, &args, view.patience())?;
    // At the start of a line, and before it comes to names: those may have lines of their own.
    let alerts = [
        "ALERT: The filesystem has valuable",
        "ERROR: The filesystem has valuable",
    ];
    let tables = |l: &&str| !(l.starts_with("Phase 3") || l.contains('"'));
    let first = |text: &str| {
        let mut lines = text.lines().take_while(tables);
        lines.any(|l| alerts.iter().any(|a| l.starts_with(a)))
    };
    if first(&said.out) || first(&said.err) {
        let what = "the log of xfs is to be replayed, which only a mount does; before that \
                    xfs_repair -n cannot judge it";
        return Ok(vec![Found::unclean(what.into())]);
    }
    if said.code == 0 {
        return Ok(vec![]);
    }
    let words = tool::words(&said, &path, |l| {
        let about_itself = ["Phase ", "- ", "No modify flag"];
        !about_itself.iter().any(|p| l.starts_with(p))
    });
    let zeros = match view.unknown {
        0 => String::new(),
        n => format!(" ({n} guest bytes cannot be read and were zeros for it)"),
    };
    Ok(vec![Found::errors(format!(
        "xfs_repair -n{zeros}: {words}"
    ))])
}
