//! `/`: the status page, for people. One document that fetches nothing but this API, without a build step.

use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use axum::http::header::{HeaderName, X_CONTENT_TYPE_OPTIONS};
use axum::response::IntoResponse;
use uuid::Uuid;

use super::problem::Problems;

/// The page. Each answer has a word in it that nobody could know before, and only what has it is a script or a style of ours.
const PAGE: &str = include_str!("page.html");
const NONCE: &str = "{nonce}";
const RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");

/// The status page.
#[utoipa::path(
    get, path = "/", tag = "daemon", operation_id = "status_page",
    responses((status = 200, description = "A page for a browser.", body = String, content_type = "text/html"), Problems)
)]
pub(super) async fn page() -> impl IntoResponse {
    let nonce = Uuid::new_v4().simple().to_string();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    );
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (CONTENT_SECURITY_POLICY, policy),
        (CACHE_CONTROL, "no-store".to_owned()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (REFERRER_POLICY, "no-referrer".to_owned()),
        (RESOURCE_POLICY, "same-origin".to_owned()),
    ];
    (headers, PAGE.replace(NONCE, &nonce))
}
