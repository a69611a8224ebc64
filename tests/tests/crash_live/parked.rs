//! No job holds a lock that a client needs.
//!
//! The job's thread is parked at its n-th store call, for every n, and kept there until clients have
//! written in place, read, and written to a new cluster of a file that has grown already. They do
//! not wait for it: were there a lock between them, they would never end, and the test says so
//! after a time in which they could have done it a thousand times.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::store::recording::RecordingStore;
use ploop_tests::crash::front::FrontStore;
use ploop_tests::crash::live::{Clients, Driver};
use ploop_tests::crash::scene::{Op, Plan, Scene};
use ploop_tests::crash::{CLUSTER_SECTORS, SECTOR};

/// Far beyond what a client's call takes.
const FOR_EVER: Duration = Duration::from_secs(60);

/// What clients do, in clusters that no job of these scenes moves.
type Work = (&'static str, fn(&Disk));

const WORK: [Work; 4] = [
    ("write in place", |disk| {
        let bytes = [7; SECTOR as usize];
        disk.write(20 * CLUSTER_SECTORS * SECTOR, &bytes).unwrap();
    }),
    ("read of the top", |disk| {
        let mut bytes = [0; SECTOR as usize];
        disk.read(20 * CLUSTER_SECTORS * SECTOR, &mut bytes)
            .unwrap();
    }),
    ("read of what lies below", |disk| {
        let mut bytes = [0; SECTOR as usize];
        disk.read(0, &mut bytes).unwrap();
    }),
    ("write to a new cluster", |disk| {
        let bytes = [8; SECTOR as usize];
        // The first that the top has not, and nothing is below.
        let mut extents = Vec::new();
        let from = 40 * CLUSTER_SECTORS * SECTOR;
        disk.allocation(from..disk.size(), 2, &mut extents).unwrap();
        let at = match extents[0].hole {
            true => from,
            false => from + extents[0].len,
        };
        let cluster = CLUSTER_SECTORS * SECTOR;
        disk.write(at.next_multiple_of(cluster), &bytes).unwrap();
    }),
];

/// Parks the job at its call `n`, lets clients work, lets it go on. `Ok(None)`: it has no such call.
fn park_at(scene: &Scene, n: u64) -> Result<Option<String>, String> {
    let record = RecordingStore::on(&scene.start);
    let front = FrontStore::new(record.store());
    let mut driver = Driver::new(scene, Arc::new(front.clone()), &record, Clients::NONE);
    // In use, marked, and with room to grow into: the file grows by an eighth of itself.
    for cluster in (16..32).chain([40]) {
        driver.write_at(0, cluster * CLUSTER_SECTORS).unwrap();
    }
    driver.flush().unwrap();
    let disk = driver.disk(0);
    let (parked, parking) = mpsc::channel::<String>();
    let (go, going) = mpsc::channel::<()>();
    let (job, calls) = (std::thread::current().id(), AtomicU64::new(0));
    let going = Mutex::new(going);
    front.watch(move |call| {
        if std::thread::current().id() == job && calls.fetch_add(1, Ordering::SeqCst) == n {
            let at = format!("{} {}", call.what, call.path.display());
            parked.send(at).unwrap();
            // Nobody sends: it ends when the clients have.
            let _ended = going.lock().unwrap().recv();
        }
        Ok(())
    });
    let growing = format!("set length {}", disk.top_file().unwrap().display());
    let clients = std::thread::spawn(move || {
        let Ok(at) = parking.recv() else {
            return Ok(None);
        };
        // A file that is just being grown has no room yet: who wants a new cluster waits for it.
        let may_wait = usize::from(at == growing);
        let (done, doing) = mpsc::channel();
        let client = std::thread::spawn(move || {
            for (what, work) in WORK {
                work(&disk);
                done.send(what).unwrap();
            }
        });
        let mut stuck = None;
        for (what, _) in &WORK[..WORK.len() - may_wait] {
            if let Err(RecvTimeoutError::Timeout) = doing.recv_timeout(FOR_EVER) {
                stuck = Some(*what);
                break;
            }
        }
        // Let go whatever came of it, so that a failure ends too.
        drop(go);
        client.join().unwrap();
        match stuck {
            Some(what) => Err(format!("call {n}, {at}: a {what} waits for the job")),
            None => Ok(Some(at)),
        }
    });
    for op in 0..scene.plan.ops.len() {
        let done = driver.op(op);
        done.unwrap_or_else(|e| panic!("{}, parked at {n}: {e}", scene.plan.name));
    }
    front.unwatch();
    // With the watcher goes the sender, if it was never used.
    let came = clients.join().unwrap();
    driver.close().unwrap();
    came
}

fn every_call(plan: &Plan) {
    let scene = plan.build();
    let mut stuck = Vec::new();
    for n in 0.. {
        match park_at(&scene, n) {
            Ok(Some(_)) => {}
            Ok(None) => {
                println!("{}: parked at {n} calls", plan.name);
                assert!(n > 20, "{}: {n} calls only", plan.name);
                break;
            }
            Err(why) => stuck.push(why),
        }
    }
    assert!(stuck.is_empty(), "{}:\n{}", plan.name, stuck.join("\n"));
}

fn large(plan: Plan, ops: &[Op]) -> Plan {
    Plan {
        clusters: 64,
        ..plan.does(ops)
    }
}

/// Goal: DESIGN's "no job holds a disk-wide lock", for snapshots.
#[test]
fn a_snapshot_that_is_stuck_holds_up_no_client() {
    let plan = Plan::chain("create", &[("a", &[0, 1])], &[1, 2]);
    every_call(&large(plan, &[Op::Create("x")]));
}

/// The same for a merge into the top that clients write.
#[test]
fn a_merge_into_the_top_that_is_stuck_holds_up_no_client() {
    let plan = Plan::chain("into the top", &[("a", &[0, 1]), ("b", &[1, 2, 3])], &[2]);
    every_call(&large(plan, &[Op::Delete("b"), Op::Run(true)]));
}

/// The same for merges between sealed nodes, up and down.
#[test]
fn a_merge_below_that_is_stuck_holds_up_no_client() {
    let levels: [(&'static str, &[u64]); 3] = [("a", &[0, 1]), ("b", &[1, 2]), ("c", &[1, 5, 6])];
    let up = Plan::chain("up", &levels, &[0]);
    every_call(&large(up, &[Op::Delete("b"), Op::Run(true)]));
    let levels: [(&'static str, &[u64]); 3] = [("a", &[0, 1]), ("b", &[1, 2, 6]), ("c", &[1])];
    let down = Plan::chain("down", &levels, &[0]);
    every_call(&large(down, &[Op::Delete("b"), Op::Run(true)]));
}
