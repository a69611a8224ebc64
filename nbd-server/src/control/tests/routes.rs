//! Every route answers, and the description has every route.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;

/// Method, path in the description, path asked for, body, status.
const ROUTES: &[(&str, &str, &str, &str, u16)] = &[
    ("get", "/v1/info", "/v1/info", "", 200),
    ("get", "/v1/space", "/v1/space", "", 200),
    ("get", "/v1/exports", "/v1/exports", "", 200),
    ("get", "/v1/connections", "/v1/connections", "", 200),
    (
        "delete",
        "/v1/connections/{id}",
        "/v1/connections/5",
        "",
        404,
    ),
    ("get", "/v1/jobs", "/v1/jobs", "", 200),
    ("get", "/v1/jobs/{id}", "/v1/jobs/1000", "", 404),
    (
        "post",
        "/v1/jobs/{id}/cancel",
        "/v1/jobs/1000/cancel",
        "",
        404,
    ),
    ("get", "/metrics", "/metrics", "", 200),
    ("get", "/openapi.json", "/openapi.json", "", 200),
    ("get", "/v1/containers", "/v1/containers", "", 200),
    (
        "post",
        "/v1/containers",
        "/v1/containers",
        r#"{"names":["a"],"template":"t"}"#,
        201,
    ),
    ("get", "/v1/containers/{name}", "/v1/containers/a", "", 200),
    (
        "delete",
        "/v1/containers/{name}",
        "/v1/containers/a?force=true",
        "",
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/check",
        "/v1/containers/a/check",
        "null",
        200,
    ),
    (
        "get",
        "/v1/containers/{name}/quota",
        "/v1/containers/a/quota",
        "",
        200,
    ),
    (
        "patch",
        "/v1/containers/{name}/quota",
        "/v1/containers/a/quota",
        r#"{"quota":5}"#,
        200,
    ),
    ("get", "/v1/quotas", "/v1/quotas", "", 200),
    (
        "get",
        "/v1/containers/{name}/limits",
        "/v1/containers/a/limits",
        "",
        200,
    ),
    (
        "patch",
        "/v1/containers/{name}/limits",
        "/v1/containers/a/limits",
        r#"{"iops":5}"#,
        200,
    ),
    (
        "get",
        "/v1/containers/{name}/tree",
        "/v1/containers/a/tree",
        "",
        200,
    ),
    (
        "get",
        "/v1/containers/{name}/snapshots",
        "/v1/containers/a/snapshots",
        "",
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/snapshots",
        "/v1/containers/a/snapshots",
        "{}",
        201,
    ),
    (
        "patch",
        "/v1/containers/{name}/snapshots/{snapshot}",
        "/v1/containers/a/snapshots/s",
        r#"{"name":"t"}"#,
        200,
    ),
    (
        "delete",
        "/v1/containers/{name}/snapshots/{snapshot}",
        "/v1/containers/a/snapshots/s",
        "",
        202,
    ),
    (
        "post",
        "/v1/containers/{name}/switch",
        "/v1/containers/a/switch",
        r#"{"snapshot":"s"}"#,
        200,
    ),
    (
        "get",
        "/v1/containers/{name}/space",
        "/v1/containers/a/space",
        "",
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/compact",
        "/v1/containers/a/compact",
        r#"{"dry_run":true}"#,
        202,
    ),
    (
        "get",
        "/v1/containers/{name}/trackers",
        "/v1/containers/a/trackers",
        "",
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/trackers",
        "/v1/containers/a/trackers",
        r#"{"name":"t"}"#,
        201,
    ),
    (
        "delete",
        "/v1/containers/{name}/trackers/{tracker}",
        "/v1/containers/a/trackers/t",
        "",
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/trackers/{tracker}/clear",
        "/v1/containers/a/trackers/t/clear",
        "",
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/trackers/{tracker}/merge",
        "/v1/containers/a/trackers/t/merge",
        r#"{"from":"u"}"#,
        200,
    ),
    (
        "get",
        "/v1/containers/{name}/backups",
        "/v1/containers/a/backups",
        "",
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/backups",
        "/v1/containers/a/backups",
        r#"{"target":"/t"}"#,
        201,
    ),
    (
        "delete",
        "/v1/containers/{name}/backups/{backup}",
        "/v1/containers/a/backups/b",
        "",
        202,
    ),
    (
        "post",
        "/v1/containers/{name}/backups/{backup}/run",
        "/v1/containers/a/backups/b/run",
        "{}",
        202,
    ),
    (
        "post",
        "/v1/containers/{name}/migrate",
        "/v1/containers/a/migrate",
        r#"{"to":"unix:/s"}"#,
        202,
    ),
    (
        "post",
        "/v1/containers/{name}/migrate/frozen",
        "/v1/containers/a/migrate/frozen",
        "",
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/migrate/resolve",
        "/v1/containers/a/migrate/resolve",
        r#"{"decision":"take"}"#,
        200,
    ),
    (
        "post",
        "/v1/containers/{name}/merge",
        "/v1/containers/a/merge",
        r#"{"snapshot":"s"}"#,
        202,
    ),
    (
        "post",
        "/v1/containers/{name}/resize",
        "/v1/containers/a/resize",
        r#"{"size":65536,"shrink":true}"#,
        202,
    ),
    (
        "post",
        "/v1/group-snapshots",
        "/v1/group-snapshots",
        r#"{"containers":["a","b"]}"#,
        201,
    ),
    ("get", "/v1/templates", "/v1/templates", "", 200),
    ("get", "/v1/templates/{name}", "/v1/templates/t", "", 200),
    ("delete", "/v1/templates/{name}", "/v1/templates/t", "", 200),
    (
        "post",
        "/v1/templates/{name}/verify",
        "/v1/templates/t/verify",
        "",
        202,
    ),
    (
        "post",
        "/v1/templates/{name}/flatten",
        "/v1/templates/t/flatten",
        "",
        202,
    ),
];

#[test]
fn every_route_answers_as_described() {
    let rig = Rig::new();
    let document = serde_json::to_value(openapi::document()).unwrap();
    for (method, described, asked, body, status) in ROUTES {
        let (got, answer) = hostile::ask(&rig.path(), method, asked, body);
        assert_eq!(got, *status, "{method} {asked}: {answer}");
        let responses = &document["paths"][described][method]["responses"];
        let is_described = !responses[got.to_string()].is_null()
            || (got >= 400 && !responses["default"].is_null());
        assert!(is_described, "{method} {described} {got}: {responses}");
        if got >= 400 {
            let failure: Failure = serde_json::from_str(&answer).unwrap();
            assert!(!failure.text.is_empty());
        }
    }
}

#[test]
fn the_description_has_every_route_and_no_other() {
    let rig = Rig::new();
    let text = rig.client().text("/openapi.json").unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let mut described = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            described.insert((method.clone(), path.clone()));
            let summary = &operation["summary"];
            assert!(
                summary.is_string(),
                "{method} {path} says what it does: {operation}"
            );
        }
    }
    let known = ROUTES.iter().map(|r| (r.0.to_owned(), r.1.to_owned()));
    assert_eq!(described, known.collect());
    // Every reference leads somewhere.
    let schemas = &document["components"]["schemas"];
    for name in text.split("#/components/schemas/").skip(1) {
        let name = name.split('"').next().unwrap();
        assert!(schemas[name].is_object(), "{name}");
    }
}

#[test]
fn statuses_fit_the_kinds_of_failure() {
    let rig = Rig::new();
    for (kind, status) in [
        ("not-found", 404),
        ("exists", 409),
        ("in-use", 409),
        ("no-space", 507),
        ("io", 500),
        ("corrupt", 500),
        ("panic", 500),
    ] {
        let (got, answer) = hostile::ask(&rig.path(), "get", &format!("/v1/containers/{kind}"), "");
        assert_eq!(got, status, "{answer}");
        let failure: Failure = serde_json::from_str(&answer).unwrap();
        assert_eq!(failure.kind, if kind == "panic" { "io" } else { kind });
    }
    for (method, path, body, status) in [
        ("get", "/v2/info", "", 404),
        ("put", "/v1/containers", "{}", 405),
        ("post", "/v1/containers", "{", 400),
        ("post", "/v1/containers", "", 400),
        ("post", "/v1/containers", r#"{"names":"a"}"#, 400),
        (
            "post",
            "/v1/containers",
            r#"{"names":["a"],"templat":"t"}"#,
            400,
        ),
        ("get", "/v1/jobs/x", "", 400),
        ("get", "/v1/containers/%ff", "", 400),
        ("delete", "/v1/containers/a?force=perhaps", "", 400),
    ] {
        let (got, answer) = hostile::ask(&rig.path(), method, path, body);
        assert_eq!(got, status, "{method} {path} {body}: {answer}");
        let failure: Failure = serde_json::from_str(&answer).unwrap();
        assert!(!failure.text.is_empty());
    }
}

/// `name{labels}` and value of each line; checks that the text is well formed.
fn samples(text: &str) -> Vec<(String, f64)> {
    let mut typed = BTreeSet::new();
    let mut samples = Vec::new();
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.split(' ');
            if words.next() == Some("TYPE") {
                assert!(
                    typed.insert(words.next().unwrap().to_owned()),
                    "{line}: twice"
                );
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        let base = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end))
            .unwrap_or(name);
        assert!(
            typed.contains(name) || typed.contains(base),
            "{line}: no type"
        );
        samples.push((series.to_owned(), value.parse().unwrap()));
    }
    samples
}

#[test]
fn metrics_are_text_that_prometheus_reads() {
    let rig = Rig::new();
    rig.meter.snapshot_pause(Duration::from_micros(400));
    let job: Job = rig.client().post("/v1/templates/t/verify", &()).unwrap();
    let samples = samples(&rig.client().text("/metrics").unwrap());
    let value = |series: &str| {
        let found = samples.iter().find(|(s, _)| s == series);
        found.unwrap_or_else(|| panic!("{series}: {samples:?}")).1
    };
    assert_eq!(value("ploop_jobs{state=\"running\"}"), 1.0);
    assert_eq!(value("ploop_open_disks"), 7.0);
    assert_eq!(value("ploop_snapshot_pause_seconds_count"), 1.0);
    assert!(value("ploop_open_files") > 3.0);
    let limit = "ploop_limit_bytes_per_second{container=\"ct\",op=\"write\"}";
    assert_eq!(value(limit), 5.0);
    assert_eq!(
        value("ploop_throttled_requests_total{container=\"ct\"}"),
        2.0
    );
    assert_eq!(
        value("ploop_throttled_seconds_total{container=\"ct\"}"),
        0.5
    );
    assert_eq!(value("ploop_store_limit_bytes_per_second"), 7.0);
    assert_eq!(value("ploop_quota_bytes{container=\"ct\"}"), 8192.0);
    assert_eq!(value("ploop_charged_bytes{container=\"ct\"}"), 4096.0);
    assert_eq!(value("ploop_quota_refused_total{container=\"ct\"}"), 3.0);
    assert_eq!(value("ploop_host_free_bytes"), 9.0);
    assert_eq!(value("ploop_host_level{level=\"low\"}"), 1.0);
    assert_eq!(value("ploop_host_level{level=\"full\"}"), 0.0);
    assert_eq!(value("ploop_host_waiting_requests"), 3.0);
    assert_eq!(value("ploop_reserve_given_bytes_total"), 4.0);
    rig.jobs.cancel(job.id).unwrap();
    let unique: BTreeSet<_> = samples.iter().map(|(s, _)| s).collect();
    assert_eq!(unique.len(), samples.len(), "a series stands once");
}

#[test]
fn what_the_routes_answer_is_what_the_client_reads() {
    let rig = Rig::new();
    let client = rig.client();
    let exports: Vec<model::Export> = client.get("/v1/exports").unwrap();
    assert_eq!((exports[0].name.as_str(), exports[0].open), ("disk", false));
    let removed: model::Removed = client.delete("/v1/containers/a?force=true").unwrap();
    assert_eq!(removed.freed, Some(1));
    let request = model::GroupSnapshot {
        containers: vec!["a".into(), "b".into()],
        ..Default::default()
    };
    let taken: Vec<SnapshotTaken> = client.post("/v1/group-snapshots", &request).unwrap();
    assert_eq!(taken.len(), 2);
    let tree: model::Tree = client.get("/v1/containers/large/tree").unwrap();
    assert_eq!(tree.nodes.len(), 20_000);
    let other = client.get::<Vec<u64>>("/v1/info").unwrap_err();
    assert_eq!(other.kind(), Kind::Unsupported, "{other}");
    let made: Value = client
        .post("/v1/containers", &json!({"names": ["x"]}))
        .unwrap();
    assert_eq!(made[0]["name"], "x");
}
