//! Raw: the guest's bytes at the guest's offsets, as a sparse file or as a stream.

use std::io::{self, Write};

use ploop::device::Device;
use ploop::store::{StoreFile, Trail};
use ploop::{Error, Result};

use super::copy::pieces;
use super::staged::Staged;
use super::{Converted, MODE, Progress};

/// What holes of a stream are made of.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// A file of exactly the guest's size; zeros are holes. Durable on return.
pub(super) fn file(
    from: &dyn Device,
    staged: &mut Staged<'_>,
    progress: Progress<'_>,
) -> Result<Converted> {
    let file = staged.store().create(staged.temp(), MODE)?;
    staged.made();
    file.set_len(from.size())?;
    let written = copy_to_file(from, file.as_ref(), progress)?;
    file.sync()?;
    Ok(done(from, written))
}

/// Copies everything but zeros to the same offsets of `file`, which must read as zeros. Returns the
/// bytes written. Not durable before the file is synced; the length is the caller's to set.
pub fn copy_to_file(
    from: &dyn Device,
    file: &dyn StoreFile,
    progress: Progress<'_>,
) -> Result<u64> {
    let mut written = 0;
    let mut trail = Trail::default();
    pieces(from, progress, &mut |offset, bytes| {
        written += bytes.len() as u64;
        file.write_at(bytes, offset)?;
        trail.wrote(file, offset, bytes.len() as u64);
        Ok(())
    })?;
    Ok(written)
}

/// Every byte of the guest, in order.
pub(super) fn stream(
    from: &dyn Device,
    out: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<Converted> {
    let failed = |e: io::Error| Error::io("write", "output stream", e);
    let (mut at, mut written) = (0, 0);
    pieces(from, progress, &mut |offset, bytes| {
        zeros(out, offset - at).map_err(failed)?;
        out.write_all(bytes).map_err(failed)?;
        at = offset + bytes.len() as u64;
        written += bytes.len() as u64;
        Ok(())
    })?;
    zeros(out, from.size() - at)
        .and_then(|()| out.flush())
        .map_err(failed)?;
    Ok(done(from, written))
}

fn zeros(out: &mut dyn Write, mut count: u64) -> io::Result<()> {
    while count > 0 {
        let n = count.min(ZEROS.len() as u64);
        out.write_all(&ZEROS[..n as usize])?;
        count -= n;
    }
    Ok(())
}

fn done(from: &dyn Device, bytes_written: u64) -> Converted {
    Converted {
        source_bytes: from.size(),
        virtual_bytes: from.size(),
        bytes_written,
    }
}
