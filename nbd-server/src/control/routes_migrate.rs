//! The routes of a container's move to another service.

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answer::{Answer, Body, Fails, Named, Shared, json};
use super::model::{Job, Migrate, Resolve, Resolved};
use super::routes_store::{Started, start};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(migrate))
        .routes(routes!(migrate_frozen))
        .routes(routes!(migrate_resolve))
}

/// Moves a container to another service under its clients, a job; cancelled, it stays here.
#[utoipa::path(post, path = "/v1/containers/{name}/migrate", tag = "migration",
    params(("name" = String, Path, description = "The container.")),
    request_body = Migrate,
    responses((status = 202, body = Job), Fails))]
async fn migrate(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<Migrate>,
) -> Answer<Started> {
    let (container, what) = (name.clone(), request.to.clone());
    start(&service, "migrate", &container, &what, move |o, job| {
        o.migrate(&name, &request, job)
    })
}

/// Says that what is inside a container is frozen, to the move that waits for it.
#[utoipa::path(post, path = "/v1/containers/{name}/migrate/frozen", tag = "migration",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200), Fails))]
async fn migrate_frozen(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Json<()>> {
    json(service, move |s| s.operations.migrate_frozen(&name)).await
}

/// Decides a move whose other side is gone: what may be lost by it is in the answer.
#[utoipa::path(post, path = "/v1/containers/{name}/migrate/resolve", tag = "migration",
    params(("name" = String, Path, description = "The container.")),
    request_body = Resolve,
    responses((status = 200, body = Resolved), Fails))]
async fn migrate_resolve(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<Resolve>,
) -> Answer<Json<Resolved>> {
    json(service, move |s| {
        s.operations.migrate_resolve(&name, &request)
    })
    .await
}
