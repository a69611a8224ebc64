//! The holder's own control API, in the manner of the service's ([`crate::control`]).
//!
//! | | |
//! |---|---|
//! | `GET /v1/info` | the program, as a service's |
//! | `GET /v1/holder` | [`Status`]: the server, the exports, what is kept of each |
//! | `POST /v1/holder/to` | [`Move`]: another server from now on; answered at once, with the status |

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use ploop::error::{Error, Result};

use crate::control::answer::Refusal;
use crate::control::model::Info;
use crate::control::service::{Limits, serve as answer};
use crate::control::socket::Listening;
use crate::hold::hall::Hall;
use crate::hold::line::Address;
use crate::hold::model::{Move, Status};

/// Longest body of a request, in bytes.
const MAX_BODY: usize = 64 << 10;

/// Answers until the holder stops.
pub(super) async fn serve(listening: Listening, hall: Arc<Hall>) -> Result<()> {
    let stop = hall.stopped();
    let router = Router::new()
        .route("/v1/info", get(info))
        .route("/v1/holder", get(status))
        .route("/v1/holder/to", post(move_to))
        .fallback(unknown)
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .with_state(hall);
    answer(listening, router, Limits::default(), stop).await
}

async fn info() -> Json<Info> {
    Json(Info {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        program: "ploop hold".into(),
        ..Info::default()
    })
}

async fn status(State(hall): State<Arc<Hall>>) -> Json<Status> {
    Json(hall.status())
}

async fn move_to(
    State(hall): State<Arc<Hall>>,
    body: axum::body::Bytes,
) -> std::result::Result<Json<Status>, Refusal> {
    let wanted: Move = serde_json::from_slice(&body)
        .map_err(|e| Error::invalid("not a move: {\"to\": ADDRESS}").caused_by(e))?;
    hall.move_to(Address::parse(&wanted.to)?);
    Ok(Json(hall.status()))
}

async fn unknown() -> Refusal {
    let what = "there is nothing at that path";
    Error::new(ploop::error::Kind::NotFound, what)
        .fix("A holder has /v1/info, /v1/holder and /v1/holder/to")
        .into()
}
