//! The name in a certificate, for people to read. Nothing is decided by it.

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// Longest name that is shown, in characters.
const MAX: usize = 200;

/// Attributes of a name that are shown: the last byte of their identifier 2.5.4.x.
const SHOWN: &[(u8, &str)] = &[
    (3, "CN"),
    (10, "O"),
    (11, "OU"),
    (7, "L"),
    (8, "ST"),
    (6, "C"),
];

/// The subject of `certificate`, or else the first host that it is for.
pub(super) fn subject(certificate: &CertificateDer<'_>) -> String {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else {
        return "a certificate that cannot be read".into();
    };
    let name = name(certificate.subject());
    if !name.is_empty() {
        return name;
    }
    match certificate.valid_dns_names().next() {
        Some(host) => shown(&format!("DNS={host}")),
        None => "a certificate without a name".into(),
    }
}

/// "CN=…, O=…" of a Name in DER, without its outer tag. What it does not understand it leaves out.
pub(super) fn name(mut der: &[u8]) -> String {
    let mut parts = Vec::new();
    while let Some((SET, mut set, rest)) = item(der) {
        der = rest;
        while let Some((SEQUENCE, pair, rest)) = item(set) {
            set = rest;
            parts.extend(attribute(pair));
        }
    }
    shown(&parts.join(", "))
}

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
/// UTF8String, PrintableString, TeletexString, IA5String: one byte for each ASCII character.
const STRINGS: [u8; 4] = [0x0c, 0x13, 0x14, 0x16];

fn attribute(pair: &[u8]) -> Option<String> {
    let (OID, id, rest) = item(pair)? else {
        return None;
    };
    let &[0x55, 0x04, last] = id else { return None };
    let (_, name) = SHOWN.iter().find(|(id, _)| *id == last)?;
    let (tag, text, _) = item(rest)?;
    STRINGS
        .contains(&tag)
        .then(|| format!("{name}={}", String::from_utf8_lossy(text)))
}

/// The first item of DER: its tag, its content, and what follows.
fn item(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, len], rest) = der.split_first_chunk()?;
    let (len, rest) = match len {
        0..=0x7f => (usize::from(len), rest),
        0x81 => rest.split_first().map(|(&n, rest)| (n.into(), rest))?,
        0x82 => rest
            .split_first_chunk()
            .map(|(&n, rest)| (u16::from_be_bytes(n).into(), rest))?,
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(len)?;
    Some((tag, content, rest))
}

fn shown(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(plain).take(MAX).collect()
}
