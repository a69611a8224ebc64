//! The description of the API, made from the routes themselves: what is not in it is not served.

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use ploop::error::{Error, Kind};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use super::answer::{Refusal, Shared};
use super::service::Peer;
use super::{routes, routes_backups, routes_migrate, routes_store, routes_trackers};

#[derive(OpenApi)]
#[openapi(info(
    title = "ploop",
    description = "Control of a service that serves disks of containers over NBD. Times are \
                   seconds since 1970, sizes bytes. Whatever fails answers with a Failure."
))]
struct Document;

fn all() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(routes::routes())
        .merge(routes_store::routes())
        .merge(routes_trackers::routes())
        .merge(routes_backups::routes())
        .merge(routes_migrate::routes())
}

/// The description, as served at `/openapi.json`.
pub fn document() -> utoipa::openapi::OpenApi {
    all().split_for_parts().1
}

/// All routes.
pub(super) fn router(service: Shared) -> Router {
    let (router, _) = all().split_for_parts();
    router
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn(log))
        .with_state(service)
}

async fn unknown(State(_): State<Shared>, request: Request) -> Refusal {
    let what = format!("there is nothing at {}", request.uri().path());
    Error::new(Kind::NotFound, what)
        .fix("GET /openapi.json describes all there is")
        .into()
}

async fn wrong_method(State(_): State<Shared>, request: Request) -> Refusal {
    let what = format!("{} has no {}", request.uri().path(), request.method());
    let e = Error::invalid(what).fix("GET /openapi.json describes all there is");
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, e)
}

/// Logs what changes something, and who asked for it.
async fn log(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let peer = request.extensions().get::<Peer>().cloned();
    let answer = next.run(request).await;
    let (peer, status) = (peer.as_ref().map(|p| &*p.0), answer.status().as_u16());
    if method == Method::GET {
        tracing::debug!(%method, path, peer, status, "asked");
    } else {
        tracing::info!(%method, path, peer, status, "asked");
    }
    answer
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "service",
    responses((status = 200, description = "OpenAPI 3.1, JSON.")))]
pub(super) async fn openapi() -> Response {
    match document().to_json() {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Err(e) => {
            let e = Error::new(Kind::Io, "write the description of the API").caused_by(e);
            Refusal::from(e).into_response()
        }
    }
}
