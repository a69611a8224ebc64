//! The file of an image, as the tools before version 9 send it.

use std::path::PathBuf;
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::device::Device as _;
use ploop::disk::Disk;
use ploop::error::{Error, Result};
use ploop::format::ploop::header::{HEADER_BYTES, Header, Unchecked, has_signature};
use ploop::store::{Access, StoreFile};
use ploop::verify::{Class, check_image, slots};

use crate::convert::{Progress, pieces};
use crate::store::Root;

/// What a file may have behind the places for all its clusters: an extension, room that was reserved,
/// what was moved when the disk grew.
const BEHIND: u64 = 1 << 30;

/// An image's file that is being received.
pub(super) struct Incoming {
    path: PathBuf,
    file: Arc<dyn StoreFile>,
    /// Its length at most, as its header has it.
    end: u64,
}

impl Incoming {
    pub(super) fn new(root: &Root, path: PathBuf) -> Result<Incoming> {
        Ok(Incoming {
            file: root.store().create(&path, 0o600)?,
            path,
            end: 0,
        })
    }

    /// Where the data of a packet may end. The first has the header: it says what may come.
    pub(super) fn end(&self) -> u64 {
        match self.end {
            0 => u64::from(super::wire::PAYLOAD_MAX),
            end => end,
        }
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_at(bytes, offset)
    }

    /// The data of a packet at `offset` was written.
    pub(super) fn wrote(&mut self, offset: u64) -> Result<()> {
        // A disk that grew meanwhile has another header.
        if self.end == 0 || offset < HEADER_BYTES {
            let header = self.header()?;
            let data = u64::from(header.entries) * header.cluster_bytes();
            let end = header.data_start.saturating_add(data);
            self.end = end.saturating_add(BEHIND);
        }
        Ok(())
    }

    /// Adds what was left out at the end: senders skip clusters of zeros.
    fn complete(&self) -> Result<()> {
        let header = self.header()?;
        let mut end = header.data_start;
        let table = HEADER_BYTES..HEADER_BYTES + 4 * u64::from(header.entries);
        slots(self.file.as_ref(), table, &mut |_, entry| {
            let behind = header
                .entry_offset(entry)
                .saturating_add(header.cluster_bytes());
            // Others are for the check to find.
            if behind <= self.end {
                end = end.max(behind);
            }
        })?;
        match self.file.len()? < end {
            true => self.file.set_len(end),
            false => Ok(()),
        }
    }

    fn header(&self) -> Result<Header> {
        let mut head = [0; HEADER_BYTES as usize];
        let got = self.file.read_at(&mut head, 0)?;
        if !has_signature(&head[..got]) {
            return Err(Error::unsupported(
                "what comes is not the file of a ploop image: the sender's disk may be raw or qcow2",
            )
            .on("stream")
            .fix("Copy its file as it is, and: ploop template import NAME FILE"));
        }
        // How long the file will be is not known yet.
        Unchecked::parse(&head)?
            .check(u64::MAX)
            .map_err(|e| e.on("stream"))
    }

    /// All of it came: the image is checked. Error: `Corrupt`, also for one that its sender did not close.
    pub(super) fn check(&self) -> Result<Header> {
        self.complete()?;
        let scan = check_image(self.file.as_ref())?;
        let bad = |f: &&ploop::verify::Finding| f.kind.class() >= Class::Dirty;
        match scan.findings.iter().find(bad) {
            Some(finding) => Err(Error::corrupt(format!(
                "the image that came is damaged or not closed: {}",
                finding.what
            ))
            .on("stream")
            .at(finding.offset)
            .fix("Check it where it is, and send it again")),
            None => Ok(scan.header),
        }
    }

    /// Copies what it shows to `to`.
    pub(super) fn pour(self, root: &Root, to: &Disk, progress: Progress<'_>) -> Result<()> {
        drop(self.file);
        let file = root.store().open(&self.path, Access::Read)?;
        let delta = ploop::format::ploop::PloopDelta::open(file)?;
        let disk = Disk::sealed(Arc::new(Chain::new(vec![Arc::new(delta)])?));
        pieces(&disk, progress, &mut |offset, bytes| {
            to.write(offset, bytes)
        })
    }
}
