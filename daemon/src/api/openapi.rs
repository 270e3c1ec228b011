//! The API's description: OpenAPI 3.1, made of the handlers and types themselves.

use std::sync::Arc;

use axum::Extension;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde_json::{Value, json};
use utoipa::openapi::security::SecurityScheme;
use utoipa::{Modify, OpenApi};

use super::problem::Problem;

/// What callers over TCP show.
const CERTIFICATE: &str = "certificate";

/// What is not said at a handler.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "pagecopy",
        description = "Moves running QEMU guests between hosts. Served over HTTP/1.1 on the unix socket `api`, and over TCP with mutual TLS where \
                       the configuration has `access.listen`. With a table `[access]`, GET needs the role `read` and everything else \
                       `operate`; without one, whoever can open the socket may do everything. Every error is a \
                       problem of RFC 9457 with `remedy` and `fault`."
    ),
    servers(
        (url = "http://localhost", description = "On the unix socket `api`: `curl --unix-socket /run/pagecopy/api.sock http://localhost/…`."),
        (
            url = "https://{address}", description = "Where the configuration has `access.listen`.",
            variables(("address" = (default = "host-a:7071", description = "HOST:PORT of a pagecopyd.")))
        ),
    ),
    components(schemas(Problem)),
    modifiers(&Certificates),
    // On the unix socket the kernel says who calls.
    security((), ("certificate" = [])),
    tags(
        (name = "migrations", description = "Guests that leave or arrive here."),
        (name = "preflight", description = "What is looked at before a guest moves."),
        (name = "receivers", description = "QEMUs that wait for a guest."),
        (name = "daemon", description = "The daemon itself."),
    )
)]
pub(super) struct Description;

/// Adds how callers over TCP are known.
struct Certificates;

impl Modify for Certificates {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::MutualTls {
            description: Some(
                "A certificate that the peers' authority has signed, and to one of whose DNS names the configuration gives a role."
                    .to_owned(),
            ),
            extensions: None,
        };
        let components = description.components.get_or_insert_default();
        components.add_security_scheme(CERTIFICATE, scheme);
    }
}

/// The description, as it is sent.
pub(super) type Text = Arc<str>;

/// `description` as it is sent.
pub(super) fn text(description: &utoipa::openapi::OpenApi) -> Text {
    let mut value = serde_json::to_value(description).unwrap_or_default();
    loosen_flattened_options(&mut value);
    value.to_string().into()
}

/// A flattened `Option` has all of its fields or none. utoipa writes "or null" there, which no object ever is.
fn loosen_flattened_options(value: &mut Value) {
    if let Some(parts) = value.get_mut("allOf").and_then(Value::as_array_mut) {
        for part in parts {
            let Some([null, some]) = part
                .get("oneOf")
                .and_then(Value::as_array)
                .map(Vec::as_slice)
            else {
                continue;
            };
            if *null == json!({ "type": "null" }) {
                *part = json!({ "anyOf": [some, { "type": "object" }] });
            }
        }
    }
    match value {
        Value::Array(all) => all.iter_mut().for_each(loosen_flattened_options),
        Value::Object(all) => all.values_mut().for_each(loosen_flattened_options),
        _ => {}
    }
}

/// What describes this API.
#[utoipa::path(
    get, path = "/v1/openapi.json", tag = "daemon", operation_id = "describe_api",
    responses((status = 200, description = "An OpenAPI 3.1 document.", body = Object, content_type = "application/json"))
)]
pub(super) async fn describe(Extension(text): Extension<Text>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], text.to_string())
}
