use std::cell::Cell;
use std::fs;
use std::time::Duration;

use ploop::{Error, Result};

use super::{Hooks, during};

fn hooks<'a>(thaw: &'a str, limit: Duration) -> Hooks<'a> {
    Hooks {
        freeze: "true",
        thaw,
        limit,
        done: "It is done",
    }
}

/// Goal: nobody goes on with what is not of a frozen file system. Method: work that ends when it sees
/// the thaw; and work that ends before it.
#[test]
fn what_was_thawed_too_early_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let thaw = format!("echo thaw >> {}", log.display());
    let undone = Cell::new(0);
    let undo = |n| {
        undone.set(n);
        "It was undone".to_owned()
    };
    let work = || {
        while !log.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(7)
    };
    let late = during(hooks(&thaw, Duration::from_secs(5)), work, undo);
    let said = late.unwrap_err().to_string();
    assert!(said.contains("before the instant"), "{said}");
    assert_eq!(undone.replace(0), 7);
    assert_eq!(fs::read_to_string(&log).unwrap(), "thaw\n");

    let hour = Duration::from_secs(3600);
    let done = during(hooks(&thaw, hour), || Ok(8), undo);
    assert_eq!((done.unwrap(), undone.get()), (8, 0));
    assert_eq!(fs::read_to_string(&log).unwrap(), "thaw\nthaw\n");
}

/// Goal: nobody is left with a frozen file system and not told. Method: a thaw that fails, behind work
/// that failed.
#[test]
fn a_thaw_that_fails_is_said_whatever_else_failed() {
    let hour = Duration::from_secs(3600);
    let work = || -> Result<()> { Err(Error::invalid("no backup")) };
    let failed = during(hooks("exit 4", hour), work, |()| String::new());
    let said = failed.unwrap_err().to_string();
    for words in ["no backup", "exit 4", "thaw it by hand"] {
        assert!(said.contains(words), "{said}");
    }
}
