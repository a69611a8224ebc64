//! The control socket's place. A store may lie deeper than the 107 bytes that the address of a unix
//! socket holds; then the directory is opened and the socket named through it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ploop::error::{Error, Result};

use crate::serve::listen::{self, Listener};

/// Longest path in the address of a unix socket.
const MAX_PATH: usize = 107;

/// A name for a socket that fits into an address, good while this is held.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    _dir: Option<File>,
}

impl Place {
    /// The place `path`; its directory must be there.
    pub(super) fn of(path: &Path) -> Result<Place> {
        if path.as_os_str().len() <= MAX_PATH {
            return Ok(Place {
                path: path.to_owned(),
                _dir: None,
            });
        }
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::invalid("is no name for a socket").on(path));
        };
        let opened = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::PATH.bits() as i32)
            .open(dir)
            .map_err(|e| Error::io("open the directory", dir, e))?;
        let short = Path::new("/proc/self/fd").join(opened.as_raw_fd().to_string());
        Ok(Place {
            path: short.join(name),
            _dir: Some(opened),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// A listening control socket; its file is removed when this is dropped. The order matters: the
/// file is found through the place.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(super) listener: Listener,
    _place: Place,
}

/// Listens at `path`; as [`listen::unix`], whatever the length of the path.
pub(crate) fn listen(path: &Path) -> Result<Listening> {
    let place = Place::of(path)?;
    let listener = listen::unix(place.path()).map_err(|e| e.on(path))?;
    Ok(Listening {
        listener,
        _place: place,
    })
}
