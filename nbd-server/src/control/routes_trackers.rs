//! The routes of a container's trackers.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answer::{Answer, Body, Fails, Named, Shared, json};
use super::model::{Tracker, TrackerChange, TrackerMerge, TrackerStart};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(trackers, tracker_start))
        .routes(routes!(tracker_stop))
        .routes(routes!(tracker_clear))
        .routes(routes!(tracker_merge))
}

/// The dirty bitmaps of a container's disk, with what they have now.
#[utoipa::path(get, path = "/v1/containers/{name}/trackers", tag = "trackers",
    params(("name" = String, Path, description = "The container.")),
    responses((status = 200, body = Vec<Tracker>), Fails))]
async fn trackers(
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Answer<Json<Vec<Tracker>>> {
    json(service, move |s| s.operations.trackers(&name)).await
}

/// Begins a tracker at one instant; durable when this answers.
#[utoipa::path(post, path = "/v1/containers/{name}/trackers", tag = "trackers",
    params(("name" = String, Path, description = "The container.")),
    request_body = TrackerStart,
    responses((status = 201, body = Tracker), Fails))]
async fn tracker_start(
    State(service): State<Shared>,
    Named(name): Named<String>,
    Body(request): Body<TrackerStart>,
) -> Answer<(StatusCode, Json<Tracker>)> {
    let begun = json(service, move |s| {
        s.operations.tracker_start(&name, &request)
    })
    .await?;
    Ok((StatusCode::CREATED, begun))
}

/// Ends a tracker; durable when this answers.
#[utoipa::path(delete, path = "/v1/containers/{name}/trackers/{tracker}", tag = "trackers",
    params(
        ("name" = String, Path, description = "The container."),
        ("tracker" = String, Path, description = "Name or id of the tracker."),
    ),
    responses((status = 200, body = Tracker), Fails))]
async fn tracker_stop(
    State(service): State<Shared>,
    Named((name, tracker)): Named<(String, String)>,
) -> Answer<Json<Tracker>> {
    json(service, move |s| {
        let stop = TrackerChange::Stop;
        s.operations.tracker_change(&name, &tracker, &stop)
    })
    .await
}

/// Clears a tracker at one instant; answers with what it had. Durable when this answers.
#[utoipa::path(post, path = "/v1/containers/{name}/trackers/{tracker}/clear", tag = "trackers",
    params(
        ("name" = String, Path, description = "The container."),
        ("tracker" = String, Path, description = "Name or id of the tracker."),
    ),
    responses((status = 200, body = Tracker), Fails))]
async fn tracker_clear(
    State(service): State<Shared>,
    Named((name, tracker)): Named<(String, String)>,
) -> Answer<Json<Tracker>> {
    json(service, move |s| {
        let clear = TrackerChange::Clear;
        s.operations.tracker_change(&name, &tracker, &clear)
    })
    .await
}

/// Adds what another tracker has; durable when this answers.
#[utoipa::path(post, path = "/v1/containers/{name}/trackers/{tracker}/merge", tag = "trackers",
    params(
        ("name" = String, Path, description = "The container."),
        ("tracker" = String, Path, description = "Name or id of the tracker."),
    ),
    request_body = TrackerMerge,
    responses((status = 200, body = Tracker), Fails))]
async fn tracker_merge(
    State(service): State<Shared>,
    Named((name, tracker)): Named<(String, String)>,
    Body(request): Body<TrackerMerge>,
) -> Answer<Json<Tracker>> {
    json(service, move |s| {
        let merge = TrackerChange::Merge(request);
        s.operations.tracker_change(&name, &tracker, &merge)
    })
    .await
}
