//! Names to devices.
//!
//! [`Exports`] is asked by the handshake; what it opens is a [`Device`], and whatever stands in
//! front of a device is a device again: limits, trackers and [`counters`] stack without knowing
//! each other.

pub mod counters;
pub mod disks;
pub mod limits;
pub mod single;
pub mod space;

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use ploop::device::Device;
use ploop::error::Result;

pub use counters::{Counted, Counters};
pub use disks::{Disks, OpenDisk};
pub use limits::{Gate, Throttle};
pub use single::Single;
pub use space::Space;

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
    /// Where its requests are asked for, if anything may limit them.
    pub gate: Option<Arc<Gate>>,
    /// The host's room, where it is looked after.
    pub space: Option<Arc<Space>>,
    /// Asked for the disk's life, where it has one.
    pub lives: Option<Arc<dyn Lives>>,
}

/// A disk that can tell whether an answered write was lost: see [`snapshots::life`].
pub trait Lives: Send + Sync + Debug {
    /// The name of its life: the same as long as no answered write was lost. May block. Durable on
    /// return: after a crash it has another one.
    fn life(&self) -> Result<String>;
}

/// Who may open what. All methods may block; the server calls them where that hurts nobody else.
pub trait Exports: Send + Sync + Debug {
    /// The exports that a client may see.
    fn list(&self) -> Result<Vec<ExportInfo>>;

    /// Opens the export of that name; the empty name is the default export. The text of an error is
    /// sent to the client. Error: `NotFound` when there is no such export.
    fn open(&self, name: &str) -> Result<OpenExport>;

    /// What the trackers of an export are called, by their ids' text; one that is not here is called
    /// by its id.
    fn tracker_names(&self, _export: &OpenExport) -> Result<HashMap<String, String>> {
        Ok(HashMap::new())
    }
}
