//! From an address to an export that can be asked.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nbd_server::wire::greeting::{ClientFlags, Greeting};
use nbd_server::wire::option::{self, InfoRequest, kind as opt};
use nbd_server::wire::option_reply::{self, kind as answer};

use crate::Result;

/// A server that answers nothing for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connected socket: a stream is used in the same way whatever its family.
fn connect(address: &str) -> io::Result<UnixStream> {
    let socket = if address.contains('/') {
        UnixStream::connect(address)?
    } else {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        OwnedFd::from(socket).into()
    };
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Opens the export by GO, with simple replies; the socket and the export's size.
pub(crate) fn open(address: &str, export: &str) -> Result<(UnixStream, u64)> {
    let connected = connect(address);
    let mut socket = connected.map_err(|e| format!("connect to {address}: {e}"))?;
    let size = shake_hands(&mut socket, export).map_err(|e| format!("export {export:?}: {e}"))?;
    Ok((socket, size))
}

fn shake_hands(socket: &mut UnixStream, export: &str) -> Result<u64> {
    let mut greeting = [0; Greeting::LEN];
    receive(socket, &mut greeting)?;
    let greeting = Greeting::parse(&greeting).map_err(unread)?;
    let (mut out, mut go) = (Vec::new(), Vec::new());
    ClientFlags(u32::from(greeting.flags & 3)).emit(&mut out);
    InfoRequest::emit(export, &[], &mut go);
    option::emit(opt::GO, &go, &mut out);
    socket.write_all(&out).map_err(|e| e.to_string())?;
    let mut size = None;
    loop {
        let mut head = [0; option_reply::Header::LEN];
        receive(socket, &mut head)?;
        let head = option_reply::Header::parse(&head).map_err(unread)?;
        let mut data = vec![0; head.length.min(1 << 16) as usize];
        receive(socket, &mut data)?;
        // NBD_INFO_EXPORT: kind u16 of zero, size u64, flags u16.
        match (head.kind, data.first_chunk::<10>()) {
            (answer::ACK, _) => return size.ok_or("no size was told".into()),
            (k, _) if answer::is_error(k) => return Err(String::from_utf8_lossy(&data).into()),
            (answer::INFO, Some([0, 0, bytes @ ..])) => size = Some(u64::from_be_bytes(*bytes)),
            _ => {}
        }
    }
}

pub(crate) fn receive(socket: &mut UnixStream, buf: &mut [u8]) -> Result<()> {
    socket.read_exact(buf).map_err(|e| e.to_string())
}

/// The error of bytes that are not the protocol's.
pub(crate) fn unread(error: nbd_server::wire::Error) -> String {
    format!("the server sent what cannot be read: {error:?}")
}
