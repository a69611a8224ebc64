//! Names and descriptions.

use ploop::Kind;
use ploop::descriptor::{Guid, Temporary};
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use snapshots::rename::describe;
use snapshots::tree;

use crate::common::{Host, kind};

#[test]
fn a_name_is_one_snapshots_and_a_description_is_free() {
    let host = Host::on(MemoryStore::shared());
    host.init(Version::V2);
    let (a, b) = (host.snap("a"), host.snap("b"));
    let place = host.place();
    let done = describe(
        &place,
        a,
        Some("first"),
        Some("before the upgrade\nof it all"),
    )
    .unwrap();
    assert_eq!(done.name.as_deref(), Some("first"));
    // The other half stays.
    describe(&place, a, None, Some("text")).unwrap();
    let done = describe(&place, a, Some("one"), None).unwrap();
    assert_eq!(
        (done.name.as_deref(), &*done.description),
        (Some("one"), "text")
    );
    // Its own name again is no clash, and the old one is free.
    describe(&place, a, Some("one"), None).unwrap();
    describe(&place, b, Some("a"), None).unwrap();
    assert_eq!(kind(describe(&place, b, Some("one"), None)), Kind::Exists);
    for bad in ["a/b", "-x", "x@y", &Guid::new_v4().to_string()[1..37]] {
        assert_eq!(
            kind(describe(&place, b, Some(bad), None)),
            Kind::Invalid,
            "{bad}"
        );
    }
    let nobody = Guid::new_v4();
    assert_eq!(
        kind(describe(&place, nobody, Some("n"), None)),
        Kind::NotFound
    );
    assert_eq!(
        kind(describe(&place, Guid::TOP, Some("n"), None)),
        Kind::Invalid
    );
    // An empty name takes it away.
    assert_eq!(describe(&place, b, Some(""), None).unwrap().name, None);
    let names: Vec<_> = tree::list(&place)
        .unwrap()
        .into_iter()
        .map(|s| s.name)
        .collect();
    assert_eq!(names, [Some("one".to_owned()), None]);
}

#[test]
fn what_is_being_removed_has_no_name_to_change() {
    let host = Host::on(MemoryStore::shared());
    host.init(Version::V2);
    let (a, b) = (host.snap("a"), host.snap("b"));
    let place = host.place();
    let mut d = place.descriptor().unwrap();
    d.shot_mut(a).unwrap().temporary = Temporary::Temporary;
    host.put(&d);
    assert_eq!(kind(describe(&place, a, Some("x"), None)), Kind::NotFound);
    // Its name is free at once.
    describe(&place, b, Some("a"), None).unwrap();
    let list = tree::list(&place).unwrap();
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].parent.as_ref(), list[0].current), (None, true));
}
