//! The routes of the service itself: what it is, exports, connections, jobs, metrics.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use ploop::error::{Error, Kind};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::answer::{Answer, Asked, Fails, Named, Shared, blocking, json};
use super::metrics;
use super::model::{Connection, Export, Info, Job, Space, Wait};
use super::openapi::{__path_openapi, openapi};
use super::service::seconds;
use crate::serve::{Connected, Totals};

/// Longest wait for a job, in seconds.
const MAX_WAIT: f64 = 30.0;

/// How long a connection that is ended has to let go of its export.
const END_PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(info))
        .routes(routes!(space))
        .routes(routes!(exports))
        .routes(routes!(connections))
        .routes(routes!(connection_end))
        .routes(routes!(jobs))
        .routes(routes!(job))
        .routes(routes!(job_cancel))
        .routes(routes!(metrics))
        .routes(routes!(openapi))
}

/// The service.
#[utoipa::path(get, path = "/v1/info", tag = "service", responses((status = 200, body = Info)))]
async fn info(State(service): State<Shared>) -> Json<Info> {
    Json(service.info.clone())
}

/// The host's room: what is left of it, what is kept in reserve, who waits for some. Not of a service
/// that writes nothing.
#[utoipa::path(get, path = "/v1/space", tag = "service",
    responses((status = 200, body = Space), Fails))]
async fn space(State(service): State<Shared>) -> Answer<Json<Space>> {
    json(service, |service| {
        let none = || Error::new(Kind::NotFound, "the host's room is not looked after here");
        service.operations.space().ok_or_else(none)
    })
    .await
}

/// What NBD clients can open.
#[utoipa::path(get, path = "/v1/exports", tag = "exports",
    responses((status = 200, body = Vec<Export>), Fails))]
async fn exports(State(service): State<Shared>) -> Answer<Json<Vec<Export>>> {
    json(service, |service| {
        let mut clients = service.connections.clients();
        let mut exports = service.operations.exports()?;
        for export in &mut exports {
            export.clients = clients.remove(&export.name).unwrap_or(0) as u64;
            export.open |= export.clients > 0;
        }
        Ok(exports)
    })
    .await
}

impl From<Connected> for Connection {
    fn from(c: Connected) -> Connection {
        let done = Totals::of(&c.counters);
        Connection {
            id: c.id,
            export: c.export,
            peer: c.peer,
            since: seconds(c.since),
            reads: done.reads,
            read_bytes: done.read_bytes,
            writes: done.writes,
            write_bytes: done.write_bytes,
            flushes: done.flushes,
            errors: done.errors,
        }
    }
}

/// The NBD clients that use an export.
#[utoipa::path(get, path = "/v1/connections", tag = "exports",
    responses((status = 200, body = Vec<Connection>)))]
async fn connections(State(service): State<Shared>) -> Json<Vec<Connection>> {
    let all = service.connections.list();
    Json(all.into_iter().map(Connection::from).collect())
}

/// Ends a connection, and says what it did.
#[utoipa::path(delete, path = "/v1/connections/{id}", tag = "exports",
    params(("id" = u64, Path, description = "The connection.")),
    responses((status = 200, body = Connection), Fails))]
async fn connection_end(
    State(service): State<Shared>,
    Named(id): Named<u64>,
) -> Answer<Json<Connection>> {
    json(service, move |service| {
        let all = service.connections.list();
        let Some(one) = all.into_iter().find(|c| c.id == id) else {
            let what = format!("there is no connection {id}");
            return Err(Error::new(Kind::NotFound, what));
        };
        service.connections.end_id(id, END_PATIENCE)?;
        Ok(one.into())
    })
    .await
}

/// All jobs, the oldest first.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses((status = 200, body = Vec<Job>)))]
async fn jobs(State(service): State<Shared>) -> Json<Vec<Job>> {
    Json(service.jobs.list())
}

/// A job, at once or when it is over.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs",
    params(("id" = u64, Path, description = "The job."), Wait),
    responses((status = 200, body = Job), Fails))]
async fn job(
    State(service): State<Shared>,
    Named(id): Named<u64>,
    Asked(asked): Asked<Wait>,
) -> Answer<Json<Job>> {
    let wait = asked.wait.unwrap_or(0.0);
    // Not a number is in no range.
    if !(0.0..=f64::MAX).contains(&wait) {
        let what = format!("wait={wait} is no number of seconds");
        return Err(Error::invalid(what).into());
    }
    let wait = Duration::from_secs_f64(wait.min(MAX_WAIT));
    Ok(Json(service.jobs.wait_async(id, wait).await?))
}

/// Tells a job to stop. What it came to is the job's state, later.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", tag = "jobs",
    params(("id" = u64, Path, description = "The job.")),
    responses((status = 200, body = Job), Fails))]
async fn job_cancel(State(service): State<Shared>, Named(id): Named<u64>) -> Answer<Json<Job>> {
    Ok(Json(service.jobs.cancel(id)?))
}

/// Metrics for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "service",
    responses((status = 200, description = "Text format 0.0.4.", body = String), Fails))]
async fn metrics(State(service): State<Shared>) -> Answer<Response> {
    let text = blocking(service, |service| Ok(metrics::render(service))).await?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}
