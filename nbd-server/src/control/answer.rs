//! What every route has in common: reading a request within bounds, running what may block, and
//! answering, an error always as a [`Failure`].

use std::sync::Arc;

use axum::Json;
use axum::body::HttpBody;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use ploop::error::{Error, Kind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use utoipa::IntoResponses;

use super::failure::{Failure, status};
use super::service::Service;

/// Longest body of a request, in bytes.
pub(super) const MAX_BODY: usize = 1 << 20;

/// What the routes answer from.
pub(super) type Shared = Arc<Service>;

/// What a route answers.
pub(super) type Answer<T> = Result<T, Refusal>;

/// An error as the client gets it.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    error: Error,
}

/// The same for the description of the API.
#[derive(IntoResponses)]
#[response(
    status = "default",
    description = "It failed; says what, where, and what to do next."
)]
#[expect(dead_code, reason = "read by the derived code only")]
pub(super) struct Fails(Failure);

impl Refusal {
    pub(super) fn new(status: StatusCode, error: Error) -> Refusal {
        Refusal { status, error }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal::new(status(error.kind()), error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(Failure::from(&self.error))).into_response()
    }
}

/// Runs what may block where it may.
pub(super) async fn blocking<T: Send + 'static>(
    service: Shared,
    work: impl FnOnce(&Service) -> ploop::Result<T> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(move || work(&service)).await {
        Ok(done) => Ok(done?),
        Err(_) => {
            let e = Error::new(Kind::Io, "the operation panicked").fix("Please report it");
            Err(e.into())
        }
    }
}

/// The same, for an answer in JSON.
pub(super) async fn json<T: Serialize + Send + 'static>(
    service: Shared,
    work: impl FnOnce(&Service) -> ploop::Result<T> + Send + 'static,
) -> Answer<Json<T>> {
    blocking(service, work).await.map(Json)
}

/// The variable parts of the path.
#[derive(Debug)]
pub(super) struct Named<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Named<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Named<T>> {
        let path = Path::from_request_parts(parts, state).await;
        let Path(names) = path.map_err(|e| Refusal::new(e.status(), invalid(e.body_text())))?;
        Ok(Named(names))
    }
}

/// What stands behind the question mark.
#[derive(Debug)]
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Asked<T>> {
        let query = Query::from_request_parts(parts, state).await;
        let Query(asked) = query.map_err(|e| Refusal::new(e.status(), invalid(e.body_text())))?;
        Ok(Asked(asked))
    }
}

/// A body of JSON, [`MAX_BODY`] bytes at most, sent within the time for it. Its type is not looked
/// at: the socket is its owner's alone.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Shared> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, service: &Shared) -> Answer<Body<T>> {
        let patience = service.limits.body;
        if request.body().size_hint().lower() > MAX_BODY as u64 {
            return Err(too_long());
        }
        let read = axum::body::to_bytes(request.into_body(), MAX_BODY);
        let bytes = match tokio::time::timeout(patience, read).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(e)) => {
                tracing::debug!(error = %e, "a body was not read");
                return Err(too_long());
            }
            Err(_) => {
                let text = format!("the body took longer than {} s", patience.as_secs_f64());
                let e = Error::invalid(text);
                return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, e));
            }
        };
        match Json::from_bytes(&bytes) {
            Ok(Json(body)) => Ok(Body(body)),
            Err(e) => Err(invalid(e.body_text()).into()),
        }
    }
}

fn too_long() -> Refusal {
    let text = format!("the body breaks off, or has more than {MAX_BODY} bytes");
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, Error::invalid(text))
}

fn invalid(text: String) -> Error {
    Error::invalid(text).fix("GET /openapi.json describes every request")
}
