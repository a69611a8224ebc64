//! The scenes that all of these tests are about.

use ploop::format::ploop::Version;
use ploop_tests::crash::scene::{Op, Plan};

use Op::{Create, Delete, Run};

/// Snapshots, one right after the other, of one disk and of two.
pub(crate) fn creations() -> Vec<Plan> {
    let twice = [Create("x"), Create("y")];
    let one = Plan::chain("create", &[("a", &[0, 1])], &[1, 2]).does(&twice);
    let first = Plan {
        version: Version::V1,
        ..Plan::chain("create, the first", &[], &[0, 3]).does(&twice)
    };
    let group = Plan {
        disks: 2,
        ..Plan::chain("create, a group", &[("a", &[0])], &[1]).does(&[Create("x")])
    };
    vec![one, first, group]
}

/// Deletions that are one step.
pub(crate) fn leaves() -> Vec<Plan> {
    let leaf = Plan {
        aside: Some("a"),
        ..Plan::chain("delete a leaf", &[("a", &[0]), ("b", &[1, 2])], &[2, 3])
    };
    vec![leaf.does(&[Delete("kept"), Run(true)])]
}

/// Merges with each kind of child and parent, in both directions.
pub(crate) fn merges() -> Vec<Plan> {
    let gone = [Delete("b"), Run(true)];
    let up: &[(&str, &[u64])] = &[("a", &[0, 1]), ("b", &[1, 2, 3]), ("c", &[1, 3, 5, 6, 7])];
    let down: &[(&str, &[u64])] = &[("a", &[0, 1]), ("b", &[1, 2, 3, 6]), ("c", &[3, 7])];
    let v1 = |plan: Plan| Plan {
        version: Version::V1,
        ..plan
    };
    let aside = |plan: Plan| Plan {
        aside: Some("a"),
        ..plan
    };
    let raw = |plan: Plan| Plan { raw: true, ..plan };
    vec![
        Plan::chain("into the top", &up[..2], &[2, 4]).does(&gone),
        Plan::chain("up in the chain", up, &[0, 4]).does(&gone),
        v1(Plan::chain("down in the chain", down, &[0, 4])).does(&gone),
        aside(v1(Plan::chain("up aside", up, &[0, 4]))).does(&gone),
        aside(Plan::chain("down aside", down, &[0, 4])).does(&gone),
        Plan::chain("the base, down", &[("b", &[0, 1, 2, 3]), ("c", &[2])], &[4]).does(&gone),
        raw(Plan::chain(
            "a raw base into the top",
            &[("b", &[])],
            &[2, 6],
        ))
        .does(&gone),
        raw(Plan::chain(
            "a raw base into the chain",
            &[("b", &[]), ("c", &[2, 6])],
            &[1],
        ))
        .does(&gone),
        Plan::chain("all", down, &[0, 4]).does(&[
            Delete("a"),
            Delete("b"),
            Delete("c"),
            Run(false),
        ]),
        Plan {
            shared: true,
            ..Plan::chain("a shared layer", &[("b", &[0])], &[0, 1]).does(&gone)
        },
    ]
}

/// All of them.
pub(crate) fn all() -> Vec<Plan> {
    let mut all = creations();
    all.extend(leaves());
    all.extend(merges());
    all
}
