//! HTTP to the daemon's unix socket.

use std::fmt;
use std::io;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::api::problem::Problem;
use crate::failure::{Failure, Shown};

/// Why a command failed.
#[derive(Debug)]
pub(super) struct CliError {
    /// What happened.
    pub(super) what: String,
    /// What to do.
    pub(super) remedy: String,
    /// The status of the daemon's answer; none where there is no answer of its.
    pub(super) status: Option<u16>,
}

impl CliError {
    pub(super) fn new(what: impl Into<String>, remedy: impl Into<String>) -> CliError {
        CliError {
            what: what.into(),
            remedy: remedy.into(),
            status: None,
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if !self.remedy.is_empty() {
            write!(f, "; what to do: {}", self.remedy)?;
        }
        Ok(())
    }
}

/// A client of one daemon. Each request has a connection of its own.
#[derive(Debug)]
pub(super) struct Client {
    api: PathBuf,
}

impl Client {
    pub(super) fn new(api: PathBuf) -> Client {
        Client { api }
    }

    pub(super) async fn get(&self, path: &str) -> Result<Value, CliError> {
        self.json(Method::GET, path, &[], Bytes::new()).await
    }

    pub(super) async fn post(&self, path: &str, body: &impl Serialize) -> Result<Value, CliError> {
        let body = serde_json::to_vec(body).map_err(|error| broken(&error))?;
        self.json(Method::POST, path, &[], body.into()).await
    }

    pub(super) async fn patch(&self, path: &str, body: &impl Serialize) -> Result<Value, CliError> {
        let body = serde_json::to_vec(body).map_err(|error| broken(&error))?;
        self.json(Method::PATCH, path, &[], body.into()).await
    }

    /// Posts with an idempotency key: however often it is sent, it is done once.
    pub(super) async fn post_once(
        &self,
        path: &str,
        body: &impl Serialize,
        key: &str,
    ) -> Result<Value, CliError> {
        let body = serde_json::to_vec(body).map_err(|error| broken(&error))?;
        let key = [("idempotency-key", key)];
        self.json(Method::POST, path, &key, body.into()).await
    }

    /// The events of a migration, from its beginning on.
    pub(super) async fn events(&self, id: &str) -> Result<Events, CliError> {
        let path = format!("/v1/migrations/{id}/events");
        let answer = self.request(Method::GET, &path, &[], Bytes::new()).await?;
        Ok(Events::of(answer))
    }

    /// The events of all migrations, from now on, or from behind the one that is called `after`.
    pub(super) async fn all_events(&self, after: Option<&str>) -> Result<Events, CliError> {
        let header = after.map(|after| ("last-event-id", after));
        let answer = self
            .request(Method::GET, "/v1/events", header.as_slice(), Bytes::new())
            .await?;
        Ok(Events::of(answer))
    }

    async fn json(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Value, CliError> {
        let answer = self.request(method, path, headers, body).await?;
        let bytes = read_body(answer).await?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).map_err(|error| broken(&error))
    }

    /// Sends a request; an answer that is an error is one.
    async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Response<Incoming>, CliError> {
        let stream = UnixStream::connect(&self.api)
            .await
            .map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        // Its error is told by the request that it carries.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "pagecopy")
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| broken(&error))?;
        let answer = sender
            .send_request(request)
            .await
            .map_err(|error| broken(&error))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let bytes = read_body(answer).await?;
        let error = match serde_json::from_slice::<Problem>(&bytes) {
            Ok(problem) => {
                let failure = Failure::new(problem.fault, problem.detail, "");
                CliError::new(Shown(&failure).to_string(), problem.remedy)
            }
            Err(_) => broken(&format!("{status}: {}", String::from_utf8_lossy(&bytes))),
        };
        Err(CliError {
            status: Some(status.as_u16()),
            ..error
        })
    }

    fn unreachable(&self, error: &io::Error) -> CliError {
        let api = self.api.display();
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => "run as the user that pagecopyd runs as",
            _ => "start pagecopyd on this host, or give its API socket with --api",
        };
        CliError::new(
            format!("pagecopyd cannot be reached at {api}: {error}"),
            remedy,
        )
    }
}

/// All of an answer.
async fn read_body(answer: Response<Incoming>) -> Result<Bytes, CliError> {
    let collected = answer.into_body().collect().await;
    Ok(collected.map_err(|error| broken(&error))?.to_bytes())
}

fn broken(error: &dyn fmt::Display) -> CliError {
    CliError::new(
        format!("the connection to pagecopyd broke: {error}"),
        "see pagecopyd's log; it goes on by itself if it still runs",
    )
}

/// Server-sent events.
#[derive(Debug)]
pub(super) struct Events {
    body: Incoming,
    buffer: BytesMut,
    /// What has come of an event.
    data: Option<Value>,
    last_id: Option<String>,
}

impl Events {
    fn of(answer: Response<Incoming>) -> Events {
        Events {
            body: answer.into_body(),
            buffer: BytesMut::new(),
            data: None,
            last_id: None,
        }
    }

    /// What the last event is called that has a name.
    pub(super) fn last_id(&self) -> Option<&str> {
        self.last_id.as_deref()
    }

    /// The next event, or `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Value>, CliError> {
        loop {
            while let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                if let Some(data) = line.strip_prefix(b"data:") {
                    let data = serde_json::from_slice(data).map_err(|error| broken(&error))?;
                    self.data = Some(data);
                } else if let Some(id) = line.strip_prefix(b"id:") {
                    self.last_id = Some(String::from_utf8_lossy(id).trim().to_owned());
                } else if line.trim_ascii().is_empty() && self.data.is_some() {
                    return Ok(self.data.take());
                }
                // Others keep the connection alive.
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => return Err(broken(&error)),
                None => return Ok(None),
            }
        }
    }
}
