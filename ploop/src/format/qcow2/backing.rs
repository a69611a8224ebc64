//! What an image says about the file below it. Read here, followed in [`super::chain`] only.

use crate::error::{Error, Kind, Result};

/// The format that an image records for its backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// Plain bytes.
    Raw,
    /// qcow2.
    Qcow2,
    /// Parallels, which is also the ploop format.
    Parallels,
    /// Another one, by the name that the image gives.
    Other(String),
}

/// A backing file as recorded in the image: untrusted until a chain opener has judged it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// A path, relative to the directory of the image that names it, or absolute.
    pub name: String,
    /// Its format; `None` when the image does not say, which is never a reason to guess.
    pub format: Option<BackingFormat>,
}

impl Backing {
    /// From the bytes of the name and of the format extension. Refuses names that are not paths.
    pub(super) fn parse(name: &[u8], format: Option<&[u8]>) -> Result<Backing> {
        let text = |bytes: &[u8], what: &str| match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            _ => Err(Error::unsupported(format!(
                "the {what} is not UTF-8 text: {:?}",
                String::from_utf8_lossy(bytes)
            ))),
        };
        let name = text(name, "backing file name")?;
        // As QEMU reads names: a colon before the first slash makes it a protocol, not a path.
        let head = name.split('/').next().unwrap_or_default();
        if let Some((protocol, _)) = head.split_once(':') {
            let what = format!("the backing file {name:?} is a {protocol:?} address, not a path");
            return Err(Error::new(Kind::Unsupported, what)
                .fix("Record a file name: qemu-img rebase -u -b NAME -F FORMAT IMAGE"));
        }
        let format = match format {
            None => None,
            Some(bytes) => Some(match text(bytes, "backing format")?.as_str() {
                "raw" => BackingFormat::Raw,
                "qcow2" => BackingFormat::Qcow2,
                "parallels" => BackingFormat::Parallels,
                other => BackingFormat::Other(other.to_owned()),
            }),
        };
        Ok(Backing { name, format })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_are_refused_by_name_and_paths_are_not() {
        for name in [
            "json:{\"driver\":\"raw\"}",
            "nbd://host/x",
            "file:/etc/passwd",
            "a:b",
            ":",
        ] {
            let e = Backing::parse(name.as_bytes(), None).unwrap_err();
            assert_eq!(e.kind(), Kind::Unsupported);
            assert!(e.to_string().contains("address, not a path"), "{e}");
        }
        for name in ["base.raw", "./a:b", "/dir/a:b", "../x"] {
            assert_eq!(Backing::parse(name.as_bytes(), None).unwrap().name, name);
        }
    }

    #[test]
    fn names_that_are_not_text_are_refused() {
        assert!(Backing::parse(b"a\xff", None).is_err());
        assert!(Backing::parse(b"a\0b", None).is_err());
        assert!(Backing::parse(b"a", Some(b"ra\xffw")).is_err());
    }

    #[test]
    fn the_format_is_what_the_image_says() {
        let format = |f: &[u8]| Backing::parse(b"a", Some(f)).unwrap().format.unwrap();
        assert_eq!(format(b"raw"), BackingFormat::Raw);
        assert_eq!(format(b"qcow2"), BackingFormat::Qcow2);
        assert_eq!(format(b"parallels"), BackingFormat::Parallels);
        assert_eq!(format(b"vmdk"), BackingFormat::Other("vmdk".into()));
        assert_eq!(Backing::parse(b"a", None).unwrap().format, None);
    }
}
