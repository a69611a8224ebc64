//! Where another service is reached.

use std::fmt;
use std::net::{IpAddr, SocketAddrV6};
use std::path::{Path, PathBuf};

use ploop::error::{Error, Result};

use super::tls::Tls;

/// Longest address, in bytes.
const MAX: usize = 400;

/// Where another service is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// `unix:/PATH`, or a bare absolute path.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`.
    Tcp(String),
    /// `exec:COMMAND`, run by /bin/sh; its standard input and output are the link.
    Exec(String),
}

impl Address {
    /// What is used of `tls` to reach it: a unix socket stays on this host, and a command brings its own
    /// protection.
    pub fn tls<'t>(&self, tls: Option<&'t Tls>) -> Option<&'t Tls> {
        tls.filter(|_| matches!(self, Address::Tcp(_)))
    }

    /// Reads one. Error: `Invalid`.
    pub fn parse(text: &str) -> Result<Address> {
        let refused = |why: &str| {
            Error::invalid(format!(
                "'{}' is no address of a service: {why}",
                text.escape_debug()
            ))
            .fix("Write unix:/PATH, tcp:HOST:PORT, or exec:COMMAND")
        };
        if text.len() > MAX {
            let text = format!("an address has at most {MAX} bytes, not {}", text.len());
            return Err(Error::invalid(text));
        }
        if text.contains(|c: char| c.is_control()) {
            return Err(refused("it has a control character"));
        }
        let (kind, rest) = match text.starts_with('/') {
            true => ("unix", text),
            false => text
                .split_once(':')
                .ok_or_else(|| refused("it does not say what kind it is"))?,
        };
        match kind {
            "unix" if Path::new(rest).is_absolute() => Ok(Address::Unix(rest.into())),
            "unix" => Err(refused("the path is not absolute")),
            "tcp" => match host(rest) {
                Ok(_) => Ok(Address::Tcp(rest.into())),
                Err(why) => Err(refused(why)),
            },
            "exec" if !rest.trim().is_empty() => Ok(Address::Exec(rest.into())),
            "exec" => Err(refused("there is no command")),
            _ => Err(refused("there is no such kind")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(address) => write!(f, "tcp:{address}"),
            Address::Exec(command) => write!(f, "exec:{command}"),
        }
    }
}

/// The host of `HOST:PORT`, as a certificate names it. Error: what is wrong.
pub(super) fn host(address: &str) -> Result<String, &'static str> {
    if address.starts_with('[') {
        let address: SocketAddrV6 = address.parse().map_err(|_| "it is not [IPV6]:PORT")?;
        return Ok(IpAddr::from(*address.ip()).to_string());
    }
    let (host, port) = address.rsplit_once(':').ok_or("it has no port")?;
    if host.contains(':') {
        return Err("an IPv6 address stands in brackets");
    }
    if host.is_empty() || host.contains(char::is_whitespace) {
        return Err("it has no host");
    }
    if !port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err() {
        return Err("the port is no number from 0 to 65535");
    }
    Ok(host.into())
}
