//! Who we are, and who is let in.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use ploop::error::{Error, Result};
use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::pem;

/// The files of a service: all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Our certificate, and what stands between it and the CA.
    pub cert: PathBuf,
    /// Its private key, not encrypted, mode 0600.
    pub key: PathBuf,
    /// The certificates of the CA that signs for all services.
    pub ca: PathBuf,
}

/// Who we are, and who is let in: both sides show a certificate that the CA signed; the one that is
/// dialed, one for the host name that was asked for. TLS 1.3 only. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files. A key that others may read is refused, and so is an encrypted one.
    pub fn load(files: &TlsFiles) -> Result<Tls> {
        let chain = pem::certificates(&files.cert)?;
        let key = pem::private_key(&files.key)?;
        let mut roots = RootCertStore::empty();
        for certificate in pem::certificates(&files.ca)? {
            roots.add(certificate).map_err(|e| {
                Error::invalid("one of its certificates is none of a CA")
                    .on(&files.ca)
                    .caused_by(e)
            })?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(ring::default_provider());
        let own = |e: rustls::Error| {
            let text = format!("does not go with the private key {}", files.key.display());
            Error::invalid(text).on(&files.cert).caused_by(e)
        };
        let tls = |e: rustls::Error| Error::invalid("set up TLS").caused_by(e);
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(tls)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(own)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|e| {
                Error::invalid("is no use as a CA")
                    .on(&files.ca)
                    .caused_by(e)
            })?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(own)?;
        // Every connection shows its certificates anew. And bytes that a client never reads would
        // reset the connection when it closes, before its last ones have arrived.
        client.resumption = Resumption::disabled();
        server.send_tls13_tickets = 0;
        Ok(Tls {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }
}
