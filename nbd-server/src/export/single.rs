//! One device under one name; the empty name opens it too.

use std::sync::Arc;

use ploop::device::Device;
use ploop::error::{Error, Kind, Result};

use super::{ExportInfo, Exports, OpenExport};
use crate::wire;

/// Exports of exactly one device.
#[derive(Clone, Debug)]
pub struct Single {
    export: OpenExport,
}

impl Single {
    /// `device` under `name`. Error: `Invalid` for a name that the protocol cannot carry.
    pub fn new(
        device: Arc<dyn Device>,
        name: impl Into<String>,
        description: impl Into<String>,
    ) -> Result<Single> {
        let (name, description) = (name.into(), description.into());
        for (what, text) in [("name", &name), ("description", &description)] {
            if wire::string(text.as_bytes()).is_err() {
                return Err(Error::invalid(format!(
                    "the {what} of an export has {} bytes, or a NUL; {} bytes and no NUL are allowed",
                    text.len(),
                    wire::MAX_STRING
                )));
            }
        }
        Ok(Single {
            export: OpenExport {
                device,
                name,
                description,
                gate: None,
                space: None,
                lives: None,
            },
        })
    }
}

impl Exports for Single {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        let OpenExport {
            name, description, ..
        } = self.export.clone();
        Ok(vec![ExportInfo { name, description }])
    }

    fn open(&self, name: &str) -> Result<OpenExport> {
        if name.is_empty() || name == self.export.name {
            return Ok(self.export.clone());
        }
        Err(
            Error::new(Kind::NotFound, format!("there is no export '{name}'"))
                .fix(format!("The export here is '{}'.", self.export.name)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FileDevice;

    #[test]
    fn its_name_and_the_empty_name_open_it() {
        let device = FileDevice::temporary(1 << 20);
        let single = Single::new(device, "disk", "a disk").unwrap();
        assert_eq!(single.open("").unwrap().name, "disk");
        assert_eq!(single.open("disk").unwrap().description, "a disk");
        assert_eq!(single.open("disk2").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(single.list().unwrap().len(), 1);
    }

    #[test]
    fn names_that_nbd_cannot_carry_are_refused() {
        for name in ["a\0b".to_string(), "x".repeat(4097)] {
            let device = FileDevice::temporary(1 << 20);
            assert_eq!(
                Single::new(device, name, "").unwrap_err().kind(),
                Kind::Invalid
            );
        }
    }
}
