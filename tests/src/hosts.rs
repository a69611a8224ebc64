//! Two hosts on one: network namespaces with a link between them, and certificates that they know each
//! other by.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::mount::need_root;
use crate::tools::{run, tool};

/// Two namespaces, `a` and `b`, with a link between them; gone when dropped.
#[derive(Debug)]
pub struct Hosts {
    names: [String; 2],
    addresses: [String; 2],
}

impl Hosts {
    /// With a link that carries `rate` (as tc(8) writes it) each way. Needs root.
    pub fn new(rate: &str) -> Hosts {
        need_root();
        // Of this process: several tests run at once.
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let id = format!("{}-{n}", std::process::id());
        let hosts = Hosts {
            names: [format!("ploop-a-{id}"), format!("ploop-b-{id}")],
            // In namespaces of their own: nobody else sees them.
            addresses: ["10.97.0.1", "10.97.0.2"].map(str::to_owned),
        };
        let ip = |args: &[&str]| drop(run(tool("ip").args(args)));
        for name in &hosts.names {
            ip(&["netns", "add", name]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        let [a, b] = [&hosts.names[0], &hosts.names[1]].map(String::as_str);
        ip(&[
            "-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b,
        ]);
        for (name, address) in hosts.names.iter().zip(&hosts.addresses) {
            let net = format!("{address}/24");
            ip(&["-n", name, "address", "add", &net, "dev", "cable"]);
            ip(&["-n", name, "link", "set", "cable", "up"]);
            let shape = ["-n", name, "qdisc", "add", "dev", "cable", "root", "tbf"];
            let how = ["rate", rate, "burst", "256kb", "latency", "100ms"];
            run(tool("tc").args(shape).args(how));
        }
        hosts
    }

    /// `program` on host 0 or 1.
    pub fn on(&self, host: usize, program: &Path) -> Command {
        let mut command = tool("ip");
        command
            .args(["netns", "exec", &self.names[host]])
            .arg(program);
        command
    }

    /// The address of host 0 or 1.
    pub fn address(&self, host: usize) -> &str {
        &self.addresses[host]
    }

    /// Certificates for both, in files of `dir`: for each the options of `ploopd`.
    pub fn certificates(&self, dir: &Path) -> [Vec<String>; 2] {
        let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let openssl = |args: &[&str]| drop(run(tool("openssl").args(args)));
        let key = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ];
        let (ca, ca_key) = (file("ca.pem"), file("ca.key"));
        let own = ["req", "-x509", "-days", "2", "-subj", "/CN=ploop test CA"];
        openssl(&[&own[..], &key, &["-keyout", &ca_key, "-out", &ca]].concat());
        [0, 1].map(|host| {
            let [pem, private, asked] =
                ["pem", "key", "csr"].map(|kind| file(&format!("host{host}.{kind}")));
            let name = format!("/CN=host {host}");
            let address = format!("subjectAltName=IP:{}", self.addresses[host]);
            let ask = ["req", "-subj", &name, "-addext", &address];
            openssl(&[&ask[..], &key, &["-keyout", &private, "-out", &asked]].concat());
            let sign = [
                "x509",
                "-req",
                "-days",
                "2",
                "-copy_extensions",
                "copy",
                "-in",
                &asked,
            ];
            let by = [
                "-CA",
                &ca,
                "-CAkey",
                &ca_key,
                "-CAcreateserial",
                "-out",
                &pem,
            ];
            openssl(&[&sign[..], &by].concat());
            fs::set_permissions(&private, fs::Permissions::from_mode(0o600)).unwrap();
            let options = ["--tls-cert", &pem, "--tls-key", &private, "--tls-ca", &ca];
            options.map(str::to_owned).to_vec()
        })
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            drop(tool("ip").args(["netns", "delete", name]).status());
        }
    }
}

/// Where a program is.
pub fn program(command: &Command) -> PathBuf {
    PathBuf::from(command.get_program())
}
