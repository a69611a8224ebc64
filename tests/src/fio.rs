//! fio, which writes to an export and checks what it reads with its own sums.

use std::process::{Child, Stdio};

use crate::tools::tool;

/// A running fio; killed when dropped.
#[derive(Debug)]
pub struct Fio(Child);

impl Drop for Fio {
    fn drop(&mut self) {
        // After `wait` there is nothing left to kill.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Fio {
    /// Four connections, each on 8 MiB of its own from 8 MiB on, that verify what they wrote all along.
    /// `more`: further options.
    pub fn start(uri: &str, seconds: u64, more: &[&str]) -> Fio {
        let mut fio = tool("fio");
        fio.args([
            "--name=live",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bssplit=4k/70:32k/30",
        ])
        .args(["--iodepth=8", "--numjobs=4", "--thread", "--size=8m"])
        .args(["--offset=8m", "--offset_increment=8m", "--fsync=100"])
        .args([
            "--verify=crc32c",
            "--verify_backlog=64",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ])
        .args(["--time_based", "--group_reporting", "--randrepeat=0"])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--uri={uri}"))
        .args(more);
        fio.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Fio(fio.spawn().unwrap())
    }

    /// Whether it has not ended yet.
    pub fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// Waits for its end; panics unless it found nothing wrong.
    pub fn wait(mut self) {
        let read = |from: Option<&mut dyn std::io::Read>| {
            let mut text = String::new();
            from.unwrap().read_to_string(&mut text).unwrap();
            text
        };
        let said = read(self.0.stdout.as_mut().map(|o| o as _));
        let errors = read(self.0.stderr.as_mut().map(|o| o as _));
        let ended = self.0.wait().unwrap();
        assert!(ended.success(), "{ended}\n{said}{errors}");
        assert!(said.contains("err= 0"), "{said}{errors}");
    }
}
