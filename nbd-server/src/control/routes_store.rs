//! The routes of a store: containers, their snapshots, templates.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answer::{Answer, Asked, Body, Fails, Named, Shared, json};
use super::jobs::{Ended, JobHandle};
use super::model::{
    Checked, Compact, Container, CreateContainers, CreatedContainer, DiskSpace, Force,
    GroupSnapshot, Job, Limits, LimitsChange, Merge, Quota, QuotaChange, QuotaNow, Removed, Rename,
    Resize, Snapshot, SnapshotCreate, SnapshotTaken, Switch, Switched, Template, Tree,
};
use super::ops::Operations;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(containers, container_create))
        .routes(routes!(container, container_remove))
        .routes(routes!(check))
        .routes(routes!(quota, quota_change))
        .routes(routes!(quotas))
        .routes(routes!(limits, limits_change))
        .routes(routes!(tree))
        .routes(routes!(snapshots, snapshot_create))
        .routes(routes!(snapshot_rename, snapshot_delete))
        .routes(routes!(switch))
        .routes(routes!(merge))
        .routes(routes!(compact))
        .routes(routes!(disk_space))
        .routes(routes!(resize))
        .routes(routes!(group_snapshot))
        .routes(routes!(templates))
        .routes(routes!(template, template_remove))
        .routes(routes!(template_verify))
        .routes(routes!(template_flatten))
}

/// A job that was started, and where to look for it.
pub(super) type Started = (StatusCode, [(HeaderName, String); 1], Json<Job>);

/// Starts a job that is `work`.
pub(super) fn start(
    service: &Shared,
    kind: &str,
    container: &str,
    what: &str,
    work: impl FnOnce(&dyn Operations, &JobHandle) -> ploop::Result<Ended> + Send + 'static,
) -> Answer<Started> {
    let operations = service.operations.clone();
    let work = move |job: &JobHandle| work(operations.as_ref(), job);
    let id = service.jobs.start(kind, container, what, work)?;
    let place = [(header::LOCATION, format!("/v1/jobs/{id}"))];
    Ok((StatusCode::ACCEPTED, place, Json(service.jobs.get(id)?)))
}

/// All containers; a damaged one with its error.
#[utoipa::path(get, path = "/v1/containers", tag = "containers",
    responses((status = 200, body = Vec<Container>), Fails))]
async fn containers(State(service): State<Shared>) -> Answer<Json<Vec<Container>>> {
    json(service, |s| s.operations.containers()).await
}

/// Makes containers: all of them, durable together, or none.
#[utoipa::path(post, path = "/v1/containers", tag = "containers",
    request_body = CreateContainers,
    responses((status = 201, body = Vec<CreatedContainer>), Fails))]
async fn container_create(
    State(service): State<Shared>,
    Body(request): Body<CreateContainers>,
) -> Answer<(StatusCode, Json<Vec<CreatedContainer>>)> {
    let made = json(service, move |s| s.operations.create_containers(&request)).await?;
    Ok((StatusCode::CREATED, made))
}

/// A container.
#[utoipa::path(get, path = "/v1/containers/{name}", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = Container), Fails))]
async fn container(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Json<Container>> {
    json(service, move |s| s.operations.container(&name)).await
}

/// Removes a container and its data.
#[utoipa::path(delete, path = "/v1/containers/{name}", tag = "containers",
    params(("name" = String, Path, description = "The container."), Force),
    responses((status = 200, body = Removed), Fails))]
async fn container_remove(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Asked(Force { force }): Asked<Force>,
) -> Answer<Json<Removed>> {
    json(service, move |s| {
        s.operations.remove_container(&name, force)
    })
    .await
}

/// Looks whether a container's disk and all its images are sound, open or not. Nobody who uses it is
/// held up while it is.
#[utoipa::path(post, path = "/v1/containers/{name}/check", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = Checked), Fails))]
async fn check(State(service): State<Shared>, Named(name): Named<String>) -> Answer<Json<Checked>> {
    json(service, move |s| s.operations.check(&name)).await
}

/// What a container takes of its host, and may take.
#[utoipa::path(get, path = "/v1/containers/{name}/quota", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = Quota), Fails))]
async fn quota(State(service): State<Shared>, Named(name): Named<String>) -> Answer<Json<Quota>> {
    json(service, move |s| s.operations.quota(&name)).await
}

/// What the containers that are open under a quota take now, without a look at any file.
#[utoipa::path(get, path = "/v1/quotas", tag = "containers",
    responses((status = 200, body = Vec<QuotaNow>), Fails))]
async fn quotas(State(service): State<Shared>) -> Answer<Json<Vec<QuotaNow>>> {
    json(service, move |s| Ok(s.operations.quotas())).await
}

/// Changes what it may take; in force and durable when this answers.
#[utoipa::path(patch, path = "/v1/containers/{name}/quota", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    request_body = QuotaChange,
    responses((status = 200, body = Quota), Fails))]
async fn quota_change(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<QuotaChange>,
) -> Answer<Json<Quota>> {
    json(service, move |s| s.operations.quota_change(&name, &request)).await
}

/// The I/O limits of a container, and what they do.
#[utoipa::path(get, path = "/v1/containers/{name}/limits", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = Limits), Fails))]
async fn limits(State(service): State<Shared>, Named(name): Named<String>) -> Answer<Json<Limits>> {
    json(service, move |s| s.operations.limits(&name)).await
}

/// Changes I/O limits; in force and durable when this answers.
#[utoipa::path(patch, path = "/v1/containers/{name}/limits", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    request_body = LimitsChange,
    responses((status = 200, body = Limits), Fails))]
async fn limits_change(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<LimitsChange>,
) -> Answer<Json<Limits>> {
    json(service, move |s| {
        s.operations.limits_change(&name, &request)
    })
    .await
}

/// The tree of a container, with sizes.
#[utoipa::path(get, path = "/v1/containers/{name}/tree", tag = "snapshots",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = Tree), Fails))]
async fn tree(State(service): State<Shared>, Named(name): Named<String>) -> Answer<Json<Tree>> {
    json(service, move |s| s.operations.tree(&name)).await
}

/// The snapshots of a container.
#[utoipa::path(get, path = "/v1/containers/{name}/snapshots", tag = "snapshots",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = Vec<Snapshot>), Fails))]
async fn snapshots(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Json<Vec<Snapshot>>> {
    json(service, move |s| s.operations.snapshots(&name)).await
}

/// Makes a snapshot; durable when this answers.
#[utoipa::path(post, path = "/v1/containers/{name}/snapshots", tag = "snapshots",
    params(("name" = String, Path, description = "The container.")),
    request_body = SnapshotCreate,
    responses((status = 201, body = SnapshotTaken), Fails))]
async fn snapshot_create(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<SnapshotCreate>,
) -> Answer<(StatusCode, Json<SnapshotTaken>)> {
    let taken = json(service, move |s| {
        s.operations.snapshot_create(&name, &request)
    });
    Ok((StatusCode::CREATED, taken.await?))
}

/// Changes a snapshot's name or description.
#[utoipa::path(patch, path = "/v1/containers/{name}/snapshots/{snapshot}", tag = "snapshots",
    params(
        ("name" = String, Path, description = "The container."),
        ("snapshot" = String, Path, description = "GUID or name of the snapshot."),
    ),
    request_body = Rename,
    responses((status = 200, body = Snapshot), Fails))]
async fn snapshot_rename(
    State(service): State<Shared>,
    Named((name, snapshot)): Named<(String, String)>,
    Body(request): Body<Rename>,
) -> Answer<Json<Snapshot>> {
    json(service, move |s| {
        s.operations.snapshot_rename(&name, &snapshot, &request)
    })
    .await
}

/// Deletes a snapshot, in a job.
#[utoipa::path(delete, path = "/v1/containers/{name}/snapshots/{snapshot}", tag = "snapshots",
    params(
        ("name" = String, Path, description = "The container."),
        ("snapshot" = String, Path, description = "GUID or name of the snapshot."),
    ),
    responses((status = 202, body = Job), Fails))]
async fn snapshot_delete(
    State(service): State<Shared>,
    Named((name, snapshot)): Named<(String, String)>,
) -> Answer<Started> {
    let what = format!("snapshot {snapshot}");
    start(&service, "delete", &name.clone(), &what, move |o, job| {
        o.snapshot_delete(&name, &snapshot, job)
    })
}

/// Makes a container's disk what it was at a snapshot.
#[utoipa::path(post, path = "/v1/containers/{name}/switch", tag = "snapshots",
    params(("name" = String, Path, description = "The container.")),
    request_body = Switch,
    responses((status = 200, body = Switched), Fails))]
async fn switch(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<Switch>,
) -> Answer<Json<Switched>> {
    json(service, move |s| s.operations.switch(&name, &request)).await
}

/// Merges snapshots, in a job.
#[utoipa::path(post, path = "/v1/containers/{name}/merge", tag = "snapshots",
    params(("name" = String, Path, description = "The container.")),
    request_body = Merge,
    responses((status = 202, body = Job), Fails))]
async fn merge(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<Merge>,
) -> Answer<Started> {
    let node = match &request.snapshot {
        Some(snapshot) => format!("snapshot {snapshot}"),
        None => "the live disk".to_owned(),
    };
    let what = match (request.go_on, request.all) {
        (true, _) => "what was begun".to_owned(),
        (false, true) => format!("all below {node}"),
        (false, false) => node,
    };
    start(&service, "merge", &name.clone(), &what, move |o, job| {
        o.merge(&name, &request, job)
    })
}

/// Where the bytes are that a container takes of its host.
#[utoipa::path(get, path = "/v1/containers/{name}/space", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = DiskSpace), Fails))]
async fn disk_space(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Json<DiskSpace>> {
    json(service, move |s| s.operations.disk_space(&name)).await
}

/// Gives back the space that a container does not need, beside its clients: a job.
#[utoipa::path(post, path = "/v1/containers/{name}/compact", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    request_body = Compact,
    responses((status = 202, body = Job), Fails))]
async fn compact(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<Compact>,
) -> Answer<Started> {
    let what = match request.dry_run {
        true => "what it would give back",
        false => "the space it does not need",
    };
    start(&service, "compact", &name.clone(), what, move |o, job| {
        o.compact(&name, &request, job)
    })
}

/// Resizes a container's disk that nobody uses, and the file system on it, in a job.
#[utoipa::path(post, path = "/v1/containers/{name}/resize", tag = "containers",
    params(("name" = String, Path, description = "The container.")),
    request_body = Resize,
    responses((status = 202, body = Job), Fails))]
async fn resize(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<Resize>,
) -> Answer<Started> {
    let what = format!("to {} bytes", request.size);
    start(&service, "resize", &name.clone(), &what, move |o, job| {
        o.resize(&name, &request, job)
    })
}

/// Makes snapshots of several containers at one instant; durable when this answers.
#[utoipa::path(post, path = "/v1/group-snapshots", tag = "snapshots",
    request_body = GroupSnapshot,
    responses((status = 201, body = Vec<SnapshotTaken>), Fails))]
async fn group_snapshot(
    State(service): State<Shared>,
    Body(request): Body<GroupSnapshot>,
) -> Answer<(StatusCode, Json<Vec<SnapshotTaken>>)> {
    let taken = json(service, move |s| s.operations.snapshot_group(&request)).await?;
    Ok((StatusCode::CREATED, taken))
}

/// All templates.
#[utoipa::path(get, path = "/v1/templates", tag = "templates",
    responses((status = 200, body = Vec<Template>), Fails))]
async fn templates(State(service): State<Shared>) -> Answer<Json<Vec<Template>>> {
    json(service, |s| s.operations.templates()).await
}

/// A template.
#[utoipa::path(get, path = "/v1/templates/{name}", tag = "templates",
    params(("name" = String, Path, description = "The template.")),
    responses((status = 200, body = Template), Fails))]
async fn template(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Json<Template>> {
    json(service, move |s| s.operations.template(&name)).await
}

/// Removes a template that nobody uses.
#[utoipa::path(delete, path = "/v1/templates/{name}", tag = "templates",
    params(("name" = String, Path, description = "The template.")),
    responses((status = 200, body = Removed), Fails))]
async fn template_remove(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Json<Removed>> {
    json(service, move |s| s.operations.template_remove(&name)).await
}

/// Compares a template with the hash recorded at its import, in a job.
#[utoipa::path(post, path = "/v1/templates/{name}/verify", tag = "templates",
    params(("name" = String, Path, description = "The template.")),
    responses((status = 202, body = Job), Fails))]
async fn template_verify(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Started> {
    let (on, what) = (format!("template:{name}"), format!("template {name}"));
    start(&service, "verify", &on, &what, move |o, job| {
        o.template_verify(&name, job)
    })
}

/// Makes a template's chain one layer, in a job.
#[utoipa::path(post, path = "/v1/templates/{name}/flatten", tag = "templates",
    params(("name" = String, Path, description = "The template.")),
    responses((status = 202, body = Job), Fails))]
async fn template_flatten(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Started> {
    let (on, what) = (format!("template:{name}"), format!("template {name}"));
    start(&service, "flatten", &on, &what, move |o, job| {
        o.template_flatten(&name, job)
    })
}
