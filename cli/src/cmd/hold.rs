//! `hold` and `hold-to`.

use std::time::Duration;

use nbd_server::control::Client;
use nbd_server::control::client::resource;
use nbd_server::hold::model::{Move, Status};
use nbd_server::hold::{Holder, Options};
use ploop::{Error, Result};

use crate::args;
use crate::output::{line, print_json, size};

pub(crate) fn hold(h: &args::Hold) -> Result<()> {
    let too_much = |_| Error::invalid("a buffer larger than memory can be");
    let mut holder = Holder::new(Options {
        to: h.to.clone(),
        buffer: usize::try_from(h.buffer).map_err(too_much)?,
        patience: (h.patience > 0).then(|| Duration::from_secs(h.patience)),
        connections: h.max_connections as usize,
    });
    let mut places = Vec::new();
    if let Some(path) = &h.socket {
        holder.listen_unix(path)?;
        places.push(format!("listening on {}", path.display()));
    }
    if let Some(address) = &h.listen {
        let bound = holder.listen_tcp(address, h.insecure_listen)?;
        places.extend(bound.iter().map(|a| format!("listening on {a}")));
    }
    if let Some(path) = &h.control {
        let path = std::path::absolute(path).map_err(|e| Error::io("resolve", path, e))?;
        holder.control(&path);
        places.push(format!("control at {}", path.display()));
    }
    holder.run(|| places.iter().try_for_each(line))
}

pub(crate) fn hold_to(h: &args::HoldTo) -> Result<()> {
    let client = Client::connect(&h.control)?;
    let status: Status = match &h.to {
        None => client.get(&resource(&["holder"]))?,
        Some(to) => {
            let to = Move { to: to.to_string() };
            client.post(&resource(&["holder", "to"]), &to)?
        }
    };
    if h.json.json {
        return print_json(&status);
    }
    line(format!("server  {}", status.to))?;
    for e in &status.exports {
        let state = if e.waiting {
            "waits for the server"
        } else {
            "flows"
        };
        line(format!(
            "{}  connections {}, not flushed {}, in memory {}, {state}",
            e.name,
            e.connections,
            e.kept_changes,
            size(e.bytes)
        ))?;
    }
    Ok(())
}
