//! Files of certificates and keys.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use ploop::error::{Error, Kind, Result};
use rustix::fs::OFlags;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Largest file that is read, in bytes.
const MAX: u64 = 1 << 20;

/// The certificates in `path`, at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = read(path, false)?;
    let found = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|e| {
        Error::invalid(format!("is no PEM file: {e}"))
            .on(path)
            .fix("Give a file of certificates in PEM")
    })?;
    match found.is_empty() {
        false => Ok(found),
        true => Err(Error::invalid("there is no certificate in it")
            .on(path)
            .fix("Give a file of certificates in PEM (BEGIN CERTIFICATE)")),
    }
}

/// The private key in `path`, which nobody else may read.
pub(super) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let text = read(path, true)?;
    let says = |what: &str| text.windows(what.len()).any(|w| w == what.as_bytes());
    if says("-----BEGIN ENCRYPTED PRIVATE KEY-----") || says("Proc-Type: 4,ENCRYPTED") {
        let shown = path.display();
        return Err(Error::unsupported(
            "the private key is encrypted, and nobody is there to unlock it",
        )
        .on(path)
        .fix(format!(
            "Write it unencrypted to a file of mode 0600: openssl pkey -in {shown} -out FILE"
        )));
    }
    // What is wrong is not quoted: it could be the key.
    PrivateKeyDer::from_pem_slice(&text).map_err(|e| {
        let what = match e {
            PemError::NoItemsFound => "there is no private key in it",
            _ => "is no PEM file",
        };
        Error::invalid(what)
            .on(path)
            .fix("Give a file with a private key in PEM (BEGIN PRIVATE KEY)")
    })
}

fn read(path: &Path, secret: bool) -> Result<Vec<u8>> {
    let failed = |what: &str, e| Error::io(what, path, e);
    // Not to wait for whoever writes to a pipe.
    let file = File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(path)
        .map_err(|e| failed("open", e))?;
    let meta = file.metadata().map_err(|e| failed("stat", e))?;
    if !meta.is_file() {
        return Err(Error::invalid("is no regular file").on(path));
    }
    if secret && meta.mode() & 0o077 != 0 {
        let mode = meta.mode() & 0o777;
        return Err(Error::new(
            Kind::Permission,
            format!("others may use the private key: its mode is {mode:04o}"),
        )
        .on(path)
        .fix(format!("Run chmod 0600 {}", path.display())));
    }
    let mut text = Vec::new();
    file.take(MAX + 1)
        .read_to_end(&mut text)
        .map_err(|e| failed("read", e))?;
    match text.len() as u64 > MAX {
        false => Ok(text),
        true => Err(Error::invalid(format!("is larger than {MAX} bytes")).on(path)),
    }
}
