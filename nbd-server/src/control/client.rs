//! The client of the control API: blocking, for the CLI. What failed in the service is the same
//! [`Error`] here. Each request has a connection of its own: a client holds nothing while it is
//! not waiting for an answer.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use ploop::error::{Error, Kind, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::failure::Failure;
use super::model::{Info, Job, JobState};
use super::socket::Place;

/// Longest answer that is taken, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// How long a service may take to say that it is there.
const HELLO: Duration = Duration::from_secs(10);

/// How often the progress of a job is asked for, in seconds.
const LOOK: f64 = 0.25;

/// A service that answers.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    runtime: Runtime,
    /// What each request may take.
    limit: Option<Duration>,
    info: Info,
}

/// The path of a resource: `/v1`, and each part escaped.
pub fn resource(parts: &[&str]) -> String {
    let mut path = String::from("/v1");
    for part in parts {
        path.push('/');
        for &b in part.as_bytes() {
            match b {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => {
                    path.push(char::from(b));
                }
                // A part that is only dots would be a step up for whoever resolves paths.
                _ => path.push_str(&format!("%{b:02X}")),
            }
        }
    }
    path
}

impl Client {
    /// The service that answers at the socket `path`. Errors: `NotFound` when nobody does, `InUse`
    /// when somebody has it and does not answer. Blocks for at most ten seconds.
    pub fn connect(path: &Path) -> Result<Client> {
        Client::connect_in(path, HELLO, None)
    }

    /// The same, for who has no more time: that, and each request, takes `limit` at most. Errors: `InUse`,
    /// too, where a request took longer; then it may be done or not.
    pub fn connect_within(path: &Path, limit: Duration) -> Result<Client> {
        Client::connect_in(path, limit.min(HELLO), Some(limit))
    }

    fn connect_in(path: &Path, hello_limit: Duration, limit: Option<Duration>) -> Result<Client> {
        let failed = |e| Error::new(Kind::Io, "start the client").caused_by(e);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let mut client = Client {
            path: path.to_owned(),
            runtime: runtime.map_err(failed)?,
            limit,
            info: Info::default(),
        };
        let path_of_info = resource(&["info"]);
        let hello = client.send(Method::GET, &path_of_info, Bytes::new());
        let hello = client
            .runtime
            .block_on(client.timely(Some(hello_limit), hello));
        client.info = client.read(&hello?)?;
        Ok(client)
    }

    async fn timely<T>(
        &self,
        limit: Option<Duration>,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let Some(limit) = limit else {
            return work.await;
        };
        // Made inside: the time runs on the client's runtime.
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
            let what = "the service behind the control socket does not answer";
            let fix = "Look at its log; if it hangs, end it with SIGKILL: nothing flushed is lost";
            Err(Error::new(Kind::InUse, what).on(&self.path).fix(fix))
        })
    }

    /// What the service says that it is.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// GET. `path` as made by [`resource`], with `?NAME=VALUE` where there is one. Blocks.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::GET, path, Bytes::new())
    }

    /// POST, with a body. Blocks.
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.ask(Method::POST, path, self.write(body)?)
    }

    /// PATCH, with a body. Blocks.
    pub fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.ask(Method::PATCH, path, self.write(body)?)
    }

    /// DELETE. Blocks.
    pub fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::DELETE, path, Bytes::new())
    }

    /// GET of a text, such as `/metrics`. Blocks.
    pub fn text(&self, path: &str) -> Result<String> {
        let answer = self.send(Method::GET, path, Bytes::new());
        let bytes = self.runtime.block_on(answer)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until a job is over, with `progress` several times a second. A failed job is its
    /// error; one that is done, paused or cancelled is returned. Blocks.
    pub fn wait(&self, job: u64, mut progress: impl FnMut(&Job)) -> Result<Job> {
        let path = resource(&["jobs", &job.to_string()]) + &format!("?wait={LOOK}");
        loop {
            let mut job: Job = self.get(&path)?;
            progress(&job);
            match (job.state, job.error.take()) {
                (JobState::Failed, Some(failure)) => return Err(failure.into()),
                (JobState::Failed, None) => {
                    let what = format!("job {} failed and did not say why", job.id);
                    return Err(Error::new(Kind::Io, what).on(&self.path));
                }
                (state, _) if state.is_over() => return Ok(job),
                _ => {}
            }
        }
    }

    fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T> {
        let answer = self.timely(self.limit, self.send(method, path, body));
        self.read(&self.runtime.block_on(answer)?)
    }

    fn read<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        serde_json::from_slice(bytes).map_err(|e| {
            Error::new(Kind::Unsupported, "an answer that is not understood")
                .on(&self.path)
                .caused_by(e)
                .fix("Is the service of another version? Its log says which")
        })
    }

    fn write(&self, body: &impl Serialize) -> Result<Bytes> {
        let bytes = serde_json::to_vec(body);
        let bytes =
            bytes.map_err(|e| Error::invalid("a request that JSON cannot hold").caused_by(e));
        Ok(bytes?.into())
    }

    /// Sends one request; the body of the answer.
    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let changes = method != Method::GET;
        let broken = |e: &dyn std::fmt::Display| {
            let what = "the connection to the service broke before the answer";
            let e = Error::new(Kind::Io, what)
                .on(&self.path)
                .caused_by(e.to_string());
            match changes {
                true => e.fix("It may be done or not: look before you try again"),
                false => e.fix("Is the service still there? Try again"),
            }
        };
        let stream = self.open().await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| broken(&e))?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONNECTION, "close")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| Error::invalid(format!("{path:?} is no path")).caused_by(e))?;
        let answer = sender.send_request(request).await.map_err(|e| broken(&e))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let bytes = body.map_err(|e| broken(&e))?.to_bytes();
        connection.abort();
        if status.is_success() {
            return Ok(bytes);
        }
        match serde_json::from_slice::<Failure>(&bytes) {
            Ok(failure) => Err(failure.into()),
            Err(_) => {
                let what = format!("the service answered {path} with {status}");
                Err(Error::new(Kind::Io, what).on(&self.path))
            }
        }
    }

    async fn open(&self) -> Result<UnixStream> {
        let nobody = "nobody answers at the control socket";
        let place = Place::of(&self.path)?;
        UnixStream::connect(place.path()).await.map_err(|e| {
            let (kind, what, fix) = match e.kind() {
                ErrorKind::NotFound => (Kind::NotFound, nobody, "Start ploopd"),
                ErrorKind::ConnectionRefused => (
                    Kind::NotFound,
                    nobody,
                    "The service that made it was killed: start it again",
                ),
                ErrorKind::WouldBlock => (
                    Kind::InUse,
                    "too many clients wait at the control socket",
                    "Try again in a moment",
                ),
                _ => return Error::io("connect to the control socket", &self.path, e),
            };
            Error::new(kind, what).on(&self.path).caused_by(e).fix(fix)
        })
    }
}
