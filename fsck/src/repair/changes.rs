//! What is done to one image: in sentences, and in bytes.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::Result;
use ploop::store::StoreFile;

use super::Step;
use super::fields::{Fields, HeaderBytes};
use super::view::{Copy, View};

/// The changes of one image, phase by phase. See [`super::apply`] for their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) path: PathBuf,
    /// The file's length now.
    pub(super) len: u64,
    /// The file that header and BAT are taken from, and how many bytes of it.
    pub(super) backup: Option<(PathBuf, u64)>,
    /// Entries that become 0, by their byte.
    pub(super) zeroed: Vec<u64>,
    /// Its length while clusters are moved: at least the present one.
    pub(super) grown: u64,
    pub(super) copies: Vec<Copy>,
    /// Entries of moved clusters, by their byte.
    pub(super) moved: Vec<(u64, u32)>,
    /// The length in the end.
    pub(super) end: u64,
    /// The header in the end, when it is another one.
    pub(super) header: Option<HeaderBytes>,
    /// Where the data area begins.
    pub(super) table_end: u64,
    /// All of the header in the end.
    pub(super) fields: Fields,
}

impl Changes {
    /// The image with all changes made.
    pub(super) fn view(
        &self,
        file: &Arc<dyn StoreFile>,
        backup: Option<&Arc<dyn StoreFile>>,
    ) -> Result<View> {
        let mut view = match (backup, &self.backup) {
            (Some(backup), Some((_, len))) => View::restored(file, backup, *len)?,
            _ => View::of(file)?,
        };
        view.len = self.end;
        view.header = self.header;
        view.words = self.zeroed.iter().map(|&at| (at, 0)).collect();
        view.words.extend(self.moved.iter().copied());
        view.copies = self.copies.clone();
        Ok(view)
    }

    /// Bytes that are copied, for progress.
    pub(super) fn bytes(&self) -> u64 {
        match &self.backup {
            Some((_, len)) => *len,
            None => self.copies.iter().map(|c| c.len).sum(),
        }
    }

    /// The file stays as it is.
    pub(super) fn nothing(&self) -> bool {
        self.backup.is_none()
            && self.zeroed.is_empty()
            && self.copies.is_empty()
            && self.end == self.len
            && self.grown == self.len
            && self.header.is_none()
    }
}

/// What is to be done to an image, for people and for the hand that does it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ImagePlan {
    pub(super) steps: Vec<Step>,
    pub(super) changes: Option<Changes>,
}

/// Steps under way, all about one file.
#[derive(Debug)]
pub(super) struct Notes {
    file: PathBuf,
    pub(super) steps: Vec<Step>,
}

impl Notes {
    pub(super) fn on(file: &Path) -> Notes {
        Notes {
            file: file.to_path_buf(),
            steps: Vec::new(),
        }
    }

    fn add(&mut self, what: String) -> &mut Step {
        let at = self.steps.len();
        self.steps.push(Step::new(&self.file, what));
        &mut self.steps[at]
    }

    /// A step that loses nothing.
    pub(super) fn sure(&mut self, what: String) {
        self.add(what).automatic = true;
    }

    /// A step that loses no guest byte and gives up something else.
    pub(super) fn giving_up(&mut self, what: String, gives_up: &str, automatic: bool) {
        let step = self.add(what);
        step.gives_up = Some(gives_up.to_owned());
        step.automatic = automatic;
    }

    /// A step after which `ranges` can be read, and may be another's bytes.
    pub(super) fn doubtful(&mut self, what: String, ranges: Vec<Range<u64>>) {
        self.add(what).suspect = ranges;
    }

    /// A step that loses `ranges`.
    pub(super) fn losing(&mut self, what: String, ranges: Vec<Range<u64>>) {
        self.add(what).lost = ranges;
    }
}
