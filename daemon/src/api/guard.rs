//! Who a browser may speak for: pages of other sites reach addresses of this host, too, in the name of whoever looks at them.
//!
//! Such a request names another host than this one (a name of the site's own that leads here), or says that it comes from
//! elsewhere (`Origin`, `Sec-Fetch-Site`), which no page can prevent. Programs say neither, and are not concerned.

use std::net::IpAddr;

use axum::extract::{ConnectInfo, Request};
use axum::http::header::{HOST, HeaderMap, HeaderName, ORIGIN};
use axum::middleware::Next;
use axum::response::Response;

use super::peer::Peer;
use super::problem::{ApiError, Kind};

/// What this daemon may be called besides the names of the host's loopback: the command line's word for it.
const OWN_NAME: &str = "pagecopy";
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Refuses what a page of another site asks for.
pub(super) async fn refuse_foreign(request: Request, next: Next) -> Result<Response, ApiError> {
    let headers = request.headers();
    // In a request to a proxy the host stands in the address, and counts.
    let host = request.uri().authority().map(|host| host.as_str());
    let host = host.or_else(|| text(headers, &HOST)).unwrap_or_default();
    // Over TLS a browser has seen from our certificate that the name is ours.
    let is_certified = matches!(
        request.extensions().get(),
        Some(ConnectInfo(Peer::Remote { .. }))
    );
    if !is_certified {
        check_host(host, headers)?;
    }
    check_origin(host, headers)?;
    Ok(next.run(request).await)
}

fn check_host(host: &str, headers: &HeaderMap) -> Result<(), ApiError> {
    if headers.contains_key(HOST) && !is_this_host(host) {
        return Err(foreign(
            format!(
                "the request is for the host {host:?}, which is not what this one is called on its socket"
            ),
            "name the host localhost: http://localhost/…, with the port of your tunnel if there is one",
        ));
    }
    Ok(())
}

fn check_origin(host: &str, headers: &HeaderMap) -> Result<(), ApiError> {
    let site = text(headers, &SEC_FETCH_SITE);
    if headers.contains_key(SEC_FETCH_SITE) && !matches!(site, Some("same-origin" | "none")) {
        return Err(cross_site());
    }
    let is_own = |origin: &str| {
        let of = origin.strip_prefix("http://");
        of.or_else(|| origin.strip_prefix("https://")) == Some(host)
    };
    if headers.contains_key(ORIGIN) && !text(headers, &ORIGIN).is_some_and(is_own) {
        return Err(cross_site());
    }
    Ok(())
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether `host`, with or without a port, can only be this one.
fn is_this_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.to_ascii_lowercase();
    let is_loopback = name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    is_loopback || name == "localhost" || name.ends_with(".localhost") || name == OWN_NAME
}

fn cross_site() -> ApiError {
    foreign(
        "the request comes from a page of another site".to_owned(),
        "open the status page itself (type its address); programs send neither Origin nor Sec-Fetch-Site",
    )
}

fn foreign(what: String, remedy: &str) -> ApiError {
    ApiError::new(Kind::Foreign, what, remedy)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn is_let_in(host: &str, more: &[(&'static str, &str)]) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, host.parse().unwrap());
        for (name, value) in more {
            headers.insert(*name, value.parse().unwrap());
        }
        check_host(host, &headers)
            .and_then(|()| check_origin(host, &headers))
            .is_ok()
    }

    #[test]
    fn names_that_can_only_be_this_host() {
        for own in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]:80",
            "[::1]",
            "a.localhost:1",
            "pagecopy",
        ] {
            assert!(is_let_in(own, &[]), "{own}");
        }
        for foreign in [
            "",
            "evil.example",
            "localhost.evil.example",
            "10.0.0.1",
            "[::2]",
            "evillocalhost",
            "127.0.0.1.evil.example:80",
            "localhost@evil.example",
        ] {
            assert!(!is_let_in(foreign, &[]), "{foreign}");
        }
        assert!(
            check_host("", &HeaderMap::new()).is_ok(),
            "HTTP/1.0 names no host"
        );
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let own = "localhost:8080";
        assert!(is_let_in(own, &[("origin", "http://localhost:8080")]));
        assert!(is_let_in(own, &[("sec-fetch-site", "same-origin")]));
        assert!(is_let_in(own, &[("sec-fetch-site", "none")]));
        for wrong in [
            ("origin", "http://evil.example"),
            ("origin", "http://localhost:8081"),
            ("origin", "null"),
            ("origin", ""),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("sec-fetch-site", "what"),
        ] {
            assert!(!is_let_in(own, &[wrong]), "{wrong:?}");
        }
    }
}
