//! Names to devices.
//!
//! [`Exports`] is asked by the handshake; what it opens is a [`Device`], and whatever stands in
//! front of a device is a device again: limits, trackers and [`counters`] stack without knowing
//! each other.

pub mod counters;
pub mod disks;
pub mod single;

use std::fmt::Debug;
use std::sync::Arc;

use ploop::device::Device;
use ploop::error::Result;

pub use counters::{Counted, Counters};
pub use disks::{Disks, OpenDisk};
pub use single::Single;

/// What a client that asks for a list is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name that opens it: UTF-8 without NUL, at most 4096 bytes.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// An export that was opened.
#[derive(Clone, Debug)]
pub struct OpenExport {
    /// The device. Connections to one export must get the same device, or devices that see each
    /// other's writes and flushes: clients are told so.
    pub device: Arc<dyn Device>,
    /// The export's own name, whatever name opened it.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// Who may open what. Both methods may block; the server calls them where that hurts nobody else.
pub trait Exports: Send + Sync + Debug {
    /// The exports that a client may see.
    fn list(&self) -> Result<Vec<ExportInfo>>;

    /// Opens the export of that name; the empty name is the default export. The text of an error is
    /// sent to the client. Error: `NotFound` when there is no such export.
    fn open(&self, name: &str) -> Result<OpenExport>;
}
