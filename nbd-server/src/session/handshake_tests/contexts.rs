//! Contexts of trackers: named, listed, selected, bounded; and what their extents say.

use std::collections::HashMap;
use std::path::Path;

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::tracker::Id;

use super::*;
use crate::session::MAX_CONTEXTS;
use crate::session::context::Extents;
use crate::wire::chunk;

const CLUSTER: u64 = 32 << 10;

/// One disk in memory; its trackers are called by their ids, but for those of `names`.
#[derive(Debug)]
struct Tracked {
    disk: Arc<Disk>,
    names: HashMap<String, String>,
}

impl Tracked {
    fn new() -> Tracked {
        let header = Header::new(Version::V2, 64, 8 * 64).unwrap();
        let file = create(&MemoryStore::new(), Path::new("/d"), &header, 0o600).unwrap();
        let disk = Disk::writable(None, Top::open(file).unwrap(), None).unwrap();
        Tracked {
            disk: Arc::new(disk),
            names: HashMap::new(),
        }
    }

    fn start(&mut self, id: u8, name: Option<&str>) -> Id {
        let id = Id([id; 16]);
        self.disk.start_tracker(id, 4096, false).unwrap();
        let named = name.map(|name| (id.to_string(), name.to_owned()));
        self.names.extend(named);
        id
    }

    fn export(&self) -> OpenExport {
        self.open("disk").unwrap()
    }

    fn contexts(&self) -> Vec<Context> {
        Context::all_of(&self.export(), self).unwrap()
    }
}

impl Exports for Tracked {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        Ok(Vec::new())
    }

    fn open(&self, name: &str) -> Result<OpenExport> {
        Single::new(self.disk.clone(), "disk", "")?.open(name)
    }

    fn tracker_names(&self, _: &OpenExport) -> Result<HashMap<String, String>> {
        Ok(self.names.clone())
    }
}

/// The names that an option is answered with, or the kind of the error.
fn named(
    exports: &dyn Exports,
    option: u32,
    queries: &[&str],
) -> std::result::Result<Vec<String>, u32> {
    let mut script = Vec::new();
    ClientFlags(3).emit(&mut script);
    option::emit(kind::STRUCTURED_REPLY, &[], &mut script);
    option::emit(option, &meta_data("disk", queries), &mut script);
    let ran = run_in_steps(exports, &script, usize::MAX >> 1);
    let mut answers = ran.answers().split_off(1);
    let (_, last, _) = answers.pop().unwrap();
    if rep::is_error(last) {
        return Err(last);
    }
    let name = |data: &[u8]| String::from_utf8(data[4..].to_vec()).unwrap();
    Ok(answers.iter().map(|(_, _, data)| name(data)).collect())
}

#[test]
fn trackers_are_listed_and_selected_by_name() {
    let mut exports = Tracked::new();
    exports.start(1, Some("night"));
    exports.start(2, None);
    // Nobody can be told this name, and the one after it is taken.
    exports.start(3, Some("a\0b"));
    exports.start(4, Some("night"));
    exports.disk.start_tracker(Id([5; 16]), 4096, true).unwrap();
    let of = |id: u8| format!("qemu:dirty-bitmap:{}", Id([id; 16]));
    let bitmaps = [of(2), of(3), "qemu:dirty-bitmap:night".to_owned()];
    let list = |queries: &[&str]| named(&exports, kind::LIST_META_CONTEXT, queries).unwrap();
    let set = |queries: &[&str]| named(&exports, kind::SET_META_CONTEXT, queries).unwrap();
    assert_eq!(list(&["qemu:dirty-bitmap:"]), bitmaps);
    assert_eq!(list(&["qemu:"])[1..], bitmaps);
    assert_eq!(list(&[])[2..], bitmaps);
    let night = "qemu:dirty-bitmap:night";
    assert_eq!(list(&[night, night]), [night]);
    for nothing in [
        "qemu:dirty-bitmap:",
        "qemu:dirty-bitmap:nigh",
        "night",
        "qemu:",
    ] {
        assert!(set(&[nothing]).is_empty(), "{nothing}");
    }
    assert_eq!(
        set(&[night, &of(2), "base:allocation", night]),
        ["base:allocation", &of(2), night]
    );
}

#[test]
fn what_one_session_selects_is_bounded() {
    let mut exports = Tracked::new();
    let names: Vec<String> = (0..MAX_CONTEXTS + 1).map(|n| format!("t{n}")).collect();
    for (id, name) in (1..).zip(&names) {
        exports.start(id, Some(name));
    }
    let queries: Vec<String> = names
        .iter()
        .map(|n| format!("qemu:dirty-bitmap:{n}"))
        .collect();
    let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
    let set = |queries| named(&exports, kind::SET_META_CONTEXT, queries);
    assert_eq!(set(&queries[..MAX_CONTEXTS]).unwrap().len(), MAX_CONTEXTS);
    assert_eq!(set(&queries), Err(rep::ERR_TOO_BIG));
    // Queries cost their bytes, and select each context once.
    let many = vec!["qemu:dirty-bitmap:t1"; 2000];
    assert_eq!(set(&many).unwrap(), ["qemu:dirty-bitmap:t1"]);
    let all = named(&exports, kind::LIST_META_CONTEXT, &vec!["qemu:"; 4000]);
    assert_eq!(all.unwrap().len(), MAX_CONTEXTS + 2);
}

#[test]
fn what_was_written_is_dirty_and_a_tracker_that_ended_says_nothing() {
    let mut exports = Tracked::new();
    let id = exports.start(1, Some("night"));
    let disk = exports.disk.clone();
    disk.write(CLUSTER + 5000, &[1; 10]).unwrap();
    disk.write(3 * CLUSTER, &[1; 8192]).unwrap();
    let bitmap = exports.contexts().pop().unwrap();
    let mut extents = Extents::default();
    let mut ask = |range: std::ops::Range<u64>, limit: usize| {
        let said = bitmap.describe(disk.as_ref(), range, limit, &mut extents);
        said.map(|()| {
            let all = extents.found.iter().map(|e| (e.len, e.flags));
            all.collect::<Vec<_>>()
        })
    };
    let clean = |from: u64, to: u64| (to - from, 0);
    let whole = ask(0..8 * CLUSTER, 100).unwrap();
    let expected = [
        clean(0, CLUSTER + 4096),
        (4096, chunk::state::DIRTY),
        clean(CLUSTER + 8192, 3 * CLUSTER),
        (8192, chunk::state::DIRTY),
        clean(3 * CLUSTER + 8192, 8 * CLUSTER),
    ];
    assert_eq!(whole, expected);
    assert_eq!(ask(0..8 * CLUSTER, 1).unwrap(), expected[..1]);
    let inside = CLUSTER + 4097..CLUSTER + 4099;
    assert_eq!(ask(inside.clone(), 1).unwrap(), [(2, 1)]);
    disk.clear_tracker(id).unwrap();
    assert_eq!(ask(0..8 * CLUSTER, 100).unwrap(), [clean(0, 8 * CLUSTER)]);
    disk.stop_tracker(id).unwrap();
    assert_eq!(ask(inside, 1).unwrap_err().kind(), Kind::Invalid);
    // Another one of that name is another one.
    exports.names.clear();
    exports.start(2, Some("night"));
    assert!(ask(0..4096, 1).is_err());
}
