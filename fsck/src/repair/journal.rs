//! The journal of an image that was not closed: left to opening, put away, or copied from.

use std::path::PathBuf;
use std::sync::Arc;

use ploop::descriptor::Guid;
use ploop::disk::open::Opener;
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::journal::{self, Home};
use ploop::store::StoreFile;
use ploop::verify::scan_image;
use ploop::{Kind, Result};

use super::changes::Notes;
use super::disk::Survey;
use super::ranges::push;
use crate::disk::copy_it;

/// What the journal of an image is worth.
pub(super) enum Journal {
    /// Nothing: there is none, or it has ended.
    Nothing,
    /// It is needed, and the image is left as it is.
    Kept,
    /// It does not explain the image.
    Useless(PathBuf),
}

/// Judges the journal of the image `file`, of the node `below` where that is no top. What it says goes
/// to `notes`, or to `survey` where the image is left alone.
pub(super) fn judge(
    opener: &Opener,
    file: &Arc<dyn StoreFile>,
    notes: &mut Notes,
    below: Option<Guid>,
    survey: &mut Survey,
) -> Result<Journal> {
    let Some(home) = Home::of(opener.store(), file.path()) else {
        return Ok(Journal::Nothing);
    };
    if !home.is_live()? {
        return Ok(Journal::Nothing);
    }
    let header = match read_header(file.as_ref()) {
        Ok((header, _)) => header,
        Err(e) if e.kind() == Kind::Corrupt => {
            let what = "the image has a journal, and a header that it cannot be read with";
            survey.cannot(file.path(), what);
            return Ok(Journal::Kept);
        }
        Err(e) => return Err(e),
    };
    let useless = Journal::Useless(home.path().to_path_buf());
    let log = match journal::read(&home, &header) {
        Ok(Some(log)) => log,
        Ok(None) => return Ok(Journal::Nothing),
        Err(e) if e.kind() == Kind::Corrupt => {
            let what = format!("its journal is damaged ({}): do without it", e.what());
            let gives_up = "what was flushed last, in clusters that cannot be named";
            notes.giving_up(what, gives_up, false);
            return Ok(useless);
        }
        Err(e) => return Err(e),
    };
    match log.explain(file.as_ref(), &scan_image(file.as_ref())?) {
        Ok(_) => {
            let what = "its journal holds what was flushed last";
            let what = match below {
                None => format!(
                    "{what}: the next command that opens the disk for writing replays it and \
                     closes the image"
                ),
                Some(guid) => format!(
                    "{what}, and nothing puts that into an image below others. {}",
                    copy_it(guid)
                ),
            };
            survey.leave(file.path(), what);
            Ok(Journal::Kept)
        }
        Err(e) if e.kind() == Kind::Corrupt => {
            let cluster = header.cluster_bytes();
            let mut ranges = Vec::new();
            for (slot, _) in log.clusters() {
                let end = ((slot + 1) * cluster).min(header.size());
                push(&mut ranges, slot * cluster..end);
            }
            let what = format!(
                "{}: its journal cannot be replayed, do without it",
                e.what()
            );
            notes.losing(what, ranges);
            Ok(useless)
        }
        Err(e) => Err(e),
    }
}
