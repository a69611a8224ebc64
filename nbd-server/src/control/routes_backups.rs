//! The routes of a container's backups.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answer::{Answer, Body, Fails, Named, Shared, json};
use super::model::{Backup, BackupRun, BackupStart, Job};
use super::routes_store::{Started, start};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(backups, backup_begin))
        .routes(routes!(backup_abandon))
        .routes(routes!(backup_run))
}

/// The backups of a container that have begun and not ended.
#[utoipa::path(get, path = "/v1/containers/{name}/backups", tag = "backups",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = Vec<Backup>), Fails))]
async fn backups(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Json<Vec<Backup>>> {
    json(service, move |s| s.operations.backups(&name)).await
}

/// Begins a backup: its instant is before this answers; durable then. One that had begun for the same
/// target is what is answered.
#[utoipa::path(post, path = "/v1/containers/{name}/backups", tag = "backups",
    params(("name" = String, Path, description = "The container.")),
    request_body = BackupStart,
    responses((status = 201, body = Backup), Fails))]
async fn backup_begin(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<BackupStart>,
) -> Answer<(StatusCode, Json<Backup>)> {
    let begun = json(service, move |s| s.operations.backup_begin(&name, &request)).await?;
    Ok((StatusCode::CREATED, begun))
}

/// Copies a backup that has begun, a job; cancelled, it pauses.
#[utoipa::path(post, path = "/v1/containers/{name}/backups/{backup}/run", tag = "backups",
    params(
        ("name" = String, Path, description = "The container."),
        ("backup" = String, Path, description = "Id of the backup."),
    ),
    request_body = BackupRun,
    responses((status = 202, body = Job), Fails))]
async fn backup_run(
    State(service): State<Shared>,
    Named((name, backup)): Named<(String, String)>,
    Body(request): Body<BackupRun>,
) -> Answer<Started> {
    let container = name.clone();
    let what = backup.clone();
    start(&service, "backup", &container, &what, move |o, job| {
        o.backup_run(&name, &backup, &request, job)
    })
}

/// Drops a backup that has not ended, a job: its tracker has its bits again.
#[utoipa::path(delete, path = "/v1/containers/{name}/backups/{backup}", tag = "backups",
    params(
        ("name" = String, Path, description = "The container."),
        ("backup" = String, Path, description = "Id of the backup."),
    ),
    responses((status = 202, body = Job), Fails))]
async fn backup_abandon(
    State(service): State<Shared>,
    Named((name, backup)): Named<(String, String)>,
) -> Answer<Started> {
    let container = name.clone();
    let what = backup.clone();
    start(&service, "abandon", &container, &what, move |o, job| {
        o.backup_abandon(&name, &backup, job)
    })
}
