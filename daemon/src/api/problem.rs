//! Every error of the API as a problem of RFC 9457, with what to do about it.
//!
//! Handlers return an `ApiError`. What axum refuses by itself (a route that is not there, a method, a body that is too
//! large or no JSON) is made into one on the way out (`every_error`), so no other kind of error leaves the daemon.

use std::collections::BTreeMap;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::header::{ALLOW, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{IntoResponses, ToSchema};

use crate::failure::{Failure, Fault};
use crate::session::wait::Refused;

/// The media type of a problem.
pub const MEDIA_TYPE: &str = "application/problem+json";
/// Every type of problem begins so; what follows is in the README.
pub const TYPES: &str = "urn:problem-type:pagecopy:";
/// Of an answer that axum made, this many bytes may become the detail.
const MAX_DETAIL: usize = 4096;

/// An error, as RFC 9457 has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What kind of problem, for programs: `urn:problem-type:pagecopy:` and a word.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind in words, the same every time.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened this time.
    pub detail: String,
    /// What to do about it.
    pub remedy: String,
    /// Whose fault it is.
    pub fault: Fault,
}

/// The kinds of problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No JSON, or a header that is wrong.
    BadRequest,
    /// JSON of another shape: unknown fields, wrong types.
    Invalid,
    /// The idempotency key is another request's.
    KeyReused,
    /// Understood, and it cannot be.
    Refused,
    NotFound,
    NoSuchRoute,
    WrongMethod,
    /// For another host, or from a page of another site.
    Foreign,
    /// Not for this caller.
    Forbidden,
    /// Not in this state.
    Conflict,
    /// As many wait as may.
    QueueFull,
    TooLarge,
    MediaType,
    /// Not now.
    NotReady,
    ThisHost,
    PeerHost,
    Network,
    Guest,
    Qemu,
}

impl Kind {
    /// The word of its type, its status and its title.
    fn row(self) -> (&'static str, StatusCode, &'static str) {
        match self {
            Kind::BadRequest => (
                "bad-request",
                StatusCode::BAD_REQUEST,
                "The request is not understood",
            ),
            Kind::Invalid => (
                "invalid",
                StatusCode::UNPROCESSABLE_ENTITY,
                "The request has fields that are unknown, missing or of another type",
            ),
            Kind::KeyReused => (
                "key-reused",
                StatusCode::UNPROCESSABLE_ENTITY,
                "The idempotency key is another request's",
            ),
            Kind::Refused => (
                "refused",
                StatusCode::BAD_REQUEST,
                "What is asked for cannot be",
            ),
            Kind::NotFound => (
                "not-found",
                StatusCode::NOT_FOUND,
                "There is no such thing here",
            ),
            Kind::NoSuchRoute => (
                "no-such-route",
                StatusCode::NOT_FOUND,
                "The API has no such path",
            ),
            Kind::WrongMethod => (
                "wrong-method",
                StatusCode::METHOD_NOT_ALLOWED,
                "The path takes other methods",
            ),
            Kind::Foreign => (
                "foreign",
                StatusCode::FORBIDDEN,
                "The request is another site's",
            ),
            Kind::Forbidden => ("forbidden", StatusCode::FORBIDDEN, "The caller may not"),
            Kind::Conflict => ("conflict", StatusCode::CONFLICT, "Not in this state"),
            Kind::QueueFull => (
                "queue-full",
                StatusCode::TOO_MANY_REQUESTS,
                "As many migrations wait as may",
            ),
            Kind::TooLarge => (
                "too-large",
                StatusCode::PAYLOAD_TOO_LARGE,
                "The request is too large",
            ),
            Kind::MediaType => (
                "media-type",
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "The request is not JSON",
            ),
            Kind::NotReady => ("not-ready", StatusCode::SERVICE_UNAVAILABLE, "Not now"),
            Kind::ThisHost => (
                "this-host",
                StatusCode::INTERNAL_SERVER_ERROR,
                "This host failed",
            ),
            Kind::PeerHost => (
                "peer-host",
                StatusCode::BAD_GATEWAY,
                "The other host failed",
            ),
            Kind::Network => ("network", StatusCode::BAD_GATEWAY, "The network failed"),
            Kind::Guest => (
                "guest",
                StatusCode::BAD_GATEWAY,
                "The guest does not allow it",
            ),
            Kind::Qemu => ("qemu", StatusCode::BAD_GATEWAY, "QEMU failed"),
        }
    }

    /// What an answer of axum's own is about.
    fn of_status(status: StatusCode) -> Kind {
        match status {
            StatusCode::NOT_FOUND => Kind::NoSuchRoute,
            StatusCode::METHOD_NOT_ALLOWED => Kind::WrongMethod,
            StatusCode::PAYLOAD_TOO_LARGE => Kind::TooLarge,
            StatusCode::UNSUPPORTED_MEDIA_TYPE => Kind::MediaType,
            StatusCode::UNPROCESSABLE_ENTITY => Kind::Invalid,
            status if status.is_client_error() => Kind::BadRequest,
            _ => Kind::ThisHost,
        }
    }

    fn of_fault(fault: Fault) -> Kind {
        match fault {
            Fault::Operator => Kind::Refused,
            Fault::ThisHost => Kind::ThisHost,
            Fault::PeerHost => Kind::PeerHost,
            Fault::Network => Kind::Network,
            Fault::Guest => Kind::Guest,
            Fault::Qemu => Kind::Qemu,
        }
    }
}

/// A failure as an HTTP answer.
#[derive(Debug)]
pub(crate) struct ApiError(Box<Problem>);

impl ApiError {
    /// A problem of `kind` that is the caller's to mend.
    pub(crate) fn new(
        kind: Kind,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> ApiError {
        let fault = match kind.row().1 {
            status if status.is_client_error() => Fault::Operator,
            _ => Fault::ThisHost,
        };
        ApiError::of(kind, Failure::new(fault, detail, remedy))
    }

    pub(crate) fn not_found(what: String, remedy: &str) -> ApiError {
        ApiError::new(Kind::NotFound, what, remedy)
    }

    pub(crate) fn conflict(failure: &Failure) -> ApiError {
        ApiError::of(Kind::Conflict, failure.clone())
    }

    fn of(kind: Kind, failure: Failure) -> ApiError {
        let (word, status, title) = kind.row();
        ApiError(Box::new(Problem {
            kind: format!("{TYPES}{word}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: failure.what,
            remedy: failure.remedy,
            fault: failure.fault,
        }))
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        ApiError::of(Kind::of_fault(failure.fault), failure)
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> ApiError {
        match refused {
            Refused::Full(failure) => ApiError::of(Kind::QueueFull, failure),
            Refused::Failed(failure) => failure.into(),
        }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> ApiError {
        let kind = Kind::of_status(rejection.status());
        of_axum(kind, &rejection.body_text())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> ApiError {
        of_axum(Kind::BadRequest, &rejection.body_text())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status);
        let text = serde_json::to_string(&self.0).unwrap_or_default();
        let mut answer =
            (status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), text).into_response();
        let media_type = HeaderValue::from_static(MEDIA_TYPE);
        answer.headers_mut().insert(CONTENT_TYPE, media_type);
        answer
    }
}

fn of_axum(kind: Kind, text: &str) -> ApiError {
    ApiError::new(
        kind,
        format!("the request is not understood: {text}"),
        "/v1/openapi.json describes each request and its fields",
    )
}

/// There is no such route.
pub(super) async fn no_such_route(request: Request) -> ApiError {
    ApiError::new(
        Kind::NoSuchRoute,
        format!("there is no {} in this API", request.uri().path()),
        "/v1/openapi.json lists all paths; pagecopy and pagecopyd should be of the same version",
    )
}

/// Makes a problem of every error that is none yet.
pub(super) async fn every_error(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = next.run(request).await;
    let failed = answer.status().is_client_error() || answer.status().is_server_error();
    let is_problem = answer
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind == MEDIA_TYPE);
    if !failed || is_problem {
        return answer;
    }
    let (parts, body) = answer.into_parts();
    let allow = parts.headers.get(ALLOW).cloned();
    let error = match &allow {
        Some(allow) if parts.status == StatusCode::METHOD_NOT_ALLOWED => ApiError::new(
            Kind::WrongMethod,
            format!("{path} does not take {method}"),
            format!("it takes {}", allow.to_str().unwrap_or_default()),
        ),
        _ => of_axum(Kind::of_status(parts.status), &text(body).await),
    };
    let mut answer = error.into_response();
    answer
        .headers_mut()
        .extend(allow.map(|allow| (ALLOW, allow)));
    answer
}

async fn text(body: Body) -> String {
    let bytes = to_bytes(body, MAX_DETAIL).await.unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// In the documentation of a route: whatever else comes is a [`Problem`].
pub(super) struct Problems;

impl IntoResponses for Problems {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let schema = Ref::from_schema_name(Problem::name());
        let content = ContentBuilder::new().schema(Some(schema)).build();
        let response = ResponseBuilder::new()
            .description("What went wrong, whose fault it is, and what to do.")
            .content(MEDIA_TYPE, content)
            .build();
        BTreeMap::from([("default".to_owned(), response.into())])
    }
}
